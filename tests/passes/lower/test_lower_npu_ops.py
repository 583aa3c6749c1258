from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from concept_models import assert_same_results, call_model, lower
from fusion_checks import floats

from onnxslim_llm.concepts.activation import GELU, SWISH
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

#: Float32 sums of a dozen terms around one, in another order.
TOLERANCE = 2e-6
#: What rounding alone moves logits by; see `verify.gates`.
LOGITS = 1e-3


def test_norms_stay_whole() -> None:
    feeds = {"X": floats(2, 3, 8), "scale": floats(8, seed=1)}
    model = call_model(RMS_NORM, feeds, {"epsilon": 1e-6}, {"X": ["b", "s", 8], "scale": [8]}, 18)
    source = model.copy()
    ops, _ = lower(model, "lower_npu_ops", "portable")
    assert ops == {"RMSNormalization": 1}
    assert model.opset() == 23
    assert_same_results(source, model, feeds, TOLERANCE)


@pytest.mark.parametrize(("native", "expected"), [("true", {"Gelu": 1}), ("false", {"Div", "Erf", "Add", "Mul"})])
def test_gelu_as_wanted(native: str, expected: object) -> None:
    feeds = {"X": floats(2, 3, 8)}
    model = call_model(GELU, feeds, {}, {"X": ["b", "s", 8]}, 18)
    source = model.copy()
    ops, _ = lower(model, f"lower_npu_ops{{native_gelu={native}}}", "portable")
    assert ops == expected or set(ops) == expected
    assert_same_results(source, model, feeds, TOLERANCE)


def test_swish_becomes_a_product() -> None:
    feeds = {"X": floats(2, 3, 8)}
    model = call_model(SWISH, feeds, {"alpha": 1.0}, {"X": ["b", "s", 8]}, 18)
    source = model.copy()
    ops, _ = lower(model, "lower_npu_ops", "portable")
    assert ops == {"Sigmoid": 1, "Mul": 1}
    assert_same_results(source, model, feeds, TOLERANCE)


def test_the_whole_lowering_leaves_nothing_that_htp_lacks(sample_dir: Path) -> None:
    """Fixed sizes, concepts apart, no booleans behind the mask, the same logits."""
    from onnxslim_llm.targets import get_target
    from onnxslim_llm.targets.htp_integers import FLOAT_OPERATOR

    model = open_model(sample_dir / "model.onnx")
    steps = [
        *Pipeline('fix_shapes{sizes="batch=1,seq=8,past=0"}').passes,
        *Recipe.load("safe").build(),
        *Pipeline(get_target("qnn-htp").lowering.replace("tables,", "tables{positions=8, max_share=1.0},")).passes,
    ]
    Pipeline(steps).run(model)
    left = {violation.rule for violation in get_target("qnn-htp").lint(model)}
    assert left <= {FLOAT_OPERATOR}  # nothing is quantized here
    ops = model.census()
    assert not {"Where", "And", "Or", "Shape", "Range", "Sin", "Cos"} & set(ops)
    assert ops["RMSNormalization"] == 11
    ids = np.arange(8)[None] + 40
    expected, _ = DecoderRunner(open_session(sample_dir / "model.onnx")).extend(ids)
    got, _ = DecoderRunner(open_session(model.to_proto())).extend(ids)
    np.testing.assert_allclose(got, expected, atol=LOGITS)
