"""What was measured of one contestant, and the Markdown table of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

OURS = "ort-cpu-ops"


@dataclass(frozen=True)
class Result:
    """One contestant, shape and number of threads; medians over all rounds.

    Attributes:
        load_seconds: from the file to a session that can run.
        load_anonymous: bytes without a file behind them that loading took.
        anonymous: the same after all rounds: caches, scratch memory and copies of weights.
        prefill_seconds: of a prompt of `prefill_tokens` tokens.
        step_seconds: of one generated token.
    """

    shape: str
    threads: int
    name: str
    load_seconds: float
    load_anonymous: int
    anonymous: int
    prefill_seconds: float
    prefill_tokens: int
    step_seconds: float
    best_prefill_seconds: float
    best_step_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of the prompt."""
        return self.prefill_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second."""
        return 1 / self.step_seconds

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def table(results: Sequence[Result]) -> str:
    """Markdown; in brackets how many times as fast as the contestant ours is."""
    ours = {(r.shape, r.threads): r for r in results if r.name == OURS}
    lines = [
        "| shape | threads | | decode, tok/s | prefill, tok/s | load, s | anonymous at load, MB | after runs, MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        base = ours.get((r.shape, r.threads))
        decode, prefill = f"{r.decode_rate:.1f}", f"{r.prefill_rate:.0f}"
        if base is not None and base is not r:
            decode += f" (x{base.decode_rate / r.decode_rate:.2f})"
            prefill += f" (x{base.prefill_rate / r.prefill_rate:.2f})"
        memory = f"{r.load_anonymous / 1e6:.0f} | {r.anonymous / 1e6:.0f}"
        lines.append(f"| {r.shape} | {r.threads} | {r.name} | {decode} | {prefill} | {r.load_seconds:.2f} | {memory} |")
    return "\n".join(lines)
