"""What a script and a person rely on: exit codes, hints, JSON and silence, paths of every kind, the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from e2e_checks import Outcome, model_bytes, nothing_left, refused, whole
from e2e_models import HOPELESS, branches, decoder, mlp, qdq, save, save_external

Cli = Callable[..., Outcome]

ROOT = Path(__file__).resolve().parents[2]

UNUSUAL_NAMES = [
    "two words",
    "größe 模型",
    'quote\'s "double"',
    "semi;colon & $HOME `x`",
    "[brackets] *?",
    "-dash",
    "a=b,c",
]


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(loaded)
    return loaded


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--target", "ort_cpu"], ["ort_cpu", "did you mean 'ort-cpu'"]),
        (["--target", "gpu"], ["gpu", "ort-cpu", "portable"]),
        (["--recipe", "int44"], ["int44", "did you mean 'int4'"]),
        (["--recipe", "missing.toml"], ["missing.toml"]),
        (["--set", "quantise_weights.bits=4"], ["quantise_weights", "did you mean 'quantize_weights'"]),
        (["--set", "quantize_weights.blok=32"], ["blok", "did you mean 'block'"]),
        (["--set", "quantize_weights.bits=7"], ["bits", "7"]),
        (["--set", "quantize_weights.bits=four"], ["bits", "four"]),
        (["--set", "quantize_weights.block=33"], ["block", "33"]),
        (["--set", "quantize_weights.exclude=['(']"], ["exclude", "("]),
        (["--set", "bits=4"], ["bits=4", "PASS.OPTION=VALUE"]),
        (["--set", "quantize_weights.bits"], ["PASS.OPTION=VALUE"]),
        (["--reciep", "int4"], ["--reciep", "did you mean '--recipe'"]),
        (["--verify", "ful"], ["ful", "full"]),
        (["--jobs", "0"], ["--jobs", "0"]),
        (["--jobs", "two"], ["--jobs", "two"]),
        (["--memory-limit", "lots"], ["--memory-limit", "lots"]),
        (["--memory-limit", "-5"], ["--memory-limit"]),
        (["--calib", "missing.npz"], ["missing.npz"]),
        (["--recipe", ""], ["recipe"]),
        (["--target", ""], ["target"]),
        (["another.onnx"], ["another.onnx"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[:1] != ["did"] else None,
)
def test_usage(here: Cli, tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    save(mlp(), tmp_path / "model.onnx")
    refused(here("compile", "model.onnx", "-o", "build", *_after_recipe(arguments)), 2, *names)
    nothing_left(tmp_path, "model.onnx")


def _after_recipe(arguments: list[str]) -> list[str]:
    return arguments if "--recipe" in arguments else ["--recipe", "int4-fast", *arguments]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),  # a recipe without passes is one: nothing but lowering
        ("passes = [", ["TOML"]),
        ('passes = [{name = "quantize_wieghts"}]', ["quantize_wieghts", "did you mean 'quantize_weights'"]),
        ('passes = [{name = "quantize_weights", bit = 4}]', ["bit"]),
        ('gates = "int5"', ["gates"]),
        ('extends = "saef"', ["saef", "did you mean 'safe'"]),
        ('extends = "recipe.toml"', ["recipe.toml -> recipe.toml"]),
        ("passes = 3", ["passes"]),
        ('passes = 3\nextends = "safe"', ["passes"]),
        ("extends = [1]", ["[1]"]),
        ("colour = 'red'", ["colour"]),
        ("\udcff", []),
    ],
)
def test_recipes_that_are_wrong(here: Cli, tmp_path: Path, text: str, names: list[str]) -> None:
    save(mlp(), tmp_path / "model.onnx")
    (tmp_path / "recipe.toml").write_bytes(text.encode(errors="surrogateescape"))
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "recipe.toml")
    if text == "":
        assert done.code == 0, done.err
        return
    refused(done, 2, *names)
    nothing_left(tmp_path, "model.onnx", "recipe.toml")


def test_a_recipe_extends_one_beside_it(here: Cli, tmp_path: Path) -> None:
    save(mlp(), tmp_path / "model.onnx")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.toml").write_text('gates = "int8"\n[[passes]]\nname = "quantize_weights"\nbits = 8')
    (tmp_path / "recipes" / "mine.toml").write_text('extends = "base.toml"\n[[passes]]\nname = "cleanup"')
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "recipes/mine.toml")
    assert done.code == 0, done.err
    resolved = whole(tmp_path / "build")["recipe"]
    assert resolved["gates"] == "int8"
    assert [step["name"] for step in resolved["passes"]] == ["quantize_weights", "cleanup"]


def test_a_calibration_file_that_does_not_fit(here: Cli, tmp_path: Path) -> None:
    import numpy as np

    save(mlp(), tmp_path / "model.onnx")
    for name, array in (("x", np.zeros((2, 3), np.float32)), ("z", np.zeros((2, 128), np.float32))):
        np.savez(tmp_path / "inputs.npz", **{name: array})
        refused(here("compile", "model.onnx", "-o", "build", "--calib", "inputs.npz"), 2, "inputs.npz")
    whole_file = (tmp_path / "inputs.npz").read_bytes()
    damaged = bytearray(whole_file)
    damaged[len(damaged) // 2] ^= 0xFF
    for content in (b"", b"PK not a zip", b"PK\3\4 cut", b"\x93NUMPY", b"text", whole_file[:-30], bytes(damaged)):
        (tmp_path / "inputs.npz").write_bytes(content)
        parts = refused(here("compile", "model.onnx", "-o", "build", "--calib", "inputs.npz"), 2, "inputs.npz")
        assert "pickle" not in parts["what"]
    nothing_left(tmp_path, "inputs.npz", "model.onnx")


def test_a_calibration_text_without_a_tokenizer(here: Cli, tmp_path: Path) -> None:
    save(decoder(), tmp_path / "model.onnx")
    (tmp_path / "text.txt").write_text("some text")
    done = here("compile", "model.onnx", "-o", "build", "--calib", "text.txt")
    assert done.code in (2, 5), done.err
    refused(done, done.code, "tokenizer")
    nothing_left(tmp_path, "model.onnx", "text.txt")


# --- JSON and silence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["-q"], ["-v"]], ids=["json", "json -q", "json -v"])
def test_stdout_is_the_manifest_and_nothing_else(
    cli: Cli, tmp_path: Path, tiny: Path, schema: dict[str, Any], options: list[str]
) -> None:
    done = cli("compile", tiny, "-o", "build", "--json", *options)
    assert done.code == 0, done.err
    printed = json.loads(done.out, parse_constant=pytest.fail)  # NaN is no JSON
    jsonschema.validate(printed, schema)
    assert printed == json.loads((tmp_path / "build" / "manifest.json").read_bytes())
    assert printed["verify"]["gates"]
    whole(tmp_path / "build")


def test_the_manifest_of_a_failed_gate(cli: Cli, tmp_path: Path, tiny: Path, schema: dict[str, Any]) -> None:
    done = cli("compile", tiny, "-o", "build", "--json", *HOPELESS)
    refused(done, 4, "kl_mean")
    printed = json.loads(done.out)
    jsonschema.validate(printed, schema)
    assert printed == json.loads((tmp_path / "build.failed.json").read_bytes())


@pytest.mark.parametrize("make", [mlp, branches, qdq])
def test_manifests_of_other_models(here: Cli, tmp_path: Path, schema: dict[str, Any], make: Callable[[], Any]) -> None:
    save(make(), tmp_path / "model.onnx")
    for recipe in ("safe", "int8"):
        done = here("compile", "model.onnx", "-o", recipe, "--json", "--recipe", recipe)
        assert done.code == 0, done.err
        jsonschema.validate(json.loads(done.out), schema)


def test_quiet_is_silent(cli: Cli, tmp_path: Path, tiny: Path) -> None:
    done = cli("compile", tiny, "-o", "build", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    refused(cli("compile", tiny, "-o", "build", "-q"), 2, "build")


def test_without_a_terminal_there_are_no_control_characters(cli: Cli, tiny: Path) -> None:
    done = cli("compile", tiny, "-o", "build")
    assert done.code == 0, done.err
    assert "\x1b" not in done.err
    assert "\r" not in done.err


def test_stderr_that_is_closed(cli: Cli, tmp_path: Path, tiny: Path) -> None:
    """`2>&-`, as some supervisors start their children: nothing to tell is no reason to fail."""
    done = cli("compile", tiny, "-o", "build", "--verify", "off", preexec_fn=lambda: os.close(2))
    assert done.code == 0
    whole(tmp_path / "build")


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNUSUAL_NAMES)
def test_unusual_paths(here: Cli, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    source = save_external(mlp(), folder / f"{name}.onnx", f"{name}.bin")
    done = here("compile", source, "-o", folder / f"{name} out")
    assert done.code == 0, done.err
    manifest = whole(folder / f"{name} out")
    assert Path(manifest["source"]["path"]) == source
    assert {Path(entry["path"]).name for entry in manifest["source"]["files"]} == {f"{name}.onnx", f"{name}.bin"}
    refused(here("compile", folder / f"no {name}.onnx"), 2, f"no {name}.onnx")


def test_a_path_that_is_no_unicode(cli: Cli, tmp_path: Path) -> None:
    """A file system holds bytes; a name that is no UTF-8 is told or handled, and no bug."""
    name = os.fsdecode(b"caf\xe9")
    source = save(mlp(), tmp_path / name / "model.onnx")
    done = cli("compile", source, "-o", tmp_path / name / "build", "--verify", "off", errors="surrogateescape")
    assert done.code in (0, 2, 5), done.err
    if done.code == 0:
        whole(tmp_path / name / "build", valid=False)  # onnx.checker takes no such path
    else:
        refused(done, done.code)


def test_a_relative_path_from_another_folder(here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_external(mlp(), tmp_path / "a" / "model.onnx")
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "weights.bin").write_bytes(b"another file of the same name, in the working folder")
    monkeypatch.chdir(tmp_path / "b" / "c")
    assert here("compile", "../../a/model.onnx", "-o", "../out").code == 0
    whole(tmp_path / "b" / "out")
    monkeypatch.chdir(tmp_path / "a")
    assert here("compile", "model.onnx", "-o", "direct").code == 0
    assert model_bytes(tmp_path / "a" / "direct") == model_bytes(tmp_path / "b" / "out")
    monkeypatch.chdir("/")
    assert here("inspect", tmp_path / "a" / "model.onnx").code == 0


def test_a_source_through_links(here: Cli, tmp_path: Path) -> None:
    """As model caches lay their files out: the folder may be a link, the model inside of it too."""
    save(mlp(), tmp_path / "blobs" / "abcdef")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/abcdef")
    (tmp_path / "latest").symlink_to("snapshot")
    assert here("compile", "latest", "-o", "build").code == 0
    whole(tmp_path / "build")


def test_the_source_is_not_touched(here: Cli, tmp_path: Path, wide: Path) -> None:
    shutil.copytree(wide.parent, tmp_path / "m")
    source = tmp_path / "m" / wide.name
    os.utime(source, (1, 1))

    def seen() -> dict[str, tuple[bytes, float]]:
        return {p.name: (p.read_bytes(), p.stat().st_mtime) for p in source.parent.iterdir()}

    before = seen()
    assert here("compile", source, "-o", "build").code == 0
    assert seen() == before


def test_an_artifact_can_be_moved_and_read_by_others(here: Cli, tmp_path: Path, wide: Path) -> None:
    """Nothing in it points to where it was made, and its rights are those of any new file."""
    assert here("compile", wide, "-o", "build", "--recipe", "int4-fast", "--verify", "off").code == 0
    shutil.move(tmp_path / "build", tmp_path / "elsewhere")
    whole(tmp_path / "elsewhere")
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    for path in (tmp_path / "elsewhere").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == usual, path.name
    (tmp_path / "usual folder").mkdir()
    assert (tmp_path / "elsewhere").stat().st_mode == (tmp_path / "usual folder").stat().st_mode
    assert str(tmp_path).encode() not in (tmp_path / "elsewhere" / "model.onnx").read_bytes()


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["safe", "int8", "int4-fast"])
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_jobs_memory_and_hash_seeds_change_no_byte(
    cli: Cli, tmp_path: Path, wide: Path, environment: dict[str, str], recipe: str, target: str
) -> None:
    options = ["--recipe", recipe, "--target", target, "--verify", "off"]
    options += ["--set", "quantize_weights.method=search"] if recipe == "int8" else []  # own text: test_own_text.py
    variants = {"one": ["--jobs", "1"], "two": ["--jobs", "2"], "small": ["--jobs", "4", "--memory-limit", "8MB"]}
    for seed, (name, extra) in enumerate(variants.items()):
        done = cli("compile", wide, "-o", name, *options, *extra, env={**environment, "PYTHONHASHSEED": str(seed)})
        assert done.code == 0, done.err
    one = model_bytes(tmp_path / "one")
    assert model_bytes(tmp_path / "two") == one
    assert model_bytes(tmp_path / "small") == one


def test_a_memory_limit_that_is_too_small(here: Cli, tmp_path: Path, wide: Path) -> None:
    done = here("compile", wide, "--recipe", "int4-fast", "-o", "build", "--verify", "off", "--memory-limit", "1kB")
    refused(done, 5, "memory", "weight '")
    assert not (tmp_path / "build").exists()
    again = here("compile", wide, "--recipe", "int4-fast", "-o", "build", "--verify", "off", "--resume")
    assert again.code == 0, again.err
    nothing_left(tmp_path, "build")


def test_the_resolved_recipe_of_a_manifest_makes_the_same_artifact(here: Cli, tmp_path: Path, tiny: Path) -> None:
    options = ["--set", "quantize_weights.block=64", "--set", "quantize_weights.method=rtn", "--verify", "off"]
    assert here("compile", tiny, "-o", "first", "--recipe", "int4-fast", *options).code == 0
    resolved = whole(tmp_path / "first")["recipe"]
    (tmp_path / "again.toml").write_text(_toml(resolved))
    done = here("compile", tiny, "-o", "second", "--recipe", "again.toml", "--verify", "off")
    assert done.code == 0, done.err
    assert model_bytes(tmp_path / "second") == model_bytes(tmp_path / "first")


def _toml(recipe: dict[str, Any]) -> str:
    head = [f"{key} = {json.dumps(value)}" for key, value in recipe.items() if isinstance(value, str)]
    for step in recipe["passes"]:
        head += ["[[passes]]", *(f"{key} = {json.dumps(value)}" for key, value in step.items())]
    return "\n".join(head)


def test_help_of_a_shell(cli: Cli) -> None:
    done = cli("compile", "--help", stdin=subprocess.DEVNULL)
    assert done.code == 0
    assert done.err == ""
