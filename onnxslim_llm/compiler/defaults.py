"""What a compile does when nobody says otherwise."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.targets import Target

__all__ = ["LARGE_MATMUL_ELEMENTS", "default_output", "default_recipe", "remedy_of", "rounds_activations"]

#: A model without a MatMul weight of this many elements gains nothing from few bits: scales and graph outweigh it.
LARGE_MATMUL_ELEMENTS = 16_384
_RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)


def default_output(model: Path) -> Path:
    """Return `<stem>.slim` in the working folder; for a file called model.onnx the folder's name says more."""
    stem = model.stem if model.stem != "model" else model.resolve().parent.name
    return Path(f"{stem}.slim")


def default_recipe(model: Model, target: Target | None = None) -> tuple[Recipe, str]:
    """Return the recipe for a model that came without one, and a sentence that says why.

    Args:
        model: The source.
        target: Where it will run; None: anywhere.
    """
    if target is not None and target.default_recipe:
        name = target.default_recipe
        return Recipe.load(name), f"recipe '{name}': the default of target '{target.name}'"
    if not _has_large_matmul(model):
        return Recipe.load("safe"), "recipe 'safe': the model has no large MatMul, so few-bit weights would not pay"
    if find_decoder(model.to_proto("omit"))[0] is None:
        return Recipe.load("int8"), "recipe 'int8': the default for models that are no decoders"
    return Recipe.load("int4"), "recipe 'int4': the default for decoders"


def remedy_of(recipe: Recipe, target: Target, *, with_data: bool, operators: Collection[str] = ()) -> str:
    """Return what to try where an artifact missed its gates.

    Args:
        recipe: That it was made with.
        target: Where it runs.
        with_data: Whether the user gave calibration data.
        operators: Of the source.
    """
    random = sorted(_RANDOM.intersection(operators))
    if random:
        return f"the model draws random numbers ({', '.join(random)}): --verify off compiles without comparing runs"
    if all(step.group != "qdq" for step in recipe.build()):
        return "a gentler recipe (int8), a smaller block or more bits for the worst layers may pass"
    if not with_data:
        return "ranges of activations from data of your own (--calib FILE) may pass"
    wide = target.qdq is not None and any("16" in kind for kind in target.qdq.activations)
    gentler = "16-bit activations (recipe w8a16)" if wide else "weights alone in 8 bits (recipe int8)"
    return f"{gentler}, or more data like what the model will see, may pass"


def rounds_activations(model: Model) -> bool:
    """Return whether the model has products of few-bit weights.

    Their kernels round activations to int8, each in its own way, so that two runs of equal codes are not equal: a
    rounding that falls the other way in the first layer moves all that follow.
    """
    return any(node.op in ("MatMulNBits", "MatMulPacked") for graph in model.graphs() for node in graph.nodes)


def _has_large_matmul(model: Model) -> bool:
    for graph in model.graphs():
        for node in graph.nodes:
            if node.op not in ("MatMul", "Gemm"):
                continue
            for tensor in node.inputs:
                if isinstance(tensor, gs.Variable) and tensor.inputs and tensor.inputs[0].op == "Transpose":
                    tensor = tensor.inputs[0].inputs[0]
                if isinstance(tensor, gs.Constant) and np.prod(weight_of(tensor).shape) >= LARGE_MATMUL_ELEMENTS:
                    return True
    return False
