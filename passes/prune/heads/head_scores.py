"""Which heads of an attention go first, and what leaving out each further one costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.products.heads import HeadLayer
from onnxslim_llm.products.owned_weights import Product
from onnxslim_llm.stats.curvature import inverse_factor
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["Ranking", "leave_out", "rank_groups"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Ranking:
    """The key heads of an attention, the one that goes first in front.

    Attributes:
        order: Their numbers; the last one always stays.
        costs: What leaving out each adds to the squared error of the product behind, relative to its squared output.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]

    def kept(self, left: int) -> NDArray[np.int64]:
        """Return the numbers of the `left` heads that stay longest, ascending."""
        return np.sort(np.array(self.order[len(self.order) - left :], np.int64))


def rank_groups(layer: HeadLayer, moments: StoredMoments | None, *, fitted: bool = True) -> Ranking:
    """Rank the key heads of an attention, each with its query heads.

    With data, greedily: of the heads that are left the one goes whose rows W_g cost least when all other rows make up
    for them, tr(W_g^T ([H^-1]_gg)^-1 W_g) (optimal brain surgeon, Hassibi & Stork 1993, for a block of rows). Where
    nothing is fitted they do not, and it costs what it adds to the squared error of all that are gone. Without data, by
    the norm of a head's rows times that of the columns that make its values.

    Args:
        layer: The attention.
        moments: Of the summing product's input, if there are data.
        fitted: Whether the rows that are left will be fitted.
    """
    weight = _rows_first(layer.product)
    groups = [layer.rows(np.array([g])) for g in range(layer.groups)]
    gram = moments.load().fit.gram if moments is not None else None
    factor = inverse_factor(gram) if gram is not None else None
    if gram is None or factor is None:
        return _by_norm(layer, weight, groups)
    signal = float(np.einsum("kn,kn->", gram @ weight, weight))
    if not fitted:
        return _by_loss(weight, gram, groups, signal or 1.0)
    return _by_surgery(weight, np.asarray(factor, np.float64), groups, signal or 1.0)


def leave_out(rankings: Sequence[Ranking], count: int) -> list[int]:
    """Return how many key heads go in each attention when the `count` cheapest of all go, at least one staying."""
    gone = [0] * len(rankings)
    waiting = [(ranking.costs[0], i) for i, ranking in enumerate(rankings) if len(ranking.order) > 1]
    heapq.heapify(waiting)
    for _ in range(count):
        if not waiting:
            break
        _, i = heapq.heappop(waiting)
        gone[i] += 1
        if gone[i] < len(rankings[i].order) - 1:
            heapq.heappush(waiting, (rankings[i].costs[gone[i]], i))
    return gone


def _by_surgery(weight: Array, factor: Array, groups: Sequence[NDArray[np.int64]], signal: float) -> Ranking:
    left = dict(enumerate(groups))
    work, inverse = weight.copy(), factor.T @ factor
    order: list[int] = []
    costs: list[float] = []
    while len(left) > 1:
        best, least = -1, np.inf
        for group, rows in left.items():
            cost = float(np.einsum("kn,kn->", np.linalg.solve(inverse[np.ix_(rows, rows)], work[rows]), work[rows]))
            if cost < least:
                best, least = group, cost
        rows = left.pop(best)
        order.append(best)
        costs.append(least / signal)
        made_up = np.linalg.solve(inverse[np.ix_(rows, rows)], np.hstack([work[rows], inverse[rows]]))
        change = inverse[:, rows] @ made_up
        work -= change[:, : work.shape[1]]
        inverse -= change[:, work.shape[1] :]
    return Ranking((*order, *left), tuple(costs))


def _by_loss(weight: Array, gram: Array, groups: Sequence[NDArray[np.int64]], signal: float) -> Ranking:
    # With parts P_g = X_g W_g of the output, the inner products of all pairs say what any set of them costs.
    inner = np.array(
        [[np.einsum("kn,kn->", gram[np.ix_(a, b)] @ weight[b], weight[a]) for b in groups] for a in groups]
    )
    left, gone = list(range(len(groups))), list[int]()
    costs: list[float] = []
    while len(left) > 1:
        added = [float(inner[g, g] + 2 * inner[g, gone].sum()) for g in left]
        best = int(np.argmin(added))
        costs.append(added[best] / signal)
        gone.append(left.pop(best))
    return Ranking((*gone, *left), tuple(costs))


def _by_norm(layer: HeadLayer, weight: Array, groups: Sequence[NDArray[np.int64]]) -> Ranking:
    values = layer.values
    source = values.product.weight.view()
    columns = np.square(source, dtype=np.float64).sum(axis=values.product.k_axis)[values.columns]
    made = columns.reshape(values.path.heads, values.path.width).sum(axis=1)
    norms = np.array([np.square(weight[rows]).sum() * made[g] for g, rows in enumerate(groups)])
    order = np.argsort(norms, kind="stable")
    share = norms[order] / (norms.sum() or 1.0)
    return Ranking(tuple(int(g) for g in order), tuple(float(cost) for cost in share[:-1]))


def _rows_first(product: Product) -> Array:
    """Return the weight as [K, N], float64."""
    source = product.weight.view()
    result = np.array(source if product.k_axis == 0 else source.T, np.float64)
    product.weight.release()
    return result
