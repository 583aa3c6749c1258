"""Models of nothing but products with one row, in a target's own operators, to time these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL, BlockLayout, WeightScheme
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.ir.weights import ProtoWeight, constant
from onnxslim_llm.ir.weights.jobs import Tile, TileOutput, derive
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.planes import PLANES, is_split, plane_scheme
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.targets import Target
from onnxslim_llm.targets.product_times import ProductForm

__all__ = ["INPUT", "ROW", "lowered_products", "single_rows"]

#: Inputs of the model: the rows [copies, K] that are multiplied, one with each weight, and the row of a table.
INPUT = "x"
ROW = "row"

_OPSET, _IR_VERSION = 25, 13  # of elements of 2 bits
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
#: About that of a weight with 4 bits; what matters is that results are neither denormal nor infinite.
_SCALE = 2.0**-7


class _FilledJob(QuantizeJob):
    """Codes that say nothing, in any layout: times do not depend on what weights are.

    Args:
        form: Shape and type.
        scheme: How it is coded; of one plane where codes have two.
        number: Jobs with different ones have different content.
        layout: As for `QuantizeJob`.
    """

    def __init__(self, form: ProductForm, scheme: WeightScheme, number: int, layout: BlockLayout = "blocked_kn"):
        shape = TensorProto(dims=[form.rows, form.columns], data_type=TensorProto.FLOAT)
        super().__init__(ProtoWeight(shape), 0, scheme, f"weight {number}", layout)
        self.form, self.number = form, number
        self.inputs = ()
        self.accuracy = "int8"
        self.fingerprint = f"filled {self.fingerprint} {number}"

    def with_layout(self, layout: BlockLayout) -> _FilledJob:
        return _FilledJob(self.form, self.scheme, self.number, layout)

    def tiles(self) -> Sequence[Tile]:
        return [Tile(0, self.columns, sum(spec.nbytes for spec in self.outputs))]

    def run(self, tile: Tile) -> TileOutput:
        random = np.random.default_rng(self.number)
        filled = []
        for index, spec in enumerate(self.outputs):
            data = np.frombuffer(random.bytes(spec.nbytes), np.uint8)
            if index == 1:
                data = np.full(spec.shape, _SCALE, self.scheme.scale_type).reshape(-1).view(np.uint8)
            filled.append((index, 0, data))
        return TileOutput(filled)

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        return {}


def single_rows(form: ProductForm, copies: int) -> Model:
    """Return a model that takes rows apart, which is what `lowered_products` does besides products.

    Args:
        form: Says how long they are.
        copies: How many.
    """
    pieces = [f"x{i}" for i in range(copies)]
    # Sizes as free as those of decoders: with one row for certain, ONNX Runtime makes a Gemm of a product and a sum.
    given, *parts = (
        helper.make_tensor_value_info(name, _TYPES[form.computes_in], [size, form.rows])
        for name, size in ((INPUT, "rows"), *((piece, "part") for piece in pieces))
    )
    split = helper.make_node("Split", [INPUT], pieces, "split", axis=0, num_outputs=copies)
    graph = helper.make_graph([split], "products", [given], parts)
    opset = helper.make_opsetid("", _OPSET)
    return from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION))


def lowered_products(form: ProductForm, copies: int, target: Target) -> Model:
    """Return a model that multiplies `copies` rows, each with a weight of its own, or looks up rows of tables.

    Args:
        form: Of all weights.
        copies: How many.
        target: Whose operators it has, by the same lowering as any model for this target.
    """
    model = single_rows(form, copies)
    graph = model.graph
    pieces, kind = list(graph.outputs), np.dtype(form.computes_in)
    graph.outputs.clear()
    reads = {"product": [True], "look_up": [False], "tied": [False, True]}[form.read_as]
    row = gs.Variable(ROW, np.dtype(np.int64), (1,))
    if False in reads:
        graph.inputs.append(row)
    scheme = WeightScheme(form.bits, form.block, form.symmetric, "rtn", form.scale_type)
    for i, piece in enumerate(pieces):
        codes = _codes(form, scheme, i)
        for product in reads:
            graph.nodes += _read(model, codes, piece if product else row, form, product=product)
            result = graph.nodes[-1].outputs[0]
            result.dtype, result.shape = kind, (None, form.columns if product else form.rows)
            graph.outputs.append(result)
    Pipeline(target.lowering).run(model, Context(target=target))
    return model


def _codes(form: ProductForm, scheme: WeightScheme, number: int) -> list[tuple[_FilledJob, list[gs.Constant | None]]]:
    """Return the jobs of a weight, one for each plane of its codes, and their results."""
    schemes = [plane_scheme(scheme, i) for i in range(len(PLANES[scheme.bits]))] if is_split(scheme) else [scheme]
    found = []
    for plane, part in enumerate(schemes):
        job = _FilledJob(form, part, len(schemes) * number + plane)
        made: list[gs.Constant | None] = [
            constant(f"w{number}_{plane}_{i}", weight) for i, weight in enumerate(derive(job))
        ]
        found.append((job, made if part.symmetric is False else [*made, None]))
    return found


def _read(
    model: Model,
    codes: list[tuple[_FilledJob, list[gs.Constant | None]]],
    what: gs.Variable,
    form: ProductForm,
    *,
    product: bool,
) -> list[gs.Node]:
    """Return the nodes that read a weight; the last one makes the result."""
    concept = BLOCK_MATMUL if product else BLOCK_GATHER
    op = Builder(model, "product" if product else "look_up")
    parts = [
        concept.build(op, what, *tensors, block_size=job.stored_block, scale_type=int(_TYPES[form.computes_in]))
        for job, tensors in codes
    ]
    if len(parts) > 1:
        op.Add(*parts)
    return op.nodes
