"""`python -m onnxslim_llm` is the command line."""

from __future__ import annotations

from onnxslim_llm.cli import main

main()
