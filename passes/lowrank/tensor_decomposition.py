"""Tucker and CP decompositions of a tensor. For a matrix both are its singular value decomposition.

Tucker: the higher-order singular value decomposition (De Lathauwer et al. 2000), improved by orthogonal iteration. CP
(Hitchcock 1927, Carroll & Chang 1970): a sum of outer products, by alternating least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cp", "cp_tensor", "hosvd", "mode_spectrum", "tucker_tensor"]

Array = NDArray[Any]

#: Orthogonal iteration converges within a few sweeps from the higher-order decomposition.
_TUCKER_SWEEPS = 3
_CP_SWEEPS = 200
#: A sweep that lowers the error, relative to the tensor, by less than this is the last one.
_CP_ENOUGH = 1e-7
#: Ridge of the least squares of a sweep, relative: outer products that fall together make them singular.
_RIDGE = 1e-12


def hosvd(tensor: Array, ranks: Sequence[int]) -> tuple[Array, list[Array]]:
    """Return the core G [r_1, r_2, ...] and the orthonormal factors U_i [n_i, r_i] of T ~ G x_1 U_1 x_2 U_2 ...

    Args:
        tensor: T [n_1, n_2, ...].
        ranks: One for each mode, from 1 to its size; a mode with its full size is not changed.
    """
    wide = np.asarray(tensor, np.float64)
    factors = [_leading(wide, mode, rank) for mode, rank in enumerate(ranks)]
    for _ in range(_TUCKER_SWEEPS):
        for mode, rank in enumerate(ranks):
            factors[mode] = _leading(_projected(wide, factors, leave=mode), mode, rank)
    return _projected(wide, factors), factors


def mode_spectrum(tensor: Array, mode: int) -> Array:
    """Return the squared singular values of the tensor unfolded along a mode, falling.

    The squared error of `hosvd` is at most the sum over modes of those that it leaves away.
    """
    values = np.linalg.eigvalsh(_mode_gram(np.asarray(tensor, np.float64), mode))
    result: Array = np.maximum(values[::-1], 0.0)
    return result


def tucker_tensor(core: Array, factors: Sequence[Array]) -> Array:
    """Return the tensor that a core and factors stand for."""
    return _projected(core, [factor.T for factor in factors])


def cp(tensor: Array, rank: int, seed: int = 0) -> list[Array]:
    """Return factors U_i [n_i, R] with T ~ sum_r U_1[:, r] o U_2[:, r] o ..., each direction of equal size in all.

    Args:
        tensor: T [n_1, n_2, ...].
        rank: R, 1 or more.
        seed: Of the directions to start from beyond a mode's size.
    """
    wide = np.asarray(tensor, np.float64)
    rng = np.random.default_rng(seed)
    factors = [_start(wide, mode, rank, rng) for mode in range(wide.ndim)]
    total = float(np.square(wide).sum())
    before = np.inf
    for _ in range(_CP_SWEEPS):
        for mode in range(wide.ndim):
            factors[mode] = _least_squares(wide, factors, mode)
        error = float(np.square(wide - cp_tensor(factors)).sum())
        if before - error <= _CP_ENOUGH * total:
            break
        before = error
    return _balanced(factors)


def cp_tensor(factors: Sequence[Array]) -> Array:
    """Return the sum of outer products of the factors' columns."""
    first, *others = factors
    result = _khatri_rao(others)
    product: Array = first @ result.T
    return product.reshape([len(factor) for factor in factors])


def _unfolded(tensor: Array, mode: int) -> Array:
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def _mode_gram(tensor: Array, mode: int) -> Array:
    matrix = _unfolded(tensor, mode)
    result: Array = matrix @ matrix.T
    return result


def _leading(tensor: Array, mode: int, rank: int) -> Array:
    """Return the leading left singular vectors of an unfolding; the unit matrix where all are kept."""
    if rank == tensor.shape[mode]:
        return np.eye(rank)
    _, vectors = np.linalg.eigh(_mode_gram(tensor, mode))
    return vectors[:, ::-1][:, :rank]


def _projected(tensor: Array, factors: Sequence[Array], leave: int = -1) -> Array:
    """Return T x_i U_i^T for all modes but one."""
    result = tensor
    for mode, factor in enumerate(factors):
        if mode != leave:
            result = np.moveaxis(np.tensordot(factor.T, result, axes=(1, mode)), 0, mode)
    return result


def _start(tensor: Array, mode: int, rank: int, rng: np.random.Generator) -> Array:
    """Return the leading directions of a mode, and random ones where it has no more."""
    size = tensor.shape[mode]
    found = _leading(tensor, mode, size - 1)[:, :rank] if size > 1 else np.ones((1, 1))[:, :rank]
    random = rng.standard_normal((size, rank - found.shape[1])) / np.sqrt(size)
    return np.concatenate([found, random], axis=1)


def _khatri_rao(factors: Sequence[Array]) -> Array:
    """Return the columns' Kronecker products [n_1 n_2 ..., R]."""
    result = factors[0]
    for factor in factors[1:]:
        result = (result[:, None, :] * factor[None, :, :]).reshape(-1, result.shape[1])
    return result


def _least_squares(tensor: Array, factors: Sequence[Array], mode: int) -> Array:
    """Return the best factor of a mode, given the others."""
    others = [factor for i, factor in enumerate(factors) if i != mode]
    gram = np.prod([factor.T @ factor for factor in others], axis=0)
    gram = gram + _RIDGE * float(np.trace(gram)) * np.eye(len(gram))
    right = _unfolded(tensor, mode) @ _khatri_rao(others)
    result: Array = np.linalg.solve(gram, right.T).T
    return result


def _balanced(factors: Sequence[Array]) -> list[Array]:
    tiny = np.finfo(np.float64).tiny
    sizes = [np.maximum(np.linalg.norm(factor, axis=0), tiny) for factor in factors]
    common = np.prod(sizes, axis=0) ** (1 / len(factors))
    return [factor * (common / size) for factor, size in zip(factors, sizes, strict=True)]
