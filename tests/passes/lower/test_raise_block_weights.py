from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import Array, Feeds, model_of, skipped, tied, weights
from lowering_checks import FLOAT_TOLERANCE, assert_close
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.custom_ops import ops, packed
from onnxslim_llm.custom_ops.packed import PackedScheme
from onnxslim_llm.custom_ops.quantize import BlockSpec, quantize_tile
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.model import Model, from_proto, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.passes.lower.stored.raise_block_weights import RaiseBlockWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.targets import get_target

needs_library = pytest.mark.skipif(ops.library_path() is None, reason="the operator library was not built here")

IDS = {"ids": np.array([[0, 5, -1], [7, 7, -3]], np.int64)}
#: Computed in float32, so that nothing but the codes is compared.
QUANTIZED = "cleanup, quantize_weights{min_elements=0, embedding_bits=4, lm_head_bits=4%s}"


def compiled(model: Model, target: str, folder: Path, *before: str) -> Path:
    """Lowers and saves, with products in float32."""
    folder.mkdir()
    goal = get_target(target)
    exact = goal.lowering.replace("lower_ort_cpu,", "lower_ort_cpu{accuracy_level=1},")
    exact = exact.replace("lower_ort_cpu_ops,", "lower_ort_cpu_ops{accuracy=exact},")
    for steps in (*before, exact):
        Pipeline(steps).run(model, Context(target=goal))
    assert goal.lint(model) == []
    save_model(model, folder / "model.onnx", SaveOptions(external=True))
    return folder / "model.onnx"


def run(path: Path, feeds: Feeds = IDS) -> Array:
    config = {"session.qdq_matmulnbits_accuracy_level": "1"}
    result: Array = next(iter(open_session(path, threads=1, config=config).run(feeds).values()))
    return result


def data_of(path: Path) -> bytes:
    return path.with_name("model.onnx.data").read_bytes()


@needs_library
@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("options", ["", ", symmetric=false", ", scale_dtype=activation", ", block=0"])
def test_there_and_back(options: str, width: int, tmp_path: Path) -> None:
    """MatMulNBits -> our operators -> MatMulNBits gives the same bytes, and every form the same results."""
    quantize = QUANTIZED % options
    nbits = compiled(model_of(tied(512, width)), "ort-cpu", tmp_path / "nbits", quantize)
    packed_form = compiled(open_model(nbits), "ort-cpu-ops", tmp_path / "packed")
    direct = compiled(model_of(tied(512, width)), "ort-cpu-ops", tmp_path / "direct", quantize)
    back = compiled(open_model(packed_form), "ort-cpu", tmp_path / "back")
    portable = compiled(open_model(packed_form), "portable", tmp_path / "portable")
    assert data_of(packed_form) == data_of(direct)
    assert data_of(back) == data_of(nbits)
    expected = run(nbits)
    for path in (packed_form, back, portable):
        assert_close(run(path), expected, FLOAT_TOLERANCE)


def graph(nodes: list[onnx.NodeProto], constants: dict[str, Array], opset: int = 21, shape: Any = ("m", 70)) -> Model:
    """Nodes that make y of x."""
    float_type = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", float_type, list(shape))]
    outputs = [helper.make_tensor_value_info("y", float_type, None)]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    imports = [helper.make_opsetid(d, v) for d, v in (("", opset), ("com.microsoft", 1), (ops.DOMAIN, ops.VERSION))]
    used = {node.domain for node in nodes}
    made = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return from_proto(
        helper.make_model(made, opset_imports=[i for i in imports if not i.domain or i.domain in used], ir_version=10)
    )


def stored(symmetric: bool = True, bits: int = 4) -> dict[str, Array]:
    found = quantize_tile(weights(1, 70, 32), BlockSpec(bits, 32, symmetric))
    zeros = {} if found.zero_points is None else {"zp": found.zero_points}
    return {"codes": found.codes, "scales": found.scales, **zeros}


def nbits_node(inputs: list[str], **changed: Any) -> onnx.NodeProto:
    attributes = {"K": 70, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": 1, **changed}
    return helper.make_node("MatMulNBits", inputs, ["y"], name="fc", domain="com.microsoft", **attributes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("opset", "bits"), [(17, 4), (21, 8), (21, 2)])
def test_any_model_with_nbits_becomes_portable(opset: int, bits: int, symmetric: bool, tmp_path: Path) -> None:
    constants = {**stored(symmetric, bits), "bias": weights(2, 32)}
    zeros = "" if symmetric else "zp"
    model = graph([nbits_node(["x", "codes", "scales", zeros, "", "bias"], bits=bits)], constants, opset)
    save_model(model.copy(), tmp_path / "source.onnx")
    path = compiled(model, "portable", tmp_path / "portable")
    feeds = {"x": weights(3, 5, 70)}
    assert_close(run(path, feeds), run(tmp_path / "source.onnx", feeds), FLOAT_TOLERANCE)


@pytest.mark.parametrize(("level", "accuracy"), [(0, b"exact"), (1, b"exact"), (4, b"int8"), (None, b"exact")])
def test_the_precision_that_a_product_asks_for_stays(level: int | None, accuracy: bytes, tmp_path: Path) -> None:
    node = nbits_node(["x", "codes", "scales"])
    kept = [a for a in node.attribute if a.name != "accuracy_level"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if level is not None:
        node.attribute.append(helper.make_attribute("accuracy_level", level))
    model = graph([node], stored())
    Pipeline("raise_block_weights, lower_ort_cpu_ops{accuracy=bf16}").run(model, Context())
    (made,) = model.to_proto().graph.node
    assert made.op_type == "MatMulPacked"
    assert {a.name: a.s for a in made.attribute}["accuracy"] == accuracy


@needs_library
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_what_follows_a_product_is_taken_apart(activation: str, tmp_path: Path) -> None:
    gated = activation.endswith("_gate")
    scheme = PackedScheme(70, 32, 4, 32, scale_dtype="float32", paired=gated)
    weight = packed.pack(scheme, *stored().values(), None)
    constants = {
        "B": weight,
        "bias": weights(2, 32),
        "residual": weights(3, 5, 16 if gated else 32),
        "u": weights(4, 70, 2) / 8,
        "v": weights(5, 2, 32) / 8,
    }
    node = helper.make_node(
        "MatMulPacked",
        ["x", *constants],
        ["y"],
        domain=ops.DOMAIN,
        K=70,
        N=32,
        bits=4,
        block_size=32,
        accuracy="exact",
        activation=activation,
    )
    model = graph([node], constants, shape=(5, 70))
    save_model(model.copy(), tmp_path / "source.onnx")
    path = compiled(model, "portable", tmp_path / "portable")
    assert not any(node.domain for node in onnx.load(path).graph.node)
    feeds = {"x": weights(6, 5, 70)}
    assert_close(run(path, feeds), run(tmp_path / "source.onnx", feeds), FLOAT_TOLERANCE)


REASONS: dict[str, tuple[list[str], dict[str, Any], dict[str, Array]]] = {
    "its columns are permuted (g_idx)": (["x", "codes", "scales", "", "g"], {}, {"g": np.zeros(70, np.int32)}),
    "its codes are rearranged for one runtime": (["x", "codes", "scales"], {"weight_prepacked": 1}, {}),
    "its zero points are of type float32": (["x", "codes", "scales", "z"], {}, {"z": np.ones((32, 3), np.float32)}),
    "its codes are no initializer that stays what it is": (["x", "x", "scales"], {}, {}),
    "its scales are of type float64": (["x", "codes", "wide"], {}, {"wide": np.ones((32, 3))}),
    "uint8 [32, 3, 16]": (["x", "codes", "scales"], {"K": 700}, {}),
}


@pytest.mark.parametrize("reason", list(REASONS))
def test_what_is_left_alone(reason: str) -> None:
    inputs, changed, more = REASONS[reason]
    model = graph([nbits_node(inputs, **changed)], {**stored(), **more})
    before = model.to_proto().SerializeToString(deterministic=True)
    change = RaiseBlockWeights().apply(model, Context())
    assert not change.sites
    if "[" not in reason:
        assert skipped(change) == {"fc": reason}
    else:
        assert "bytes" in skipped(change)["fc"]
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_the_runtimes_own_operators_can_stay() -> None:
    model = graph([nbits_node(["x", "codes", "scales"])], stored())
    assert not RaiseBlockWeights(runtime_operators=False).apply(model, Context())


def test_a_damaged_packed_weight_is_left_alone() -> None:
    node = helper.make_node(
        "MatMulPacked", ["x", "B"], ["y"], name="fc", domain=ops.DOMAIN, K=70, N=32, bits=4, block_size=32
    )
    model = graph([node], {"B": np.zeros(100, np.uint8)})
    assert skipped(RaiseBlockWeights().apply(model, Context())) == {"fc": "these bytes are not a packed weight"}


def test_attributes_that_contradict_the_weight() -> None:
    scheme = PackedScheme(70, 32, 4, 32, scale_dtype="float32")
    weight = packed.pack(scheme, *stored().values(), None)
    node = helper.make_node(
        "MatMulPacked", ["x", "B"], ["y"], name="fc", domain=ops.DOMAIN, K=70, N=31, bits=4, block_size=32
    )
    change = RaiseBlockWeights().apply(graph([node], {"B": weight}), Context())
    assert skipped(change) == {"fc": "N = 31, but its weight says 32"}


def test_shapes_are_known_through_products_that_came_in() -> None:
    """Fusions need them: a norm takes the residual addition in only if both summands have one shape."""
    model = graph([nbits_node(["x", "codes", "scales"])], stored(), shape=("batch", "tokens", 70))
    RaiseBlockWeights().apply(model, Context())
    shape = SymbolicValues(model).shape_of(model.graph.outputs[0])
    assert shape is not None
    assert [str(dim) for dim in shape] == ["batch", "tokens", "32"]


def test_types_are_known_behind_operators_that_onnx_does_not_know(tmp_path: Path) -> None:
    """As behind ONNX Runtime's residual norm: Attention and RMSNormalization pass its type on."""
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", "w"], ["n"], domain="com.microsoft"),
        helper.make_node("Attention", ["n", "n", "n"], ["h"], q_num_heads=2, kv_num_heads=2),
        helper.make_node("RMSNormalization", ["h", "w"], ["m"]),
        helper.make_node(
            "MatMulPacked", ["m", "B"], ["y"], domain=ops.DOMAIN, K=70, N=32, bits=4, block_size=32, name="fc"
        ),
    ]
    weight = packed.pack(PackedScheme(70, 32, 4, 32, scale_dtype="float32"), *stored().values(), None)
    model = graph(nodes, {"w": np.ones(70, np.float32), "B": weight}, 24, ("b", "s", 70))
    change = RaiseBlockWeights().apply(model, Context())
    assert (change.sites, change.skipped) == (["fc"], [])


@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
def test_an_operator_of_ours_that_cannot_be_converted_is_an_error(target: str) -> None:
    node = helper.make_node(
        "MatMulPacked", ["x", "B"], ["y"], domain=ops.DOMAIN, K=70, N=31, bits=4, block_size=32, name="fc"
    )
    weight = packed.pack(PackedScheme(70, 32, 4, 32, scale_dtype="float32"), *stored().values(), None)
    goal = get_target(target)
    with pytest.raises(ModelError, match=f"cannot be converted for target '{target}': N = 31, but its weight says 32"):
        Pipeline(goal.lowering).run(graph([node], {"B": weight}), Context(target=goal))


@needs_library
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
def test_three_bits_become_four_where_there_is_no_operator_for_them(
    target: str, symmetric: bool, tmp_path: Path
) -> None:
    """A tied table and a product of its own; the numbers stay."""
    source = model_of(tied(96, 70))
    quantize = (
        f"cleanup, quantize_weights{{min_elements=0, bits=3, embedding_bits=3, lm_head_bits=3, symmetric={symmetric}}}"
    )
    ours = compiled(
        source, "ort-cpu-ops", tmp_path / "ours", quantize.replace("=True", "=true").replace("=False", "=false")
    )
    wide = compiled(open_model(ours), target, tmp_path / "wide")
    assert_close(run(wide), run(ours), FLOAT_TOLERANCE)
