"""`prune_vocabulary`: which tokens stay, that ids go on to mean what they did, and what is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.kept_tokens import LEFT_OUT_LOGIT, KeptTokens
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.prune.prune_vocabulary import PruneVocabulary
from onnxslim_llm.passes.prune.vocabulary.nearest_tokens import nearest_tokens
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

VOCABULARY = 256
#: Another order of the same float32 sums.
ROUNDING = 1e-4
TIES = ["no", "transpose", "duplicate"]


class Counted:
    """A text with some tokens, and two special ones."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def counts(self, name: str, size: int) -> NDArray[Any]:
        assert name == "input_ids"
        return np.bincount(np.asarray(self.ids, np.int64), minlength=size)

    def special(self) -> tuple[int, ...]:
        return (0, 255)


TEXT = Counted(*([7] * 3), *range(20, 80), 200)


def source_of(folder: Path, **spec: Any) -> Path:
    path = folder / "source.onnx"
    onnx.save(build(DecoderSpec(vocab=VOCABULARY, **spec)), path)
    return path


def pruned(path: Path, tokens: Counted | None = TEXT, **options: Any) -> tuple[Model, PassRecord]:
    model = open_model(path)
    (record,) = Pipeline([PruneVocabulary(**{"align": 1, **options})]).run(model, Context(tokens=tokens))
    return model, record


def runner(path: Path) -> DecoderRunner:
    return DecoderRunner(open_session(path, threads=1))


def logits(path: Path, ids: list[int]) -> np.ndarray:
    return runner(path).extend(np.array([ids], np.int64))[0]


def kept_of(record: PassRecord) -> np.ndarray:
    return KeptTokens(VOCABULARY, tuple(tuple(pair) for pair in record.detail["kept"])).ids


@pytest.mark.parametrize("tied", TIES)
def test_kept_tokens_have_the_logits_that_they_had(tmp_path: Path, tied: str) -> None:
    path = source_of(tmp_path, tied=tied)
    model, record = pruned(path)
    kept = kept_of(record)
    assert kept.tolist() == [0, 7, *range(20, 80), 200, 255]
    assert record.detail["tokens"] == [VOCABULARY, 64]
    save_model(model, tmp_path / "small.onnx")
    ids = [7, 33, 200, 0, 7, 79]
    expected, found = logits(path, ids), logits(tmp_path / "small.onnx", ids)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found[..., kept], expected[..., kept], atol=ROUNDING)
    gone = np.setdiff1d(np.arange(VOCABULARY), kept)
    # Added to the logit of the token with the nearest embedding.
    assert found[..., gone].max() < LEFT_OUT_LOGIT / 2


@pytest.mark.parametrize("tied", TIES)
def test_tables_shrink_once(tmp_path: Path, tied: str) -> None:
    path = source_of(tmp_path, tied=tied)
    model, _ = pruned(path)
    shapes = {tuple(weight_of(c).shape) for c in model.constants() if len(weight_of(c).shape) == 2}
    assert not any(VOCABULARY in shape for shape in shapes)
    save_model(model, tmp_path / "small.onnx")
    saved = path.stat().st_size - (tmp_path / "small.onnx").stat().st_size
    tables = 1 if tied == "transpose" else 2
    # The rows that are gone, less the map, the -10000 and the note.
    assert saved == pytest.approx(tables * (VOCABULARY - 64) * 64 * 4, abs=4096)


def test_small_logits_are_of_new_ids_and_the_runner_knows_the_old_ones(tmp_path: Path) -> None:
    path = source_of(tmp_path)
    model, record = pruned(path, logits="small")
    save_model(model, tmp_path / "small.onnx")
    session = open_session(tmp_path / "small.onnx", threads=1)
    ids = np.array([[7, 33, 200]], np.int64)
    reader = DecoderRunner(session)
    raw = session.run(reader.arrays(ids), ["logits"])["logits"]
    kept = kept_of(record)
    assert raw.shape == (1, 3, len(kept))
    whole = reader.extend(ids)[0]
    assert whole.shape == (1, 3, VOCABULARY) == (1, 3, reader.vocab)
    np.testing.assert_array_equal(whole[..., kept], raw)
    np.testing.assert_allclose(raw, logits(path, [7, 33, 200])[..., kept], atol=ROUNDING)


def test_a_token_that_is_left_out_is_read_as_the_nearest_one(tmp_path: Path) -> None:
    path = source_of(tmp_path)
    proto = onnx.load(path)
    table = next(t for t in proto.graph.initializer if "embed" in t.name)
    rows = numpy_helper.to_array(table).copy()
    rows[150] = 3 * rows[42]
    table.CopyFrom(numpy_helper.from_array(rows, table.name))
    onnx.save(proto, path)
    save_model(pruned(path)[0], tmp_path / "small.onnx")
    near, same = (logits(tmp_path / "small.onnx", [7, token, 33]) for token in (150, 42))
    np.testing.assert_array_equal(near, same)
    save_model(pruned(path, unknown=7)[0], tmp_path / "known.onnx")
    unknown, seven = (logits(tmp_path / "known.onnx", [7, token, 33]) for token in (150, 7))
    np.testing.assert_array_equal(unknown, seven)


def test_nearest_is_by_the_angle() -> None:
    table = np.array([[1, 0], [0, 1], [5, 1], [1, 5], [0, 0]], np.float32)
    assert nearest_tokens(table, np.array([0, 1])).tolist() == [0, 1, 0, 1, 0]


def test_only_frequent_tokens_stay_if_so_wanted(tmp_path: Path) -> None:
    path = source_of(tmp_path)
    assert kept_of(pruned(path, min_count=2)[1]).tolist() == [0, 7, 255]
    assert kept_of(pruned(path, min_count=2, special=False)[1]).tolist() == [7]
    assert kept_of(pruned(path, min_count=2, align=32)[1]).tolist() == [*range(31), 255]


@pytest.mark.parametrize("name", ["ids.json", "ids.txt", "ids.npy"])
def test_the_ids_of_a_file_stay(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith("npy"):
        np.save(file, np.array([3, 1, 2]))
    else:
        file.write_text("[3, 1, 2]" if name.endswith("json") else "3\n1\n2\n")
    _, record = pruned(source_of(tmp_path), tokens=None, keep=str(file))
    assert kept_of(record).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 999]", "not all of the model's 256 tokens"),
        ("[]", "not all of"),
        ("[1.5]", "cannot be read"),
        ("a b", "cannot"),
        ("99999999999999999999", "cannot be read"),
        ("[99999999999999999999]", "cannot be read"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        pruned(source_of(tmp_path), tokens=None, keep=str(tmp_path / "ids.json"))
    with pytest.raises(UsageError, match="cannot be read"):
        pruned(source_of(tmp_path), tokens=None, keep=str(tmp_path / "nowhere.json"))


def test_an_array_file_that_is_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.npy").touch()
    with pytest.raises(UsageError, match="cannot be read"):
        pruned(source_of(tmp_path), tokens=None, keep=str(tmp_path / "ids.npy"))


def test_something_has_to_say_which_tokens_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing says which tokens are needed"):
        pruned(source_of(tmp_path), tokens=None)


@pytest.mark.parametrize("options", [{"min_count": 0}, {"align": 0}, {"unknown": -2}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PruneVocabulary(**options)


def test_an_unknown_token_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown = 999 is no token"):
        pruned(source_of(tmp_path), unknown=999)


def test_too_few_tokens_to_leave_out(tmp_path: Path) -> None:
    _, record = pruned(source_of(tmp_path), Counted(*range(250)), align=32)
    assert [s.reason for s in record.skipped] == ["of 256 tokens, fewer than 32 could go"]


def test_a_table_that_is_read_elsewhere_stays(tmp_path: Path) -> None:
    path = source_of(tmp_path)
    proto = onnx.load(path)
    table = next(t.name for t in proto.graph.initializer if "embed" in t.name)
    proto.graph.node.append(onnx.helper.make_node("ReduceSum", [table], ["norm"], keepdims=0))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("norm", onnx.TensorProto.FLOAT, []))
    onnx.save(proto, path)
    _, record = pruned(path)
    assert not record.changed
    assert record.skipped[0].reason.startswith("ReduceSum")


def test_an_encoder_loses_rows_of_its_table_only(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["": 18]>
    encoder (int64[b, s] input_ids) => (float[b, s, 4] y)
    <float[40, 16] T, float[16, 4] W> { x = Gather (T, input_ids) h = Tanh (x) y = MatMul (h, W) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("T", (40, 16)), ("W", (16, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    onnx.save(proto, tmp_path / "source.onnx")
    model = open_model(tmp_path / "source.onnx")
    (record,) = Pipeline([PruneVocabulary(align=1, special=False)]).run(model, Context(tokens=Counted(3, 5, 9)))
    assert record.detail["tokens"] == [40, 3]
    save_model(model, tmp_path / "small.onnx")
    feeds = {"input_ids": np.array([[3, 9, 5, 5]], np.int64)}
    expected, found = (open_session(tmp_path / f"{n}.onnx").run(feeds)["y"] for n in ("source", "small"))
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_the_note_is_read_back() -> None:
    kept = KeptTokens.of(10, [1, 2, 3, 7])
    assert kept.ranges == ((1, 3), (7, 7))
    assert KeptTokens.from_metadata({"onnxslim_llm.kept_tokens": kept.to_text()}) == kept
    assert kept.new_ids.tolist() == [-1, 0, 1, 2, -1, -1, -1, 3, -1, -1]
    assert kept.stand_ins(np.array([7, 0, 9])).tolist() == [7, 1, 2]
    assert json.loads(kept.to_text())["vocabulary"] == 10
    assert KeptTokens.from_metadata({"onnxslim_llm.kept_tokens": "[]"}) is None
