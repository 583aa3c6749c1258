"""The compile's progress on a terminal: one line that moves, and one line a pass with -v."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onnxslim_llm.cli.output import Output
from onnxslim_llm.report.format import bytes_text, seconds_text

if TYPE_CHECKING:
    from onnxslim_llm.rewrite.pipeline import PassRecord

__all__ = ["TerminalProgress"]


class TerminalProgress:
    """Draws stages as they come (see `compiler.progress.Progress`); nothing where nobody looks or with -q."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar: Any = None
        self._task: Any = None
        self._total: int | None = None
        self._unit = ""
        self.told: set[str] = set()
        """Notes that were printed already."""

    def __enter__(self) -> Self:
        if self._output.live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=32),
                TextColumn("{task.fields[amount]}"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[label]}"),
                console=Console(stderr=True, highlight=False),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """A stage begins; it takes the place of the one before."""
        self._total, self._unit = total, unit
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(f"{name:<10}", total=total, amount="", label="")
        elif self._output.verbose:
            self._output.note(name)

    def advance(self, done: int, label: str = "") -> None:
        """`done` of the stage's total is finished."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, amount=self._amount(done), label=label)

    def pass_finished(self, record: PassRecord) -> None:
        """A pass has run."""
        if self._output.verbose:
            self.note(f"{record.name}: {record.changed} changes in {seconds_text(record.seconds)}")

    def note(self, text: str) -> None:
        """A remark."""
        self.told.add(text)
        if self._bar is not None:
            self._bar.console.print(f"[cyan]note:[/] {_escaped(text)}")
        else:
            self._output.note(text)

    def _amount(self, done: int) -> str:
        if self._unit == "bytes":
            return f"{bytes_text(done)} of {bytes_text(self._total)}" if self._total else bytes_text(done)
        return f"{done} of {self._total} {self._unit}" if self._total else ""


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
