"""Put two products with thin matrices where one product with a whole one was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.ir.weights import Weight, constant, weight_of
from onnxslim_llm.products.sites import Site, WeightGroup
from onnxslim_llm.rewrite.edit import Builder, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["split_products"]

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def split_products(model: Model, groups: Sequence[WeightGroup], factors: Sequence[Weight]) -> list[list[str]]:
    """Let the readers of weights multiply with A first, and with B_i then.

    The second product is the node that was there, with its name, outputs and, if it is a Gemm, its bias. Weights that
    share A read one input, and its product with A is made once.

    Args:
        model: Changed in place.
        groups: The weights; several only where each has one reader, and all readers read one tensor.
        factors: A [K, r], then B_i [r, N_i] for each of `groups`.

    Returns:
        The names of the new initializers, A first, for each graph that reads them.
    """
    hints = [f"{groups[0].name}_A", *(f"{group.name}_B" for group in groups)]
    outputs = graph_output_ids(model)
    order = {id(node): i for graph in model.graphs() for i, node in enumerate(graph.nodes)}
    sites = [(site, i + 1) for i, group in enumerate(groups) for site in group.sites]
    # One set of constants per graph: ONNX Runtime does not fuse what a subgraph reads from the graph around it.
    constants: dict[int, list[gs.Constant]] = {}
    made: dict[tuple[int, int], gs.Variable] = {}  # by input and graph: the product with A
    replaced: dict[int, list[gs.Node]] = {}
    removed: list[gs.Node] = []  # keeps them alive, so that their ids stay theirs
    for site, index in sorted(sites, key=lambda pair: order[id(pair[0].node)]):
        node, home = site.node, id(site.graph)
        if home not in constants:
            constants[home] = [constant(model.fresh_name(h), w) for h, w in zip(hints, factors, strict=True)]
        op = Builder(model, node.name or node.outputs[0].name)
        source, old = node.inputs[0], node.inputs[1]
        if (id(source), home) not in made:
            thin = made[id(source), home] = op.MatMul(source, _read(op, constants[home][0], site))
            thin.dtype = node.outputs[0].dtype
            thin.shape = None if source.shape is None else [*source.shape[:-1], factors[0].shape[1]]
        node.inputs[0] = made[id(source), home]
        node.inputs[1] = _read(op, constants[home][index], site)
        node.attrs.pop("transB", None)
        replaced[id(node)] = [*op.nodes, node]
        if isinstance(old, gs.Variable):
            dead = remove_dead(old.inputs, outputs)
            removed += dead
            replaced.update({id(carrier): [] for carrier in dead})
    replace_nodes(model, replaced)
    return [[tensor.name for tensor in some] for some in constants.values()]


def _read(op: Builder, factor: gs.Constant, site: Site) -> Any:
    """Return a factor in the type that the product computes in."""
    if str(weight_of(factor).dtype) == site.computes_in:
        return factor
    return op.Cast(factor, to=int(_TYPES[site.computes_in]))
