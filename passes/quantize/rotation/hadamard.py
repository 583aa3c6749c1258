"""Hadamard matrices: H of order n with entries 1 and -1, H H^T = n I.

Sylvester's doubling gives the powers of two, Paley's two constructions (1933) q + 1 for primes q = 3 mod 4 and
2 (q + 1) for primes q = 1 mod 4; the Kronecker product of two is one again.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["factors", "hadamard"]

Array = NDArray[Any]

#: Largest power of two that is one factor: products with small matrices are what BLAS does fast.
_LARGEST_FACTOR = 64


@cache
def hadamard(order: int) -> Array | None:
    """Return a Hadamard matrix [order, order] of int8 entries that needs no doubling, or None if none is known here.

    Powers of two are made by doubling.
    """
    if order > 0 and order & (order - 1) == 0:
        double = np.array([[1, 1], [1, -1]], np.int8)
        return reduce(np.kron, [double] * (order.bit_length() - 1), np.ones((1, 1), np.int8))
    if order % 4 == 0 and _is_prime(order - 1):
        return _first(order - 1)
    half = order // 2
    if order % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):  # q = half - 1 is 1 mod 4
        return _second(half - 1)
    return None


def factors(size: int) -> list[Array] | None:
    """Return Hadamard matrices whose Kronecker product has the order `size`, the largest factors first, or None.

    Args:
        size: n >= 1.
    """
    power = size & -size
    odd = size // power
    order = odd
    while order <= size:
        core = hadamard(order)
        if core is not None:
            break
        order *= 2
    else:
        return None
    found = [core] if order > 1 else []
    rest = size // order
    while rest > 1:
        step = min(rest, _LARGEST_FACTOR)
        matrix = hadamard(step)
        assert matrix is not None, step
        found.append(matrix)
        rest //= step
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _residues(q: int) -> Array:
    """Return Jacobsthal's matrix Q[i, j] = Legendre symbol of (i - j) modulo the prime q."""
    squares = {i * i % q for i in range(1, q)}
    symbol = np.array([0, *(1 if i in squares else -1 for i in range(1, q))], np.int8)
    index = np.arange(q)
    matrix: Array = symbol[(index[:, None] - index) % q]
    return matrix


def _first(q: int) -> Array:
    core = np.zeros((q + 1, q + 1), np.int8)
    core[0, 1:], core[1:, 0] = 1, -1
    core[1:, 1:] = _residues(q)
    return core + np.eye(q + 1, dtype=np.int8)


def _second(q: int) -> Array:
    core = np.zeros((q + 1, q + 1), np.int8)
    core[0, 1:] = core[1:, 0] = 1
    core[1:, 1:] = _residues(q)
    on, off = np.array([[1, -1], [-1, -1]], np.int8), np.array([[1, 1], [1, -1]], np.int8)
    return np.kron(core, off) + np.kron(np.eye(q + 1, dtype=np.int8), on)
