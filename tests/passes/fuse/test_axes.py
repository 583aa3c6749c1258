"""Following axes through what only moves elements, checked against what numpy makes of numbered elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from block_models import model_of, proto
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.shapes.dims import parse, symbol
from onnxslim_llm.passes.fuse.attention.arrange import arrange
from onnxslim_llm.passes.fuse.attention.axes import Atom, Trail, View, follow_back, leaves, regroup, size_of, view_of

Array = np.ndarray[Any, Any]
B, S = symbol("B"), symbol("S")


def trail_of(text: str, scalars: bool = False, **initializers: Array) -> Trail:
    model = model_of(proto(text, **initializers))
    found = follow_back(model.graph.outputs[0], infer_shapes(model), scalars)
    assert found is not None
    return found


def sizes(view: View) -> list[list[Any]]:
    return [[atom.size for atom in leaves(axis)] for axis in view]


def elements(view: View, order: list[Atom]) -> Array:
    """Which element of the source stands where; views of numbers only."""
    strides = {}
    step = 1
    for atom in reversed(order):
        strides[id(atom)] = step
        step *= atom.size
    result = np.zeros((), np.int64)
    for axis in view:
        index = np.zeros(1, np.int64)
        for atom in leaves(axis):
            index = (index[:, None] + np.arange(atom.size) * strides.get(id(atom), 0)).reshape(-1)
        result = result[..., None] + index
    return result


def test_regroup_splits_and_joins() -> None:
    (view,) = [regroup([Atom(6), Atom(4)], [2, 12])]
    assert view is not None
    assert sizes(view) == [[2], [3, 4]]
    assert regroup([Atom(6)], [4]) is None
    assert regroup([Atom(6)], [5, 2]) is None
    assert regroup([Atom(6)], [2]) is None


def test_regroup_with_symbols() -> None:
    view = regroup([Atom(B), Atom(S), Atom(32)], [B, S, 4, 8])
    assert view is not None
    assert sizes(view) == [[B], [S], [4], [8]]
    view = regroup([Atom(B * 4), Atom(S)], [B, 4, S])
    assert view is not None
    assert sizes(view) == [[B], [4], [S]]
    assert regroup([Atom(B), Atom(S)], [S, B]) is None
    assert regroup([Atom(B + S)], [B, S]) is None


#: The shape of y, and how it comes from x[2, 3, 8].
CHAINS = {
    "reshape and transpose": ("2, 2, 3, 4", "a = Reshape (x, four)\n y = Transpose <perm = [0, 2, 1, 3]> (a)"),
    "transpose by default": ("8, 3, 2", "y = Transpose (x)"),
    "expand a new axis": ("2, 5, 3, 8", "a = Unsqueeze (x, one)\n y = Expand (a, sizes)"),
    "expand adds axes": ("4, 1, 2, 3, 8", "y = Expand (x, many)"),
    "tile": ("2, 6, 8", "y = Tile (x, repeats)"),
    "copies": ("2, 9, 8", "y = Concat <axis = 1> (x, x, x)"),
    "gather each": ("2, 6, 8", "y = Gather <axis = 1> (x, each)"),
    "gather all": ("2, 6, 8", "y = Gather <axis = -2> (x, all)"),
    "flatten": (
        "6, 8",
        "a = Identity (x)\n b = Unsqueeze (a, one)\n c = Squeeze (b, one)\n y = Flatten <axis = 2> (c)",
    ),
}
CONSTANTS = {
    "four": np.array([2, 3, 2, 4]),
    "one": np.array([1]),
    "sizes": np.array([2, 5, 3, 8]),
    "many": np.array([4, 1, 2, 3, 8]),
    "repeats": np.array([1, 2, 1]),
    "each": np.array([0, 0, 1, 1, -1, 2]),
    "all": np.array([0, 1, 2, 0, 1, 2]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_elements_are_where_the_views_say(name: str) -> None:
    shape, chain = CHAINS[name]
    words = chain.replace(",", " ").replace(")", " ").split()
    used = {key: value for key, value in CONSTANTS.items() if key in words}
    source = proto(f"agraph (float[2, 3, 8] x) => (float[{shape}] y) {{ {chain} }}", **used)
    model = model_of(source)
    trail = follow_back(model.graph.outputs[0], infer_shapes(model))
    assert trail is not None
    assert trail.tensors[0].name == "x"
    numbers = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    session = onnxruntime.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": numbers})[0]
    order = [atom for axis in trail.views[0] for atom in leaves(axis)]
    assert np.array_equal(elements(trail.views[-1], order), expected)


def test_a_chain_ends_where_nothing_is_known() -> None:
    text = """agraph (float[2, 3, 8] x, int64[N] places) => (float[2, N, 8] y) {
        a = Identity (x)
        b = Gather <axis = 1> (a, places)
        y = Identity (b)
    }"""
    trail = trail_of(text)
    assert [tensor.name for tensor in trail.tensors] == ["b", "y"]


def test_numbers_are_collected() -> None:
    text = """agraph (float[2, 3] x) => (float[3, 2] y) {
        a = Mul (half, x)
        b = Transpose <perm = [1, 0]> (a)
        y = Div (b, four)
    }"""
    numbers = {"half": np.array(0.5, np.float32), "four": np.array([4], np.float32)}
    trail = trail_of(text, True, **numbers)
    assert [tensor.name for tensor in trail.tensors] == ["x", "a", "b", "y"]
    assert trail.factors == [0.125, 0.25, 0.25, 1.0]
    assert [tensor.name for tensor in trail_of(text, **numbers).tensors] == ["y"]


def test_a_number_that_adds_axes_is_none() -> None:
    text = "agraph (float[3] x) => (float[1, 3] y) { y = Mul (x, wide) }"
    assert [t.name for t in trail_of(text, True, wide=np.ones((1, 1), np.float32)).tensors] == ["y"]


@given(
    st.permutations([0, 1, 2, 3]),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_any_arrangement_of_numbers(order: list[int], cuts: list[bool], other_cuts: list[bool]) -> None:
    atoms = [Atom(size) for size in (2, 3, 4, 5)]

    def grouped(items: list[Atom], ends: list[bool]) -> View:
        view: View = [[items[0]]]
        for atom, cut in zip(items[1:], ends, strict=True):
            if cut:
                view.append([atom])
            else:
                view[-1].append(atom)
        return view

    source, wanted = grouped(atoms, cuts), grouped([atoms[i] for i in order], other_cuts)
    found = arrange(source, wanted)
    assert found is not None
    value = elements(source, atoms)
    for operator, numbers in found.steps:
        if operator == "Transpose":
            value = value.transpose(numbers)
        else:
            assert operator == "Reshape"
            value = value.reshape(numbers)
    assert np.array_equal(value, elements(wanted, atoms))


def test_arrangements_with_symbols() -> None:
    b, s, h, d = (Atom(size) for size in (B, S, 4, 8))
    by_head, by_token = [[b], [h], [s], [d]], [[b], [s], [h, d]]
    steps = arrange(by_token, by_head)
    assert steps is not None
    assert steps.steps == [("Reshape", [0, 0, 4, 8]), ("Transpose", [0, 2, 1, 3])]
    steps = arrange(by_head, by_token)
    assert steps is not None
    assert steps.steps == [("Transpose", [0, 2, 1, 3]), ("Reshape", [0, 0, 32])]
    steps = arrange([[b, h], [s], [d]], by_head)
    assert steps is not None
    assert steps.steps == [("Unsqueeze", [1]), ("Reshape", [-1, 4, 0, 8])]
    assert arrange([[b, s], [h, d]], by_head) is None
    assert arrange(by_head, [[b], [h], [s]]) is None
    steps = arrange([[], [b], [s]], [[b], [], [s]])
    assert steps is not None
    assert steps.steps in ([("Squeeze", [0]), ("Unsqueeze", [1])], [("Reshape", [-1, 1, 0])])


def test_sizes_of_1_have_no_atoms() -> None:
    assert sizes(view_of([1, B, 1])) == [[], [B], []]
    assert size_of([]) == 1
    assert size_of([Atom(B), Atom(4)]) == parse("4*B")
