"""Random graphs full of what exporters leave behind: no-ops, duplicates, constants of all sorts, shape arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
NODES = 40


class _Graph:
    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensors = [("x", ("N", 4, 6)), ("z", ("N", 4, 6))]

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, f"n{len(self.nodes)}", **attributes))
        return names[0]

    def number(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.array(value, dtype)
        if self.random.random() < 0.5:
            return self.add("Constant", value=numpy_helper.from_array(array))
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def pick(self) -> tuple[str, tuple[Any, ...]]:
        return self.tensors[self.random.integers(len(self.tensors))]

    def grow(self) -> None:
        steps = [name for name in dir(self) if name.startswith("_do_")]
        while len(self.nodes) < NODES:
            name, shape = self.pick()
            found = getattr(self, steps[self.random.integers(len(steps))])(name, shape)
            if found is not None:
                self.tensors.append(found)

    def _do_unary(self, x: str, shape: tuple[Any, ...]) -> Any:
        op = self.random.choice(["Tanh", "Sigmoid", "Neg", "Relu", "Abs", "Identity", "Sin"])
        return self.add(str(op), x), shape

    def _do_binary(self, x: str, shape: tuple[Any, ...]) -> Any:
        others = [name for name, theirs in self.tensors if theirs == shape]
        other = others[self.random.integers(len(others))]
        return self.add(str(self.random.choice(["Add", "Sub", "Max"])), x, other), shape

    def _do_unit(self, x: str, shape: tuple[Any, ...]) -> Any:
        op, value = [("Add", 0), ("Sub", 0), ("Mul", 1), ("Div", 1), ("Pow", 1)][self.random.integers(5)]
        sizes = [(), (1,), (1, 1)][self.random.integers(3)]
        return self.add(op, x, self.number(np.full(sizes, value), np.float32)), shape

    def _do_scale(self, x: str, shape: tuple[Any, ...]) -> Any:
        two = self.add("Mul", self.number(4.0, np.float32), self.number(0.5, np.float32))
        return self.add("Tanh", self.add("Mul", x, two)), shape

    def _do_transpose(self, x: str, shape: tuple[Any, ...]) -> Any:
        order = [int(a) for a in self.random.permutation(len(shape))]
        return self.add("Transpose", x, perm=order), tuple(shape[a] for a in order)

    def _do_cast(self, x: str, shape: tuple[Any, ...]) -> Any:
        wide = self.add("Cast", x, to=TensorProto.DOUBLE)
        return self.add("Cast", wide, to=TensorProto.FLOAT), shape

    def _do_unsqueeze(self, x: str, shape: tuple[Any, ...]) -> Any:
        axis = int(self.random.integers(len(shape) + 1))
        tall = self.add("Unsqueeze", x, self.number([axis]))
        if self.random.random() < 0.5:
            return self.add("Squeeze", tall, self.number([axis - len(shape) - 1])), shape
        return (tall, (*shape[:axis], 1, *shape[axis:])) if len(shape) < 5 else None

    def _do_reshape(self, x: str, shape: tuple[Any, ...]) -> Any:
        sizes = self.add("Shape", x)
        parts = [self.add("Gather", sizes, self.number([axis]), axis=0) for axis in range(len(shape))]
        target = self.add("Concat", *parts, axis=0)
        if self.random.random() < 0.5:
            return self.add("Reshape", x, target), shape
        return self.add("Expand", x, target), shape

    def _do_flatten(self, x: str, shape: tuple[Any, ...]) -> Any:
        flat = self.add("Reshape", x, self.number([-1]))
        back = [size if isinstance(size, int) else -1 for size in shape]
        return self.add("Reshape", flat, self.number(back)), shape

    def _do_concat(self, x: str, shape: tuple[Any, ...]) -> Any:
        axis = next((i for i, size in enumerate(shape) if size == 6), None)
        if axis is None:
            return None
        twice = self.add("Concat", x, x, axis=axis)
        where = (self.number([0]), self.number([6]), self.number([axis]))
        return self.add("Slice", twice, *where), shape

    def _do_everything(self, x: str, shape: tuple[Any, ...]) -> Any:
        return self.add("Slice", x, self.number([0]), self.number([2**63 - 1]), self.number([0])), shape

    def _do_where(self, x: str, shape: tuple[Any, ...]) -> Any:
        sizes = self.add("Shape", x)
        some = self.add("Equal", self.add("Gather", sizes, self.number(0), axis=0), self.number(-1))
        return self.add("Where", some, self.add("Neg", x), x), shape

    def _do_branch(self, x: str, shape: tuple[Any, ...]) -> Any:
        kind = helper.make_tensor_value_info
        name = f"b{len(self.nodes)}"
        unused = helper.make_node("Exp", [x], [f"{name}_unused"])
        yes = [
            unused,
            helper.make_node("Identity", [x], [f"{name}_i"]),
            helper.make_node("Sin", [f"{name}_i"], [f"{name}_p"]),
        ]
        no = [helper.make_node("Sin", [x], [f"{name}_q"])]
        branches = {
            "then_branch": helper.make_graph(yes, "yes", [], [kind(f"{name}_p", TensorProto.FLOAT, shape)]),
            "else_branch": helper.make_graph(no, "no", [], [kind(f"{name}_q", TensorProto.FLOAT, shape)]),
        }
        return self.add("If", "flag", **branches), shape


def random_graph(seed: int) -> onnx.ModelProto:
    """A valid model with inputs x, z float[N, 4, 6] and flag bool, and three outputs; the same for the same seed."""
    graph = _Graph(seed)
    graph.grow()
    kind = helper.make_tensor_value_info
    inputs = [kind(name, TensorProto.FLOAT, ["N", 4, 6]) for name in "xz"] + [kind("flag", TensorProto.BOOL, [])]
    last = dict(graph.tensors[-3:])
    outputs = [kind(name, TensorProto.FLOAT, [None] * len(shape)) for name, shape in last.items()]
    proto = helper.make_graph(graph.nodes, "random", inputs, outputs, graph.initializers)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model
