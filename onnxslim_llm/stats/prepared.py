"""What jobs make of the moments of an input, made once for all tiles, weights and threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from onnxslim_llm.stats.statistics import Collected, StoredMoments

__all__ = ["Prepared"]

P = ParamSpec("P")
T = TypeVar("T")

_KEPT = 2  # inputs at a time: weights of one input follow each other


class Prepared(Generic[P, T]):
    """Keeps what was made of the last few inputs.

    Args:
        make: Makes it, of the moments and of options that can be hashed.
    """

    def __init__(self, make: Callable[Concatenate[Collected, P], T]) -> None:
        self._make = make
        self._made: OrderedDict[tuple[Path, str, Any, Any], T] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, moments: StoredMoments, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what belongs to these moments and options."""
        key = (moments.file, moments.digest, args, tuple(sorted(kwargs.items())))
        with self._lock:
            if key not in self._made:
                self._made[key] = self._make(moments.load(), *args, **kwargs)
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]
