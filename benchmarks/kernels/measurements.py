"""One measurement of the kernel benchmark, the file of them, and which of the machine's limits it is held against."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MOST_STREAMED_ROWS = 4
"""Up to here a product is bounded by reading its weight once."""
MOST_VECTOR_ROWS = 16
"""Up to here AMX machines use VNNI, see docs/kernels.md."""

INT8_PEAKS = {"avx2": "avx2_int8", "avxvnni": "avxvnni_int8", "avx512vnni": "avx512vnni_int8"}
FLOAT_PEAKS = {"avx2": "avx2_fma", "avxvnni": "avx2_fma", "avx512vnni": "avx512_fma"}


@dataclass(frozen=True)
class Measurement:
    """Of one candidate in one cell of the table.

    Attributes:
        us: median microseconds of a product.
        best_us: the fastest one.
        runs: passes over all copies of the weight; the median is of these.
        limit: the limit that the product is held against, "read" or the name of an arithmetic peak; None for peers.
        of_limit: the share of it that was reached.
        limits: medians of the same loop: GB/s for "read", else 1e9 operations per second.
        kernels: what a peer says about the kernels that it chose.
    """

    name: str
    k: int
    n: int
    rows: int
    threads: int
    us: float
    best_us: float
    runs: int
    limit: str | None
    of_limit: float | None
    limits: dict[str, float]
    kernels: str | None

    @property
    def cell(self) -> tuple[int, int, int, int]:
        """Threads, K, N, rows."""
        return self.threads, self.k, self.n, self.rows


def limits_of(
    rows: int, weight_bytes: int, k: int, n: int, isa: str, accuracy: str, peaks: Sequence[str]
) -> tuple[str | None, float]:
    """Which limit binds one of our products, and how much of it the product takes: bytes, or operations.

    ``peaks`` are the machine's; "auto" means its best kernels.
    """
    if rows <= MOST_STREAMED_ROWS:
        return "read", weight_bytes
    best = next((i for i, peak in (("amx", "amx_bf16"), *reversed(INT8_PEAKS.items())) if peak in peaks), "")
    isa = best if isa == "auto" else isa
    if isa == "amx":
        name = "amx_bf16" if rows > MOST_VECTOR_ROWS and accuracy != "exact" else ""
        isa = isa if name else "avx512vnni"
    else:
        name = ""
    name = name or (INT8_PEAKS if accuracy == "int8" else FLOAT_PEAKS).get(isa, "")
    return (name, 2.0 * rows * k * n) if name in peaks else (None, 0.0)


def load(path: Path) -> list[Measurement]:
    """Read a file of measurements; of equal ones the last counts."""
    found: dict[tuple[object, ...], Measurement] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        measurement = Measurement(**json.loads(line))
        found[*measurement.cell, measurement.name] = measurement
    return list(found.values())


def append(path: Path, measurements: Iterable[Measurement]) -> None:
    """Add measurements to a file, one cell at once."""
    lines = "".join(json.dumps(asdict(measurement)) + "\n" for measurement in measurements)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def finished(known: Iterable[Measurement], k: int, n: int, rows: int, threads: int, wanted: set[str]) -> bool:
    """Whether a cell has all of the candidates: what runs in one loop only compares to that loop."""
    return wanted <= {m.name for m in known if m.cell == (threads, k, n, rows)}
