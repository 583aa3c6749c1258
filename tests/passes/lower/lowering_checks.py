"""What every lowering must do, as functions: saved, reopened, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from block_models import Array, model_of, rounded, with_weight
from onnx import numpy_helper

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.passes.quantize.quantize_weights import LONG_BLOCK, QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.targets import Target

#: Float32 products of at most 256 terms in another order: 256 * 2^-24 each, three in a row, relative to the largest
#: output.
FLOAT_TOLERANCE = 3 * 256 * 2**-24
#: float16 tables and products that are computed in float32: four roundings of the result to 11 bits.
HALF_TOLERANCE = 4 * 2**-11


def compile_to(
    target: Target, lower: Pass, source: onnx.ModelProto, path: Path, **options: Any
) -> tuple[Model, PassRecord]:
    """Quantize, lower and save; returns the model and what the lowering said."""
    model = model_of(source)
    context = Context(target=target)
    options = {"min_elements": 0, "symmetric": True, "scale_dtype": "activation", **options}
    (_, record) = Pipeline([QuantizeWeights(**options), lower]).run(model, context)
    save_model(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert target.lint(model) == []
    return model, record


def expected_of(
    source: onnx.ModelProto, tables: set[str], bits: dict[str, int], block: int, symmetric: bool
) -> onnx.ModelProto:
    """The source with each named weight replaced by its rounded value; tables are quantized along their rows."""
    scale = {np.dtype(np.float16): "float16"}
    for name, width in bits.items():
        value = numpy_helper.to_array(next(t for t in source.graph.initializer if t.name == name))
        length = max(block, LONG_BLOCK) if block and width > 4 and name in tables else block
        near = rounded(
            value.T if name in tables else value, width, length, symmetric, scale.get(value.dtype, "float32")
        )
        source = with_weight(source, name, near.T if name in tables else near)
    return source


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = np.abs(actual.astype(np.float64) - expected).max()
    assert difference <= tolerance * np.abs(expected.astype(np.float64)).max()
