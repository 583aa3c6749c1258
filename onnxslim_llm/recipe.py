"""Recipes: an ordered list of passes as data, with named presets in recipes/*.toml."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.registry import all_passes, make_pass
from onnxslim_llm.rewrite.syntax import format_step, format_value, parse_value

__all__ = ["Recipe", "Step", "preset_names"]

_PRESETS = files("onnxslim_llm").joinpath("recipes")
#: Groups of passes that change the graph and leave the weights as they are.
_STRUCTURE = ("cleanup", "fuse")


class Step(BaseModel):
    """One pass of a recipe: its name, and its options as further keys."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The pass's options."""
        return dict(self.model_extra or {})

    def __str__(self) -> str:
        return format_step(self.name, self.options)


class Recipe(BaseModel):
    """What a compile does before the target's own lowering.

    Attributes:
        name: Name of the preset, or the file's stem.
        description: What it does, in one line.
        when: When to use it, in one line.
        gates: Which set of verification gates the artifact has to pass; "none" asks for finite results only.
        passes: The steps, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    when: str = ""
    gates: Literal["lossless", "int8", "w8a8", "int4", "int3", "int2", "none"] = "lossless"
    passes: tuple[Step, ...] = Field(default=())

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Return a preset by name, or the recipe in a .toml file.

        A file may start from another recipe with `extends = "preset"` or a file's path, relative to its own: that one's
        passes come first.

        Raises:
            UsageError: Unknown preset, unreadable file, or content that is no recipe.
        """
        source = str(name_or_path)
        return cls._load(os.path.normpath(source) if source.endswith(".toml") else source, ())

    @classmethod
    def _load(cls, source: str, extended_by: tuple[str, ...]) -> Self:
        text, name = _read(source)
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"recipe '{name}' is not valid TOML: {error}", where=source) from error
        base = data.pop("extends", None)
        data.setdefault("name", name)
        if base is not None:
            base, chain = str(base), (*extended_by, source)
            if base.endswith(".toml"):
                base = os.path.normpath(Path(source).parent / base)
            if base in chain:
                raise UsageError("recipes extend each other in a circle", where=" -> ".join([*chain, base]))
            parent, own = cls._load(base, chain), data.get("passes", [])
            data["passes"] = [*(s.model_dump() for s in parent.passes), *own] if isinstance(own, list) else own
            data.setdefault("gates", parent.gates)
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            raise UsageError(f"recipe '{name}': {place}: {first['msg']}", where=source) from error
        recipe.build()  # unknown passes and options are found now, not after minutes of work
        return recipe

    def build(self) -> list[Pass]:
        """Return the passes.

        Raises:
            UsageError: Unknown pass, option or value.
        """
        return [make_pass(step.name, step.options) for step in self.passes]

    def with_settings(self, settings: Iterable[str]) -> Self:
        """Return a copy with `PASS.OPTION=VALUE` settings applied to every step of that pass.

        Raises:
            UsageError: Malformed setting, or a pass that the recipe does not contain.
        """
        steps = [dict(step.model_dump()) for step in self.passes]
        for setting in settings:
            target, equals, value = setting.partition("=")
            name, dot, option = target.strip().partition(".")
            if not (equals and dot and option):
                raise UsageError(f"'{setting}' is not of the form PASS.OPTION=VALUE", where="--set")
            named = [s for s in steps if s["name"] == name]
            if not named:
                raise self._lacks(name)
            for step in named:
                step[option.strip()] = parse_value(value)
        changed = self.model_copy(update={"passes": tuple(Step.model_validate(s) for s in steps)})
        changed.build()
        return changed

    def _lacks(self, name: str) -> UsageError:
        """The error of a setting whose pass is mistyped, or is one of other recipes."""
        own = {step.name for step in self.passes}
        known = all_passes()
        if name in known:
            others = [preset for preset in preset_names() if name in {s.name for s in Recipe.load(preset).passes}]
            choose = f"choose --recipe {' or '.join(others)}, or " if others else ""
            todo = f'{choose}add the pass in a .toml file that starts with extends = "{self.name}"'
        else:
            todo = did_you_mean(name, own if get_close_matches(name, own) else {*own, *known})
        return UsageError(f"recipe '{self.name}' has no pass '{name}'", where="--set", todo=todo)

    def with_fusions(self, names: Iterable[str]) -> Self:
        """Return a copy with further passes behind those that clean up and fuse, before weights are changed.

        Raises:
            UsageError: Unknown pass.
        """
        built = self.build()
        at = next((i for i, step in enumerate(built) if step.group not in _STRUCTURE), len(built))
        added = tuple(Step.model_validate({"name": name}) for name in names)
        changed = self.model_copy(update={"passes": (*self.passes[:at], *added, *self.passes[at:])})
        changed.build()
        return changed

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every option spelled out: it reproduces the artifact."""
        passes = [{"name": p.name, **p.options()} for p in self.build()]
        return {**self.model_dump(exclude={"passes"}), "passes": passes}

    def to_toml(self) -> str:
        """Return the text of a recipe file that `load` reads back, with the options as they were given."""
        head = {"description": self.description, "when": self.when, "gates": self.gates}
        lines = [f"{key} = {format_value(value)}" for key, value in head.items() if value]
        for step in self.passes:
            lines += ["", "[[passes]]"]
            lines += [f"{key} = {format_value(value)}" for key, value in step.model_dump().items()]
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """Return a SHA-256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True, default=str).encode()).hexdigest()


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _PRESETS.iterdir() if p.name.endswith(".toml"))


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.suffix == ".toml":
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except FileNotFoundError as error:
            todo = "check the path; presets are named without .toml"
            raise UsageError("there is no such recipe file", where=name_or_path, todo=todo) from error
        except OSError as error:
            raise UsageError(f"the recipe cannot be read: {error.strerror}", where=name_or_path) from error
        except UnicodeDecodeError as error:
            raise UsageError(
                "the recipe is not UTF-8", where=name_or_path, todo="save it as a UTF-8 text file"
            ) from error
    if name_or_path not in preset_names():
        hint = did_you_mean(name_or_path, preset_names())
        raise UsageError(
            f"unknown recipe '{name_or_path}'",
            todo=f"{hint} (or give a .toml file; `passes` lists what it may contain)",
        )
    return _PRESETS.joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8"), name_or_path
