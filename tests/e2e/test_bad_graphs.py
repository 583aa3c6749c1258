"""Models that parse but are wrong, new, unknown or odd: named errors, or a whole artifact; never a crash."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from e2e_checks import Outcome, nothing_left, refused, results, same_results, whole
from e2e_models import BRANCHES, FUNCTIONS, WIDTH, draw, encoder, from_text, mlp, save, save_external
from onnx import TensorProto, helper, numpy_helper

Cli = Callable[..., Outcome]

TAIL = f"agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y)"


def model_refused(here: Cli, folder: Path, model: onnx.ModelProto, *names: str, options: tuple[str, ...] = ()) -> str:
    """Check that a compile of `model` ends with exit code 3, names `names` and leaves nothing."""
    save(model, folder / "model.onnx")
    parts = refused(here("compile", "model.onnx", "-o", "build", *options), 3, *names)
    nothing_left(folder, "model.onnx")
    return parts["what"]


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["compile", "inspect"])
@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("h = Add (x, y)  y = MatMul (h, W)", ["cycle", "Add", "'h'"]),
        ("y = Add (x, y)", ["cycle", "'y'"]),
        ("a = Add (x, d)  b = Neg (a)  c = Neg (b)  d = Neg (c)  y = Add (a, x)", ["cycle", "4 nodes"]),
        ("y = Add (x, ghost)", ["'ghost'", "Add"]),
        ("y = Neg (x)  y = Abs (x)", ["'y'", "more than once"]),
        ("h = Neg (x)", ["'y'", "never produced"]),
    ],
)
def test_graphs_that_cannot_run(here: Cli, tmp_path: Path, body: str, names: list[str], verb: str) -> None:
    save(from_text(f"{TAIL} {{ {body} }}", W=draw(WIDTH, WIDTH)), tmp_path / "model.onnx")
    refused(here(verb, "model.onnx"), 3, *names)
    nothing_left(tmp_path, "model.onnx")


def test_a_cycle_through_a_subgraph(here: Cli, tmp_path: Path) -> None:
    model = from_text(BRANCHES, W1=draw(WIDTH, WIDTH), W2=draw(WIDTH, WIDTH))
    model.graph.node[0].input[0] = "y"
    model_refused(here, tmp_path, model, "cycle")


def test_nodes_in_the_wrong_order_are_put_in_order(here: Cli, tmp_path: Path) -> None:
    """Not a cycle, only unsorted: ONNX forbids it, ONNX Runtime takes it, and the artifact is in order."""
    model = mlp()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    source = save(model, tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", "safe")
    assert done.code == 0, done.err
    assert "order" in done.err
    whole(tmp_path / "build")
    same_results(source, tmp_path / "build" / "model.onnx")


def test_a_thousand_nested_calls_do_not_overflow(here: Cli, tmp_path: Path) -> None:
    """A chain as long as the deepest decoders have: nothing may recurse along the nodes."""
    body = "  ".join(f"n{i + 1} = Tanh (n{i})" for i in range(5000))
    save(from_text(f"agraph (float[4] n0) => (float[4] n5000) {{ {body} }}"), tmp_path / "model.onnx")
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "safe", "--verify", "off")
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["artifact"]["ops"] == {"Tanh": 5000}


def test_an_empty_graph(here: Cli, tmp_path: Path) -> None:
    """Without outputs everything in it would be dead code."""
    model = helper.make_model(helper.make_graph([], "g", [], []), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    save(model, tmp_path / "model.onnx")
    refused(here("compile", "model.onnx", "-o", "build"), 3, "no output", "graph 'g'")


# --- opsets and operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["compile", "inspect"])
@pytest.mark.parametrize("version", [999, 2**31, 0])
def test_unknown_opset(here: Cli, tmp_path: Path, version: int, verb: str) -> None:
    model = mlp()
    model.opset_import[0].version = version
    save(model, tmp_path / "model.onnx")
    refused(here(verb, "model.onnx"), 3, str(version), "opset")
    nothing_left(tmp_path, "model.onnx")


def test_an_opset_that_is_not_stated(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    del model.opset_import[:]
    model_refused(here, tmp_path, model, "opset")


def test_an_ir_version_from_the_future(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    model.ir_version = 99
    model_refused(here, tmp_path, model, "99")


def unknown_op(domain: str = "") -> onnx.ModelProto:
    """A product, then an operator that nobody knows."""
    model = mlp()
    model.graph.node[2].op_type, model.graph.node[2].domain, model.graph.node[2].name = "Frobnicate", domain, "odd"
    if domain:
        model.opset_import.add(domain=domain, version=1)
    return model


@pytest.mark.parametrize("domain", ["", "com.example"])
@pytest.mark.parametrize("recipe", ["safe", "int8", "int4-fast"])
def test_unknown_operators_are_kept_and_reported(here: Cli, tmp_path: Path, recipe: str, domain: str) -> None:
    save(unknown_op(domain), tmp_path / "model.onnx")
    done = here("compile", "model.onnx", "-o", "build", "--recipe", recipe, "--verify", "off")
    assert done.code == 0, done.err
    name = f"{domain}::Frobnicate" if domain else "Frobnicate"
    assert name in done.err
    found = onnx.load(tmp_path / "build" / "model.onnx")
    kept = [node for node in found.graph.node if node.op_type == "Frobnicate"]
    assert [(node.domain, node.name) for node in kept] == [(domain, "odd")]
    assert {item.domain for item in found.opset_import} >= {domain}


@pytest.mark.parametrize("domain", ["", "com.example"])
def test_unknown_operators_cannot_be_verified(here: Cli, tmp_path: Path, domain: str) -> None:
    model_refused(here, tmp_path, unknown_op(domain), "Frobnicate")


def test_inspect_lists_unknown_operators(here: Cli, tmp_path: Path) -> None:
    save(unknown_op("com.example"), tmp_path / "model.onnx")
    done = here("inspect", "model.onnx")
    assert done.code == 0, done.err
    assert "com.example::Frobnicate" in done.out


def test_an_operator_of_a_newer_opset_than_the_model_says(here: Cli, tmp_path: Path) -> None:
    """RMSNormalization came with opset 23; ONNX Runtime refuses it under 18, and the node is named."""
    text = f"{TAIL} {{ h = RMSNormalization <axis = -1> (x, g)  y = MatMul (h, W) }}"
    model = from_text(text, W=draw(WIDTH, WIDTH), g=np.ones(WIDTH, np.float32))
    model_refused(here, tmp_path, model, "RMSNormalization")


def test_an_attribute_that_the_operator_does_not_have(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    model.graph.node[3].attribute.append(helper.make_attribute("gamma", 3.0))
    model_refused(here, tmp_path, model, "gamma")


def test_an_input_too_few(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    del model.graph.node[0].input[1:]
    model.graph.node[0].name = "lonely"
    model_refused(here, tmp_path, model, "MatMul")


def test_a_function_that_calls_itself(here: Cli, tmp_path: Path) -> None:
    model = from_text(FUNCTIONS, imports=', "my" : 1', W1=draw(WIDTH, WIDTH), W2=draw(WIDTH, WIDTH), bias=draw(WIDTH))
    model.functions[1].node[0].domain, model.functions[1].node[0].op_type = "my", "Shift"
    model.functions[1].opset_import.add(domain="my", version=1)
    save(model, tmp_path / "model.onnx")
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "safe", "--verify", "off")
    refused(done, 3, "my", "Shift")


# --- shapes -----------------------------------------------------------------------------------------------------------


def unknown_shapes(how: str) -> onnx.ModelProto:
    """A model that says little or nothing about the shapes of its inputs and outputs."""
    model = mlp()
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        if how == "no rank":
            value.type.tensor_type.ClearField("shape")
        elif how == "no sizes":
            for dim in shape.dim:
                dim.Clear()
        elif how == "names":
            for index, dim in enumerate(shape.dim):
                dim.dim_param = f"d{index}"
    return model


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("recipe", ["safe", "int4-fast"])
@pytest.mark.parametrize("how", ["no rank", "no sizes", "names"])
def test_unknown_shapes(here: Cli, tmp_path: Path, how: str, recipe: str, target: str) -> None:
    source = save(unknown_shapes(how), tmp_path / "model.onnx")
    options = ["--recipe", recipe, "--target", target]
    done = here("compile", source, "-o", "build", *options, "--verify", "off")
    assert done.code == 0, done.err
    whole(tmp_path / "build", valid=how != "no rank")  # onnx.checker wants inputs to have a rank
    x = {"x": draw(3, WIDTH, seed=9)}
    wanted, found = results(source, x)["y"], results(tmp_path / "build" / "model.onnx", x)["y"]
    assert np.abs(found - wanted).max() <= (0 if recipe == "safe" else 0.5 * np.abs(wanted).max())


@pytest.mark.parametrize("how", ["no rank", "no sizes", "names"])
def test_unknown_shapes_with_verification(here: Cli, tmp_path: Path, how: str) -> None:
    """Inputs may be guessed from the weights or not; if not, the input is named and --calib is the way."""
    save(unknown_shapes(how), tmp_path / "model.onnx")
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "int8")
    if done.code != 0:
        refused(done, 3, "MatMul", "--calib")
        nothing_left(tmp_path, "model.onnx")
    np.savez(tmp_path / "inputs.npz", x=draw(5, WIDTH, seed=2))
    done = here("compile", "model.onnx", "-o", "build", "--recipe", "int8", "--calib", "inputs.npz", "--force")
    assert done.code == 0, done.err
    assert whole(tmp_path / "build", valid=how != "no rank")["verify"]["sqnr_db"] > 30


def test_shapes_that_contradict_each_other(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = WIDTH + 1
    model_refused(here, tmp_path, model, "MatMul")


# --- zero-size tensors ------------------------------------------------------------------------------------------------


def with_nothing(shape: tuple[int, ...]) -> onnx.ModelProto:
    """A model that has weights without elements in its way: an empty prefix, an empty product."""
    text = f"{TAIL} {{ z = MatMul (x, empty)  h = Concat <axis = 1> (z, x)  y = MatMul (h, W) }}"
    return from_text(text, empty=np.zeros(shape, np.float32), W=draw(WIDTH, WIDTH))


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize(
    ("recipe", "target"),
    [("safe", "portable"), ("int8", "ort-cpu"), ("int4-fast", "portable"), ("int4-fast", "ort-cpu")],
)
def test_zero_size_weights(here: Cli, tmp_path: Path, recipe: str, target: str, external: bool) -> None:
    model = with_nothing((WIDTH, 0))
    path = tmp_path / "m" / "model.onnx"
    source = save_external(model, path) if external else save(model, path)
    options = ["--recipe", recipe, "--target", target, "--set", "quantize_weights.min_elements=0"]
    done = here("compile", source, "-o", "build", *options[: None if recipe != "safe" else 4])
    assert done.code == 0, done.err
    whole(tmp_path / "build")
    wanted, found = results(source)["y"], results(tmp_path / "build" / "model.onnx")["y"]
    assert np.abs(found - wanted).max() <= (1e-6 if recipe == "safe" else 0.5 * np.abs(wanted).max())


def test_zero_size_inputs_and_outputs(here: Cli, tmp_path: Path) -> None:
    """A dimension that is 0 by declaration."""
    text = f"agraph (float[0, {WIDTH}] x) => (float[0, {WIDTH}] y) {{ y = MatMul (x, W) }}"
    source = save(from_text(text, W=draw(WIDTH, WIDTH)), tmp_path / "model.onnx")
    refused(here("compile", source, "-o", "build", "--recipe", "int4-fast"), 3, "nothing to compare")
    done = here("compile", source, "-o", "build", "--recipe", "int4-fast", "--verify", "off")
    assert done.code == 0, done.err
    whole(tmp_path / "build")
    assert results(tmp_path / "build" / "model.onnx")["y"].shape == (0, WIDTH)


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_weights_that_are_not_finite_are_named(
    here: Cli, tmp_path: Path, value: float, dtype: type, target: str
) -> None:
    model = encoder()
    array = draw(WIDTH, WIDTH, seed=8)
    array[WIDTH - 1, WIDTH // 2] = value
    tensor = next(t for t in model.graph.initializer if t.name == "W2")
    if dtype == np.float32:
        tensor.CopyFrom(numpy_helper.from_array(array, "W2"))
    else:
        tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), "W2_stored"))
        cast = helper.make_node("Cast", ["W2_stored"], ["W2"], to=TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
    for verify in ("fast", "off"):
        options = ("--recipe", "int4-fast", "--target", target, "--verify", verify)
        model_refused(here, tmp_path, model, tensor.name, "finite", options=options)


def test_an_embedding_that_is_not_finite_is_named(here: Cli, tmp_path: Path) -> None:
    model = encoder()
    tensor = next(t for t in model.graph.initializer if t.name == "E")
    array = numpy_helper.to_array(tensor).copy()
    array[200, 3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, "E"))
    model_refused(here, tmp_path, model, "E", options=("--recipe", "int8", "--verify", "off"))


@pytest.mark.parametrize(("value", "told"), [(np.nan, "1 NaN"), (np.inf, "1 infinite")])
@pytest.mark.parametrize("name", ["W2", "bias"])
def test_weights_that_are_not_quantized_and_not_finite_are_reported(
    here: Cli, tmp_path: Path, name: str, value: float, told: str
) -> None:
    """Nothing is computed with them, so nothing is refused without verification; the report names them."""
    model = mlp()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[3] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    save(model, tmp_path / "model.onnx")
    recipe = "safe" if name == "W2" else "int4-fast"
    done = here("compile", "model.onnx", "-o", "build", "--recipe", recipe, "--verify", "off")
    assert done.code == 0, done.err
    assert f"weight '{name}' holds {told}" in done.err
    assert any(f"'{name}'" in note for note in whole(tmp_path / "build")["notes"])


def test_a_source_whose_results_are_all_nan_names_the_weight(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    tensor = next(t for t in model.graph.initializer if t.name == "bias")
    tensor.CopyFrom(numpy_helper.from_array(np.full(WIDTH, np.nan, np.float32), "bias"))
    model_refused(here, tmp_path, model, "weight 'bias'", "NaN", options=("--recipe", "int4-fast"))


def test_minus_infinity_in_a_mask_is_no_error(here: Cli, tmp_path: Path) -> None:
    """Masks hold -inf on purpose."""
    text = f"""agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{
        a = MatMul (x, W)  b = Add (a, mask)  y = Softmax <axis = -1> (b)
    }}"""
    mask = np.zeros((1, WIDTH), np.float32)
    mask[0, WIDTH // 2 :] = -np.inf
    source = save(from_text(text, W=draw(WIDTH, WIDTH), mask=mask), tmp_path / "model.onnx")
    done = here("compile", source, "-o", "build", "--recipe", "int8")
    assert done.code == 0, done.err
    assert "error" not in done.err
    whole(tmp_path / "build")


def test_an_error_of_a_process_is_the_same(cli: Cli, tmp_path: Path) -> None:
    save(from_text(f"{TAIL} {{ y = Add (x, y) }}"), tmp_path / "model.onnx")
    done = cli("compile", "model.onnx", "-o", "build", stdin=subprocess.DEVNULL)
    refused(done, 3, "cycle", "'y'")
    nothing_left(tmp_path, "model.onnx")
