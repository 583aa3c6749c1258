"""report.html: one self-contained page, rendered from the manifest alone.

The plots are inline SVG, the style is inline, and the page's Content-Security-Policy forbids every request.
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from onnxslim_llm.artifact.manifest import Manifest
from onnxslim_llm.ir.roles import ROLES
from onnxslim_llm.report.format import (
    bytes_text,
    count_text,
    figure_text,
    fusion_text,
    percent_text,
    ratio_text,
    seconds_text,
)
from onnxslim_llm.report.layers import agreement, layer_rows, paired
from onnxslim_llm.report.page import render_page
from onnxslim_llm.report.plots import ROLE_COLOURS, bytes_plot, error_plot, output_error_plot, time_plot
from onnxslim_llm.report.sparse_storage import break_even, sparse_rows

__all__ = ["render_report"]

_WORST_LISTED = 20


def render_report(manifest: Manifest) -> str:
    """The text of report.html for a manifest."""
    return render_page("report", {"m": manifest, **_content(manifest)}, {"sign": _sign})


def _sign(comparison: str) -> str:
    return {"<=": "≤", ">=": "≥"}.get(comparison, comparison)


def _content(m: Manifest) -> dict[str, Any]:
    before, after = m.source.bytes_by_role, m.artifact.bytes_by_role
    ops = sorted(m.source.ops.keys() | m.artifact.ops.keys())
    pairs = [(op, m.source.ops.get(op, 0), m.artifact.ops.get(op, 0)) for op in ops]
    measured = [layer for layer in m.layers if layer.relative_error is not None]
    rows = layer_rows(measured)
    points = paired(rows)
    return {
        "title": _title(m.source.path),
        "recipe_name": m.recipe.get("name", "custom"),
        "recipe_text": json.dumps(m.recipe, indent=2, default=str),
        "gates": m.verify.gates if m.verify else [],
        "cards": _cards(m),
        "plots": {
            "bytes": Markup(bytes_plot(before, after)) if before or after else "",
            "errors": Markup(error_plot(m.layers)) if measured else "",
            "outputs": Markup(output_error_plot(points)) if len(points) > 2 else "",
            "times": Markup(time_plot(m.passes)) if m.passes else "",
        },
        "roles": [
            {
                "role": role,
                "before": before.get(role, 0),
                "after": after.get(role, 0),
                "ratio": ratio_text(after.get(role, 0), before.get(role, 0)),
            }
            for role in ROLES
            if role in before or role in after
        ],
        "ratio": ratio_text(m.artifact.bytes, m.source.bytes),
        "sparse_rows": sparse_rows(m),
        "break_even": break_even(m),
        "error_roles": [(r, colour) for r, colour in ROLE_COLOURS.items() if any(x.role == r for x in measured)],
        "point_roles": [(r, colour) for r, colour in ROLE_COLOURS.items() if any(p[1] == r for p in points)],
        "layer_rows": rows,
        "shown_rows": _WORST_LISTED,
        "agreement": agreement(points),
        "compared_layers": len(points),
        "kept": [row for row in rows if row.reason],
        "verify_figures": _verify_figures(m),
        "quality_figures": _quality_figures(m),
        "inputs": "; ".join(m.verify.inputs) if m.verify and isinstance(m.verify.inputs, list) else "generated",
        "changed_ops": sorted((p for p in pairs if p[1] != p[2]), key=lambda p: -abs(p[1] - p[2])),
        "same_ops": ", ".join(f"{count_text(n)} {op}" for op, n, other in pairs if n == other),
        "fusion": [entry for entry in m.fusion if entry.sites],
        "fusion_text": fusion_text(m.fusion),
        "environment": _environment(m),
    }


def _title(path: str) -> str:
    """The file's name; of a file that is called like all others, its folder's name too."""
    parts = PurePath(path).parts
    return "/".join(parts[-2:] if parts[-1:] == ("model.onnx",) else parts[-1:])


def _cards(m: Manifest) -> list[dict[str, str]]:
    nodes = sum(m.source.ops.values()), sum(m.artifact.ops.values())
    cards = [
        _card(
            "Size",
            ratio_text(m.artifact.bytes, m.source.bytes),
            f"{bytes_text(m.source.bytes)} → {bytes_text(m.artifact.bytes)}",
        ),
        _card("Nodes", ratio_text(nodes[1], nodes[0]), f"{count_text(nodes[0])} → {count_text(nodes[1])}"),
    ]
    quality, verify = m.quality, m.verify
    if quality and quality.ppl_source and quality.ppl_artifact:
        ratio = quality.ppl_artifact / quality.ppl_source
        detail = f"{figure_text(quality.ppl_source)} → {figure_text(quality.ppl_artifact)}"
        cards.append(_card("Perplexity", f"{ratio:.3f}x", detail))
    if verify and verify.kl_mean is not None:
        detail = f"top-1 agreement {percent_text(verify.top1_agreement)}" if verify.top1_agreement is not None else ""
        cards.append(_card("Mean KL", figure_text(verify.kl_mean, 3), detail))
    elif verify and verify.max_abs is not None:
        cards.append(_card("Largest difference", figure_text(verify.max_abs, 3), "absolute, any output"))
    cards.append(
        _card("Compile time", seconds_text(m.cost.seconds), f"peak memory {bytes_text(m.cost.peak_rss_bytes)}")
    )
    return cards


def _card(label: str, value: str, detail: str) -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail}


def _verify_figures(m: Manifest) -> list[tuple[str, str]]:
    v = m.verify
    if v is None:
        return []
    exact = v.max_abs == 0  # the ratio is infinite then
    figures = [
        ("Largest difference", figure_text(v.max_abs)),
        ("Largest relative difference", figure_text(v.max_rel)),
        ("SQNR", "exact" if exact else f"{figure_text(v.sqnr_db)} dB" if v.sqnr_db is not None else "–"),
        ("Cosine", figure_text(v.cosine, 6)),
        ("Mean KL", figure_text(v.kl_mean)),
        ("Top-1 agreement", percent_text(v.top1_agreement)),
        ("Greedy prefix match", percent_text(v.greedy_prefix_match)),
    ]
    return [(name, text) for name, text in figures if text != "–"]


def _quality_figures(m: Manifest) -> list[tuple[str, str]]:
    q = m.quality
    if q is None:
        return []
    return [
        ("Tokens", count_text(q.tokens)),
        ("Perplexity, source", figure_text(q.ppl_source)),
        ("Perplexity, artifact", figure_text(q.ppl_artifact)),
        ("Mean KL", figure_text(q.kld_mean)),
        ("99th percentile KL", figure_text(q.kld_p99)),
        ("Top-1 agreement", percent_text(q.top1_agreement)),
    ]


def _environment(m: Manifest) -> list[tuple[str, str]]:
    e = m.environment
    opset = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in m.artifact.opset.items())
    return [
        ("Opset", opset),
        ("Source SHA-256", m.source.sha256[:16] + "…"),
        ("Python", e.python),
        ("onnxruntime", e.onnxruntime or "not installed"),
        ("CPU", e.cpu or e.platform),
        ("Threads", str(e.threads)),
        ("Read", bytes_text(m.cost.bytes_read)),
        ("Written", bytes_text(m.cost.bytes_written)),
    ]
