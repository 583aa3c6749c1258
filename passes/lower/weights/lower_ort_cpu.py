"""Few-bit weights in ONNX Runtime's own operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.concept import calls, drop_unused_functions, inline_call, replace_nodes
from onnxslim_llm.errors import CompilerBug, UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.passes.lower.stored.stored_job import widened
from onnxslim_llm.passes.lower.stored.stored_nodes import check_own_operators
from onnxslim_llm.passes.lower.weights.accuracy_choice import LevelChoice, check_largest_error
from onnxslim_llm.passes.lower.weights.activation_rounding import LARGEST_ERROR
from onnxslim_llm.passes.lower.weights.codes import BlockCall, Constants, take_calls
from onnxslim_llm.passes.lower.weights.nbits_gather import gather_nbits
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Pass

__all__ = ["LowerOrtCpu"]

_DOMAIN = "com.microsoft"
_VERSION = 1
_BITS = (2, 4, 8)
#: 2-bit kernels exist for these blocks only; any other one is dequantized as a whole in every run.
_FAST_2_BIT_BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class LowerOrtCpu(Pass):
    """Turn few-bit weights into com.microsoft MatMulNBits and GatherBlockQuantized nodes.

    The codes are stored as the operators read them, so that a session need not transpose them first. A table that is
    also the classifier's weight is stored once: both operators read the same bytes.

    Before:
        Y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (X, W_q4, W_scale, )
        H = onnxslim_llm.BlockGather <block_size = 32, scale_type = 1> (input_ids, E_q8, E_scale, )
    After:
        Y = com.microsoft.MatMulNBits <K, N, bits = 4, block_size = 32, accuracy_level = 4> (X, W_q4, W_scale)
        H = com.microsoft.GatherBlockQuantized <bits = 8, block_size = 32> (E_q8, input_ids, E_scale)

    Skips when:
        - the codes are no recorded work, because the model was saved half way: it gets the portable form.

    Codes of 3 bits that the model came with are stored in 4.

    Attributes:
        accuracy_level: What activations are rounded to before the product. 4: int8 in blocks, which is what the fast
            kernels need; 8-bit and 2-bit weights have no others. 1: float32, for 4-bit weights at half the speed.
            "auto" measures what int8 does to the results of each product, and takes 1 for those of 4-bit weights where
            that is too much. Products that came in with a precision of their own, or whose weight was quantized with
            one, keep it; but bfloat16 is no reason to take kernels that are missing.
        largest_error: For "auto": relative error of results, root mean square.
    """

    name: ClassVar[str] = "lower_ort_cpu"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # int8 activations; and without lowering there is no artifact to fall back to

    accuracy_level: Literal["auto", 0, 1, 2, 3, 4] = "auto"
    largest_error: float = LARGEST_ERROR

    def __post_init__(self) -> None:
        check_largest_error(self.largest_error, self.name)

    def requires(self, model: Model, context: Context) -> None:
        """Check that none of our own operators is left.

        Raises:
            ModelError: One could not be taken apart, and the target has no other form of it.
        """
        check_own_operators(model, context)

    def apply(self, model: Model, context: Context) -> Change:
        """Replace all calls.

        Raises:
            UsageError: Weights of a width that the operators do not have.
        """
        change = Change()
        recorded, opaque = take_calls(model)
        for node in opaque:
            change.skip(node.name, "its codes are no recorded work: it gets the portable form")
        replaced = {id(node): inline_call(model, node) for node in opaque}
        constants = Constants(model)
        chosen = LevelChoice(self.accuracy_level, self.largest_error, context)
        for call in recorded:
            call.job = widened(call.job) or call.job
            scheme = call.job.scheme
            if scheme.bits not in _BITS:
                what = f"{_DOMAIN} has no operators for {scheme.bits}-bit weights"
                raise UsageError(what, where=call.job.where(), todo="choose 2, 4 or 8 bits")
            op = Builder(model, call.node.name or call.result.name)
            if call.is_gather:
                result = gather_nbits(constants, op, call)
            else:
                _note_slow_blocks(call, context)
                result = _multiply(constants, op, call, chosen.of(call))
            last = op.nodes[-1]
            assert last.outputs[0] is result
            last.outputs[0] = call.result
            replaced[id(call.node)] = op.nodes
            change.sites.append(call.node.name or call.result.name)
        replace_nodes(model, replaced)
        if replaced:
            drop_unused_functions(model)
        if change.sites:
            if model.opset(_DOMAIN) is None:
                model.set_opset(_DOMAIN, _VERSION)
            change.detail.update(chosen.account())
        change.sites += [node.name for node in opaque]
        return change

    def ensures(self, model: Model, context: Context) -> None:
        """Check that no concept is left.

        Raises:
            CompilerBug: One is.
        """
        for _, node in calls(model):
            raise CompilerBug("a concept is left after lowering", where=f"{node.op} '{node.name}'")


def _note_slow_blocks(call: BlockCall, context: Context) -> None:
    job, block = call.job, call.stored_block("nbits")
    if job.scheme.bits == 2 and block not in _FAST_2_BIT_BLOCKS:
        note = f"{job.where()}: there is no fast kernel for 2-bit blocks of {block}; use 32, 64 or 128"
        context.notes.append(note)


def _multiply(constants: Constants, op: Builder, call: BlockCall, accuracy_level: int) -> gs.Tensor:
    codes, scales, *zeros = call.weights("nbits")
    return op.call(
        _DOMAIN,
        "MatMulNBits",
        call.operand,
        constants.shared(call, 0, codes),
        constants.shared_scales(op, call, scales),
        *(constants.shared(call, 2, weight) for weight in zeros),
        K=call.job.rows,
        N=call.job.columns,
        bits=call.job.scheme.bits,
        block_size=call.stored_block("nbits"),
        accuracy_level=accuracy_level,
    )
