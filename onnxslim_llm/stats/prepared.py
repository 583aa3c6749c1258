"""What jobs make of the moments of an input, made once for all tiles, weights and threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from onnxslim_llm.stats.statistics import Collected, StoredMoments

__all__ = ["Prepared"]

T = TypeVar("T")

_KEPT = 2  # inputs at a time: weights of one input follow each other


class Prepared(Generic[T]):
    """Keeps what was made of the last few inputs.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[Collected], T]) -> None:
        self._make = make
        self._made: OrderedDict[tuple[Path, str], T] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, moments: StoredMoments) -> T:
        """Return what belongs to these moments."""
        key = (moments.file, moments.digest)
        with self._lock:
            if key not in self._made:
                self._made[key] = self._make(moments.load())
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]
