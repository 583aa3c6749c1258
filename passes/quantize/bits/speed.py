"""What the forms of weights take of the time for a token: products and look-ups, as a target's lowering makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.errors import UsageError
from onnxslim_llm.products.sites import WeightGroup
from onnxslim_llm.targets.product_times import ProductForm, ReadAs, TimeTable, read_times

if TYPE_CHECKING:
    from onnxslim_llm.rewrite.context import Context

__all__ = ["forms_of", "seconds_of", "times_of"]


def forms_of(group: WeightGroup, scheme: WeightScheme) -> Counter[ProductForm]:
    """Return what a token computes with a weight, and how often.

    Args:
        group: The weight.
        scheme: How it is coded.
    """
    look_ups = sum(site.role == "embedding" for site in group.sites)
    products = len(group.sites) - look_ups
    both = min(look_ups, products)
    counts: dict[ReadAs, int] = {"tied": both, "look_up": look_ups - both, "product": products - both}
    product = ProductForm(
        group.rows,
        group.columns,
        scheme.bits,
        scheme.block,
        scheme.symmetric,
        scheme.scale_type,
        group.sites[0].computes_in,
    )
    return Counter({replace(product, read_as=how): count for how, count in counts.items() if count})


def seconds_of(group: WeightGroup, scheme: WeightScheme, times: TimeTable) -> float:
    """Return the time for a token of everything that reads a weight."""
    return sum(count * times.seconds[form] for form, count in forms_of(group, scheme).items())


def times_of(
    weights: Sequence[tuple[WeightGroup, Iterable[WeightScheme]]], context: Context, given: str, where: str
) -> TimeTable:
    """Return the times of all forms that weights may get: those that are given, or measured ones.

    Args:
        weights: Each with its forms.
        context: Who measures.
        given: A file with times that were measured before; "": measure.
        where: For messages.

    Raises:
        UsageError: The file has not the times of this model and target, or nothing can be measured.
    """
    forms = {form for group, schemes in weights for scheme in schemes for form in forms_of(group, scheme)}
    if given:
        table = read_times(Path(given))
        target = context.target.name if context.target else table.target
        if table.target != target:
            what = f"the times are those of target '{table.target}', not of '{target}'"
            raise UsageError(what, where=given, todo=f"compile for {table.target}, or measure again")
        table.need(forms, given)
        return table
    if context.timer is None:
        todo = f"compile the model, or give {where}.times"
        raise UsageError("target_ms needs times, and nothing can be measured here", where=where, todo=todo)
    elements = sum(group.source.size for group, _ in weights if group.roles - {"embedding"})
    # As the manifest tells them, so that times that are given back make the same choice.
    table = TimeTable.from_json(context.timer.measure(forms, elements).to_json())
    if table.spread > _BUSY:
        told = f"{where}: the machine was busy while products were timed; the middle run took {table.spread:.1f} times"
        context.notes.append(f"{told} as long as the fastest one, which counts")
    return table


#: Noisier times are told about.
_BUSY = 1.5
