"""Every model of the zoo, from every exporter: computes the same after compile, and everything in it is fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from zoo.access import exported, model_path
from zoo.census import count_nodes, fused_sites
from zoo.equality import compare
from zoo.families import FAMILIES, LAYERS, Family, family

import onnxslim_llm as osl

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

_LLAMA_NODES = 40  # of the 621 that Optimum writes; peers leave 238 or more
_PER_LAYER = frozenset({"layer_types", "no_rope_layers"})

Compiled = Callable[..., Path]


def _exports(*, refused: bool, gaps: bool = False) -> Iterator[Any]:
    """Parameters for all exports, or all that are refused; `gaps` marks those that are known not to be fused."""
    for entry in FAMILIES:
        for exporter in entry.exporters:
            if (exporter in entry.refused) == refused:
                marks = [] if (entry.name, exporter) in _REPRESENTATIVE else [pytest.mark.zoo]
                if gaps and exporter in entry.gaps:
                    marks.append(pytest.mark.xfail(reason=entry.gaps[exporter], strict=True))
                for part in ("",) if refused else entry.parts(exporter):
                    values = (entry.name, exporter) if refused else (entry.name, exporter, part)
                    yield pytest.param(*values, marks=marks, id="-".join(v for v in values if v != "model"))


def _layered() -> list[Any]:
    """Families with a limit of nodes a layer."""
    names = [entry.name for entry in FAMILIES if entry.layer_nodes]
    return [pytest.param(name, marks=() if name == "llama" else (pytest.mark.zoo,)) for name in names]


@pytest.mark.parametrize(("name", "exporter", "part"), [*_exports(refused=False)])
def test_the_compiled_model_computes_the_same(name: str, exporter: str, part: str, compiled: Compiled) -> None:
    source = model_path(name, exporter, part)
    compare(source, compiled(source)).check()


@pytest.mark.parametrize(("name", "exporter", "part"), [*_exports(refused=False, gaps=True)])
def test_every_site_is_fused(name: str, exporter: str, part: str, compiled: Compiled) -> None:
    artifact = onnx.load(compiled(model_path(name, exporter, part)), load_external_data=False)
    assert fused_sites(artifact) == family(name).sites(part)


@pytest.mark.parametrize("name", _layered())
def test_a_layer_is_compact(name: str, compiled: Compiled) -> None:
    entry = family(name)
    deeper = replace(entry, config=_with_layers(entry.config, LAYERS + 1))
    small, large = (onnx.load(compiled(_optimum(it)), load_external_data=False) for it in (entry, deeper))
    assert count_nodes(large) - count_nodes(small) <= entry.layer_nodes


def test_a_llama_of_two_layers_is_small(compiled: Compiled) -> None:
    artifact = onnx.load(compiled(model_path("llama", "optimum")), load_external_data=False)
    assert count_nodes(artifact) <= _LLAMA_NODES


def _optimum(entry: Family) -> Path:
    made = exported(entry, "optimum")
    assert not made.failure
    return made.path()


def _with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`config` with more layers; lists with an entry a layer go on from the start."""
    per_layer = {key: [*value, *value][:layers] for key, value in config.items() if key in _PER_LAYER}
    return {**config, **per_layer, "num_hidden_layers": layers}


@pytest.mark.parametrize(("name", "exporter"), [*_exports(refused=True)])
def test_the_exporter_still_refuses(name: str, exporter: str) -> None:
    assert family(name).refused[exporter] in exported(family(name), exporter).failure


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_of_the_builder_is_verified(name: str, tmp_path: Path) -> None:
    """Its caches leave the head size open, and its attention refuses batches of chunks."""
    result = osl.compile(model_path(name, "genai"), tmp_path / "artifact", recipe="safe", target="ort-cpu")
    assert result.manifest.verify is not None
    assert result.manifest.verify.greedy_prefix_match == 1.0
