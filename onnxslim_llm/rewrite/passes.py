"""What a pass is: a frozen dataclass whose fields are its options, and the account that it gives of its work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from onnxslim_llm.rewrite.stage import Stage

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["Change", "Pass", "Skip"]


@dataclass(frozen=True)
class Skip:
    """A site that a pass looked at and left alone.

    Attributes:
        where: Name of the node or tensor.
        reason: One sentence that a user understands.
    """

    where: str
    reason: str


@dataclass
class Change:
    """What a pass did.

    Attributes:
        sites: Names of the nodes or tensors that changed, in the order of the change.
        skipped: Sites that were considered and left, each with its reason.
        detail: Figures of the pass's own (JSON-serialisable), shown in the manifest.
    """

    sites: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sites)

    def skip(self, where: str, reason: str) -> None:
        """Record that the site `where` was left alone."""
        self.skipped.append(Skip(where, reason))

    def extend(self, other: Change) -> None:
        """Append the account of `other`; its details win where both have a key."""
        self.sites.extend(other.sites)
        self.skipped.extend(other.skipped)
        self.detail.update(other.detail)


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation of a model.

    The model is valid before and after `apply`, not during. A pass never returns silently: what it looked at
    and left alone is in `Change.skipped`.

    Class attributes:
        name: verb_object, unique among all passes.
        group: The folder under passes/ that it lives in.
        lossless: True if the results stay numerically equal (up to float rounding of reordered operations).
        structural: Whether it changes sizes, inputs or outputs of the model: undone where the model does not run then.
        stage: Where it stands among the passes that change weights; None for passes that may stand anywhere.
        after_lowering: Whether it works on the target's operators: compiles run it behind the lowering.
    """

    name: ClassVar[str]
    group: ClassVar[str]
    lossless: ClassVar[bool] = True
    structural: ClassVar[bool] = False
    stage: ClassVar[Stage | None] = None
    after_lowering: ClassVar[bool] = False

    def requires(self, model: Model, context: Context) -> None:  # noqa: B027 (an empty precondition is the default)
        """Check what must hold before.

        Raises:
            UsageError: The pass does not make sense here (order, target, missing data).
        """

    @property
    def wants_statistics(self) -> bool:
        """Whether `Context.statistics` must be there with these options."""
        return False

    @property
    def takes_own_text(self) -> bool:
        """Whether, without data, text that the model writes will do, and nothing where it does not run."""
        return False

    @property
    def minds_cost(self) -> bool:
        """Whether text of the model's own is only wanted where that takes minutes at most."""
        return False

    @property
    def wants_gains(self) -> bool:
        """Whether `Context.statistics` must say, with these options, what errors do to the model's answer."""
        return False

    @property
    def wants_tied_gains(self) -> bool:
        """Whether it must say so at least of tables that are a product's weight as well."""
        return self.wants_gains

    @property
    def wants_cache_ranges(self) -> bool:
        """Whether `Context.cache_ranges` must be there with these options."""
        return False

    @abstractmethod
    def apply(self, model: Model, context: Context) -> Change:
        """Change `model` in place and give an account of it."""

    def ensures(self, model: Model, context: Context) -> None:  # noqa: B027 (an empty postcondition is the default)
        """Check what must hold afterwards.

        Raises:
            CompilerBug: The pass broke its own promise.
        """

    def options(self) -> dict[str, Any]:
        """Return the options (the dataclass fields) by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def summary(cls) -> str:
        """Return the first sentence of the docstring."""
        text = (cls.__doc__ or "").strip()
        return text.split("\n\n", 1)[0].replace("\n", " ").strip()
