"""The same decoder from both of torch's exporters comes out nearly the same."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from cleanup.torchscript_decoder import Sizes
from cleanup.torchscript_decoder import feeds as decoder_feeds
from cleanup_graphs import assert_same_results, ops

from onnxslim_llm.ir.model import from_proto, open_model
from onnxslim_llm.passes.cleanup.cleanup import Cleanup
from onnxslim_llm.rewrite.context import Context

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))  # models/ is no part of the installed package

#: torch's newer exporter needs one more package.
EXPORTERS = ["torchscript", *(["dynamo"] if find_spec("onnxscript") else [])]
SIZES = Sizes(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=128)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    from models.export import export
    from models.llama import Llama, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(SIZES.vocab, SIZES.hidden, SIZES.ffn, SIZES.layers, SIZES.heads, SIZES.kv_heads, SIZES.head)
    model = Llama(config).eval()
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for exporter in EXPORTERS:
        export(model, folder / f"{exporter}.onnx", exporter)
        found[exporter] = onnx.load(folder / f"{exporter}.onnx")
    return found


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_results_size_and_fixpoint(exports: dict[str, onnx.ModelProto], exporter: str, tmp_path: Path) -> None:
    before = exports[exporter]
    onnx.save(before, tmp_path / "model.onnx")
    model = open_model(tmp_path / "model.onnx")
    Cleanup().apply(model, Context())
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert after.ByteSize() < before.ByteSize()
    for batch, tokens, past in [(1, 5, 0), (2, 3, 4), (2, 1, 7)]:
        assert_same_results(before, after, decoder_feeds(SIZES, batch, tokens, past))
    assert not Cleanup().apply(from_proto(after), Context())


@pytest.mark.skipif(len(EXPORTERS) < 2, reason="onnxscript is not installed")
def test_both_exporters_come_to_the_same_operators(exports: dict[str, onnx.ModelProto]) -> None:
    counts = []
    for before in exports.values():
        model = from_proto(before)
        Cleanup().apply(model, Context())
        counts.append(ops(model.to_proto()))
    torchscript, dynamo = counts
    heavy = ("MatMul", "Softmax", "Reshape", "Transpose", "Expand", "Concat", "Slice", "Gather", "Where", "Range")
    # The one writes the size of an axis as Shape and Gather, the other as Shape and Squeeze.
    for op in heavy:
        assert abs(torchscript[op] - dynamo[op]) <= (3 if op == "Gather" else 0), op
