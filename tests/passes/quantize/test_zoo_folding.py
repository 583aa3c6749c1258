"""Channel scales and rotations on models that other exporters write: the same results, or the right reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from zoo.access import model_path
from zoo.equality import compare

from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.passes.quantize.folding.fold_scales import fold_scales, tied
from onnxslim_llm.passes.quantize.folding.fold_sites import find_fold_sites
from onnxslim_llm.passes.quantize.rotate_residual import RotateResidual
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.targets import get_target

#: Sites that take factors without changing what caches hold, and why the stream is not rotated, if it is not.
FAMILIES = {
    "llama": (7, ""),
    "phi": (3, ""),
    "gpt_neox": (5, ""),
    "opt": (6, ""),
    "gemma": (6, ""),
    "gemma2": (6, "the result of a norm goes into the residual stream"),
    "bert": (2, "Add reads the result of a norm"),
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", FAMILIES)
def test_exported_models_compute_the_same(name: str, tmp_path: Path) -> None:
    count, reason = FAMILIES[name]
    path = model_path(name, "optimum")
    model = open_model(path)
    Pipeline(Recipe.load("safe").build()).run(model)
    rng = np.random.default_rng(0)
    sites = [site for site in find_fold_sites(model, Change()) if not site.cache]
    assert len(sites) == count
    for site in sites:
        fold_scales(model, Context(), site, tied(site, np.exp(rng.uniform(-1, 1, len(site.channels)))))
    change = RotateResidual(only_if_better=False, heads=False).apply(model, Context())
    assert bool(change) == (not reason)
    assert all(reason and reason in skip.reason for skip in change.skipped)
    target = get_target("portable")
    Pipeline(target.lowering).run(model, Context(target=target))
    save_model(model, tmp_path / "model.onnx", SaveOptions(jobs=1))
    compare(path, tmp_path / "model.onnx").check()
