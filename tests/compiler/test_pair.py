"""Two graphs of fixed sizes that share their weights: what they write together, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxslim_llm as osl
from onnxslim_llm.cli.sessions import open_decoder
from onnxslim_llm.compiler.graphs import parse_graphs, shapes_of
from onnxslim_llm.compiler.pair import PAIR_GATE, compare_texts
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.rewrite.registry import make_pass
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.generate import generate
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.static_pair import StaticPair
from onnxslim_llm.targets import get_target

SHAPES = ("batch=1", "prefill:seq=8,past=0,total=8", "decode:seq=1,past=15,total=16")
#: float32 logits of a few units, computed in another order.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reference_decoder import DecoderSpec, write

    folder = tmp_path_factory.mktemp("decoder")
    return write(DecoderSpec(layers=2, hidden=64, heads=2, kv_heads=1, ffn=128, vocab=256), folder / "model.onnx")


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> osl.compiler.CompileResult:
    out = tmp_path_factory.mktemp("pair") / "out"
    return osl.compile(source, out, target="ort-cpu", recipe="safe", shape=SHAPES)


def pair_of(folder: Path) -> StaticPair:
    opened = open_decoder(folder / "model.onnx", threads=1)
    assert isinstance(opened, StaticPair)
    return opened


def external(path: Path) -> dict[str, tuple[str, ...]]:
    """Where each large initializer lies: file, offset, length."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = (entries["location"], entries["offset"], entries["length"])
    return found


@pytest.mark.parametrize("length", [1, 5, 8, 11])  # shorter than the graph of prompts, as long, longer
def test_the_pair_gives_the_source_s_logits(source: Path, artifact: osl.compiler.CompileResult, length: int) -> None:
    runner, pair = DecoderRunner(open_session(source, threads=1)), pair_of(artifact.path)
    ids = np.random.default_rng(length).integers(0, 256, (1, 16))
    wanted, _ = runner.extend(ids)
    first, state = pair.prefill(ids[:, :length])
    rest, _ = pair.prefill(ids[:, length:], state)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), wanted, atol=ROUNDING)


def test_the_manifest_tells_of_both(artifact: osl.compiler.CompileResult) -> None:
    manifest = artifact.manifest
    assert [(graph.name, graph.path) for graph in manifest.graphs] == [
        ("prefill", "model.onnx"),
        ("decode", "decode.onnx"),
    ]
    assert all(graph.verify is not None for graph in manifest.graphs)
    assert manifest.generation is not None
    assert manifest.generation.top1_agreement == 1.0
    assert manifest.verify is not None
    assert PAIR_GATE in {gate.name for gate in manifest.verify.gates}


def test_weights_are_stored_once(artifact: osl.compiler.CompileResult) -> None:
    prefill, decode = external(artifact.path / "model.onnx"), external(artifact.path / "decode.onnx")
    assert prefill
    assert prefill == decode
    assert {location for location, _, _ in decode.values()} == {"model.onnx.data"}
    assert not (artifact.path / "decode.onnx.data").exists()


def test_caches_pass_without_another_rounding(source: Path, tmp_path: Path) -> None:
    shapes = ("batch=1", "prefill:seq=8,past=0,total=8", "decode:seq=1,past=7,total=8")
    result = osl.compile(source, tmp_path / "out", target="portable", recipe="w8a8", shape=shapes, verify="off")
    steps = [scales(result.path / name) for name in ("model.onnx", "decode.onnx")]
    both = steps[0].keys() & steps[1].keys()
    assert both
    assert {name: steps[0][name] for name in both} == {name: steps[1][name] for name in both}


def scales(path: Path) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each activation, by its name."""
    model = onnx.load(path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {
        node.input[0]: (float(constants[node.input[1]]), int(constants[node.input[2]]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def test_it_generates(source: Path, artifact: osl.compiler.CompileResult) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    runner = DecoderRunner(open_session(source, threads=1))
    wanted = list(generate(runner, prompt, max_new_tokens=100, context_length=16))
    assert list(generate(pair_of(artifact.path), prompt, max_new_tokens=100)) == wanted


def test_a_text_that_does_not_fit(artifact: osl.compiler.CompileResult) -> None:
    with pytest.raises(UsageError, match="17 tokens do not fit into caches of 15") as caught:
        pair_of(artifact.path).prefill(np.zeros((1, 17), np.int64))
    assert "decode:past=SIZE" in caught.value.todo


def test_a_wrong_pair_is_told_from_a_right_one(source: Path, artifact: osl.compiler.CompileResult) -> None:
    runner, pair = DecoderRunner(open_session(source, threads=1)), pair_of(artifact.path)
    prompt = np.arange(6)[None]
    assert compare_texts(runner, pair, prompt, 4).kl < ROUNDING
    pair._at_the_end = lambda cache, filled: np.pad(  # type: ignore[method-assign]
        filled, [(0, pair.room - filled.shape[i] if i == cache.sequence_axis else 0) for i in range(filled.ndim)]
    )
    assert compare_texts(runner, pair, prompt, 4).kl > 100 * ROUNDING


def test_one_of_two_graphs_is_missing() -> None:
    with pytest.raises(UsageError, match="the graph 'decode' are missing") as caught:
        parse_graphs(["prefill:seq=8"])
    assert "decode:seq=1" in caught.value.todo
    with pytest.raises(UsageError, match="no graph 'prefil'") as caught:
        parse_graphs(["prefil:seq=8", "decode:seq=1"])
    assert "did you mean 'prefill'" in caught.value.todo


def test_common_sizes_come_first() -> None:
    graphs = parse_graphs(["batch=1", "decode:seq=1,past=7", "prefill:seq=8,past=0"])
    assert [(graph.name, graph.sizes) for graph in graphs] == [
        ("prefill", "batch=1,seq=8,past=0"),
        ("decode", "batch=1,seq=1,past=7"),
    ]


def test_only_decoders_have_pairs(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="a pair of graphs needs a decoder"):
        osl.compile(tmp_path / "model.onnx", tmp_path / "out", shape=["prefill:n=2", "decode:n=1"])


def test_tables_of_positions_have_a_row_that_nobody_reads(source: Path) -> None:
    """The simulator of onnxruntime-qnn 2.7.0 reads the last of 64 rows of a narrow table wrongly."""
    sizes = "batch=1,seq=8,past=0,total=8"
    (shapes,) = shapes_of(open_model(source), get_target("qnn-htp"), parse_graphs(sizes))
    (table,) = shapes.for_lowering([make_pass("fold_rotary_tables", {})])
    assert table.options()["positions"] == 9
    both = shapes_of(open_model(source), get_target("qnn-htp"), parse_graphs(SHAPES))
    assert [each.positions for each in both] == [16, 16]
