"""Leave out the tokens that a task does not need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.kept_tokens import KEPT_TOKENS, LEFT_OUT_LOGIT, KeptTokens
from onnxslim_llm.ir.metadata import set_metadata
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.prune.rows.select_job import selected
from onnxslim_llm.passes.prune.vocabulary.nearest_tokens import nearest_tokens, work_of
from onnxslim_llm.passes.prune.vocabulary.token_sites import (
    LogitSite,
    TokenTable,
    find_logits,
    find_table,
    other_reader,
)
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

__all__ = ["PruneVocabulary"]

#: Multiplications for finding the nearest tokens: beyond, half a minute of one thread.
_WORK = 3e12


@dataclass(frozen=True)
class PruneVocabulary(Pass):
    """Leave out the rows of tokens that a text does not have: in the embedding table and in the product of the logits.

    Programs go on with the tokenizer that there is: token ids stay what they were. An id that was left out stands for
    the kept token with the most similar embedding, and is never generated. Tables that are tied stay tied.

    Before:
        x = Gather (T[V, D], input_ids)
        logits = MatMul (h, W[D, V])
    After:
        x = Gather (T'[V', D], Gather (new_ids[V], input_ids))
        small = MatMul (h, W'[D, V'])
        logits = Add (Gather <axis = -1> (small, new_ids), left_out[V])

    Skips when:
        - no float table is looked up with ids from an input of the model, or it is quantized already;
        - the table or the weight of the logits is read elsewhere, too, is sparse, or may be replaced by the caller;
        - what comes between the product and the logits mixes them: then only the table is cut, unless it is tied;
        - fewer than `align` tokens could go.

    Attributes:
        keep: A file of token ids: a JSON list, .npy, or text with an id per line. By default the tokens of --calib
            are kept (all of it, not only what statistics are collected on).
        min_count: Tokens that occur less often are left out.
        special: Keep the tokens that tokenizer and configuration name, such as the one that ends a text.
        logits: "full": of all V tokens, -10000 for those that are left out, so that samplers and token ids stay what
            they are; "small": [..., V'] of the kept ones, by new ids (token_map.json says which).
        unknown: The id that stands for all ids that are left out; -1: the one with the nearest embedding.
        align: V' is rounded up to a multiple of this, with the tokens of the lowest ids: kernels work on whole vectors.
    """

    name: ClassVar[str] = "prune_vocabulary"
    group: ClassVar[str] = "prune"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.PRUNE

    keep: str = ""
    min_count: int = 1
    special: bool = True
    logits: Literal["full", "small"] = "full"
    unknown: int = -1
    align: int = 32

    def __post_init__(self) -> None:
        if self.min_count < 1 or self.align < 1:
            what = f"min_count = {self.min_count}, align = {self.align}: both start at 1"
            raise UsageError(what, where=self.name)
        if self.unknown < -1:
            raise UsageError(f"unknown = {self.unknown} is no token", where=self.name, todo="choose an id, or -1")

    def requires(self, model: Model, context: Context) -> None:
        """Check that something says which tokens are needed.

        Raises:
            UsageError: Nothing does.
        """
        if not self.keep and context.tokens is None:
            raise _no_text(self.name)

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the tokens; the rows are left out at save."""
        change = Change()
        infer_shapes(model)
        constants = Constants(model)
        table = find_table(model)
        if isinstance(table, str):
            change.skip("token ids", table)
            return change
        name = table.constant.name
        site = find_logits(model, constants, table.size)
        reason = self._reason(constants, table, site)
        if reason:
            change.skip(name, reason)
            return change
        if isinstance(site, str) and site:
            change.skip("logits", f"they stay of all tokens: {site}")
        kept = self._kept(table, context)
        if len(kept) >= table.size:
            change.skip(name, f"of {table.size} tokens, fewer than {self.align} could go")
            return change
        known = KeptTokens.of(table.size, kept, isinstance(site, LogitSite))
        self._cut(model, constants, table, site, known)
        set_metadata(model, KEPT_TOKENS, known.to_text())
        change.sites += list(dict.fromkeys([name, *([site.constant.name] if isinstance(site, LogitSite) else [])]))
        change.detail.update(tokens=[known.vocabulary, len(kept)], kept=[list(r) for r in known.ranges])
        infer_shapes(model)
        return change

    def _reason(self, constants: Constants, table: TokenTable, site: LogitSite | str) -> str:
        """Return why nothing can be left out."""
        nodes = {id(node) for node in table.lookups}
        if isinstance(site, LogitSite):
            nodes.add(id(site.node))
        tied = isinstance(site, LogitSite) and site.constant is table.constant
        for constant in (table.constant, *([site.constant] if isinstance(site, LogitSite) else [])):
            reason = constants.matrix_reason(constant)
            if reason and not reason.endswith("for several uses"):
                return reason
            other = other_reader(constant, lambda node: id(node) in nodes)
            if other:
                return f"{other} reads it, too" if tied or constant is table.constant else f"{other} reads the logits'"
        return ""

    def _kept(self, table: TokenTable, context: Context) -> NDArray[np.int64]:
        """Return the ids that stay, ascending."""
        size = table.size
        wanted = np.zeros(size, np.bool_)
        if self.keep:
            ids = _read_ids(self.keep)
            if not ids.size or int(ids.min()) < 0 or int(ids.max()) >= size:
                what = f"the ids in '{self.keep}' are not all of the model's {size} tokens"
                raise UsageError(what, where=f"{self.name}.keep", todo="give at least one id, from 0 on")
            wanted[ids] = True
        else:
            assert context.tokens is not None
            counts = context.tokens.counts(table.source, size)
            if counts is None:
                raise _no_text(self.name)
            wanted = counts >= self.min_count
        if self.special and context.tokens is not None:
            wanted[[token for token in context.tokens.special() if token < size]] = True
        if self.unknown >= size:
            what = f"unknown = {self.unknown} is no token: there are {size}"
            raise UsageError(what, where=self.name, todo="choose a smaller id, or -1")
        if self.unknown >= 0:
            wanted[self.unknown] = True
        others = np.flatnonzero(~wanted)
        missing = max(-int(wanted.sum()) % self.align, int(not wanted.any()))
        wanted[others[:missing]] = True
        return np.flatnonzero(wanted).astype(np.int64)

    def _cut(
        self, model: Model, constants: Constants, table: TokenTable, site: LogitSite | str, known: KeptTokens
    ) -> None:
        source = weight_of(table.constant)
        if self.unknown >= 0:
            new_ids = np.where(known.new_ids >= 0, known.new_ids, known.new_ids[self.unknown])
        elif work_of(table.size, len(known.ids), source.shape[1]) > _WORK:
            what = f"{table.size} embeddings are too many to look for the nearest ones"
            raise UsageError(what, where=self.name, todo="set unknown to the id that stands for what is left out")
        else:
            new_ids = nearest_tokens(source.view(), known.ids)
        op = Builder(model, "kept_tokens")
        places = op.constant(new_ids.astype(np.int32), "new_token_ids")
        for node in table.lookups:
            node.inputs[1] = op.Gather(places, node.inputs[1], axis=0)
        _put_before(model, table.lookups, op.nodes)
        table.constant.values = selected(source, 0, known.ids, table.constant.name)
        for node in table.constant.outputs:
            for tensor in node.outputs:
                tensor.shape = None
        if isinstance(site, LogitSite):
            if site.constant is not table.constant:
                weight = weight_of(site.constant)
                site.constant.values = selected(weight, site.axis, known.ids, site.constant.name)
            for reader, index in site.vectors:
                tensor = reader.inputs[index]
                weight = weight_of(tensor)
                constants.put(reader, index, selected(weight, len(weight.shape) - 1, known.ids, tensor.name))
            for tensor in site.tensors:
                tensor.shape = None
            if self.logits == "full":
                _spread(model, site.output, places, known)


def _put_before(model: Model, readers: list[gs.Node], nodes: list[gs.Node]) -> None:
    """Put nodes, each the source of the reader in its place, right before it."""
    graph = model.graph
    for reader, node in zip(readers, nodes, strict=True):
        at = next(i for i, other in enumerate(graph.nodes) if other is reader)
        graph.nodes.insert(at, node)


def _spread(model: Model, output: Any, places: gs.Constant, known: KeptTokens) -> None:
    """Make logits of all tokens out of those of the kept ones; the output keeps its name."""
    producer = output.inputs[0]
    slot = next(i for i, tensor in enumerate(producer.outputs) if tensor is output)
    small = gs.Variable(model.fresh_name(f"{output.name}_kept"), output.dtype)
    producer.outputs[slot] = small
    kind = np.dtype(output.dtype if output.dtype is not None else np.float32)
    left_out = np.where(known.new_ids >= 0, 0, LEFT_OUT_LOGIT).astype(kind)
    op = Builder(model, "all_tokens")
    spread = op.Gather(small, places, axis=-1)
    op.Add(spread, op.constant(left_out, "left_out_tokens"))
    op.nodes[-1].outputs[0] = output
    at = next(i for i, other in enumerate(model.graph.nodes) if other is producer)
    model.graph.nodes[at + 1 : at + 1] = op.nodes


def _read_ids(path: str) -> NDArray[np.int64]:
    """Return the ids in a file.

    Raises:
        UsageError: It cannot be read, or holds no ids.
    """
    file = Path(path)
    try:
        if file.suffix == ".npy":
            found = np.load(file)
        else:
            text = file.read_text(encoding="utf-8")
            found = np.asarray(json.loads(text) if text.lstrip().startswith("[") else text.split())
        ids: NDArray[np.int64] = found.reshape(-1).astype(np.int64)
        if found.size and found.dtype.kind == "f":
            raise ValueError("they are no integers")
        return ids
    except (OSError, ValueError, TypeError, AttributeError, EOFError, OverflowError) as error:
        todo = "give a JSON list, .npy, or text with an id per line"
        raise UsageError(f"the token ids cannot be read: {error}", where=path, todo=todo) from error


def _no_text(name: str) -> UsageError:
    what = "nothing says which tokens are needed"
    return UsageError(what, where=name, todo=f"give --calib FILE with text of the task, or {name}.keep=FILE of ids")
