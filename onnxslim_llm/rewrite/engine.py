"""Apply rules to a model until none of them fits any more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.rewrite.edit import Builder, inherit_metadata, remove_dead, replace_output
from onnxslim_llm.rewrite.matcher import Match, Matcher
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.rule import Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["apply_rules", "graph_output_ids"]

#: A set of rules that still finds work after so many sweeps undoes its own work.
MAX_SWEEPS = 64


def graph_output_ids(model: Model) -> set[int]:
    """Return the identities of all tensors that are an output of the top graph or of a subgraph."""
    return {id(t) for graph in model.graphs() for t in graph.outputs}


def apply_rules(model: Model, rules: Sequence[Rule]) -> Change:
    """Rewrite the model and its subgraphs with `rules`, in order of preference, up to the fixpoint.

    Returns:
        One site per rewrite, named after the root node's first output, and for rules that explain themselves the
        places where they nearly fitted. `detail["rules"]` counts the rewrites by rule.

    Raises:
        CompilerBug: The rules do not come to an end.
    """
    by_op: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        for op in rule.root_ops:
            by_op[op].append(rule)
    run = _Run(model, by_op)
    for _ in range(MAX_SWEEPS):
        if not run.sweep():
            return run.account()
    names = ", ".join(sorted(run.counts))
    raise CompilerBug(f"the rewrite rules do not come to an end after {MAX_SWEEPS} sweeps", where=names)


class _Run:
    """State of one application of a rule set."""

    def __init__(self, model: Model, by_op: dict[str, list[Rule]]) -> None:
        self.model = model
        self.by_op = by_op
        self.graph_outputs = graph_output_ids(model)
        self.matcher = Matcher(model.opset, self.graph_outputs)
        self.change = Change()
        self.counts: dict[str, int] = defaultdict(int)
        self.misses: dict[tuple[str, str], tuple[int, str]] = {}
        self._blocked: set[tuple[str, int]] = set()  # (rule, root) whose outputs cannot all be replaced
        self._removed: dict[int, gs.Node] = {}  # keeps removed nodes alive, so that their ids stay theirs

    def sweep(self) -> bool:
        """Try every rule at every node once; return whether anything changed."""
        self.misses.clear()
        before = len(self.change.sites)
        for graph in list(self.model.graphs()):
            for node in graph.nodes:
                node.home = graph
            fresh_before: dict[int, list[gs.Node]] = {}
            reordered = False
            for node in graph.nodes:
                if id(node) in self._removed:
                    continue
                for rule in self.by_op.get(node.op, ()):
                    match = self._match(rule, node)
                    if match is None:
                        continue
                    nodes = self._rewrite(rule, match, graph)
                    if nodes is not None:
                        fresh_before.setdefault(id(node), []).extend(nodes)
                        reordered |= len(match.outputs) > 1
                        break
            self._rebuild(graph, fresh_before, reordered)
        return len(self.change.sites) > before

    def _match(self, rule: Rule, node: gs.Node) -> Match | None:
        if (rule.name, id(node)) in self._blocked:
            return None
        match = self.matcher.find(rule.outputs, node, rule.keep_shared)
        where = node.outputs[0].name if node.outputs else node.name
        if match is None:
            stuck = self.matcher.stuck
            if rule.explain and stuck is not None and stuck.depth >= rule.near:
                self._missed(where, rule, stuck.depth, stuck.reason, stuck.culprit)
            return None
        refusal = rule.check(match)
        if refusal is not None:
            if rule.explain:
                self._missed(where, rule, len(match.nodes), refusal.reason, refusal.culprit)
            return None
        return match

    def _missed(self, where: str, rule: Rule, depth: int, reason: str, culprit: str) -> None:
        """Remember a near miss; of several rules with one name (spellings of one thing) the farthest counts."""
        key = (where, rule.name)
        if key not in self.misses or self.misses[key][0] < depth:
            self.misses[key] = (depth, f"{rule.name}: {reason} at '{culprit}'")

    def _rewrite(self, rule: Rule, match: Match, graph: gs.Graph) -> list[gs.Node] | None:
        builder = Builder(self.model, match.root.name or match.outputs[0].name)
        site = match.outputs[0].name
        result = rule.rewrite(builder, match)
        new = result if isinstance(result, tuple) else (result,)
        if len(new) != len(match.outputs):
            raise CompilerBug(f"{rule.name} returned {len(new)} tensors for {len(match.outputs)} outputs", where=site)
        matched = list(match.nodes.values())
        root = match.root
        for node in builder.nodes:
            node.home = graph
        done = self._replace(match.outputs, new, builder, root)
        if not all(done):
            self._blocked.add((rule.name, id(root)))
        if not any(done):
            remove_dead(builder.nodes, self.graph_outputs)
            return None
        inherit_metadata(root, match.outputs[0])
        for node in remove_dead(matched, self.graph_outputs):
            self._removed[id(node)] = node
        for node in builder.nodes if id(root) in self._removed and root.name else ():
            if any(tensor is match.outputs[0] for tensor in node.outputs):
                node.name = root.name  # compiling again gives the same names
        self.change.sites.append(site)
        self.counts[rule.name] += 1
        return builder.nodes

    def _replace(
        self, outputs: Sequence[gs.Variable], new: Sequence[gs.Tensor], builder: Builder, root: gs.Node
    ) -> list[bool]:
        done = []
        moved: dict[int, gs.Tensor] = {}  # new tensors whose place an old one took, for rules that return one twice
        for old, tensor in zip(outputs, new, strict=True):
            source = moved.get(id(tensor), tensor)
            produced = isinstance(source, gs.Variable) and bool(source.inputs)
            replaced = replace_output(old, source, builder.nodes, self.graph_outputs)
            if not replaced and root.op != "Identity":
                # A graph output that is a graph input, a constant or another output needs a node of its own.
                named = builder.Identity(source)
                builder.nodes[-1].home = root.home
                replaced = replace_output(old, named, builder.nodes, self.graph_outputs)
            done.append(replaced)
            if produced and not source.inputs:
                moved[id(tensor)] = old
        return done

    def _rebuild(self, graph: gs.Graph, fresh_before: dict[int, list[gs.Node]], reordered: bool) -> None:
        nodes: list[gs.Node] = []
        for node in graph.nodes:
            nodes.extend(n for n in fresh_before.get(id(node), ()) if id(n) not in self._removed)
            if id(node) not in self._removed:
                nodes.append(node)
        graph.nodes[:] = nodes
        if reordered:
            from onnxslim_llm.ir.topology import sort_nodes  # only fusions with several outputs need it

            sort_nodes(graph)

    def account(self) -> Change:
        """Return what was done; of several near misses at one place the farthest one is kept."""
        nearest: dict[str, tuple[int, str]] = {}
        for (where, _), found in self.misses.items():
            if where not in nearest or found[0] > nearest[where][0]:
                nearest[where] = found
        for where, (_, reason) in nearest.items():
            self.change.skip(where, reason)
        if self.counts:
            self.change.detail["rules"] = dict(sorted(self.counts.items()))
        return self.change
