"""What verification finds: artifacts that miss their gates are not published, and wrong passes are found and undone.

The wrong passes come as other people's would: a package with entry points, in a process of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_checks import Outcome, nothing_left, refused, same_results, session, whole
from e2e_models import HOPELESS, decoder, from_text, mlp, qdq, save

Cli = Callable[..., Outcome]

PASSES = '''
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.rewrite.passes import Change, Pass


def scalar(tensor):
    return isinstance(tensor, gs.Constant) and not tensor.shape


class Wrong(Pass):
    """Break the model in one way; every class below says which."""

    group: ClassVar[str] = "wrong"

    def nodes(self, model, op):
        return [node for node in model.graph.nodes if node.op == op]


@dataclass(frozen=True)
class SubtractInstead(Wrong):
    """Turn the last addition of two tensors into a subtraction and say that nothing changes."""

    name: ClassVar[str] = "subtract_instead"

    def apply(self, model, context):
        node = [node for node in self.nodes(model, "Add") if not any(scalar(tensor) for tensor in node.inputs)][-1]
        node.op = "Sub"
        return Change([node.name or node.outputs[0].name])


@dataclass(frozen=True)
class SwapGate(Wrong):
    """Turn every Sigmoid into a Tanh and say that nothing changes."""

    name: ClassVar[str] = "swap_gate"

    def apply(self, model, context):
        nodes = self.nodes(model, "Sigmoid")
        for node in nodes:
            node.op = "Tanh"
        return Change([node.name for node in nodes])


@dataclass(frozen=True)
class ApproximateBadly(SubtractInstead):
    """The same, but honest: it says that results change."""

    name: ClassVar[str] = "approximate_badly"
    lossless: ClassVar[bool] = False


@dataclass(frozen=True)
class Crash(Wrong):
    """Divide by zero."""

    name: ClassVar[str] = "crash"

    def apply(self, model, context):
        return Change([str(1 / 0)])


@dataclass(frozen=True)
class CutWire(Wrong):
    """Leave a tensor that nobody makes."""

    name: ClassVar[str] = "cut_wire"

    def apply(self, model, context):
        node = self.nodes(model, "MatMul")[-1]
        node.inputs[0] = gs.Variable("nowhere")
        return Change([node.name or node.outputs[0].name])


@dataclass(frozen=True)
class Loop(Wrong):
    """Feed a node with its own output."""

    name: ClassVar[str] = "loop"

    def apply(self, model, context):
        node = self.nodes(model, "Add")[-1]
        node.inputs[0] = node.outputs[0]
        return Change([node.name or node.outputs[0].name])


@dataclass(frozen=True)
class LoseOutput(Wrong):
    """Drop the last output of the graph."""

    name: ClassVar[str] = "lose_output"

    def apply(self, model, context):
        model.graph.outputs = model.graph.outputs[:-1]
        return Change(["output"])


@dataclass(frozen=True)
class MisspellOperator(Wrong):
    """Use an operator that does not exist."""

    name: ClassVar[str] = "misspell_operator"

    def apply(self, model, context):
        node = self.nodes(model, "Add")[-1]
        node.op = "Ad"
        return Change([node.name or node.outputs[0].name])


@dataclass(frozen=True)
class TakeName(Wrong):
    """Has the name of another pass."""

    name: ClassVar[str] = "cleanup"

    def apply(self, model, context):
        return Change()


class WrongHeads(Wrong):
    """Leave the model with caches that do not fit."""

    lossless: ClassVar[bool] = False
    structural: ClassVar[bool] = True

    def caches(self, tensors):
        return [tensor for tensor in tensors if tensor.shape and len(tensor.shape) == 4]


@dataclass(frozen=True)
class ForgetCacheShape(WrongHeads):
    """Say that the caches going in have a head less, and leave all else."""

    name: ClassVar[str] = "forget_cache_shape"

    def apply(self, model, context):
        for tensor in self.caches(model.graph.inputs):
            tensor.shape = [tensor.shape[0], tensor.shape[1] - 1, *tensor.shape[2:]]
        return Change(["caches"])


@dataclass(frozen=True)
class ForgetPresentShape(WrongHeads):
    """Say that the caches coming out have a head less, and leave all else."""

    name: ClassVar[str] = "forget_present_shape"

    def apply(self, model, context):
        for tensor in self.caches(model.graph.outputs):
            tensor.shape = [tensor.shape[0], tensor.shape[1] - 1, *tensor.shape[2:]]
        return Change(["caches"])


@dataclass(frozen=True)
class ForgetCacheName(WrongHeads):
    """Give a cache going in the number of another layer."""

    name: ClassVar[str] = "forget_cache_name"

    def apply(self, model, context):
        tensor = self.caches(model.graph.inputs)[0]
        tensor.name = tensor.name.replace("0", "9")
        return Change(["caches"])
'''

TARGET = """
from onnxslim_llm.targets import Target

SLOW = Target(
    name="slow-cpu",
    description="A target of other people.",
    package="onnxruntime",
    lowering="lower_portable",
    domains=("",),
    weight_bits=(8,),
)
NOTHING = "not a target"
"""

CLASSES = {
    "subtract_instead": "SubtractInstead",
    "swap_gate": "SwapGate",
    "approximate_badly": "ApproximateBadly",
    "crash": "Crash",
    "cut_wire": "CutWire",
    "loop": "Loop",
    "lose_output": "LoseOutput",
    "misspell_operator": "MisspellOperator",
    "forget_cache_shape": "ForgetCacheShape",
    "forget_present_shape": "ForgetPresentShape",
    "forget_cache_name": "ForgetCacheName",
}

Install = Callable[..., dict[str, str]]


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Install:
    """Install a package with these entry points by group; returns the environment of a process that has it."""

    def run(**groups: dict[str, str]) -> dict[str, str]:
        home = tmp_path_factory.mktemp("site")
        (home / "wrong_passes.py").write_text(PASSES)
        (home / "other_target.py").write_text(TARGET)
        information = home / "wrong_passes-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong-passes\nVersion: 1.0\n")
        lines = []
        for group, entries in groups.items():
            lines += [f"[onnxslim_llm.{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (information / "entry_points.txt").write_text("\n".join(lines))
        return {**environment, "PYTHONPATH": os.pathsep.join([str(home), environment["PYTHONPATH"]])}

    return run


@pytest.fixture
def plugins(install: Install) -> dict[str, str]:
    return install(passes={name: f"wrong_passes:{kind}" for name, kind in CLASSES.items()})


def recipe(folder: Path, *passes: str, gates: str = "lossless") -> list[str]:
    """Write a recipe of these passes; the options that choose it."""
    text = "\n".join([f'gates = "{gates}"', *(f'[[passes]]\nname = "{name}"' for name in passes)])
    (folder / "recipe.toml").write_text(text)
    return ["--recipe", "recipe.toml"]


def undone(manifest: dict[str, Any]) -> dict[str, str]:
    """The passes that were rolled back, with the reasons."""
    assert all(bool(entry["rolled_back_reason"]) == entry["rolled_back"] for entry in manifest["passes"])
    return {entry["name"]: entry["rolled_back_reason"] for entry in manifest["passes"] if entry["rolled_back"]}


@pytest.mark.parametrize(
    ("kind", "passes", "verify"),
    [
        ("mlp", ["subtract_instead"], "fast"),
        ("mlp", ["cleanup", "subtract_instead", "tie_weights"], "full"),
        pytest.param("decoder", ["cleanup", "subtract_instead", "tie_weights"], "fast", marks=pytest.mark.slow),
        pytest.param("decoder", ["swap_gate", "cleanup", "subtract_instead"], "fast", marks=pytest.mark.slow),
        pytest.param("decoder", ["subtract_instead"], "full", marks=pytest.mark.slow),
    ],
)
def test_wrong_passes_are_found_and_rolled_back(
    cli: Cli, tmp_path: Path, plugins: dict[str, str], kind: str, passes: list[str], verify: str
) -> None:
    """The others are kept, the artifact is right, and the report says what was undone and why."""
    source = save(mlp() if kind == "mlp" else decoder(layers=1, cache=False), tmp_path / "model.onnx")
    options = [*recipe(tmp_path, *passes), "--verify", verify]
    done = cli("compile", source, "-o", "build", *options, env=plugins)
    assert done.code == 0, done.err
    manifest = whole(tmp_path / "build")
    wrong = {"subtract_instead", "swap_gate"} & set(passes)
    assert undone(manifest).keys() == wrong
    assert all(name in done.err for name in wrong)
    kept = {entry["name"] for entry in manifest["passes"] if entry["changed"] and not entry["rolled_back"]}
    assert kept <= {"cleanup", "deduplicate_initializers"}
    same_results(source, tmp_path / "build" / "model.onnx")
    nothing_left(tmp_path, "build", "model.onnx", "recipe.toml")


@pytest.mark.parametrize("name", ["forget_cache_shape", "forget_present_shape", "forget_cache_name"])
@pytest.mark.parametrize("verify", ["fast", pytest.param("full", marks=pytest.mark.slow)])
def test_structural_passes_that_leave_dangling_caches_are_rolled_back(
    cli: Cli, tmp_path: Path, plugins: dict[str, str], name: str, verify: str
) -> None:
    """What changes results was asked for, and stays; not what leaves a model that does not run like the source."""
    source = save(decoder(layers=1), tmp_path / "model.onnx")
    options = [*recipe(tmp_path, "cleanup", name, gates="int4"), "--verify", verify]
    done = cli("compile", source, "-o", "build", *options, env=plugins)
    assert done.code == 0, done.err
    manifest = whole(tmp_path / "build")
    assert undone(manifest).keys() == {name}
    reason = "does not run" if name == "forget_cache_name" else "is declared as"
    assert reason in undone(manifest)[name]
    same_results(source, tmp_path / "build" / "model.onnx")


@pytest.mark.parametrize("name", ["cut_wire", "loop", "lose_output", "misspell_operator"])
@pytest.mark.parametrize("verify", ["fast", "full", "off"])
def test_passes_that_leave_no_valid_model(
    cli: Cli, tmp_path: Path, plugins: dict[str, str], name: str, verify: str
) -> None:
    """A bug that names the pass if the graph shows it; undone if running shows it, which verification is for."""
    source = save(mlp(), tmp_path / "model.onnx")
    options = [*recipe(tmp_path, "cleanup", name), "--verify", verify]
    done = cli("compile", source, "-o", "build", *options, env=plugins)
    if name in ("cut_wire", "loop"):
        refused(done, 70, name)
        nothing_left(tmp_path, "model.onnx", "recipe.toml")
        return
    assert done.code == 0, done.err
    manifest = whole(tmp_path / "build", valid=verify != "off")
    if verify == "off":
        assert name == "lose_output" or "Ad" in done.err
        return
    assert undone(manifest).keys() == {name}
    same_results(source, tmp_path / "build" / "model.onnx")


def test_a_wrong_pass_that_admits_to_change_results_fails_the_gate(
    cli: Cli, tmp_path: Path, plugins: dict[str, str]
) -> None:
    """It is named, but not undone: the user asked for it."""
    save(decoder(layers=1, cache=False), tmp_path / "model.onnx")
    options = recipe(tmp_path, "cleanup", "approximate_badly", "quantize_weights", gates="int4")
    done = cli("compile", "model.onnx", "-o", "build", *options, env=plugins)
    parts = refused(done, 4, "kl_mean", "approximate_badly")
    assert "approximate_badly" in parts["where"]
    nothing_left(tmp_path, "build.failed.json", "model.onnx", "recipe.toml")
    failed = json.loads((tmp_path / "build.failed.json").read_bytes())
    assert [gate["name"] for gate in failed["verify"]["gates"] if not gate["ok"]] == ["kl_mean"]


def test_a_pass_that_fails_is_a_bug_with_its_name(cli: Cli, tmp_path: Path, plugins: dict[str, str]) -> None:
    save(mlp(), tmp_path / "model.onnx")
    options = recipe(tmp_path, "cleanup", "crash")
    done = cli("compile", "model.onnx", "-o", "build", *options, env=plugins)
    parts = refused(done, 70, "crash", "ZeroDivisionError")
    assert "-v" in parts["to do"]
    nothing_left(tmp_path, "model.onnx", "recipe.toml")
    verbose = cli("compile", "model.onnx", "-o", "build", *options, "-v", env=plugins)
    assert verbose.code == 70
    assert "Traceback" in verbose.err
    assert "ZeroDivisionError" in verbose.err


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ({"passes": {"gone": "wrong_passes:Gone"}}, ["gone"]),
        ({"passes": {"gone": "no_such_module:Gone"}}, ["gone"]),
        ({"passes": {"cleanup": "wrong_passes:TakeName"}}, ["cleanup"]),
        ({"passes": {"text": "wrong_passes:__doc__"}}, ["text"]),
        ({"targets": {"text": "other_target:NOTHING"}}, ["text"]),
    ],
)
def test_plugins_that_are_broken(
    cli: Cli, tmp_path: Path, install: Install, groups: dict[str, dict[str, str]], names: list[str]
) -> None:
    save(mlp(), tmp_path / "model.onnx")
    done = cli("compile", "model.onnx", "-o", "build", "--recipe", "safe", env=install(**groups))
    refused(done, 2, *names)
    nothing_left(tmp_path, "model.onnx")


def test_passes_and_targets_of_other_people(cli: Cli, tmp_path: Path, install: Install) -> None:
    env = install(passes={"swap_gate": "wrong_passes:SwapGate"}, targets={"slow-cpu": "other_target:SLOW"})
    assert "swap_gate" in cli("passes", env=env).out
    assert "slow-cpu" in cli("targets", env=env).out
    save(mlp(), tmp_path / "model.onnx")
    arguments = ["compile", "model.onnx", "-o", "build", "--target", "slow-cpu"]
    refused(cli(*arguments, "--recipe", "int4-fast", env=env), 2, "slow-cpu", "4 bits", "8")
    done = cli(*arguments, "--recipe", "int8", env=env)
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["target"] == "slow-cpu"


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_too_few_bits_miss_the_gate(here: Cli, tmp_path: Path, tiny: Path, target: str) -> None:
    done = here("compile", tiny, "-o", "build", "--recipe", "int4-fast", "--target", target, *HOPELESS)
    parts = refused(done, 4, "kl_mean", "0.35")
    failed = json.loads((tmp_path / "build.failed.json").read_bytes())
    gate = next(gate for gate in failed["verify"]["gates"] if gate["name"] == "kl_mean")
    assert (gate["ok"], gate["limit"]) == (False, 0.35)
    assert gate["value"] > gate["limit"]
    assert str(gate["value"])[:4] in parts["what"]  # the figure itself, not only its name
    assert "build.failed.json" in parts["to do"]
    nothing_left(tmp_path, "build.failed.json")


def test_a_model_that_draws_random_numbers(here: Cli, tmp_path: Path) -> None:
    """No two runs agree, whatever the recipe: what to do is not to try others."""
    text = "agraph (float[64] x) => (float[64] y) { r = RandomNormalLike (x)  y = Add (x, r) }"
    save(from_text(text), tmp_path / "model.onnx")
    parts = refused(here("compile", "model.onnx", "-o", "build"), 4, "random numbers (RandomNormalLike)")
    assert "--verify off" in parts["to do"]


def test_a_missed_gate_leaves_the_old_artifact(here: Cli, tmp_path: Path, tiny: Path) -> None:
    assert here("compile", tiny, "-o", "build", "--verify", "off").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "build").iterdir()}
    refused(here("compile", tiny, "-o", "build", "--force", *HOPELESS), 4, "kl_mean")
    assert {path.name: path.read_bytes() for path in (tmp_path / "build").iterdir()} == before
    nothing_left(tmp_path, "build", "build.failed.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"), [("decoder", "ort-cpu"), ("mlp", "portable"), ("mlp", "ort-cpu"), ("qdq", "portable")]
)
def test_full_verification(here: Cli, tmp_path: Path, name: str, target: str) -> None:
    model = {"decoder": decoder, "mlp": mlp, "qdq": qdq}[name]()
    save(model, tmp_path / "model.onnx")
    done = here("compile", "model.onnx", "-o", "build", "--verify", "full", "--target", target)
    assert done.code == 0, done.err
    manifest = whole(tmp_path / "build")
    assert manifest["verify"]["level"] == "full"
    assert undone(manifest) == {}
    session(tmp_path / "build" / "model.onnx")


def test_verify_off_needs_no_runtime(cli: Cli, tmp_path: Path, environment: dict[str, str]) -> None:
    """It does not even import it: a compile server need not have it."""
    save(mlp(), tmp_path / "model.onnx")
    (tmp_path / "stub" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "stub" / "onnxruntime" / "__init__.py").write_text("raise ImportError('not here')")
    env = {**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path / "stub"), environment["PYTHONPATH"]])}
    for recipe_name in ("safe", "int4-fast"):
        done = cli("compile", "model.onnx", "-o", recipe_name, "--recipe", recipe_name, "--verify", "off", env=env)
        assert done.code == 0, done.err
        whole(tmp_path / recipe_name)
    refused(cli("compile", "model.onnx", "-o", "build", env=env), 5, "onnxruntime")
