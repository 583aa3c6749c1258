"""Files that are no model, or not all of it: exit code 3, the file or tensor by name, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from e2e_checks import Outcome, nothing_left, refused, whole
from e2e_models import decoder, mlp, save, save_external
from onnx import TensorProto, numpy_helper

Cli = Callable[..., Outcome]

VERBS = ["compile", "inspect"]

FOREIGN = {
    "text": b"this is not a model\n" * 50,
    "zip": b"PK\x03\x04" + bytes(2000),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "safetensors": (80).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + bytes(40),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "json": b'{"model": "onnx"}',
    "one byte": b"\x08",
    "zeros": bytes(4096),
    "random": np.random.default_rng(5).bytes(4096),
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "a tensor, no model": numpy_helper.from_array(np.ones((8, 8), np.float32), "w").SerializeToString(),
    "a graph, no model": onnx.helper.make_graph([], "g", [], []).SerializeToString(),
}


def compile_refused(here: Cli, folder: Path, model: Path, *names: str, code: int = 3) -> dict[str, str]:
    """Check that a compile of `model` is refused, names `names`, and leaves `folder` as it was."""
    before = sorted(os.listdir(folder))
    parts = refused(here("compile", model, "-o", "build"), code, *names)
    nothing_left(folder, *before)
    assert parts["where"]
    assert parts["to do"]
    return parts


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_not_an_onnx_file(here: Cli, tmp_path: Path, kind: str, verb: str) -> None:
    (tmp_path / "model.onnx").write_bytes(FOREIGN[kind])
    refused(here(verb, "model.onnx"), 3, "model.onnx")
    nothing_left(tmp_path, "model.onnx")


@pytest.mark.parametrize("verb", VERBS)
def test_empty_file(here: Cli, tmp_path: Path, verb: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    parts = refused(here(verb, "model.onnx"), 3, "model.onnx")
    assert "empty" in parts["what"]
    nothing_left(tmp_path, "model.onnx")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.5, 0.9, 0.999, 0.99999])
def test_truncated_file(here: Cli, tmp_path: Path, tiny: Path, share: float) -> None:
    content = tiny.read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: max(1, int(share * len(content)))])
    compile_refused(here, tmp_path, tmp_path / "model.onnx", "model.onnx")


def test_truncated_at_the_last_byte(here: Cli, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny.read_bytes()[:-1])
    compile_refused(here, tmp_path, tmp_path / "model.onnx", "model.onnx")


def test_damaged_bytes_never_end_in_a_bug(here: Cli, tmp_path: Path) -> None:
    """Whatever 1 to 3 wrong bytes do to a model, the command refuses it or makes something whole of it."""
    rng = np.random.default_rng(3)
    content = save(mlp(), tmp_path / "good.onnx").read_bytes()
    head = (
        len(content) - 2 * 128 * 128 * 4
    )  # weights are numbers whatever their bytes are: damage what says what they are
    codes = set()
    for attempt in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[int(place) if place % 5 == 0 else int(place) % head] = int(rng.integers(0, 256))
        (tmp_path / "bad.onnx").write_bytes(damaged)
        done = here("compile", "bad.onnx", "-o", f"build{attempt}", "--recipe", "int8", "--verify", "off")
        codes.add(done.code)
        if done.code == 0:
            assert (tmp_path / f"build{attempt}" / "manifest.json").exists()
        else:
            refused(done, 3)
    assert codes == {0, 3}


@pytest.mark.parametrize("verb", VERBS)
def test_missing_external_data(here: Cli, tmp_path: Path, verb: str) -> None:
    model = save_external(mlp(), tmp_path / "m" / "model.onnx", "gone.bin")
    (tmp_path / "m" / "gone.bin").unlink()
    refused(here(verb, model), 3, "tensor 'W1'", "gone.bin")
    nothing_left(tmp_path, "m")


@pytest.mark.parametrize("lost", [1, 500, 60_000])
def test_short_external_data(here: Cli, tmp_path: Path, lost: int) -> None:
    model = save_external(mlp(), tmp_path / "m" / "model.onnx", "short.bin")
    data = tmp_path / "m" / "short.bin"
    os.truncate(data, data.stat().st_size - lost)
    name = "tensor 'W2'" if lost > 512 else "tensor 'bias'"  # weights lie in the order W1, W2, bias
    compile_refused(here, tmp_path, model, name, "short.bin", str(data.stat().st_size))


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-1"), ("offset", "1e3"), ("offset", str(2**70)), ("length", "12"), ("length", "x")]
)
def test_external_places_that_make_no_sense(here: Cli, tmp_path: Path, key: str, value: str) -> None:
    model = save_external(mlp(), tmp_path / "m" / "model.onnx")
    proto = onnx.load(model, load_external_data=False)
    next(entry for entry in proto.graph.initializer[1].external_data if entry.key == key).value = value
    compile_refused(here, tmp_path, save(proto, model), "tensor 'W2'", "weights.bin")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("how", ["..", "nested ..", "absolute", "symlink", "symlinked folder", "windows", "empty"])
def test_external_path_that_leaves_the_model_folder(here: Cli, tmp_path: Path, how: str, verb: str) -> None:
    """Refused even if the file is there and holds the right bytes."""
    folder = tmp_path / "m"
    model = save_external(mlp(), folder / "model.onnx", "w.bin")
    os.rename(folder / "w.bin", tmp_path / "secret.bin")
    (folder / "sub").mkdir()
    (folder / "link.bin").symlink_to("../secret.bin")
    (folder / "up").symlink_to("..")
    location = {
        "..": "../secret.bin",
        "nested ..": "sub/../../secret.bin",
        "absolute": str(tmp_path / "secret.bin"),
        "symlink": "link.bin",
        "symlinked folder": "up/secret.bin",
        "windows": "C:\\secret.bin",
        "empty": "",
    }[how]
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = location
    save(proto, model)
    parts = refused(here(verb, model), 3, "tensor 'W1'", location)
    assert how == "empty" or "folder" in parts["what"]
    nothing_left(tmp_path, "m", "secret.bin")


def test_external_data_in_a_device_or_pipe(here: Cli, tmp_path: Path) -> None:
    model = save_external(mlp(), tmp_path / "m" / "model.onnx", "w.bin")
    (tmp_path / "m" / "w.bin").unlink()
    os.mkfifo(tmp_path / "m" / "w.bin")  # opening it would wait for ever
    compile_refused(here, tmp_path, model, "tensor 'W1'", "w.bin")


CHANGING = """
import sys
from pathlib import Path
from onnxslim_llm.cli.run import run
from onnxslim_llm.rewrite.pipeline import Pipeline

original = Pipeline.run

def changing(self, *args, **kwargs):
    data = Path("m/w.bin")
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2] if sys.argv[1] == "cut" else content[::-1])
    return original(self, *args, **kwargs)

Pipeline.run = changing
sys.exit(run(["compile", "m/model.onnx", "-o", "build", "--recipe", "int8"]))
"""


@pytest.mark.parametrize("how", ["cut", "overwrite"])
def test_external_data_that_changes_during_the_compile(tmp_path: Path, environment: dict[str, str], how: str) -> None:
    """In a process of its own: to read what a file has lost under its map would end it with a bus error."""
    save_external(mlp(), tmp_path / "m" / "model.onnx", "w.bin")
    done = subprocess.run(
        [sys.executable, "-c", CHANGING, how], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    refused(Outcome(done.returncode, done.stdout, done.stderr), 5, "w.bin", "changed")
    assert not (tmp_path / "build").exists()


def test_two_models_in_a_folder(here: Cli, tmp_path: Path) -> None:
    for name in ("encoder.onnx", "vision.onnx"):
        save(mlp(), tmp_path / "m" / name)
    compile_refused(here, tmp_path, tmp_path / "m", "encoder.onnx", "vision.onnx", code=2)


def test_a_folder_without_a_model(here: Cli, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    compile_refused(here, tmp_path, tmp_path / "m", str(tmp_path / "m"), code=2)


def test_a_folder_with_one_model_and_data_and_side_files(here: Cli, tmp_path: Path) -> None:
    save_external(decoder(), tmp_path / "m" / "decoder.onnx")
    (tmp_path / "m" / "config.json").write_text("{}")
    assert here("compile", "m", "-o", "build", "--verify", "off").code == 0
    carried = {entry["path"] for entry in whole(tmp_path / "build")["artifact"]["carried"]}
    assert carried == {"config.json", "genai_config.json"}  # the second is ours: the model is a decoder


@pytest.mark.parametrize("name", ["nothing.onnx", "no/such/folder/model.onnx", "-", ""])
def test_a_path_that_is_not_there(here: Cli, tmp_path: Path, name: str) -> None:
    save(mlp(), tmp_path / "model.onnx")
    done = here("compile", name, "-o", "build")
    assert done.code == 2, done.err
    refused(done, 2)
    nothing_left(tmp_path, "model.onnx")


def test_a_model_without_the_right_to_read_it(cli: Cli, tmp_path: Path) -> None:
    model = save(mlp(), tmp_path / "model.onnx")
    model.chmod(0)
    if os.access(model, os.R_OK):  # root reads everything
        pytest.skip("this user may read every file")
    refused(cli("compile", model, "-o", "build"), 5, "model.onnx")


def test_a_bad_file_in_a_process_of_its_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(FOREIGN["text"])
    done = cli("compile", "model.onnx", "-o", "build", "--json")
    refused(done, 3, "model.onnx")
    assert done.out == ""
    nothing_left(tmp_path, "model.onnx")


@pytest.mark.parametrize("kind", [TensorProto.UNDEFINED, 123])
def test_an_element_type_that_nobody_knows(here: Cli, tmp_path: Path, kind: int) -> None:
    proto = mlp()
    proto.graph.initializer[0].data_type = kind
    compile_refused(here, tmp_path, save(proto, tmp_path / "model.onnx"), "W1")
    if kind == TensorProto.UNDEFINED:
        return
    assert here("compile", "model.onnx", "-o", "kept", "--verify", "off", "--recipe", "safe").code == 0
    tensor = onnx.load(tmp_path / "kept" / "model.onnx").graph.initializer[0]
    assert (tensor.name, tensor.data_type, tensor.raw_data) == ("W1", kind, proto.graph.initializer[0].raw_data)


def test_weights_of_the_wrong_size(here: Cli, tmp_path: Path) -> None:
    proto = mlp()
    proto.graph.initializer[1].dims[0] += 1
    compile_refused(here, tmp_path, save(proto, tmp_path / "model.onnx"), "tensor 'W2'")


def test_a_model_larger_than_a_message_may_be(here: Cli, tmp_path: Path) -> None:
    """A header that announces 3 GiB of inline weights: nothing is allocated for them."""
    proto = mlp()
    content = proto.SerializeToString()
    raw = proto.graph.initializer[0].raw_data
    place = content.index(raw[:64])
    assert content[place - 3 : place] == b"\x80\x80\x04"  # the length of W1, 65536, as a varint
    # A varint of the same three bytes can say at most 2 MiB; the rest of the file is far less than that.
    (tmp_path / "model.onnx").write_bytes(content[: place - 3] + b"\xff\xff\x7f" + content[place:])
    compile_refused(here, tmp_path, tmp_path / "model.onnx", "model.onnx")


def test_stdin_and_the_working_folder_are_left_alone(cli: Cli, tmp_path: Path) -> None:
    """Without -o the artifact goes to the working folder, never to the model's."""
    model = save(mlp(), tmp_path / "models" / "net.onnx")
    (tmp_path / "work").mkdir()
    done = cli("compile", "../models/net.onnx", "--recipe", "safe", cwd=tmp_path / "work", stdin=subprocess.DEVNULL)
    assert done.code == 0, done.err
    whole(tmp_path / "work" / "net.slim")
    nothing_left(tmp_path / "models", model.name)
