"""Kernel measurements as text while they come, and as the Markdown tables of docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence

from measurements import Measurement

COLUMNS = (
    ("ort_nbits4_b32", "ORT level 4"),
    ("ort_nbits0_b32", "ORT level 0"),
    ("ort_dynamic_int8", "ORT dynamic int8"),
    ("ort_float32", "ORT float32"),
    ("llama_q4_0", "llama.cpp Q4_0"),
    ("llama_q4_k", "llama.cpp Q4_K"),
)
"""Beside our block 32."""
COLUMNS_128 = (("ort_nbits4_b128", "ORT level 4"), ("ort_nbits0_b128", "ORT level 0"))
"""Beside our block 128."""
LIMIT_NAMES = {
    "read": "read",
    "amx_bf16": "AMX bf16",
    "avx512vnni_int8": "VNNI",
    "avxvnni_int8": "AVX-VNNI",
    "avx2_int8": "AVX2",
}


def text(results: Sequence[Measurement]) -> str:
    """One cell: microseconds, how many times as long as the first each takes, and the share of the limit."""
    first = results[0]
    limits = ", ".join(f"{name} {value:.4g}" for name, value in first.limits.items())
    lines = [f"\n{first.k} x {first.n}, {first.rows} rows, {first.threads} threads (limits in G/s: {limits})"]
    for result in results:
        share = f"{result.of_limit:6.0%} of {result.limit}" if result.of_limit is not None else result.kernels or ""
        lines.append(
            f"  {result.name:28} {result.us:11.0f} us  best {result.best_us:11.0f}  x{result.us / first.us:6.2f}  "
            f"{result.runs:4} runs  {share}"
        )
    return "\n".join(lines)


def markdown(measurements: Sequence[Measurement]) -> str:
    """Tables by threads and block; columns without a measurement are left out, and so are tables without ours."""
    parts = []
    for threads in sorted({m.threads for m in measurements}):
        mine = [m for m in measurements if m.threads == threads]
        word = "One thread" if threads == 1 else f"{threads} threads"
        for block, columns in ((32, COLUMNS), (128, COLUMNS_128)):
            table = _table(mine, f"_b{block}_", columns)
            if table:
                parts.append(f"{word}, block {block}:\n\n{table}")
        parts.append(_limits(mine, word))
    return "\n\n".join(parts)


def _table(measurements: Sequence[Measurement], block: str, columns: Sequence[tuple[str, str]]) -> str:
    by_cell: dict[tuple[int, int, int, int], dict[str, Measurement]] = {}
    for m in measurements:
        by_cell.setdefault(m.cell, {})[m.name] = m
    ours = sorted({m.name for m in measurements if m.name.startswith("ours") and block in m.name})
    if not ours:
        return ""
    shown = [(name, title) for name, title in columns if any(name in cell for cell in by_cell.values())]
    # Several of ours (accuracies, instruction sets) stand beside each other; peers are held against the first.
    ours.sort(key=lambda name: ("int8" not in name, "auto" not in name, name))
    heads = ["K x N", "M", *(_title(name, len(ours)) for name in ours), *(title for _, title in shown)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for (_, k, n, rows), cell in by_cell.items():
        base = cell.get(ours[0])
        if base is None:
            continue
        row = [f"{k} x {n}", str(rows), *(_microseconds(cell.get(name)) for name in ours)]
        row += [_ratio(cell.get(name), base) for name, _ in shown]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _title(name: str, count: int) -> str:
    if count == 1:
        return "ours, µs"
    _, accuracy, _, isa = name.split("_", 3)
    return f"ours, {accuracy}, {isa}, µs"


def _microseconds(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    limit, share = measurement.limit, measurement.of_limit
    return f"{measurement.us:,.0f}" + (
        "" if share is None else f" ({share:.0%} of {LIMIT_NAMES.get(limit or '', limit)})"
    )


def _ratio(peer: Measurement | None, base: Measurement) -> str:
    return "" if peer is None else f"{peer.us / base.us:.2f}x"


def _limits(measurements: Sequence[Measurement], word: str) -> str:
    """The range of each limit over the cells: how quiet the machine was."""
    by_name: dict[str, list[float]] = {}
    for m in measurements:
        for name, value in m.limits.items():
            by_name.setdefault(name, []).append(value)
    ranges = (f"{name} {min(values):,.4g} to {max(values):,.4g}" for name, values in by_name.items())
    return f"{word}, limits in 1e9 bytes or operations per second, over all cells: {', '.join(ranges)}."
