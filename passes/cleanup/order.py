"""The order in which the cleanup passes run best."""

from __future__ import annotations

__all__ = ["CLEANUP"]

CLEANUP = (
    "raise_ir_version",  # old models could not hold the initializers that others make
    "lift_constants",  # early: everything else looks for initializers
    "remove_dead_code",  # before work is spent on what goes anyway; also sorts
    "deduplicate_initializers",  # before subexpressions: inputs are compared by identity
    "fold_constants",
    "fold_shapes",  # after folding: its targets may have been arithmetic on constants
    "simplify_algebra",
    "eliminate_common_subexpressions",
    "inline_branches",  # after shapes: that is where constant conditions come from
    "prune_subgraphs",
    "tie_weights",  # after folding: a transposed copy may have been a Transpose of a constant
)
