"""The direction of imports: which part may know which.

Read with `ast`, so that lazy imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Part -> parts of the project that it may import. The order is the direction: left to right, down to up.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "bounded": set(),
    "consumers": {"bounded"},  # interpreters of other environments run them, too
    "ir": {"errors"},
    "rewrite": {"errors", "ir", "stats", "targets", "gradients"},  # the last three: types of what a Context holds
    "concepts": {"errors", "ir", "rewrite"},
    "products": {"errors", "ir", "rewrite", "concepts"},
    "stats": {"errors", "ir", "runtime"},
    "gradients": {"errors", "ir", "rewrite", "concepts", "products", "stats", "runtime"},
    "targets": {"errors", "ir", "rewrite", "concepts", "runtime", "custom_ops", "bounded"},  # they open artifacts
    "runtime": {"errors", "ir", "custom_ops"},  # artifacts may need our operators
    "verify": {"errors", "ir", "rewrite", "runtime", "targets"},
    "artifact": {"errors", "ir"},
    "report": {"errors", "ir", "artifact"},
    "custom_ops": set(),
    "passes": {"errors", "ir", "rewrite", "concepts", "products", "stats", "targets", "custom_ops", "gradients"},
    "recipe": {"errors", "rewrite", "targets"},
    "compiler": {
        *("artifact", "errors", "ir", "passes", "recipe", "report", "rewrite", "runtime", "stats", "targets", "verify"),
        *("concepts", "custom_ops", "consumers", "gradients"),
    },
    "cli": {
        *("artifact", "compiler", "errors", "ir", "recipe", "report", "rewrite", "runtime", "stats", "targets"),
        *("verify", "custom_ops", "consumers"),
    },
}

#: Third-party packages that only the named parts may import at all.
RESERVED: dict[str, set[str]] = {
    "torch": {"gradients"},
    "typer": {"cli"},
    "click": {"cli"},
    "onnxruntime": {"runtime", "verify", "targets", "custom_ops", "cli", "consumers"},
}


def _part(path: Path) -> str | None:
    """Return the part that a source file belongs to; None for the package face."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] in ("passes", "custom_ops"):
        return relative.parts[0]
    inner = relative.parts[1:]
    if inner == ("__init__.py",) or inner == ("__main__.py",):
        return None
    return inner[0].removesuffix(".py")


def _sources() -> list[Path]:
    folders = ("onnxslim_llm", "passes", "custom_ops")
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{'/'.join(package)}:{node.lineno}: relative imports hide the direction"
            if node.module in ("onnxslim_llm", "passes", "custom_ops"):
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"
            elif node.module:
                yield node.lineno, node.module


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_direction(path: Path) -> None:
    part = _part(path)
    if part is None:
        return
    assert part in ALLOWED, f"a new part '{part}': say in ALLOWED what it may import"
    for line, name in _imports(path):
        place = f"{path.relative_to(ROOT)}:{line}"
        top, _, rest = name.partition(".")
        assert top not in ("passes", "custom_ops"), f"{place}: import it as onnxslim_llm.{name}"
        if top == "onnxslim_llm":
            other = rest.split(".")[0]
            if other and other not in ("__version__", part):
                assert other in ALLOWED[part], f"{place}: {part} must not import {other}"
        elif top in RESERVED:
            assert part in RESERVED[top], f"{place}: {part} must not import {top}"


def test_a_pass_imports_no_other_group() -> None:
    for path in sorted((ROOT / "passes").rglob("*.py")):
        group = path.relative_to(ROOT / "passes").parts[0]
        if group == "__init__.py":
            continue
        for line, name in _imports(path):
            if name.startswith("onnxslim_llm.passes."):
                assert name.split(".")[2] == group, f"{path.relative_to(ROOT)}:{line}: {group} must not import {name}"


def test_kernels_know_no_runtime() -> None:
    """ONNX Runtime's types stop in the glue: no other C++ file names them."""
    for path in (ROOT / "custom_ops").rglob("*"):
        if path.suffix in (".cpp", ".cc", ".h", ".hpp", ".inc") and "glue" not in path.relative_to(ROOT).parts:
            assert "OrtApi" not in path.read_text(), path.relative_to(ROOT)
