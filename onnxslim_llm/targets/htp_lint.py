"""What Qualcomm's HTP does not take, measured with onnxruntime-qnn 2.7.0 (htp_arch 75), 2026-11-21."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.facts import onnx_type
from onnxslim_llm.rewrite.schema import normal_domain
from onnxslim_llm.targets.htp_integers import float_violations
from onnxslim_llm.targets.lint import Violation, place_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["INT4", "htp_violations", "narrow_weights"]

#: Operators that the provider has no builder for, and the nearest form that it has one for.
NEAREST = {
    "Attention": "MatMul, Softmax, MatMul: pass lower_npu_ops",
    "RotaryEmbedding": "Split, Mul, Sub, Add, Concat: pass lower_npu_ops",
    "Swish": "Mul (x, Sigmoid (x)): pass lower_npu_ops",
    "Erf": "Gelu of opset 20: pass fuse_activations",
    "SimplifiedLayerNormalization": "RMSNormalization of opset 23: pass fuse_rms_norm",
    "Range": "a constant: fixed shapes (--shape) and pass fold_constants",
    "Shape": "a constant: fixed shapes (--shape) and pass fold_shapes",
    "ConstantOfShape": "a constant: fixed shapes (--shape) and pass fold_constants",
    "NonZero": "no form of fixed size: compute it outside of the model",
    "Loop": "an unrolled graph",
    "Scan": "an unrolled graph",
    "If": "the branch that is taken: pass inline_branches",
    "IsNaN": "masks without infinity, which make no NaN: pass legalize_masks",
    "IsInf": "masks without infinity: pass legalize_masks",
    "Trilu": "a constant mask: pass fold_constants",
    "MatMulNBits": "DequantizeLinear and MatMul: --target portable, then this target",
}
_MOST_AXES = 5
#: Measured on MatMul, Gemm and Conv, per tensor and per channel, htp_arch 73 to 81: the results are exactly those of
#: codes without their sign, so that nothing proves an artifact with them. Symmetric blocks of 16 to 256 codes are read
#: as they should be (htp_arch 73, 75, 79, 81; not 68), and take half the bytes in the compiled binary, too; with zero
#: points, or as uint4, they are not.
INT4 = "the simulator of onnxruntime-qnn 2.7.0 reads negative int4 codes with a scale per channel as positive ones"
INT4_BLOCKS = "HTP multiplies with 4-bit weights of type int4 only, in symmetric blocks along the sums"
#: Constants below this leave nothing of 8 or 16 bits for what they are added to.
_LOWEST = -1e4


def htp_violations(model: Model) -> Iterator[Violation]:
    """Yield what keeps a model from running on HTP; its shapes are inferred."""
    for graph in model.all_graphs():
        for node in graph.nodes:
            if normal_domain(node.domain) == "":
                yield from _node(node)
    yield from float_violations(model)
    yield from narrow_weights(model)


def narrow_weights(model: Model) -> Iterator[Violation]:
    """Yield the 4-bit weights that are not in the form that is computed right."""
    for graph in model.all_graphs():
        for node in graph.nodes:
            if node.op != "DequantizeLinear" or onnx_type(node.inputs[0]) not in (TensorProto.INT4, TensorProto.UINT4):
                continue
            if not node.attrs.get("block_size", 0):
                yield Violation(place_of(node), INT4, "blocks (recipe w4a16), or 8 bits (w8a16, w8a8)")
            elif not _symmetric_blocks(node):
                yield Violation(place_of(node), INT4_BLOCKS, "quantize_weights{symmetric=true}: recipe w4a16")


def _symmetric_blocks(dequantize: gs.Node) -> bool:
    shape = shape_of(dequantize.inputs[0]) or ()
    if onnx_type(dequantize.inputs[0]) != TensorProto.INT4 or dequantize.attrs.get("axis", 1) not in (0, -len(shape)):
        return False
    if len(dequantize.inputs) < 3 or dequantize.inputs[2].is_empty():
        return True
    zeros = constant_value(dequantize.inputs[2])
    return zeros is not None and not np.any(zeros)


def _node(node: gs.Node) -> Iterator[Violation]:
    where = place_of(node)
    if node.op in NEAREST:
        yield Violation(where, f"HTP has no {node.op}", f"the nearest legal form is {NEAREST[node.op]}")
    if node.op == "Where" and any(_hides(tensor) for tensor in node.inputs[1:]):
        yield Violation(where, "it hides elements by a condition", "add a bias instead: pass legalize_masks")
    elif node.op in ("Add", "Mul", "Min", "Max") and any(_hides(tensor) for tensor in node.inputs):
        fix = "a bias of moderate size: pass legalize_masks"
        yield Violation(where, "a constant of -1e4 or less leaves nothing of 16 bits for other values", fix)
    for tensor in node.outputs:
        shape = shape_of(tensor) or ()
        if len(shape) > _MOST_AXES:
            yield Violation(where, f"its result has {len(shape)} axes, HTP takes {_MOST_AXES}", "reshape it")
        if 0 in shape:
            yield Violation(where, f"'{tensor.name}' has no elements", "leave it out: pass fix_shapes")


def _hides(tensor: gs.Tensor) -> bool:
    value = constant_value(tensor)
    return value is not None and value.dtype.kind == "f" and bool(np.any(value <= _LOWEST))
