"""Operator set imports of models and functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_graphsurgeon as gs
from onnx import OperatorSetIdProto, defs

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.proto.versions import FIRST_IR_WITH_OPSETS

__all__ = [
    "canonical",
    "check_opsets",
    "copy_imports",
    "has_implied_opset",
    "missing_imports",
    "used_domains",
    "write_imports",
]


def has_implied_opset(graph: gs.Graph) -> bool:
    """Whether a graph is of opset 1 because its model is too old to say so."""
    version = graph.ir_version
    return version is not None and 0 < version < FIRST_IR_WITH_OPSETS and not graph.import_domains


def canonical(domain: str | None) -> str:
    """Return the domain with the two spellings of the standard one, "" and "ai.onnx", made the same."""
    return "" if domain in (None, "ai.onnx") else str(domain)


def copy_imports(imports: Iterable[OperatorSetIdProto]) -> list[OperatorSetIdProto]:
    """Return copies that may be changed."""
    return [OperatorSetIdProto.FromString(item.SerializeToString()) for item in imports]


def check_opsets(imports: Iterable[OperatorSetIdProto], where: str) -> int:
    """Return the version of ai.onnx that is imported; 0 if it is not.

    Raises:
        ModelError: A version is below 1, or newer than the installed onnx package knows.
    """
    newest = defs.onnx_opset_version()
    standard = 0
    for item in imports:
        name = item.domain or "ai.onnx"
        if item.version < 1:
            what = f"opset {item.version} of {name} does not exist"
            raise ModelError(what, where=where, todo="the model is invalid: export it again")
        if name == "ai.onnx":
            standard = item.version
            if standard > newest:
                raise ModelError(
                    f"opset {standard} of ai.onnx is unknown: the installed onnx package knows up to {newest}",
                    where=where,
                    todo="install a newer onnx package, or export for an older opset",
                )
    return standard


def used_domains(graph: gs.Graph) -> dict[str, None]:
    """Return the operator domains of a graph and its subgraphs, in the order of their first use; "ai.onnx" is ""."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        found.setdefault(canonical(node.domain))
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                found.update(used_domains(value))
    return found


def missing_imports(graph: gs.Graph) -> list[OperatorSetIdProto]:
    """Return opset imports for the domains that a graph or function uses and does not import.

    Standard domains get the version that the installed onnx knows, all others version 1.
    """
    declared = {canonical(item.domain) for item in graph.import_domains or []}
    if has_implied_opset(graph):
        declared.add("")
    missing = [domain for domain in used_domains(graph) if domain not in declared]
    known = {} if not missing else _standard_versions()
    return [
        OperatorSetIdProto(domain=domain, version=known.get(domain, 1) if domain else graph.opset) for domain in missing
    ]


def write_imports(out: Any, graph: gs.Graph) -> None:
    """Fill an `opset_import` field; domains that are used but not imported are added."""
    for item in [*(graph.import_domains or []), *missing_imports(graph)]:
        written = out.add()
        written.CopyFrom(item)
        if not canonical(item.domain) and item.version != graph.opset:
            written.version = graph.opset


def _standard_versions() -> dict[str, int]:
    versions: dict[str, int] = {}
    for schema in defs.get_all_schemas():
        versions[schema.domain] = max(versions.get(schema.domain, 1), schema.since_version)
    return versions
