"""The quality table as text."""

from __future__ import annotations

from typing import Any

_OURS = "ours"
_EXACT = 1e-9


def plain(cell: dict[str, Any]) -> str:
    """One cell on one line."""
    name = f"{cell['subject']:<18} {cell['group']:<12} {cell['name']:<46}"
    if "bytes" not in cell:
        return f"{name} {cell['note']}"
    return f"{name} {cell['bytes']:>10} B {cell['bpw']:>6.2f} bpw  {_loss(cell):.6f}"


def markdown(stored: dict[str, Any]) -> str:
    """Everything: a table for each model, then where the best of ours and of the peers stand at each size."""
    parts = []
    for name, about in stored["subjects"].items():
        cells = [cell for cell in stored["cells"].values() if cell["subject"] == name]
        measured = sorted((c for c in cells if "bytes" in c), key=lambda c: c["bytes"])
        encoder = about["kind"] == "encoder"
        unit = "sentences" if encoder else f"tokens, windows of {about['window']}"
        parts += [f"### {name}", "", f"{about['parameters'] / 1e6:.2f} M weights; {about['tokens']} {unit}.", ""]
        parts += _table(measured, encoder)
        parts += ["", *_duels(measured)]
        failed = [f"{c['group']} {c['name']}: {c['note']}" for c in cells if "bytes" not in c]
        parts += ["", f"No result: {'; '.join(failed)}.", ""] if failed else [""]
    dates = sorted({cell["date"] for cell in stored["cells"].values()})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    versions = sorted({c["stamp"].partition(";")[0] for c in stored["cells"].values() if c["group"] != _OURS})
    parts.append(f"Measured {when} on {stored['machine']}. Peers: {', '.join(versions)}.")
    return "\n".join(parts)


def _loss(cell: dict[str, Any]) -> float:
    """What is compared: mean KL, or the mean distance of sentence vectors."""
    return float(cell["kl_mean"] if "kl_mean" in cell else cell["distance_mean"])


def _table(measured: list[dict[str, Any]], encoder: bool) -> list[str]:
    head = ["1 − cosine, mean", "99th percentile", "MSE", "same neighbour"]
    head = head if encoder else ["mean KL", "99th percentile", "perplexity", "same top token"]
    lines = [f"| | | bytes | bits/weight | {' | '.join(head)} |", "|---|---|" + "---:|" * 6]
    for cell in measured:
        who = f"**{cell['group']}**" if cell["group"] == _OURS else cell["group"]
        if encoder:
            figures = [_small(cell["distance_mean"]), _small(cell["distance_p99"]), _small(cell["mse"])]
            figures.append(f"{100 * cell['neighbour']:.1f} %")
        else:
            figures = [_small(cell["kl_mean"]), _small(cell["kl_p99"]), f"{cell['ppl_ratio']:.4f}x"]
            figures.append(f"{100 * cell['top1']:.1f} %")
        size = f"{cell['bytes']:,}".replace(",", " ")
        lines.append(f"| {who} | {cell['name']} | {size} | {cell['bpw']:.2f} | {' | '.join(figures)} |")
    return lines


def _small(value: float) -> str:
    return "< 1e-9" if value < _EXACT else f"{value:.3g}"


def _duels(measured: list[dict[str, Any]]) -> list[str]:
    """For every artifact of a peer that no smaller one of a peer beats: our best at no more bytes."""
    mine = [c for c in measured if c["group"] == _OURS]
    theirs = [c for c in measured if c["group"] != _OURS]
    lines = [
        "| best peer | bits/weight | its loss | our best at no more bytes | bits/weight | our loss | ours / theirs |"
    ]
    lines.append("|---|---:|---:|---|---:|---:|---:|")
    best = float("inf")
    for peer in theirs:  # by size
        if _loss(peer) >= best or _loss(peer) < _EXACT:
            continue
        best = _loss(peer)
        fitting = [c for c in mine if c["bytes"] <= peer["bytes"]]
        row = [f"{peer['group']} {peer['name']}", f"{peer['bpw']:.2f}", _small(best)]
        if fitting:
            us = min(fitting, key=_loss)
            row += [us["name"], f"{us['bpw']:.2f}", _small(_loss(us)), f"{_loss(us) / best:.2f}"]
        else:
            row += ["none so small", "", "", ""]
        lines.append(f"| {' | '.join(row)} |")
    return lines if len(lines) > 2 else []
