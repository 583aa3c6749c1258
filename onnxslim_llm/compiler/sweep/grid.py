"""The points of a grid: recipes, and the values that options of their passes take."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from onnxslim_llm.errors import UsageError
from onnxslim_llm.recipe import Recipe, Step
from onnxslim_llm.rewrite.order import check_order
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.registry import all_passes, check_options
from onnxslim_llm.rewrite.syntax import parse_value, split_items

__all__ = ["Axis", "Point", "make_points", "parse_axis"]

_SLUG_LENGTH = 60
_DIGEST_LENGTH = 6  # so that names that were cut, or lost signs, still differ


@dataclass(frozen=True)
class Axis:
    """An option of a pass, and the values that it takes.

    Attributes:
        step: Name of the pass.
        option: Name of the option.
        values: At least one; no two are equal.
    """

    step: str
    option: str
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """PASS.OPTION."""
        return f"{self.step}.{self.option}"


@dataclass(frozen=True)
class Point:
    """One compile of a sweep.

    Attributes:
        name: Unique in the sweep, fit for a file's name, the same in every run.
        base: Name of the recipe that it began with.
        settings: Values by PASS.OPTION: of the axes that concern the recipe.
        recipe: What is compiled; None if it cannot be, for the reason in `refusal`.
        refusal: Why these values do not go together; empty if they do.
    """

    name: str
    base: str
    settings: dict[str, Any]
    recipe: Recipe | None
    refusal: str = ""


def parse_axis(text: str, where: str, *, single: bool = False) -> Axis:
    """Return the axis that `PASS.OPTION=V1,V2,...` spells; values are TOML values, bare words are texts.

    Args:
        text: As the user wrote it.
        where: The command line's option, for messages.
        single: There is one value, which may have commas.

    Raises:
        UsageError: Another form, an unknown pass or option, no values, or the same value twice.
    """
    target, equals, listed = text.partition("=")
    step, dot, option = (part.strip() for part in target.partition("."))
    if not (equals and dot and option):
        form = "PASS.OPTION=VALUE" if single else "PASS.OPTION=V1,V2,..."
        raise UsageError(f"'{text}' is not of the form {form}", where=where)
    check_options(step, [option], f"{where} {text}")
    values = [parse_value(part) for part in ([listed] if single else split_items(listed, text))]
    if not values:
        raise UsageError(f"'{text}' names no values", where=where, todo=f"write {step}.{option}=V1,V2,...")
    repeated = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if repeated is not None:
        raise UsageError(f"{step}.{option} has the value {repeated!r} twice", where=where, todo="leave one away")
    return Axis(step, option, tuple(values))


def make_points(recipes: Sequence[Recipe], axes: Sequence[Axis], fixed: Sequence[Axis] = ()) -> list[Point]:
    """Return every combination of recipes and values, each once.

    An axis concerns the recipes that have its pass; where none has it, the pass is added to all of them at its stage.
    Combinations that a pass refuses are points, too, that say why.

    Args:
        recipes: What the points begin with.
        axes: The grid.
        fixed: Axes of one value: options that are the same for all points and no part of their names.

    Raises:
        UsageError: Two axes are of the same option, or a value is refused whatever it is combined with.
    """
    names = [axis.name for axis in (*axes, *fixed)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice", where="--grid", todo="give all its values at once")
    everywhere = {a.step for a in (*axes, *fixed) if not any(_has(recipe, a.step) for recipe in recipes)}
    points: dict[str, Point] = {}
    refused: list[tuple[Point, UsageError]] = []
    for recipe in recipes:
        here = [axis for axis in axes if axis.step in everywhere or _has(recipe, axis.step)]
        always = [axis for axis in fixed if axis.step in everywhere or _has(recipe, axis.step)]
        for values in product(*(axis.values for axis in here)):
            chosen = list(zip(here, values, strict=True))
            settings = {axis.name: value for axis, value in chosen}
            try:
                built = _with_options(recipe, [*((axis, axis.values[0]) for axis in always), *chosen])
            except UsageError as error:
                told = hashlib.sha256(f"{recipe.digest()} {settings}".encode()).hexdigest()
                point = Point(_name(recipe.name, chosen, told), recipe.name, settings, None, _one_line(error))
                refused.append((point, error))
                points.setdefault(point.name, point)
                continue
            digest = built.digest()
            points.setdefault(digest, Point(_name(recipe.name, chosen, digest), recipe.name, settings, built))
    _check_values(points.values(), axes, refused)
    return list(points.values())


def _check_values(points: Iterable[Point], axes: Sequence[Axis], refused: list[tuple[Point, UsageError]]) -> None:
    """Raise the refusal of a value that no point can have: it is no matter of combinations."""
    good = [point for point in points if point.recipe is not None]
    if refused and not good:
        raise refused[0][1]
    for axis in axes:
        for value in axis.values:
            errors = [error for point, error in refused if point.settings.get(axis.name) == value]
            if errors and not any(point.settings.get(axis.name) == value for point in good):
                raise errors[0]


def _has(recipe: Recipe, step: str) -> bool:
    return any(entry.name == step for entry in recipe.passes)


def _with_options(recipe: Recipe, options: Iterable[tuple[Axis, Any]]) -> Recipe:
    """Return the recipe with these options; passes that it lacks are added.

    Raises:
        UsageError: A pass refuses its options, or cannot stand where it must.
    """
    steps = list(recipe.passes)
    for axis, value in options:
        if not any(step.name == axis.step for step in steps):
            steps.insert(_place(steps, all_passes()[axis.step]), Step(name=axis.step))
        steps = [
            Step.model_validate({**step.model_dump(), axis.option: value}) if step.name == axis.step else step
            for step in steps
        ]
    changed = recipe.model_copy(update={"passes": tuple(steps)})
    built = changed.build()
    check_order(built)
    if changed.gates == "lossless" and not all(step.lossless for step in built):
        return changed.model_copy(update={"gates": "int4"})
    return changed


def _place(steps: Sequence[Step], kind: type[Pass]) -> int:
    """Return where a pass belongs: before the first one of a later stage."""
    if kind.stage is not None:
        for place, step in enumerate(steps):
            stage = all_passes()[step.name].stage
            if stage is not None and stage > kind.stage:
                return place
    return len(steps)


def _name(base: str, chosen: Iterable[tuple[Axis, Any]], digest: str) -> str:
    text = "-".join([base, *(f"{axis.option}-{_spelled(value)}" for axis, value in chosen)])
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:_SLUG_LENGTH]
    return f"{slug}-{digest[:_DIGEST_LENGTH]}"


def _spelled(value: Any) -> str:
    return ",".join(map(str, _flat(value)))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _one_line(error: UsageError) -> str:
    return f"{error.what}; {error.todo}" if error.todo else error.what
