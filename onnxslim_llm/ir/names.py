"""New names that collide with no old one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.proto.skeleton import GraphSkeleton, skeleton_of

__all__ = ["NameSource"]


class NameSource:
    """Hands out names. Deterministic: the same graphs and the same hints give the same names.

    Args:
        graphs: All graphs whose tensor and node names are taken.
    """

    def __init__(self, graphs: Iterable[gs.Graph]) -> None:
        self._taken: set[str] = set()
        self._next: defaultdict[str, int] = defaultdict(lambda: 1)
        for graph in graphs:
            self._scan(graph)

    def fresh(self, hint: str) -> str:
        """Return `hint` if it is free, else `hint_1`, `hint_2`, ..."""
        hint = hint or "value"
        name = hint
        while name in self._taken:
            name = f"{hint}_{self._next[hint]}"
            self._next[hint] += 1
        self._taken.add(name)
        return name

    def _scan(self, graph: gs.Graph) -> None:
        taken = self._taken
        taken.update(tensor.name for tensor in (*graph.inputs, *graph.outputs))
        for node in graph.nodes:
            taken.add(node.name)
            taken.update(tensor.name for tensor in node.inputs)
            taken.update(tensor.name for tensor in node.outputs)
        skeleton = skeleton_of(graph, GraphSkeleton)
        if skeleton is not None:
            # Of the file's initializers those that were used and are not any more are gone.
            taken.update(constant.name for constant in skeleton.initializers if id(constant) in skeleton.orphans)
            taken.update(entry.name for entry, _ in skeleton.value_info)
