"""Every width, block and kind of codes on the sample model, from the command to ONNX Runtime and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from op_models import needs_library

import onnxslim_llm as osl
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.runtime.session import open_session

pytestmark = [needs_library, pytest.mark.slow]

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "stdlib-llama"
#: The same codes and scales: what is left are sums in another order, through five layers.
CLOSENESS = 1e-4


def compiled(folder: Path, target: str, bits: int, block: int, symmetric: bool) -> Path:
    """The gates are those of the width: verification compares with the source in ONNX Runtime."""
    recipe = Recipe.load("int4-fast").model_copy(update={"gates": f"int{bits}"})
    recipe = recipe.with_settings(
        [f"quantize_weights.{name}={value}" for name, value in (("bits", bits), ("block", block))]
        + [f"quantize_weights.symmetric={str(symmetric).lower()}", "quantize_weights.sensitive=[]"]
        + ["quantize_weights.target_bits=0"]
    )
    return osl.compile(SAMPLE, folder, target=target, recipe=recipe).path


def nodes_of(artifact: Path, op: str) -> list[dict[str, object]]:
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    return [{a.name: helper.get_attribute_value(a) for a in n.attribute} for n in graph.node if n.op_type == op]


@pytest.mark.parametrize(
    ("bits", "block", "symmetric"), [(2, 32, False), (3, 32, True), (3, 128, False), (4, 16, True), (4, 256, False)]
)
def test_our_operators(bits: int, block: int, symmetric: bool, tmp_path: Path) -> None:
    artifact = compiled(tmp_path / "artifact", "ort-cpu-ops", bits, block, symmetric)
    found = {(n["bits"], n["block_size"]) for n in nodes_of(artifact, "MatMulPacked")}
    assert (bits, block) in found
    assert not nodes_of(artifact, "MatMulNBits")


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (8, 64)])
def test_the_runtimes_own_operators(bits: int, block: int, tmp_path: Path) -> None:
    """And from there into ours: the same model."""
    plain = compiled(tmp_path / "plain", "ort-cpu", bits, block, False)
    assert (bits, block) in {(n["bits"], n["block_size"]) for n in nodes_of(plain, "MatMulNBits")}
    ours = osl.compile(plain, tmp_path / "ours", target="ort-cpu-ops", verify="off").path
    back = osl.compile(ours, tmp_path / "back", target="ort-cpu", verify="off").path
    ids = np.arange(1, 17)[None]
    results = []
    for artifact in (plain, back):
        session = open_session(artifact / "model.onnx", threads=1)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 1}
        caches = [i for i in session.inputs if i.name not in feeds]
        empty = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
        given = {i.name for i in session.inputs}
        results.append(session.run({k: v for k, v in (feeds | empty).items() if k in given})["logits"])
    scale = float(np.abs(results[0]).max())
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=CLOSENESS * scale)


def test_three_bits_are_refused_where_there_is_no_operator(tmp_path: Path) -> None:
    with pytest.raises(osl.SlimError, match="cannot store weights of 3 bits"):
        compiled(tmp_path / "artifact", "ort-cpu", 3, 32, False)
