from __future__ import annotations

import math

import pytest

from onnxslim_llm.artifact.manifest import LayerError, Manifest
from onnxslim_llm.report.html import render_report
from onnxslim_llm.report.layers import agreement, layer_rows, paired
from onnxslim_llm.report.plots import output_error_plot


def layer(name: str, predicted: float | None, sqnr: float | None, weight: float = 0.1) -> LayerError:
    return LayerError(name=name, role="ffn", relative_error=weight, predicted_error=predicted, sqnr_db=sqnr)


LAYERS = [layer("a", 0.01, 40), layer("b", 0.10, 20), layer("c", 0.001, 60), layer("d", None, None, 0.3)]


def test_the_largest_measured_loss_comes_first_and_unmeasured_layers_last() -> None:
    rows = layer_rows([*LAYERS, layer("e", 0.5, None)])
    assert [row.name for row in rows] == ["b", "a", "c", "e", "d"]
    assert rows[0].measured == pytest.approx(0.1)  # 20 dB
    assert rows[-1].measured is None


def test_rank_correlation() -> None:
    points = paired(layer_rows(LAYERS))
    assert len(points) == 3
    assert agreement(points) == pytest.approx(1.0)
    turned = [(name, role, predicted, 1 / measured) for name, role, predicted, measured in points]
    assert agreement(turned) == pytest.approx(-1.0)
    assert agreement(points[:2]) is None
    assert agreement([("x", "ffn", 0.1, 0.2)] * 3) is None


def test_ties_share_their_rank() -> None:
    points = [("a", "ffn", 1, 1), ("b", "ffn", 2, 2), ("c", "ffn", 2, 3), ("d", "ffn", 3, 4)]
    # By hand: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5.
    assert agreement(points) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_exact_layers_have_no_place_on_a_logarithmic_plot() -> None:
    assert paired(layer_rows([layer("exact", 0.0, 320.0)])) == []


def test_the_plot_names_every_layer() -> None:
    svg = output_error_plot(paired(layer_rows(LAYERS)))
    assert svg.startswith("<svg")
    for name in "abc":
        assert f"{name}: predicted" in svg
    assert "<script" not in svg


def test_the_page_shows_both_errors_and_the_reason(manifest: Manifest) -> None:
    kept = LayerError(name="kept", role="ffn", bits=8, block=128, relative_error=0.01, reason="why")
    page = render_report(manifest.model_copy(update={"layers": [*LAYERS, kept]}))
    assert "rank correlation is <b>1.00</b>" in page
    assert "<td>why</td>" in page
    none = render_report(manifest)  # its layers have neither prediction nor measurement
    assert "rank correlation" not in none
