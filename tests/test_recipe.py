"""Recipes as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxslim_llm.errors import UsageError
from onnxslim_llm.recipe import Recipe, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_and_builds(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.description
    assert recipe.when
    assert recipe.build()


@pytest.mark.parametrize("name", preset_names())
def test_the_resolved_recipe_reproduces_the_passes(name: str) -> None:
    recipe = Recipe.load(name)
    again = Recipe.model_validate(recipe.resolved())
    assert again.build() == recipe.build()
    assert again.digest() == recipe.digest()


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_may_start_from_a_preset(tmp_path: Path) -> None:
    path = write(tmp_path, 'extends = "safe"\n[[passes]]\nname = "quantize_weights"\nbits = 8\n')
    recipe = Recipe.load(path)
    assert recipe.name == "mine"
    assert recipe.gates == Recipe.load("safe").gates
    assert [s.name for s in recipe.passes] == [*(s.name for s in Recipe.load("safe").passes), "quantize_weights"]


def test_settings_change_every_step_of_a_pass() -> None:
    recipe = Recipe.load("int4-fast").with_settings(["quantize_weights.block=64", "quantize_weights.method=rtn"])
    options = next(s.options for s in recipe.passes if s.name == "quantize_weights")
    assert options["block"] == 64
    assert options["method"] == "rtn"
    assert recipe.digest() != Recipe.load("int4-fast").digest()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("quantize_weights.block", "not of the form PASS.OPTION=VALUE"),
        ("block=4", "not of the form PASS.OPTION=VALUE"),
        ("quantise_weights.block=4", "has no pass 'quantise_weights'"),
        ("quantize_weights.blok=4", "has no option 'blok'"),
        ("quantize_weights.block=many", "quantize_weights.block"),
    ],
)
def test_a_wrong_setting_is_refused(setting: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("int4-fast").with_settings([setting])
    assert said in caught.value.what


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("cleanupp.rounds=1", "did you mean 'cleanup'"),
        ("quantize_weight.bits=4", "did you mean 'quantize_weights'"),
        ("prune_weights.sparsity=0.5", "choose --recipe sparse, or add the pass in a .toml file that starts with"),
        ("remove_blocks.count=1", 'add the pass in a .toml file that starts with extends = "safe"'),
    ],
)
def test_a_setting_of_a_pass_that_the_recipe_lacks(setting: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("safe").with_settings([setting])
    assert "'safe' has no pass" in caught.value.what
    assert caught.value.todo.startswith(hint)


def test_a_recipe_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such recipe file") as caught:
        Recipe.load(tmp_path / "missing.toml")
    assert "check the path" in caught.value.todo


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("passes = [", "not valid TOML"),
        ('[[passes]]\nname = "no_such_pass"\n', "unknown pass 'no_such_pass'"),
        ("pases = []\n", "pases"),
        ('gates = "sloppy"\n', "gates"),
        ('extends = "no_such_preset"\n', "unknown recipe 'no_such_preset'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load(write(tmp_path, text))
    assert said in caught.value.what


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("int44")
    assert "did you mean 'int4'" in caught.value.todo


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("nowhere/mine.toml")
    assert caught.value.where == "nowhere/mine.toml"
