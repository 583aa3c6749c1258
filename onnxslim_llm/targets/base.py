"""What a target is: a runtime, what it accepts, and how an artifact is opened in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.errors import GateError, ResourceError, UsageError
from onnxslim_llm.targets.lint import Violation, free_sizes, lint_model
from onnxslim_llm.targets.qdq_rules import QdqRules

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.runtime.session import Session

__all__ = ["Finished", "Target", "VendorError", "Violation"]


class VendorError(GateError):
    """The vendor's compiler refused, crashed or took too long; nothing was published.

    Attributes:
        log: All that it printed.
    """

    log: str = ""


@dataclass(frozen=True)
class Finished:
    """What a target adds to an artifact after the model was written.

    Attributes:
        files: Names of further files in the artifact's folder.
        notes: One-line remarks for the user.
    """

    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A runtime that artifacts are made for.

    Attributes:
        name: As given to --target.
        description: One or two sentences for people who choose.
        package: The Python package that runs artifacts here, and what it is called in messages.
        lowering: The passes that turn concepts into the target's operators, as pipeline text. They run last.
        domains: Operator domains that artifacts may use; "" is ai.onnx.
        min_opset, max_opset: Range of the ai.onnx version.
        weight_bits: Widths of quantized weights that artifacts can store.
        fast_bits: Those among them that the runtime has fast kernels for; none: all of them.
        needs_operators: Artifacts need the project's own operator library.
        session_config: Session options that an artifact is opened with, and that deployments should use.
        qdq: What the target computes on integers; None where activations always stay float.
        fixed_shapes: All sizes must be numbers.
        simulated: Runs here take thousands of times as long as on the device.
        lint_is_final: What the lint finds keeps a model from running, whoever wrote it. Otherwise a compile leaves the
            source's own operators of other domains in it.
        extra: The optional dependency of this project that brings the runtime; "" where it is always there.
        default_recipe: The preset for whoever asks for none; "" leaves the choice to the kind of model.
    """

    name: str
    description: str
    package: str
    lowering: str
    domains: tuple[str, ...]
    min_opset: int = 1
    max_opset: int = 26  # what onnxruntime 1.31 opens
    weight_bits: tuple[int, ...] = ()
    fast_bits: tuple[int, ...] = ()
    needs_operators: bool = False
    session_config: Mapping[str, str] = field(default_factory=dict)
    qdq: QdqRules | None = None
    fixed_shapes: bool = False
    simulated: bool = False
    lint_is_final: bool = False
    extra: str = ""
    default_recipe: str = ""

    def installed(self) -> tuple[bool, str]:
        """Return whether artifacts can be run here, and the runtime's version or what is missing."""
        try:
            found = f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return False, f"{self.package} is not installed"
        if self.needs_operators and ops.library_path() is None:
            return False, f"{ops.LIBRARY_NAME} was not built here"
        return True, found

    def open(self, path: str | Path, *, threads: int = 0) -> Session:
        """Open an artifact in the target's own runtime, as it will be deployed.

        Args:
            path: The .onnx file.
            threads: Threads inside one operator; 0 leaves the choice to the runtime.

        Raises:
            ModelError: The runtime refuses the model; the node or operator is named.
            ResourceError: The runtime is not installed, or memory ran out.
        """
        from onnxslim_llm.runtime.session import open_session  # loads the runtime

        self.require()
        return open_session(path, threads=threads, config=self.session_config)

    def require(self) -> None:
        """Check that artifacts can be run here.

        Raises:
            ResourceError: They cannot; it says what to install.
        """
        there, what = self.installed()
        if there:
            return
        todo = f"pip install {self.package}"
        if self.extra:
            todo = f'pip install "onnxslim-llm[{self.extra}]"'
        if ops.LIBRARY_NAME in what:
            todo = "reinstall onnxslim-llm with a C++ compiler"
        raise ResourceError(what, where=f"target '{self.name}'", todo=todo)

    def with_options(self, options: Mapping[str, str]) -> Target:
        """Return the target with options of its own, as given to --target-option.

        Raises:
            UsageError: It has no such option.
        """
        for name in options:
            raise UsageError(f"target '{self.name}' has no option '{name}'", where="--target-option")
        return self

    def finish(self, artifact: Path, *, threads: int = 0) -> Finished:
        """Add to the folder of a written model what the target needs besides, such as what its compiler makes of it.

        Args:
            artifact: The .onnx file.
            threads: Threads that this may take; 0 leaves the choice to the tools.

        Raises:
            VendorError: The vendor's compiler fails on the model.
        """
        return Finished()

    def finish_together(self, artifacts: Sequence[Path], *, threads: int = 0) -> Finished:
        """Add what the target needs of several graphs that share their weights, each of which is finished.

        Args:
            artifacts: The .onnx files, that for prompts first.
            threads: As for `finish`.

        Raises:
            VendorError: The vendor's compiler fails on the models.
        """
        return Finished()

    def check_opset(self, version: int) -> None:
        """Check that artifacts may have this version of ai.onnx.

        Raises:
            UsageError: They may not.
        """
        if not self.min_opset <= version <= self.max_opset:
            what = f"target '{self.name}' takes opsets from {self.min_opset} to {self.max_opset}, not {version}"
            raise UsageError(what, where="--opset", todo="choose one of these")

    def lint(self, model: Model) -> list[Violation]:
        """Return everything in the model that the target does not accept; empty for an artifact."""
        found = lint_model(model, domains=self.domains, opsets=(self.min_opset, self.max_opset))
        return [*found, *(free_sizes(model) if self.fixed_shapes else ())]
