"""What a compile tells while it works; the command line draws it, a library user may ignore it."""

from __future__ import annotations

from typing import Protocol

from onnxslim_llm.rewrite.pipeline import PassRecord

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Told about stages and their progress. Calls come from the compiling thread."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """A stage begins; `total` in `unit` ("bytes", "passes", "runs") if it is known. It ends the previous stage."""

    def advance(self, done: int, label: str = "") -> None:
        """`done` of the stage's total is finished; `label` says what is being worked on."""

    def pass_finished(self, record: PassRecord) -> None:
        """A pass has run."""

    def note(self, text: str) -> None:
        """A remark for the user, one line."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Ignore it."""

    def advance(self, done: int, label: str = "") -> None:
        """Ignore it."""

    def pass_finished(self, record: PassRecord) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""
