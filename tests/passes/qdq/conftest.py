"""Lets the tests here import the file beside them: `from qdq_checks import ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
