"""Random mask programs: whatever a proof says about one holds at sizes that the proof has never seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_models import CACHE, RANGES, attention_model, form_of

from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.passes.fuse.masks.axes import attention_axes
from onnxslim_llm.passes.fuse.masks.meaning import OPERATORS, Unclear
from onnxslim_llm.passes.fuse.masks.proof import Proven, prove_mask
from onnxslim_llm.rewrite.probe import Probe, make_probe

CONSTANTS = (0, 1, 2, 7, 33, 40, 600)

atoms = st.one_of(
    st.tuples(st.sampled_from(("after", "before", "below", "from", "at")), st.sampled_from(CONSTANTS)),
    st.just(("padding", 0)),
    st.just(("after", 0)),  # the causal mask, once more
)
programs = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(("And", "And", "Or", "Xor")), inner, inner), st.tuples(st.just("Not"), inner)
    ),
    max_leaves=4,
)


class Writer:
    """Writes a program as nodes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: set[int] = set()

    def write(self, program: tuple[Any, ...]) -> str:
        name = f"m{len(self.lines)}"
        kind = program[0]
        if kind in ("And", "Or", "Xor", "Not"):
            operands = [self.write(part) for part in program[1:]]
            name = f"m{len(self.lines)}"
            self.lines.append(f"{name} = {kind} ({', '.join(operands)})")
            return name
        number = int(program[1])
        self.constants.add(number)
        self.lines.append(
            {
                "after": f"{name}_s = Add (row, c{number}) {name} = LessOrEqual (column, {name}_s)",
                "before": f"{name}_s = Sub (row, c{number}) {name} = Greater (column, {name}_s)",
                "below": f"{name} = Less (column, c{number})",
                "from": f"{name} = GreaterOrEqual (column, c{number})",
                "at": f"{name} = Equal (row, c{number})",
                "padding": f"{name}_b = Cast <to = 9> (attention_mask) {name} = Unsqueeze ({name}_b, v12)",
            }[kind]
        )
        return name


def visible(reading: Any, queries: int, keys: int, padding: np.ndarray) -> np.ndarray:
    """What a meaning says, [B, S, T]."""
    distance = np.arange(queries)[:, None] + keys - queries - np.arange(keys)[None, :]
    band = np.ones_like(distance, dtype=bool)
    band &= (distance >= 0) | (not reading.causal)
    band &= (distance < reading.window) | (not reading.window)
    return band[None] & ((padding != 0)[:, None, :] if reading.padding else np.ones((1, 1, 1), bool))


@settings(max_examples=40)
@given(programs, st.integers(0, 2**32 - 1))
def test_what_is_proven_holds_everywhere(program: tuple[Any, ...], seed: int) -> None:
    writer = Writer()
    result = writer.write(program)
    constants = ", ".join(f"int64 c{n} = {{{n}}}" for n in sorted(writer.constants))
    nodes = f"{RANGES} {' '.join(writer.lines)} bias_0 = Where ({result}, f0, low) bias = Add (bias_0, square)"
    constants = f"{constants}{', ' if constants else ''}float[1, 1, 1, 1] square = {{0.0}}"
    model = attention_model(CACHE, nodes, constants=constants)
    values = infer_shapes(model)
    form, node = form_of(model)
    axes = attention_axes(values, node, form)
    assert not isinstance(axes, str)
    proven = prove_mask(model, values, axes, node.inputs[-1])
    assert isinstance(proven, (Proven, Unclear))
    if isinstance(proven, Unclear):
        return
    probe = make_probe(model, values, node.inputs[-1], OPERATORS)
    assert isinstance(probe, Probe)
    rng = np.random.default_rng(seed)
    for past_limit in (60, 700):
        queries, past = int(rng.integers(1, 50)), int(rng.integers(0, past_limit))
        keys = past + queries
        padding = rng.integers(0, 2, (2, keys))
        value = probe({"B": 2, "S": queries, "P": past, "T": keys}, {"attention_mask": padding})
        assert value is not None
        actual = np.broadcast_to(value.reshape(-1, *value.shape[-2:]), (2, queries, keys)) == 0
        expected = visible(proven.reading, queries, keys, padding)
        nothing = ~actual.any(axis=2) | ~expected.any(axis=2)
        free = nothing & (padding[:, past:] == 0)
        assert np.all((actual == expected).all(axis=2) | free), (program, proven.reading, queries, past)
