"""The scripts import their neighbours by plain names, as they find them when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / part) for part in ("kernels", "end_to_end", "quality")]
