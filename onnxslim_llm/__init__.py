"""onnxslim-llm: an ONNX-to-ONNX compiler for language models on edge devices.

The public face. Names are imported on first use, so that `import onnxslim_llm` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout that is not installed, passes/ and custom_ops/ lie beside this package instead of inside it.
_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir() and (_here.parent / "passes").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from onnxslim_llm.compiler import CompileResult, compile, inspect  # noqa: A004
    from onnxslim_llm.compiler.sweep import sweep
    from onnxslim_llm.custom_ops.ops import register as register_custom_ops
    from onnxslim_llm.errors import SlimError
    from onnxslim_llm.ir.model import Model, open_model
    from onnxslim_llm.recipe import Recipe
    from onnxslim_llm.rewrite.pipeline import Pipeline
    from onnxslim_llm.targets import Target

_HOME = {
    "CompileResult": "onnxslim_llm.compiler",
    "Model": "onnxslim_llm.ir.model",
    "Pipeline": "onnxslim_llm.rewrite.pipeline",
    "Recipe": "onnxslim_llm.recipe",
    "SlimError": "onnxslim_llm.errors",
    "Target": "onnxslim_llm.targets",
    "compile": "onnxslim_llm.compiler",
    "inspect": "onnxslim_llm.compiler",
    "open_model": "onnxslim_llm.ir.model",
    "register_custom_ops": "onnxslim_llm.custom_ops.ops",
    "sweep": "onnxslim_llm.compiler.sweep",
}

#: Names that are called otherwise where they live.
_ORIGINAL = {"register_custom_ops": "register"}

__all__ = [
    "CompileResult",
    "Model",
    "Pipeline",
    "Recipe",
    "SlimError",
    "Target",
    "__version__",
    "compile",
    "inspect",
    "open_model",
    "register_custom_ops",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), _ORIGINAL.get(name, name))
    globals()[name] = value
    return value
