"""A model as a differentiable function of its inputs and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.errors import ModelError, SlimError, UsageError, did_you_mean
from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.plan import Plan, Step, make_plan, refusals
from onnxslim_llm.gradients.rule import Call, Rule
from onnxslim_llm.gradients.tensors import as_tensor
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from torch import Tensor

    from onnxslim_llm.ir.model import Model

__all__ = ["Executor", "unsupported"]

_Environment = dict[int, Any]


class Executor:
    """Runs a model's graph in torch; gradients flow to whatever tensors were handed in with `requires_grad`.

    16-bit floats are computed in float32. Weights of float32 are not copied: they are the mapped file. The model must
    not change while it is in use; make another executor after a pass has changed it.

    Args:
        model: The model, at any point between two passes.
        rules: Other rules for single nodes, by the node's identity.

    Raises:
        ResourceError: Torch is not installed (when this module is imported).
    """

    def __init__(self, model: Model, rules: Mapping[int, Rule] | None = None) -> None:
        self._graph = model.graph
        self._rules = dict(rules or {})
        sort_nodes(self._graph)
        self._functions = {(normal_domain(f.domain), f.name): f for f in model.functions}
        self._opsets = {normal_domain(i.domain): int(i.version) for i in model.graph.import_domains or []}
        self._opsets.setdefault("", model.opset() or 1)
        self._named = _tensors(self._graph)
        self._weights: dict[int, Any] = {}
        self._plans: dict[tuple[frozenset[str], tuple[str, ...]], Plan] = {}

    @property
    def inputs(self) -> list[str]:
        """Names of the graph's inputs."""
        return [tensor.name for tensor in self._graph.inputs]

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [tensor.name for tensor in self._graph.outputs]

    @property
    def weights(self) -> list[str]:
        """Names of the initializers of floats, in the order in which nodes read them."""
        constants = [(name, tensor) for name, tensor in self._named.items() if isinstance(tensor, gs.Constant)]
        return [name for name, tensor in constants if self._constant(tensor).is_floating_point()]

    def weight(self, name: str) -> Tensor:
        """Return an initializer's content; floats of 16 bits as float32. Not to be written into.

        Raises:
            UsageError: There is none of this name.
        """
        tensor = self._named.get(name)
        if not isinstance(tensor, gs.Constant):
            constants = [n for n, t in self._named.items() if isinstance(t, gs.Constant)]
            raise UsageError(f"there is no initializer '{name}'", todo=did_you_mean(name, constants))
        return self._constant(tensor)

    def run(
        self,
        feeds: Mapping[str, NDArray[Any] | Tensor],
        values: Mapping[str, Tensor] | None = None,
        outputs: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Compute outputs, or any other tensors of the top graph, from inputs, or any other tensors of it.

        Args:
            feeds: By name: the inputs that are needed. The name of a tensor in the middle of the graph cuts it there.
            values: By name: what replaces initializers (or other tensors) for this run. Codes of quantized weights may
                be floats.
            outputs: Names of the wanted tensors; default: all outputs of the graph.

        Returns:
            The wanted tensors by name.

        Raises:
            ModelError: An operator has no rule, or fails; the node is named.
            UsageError: An input is missing, or a name is unknown.
        """
        wanted = tuple(self.outputs if outputs is None else outputs)
        given = {name: as_tensor(array) for name, array in {**feeds, **(values or {})}.items()}
        plan = self._plan(frozenset(given), wanted)
        environment: _Environment = {id(self._named[name]): tensor for name, tensor in given.items()}
        self._execute(plan, environment)
        return {name: self._read(self._named[name], environment) for name in wanted}

    def unsupported(self, outputs: Iterable[str] | None = None) -> list[tuple[str, str]]:
        """Return (node, operator) for everything on the way to the outputs that has no rule."""
        wanted = tuple(self.outputs if outputs is None else outputs)
        return list(refusals(self._planned(frozenset(self.inputs), wanted)))

    def _plan(self, given: frozenset[str], wanted: tuple[str, ...]) -> Plan:
        known = (given, wanted) in self._plans
        plan = self._planned(given, wanted)
        if not known:
            for where, op in refusals(plan):
                raise ModelError(f"{op} has no rule for gradients", where=f"node '{where}'")
        return plan

    def _planned(self, given: frozenset[str], wanted: tuple[str, ...]) -> Plan:
        key = (given, wanted)
        if key not in self._plans:
            for name in (*given, *wanted):
                if name not in self._named:
                    raise UsageError(f"there is no tensor '{name}'", todo=did_you_mean(name, self._named))
            ids = {id(self._named[name]) for name in given}
            ends = [self._named[name] for name in wanted]
            self._plans[key] = make_plan(self._graph.nodes, (), ends, ids, self._functions, self._opsets)
        return self._plans[key]

    def _execute(self, plan: Plan, environment: _Environment) -> None:
        for step in plan.steps:
            results = self._results(step, environment)
            for tensor, result in zip(step.node.outputs, results, strict=False):
                environment.setdefault(id(tensor), result)  # what was given stays
            for gone in step.last:
                environment.pop(gone, None)

    def _results(self, step: Step, environment: _Environment) -> list[Any]:
        if step.branches is not None:
            chosen = step.branches[0 if self._read(step.node.inputs[0], environment).item() else 1]
            inner = dict(environment)
            self._execute(chosen, inner)
            return [self._read(tensor, inner) for tensor in chosen.outputs]
        inputs = [None if t.is_empty() else self._read(t, environment) for t in step.node.inputs]
        rule = self._rules.get(id(step.node), step.rule)
        if step.body is not None and rule is None:
            inner = {id(formal): actual for formal, actual in zip(step.body.inputs, inputs, strict=False)}
            self._execute(step.body, inner)
            return [self._read(tensor, inner) for tensor in step.body.outputs]
        assert rule is not None
        call = Call(step.node.op, step.where, step.opset, inputs, step.attributes, len(step.node.outputs), step.types)
        try:
            results = rule(call)
        except SlimError as error:
            error.where = error.where or f"node '{step.where}'"
            raise
        except NotImplementedError as error:
            raise ModelError(f"{step.node.op} with {error} has no rule", where=f"node '{step.where}'") from error
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            what = f"{step.node.op} cannot be computed: {str(error).splitlines()[0]}"
            raise ModelError(
                what, where=f"node '{step.where}'", todo="does the model run with these inputs?"
            ) from error
        return [results] if isinstance(results, torch.Tensor) else list(results)

    def _read(self, tensor: gs.Tensor, environment: _Environment) -> Any:
        if id(tensor) in environment:
            return environment[id(tensor)]
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor)
        raise UsageError(f"the input '{tensor.name}' is needed and was not given")

    def _constant(self, tensor: gs.Constant) -> Any:
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = as_tensor(weight_of(tensor).view())
        return self._weights[id(tensor)]


def unsupported(model: Model) -> list[tuple[str, str]]:
    """Return (node, operator) for everything on the way to a model's outputs that gradients cannot pass."""
    return Executor(model).unsupported()


def _tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Return all tensors of a graph by name, without those of its subgraphs."""
    found = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    for node in graph.nodes:
        found.update((tensor.name, tensor) for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty())
    return found
