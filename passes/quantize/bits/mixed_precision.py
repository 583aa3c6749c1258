"""Bits shared out over the weights of a model, so that its answer suffers least for the bytes, or for the time.

Every weight is tried in every form on some of its columns. What the error of a form costs is, in nats of KL divergence,

- with calibration data: the weight's gain times the squared error in the product's output. Codes that make up for each
  other's errors (GPTQ) have the error sum_k e_k^2 / U_kk^2, where e_k is the rounding error of row k and U the upper
  factor of H^-1: so one plain rounding and one factor predict them;
- without data: the relative squared error times what such an error costs a weight of its role in other models.

The multiple-choice knapsack does the rest, see `limits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.passes.quantize.bits.limits import Form, Limits, choose_forms
from onnxslim_llm.passes.quantize.bits.speed import seconds_of
from onnxslim_llm.passes.quantize.bits.stored_size import Storage, stored_bytes
from onnxslim_llm.passes.quantize.codes.coding import nearest_codes
from onnxslim_llm.passes.quantize.codes.columns import columns_of
from onnxslim_llm.products.sites import WeightGroup
from onnxslim_llm.stats.curvature import inverse_factor

if TYPE_CHECKING:
    from onnxslim_llm.stats.statistics import Statistics
    from onnxslim_llm.targets.product_times import TimeTable

__all__ = ["FORMS", "Demand", "share_out", "tied_ridge"]

Array = NDArray[Any]

#: (bits, block) that weights may get, each with zero points and without. Blocks that are missing have no fast kernel,
#: or are never worth their bytes.
FORMS = (
    *((2, block) for block in (32, 64, 128)),
    *((3, block) for block in (16, 32, 64, 128)),
    *((4, block) for block in (16, 32, 64, 128, 256)),
    *((5, block) for block in (32, 64, 128, 256)),
    *((6, block) for block in (64, 128, 256)),
    *((8, block) for block in (32, 64, 128, 256)),
)
#: Columns that forms are tried on.
_COLUMNS = 256
#: KL divergence in nats that a relative error of `_PRIOR_ERROR` in the weights of one role makes: about the middle of
#: what was measured on Llamas of 4.5 M, 1 M and 0.26 M parameters, where a classifier's went from 0.004 to 0.1.
_PRIORS = {"lm_head": 3e-2, "embedding": 1e-3, "value": 7e-4, "output": 6e-4, "first_block": 1e-3, "linear": 5e-4}
_PRIOR_ERROR = 0.0025
_TINY = 1e-30


@dataclass(frozen=True)
class Demand:
    """A weight and the forms that it may get.

    Attributes:
        group: The weight.
        schemes: One or more.
    """

    group: WeightGroup
    schemes: tuple[WeightScheme, ...]


def share_out(
    demands: Sequence[Demand],
    limits: Limits,
    storage: Storage,
    times: TimeTable | None,
    statistics: Statistics | None,
    where: str,
) -> tuple[list[WeightScheme], list[dict[str, Any]]]:
    """Return the scheme of each weight, and what each form of it was expected to cost.

    Args:
        demands: The weights.
        limits: What all of them together may take, scales, zero points and padding included.
        storage: How the target stores them.
        times: Of everything that a token computes with them; None where time is not limited.
        statistics: With gains; None where there are no data.
        where: For messages.

    Raises:
        UsageError: Not even the smallest, or the fastest, forms fit.
    """
    items = [_forms(demand, storage, times, statistics) for demand in demands]
    elements = sum(d.group.source.size for d in demands)
    picked = choose_forms(items, elements, limits, _uniform(demands), where)
    accounts = [_account(d, item, i) for d, item, i in zip(demands, items, picked, strict=True)]
    return [d.schemes[i] for d, i in zip(demands, picked, strict=True)], accounts


def _forms(demand: Demand, storage: Storage, times: TimeTable | None, statistics: Statistics | None) -> list[Form]:
    group = demand.group
    return [
        Form(stored_bytes(group, scheme, storage), seconds_of(group, scheme, times) if times else 0.0, cost)
        for scheme, cost in zip(demand.schemes, _costs(demand, statistics), strict=True)
    ]


def _account(demand: Demand, forms: Sequence[Form], picked: int) -> dict[str, Any]:
    form = forms[picked]
    expected = {_label(s): float(f"{f.cost:.3g}") for s, f in zip(demand.schemes, forms, strict=True)}
    account: dict[str, Any] = {"expected": expected, "expected_kl": float(f"{form.cost:.3g}")}
    if form.seconds:
        account["expected_ms"] = float(f"{1e3 * form.seconds:.4g}")
    return account


def tied_ridge(group: WeightGroup, statistics: Statistics | None) -> float:
    """Return what the mean H of a tied classifier's input needs on its diagonal to stand for the look-ups, too.

    An error E of the table costs g_head tr(E^T H E) as classifier and g_table |E|^2 as embedding: the same as H plus
    g_table / g_head on the diagonal.
    """
    head, table = _gains(group, statistics)
    return table / head if head > 0 else 0.0


def _gains(group: WeightGroup, statistics: Statistics | None) -> tuple[float, float]:
    """Return what a squared error costs in the product, and in the table; 0 where it is unknown."""
    if statistics is None:
        return 0.0, 0.0
    product = table = 0.0
    for name in (group.name, statistics.origin_of(group.name)):
        gain = statistics.gains.get(name)
        if gain is not None and gain.of_table:
            table = gain.per_square
        elif gain is not None:
            product = gain.per_square
            table = gain.looked_up.per_square if gain.looked_up is not None else table
    return (product if group.roles - {"embedding"} else 0.0), (table if "embedding" in group.roles else 0.0)


def _uniform(demands: Sequence[Demand]) -> Iterable[list[int]]:
    """Yield the same form for all weights that have it; those that have not get their first one."""
    labels = dict.fromkeys(_label(scheme) for demand in demands for scheme in demand.schemes)
    for label in labels:
        yield [next((i for i, s in enumerate(d.schemes) if _label(s) == label), 0) for d in demands]


def _label(scheme: WeightScheme) -> str:
    return f"{scheme.bits}/{scheme.block}" + ("" if scheme.symmetric else " with zero points")


def _costs(demand: Demand, statistics: Statistics | None) -> list[float]:
    """Return what each form costs, in nats."""
    group = demand.group
    columns = columns_of(group.source, group.k_axis, _COLUMNS)
    columns[~np.isfinite(columns)] = 0  # told at save, with its place
    counts, gain, gram = _weights(group, statistics)
    if gain is not None:
        scale = gain * group.columns / len(columns)
    else:
        whole = np.square(columns, dtype=np.float64).sum() if gram is None else ((columns @ gram) * columns).sum()
        scale = _prior(group) / (_PRIOR_ERROR * max(float(whole), _TINY))
    return [scale * float(_row_errors(columns, s, counts) @ counts) for s in demand.schemes]


def _row_errors(columns: Array, scheme: WeightScheme, counts: Array) -> Array:
    """Return the squared error of each row of W[K, n] when its columns [n, K] are rounded."""
    piece = np.ascontiguousarray(columns.T)
    weights = counts.astype(np.float32) if counts.any() and scheme.method == "calibrated" else None
    coded = nearest_codes(piece, scheme, weights).dequantized(scheme.block_rows(len(piece)))
    result: Array = np.square(piece - coded, dtype=np.float64).sum(axis=1)
    return result


def _weights(group: WeightGroup, statistics: Statistics | None) -> tuple[Array, float | None, Array | None]:
    """Return what the squared error of each row counts [K], the gain, and H [K, K]; None for what is not known."""
    ones = np.ones(group.rows)
    product, table = _gains(group, statistics)
    moments = statistics.of_weight(group.name) if statistics is not None else None
    if (
        moments is None
        or moments.size != group.rows
        or (table and not product)
        or (not product and len(group.roles) > 1)
    ):
        return ones, (table or None), None
    fit = moments.load().fit
    assert fit.gram is not None
    ridge = table / product if product else 0.0
    gram = fit.gram / max(fit.count, 1) + ridge * np.eye(group.rows)
    factor = inverse_factor(gram)
    counts = np.diagonal(gram) if factor is None else 1 / np.square(np.diagonal(factor), dtype=np.float64)
    return counts, (product or None), gram


def _prior(group: WeightGroup) -> float:
    kinds = [kind for kind in _PRIORS if kind in group.roles | group.sensitive]
    return max(_PRIORS[kind] for kind in kinds)
