"""Weights and graphs that are valid and awkward: extreme values, shapes that fit no block, names that are taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from e2e_checks import Outcome, feeds, refused, results, same_results, session, whole
from e2e_models import WIDTH, branches, decoder, draw, from_text, mlp, save
from onnx import TensorProto, helper, numpy_helper

Cli = Callable[..., Outcome]
Array = np.ndarray[Any, Any]

RUNS = [("int8", "portable"), ("int8", "ort-cpu"), ("int4-fast", "portable"), ("int4-fast", "ort-cpu")]

#: Relative error of one product, RMS: as derived in test_models, for one layer and with some room for activations that
#: the runtime rounds to 8 bits.
ERROR = {"int8": 0.02, "int4-fast": 0.2}

ALL = ["--set", "quantize_weights.min_elements=0"]


def product(weight: Array, body: str = "y = MatMul (x, W)", width: int = WIDTH, **more: Array) -> onnx.ModelProto:
    """x[batch, width] times W."""
    kind = "float16" if weight.dtype == np.float16 else "float"
    text = f"agraph ({kind}[batch, {width}] x) => ({kind}[batch, N] y) {{ {body} }}"
    model = from_text(text, W=weight, **more)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.shape.SetInParent()
    for dim in ("batch", weight.shape[-1]):
        added = model.graph.output[0].type.tensor_type.shape.dim.add()
        setattr(added, "dim_param" if isinstance(dim, str) else "dim_value", dim)
    return model


def error_of(source: Path, artifact: Path, inputs: dict[str, Array] | None = None) -> float:
    """Relative error of the output y, RMS over RMS; of the absolute values if the source's are all zero."""
    wanted = results(source, inputs)["y"].astype(np.float64)
    found = results(artifact, inputs)["y"].astype(np.float64)
    assert np.isfinite(found).all()
    return float(np.sqrt(np.mean(np.square(found - wanted))) / (np.sqrt(np.mean(np.square(wanted))) or 1.0))


def columns_of_very_different_size() -> Array:
    return (draw(WIDTH, WIDTH) * np.logspace(-6, 6, WIDTH)).astype(np.float32)


def one_outlier() -> Array:
    weight = draw(WIDTH, WIDTH) * 1e-3
    weight[5, 7] = 100.0
    return weight.astype(np.float32)


def with_zero_blocks() -> Array:
    weight = draw(WIDTH, WIDTH).copy()
    weight[32:64] = 0
    weight[:, 3] = 0
    return weight


VALUES: dict[str, Callable[[], Array]] = {
    "zeros": lambda: np.zeros((WIDTH, WIDTH), np.float32),
    "all the same": lambda: np.full((WIDTH, WIDTH), 0.25, np.float32),
    "all positive": lambda: np.abs(draw(WIDTH, WIDTH)),
    "zero blocks": with_zero_blocks,
    "tiny": lambda: draw(WIDTH, WIDTH) * np.float32(1e-12),
    "subnormal": lambda: draw(WIDTH, WIDTH) * np.float32(1e-39),
    "huge": lambda: draw(WIDTH, WIDTH) * np.float32(1e25),
    "columns of very different size": columns_of_very_different_size,
    "one outlier": one_outlier,
    "float16 at its end": lambda: (draw(WIDTH, WIDTH) * 1e4).astype(np.float16),
    "float16 subnormal": lambda: (draw(WIDTH, WIDTH) * 1e-4).astype(np.float16),
}


@pytest.mark.parametrize(("recipe", "target"), RUNS)
@pytest.mark.parametrize("kind", VALUES)
def test_extreme_values(here: Cli, tmp_path: Path, kind: str, recipe: str, target: str) -> None:
    """Either the result is as good as with ordinary weights, or the weight is left alone and the report says why."""
    weight = VALUES[kind]()
    source = save(product(weight), tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", recipe, "--target", target, "--verify", "off")
    assert done.code == 0, done.err
    whole(tmp_path / "build")
    x = (draw(5, WIDTH, seed=4) * np.sqrt(5)).astype(weight.dtype)
    found = error_of(source, tmp_path / "build" / "model.onnx", {"x": x})
    # Scales of subnormal weights have few digits themselves, and a block with an outlier has a large range.
    assert found <= ERROR[recipe] * (2 if kind == "one outlier" or "subnormal" in kind else 1)


SHAPES = [(128, 1), (1, 128), (128, 15), (17, 130), (33, 257), (160, 96), (16, 16), (4099, 18)]


@pytest.mark.parametrize(("recipe", "target"), RUNS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("block", [16, 32, 128, 0])
@pytest.mark.slow
def test_shapes_that_fit_no_block(
    here: Cli, tmp_path: Path, shape: tuple[int, int], block: int, recipe: str, target: str
) -> None:
    source = save(product(draw(*shape, seed=3), width=shape[0]), tmp_path / "model.onnx")
    options = ["--recipe", recipe, "--target", target, "--verify", "off", *ALL]
    done = here("compile", source, "-o", "build", *options, "--set", f"quantize_weights.block={block}")
    assert done.code == 0, done.err
    whole(tmp_path / "build")
    x = draw(3, shape[0], seed=4)
    limit = ERROR[recipe] * (2 if block in (0, 128) else 1)  # larger blocks have larger ranges
    assert error_of(source, tmp_path / "build" / "model.onnx", {"x": x}) <= limit


BODIES = {
    "left operand": """t = Transpose <perm = [1, 0]> (x)  u = MatMul (V, t)
        z = Transpose <perm = [1, 0]> (u)  y = MatMul (z, W)""",
    "gemm, transA": "t = Transpose <perm = [1, 0]> (x)  y = Gemm <transA = 1> (t, W)",
    "gemm, scalar bias": "y = Gemm <beta = 0.5> (x, W, scalar)",
    "gemm, row bias": "y = Gemm <alpha = 2.0, beta = 0.5> (x, W, row)",
    "gemm, bias of activations": "n = Neg (x)  y = Gemm <beta = 2.0> (x, W, n)",
    "weight in three dimensions": """u = MatMul (x, batched)  i = Constant <value = int64 {0}> ()
        z = Gather <axis = 0> (u, i)  y = MatMul (z, W)""",
    "weight times weight": "p = MatMul (V, W)  y = MatMul (x, p)",
    "vector": """u = MatMul (x, W)  axis = Constant <value = int64[1] {1}> ()
        s = MatMul (u, vector)  e = Unsqueeze (s, axis)  y = Mul (u, e)""",
    "read twice": "u = MatMul (x, W)  v = Add (u, row)  z = Mul (v, v)  y = MatMul (z, W)",
    "read as floats too": "u = MatMul (x, W)  m = ReduceSum <keepdims = 0> (W)  y = Mul (u, m)",
    "behind a cast": "h = Cast <to = 1> (half)  u = MatMul (x, h)  y = MatMul (u, W)",
    "behind a transpose": "t = Transpose <perm = [1, 0]> (V)  u = MatMul (x, t)  y = MatMul (u, W)",
    "the same product twice": "a = MatMul (x, W)  b = MatMul (x, W)  y = Add (a, b)",
}


@pytest.mark.parametrize(("recipe", "target"), [("safe", "portable"), *RUNS[::3]])
@pytest.mark.parametrize("kind", BODIES)
def test_ways_to_use_a_weight(here: Cli, tmp_path: Path, kind: str, recipe: str, target: str) -> None:
    extra = {
        "V": draw(WIDTH, WIDTH, seed=5),
        "scalar": np.array(0.3, np.float32),
        "row": draw(WIDTH, seed=6),
        "vector": draw(WIDTH, seed=7),
        "batched": np.stack([draw(WIDTH, WIDTH, seed=8), draw(WIDTH, WIDTH, seed=9)]),
        "half": draw(WIDTH, WIDTH, seed=5).astype(np.float16),
    }
    used = {name: array for name, array in extra.items() if name in re.findall(r"\w+", BODIES[kind])}
    source = save(product(draw(WIDTH, WIDTH, seed=3), BODIES[kind], **used), tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", recipe, "--target", target, "--verify", "off")
    assert done.code == 0, done.err
    whole(tmp_path / "build")
    x = {"x": draw(WIDTH if "activations" in kind else 6, WIDTH, seed=4)}
    found = error_of(source, tmp_path / "build" / "model.onnx", x)
    assert found <= (1e-5 if recipe == "safe" else 2 * ERROR[recipe])


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_names_that_the_compiler_would_choose_are_taken(here: Cli, tmp_path: Path, target: str) -> None:
    model = mlp()
    taken = [f"{name}{end}" for name in ("W1", "W2") for end in ("_q4", "_q8", "_scale", "_zp", "_q4_1", "_scale_1")]
    taken += ["/product", "/product/MatMul", "DequantizeLinear", "/MatMulNBits", "W1/DequantizeLinear", "/Mul"]
    previous = "y_before"
    model.graph.node[-1].output[0] = previous
    for name in taken:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), name))
        model.graph.node.append(helper.make_node("Add", [previous, name], [f"{name}_out"], name=f"{name}_node"))
        previous = f"{name}_out"
    model.graph.node.append(helper.make_node("Identity", [previous], ["y"], name="W1"))
    source = save(model, tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", "int4-fast", "--target", target)
    assert done.code == 0, done.err
    whole(tmp_path / "build")
    assert error_of(source, tmp_path / "build" / "model.onnx") < ERROR["int4-fast"]


def test_names_of_any_kind_survive(here: Cli, tmp_path: Path) -> None:
    names = {
        "x": "input ids/größe:0",
        "y": "  ",
        "W1": "模型.层.0::weight",
        "a": "a\tb",
        "W2": "../../etc/passwd",
        "bias": "\u202e",
    }
    model = mlp()
    for node in model.graph.node:
        for side in (node.input, node.output):
            for place, name in enumerate(side):
                side[place] = names.get(name, name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = names.get(value.name, value.name)
    source = save(model, tmp_path / "model.onnx")
    for recipe in ("safe", "int4-fast"):
        done = here("compile", source, "-o", recipe, "--recipe", recipe, "--target", "ort-cpu")
        assert done.code == 0, done.err
        whole(tmp_path / recipe)
        opened = session(tmp_path / recipe / "model.onnx")
        assert [item.name for item in opened.get_inputs()] == [names["x"]]
        assert [item.name for item in opened.get_outputs()] == [names["y"]]
    assert "模型.层.0::weight" in (tmp_path / "int4-fast" / "report.html").read_text(encoding="utf-8")


def test_a_name_that_is_html(here: Cli, tmp_path: Path) -> None:
    """Names come from strangers' files, and the report is opened in a browser."""
    evil = "<script>alert(1)</script>"
    model = mlp()
    model.producer_name = evil
    model.graph.initializer[0].name = evil
    model.graph.node[0].input[1] = evil
    (tmp_path / evil.replace("/", "")).mkdir()
    save(model, tmp_path / evil.replace("/", "") / "model.onnx")
    done = here("compile", evil.replace("/", ""), "-o", "build", "--recipe", "int4-fast")
    assert done.code == 0, done.err
    page = (tmp_path / "build" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_a_name_that_is_markup_of_the_terminal(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    odd = "[bold red]W[/] [link=x]\x1b[31m"
    model.graph.initializer[0].name = odd
    model.graph.node[0].input[1] = odd
    model.graph.node[2].op_type, model.graph.node[2].domain = "[/]Odd[/bold]", "com.[red]x"
    model.opset_import.add(domain="com.[red]x", version=1)
    save(model, tmp_path / "model.onnx")
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "int4-fast", "--verify", "off")
    assert done.code == 0, done.err
    assert "\x1b" not in done.err
    seen = here("inspect", "model.onnx")
    assert seen.code == 0, seen.err
    assert "[/]Odd[/bold]" in seen.out
    assert "\x1b" not in seen.out


def test_inputs_and_weights_that_are_outputs(here: Cli, tmp_path: Path) -> None:
    """An input that goes straight out, a weight that is an output, and one output under two names."""
    model = mlp()
    shape = [WIDTH, WIDTH]
    model.graph.output.append(helper.make_tensor_value_info("W1", TensorProto.FLOAT, shape))
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH]))
    model.graph.node.append(helper.make_node("Identity", ["y"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", WIDTH]))
    source = save(model, tmp_path / "model.onnx")
    for recipe in ("safe", "int4-fast"):
        done = here("compile", source, "-o", recipe, "--recipe", recipe)
        assert done.code == 0, done.err
        whole(tmp_path / recipe)
        found = results(tmp_path / recipe / "model.onnx")
        assert list(found) == ["y", "W1", "x", "z"]
        assert np.array_equal(found["W1"], numpy_helper.to_array(model.graph.initializer[0]))
        assert np.array_equal(found["y"], found["z"])
    same_results(source, tmp_path / "safe" / "model.onnx")


def test_weights_in_constant_nodes(here: Cli, tmp_path: Path) -> None:
    """As TorchScript writes them."""
    model = mlp()
    for tensor in list(model.graph.initializer):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)
    source = save(model, tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", "int4-fast", "--target", "ort-cpu")
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["artifact"]["ops"]["com.microsoft::MatMulNBits"] == 2
    assert error_of(source, tmp_path / "build" / "model.onnx") < ERROR["int4-fast"]


def test_dead_ends_and_optional_outputs(here: Cli, tmp_path: Path) -> None:
    text = f"""agraph (float[batch, {WIDTH}] x, float[5] unused) => (float[batch, {WIDTH}] y) {{
        dead = MatMul (x, W2)
        deader = Relu (dead)
        kept, mask = Dropout (x)
        values, places = TopK <axis = -1> (kept, many)
        y = MatMul (values, W1)
    }}"""
    weights = {"W1": draw(WIDTH, WIDTH), "W2": draw(WIDTH, WIDTH), "many": np.array([WIDTH], np.int64)}
    model = from_text(text, **weights)
    model.graph.node[2].output[1] = ""
    model.graph.initializer.append(numpy_helper.from_array(np.ones(70_000, np.float32), "nobody"))
    source = save(model, tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", "safe")
    assert done.code == 0, done.err
    manifest = whole(tmp_path / "build")
    assert manifest["artifact"]["ops"] == {"MatMul": 1, "TopK": 1}
    assert [item.name for item in session(tmp_path / "build" / "model.onnx").get_inputs()] == ["x", "unused"]
    assert manifest["artifact"]["bytes"] < 70_000
    same_results(source, tmp_path / "build" / "model.onnx")


def test_a_model_that_uses_our_own_domain(here: Cli, tmp_path: Path) -> None:
    """Somebody else's function of the same name must not be taken for ours, nor ours for theirs."""
    text = f"""agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{
        a = onnxslim_llm.BlockMatMul (x, W1)
        y = MatMul (a, W2)
    }}
    <domain: "onnxslim_llm", opset_import: ["" : 21]> BlockMatMul (v, w) => (r) {{ p = MatMul (v, w)  r = Neg (p) }}"""
    weights = {"W1": draw(WIDTH, WIDTH), "W2": draw(WIDTH, WIDTH, seed=1)}
    source = save(from_text(text, opset=21, imports=', "onnxslim_llm" : 1', **weights), tmp_path / "model.onnx")
    for target in ("portable", "ort-cpu"):
        done = here("compile", source, "-o", target, "--recipe", "int4-fast", "--target", target)
        if done.code == 0:
            whole(tmp_path / target)
            assert error_of(source, tmp_path / target / "model.onnx") < 2 * ERROR["int4-fast"]
        else:
            refused(done, 3, "onnxslim_llm")


def test_ids_of_32_bits_and_fixed_sizes(here: Cli, tmp_path: Path) -> None:
    model = decoder(cache=False, positions=False)
    for value in model.graph.input:
        value.type.tensor_type.elem_type = TensorProto.INT32
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_value = (1, 16)[place]
    for dim, size in zip(model.graph.output[0].type.tensor_type.shape.dim, (1, 16), strict=False):
        dim.dim_value = size
    source = save(model, tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--target", "ort-cpu")
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["verify"]["kl_mean"] < 0.35


def test_a_branch_whose_condition_is_known(here: Cli, tmp_path: Path) -> None:
    model = branches()
    model.graph.input.pop()
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    source = save(model, tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", "safe")
    assert done.code == 0, done.err
    assert "If" not in whole(tmp_path / "build")["artifact"]["ops"]
    same_results(source, tmp_path / "build" / "model.onnx")


def test_feeds_of_these_tests_are_random() -> None:
    """Or every comparison above would compare zeros."""
    found = feeds(session(mlp()))["x"]
    assert found.std() > 0.3
