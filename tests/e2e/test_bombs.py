"""Small files that ask for a lot: memory and time of a compile follow what is stored, not what could be computed."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from e2e_checks import Outcome, refused, results, whole
from e2e_models import WIDTH, draw, from_text, mlp, save
from onnx import helper, numpy_helper

Cli = Callable[..., Outcome]

_ADDRESS_SPACE = 6 << 30  # bytes; the libraries reserve 2 GiB of it without using them
_SECONDS = 60

HEAD = "agraph (float[n] x) => (float[m] y)"
_SUM = "p = ReduceSum <keepdims = 0> (z)  y = Add (x, p)"
_DOUBLE = "  ".join(f"a{i + 1} = Concat <axis = 0> (a{i}, a{i})" for i in range(36))

LARGE = {
    "ConstantOfShape": f"s = Constant <value = int64[2] {{300000, 300000}}> ()  z = ConstantOfShape (s)  {_SUM}",
    "Expand": f"s = Constant <value = int64[2] {{300000, 300000}}> ()  z = Expand (one, s)  {_SUM}",
    "Tile": f"s = Constant <value = int64[1] {{90000000000}}> ()  z = Tile (one, s)  {_SUM}",
    "Pad": f"s = Constant <value = int64[2] {{0, 90000000000}}> ()  z = Pad (one, s)  {_SUM}",
    "Range": f"""a = Constant <value = int64 {{0}}> ()  b = Constant <value = int64 {{90000000000}}> ()
        c = Constant <value = int64 {{1}}> ()  r = Range (a, b, c)  z = Cast <to = 1> (r)  {_SUM}""",
    "OneHot": f"""d = Constant <value = int64 {{2000000000}}> ()  v = Constant <value = float[2] {{0.0, 1.0}}> ()
        z = OneHot (ids, d, v)  {_SUM}""",
    "growing": f"a0 = Concat <axis = 0> (one, one)  {_DOUBLE}  z = Identity (a36)  {_SUM}",
    "growing ids": f"a0 = Concat <axis = 0> (ids, ids)  {_DOUBLE}  z = Cast <to = 1> (a36)  {_SUM}",
}


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))


@pytest.mark.parametrize("kind", LARGE)
def test_constants_that_would_be_large_are_not_folded(cli: Cli, tmp_path: Path, kind: str) -> None:
    used = {"one": np.ones(1, np.float32), "ids": np.array([1, 2], np.int64)}
    weights = {name: array for name, array in used.items() if f"({name}" in LARGE[kind]}
    save(from_text(f"{HEAD} {{ {LARGE[kind]} }}", **weights), tmp_path / "model.onnx")
    options = ["--recipe", "safe", "--verify", "off"]
    done = cli("compile", "model.onnx", "-o", "build", *options, preexec_fn=limited, timeout=_SECONDS)
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["artifact"]["bytes"] < 100_000


ENDLESS = """agraph (float[n] x) => (float[n] y) {
    many = Constant <value = int64 {9223372036854775807}> ()
    go = Constant <value = bool {1}> ()
    zero = Constant <value = float {0.0}> ()
    s = Loop (many, go, zero) <body = body (int64 i, bool more, float a) => (bool again, float b) {
        again = Identity (more)
        one = Constant <value = float {1.0}> ()
        b = Add (a, one)
    }>
    y = Add (x, s)
}"""


def test_a_loop_without_end_is_not_run(cli: Cli, tmp_path: Path) -> None:
    """All its inputs are constants, but running it is the runtime's business."""
    save(from_text(ENDLESS), tmp_path / "model.onnx")
    done = cli("compile", "model.onnx", "-o", "build", "--recipe", "safe", "--verify", "off", timeout=_SECONDS)
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["artifact"]["ops"]["Loop"] == 1


RANDOM = [
    "RandomNormal <shape = [64]> ()",
    "RandomUniform <shape = [64]> ()",
    "RandomNormalLike (base)",
    "RandomUniformLike (base)",
]


@pytest.mark.parametrize("node", RANDOM, ids=lambda node: node.split()[0])
def test_random_numbers_stay_random(here: Cli, tmp_path: Path, node: str) -> None:
    """They are neither computed once for all nor shared by two that look alike."""
    text = f"agraph (float[64] x) => (float[64] y) {{ a = {node}  b = {node}  c = Sub (a, b)  y = Add (x, c) }}"
    weights = {"base": np.full(64, 0.5, np.float32)} if "base" in node else {}
    save(from_text(text, **weights), tmp_path / "model.onnx")
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "safe", "--verify", "off")
    assert done.code == 0, done.err
    kind = node.split()[0]
    assert whole(tmp_path / "build")["artifact"]["ops"][kind] == 2
    x = {"x": np.zeros(64, np.float32)}
    assert np.abs(results(tmp_path / "build" / "model.onnx", x)["y"]).max() > 0


def test_dimensions_beyond_all_memory(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    tensor = model.graph.initializer[0]
    for dims in ([2**62, 2**62], [2**40, 128], [-1, 128]):
        del tensor.dims[:]
        tensor.dims.extend(dims)
        save(model, tmp_path / "model.onnx")
        refused(here("compile", "model.onnx", "-o", "build"), 3, "W1")


def test_a_sparse_tensor_that_would_be_large(cli: Cli, tmp_path: Path) -> None:
    """3 values of 300,000 x 300,000: a dense copy would have 360 GB."""
    model = from_text("agraph (float[n, 300000] x) => (float[n, 300000] y) { y = MatMul (x, W) }")
    values = numpy_helper.from_array(np.ones(3, np.float32), "W")
    places = numpy_helper.from_array(np.array([1, 5, 9], np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [300_000, 300_000]))
    save(model, tmp_path / "model.onnx")
    for recipe in ("safe", "int4-fast"):
        options = ["--recipe", recipe, "--verify", "off"]
        done = cli("compile", "model.onnx", "-o", recipe, *options, preexec_fn=limited, timeout=_SECONDS)
        assert done.code == 0, done.err
        assert whole(tmp_path / recipe)["artifact"]["bytes"] < 100_000


def test_many_nodes(here: Cli, tmp_path: Path) -> None:
    """Time grows with the number of nodes, not with its square: wide, deep, and all of them alike."""
    nodes = [helper.make_node("Neg", ["x"], [f"w{i}"]) for i in range(3000)]
    nodes += [helper.make_node("Add", [f"d{i}" if i else "w0", f"w{i}"], [f"d{i + 1}"]) for i in range(2999)]
    nodes.append(helper.make_node("Identity", ["d2999"], ["y"]))
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    graph = helper.make_graph(nodes, "g", [value], [out])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "model.onnx")
    start = time.process_time()  # of this process alone: the machine may be busy
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "safe", "--verify", "off", "--jobs", "1")
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["artifact"]["ops"]["Neg"] == 1  # one of them is enough
    assert time.process_time() - start < 30


def test_a_tower_of_functions(cli: Cli, tmp_path: Path) -> None:
    """Each calls the one below it twice: inlined, they would be 2^30 nodes."""
    text = f"agraph (float[{WIDTH}] x) => (float[{WIDTH}] y) {{ h = MatMul (x, W)  y = t.F29 (h) }}"
    model = from_text(text, imports=', "t" : 1', W=draw(WIDTH, WIDTH))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("t", 1)]
    for level in range(30):
        op, domain = (f"F{level - 1}", "t") if level else ("Neg", "")
        nodes = [helper.make_node(op, [a], [b], domain=domain) for a, b in (("v", "u"), ("u", "r"))]
        model.functions.append(helper.make_function("t", f"F{level}", ["v"], ["r"], nodes, opsets))
    save(model, tmp_path / "model.onnx")
    for recipe in ("safe", "int4-fast"):
        options = ["--recipe", recipe, "--verify", "off"]
        done = cli("compile", "model.onnx", "-o", recipe, *options, preexec_fn=limited, timeout=_SECONDS)
        assert done.code == 0, done.err
        assert whole(tmp_path / recipe, valid=False)["artifact"]["bytes"] < 100_000  # onnx.checker inlines them
