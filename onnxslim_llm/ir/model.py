"""The model: a graphsurgeon graph, its functions, and what the file said beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, defs

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.copying import copy_graph
from onnxslim_llm.ir.names import NameSource
from onnxslim_llm.ir.proto.check import check_graphs, check_text
from onnxslim_llm.ir.proto.external import ExternalFiles, resolve_model_path
from onnxslim_llm.ir.proto.imports import (
    canonical,
    check_opsets,
    copy_imports,
    has_implied_opset,
    missing_imports,
    used_domains,
    write_imports,
)
from onnxslim_llm.ir.proto.openfile import parse_file
from onnxslim_llm.ir.proto.reader import adopt, mark_overridable, read_function, read_graph
from onnxslim_llm.ir.proto.skeleton import copy_without
from onnxslim_llm.ir.proto.tensors import TensorReader
from onnxslim_llm.ir.proto.value_lists import listing_of
from onnxslim_llm.ir.proto.versions import FIRST_IR_WITH_CONSTANTS, FIRST_IR_WITH_OPSETS, ir_version_to_write
from onnxslim_llm.ir.proto.writer import Store, Writer, inline_store
from onnxslim_llm.ir.walk import all_constants, operator_name, with_subgraphs
from onnxslim_llm.ir.weights import DerivedWeight, weight_of
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["INLINE_LIMIT", "STUB_BYTES", "Model", "from_proto", "open_model", "resolve_model_path"]

INLINE_LIMIT = (2 << 30) - (1 << 20)
"""Most bytes of weights that a ModelProto may hold: protobuf ends at 2 GiB; 1 MiB is left for the graph."""

STUB_BYTES = 1 << 10
"""Initializers of more bytes than this are left out of protos without weights; smaller ones say shapes and axes."""

_MODEL_LISTS = frozenset(["graph", "functions", "opset_import"])


class Model:
    """A model in memory. Edit `graph` with graphsurgeon as usual; weights stay where they are until they are needed.

    Attributes:
        graph: The top graph; `graph.functions` are the model-local functions.
        path: The file it was opened from.
        notes: What was repaired or found unusual while reading, one sentence each.
        skeleton: The ModelProto without graph, functions and opset imports; None if the model was not read from one.
    """

    def __init__(self, graph: gs.Graph, path: Path | None = None, skeleton: onnx.ModelProto | None = None) -> None:
        self.graph = graph
        self.path = path
        self.notes: list[str] = []
        self.skeleton = skeleton
        self._names: NameSource | None = None

    @property
    def functions(self) -> list[gs.Function]:
        """The model-local functions."""
        functions: list[gs.Function] = self.graph.functions
        return functions

    def graphs(self) -> Iterator[gs.Graph]:
        """Yield the top graph and every subgraph in the bodies of If, Loop, Scan, ..., but no function bodies."""
        yield from with_subgraphs(self.graph)

    def all_graphs(self) -> Iterator[gs.Graph]:
        """Yield the top graph, the functions, and all subgraphs of both."""
        yield from self.graphs()
        for function in self.functions:
            yield from with_subgraphs(function)

    def opset(self, domain: str = "") -> int | None:
        """Return the version of an imported operator set; None if the domain is not imported."""
        for item in self.graph.import_domains or []:
            if canonical(item.domain) == canonical(domain):
                return int(item.version) if canonical(domain) else int(self.graph.opset)
        return int(self.graph.opset) if not canonical(domain) and has_implied_opset(self.graph) else None

    def set_opset(self, domain: str, version: int) -> None:
        """Import a domain, or change the version of its import. Bookkeeping only: nodes are not converted."""
        imports = [] if self.graph.import_domains is None else self.graph.import_domains
        if has_implied_opset(self.graph):
            self.graph.ir_version = FIRST_IR_WITH_OPSETS
        for item in imports:
            if canonical(item.domain) == canonical(domain):
                item.version = version
                break
        else:
            imports.append(onnx.OperatorSetIdProto(domain=domain, version=version))
        for graph in self.graphs():
            graph.import_domains = imports
            if not canonical(domain):
                graph.opset = version

    def census(self, functions: bool = False) -> Counter[str]:
        """Count the nodes of the top graph and its subgraphs by "domain::Op" (plain "Op" for ai.onnx).

        Args:
            functions: Count the bodies of the model-local functions as well, each once.
        """
        graphs = self.all_graphs() if functions else self.graphs()
        return Counter(operator_name(node) for graph in graphs for node in graph.nodes)

    def unknown_ops(self) -> list[str]:
        """Return the operators that the installed onnx has no definition of and the model no function for, sorted."""
        local = {(function.domain or "", function.name) for function in self.functions}
        unknown = set()
        for graph in self.all_graphs():
            for node in graph.nodes:
                domain = canonical(node.domain)
                if (domain, node.op) not in local and not defs.has(node.op, domain):
                    unknown.add(operator_name(node))
        return sorted(unknown)

    def constants(self) -> Iterator[gs.Constant]:
        """Yield every constant of the model once: initializers, and constants in attributes of nodes."""
        yield from all_constants(self.graph)
        for function in self.functions:
            yield from all_constants(function)

    def weight_bytes(self) -> int:
        """Return the bytes of all constants, as ONNX `raw_data`; shared content counts once."""
        sizes: dict[Hashable, int] = {}
        for tensor in self.constants():
            weight = weight_of(tensor)
            sizes[weight.storage_key] = weight.nbytes
        return sum(sizes.values())

    def fresh_name(self, hint: str) -> str:
        """Return a name that no tensor and no node of the model has; the same one in every run.

        Names that code made without this function since the last `refresh_names` are not seen.
        """
        if self._names is None:
            self._names = NameSource(self.all_graphs())
        return self._names.fresh(hint)

    def refresh_names(self) -> None:
        """Look at all names again before the next `fresh_name`; the pipeline calls this between passes."""
        self._names = None

    def copy(self) -> Model:
        """Return a copy whose structure is independent; weights and skeletons are shared."""
        twin = Model(copy_graph(self.graph), self.path, self.skeleton)
        twin.notes = list(self.notes)
        return twin

    def check(self) -> None:
        """Check that every tensor has one producer, and that no node depends on itself.

        Raises:
            ModelError: It names the tensor or node.
        """
        self.notes += [note for note in check_graphs(self.graph, self.functions) if note not in self.notes]

    def to_proto(self, weights: Literal["inline", "omit"] = "inline") -> onnx.ModelProto:
        """Return the model as a proto.

        Args:
            weights: "inline": with all content. "omit": initializers of more than STUB_BYTES point to a location that
                does not exist, see `to_stub`.

        Raises:
            ModelError: More than 2 GiB inline.
        """
        if weights == "omit":
            return self.to_stub()[0]
        total = sum(weight_of(tensor).nbytes for tensor in self.constants())
        if total > INLINE_LIMIT:
            raise ModelError(
                f"{total} bytes of weights do not fit into one ModelProto (2 GiB)",
                where=str(self.path or ""),
                todo="save with external data, or use to_proto('omit')",
            )
        return self.write(inline_store)

    def to_stub(self) -> tuple[onnx.ModelProto, dict[str, Weight]]:
        """Return the proto without large weights, and the weights by the made-up location that stands for each.

        `from_proto(stub, weights=weights)` puts them back: so tools that work on protos never see the weights.
        """
        weights: dict[str, Weight] = {}
        locations: dict[Hashable, str] = {}

        def store(out: TensorProto, weight: Weight) -> None:
            small = weight.nbytes <= STUB_BYTES and not isinstance(weight, DerivedWeight)  # whose work is done at save
            if small or weight.onnx_dtype == TensorProto.STRING:
                inline_store(out, weight)
                return
            location = locations.setdefault(weight.key, f"omitted/{len(locations)}")
            weights[location] = weight
            out.data_location = TensorProto.EXTERNAL
            out.external_data.add(key="location", value=location)

        return self.write(store), weights

    def write(self, store: Store) -> onnx.ModelProto:
        """Return the model as a proto whose initializers are filled by `store`."""
        proto = onnx.ModelProto()
        if self.skeleton is not None:
            proto.CopyFrom(self.skeleton)
        graph = self.graph
        for field, value in (
            ("producer_name", graph.producer_name),
            ("producer_version", graph.producer_version),
            ("ir_version", graph.ir_version),
        ):
            if value is not None and getattr(proto, field) != value:
                setattr(proto, field, value)
        write_imports(proto.opset_import, graph)
        version = int(proto.ir_version)
        if version or self.skeleton is None:  # a model that was read without one stays so
            types = {weight_of(tensor).onnx_dtype for tensor in self.constants()}
            version = ir_version_to_write(version, types, bool(self.functions), proto.opset_import)
            proto.ir_version = version
        writer = Writer(store)
        proto.graph.SetInParent()
        writer.graph(proto.graph, graph, listing="as read" if not version else listing_of(version))
        for function in self.functions:
            writer.function(proto.functions.add(), function)
        return proto


def from_proto(
    proto: onnx.ModelProto, base_dir: Path | None = None, weights: Mapping[str, Weight] | None = None
) -> Model:
    """Make a model of a proto.

    Args:
        proto: Kept, not copied: it must not change any more.
        base_dir: Folder that external data is relative to.
        weights: Weights of a stub, see `Model.to_stub`.

    Raises:
        ModelError: The model is invalid; the message names the tensor or node.
    """
    files = ExternalFiles(None if base_dir is None else Path(base_dir))
    return _build(proto, TensorReader(files, None, weights), None)


def open_model(path: str | Path) -> Model:
    """Open an ONNX file. Weights, external or not, stay on disk and are mapped when they are read.

    Raises:
        UsageError: No such file.
        ModelError: The file is no valid model; the message names what is wrong, and where.
        ResourceError: It cannot be read.
    """
    file = resolve_model_path(path)
    proto, inline = parse_file(file)
    return _build(proto, TensorReader(ExternalFiles(file.parent, file), inline), file)


def _build(proto: onnx.ModelProto, tensors: TensorReader, path: Path | None) -> Model:
    where = str(path or "the model")
    check_text(proto, where)
    if not proto.HasField("graph"):
        raise ModelError("the model has no graph", where=where, todo="is it an ONNX model? export it again")
    opset = check_opsets(proto.opset_import, where)
    graph = read_graph(proto.graph, tensors)
    if not opset and "" in used_domains(graph):
        if proto.ir_version >= FIRST_IR_WITH_OPSETS:
            raise ModelError(
                "the model does not say its opset: ai.onnx is used but not imported",
                where=where,
                todo="export it again",
            )
        opset = 1
    functions = [read_function(item, tensors) for item in proto.functions]
    imports = copy_imports(proto.opset_import)
    model = Model(graph, path, copy_without(proto, _MODEL_LISTS))
    graph.producer_name = proto.producer_name
    graph.producer_version = proto.producer_version
    graph.ir_version = proto.ir_version
    adopt(graph, functions, imports, opset)
    for function in functions:
        own = check_opsets(function.import_domains, f"function '{function.domain}::{function.name}'")
        adopt(function, graph.functions, function.import_domains, own or opset)
    for scope in (graph, *functions):
        for item in missing_imports(scope):
            scope.import_domains.append(item)
            model.notes.append(f"domain '{item.domain}' was used but not imported; version {item.version} is assumed")
    if proto.ir_version >= FIRST_IR_WITH_CONSTANTS:
        mark_overridable(graph)
    model.check()
    return model
