"""What HTP computes on integers only: measured with onnxruntime-qnn 2.7.0 (htp_arch 75), 2026-11-21.

The simulator runs most operators in float32 as well. Those named here end its compiler with
QNN_COMMON_ERROR_MEM_ALLOC, which names no node, and stored weights go to the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.rewrite.facts import onnx_type
from onnxslim_llm.rewrite.schema import normal_domain
from onnxslim_llm.targets.lint import Violation, place_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["FLOAT_OPERATOR", "FLOAT_PRODUCT", "float_violations"]

#: In float16 they run, too.
_NOT_IN_FLOAT32 = frozenset(["Elu", "Gather", "GatherElements", "Gelu", "HardSigmoid", "RMSNormalization", "Where"])
FLOAT_OPERATOR = "HTP computes it on integers, not in float32"
#: A scale for the whole tensor is taken: such a weight becomes float32 on the processor.
FLOAT_PRODUCT = (
    "HTP multiplies weights in few bits with integers only, and what this one is multiplied with, or the product, is "
    "float"
)
_FIX = (
    "quantize activations as well, with ranges from --calib FILE: recipe w8a16 (nearest to float), w8a8 (fastest) or "
    "w4a16 (weights of 4 bits)"
)


def float_violations(model: Model) -> Iterator[Violation]:
    """Yield the nodes that compute in float what HTP computes on integers only; types and shapes are inferred.

    Weights come first: what is said about them explains the rest.
    """
    graphs = [(graph.nodes, {id(tensor) for tensor in graph.outputs}) for graph in model.all_graphs()]
    nodes = [(node, results) for nodes, results in graphs for node in nodes if normal_domain(node.domain) == ""]
    for node, results in nodes:
        if node.op == "DequantizeLinear" and _is_weight(node) and _read_in_float(node, results):
            yield Violation(place_of(node), FLOAT_PRODUCT, _FIX)
    for node, results in nodes:
        wide = node.op in _NOT_IN_FLOAT32 and bool(_floats(node.inputs))
        if wide and not _on_integers(node, results, constants=node.op == "Where"):
            yield Violation(place_of(node), FLOAT_OPERATOR, _FIX)


def _is_weight(dequantize: gs.Node) -> bool:
    """Return whether it is a stored weight with more scales than one."""
    scale = shape_of(dequantize.inputs[1])
    return isinstance(dequantize.inputs[0], gs.Constant) and scale is not None and tuple(scale) not in ((), (1,))


def _read_in_float(node: gs.Node, results: set[int]) -> bool:
    readers = node.outputs[0].outputs
    return any(r.op in ("MatMul", "Gemm") and not _on_integers(r, results, constants=True) for r in readers)


def _on_integers(node: gs.Node, results: set[int], *, constants: bool = False) -> bool:
    """Return whether all float inputs of a node are dequantized, and all its results quantized.

    Args:
        node: The node.
        results: The identities of the graph's outputs.
        constants: Those in float will do: HTP rounds a bias itself.
    """
    for tensor in _floats(node.inputs):
        makers = [maker.op for maker in tensor.inputs]
        if makers != ["DequantizeLinear"] and not (constants and isinstance(tensor, gs.Constant)):
            return False
    readers = {reader.op for tensor in node.outputs for reader in tensor.outputs}
    return readers == {"QuantizeLinear"} and not any(id(tensor) in results for tensor in node.outputs)


def _floats(tensors: list[gs.Tensor]) -> list[gs.Tensor]:
    return [tensor for tensor in tensors if not tensor.is_empty() and onnx_type(tensor) == TensorProto.FLOAT]
