"""Without torch: exit code 5 and the name of the extra."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["torch"] = None  # what an import finds where it is not installed
from onnxslim_llm.errors import ResourceError
try:
    import onnxslim_llm.gradients.executor
except ResourceError as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


def test_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "gradients need torch" in done.stdout
    assert "onnxslim-llm[gradients]" in done.stdout


def test_a_pass_that_needs_gradients_says_so_before_it_works() -> None:
    script = SCRIPT.replace(
        "import onnxslim_llm.gradients.executor",
        """
    from pathlib import Path
    from onnxslim_llm.gradients.scorer import GradientScorer
    from onnxslim_llm.rewrite.context import Context
    Context(gradients=GradientScorer(lambda session: [], Path())).need_gradients("Taylor", "prune_weights")
""",
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "gradients need torch" in done.stdout


def test_a_compile_imports_no_torch() -> None:
    script = "import sys, onnxslim_llm.passes, onnxslim_llm.compiler.flow; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
