"""Makes the shared modules of these tests (ir_samples, ir_jobs) importable, from pytest and from subprocesses alike."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
