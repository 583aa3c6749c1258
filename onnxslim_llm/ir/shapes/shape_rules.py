"""How operators of the standard domain pass on shapes, for `symbolic.SymbolicValues`.

A rule returns one shape an output; None is an unknown rank, None inside a shape an unknown size. Operators without a
rule keep what onnx's own inference annotated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxslim_llm.ir.shapes.dims import Dim, is_nonnegative, product
from onnxslim_llm.ir.shapes.node_view import NodeView
from onnxslim_llm.ir.shapes.sizes import broadcast, meet, quotient, slice_size

__all__ = ["SHAPE_RULES", "Shape"]

Shape = tuple[Dim | None, ...] | None


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _same(v: NodeView) -> list[Shape]:
    return [v.shape()]


def _elementwise(v: NodeView) -> list[Shape]:
    return [broadcast(*(v.shape(i) for i in range(len(v.node.inputs))))]


def _matmul(v: NodeView) -> list[Shape]:
    a, b = v.shape(0), v.shape(1)
    if not a or not b:
        return [None]
    batch = broadcast(a[:-2], b[:-2]) or ()
    rows = (a[-2],) if len(a) > 1 else ()
    columns = (b[-1],) if len(b) > 1 else ()
    return [(*batch, *rows, *columns)]


def _gemm(v: NodeView) -> list[Shape]:
    a, b = v.shape(0), v.shape(1)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return [None]
    return [(a[1] if v.attr("transA", 0) else a[0], b[0] if v.attr("transB", 0) else b[1])]


def _transpose(v: NodeView) -> list[Shape]:
    shape = v.shape()
    if shape is None:
        return [None]
    order = v.attr("perm") or list(reversed(range(len(shape))))
    return [tuple(shape[axis] for axis in order)]


def _unsqueeze(v: NodeView) -> list[Shape]:
    shape, axes = v.shape(), v.ints("axes", 1)
    if shape is None or axes is None:
        return [None]
    rank = len(shape) + len(axes)
    new = {_axis(a, rank) for a in axes}
    rest = iter(shape)
    return [tuple(1 if i in new else next(rest) for i in range(rank))]


def _squeeze(v: NodeView) -> list[Shape]:
    shape, axes = v.shape(), v.ints("axes", 1)
    if shape is None or (axes is None and v.has(1)):
        return [None]
    if axes is None:
        return [tuple(d for d in shape if d != 1)] if all(isinstance(d, int) for d in shape) else [None]
    gone = {_axis(a, len(shape)) for a in axes}
    return [tuple(d for i, d in enumerate(shape) if i not in gone)]


def _reshape(v: NodeView) -> list[Shape]:
    shape, target = v.shape(), v.value(1)
    if "shape" in v.node.attrs:
        target = np.array(v.attr("shape"), object)
    if target is None or target.ndim != 1:
        rank = v.shape(1)
        return [(None,) * rank[0] if rank and isinstance(rank[0], int) else None]
    dims: list[Dim | None] = []
    for i, size in enumerate(target):
        if size == 0 and not v.attr("allowzero", 0):
            dims.append(shape[i] if shape is not None and i < len(shape) else None)
        else:
            dims.append(None if size is None or size == -1 else size)
    rest = [d for i, d in enumerate(dims) if not (isinstance(target[i], int) and target[i] == -1)]
    if shape is not None and len(rest) == len(dims) - 1 and None not in rest:
        dims = [quotient(shape, [r for r in rest if r is not None]) if d is None else d for d in dims]
    return [tuple(dims)]


def _concat(v: NodeView) -> list[Shape]:
    shapes = [v.shape(i) for i in range(len(v.node.inputs))]
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes) or not known:
        return [None]
    axis = _axis(v.attr("axis", 1), len(known[0]))
    total: Dim = 0
    for shape in known:
        total = total + shape[axis]
    # The other axes must agree at run time: a number says more than a name.
    others = [next((d for d in sizes if isinstance(d, int)), sizes[0]) for sizes in zip(*known, strict=True)]
    return [tuple(total if i == axis else d for i, d in enumerate(others))]


def _slice(v: NodeView) -> list[Shape]:
    shape = v.shape()
    if shape is None:
        return [None]
    dims: list[Dim | None] = list(shape)
    starts: list[Any]
    ends: list[Any]
    steps: Sequence[int | None]
    if "starts" in v.node.attrs:
        starts, ends = list(v.attr("starts")), list(v.attr("ends"))
        axes, steps = list(v.attr("axes", range(len(starts)))), [1] * len(starts)
    else:
        first, last = v.value(1), v.value(2)
        given_axes, given_steps = v.ints("axes", 3), v.ints("steps", 4)
        if (given_axes is None and v.has(3)) or (first is None and given_axes is None):
            return [(None,) * len(shape)]
        count = first.size if first is not None else len(given_axes or ())
        starts = list(first.reshape(-1)) if first is not None else [None] * count
        ends = list(last.reshape(-1)) if last is not None else [None] * count
        axes = given_axes if given_axes is not None else list(range(count))
        steps = [None if v.has(4) else 1] * count if given_steps is None else given_steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = _axis(axis, len(shape))
        dims[place] = slice_size(shape[place], start, end, step)
    return [tuple(dims)]


def _gather(v: NodeView) -> list[Shape]:
    data, indices = v.shape(0), v.shape(1)
    if data is None or indices is None:
        return [None]
    axis = _axis(v.attr("axis", 0), len(data))
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _split(v: NodeView) -> list[Shape]:
    shape, count = v.shape(), len(v.node.outputs)
    if shape is None:
        return [None] * count
    axis = _axis(v.attr("axis", 0), len(shape))
    sizes: list[Dim | None] = [None] * count
    given = v.ints("split", 1)
    if given is not None and len(given) == count:
        sizes = list(given)
    elif given is None and not v.has(1) and isinstance(shape[axis], int):
        size = shape[axis]
        assert isinstance(size, int)  # for the type checker
        part = -(-size // count)
        sizes = [min(part, max(0, size - i * part)) for i in range(count)]
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def _expand(v: NodeView) -> list[Shape]:
    shape, target = v.shape(), v.value(1)
    if shape is None or target is None or target.ndim != 1:
        return [None]
    rank = max(len(shape), target.size)
    dims: list[Dim | None] = []
    for axis in range(-rank, 0):
        dim: Dim = shape[axis] if -axis <= len(shape) else 1
        want = target[axis] if -axis <= target.size else 1
        if want is None:
            dims.append(dim if isinstance(dim, int) and dim != 1 else None)
        else:
            dims.append(meet(dim, want))
    return [tuple(dims)]


def _reduce(v: NodeView) -> list[Shape]:
    shape, axes = v.shape(), v.ints("axes", 1)
    if shape is None or (axes is None and v.has(1)):
        return [None]
    keep = bool(v.attr("keepdims", 1))
    if not axes:
        if v.attr("noop_with_empty_axes", 0):
            return [shape]
        return [(1,) * len(shape) if keep else ()]
    gone = {_axis(a, len(shape)) for a in axes}
    return [tuple(1 if i in gone else d for i, d in enumerate(shape) if keep or i not in gone)]


def _arg_reduce(v: NodeView) -> list[Shape]:
    shape = v.shape()
    if shape is None:
        return [None]
    axis = _axis(v.attr("axis", 0), len(shape))
    middle = (1,) if v.attr("keepdims", 1) else ()
    return [(*shape[:axis], *middle, *shape[axis + 1 :])]


def _shape_shape(v: NodeView) -> list[Shape]:
    shape = v.shape()
    if shape is None:
        return [(None,)]
    start, end, _ = slice(v.attr("start", 0), v.attr("end")).indices(len(shape))
    return [(max(0, end - start),)]


def _constant_of_shape(v: NodeView) -> list[Shape]:
    target = v.value()
    return [tuple(target) if target is not None and target.ndim == 1 else None]


def _range(v: NodeView) -> list[Shape]:
    first, limit, step = (None if (x := v.value(i)) is None or x.size != 1 else x.reshape(-1)[0] for i in range(3))
    if first is None or limit is None or not isinstance(step, int) or step == 0:
        return [(None,)]
    if isinstance(first, int) and isinstance(limit, int):
        return [(len(range(first, limit, step)),)]
    return [(limit - first if step == 1 and is_nonnegative(limit - first) else None,)]


def _einsum(v: NodeView) -> list[Shape]:
    operands, arrow, result = v.attr("equation", "").replace(" ", "").partition("->")
    terms, shapes = operands.split(","), [v.shape(i) for i in range(len(v.node.inputs))]
    if not arrow or "." in operands or len(terms) != len(shapes):
        return [None]
    sizes: dict[str, Dim] = {}
    for letters, shape in zip(terms, shapes, strict=True):
        sizes.update(zip(letters, shape or (), strict=False))
    return [tuple(sizes.get(letter) for letter in result)]


def _flatten(v: NodeView) -> list[Shape]:
    shape = v.shape()
    if shape is None:
        return [(None, None)]
    axis = v.attr("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return [(product(shape[:axis]), product(shape[axis:]))]


def _tile(v: NodeView) -> list[Shape]:
    shape, repeats = v.shape(), v.value(1)
    if shape is None or repeats is None or repeats.size != len(shape):
        return [None if shape is None else (None,) * len(shape)]
    return [tuple(None if r is None else d * r for d, r in zip(shape, repeats.reshape(-1), strict=True))]


def _like_second(v: NodeView) -> list[Shape]:
    return [v.shape(1)]


def _table(rule: Callable[[NodeView], list[Shape]], ops: str) -> dict[str, Callable[[NodeView], list[Shape]]]:
    return dict.fromkeys(ops.split(), rule)


SHAPE_RULES: dict[str, Callable[[NodeView], list[Shape]]] = {
    **_table(
        _same,
        "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh CumSum Dropout "
        "DequantizeLinear Elu Erf Exp Floor Gelu HardSigmoid HardSwish Hardmax Identity IsInf IsNaN LeakyRelu Log "
        "LayerNormalization LogSoftmax LpNormalization Mish Neg Not QuantizeLinear RMSNormalization Reciprocal Relu "
        "RotaryEmbedding Round ScatterElements ScatterND Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt "
        "Swish Tan Tanh ThresholdedRelu Trilu",
    ),
    **_table(
        _elementwise,
        "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean "
        "Min Mod Mul Or PRelu Pow Sub Sum Where Xor",
    ),
    **_table(_reduce, "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd"),
    **_table(_reduce, "ReduceSum ReduceSumSquare"),
    **_table(_arg_reduce, "ArgMax ArgMin"),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _like_second,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape_shape,
    "Size": lambda v: [()],
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
