"""`python -m onnxslim_llm` is the command `onnxslim-llm`."""

from __future__ import annotations

import sys

from onnxslim_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
