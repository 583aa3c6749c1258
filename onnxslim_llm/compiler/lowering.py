"""What runs after the recipe: the passes that make the artifact one for its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Literal

from onnx import defs

from onnxslim_llm.errors import UsageError
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.rewrite.registry import make_pass
from onnxslim_llm.targets import Target

__all__ = ["KvCache", "check_opset", "in_order", "intake_passes", "lowering_passes"]

KvCache = Literal["separate", "shared", "int8"]
_CONTRIB_DOMAIN = "com.microsoft"
_OPSET = "opset"
_SHARING = "deduplicate_initializers"


def intake_passes(target: Target) -> list[Pass]:
    """Return what runs before the recipe: few-bit weights become concepts, so that fusions see types through them.

    The target's lowering begins with the same pass, for weights that the recipe's cleanup brings to light.
    """
    return [step for step in Pipeline(target.lowering).passes[:1] if step.name == "raise_block_weights"]


def lowering_passes(target: Target, kv_cache: KvCache, opset: int | None) -> list[Pass]:
    """Return the target's lowering, with what the user asked for.

    Args:
        target: Where the artifact will run.
        kv_cache: "shared" and "int8" make the cache one that is extended in place, before anything else is lowered.
        opset: The model is converted to this version of ai.onnx first, and passes that would choose one keep to it.

    Raises:
        UsageError: The target cannot do that.
    """
    wanted = _cache_passes(target, kv_cache)
    lowering = list(Pipeline(target.lowering).passes)
    if opset is None:
        return [*wanted, *lowering]
    lowering = [
        replace(step, **{_OPSET: opset}) if any(f.name == _OPSET for f in fields(step)) else step for step in lowering
    ]
    return [make_pass("convert_opset", {"version": opset}), *wanted, *lowering]


def in_order(recipe: Sequence[Pass], lowering: Sequence[Pass]) -> list[Pass]:
    """Return a recipe's passes and the lowering in the order in which a compile runs them.

    What works on the target's operators comes last, before the lowering's final sharing of equal initializers.
    """
    early = [step for step in recipe if not step.after_lowering]
    late = [step for step in recipe if step.after_lowering]
    end = len(lowering) - (bool(late) and bool(lowering) and lowering[-1].name == _SHARING)
    return [*early, *lowering[:end], *late, *lowering[end:]]


def check_opset(target: Target, opset: int | None, have: int | None = None) -> None:
    """Check a wanted version of ai.onnx before work is spent.

    Args:
        target: Where the artifact will run.
        opset: The wanted version; None is always fine.
        have: The model's own, once it is known.

    Raises:
        UsageError: The target does not take it, the installed onnx does not know it, or the model's is newer.
    """
    if opset is None:
        return
    target.check_opset(opset)
    known = defs.onnx_opset_version()
    if opset > known:
        todo = f"choose at most {known}, or update onnx"
        raise UsageError(f"the installed onnx knows opsets up to {known}, not {opset}", where="--opset", todo=todo)
    if have is not None and have > opset:
        what = f"the model has opset {have}: it cannot be converted down to {opset}"
        raise UsageError(what, where="--opset", todo=f"choose {have} or more")


def _cache_passes(target: Target, kv_cache: KvCache) -> list[Pass]:
    """Return the passes that make the KV cache what was asked for."""
    if kv_cache == "separate":
        return []
    if _CONTRIB_DOMAIN not in target.domains:
        todo = "use --target ort-cpu, or --kv-cache separate"
        raise UsageError(
            f"target '{target.name}' has no operator that extends a cache in place", where="--kv-cache", todo=todo
        )
    return [make_pass("lower_kv_cache", {"cache": kv_cache})]
