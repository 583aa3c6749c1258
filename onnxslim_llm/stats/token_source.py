"""What a pass may ask about the tokens that the user needs."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

__all__ = ["TokenSource"]


class TokenSource(Protocol):
    """Knows the user's data and the files beside the source model."""

    def counts(self, name: str, size: int) -> NDArray[Any] | None:
        """Return how often each of `size` tokens occurs in the data [size]; None without data.

        Args:
            name: The model's input that takes token ids.
            size: Number of tokens of the vocabulary.

        Raises:
            UsageError: The data cannot be read, or have ids outside of the vocabulary.
        """

    def special(self) -> tuple[int, ...]:
        """Return the ids that tokenizer and configuration name, such as the one that ends a text."""
