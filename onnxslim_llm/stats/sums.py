"""Where the output of a product is added to another tensor."""

from __future__ import annotations

from collections import defaultdict

import onnx

from onnxslim_llm.stats.taps import product_outputs

__all__ = ["added_to"]


def added_to(graph: onnx.GraphProto) -> dict[str, str]:
    """Return, by a weight's name, the tensor that its product's output is added to, constants (biases) aside.

    Products whose output something else reads as well are left out.

    Args:
        graph: The top graph; what subgraphs do is not seen.
    """
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    made = set()
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
        if node.op_type != "Constant":
            made.update(node.output)
    results = {output.name for output in graph.output}
    found = {}
    for weight, output in product_outputs(graph).items():
        other = _other(output, readers, made, results)
        if other is not None:
            found[weight] = other
    return found


def _other(tensor: str, readers: dict[str, list[onnx.NodeProto]], made: set[str], results: set[str]) -> str | None:
    while len(readers[tensor]) == 1 and tensor not in results and readers[tensor][0].op_type == "Add":
        add = readers[tensor][0]
        other: str = add.input[1] if add.input[0] == tensor else add.input[0]
        if other == tensor:
            return None
        if other in made:
            return other
        tensor = add.output[0]
    return None
