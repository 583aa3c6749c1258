"""Every model of the zoo, from every exporter: computes the same after compile, and everything in it is fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from zoo.access import exported, model_path
from zoo.equality import compare
from zoo.families import FAMILIES, family

# Runs in every test run; the rest, with the exports that take long, behind the marker.
_REPRESENTATIVE = frozenset(
    {
        ("llama", "optimum"),
        ("llama", "script"),
        ("qwen3", "optimum"),
        ("gpt2", "optimum"),
        ("gemma2", "optimum"),
        ("bert", "optimum"),
    }
)

Compiled = Callable[[Path], Path]


def _exports(*, refused: bool) -> Iterator[Any]:
    for entry in FAMILIES:
        for exporter in entry.exporters:
            if (exporter in entry.refused) == refused:
                marks = () if (entry.name, exporter) in _REPRESENTATIVE else (pytest.mark.zoo,)
                for part in ("",) if refused else entry.parts(exporter):
                    values = (entry.name, exporter) if refused else (entry.name, exporter, part)
                    yield pytest.param(*values, marks=marks, id="-".join(v for v in values if v != "model"))


@pytest.mark.parametrize(("name", "exporter", "part"), [*_exports(refused=False)])
def test_the_compiled_model_computes_the_same(name: str, exporter: str, part: str, compiled: Compiled) -> None:
    source = model_path(name, exporter, part)
    compare(source, compiled(source)).check()


@pytest.mark.parametrize(("name", "exporter"), [*_exports(refused=True)])
def test_the_exporter_still_refuses(name: str, exporter: str) -> None:
    assert family(name).refused[exporter] in exported(name, exporter).failure
