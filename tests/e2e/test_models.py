"""Every kind of model, compiled by every recipe for every target, and judged by ONNX Runtime alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from e2e_checks import ROUNDING, Outcome, feeds, model_bytes, noise, refused, results, same_results, session, whole
from e2e_models import DECODERS, OTHERS, WIDTH, decoder, mlp, save, save_external
from onnx import numpy_helper

Cli = Callable[..., Outcome]

#: Relative error of outputs that a recipe may cause in models of one or two layers with random weights, which have no
#: redundancy. Rounding to b bits in blocks of 32 with normal weights (largest of 32: about 2 standard deviations) gives
#: a relative error of 2 / (2^(b-1) sqrt(12)): 0.072 at 4 bits and 0.0045 at 8. ONNX Runtime rounds activations to 8
#: bits as well. Several layers in a row, each with an error of its own, give up to five times that.
LIMITS = {"safe": 1e-5, "int8": 5 * 0.0045 * np.sqrt(2), "int4-fast": 5 * 0.072}

RECIPES = [
    ("safe", "portable"),
    ("int8", "portable"),
    ("int8", "ort-cpu"),
    ("int4-fast", "portable"),
    ("int4-fast", "ort-cpu"),
]

_HALF = 30 * 2.0**-11 * 8  # as the lossless gate: 8 roundings of float16 of the largest output

#: Weights that are in the artifact's quantized form, by target.
_QUANTIZED = {"portable": {"DequantizeLinear"}, "ort-cpu": {"MatMulNBits", "GatherBlockQuantized"}}

#: Models that have no weight which the quantizer may touch.
UNTOUCHED = {"sparse", "qdq", "nbits", "double", "convolution", "strings"}


def quantized_nodes(path: Path, target: str) -> int:
    """Nodes of a target's quantized form, subgraphs included."""

    def count(graph: onnx.GraphProto) -> Counter[str]:
        found = Counter(node.op_type for node in graph.node)
        for node in graph.node:
            for attribute in node.attribute:
                found += count(attribute.g)
        return found

    return sum(
        n for kind, n in count(onnx.load(path, load_external_data=False).graph).items() if kind in _QUANTIZED[target]
    )


def nameless(path: Path) -> list[Any]:
    """The nodes of a model, each tensor told by what makes it: an input's name, a weight's content, a node's place."""

    def told(graph: onnx.GraphProto, known: dict[str, Any]) -> list[Any]:
        known = known | {entry.name: entry.name for entry in graph.input}
        known |= {t.name: hash((t.data_type, numpy_helper.to_array(t).tobytes())) for t in graph.initializer}
        nodes = []
        for node in graph.node:
            attributes = sorted(
                (a.name, told(a.g, known) if a.type == onnx.AttributeProto.GRAPH else a.SerializeToString())
                for a in node.attribute
            )
            nodes.append((node.domain, node.op_type, [known.get(name, "") for name in node.input], attributes))
            known.update((name, (len(nodes), i)) for i, name in enumerate(node.output) if name)
        return [nodes, [known[entry.name] for entry in graph.output]]

    return told(onnx.load(path).graph, {})


def same_interface(source: Path, artifact: Path) -> None:
    """Check that inputs and outputs are as they were: names, types, shapes, order."""

    def told(path: Path) -> list[Any]:
        opened = session(path)
        return [(item.name, item.type, item.shape) for item in (*opened.get_inputs(), *opened.get_outputs())]

    assert told(source) == told(artifact)


OTHER_RUNS = [
    pytest.param(name, *run, marks=pytest.mark.slow if run in (("int8", "ort-cpu"), ("int4-fast", "portable")) else ())
    for name in OTHERS
    for run in RECIPES
]


@pytest.mark.parametrize(("name", "recipe", "target"), OTHER_RUNS)
def test_models_that_are_no_decoders(here: Cli, tmp_path: Path, name: str, recipe: str, target: str) -> None:
    source = save(OTHERS[name](), tmp_path / f"{name}.onnx")
    done = here("compile", source, "-o", "build", "--recipe", recipe, "--target", target)
    assert done.code == 0, done.err
    artifact = tmp_path / "build" / "model.onnx"
    manifest = whole(tmp_path / "build")
    same_interface(source, artifact)
    assert not [entry["name"] for entry in manifest["passes"] if entry["rolled_back"]]
    if name == "strings":
        assert results(artifact)["labels"].tolist() == ["a", "b"]
        return
    if name == "nbits" and target == "portable":
        # The target has no such operator: the same codes, in a form whose products round activations to 8 bits.
        assert noise(source, artifact) <= LIMITS["int8"]
        assert quantized_nodes(artifact, target) > 0
        return
    assert noise(source, artifact) <= LIMITS[recipe]
    if recipe == "safe" or name in UNTOUCHED:
        same_results(source, artifact)
        before = onnx.load(source)
        assert quantized_nodes(artifact, target) == sum(
            node.op_type in _QUANTIZED[target] for node in before.graph.node
        )
    elif name != "functions":
        assert 0 < quantized_nodes(artifact, target) <= len(manifest["layers"]) + (name == "branches")
        assert all(0 < layer["relative_error"] < LIMITS[recipe] for layer in manifest["layers"])


#: All of them take their time: those that differ from each other the most run always.
DECODER_RUNS = [
    pytest.param(name, *run, marks=() if name in ("plain", "float16, tied by a copy") else pytest.mark.slow)
    for name in DECODERS
    for run in RECIPES
]


@pytest.mark.parametrize(("name", "recipe", "target"), DECODER_RUNS)
def test_decoders(here: Cli, tmp_path: Path, name: str, recipe: str, target: str) -> None:
    source = save(decoder(**DECODERS[name]), tmp_path / "decoder.onnx")
    done = here("compile", source, "-o", "build", "--recipe", recipe, "--target", target, "--verify", "off")
    assert done.code == 0, done.err
    artifact = tmp_path / "build" / "model.onnx"
    manifest = whole(tmp_path / "build")
    same_interface(source, artifact)
    if recipe == "safe":
        same_results(source, artifact, _HALF if "float16" in name else ROUNDING)
        assert quantized_nodes(artifact, target) == 0
    else:
        assert noise(source, artifact) <= LIMITS[recipe]
        assert quantized_nodes(artifact, target) > 0
    if "tied" in name:  # stored once, in whatever form the source has it twice
        bits = {"safe": 16 if "float16" in name else 32}.get(recipe, 8 + 2)  # scales and zero points of blocks of 32
        assert manifest["artifact"]["bytes_by_role"]["embedding"] <= 256 * 64 * bits / 8
        assert "lm_head" not in manifest["artifact"]["bytes_by_role"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"), [(name, ("portable", "ort-cpu")[place % 2]) for place, name in enumerate(DECODERS)]
)
def test_decoders_are_verified_as_decoders(here: Cli, tmp_path: Path, name: str, target: str) -> None:
    source = save(decoder(**DECODERS[name]), tmp_path / "decoder.onnx")
    bits = ("--set", "quantize_weights.target_bits=6")  # random weights lose more than trained ones
    done = here("compile", source, "-o", "build", "--target", target, *bits)
    assert done.code == 0, done.err
    assert "recipe 'int4': the default for decoders" in done.err
    verify = whole(tmp_path / "build")["verify"]
    assert verify["kl_mean"] > 0
    assert {"kl_mean"} <= {gate["name"] for gate in verify["gates"]}
    assert all(gate["ok"] for gate in verify["gates"])
    cases = " ".join(verify["inputs"])
    assert ("left padding" in cases) == ("mask" not in name)
    assert ("steps" in cases) == ("no cache" not in name)


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_inline_and_external_weights_give_the_same_artifact(here: Cli, tmp_path: Path, external: bool) -> None:
    cheap = ("--recipe", "int4-fast", "--verify", "off")
    model = decoder(tied="transpose", vocab=1024)
    for tensor in model.graph.initializer:  # one form for all: typed fields of inline tensors are kept as they are
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    inline = save(model, tmp_path / "inline" / "m.onnx")
    assert here("compile", inline, "-o", "expected", *cheap).code == 0
    source = save_external(model, tmp_path / "other" / "m.onnx") if external else save(model, tmp_path / "other/m.onnx")
    assert here("compile", source, "-o", "build", *cheap).code == 0
    whole(tmp_path / "build")
    assert model_bytes(tmp_path / "build") == model_bytes(tmp_path / "expected")


@pytest.mark.parametrize(("recipe", "target"), [run for run in RECIPES if run != ("int8", "ort-cpu")])
@pytest.mark.parametrize(
    "name",
    [
        *("decoder", "mlp", "encoder", "branches_with_own_weights", "functions", "qdq"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "no cache", "loop", "scan", "sparse")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("nbits", "overridable", "oldest", "double")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("half_weights", "convolution", "branches")),
    ],
)
def test_compiling_the_own_output_changes_nothing(
    here: Cli, tmp_path: Path, name: str, recipe: str, target: str
) -> None:
    model = OTHERS[name]() if name in OTHERS else decoder(tied="duplicate", **DECODERS.get(name, {}))
    options = ["--recipe", recipe, "--target", target, "--verify", "off"]
    assert here("compile", save(model, tmp_path / "m.onnx"), "-o", "first", *options).code == 0
    again = here("compile", "first", "-o", "second", *options)
    assert again.code == 0, again.err
    whole(tmp_path / "second")
    # What a target has no operator for is fused and taken apart again: the same nodes on the same weights, some of
    # them with other names.
    assert nameless(tmp_path / "second" / "model.onnx") == nameless(tmp_path / "first" / "model.onnx")
    if target != "portable":
        assert model_bytes(tmp_path / "second") == model_bytes(tmp_path / "first")


@pytest.mark.parametrize(("kind", "target"), [("qdq", "portable"), ("nbits", "ort-cpu")])
def test_weights_that_are_quantized_already_stay_as_they_are(here: Cli, tmp_path: Path, kind: str, target: str) -> None:
    model = OTHERS[kind]()
    source = save(model, tmp_path / "m.onnx")
    assert here("compile", source, "-o", "build", "--recipe", "int4-fast", "--target", target).code == 0
    kept = {
        t.name: numpy_helper.to_array(t).tobytes()
        for t in onnx.load(tmp_path / "build" / "model.onnx").graph.initializer
    }
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            assert kept[tensor.name] == numpy_helper.to_array(tensor).tobytes()


def test_names_metadata_and_documentation_survive(here: Cli, tmp_path: Path) -> None:
    model = mlp()
    model.producer_name, model.doc_string, model.domain, model.model_version = "trainer", "for tests", "org.test", 7
    model.metadata_props.add(key="licence", value="none")
    model.graph.node[0].name, model.graph.node[0].doc_string = "first/MatMul", "the first"
    model.graph.node[0].metadata_props.add(key="layer", value="0")
    source = save(model, tmp_path / "m.onnx")
    assert here("compile", source, "-o", "build", "--recipe", "int4-fast", "--target", "ort-cpu").code == 0
    found = onnx.load(tmp_path / "build" / "model.onnx")
    assert (found.producer_name, found.doc_string, found.domain, found.model_version) == (
        "trainer",
        "for tests",
        "org.test",
        7,
    )
    assert {p.key: p.value for p in found.metadata_props} == {"licence": "none"}
    node = next(n for n in found.graph.node if n.op_type == "MatMulNBits")
    assert node.name.startswith("first/MatMul")  # another operator, so another node, but findable
    assert {p.key: p.value for p in node.metadata_props} == {"layer": "0"}
    assert [o.name for o in found.graph.output] == ["y"]


def test_a_weight_of_an_overridable_input_is_no_constant(here: Cli, tmp_path: Path) -> None:
    source = save(OTHERS["overridable"](), tmp_path / "m.onnx")
    assert here("compile", source, "-o", "build", "--recipe", "int4-fast", "--target", "ort-cpu").code == 0
    artifact = tmp_path / "build" / "model.onnx"
    given = {**feeds(session(source)), "W1": np.zeros((WIDTH, WIDTH), np.float32)}
    changed, usual = results(artifact, given)["y"], results(artifact)["y"]
    assert np.abs(changed - usual).max() > 0.01
    reference = results(source, given)["y"]
    assert np.abs(changed - reference).max() <= LIMITS["int4-fast"] * np.abs(reference).max()


def test_old_opsets_are_converted_not_relabelled(here: Cli, tmp_path: Path) -> None:
    source = save(OTHERS["oldest"](), tmp_path / "m.onnx")
    assert here("compile", source, "-o", "build", "--recipe", "int4-fast").code == 0
    found = onnx.load(tmp_path / "build" / "model.onnx")
    assert found.opset_import[0].version >= 21
    # Softmax without axis meant all dimensions from 1 on before opset 13, and Unsqueeze had its axes as an attribute.
    onnx.checker.check_model(found, full_check=True)
    assert noise(source, tmp_path / "build" / "model.onnx") <= LIMITS["int4-fast"]


def test_the_default_recipe_says_why(here: Cli, tmp_path: Path) -> None:
    for name, recipe in (("convolution", "safe"), ("encoder", "int8"), ("strings", "safe")):
        source = save(OTHERS[name](), tmp_path / f"{name}.onnx")
        done = here("compile", source)
        assert done.code == 0, done.err
        assert f"recipe '{recipe}'" in done.err, name


def test_a_model_whose_name_is_mistyped(here: Cli, tmp_path: Path) -> None:
    save(mlp(), tmp_path / "model.onnx")
    refused(here("compile", "mdoel.onnx"), 2, "mdoel.onnx", "did you mean 'model.onnx'?")
    refused(here("compile", "nowhere/model.onnx"), 2, "nowhere/model.onnx")
