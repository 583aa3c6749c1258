"""What follows a product and can be computed with it: a bias, an activation, a gate, the sum with a residual."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.block_weights import BlockJob
from onnxslim_llm.concepts.packed_weights import PackedBlockJob
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.lower.stored.stored_job import StoredJob
from onnxslim_llm.passes.lower.weights.codes import BlockCall
from onnxslim_llm.rewrite.constants import constant_tensor, constant_value
from onnxslim_llm.rewrite.facts import same_shape
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["Epilogue", "find_epilogue"]


@dataclass
class Epilogue:
    """Nodes after a product that its operator can do as well.

    Attributes:
        result: What the last of them makes.
        jobs: The weight, or its two halves where the first one's columns gate the second one's.
        nodes: They.
        bias: [N], or None.
        activation: As in custom_ops.ops.ACTIVATIONS.
        residual: Of the shape of `result`, added last; or None.
    """

    result: gs.Variable
    jobs: tuple[BlockJob, ...]
    nodes: list[gs.Node] = field(default_factory=list)
    bias: gs.Constant | None = None
    activation: str = "none"
    residual: gs.Tensor | None = None

    @property
    def parts(self) -> list[str]:
        """What there is, by name."""
        found = [self.activation] if self.activation != "none" else []
        found += ["bias"] if self.bias is not None else []
        return [*found, "residual"] if self.residual is not None else found


def find_epilogue(call: BlockCall, outputs: set[int], *, activations: bool = True, residual: bool = True) -> Epilogue:
    """Return what can be computed together with a product.

    Args:
        call: The product, detached. Shapes are known where residuals are to be found.
        outputs: Identities of all graph outputs: what is one must stay.
        activations: Take in bias, activation and gate.
        residual: Take in the sum with a tensor of the same shape. Its maker may come after the product.
    """
    found = Epilogue(call.result, (call.job,))
    if activations:
        _take_bias(found, call.job.columns, outputs)
        if not _take_gate(found, outputs):
            _take_activation(found, outputs)
    if residual:
        _take_residual(found, {id(node) for node in call.graph.nodes}, outputs)
        if found.residual is not None and activations and found.bias is None and found.activation == "none":
            _take_bias(found, call.job.columns, outputs)  # of a sum with a correction: both are added, in any order
    return found


def _only_reader(tensor: gs.Tensor, outputs: set[int]) -> gs.Node | None:
    return tensor.outputs[0] if len(tensor.outputs) == 1 and id(tensor) not in outputs else None


def _is(node: gs.Node, op: str, domain: str = "") -> bool:
    return node.op == op and normal_domain(node.domain) == domain


def _take_bias(found: Epilogue, columns: int, outputs: set[int]) -> None:
    node = _only_reader(found.result, outputs)
    if node is None or not _is(node, "Add"):
        return
    other = node.inputs[1] if node.inputs[0] is found.result else node.inputs[0]
    bias = constant_tensor(other)
    if bias is None or weight_of(bias).shape != (columns,):
        return
    found.bias, found.result = bias, node.outputs[0]
    found.nodes.append(node)


def _take_activation(found: Epilogue, outputs: set[int]) -> None:
    activation = _activation_of(found.result, outputs)
    if activation is not None:
        found.activation, nodes = activation
        found.nodes += nodes
        found.result = nodes[-1].outputs[0]


def _take_residual(found: Epilogue, inside: set[int], outputs: set[int]) -> None:
    node = _only_reader(found.result, outputs)
    if node is None or id(node) not in inside or not _is(node, "Add"):
        return
    other = node.inputs[1] if node.inputs[0] is found.result else node.inputs[0]
    if isinstance(other, gs.Variable) and same_shape(found.result, other):
        found.residual, found.result = other, node.outputs[0]
        found.nodes.append(node)


def _activation_of(tensor: gs.Tensor, outputs: set[int]) -> tuple[str, list[gs.Node]] | None:
    """Return the name of the activation that is all that happens to a tensor, and its nodes, the last one last."""
    readers = {id(node): node for node in tensor.outputs}
    if id(tensor) in outputs:
        return None
    if len(readers) == 2:  # x * sigmoid(x)
        sigmoid = next((node for node in readers.values() if _is(node, "Sigmoid")), None)
        product = next((node for node in readers.values() if _is(node, "Mul")), None)
        if sigmoid is None or product is None or _only_reader(sigmoid.outputs[0], outputs) is not product:
            return None
        return ("silu", [sigmoid, product]) if len(tensor.outputs) == 2 else None
    node = _only_reader(tensor, outputs)
    if node is None:
        return None
    name = _named_activation(node)
    return None if name is None else (name, [node])


def _named_activation(node: gs.Node) -> str | None:
    alone = sum(not tensor.is_empty() for tensor in node.inputs) == 1
    if not alone:
        return None
    if (_is(node, "QuickGelu", "com.microsoft") and node.attrs.get("alpha", 1.702) == 1.0) or (
        _is(node, "Swish") and node.attrs.get("alpha", 1.0) == 1.0
    ):
        return "silu"
    if _is(node, "Gelu", "com.microsoft"):
        return "gelu"
    if _is(node, "FastGelu", "com.microsoft"):
        return "gelu_tanh"
    if _is(node, "Gelu"):
        return "gelu_tanh" if node.attrs.get("approximate", "none") == "tanh" else "gelu"
    return None


def _take_gate(found: Epilogue, outputs: set[int]) -> bool:
    job = found.jobs[0]
    split = _only_reader(found.result, outputs)
    parts = _parts(job)
    if split is None or parts is None or not _cuts_in_half(split, job.columns):
        return False
    for gate, other in ((0, 1), (1, 0)):
        if gate == 1 and found.bias is not None:
            return False  # its values would have to change places
        activation = _activation_of(split.outputs[gate], outputs)
        product = _only_reader(split.outputs[other], outputs)
        if activation is None or product is None or not _is(product, "Mul"):
            continue
        name, nodes = activation
        if id(_only_reader(nodes[-1].outputs[0], outputs)) != id(product):
            continue
        found.activation, found.jobs = f"{name}_gate", (parts[gate], parts[other])
        found.nodes += [split, *nodes, product]
        found.result = product.outputs[0]
        return True
    return False


def _parts(job: BlockJob) -> tuple[BlockJob, BlockJob] | None:
    """Return the work behind the two halves of the columns."""
    if isinstance(job, StoredJob):
        return job.halves()
    if not isinstance(job, PackedBlockJob) or len(job.parts) != 2:
        return None
    first, second = job.parts
    return (first, second) if first.columns == second.columns else None


def _cuts_in_half(split: gs.Node, columns: int) -> bool:
    """Whether a node cuts a product along its columns into two equal parts."""
    width, rest = divmod(columns, 2)
    if not _is(split, "Split") or len(split.outputs) != 2 or rest:
        return False
    shape = split.inputs[0].shape
    if split.attrs.get("axis", 0) != -1 and (shape is None or split.attrs.get("axis", 0) != len(shape) - 1):
        return False
    if len(split.inputs) > 1:
        sizes = constant_value(split.inputs[1], 2)
        return sizes is not None and np.array_equal(sizes, [width, width])
    return bool(split.attrs.get("split", [width, width]) == [width, width])
