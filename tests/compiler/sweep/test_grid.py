"""From options to points."""

from __future__ import annotations

import pytest

from onnxslim_llm.compiler.sweep.grid import Axis, make_points, parse_axis
from onnxslim_llm.errors import UsageError
from onnxslim_llm.recipe import Recipe

WHERE = "--grid"


def axis(text: str) -> Axis:
    return parse_axis(text, WHERE)


def test_values_are_toml_and_bare_words_are_texts() -> None:
    assert axis("quantize_weights.bits=2, 4").values == (2, 4)
    assert axis("prune_weights.method=wanda,sparsegpt").values == ("wanda", "sparsegpt")
    assert axis("quantize_weights.symmetric=true,false").values == (True, False)
    assert axis('quantize_weights.exclude=[],["a", "b"]').values == ([], ["a", "b"])
    assert parse_axis('quantize_weights.exclude=["a", "b"]', "--set", single=True).values == (["a", "b"],)


@pytest.mark.parametrize(
    ("text", "what", "todo"),
    [
        ("quantize_weight.bits=4", "unknown pass 'quantize_weight'", "'quantize_weights'"),
        ("quantize_weights.bit=4", "has no option 'bit'", "'bits'"),
        ("quantize_weights=4", "not of the form PASS.OPTION=V1,V2,...", ""),
        ("quantize_weights.bits", "not of the form", ""),
        ("quantize_weights.bits=", "names no values", "quantize_weights.bits="),
        ("quantize_weights.bits=4,4", "has the value 4 twice", ""),
        ("remove_dead_code.bits=4", "has no option 'bits'", "takes no options"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_hint(text: str, what: str, todo: str) -> None:
    with pytest.raises(UsageError) as caught:
        axis(text)
    assert what in caught.value.what
    assert todo in caught.value.todo


def test_every_combination_is_a_point_and_equal_recipes_are_one() -> None:
    bits, block = axis("quantize_weights.bits=4,8"), axis("quantize_weights.block=32,64")
    points = make_points([Recipe.load("int4-fast")], [bits, block])
    assert [tuple(p.settings.values()) for p in points] == [(4, 32), (4, 64), (8, 32), (8, 64)]
    assert len({p.name for p in points}) == 4
    assert [p.name for p in make_points([Recipe.load("int4-fast")], [bits, block])] == [p.name for p in points]
    twins = make_points([Recipe.load("int4-fast"), Recipe.load("int4-fast")], [bits])
    assert len(twins) == 2


def test_an_axis_concerns_the_recipes_that_have_its_pass() -> None:
    points = make_points([Recipe.load("safe"), Recipe.load("int4-fast")], [axis("quantize_weights.bits=4,8")])
    assert [(p.base, p.settings) for p in points] == [
        ("safe", {}),
        ("int4-fast", {"quantize_weights.bits": 4}),
        ("int4-fast", {"quantize_weights.bits": 8}),
    ]


def test_a_pass_that_no_recipe_has_is_added_at_its_stage() -> None:
    points = make_points([Recipe.load("int4-fast")], [axis("prune_weights.sparsity=0.5,0.7")])
    for point, sparsity in zip(points, (0.5, 0.7), strict=True):
        assert point.recipe is not None
        names = [step.name for step in point.recipe.passes]
        assert names.index("prune_weights") == names.index("quantize_weights") - 1
        assert point.recipe.passes[names.index("prune_weights")].options == {"sparsity": sparsity}
    (safe,) = make_points([Recipe.load("safe")], [axis("prune_weights.sparsity=0.5")])
    assert safe.recipe is not None
    assert safe.recipe.gates == "int4"  # those of 'safe' would refuse every zero


def test_fixed_settings_are_no_part_of_the_name() -> None:
    fixed = [parse_axis("quantize_weights.block=64", "--set", single=True)]
    (point,) = make_points([Recipe.load("int4-fast")], [axis("quantize_weights.bits=4")], fixed)
    assert point.settings == {"quantize_weights.bits": 4}
    assert point.recipe is not None
    assert point.recipe.passes[-1].options == {"block": 64, "bits": 4}
    with pytest.raises(UsageError, match=r"quantize_weights\.block is given twice"):
        make_points([Recipe.load("int4-fast")], [axis("quantize_weights.block=32")], fixed)


def test_values_that_do_not_go_together_are_points_with_a_reason() -> None:
    axes = [axis("prune_weights.pattern=unstructured,2:4"), axis("prune_weights.allocation=uniform,outliers")]
    points = make_points([Recipe.load("safe")], axes)
    refused = [p for p in points if p.recipe is None]
    assert len(points) == 4
    assert [tuple(p.settings.values()) for p in refused] == [("2:4", "outliers")]
    assert "2:4" in refused[0].refusal


def test_a_value_that_no_point_can_have_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="bits = 9 is not possible"):
        make_points([Recipe.load("int4-fast")], [axis("quantize_weights.bits=4,9")])
    with pytest.raises(UsageError, match=r"sparsity = 1\.5"):
        make_points([Recipe.load("safe")], [axis("prune_weights.sparsity=1.5")])
