"""Masks as exporters write them, what they are found to mean, and near misses that stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
from mask_models import (
    ATOL,
    CACHE,
    CAUSAL,
    CROSS,
    NO_CACHE,
    PADDING,
    RANGES,
    SHORT_RANGES,
    assert_equal_rows,
    attention_model,
    feeds_for,
    flags,
    form_of,
    session,
    simplify,
)

from onnxslim_llm.concepts.attention import AttentionForm, is_attention
from onnxslim_llm.ir.model import Model
from onnxslim_llm.rewrite.edit import Builder

BIAS_2D = "bias_2d = Where (seen, f0, low) bias = Unsqueeze (bias_2d, v01)"
BIAS_4D = "bias = Where (seen, f0, low)"
WINDOW = "oldest = Sub (row, window) near = Greater (column, oldest)"


def simplified(model: Model, **comparison: int) -> Model:
    before = model.copy()
    assert simplify(model)
    assert_equal_rows(before, model, **comparison)
    return model


def reason_of(model: Model) -> str:
    change = simplify(model)
    assert not change
    (skip,) = change.skipped
    return skip.reason


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes if not is_attention(node)]


def test_causal_mask_becomes_a_flag() -> None:
    model = simplified(
        attention_model(CACHE, f"{RANGES} {CAUSAL} seen = Identity (causal) {BIAS_2D}", mask=""), every=True
    )
    assert flags(model) == AttentionForm(causal=True)
    assert ops(model) == []


def test_causal_and_padding_leave_three_nodes() -> None:
    model = simplified(attention_model(CACHE, f"{RANGES} {CAUSAL} {PADDING} seen = And (causal, padding) {BIAS_4D}"))
    assert flags(model) == AttentionForm(causal=True, bias=True)
    assert ops(model) == ["Cast", "Where", "Unsqueeze"]


@pytest.mark.parametrize(
    ("test", "op"), [("Cast <to = 9> (attention_mask)", "Cast"), ("Greater (attention_mask, i0)", "Greater")]
)
def test_what_odd_entries_mean_is_kept(test: str, op: str) -> None:
    """Only 0 and 1 are ever fed; -1 and 2 still mean afterwards what they meant before."""
    nodes = f"{RANGES} {CAUSAL} padding_2d = {test} padding = Unsqueeze (padding_2d, v12) seen = And (causal, padding)"
    model = attention_model(CACHE, f"{nodes} {BIAS_4D}")
    before = model.copy()
    assert simplify(model)
    assert ops(model) == [op, "Where", "Unsqueeze"]
    feeds = feeds_for(before, {"B": 1, "S": 3, "P": 1, "T": 4}, np.array([[1, 2, -1, 1]]))
    np.testing.assert_allclose(session(model).run(None, feeds)[0], session(before).run(None, feeds)[0], atol=ATOL)


def test_layers_share_the_bias() -> None:
    model = attention_model(CACHE, f"{RANGES} {CAUSAL} {PADDING} seen = And (causal, padding) {BIAS_4D}")
    (first,) = [node for node in model.graph.nodes if is_attention(node)]
    op = Builder(model, "second")
    second = op.call(first.domain, first.op, first.outputs[0], *list(first.inputs)[1:], **first.attrs)
    second.dtype, second.shape = np.dtype(np.float32), ["B", "S", 8]
    model.graph.nodes += op.nodes
    model.graph.outputs.append(second)
    before = model.copy()
    assert simplify(model)
    assert_equal_rows(before, model)
    assert ops(model) == ["Cast", "Where", "Unsqueeze"]


def test_sums_of_lowest_floats() -> None:
    """Two masks added: keys hidden by both get -inf, and rows of padding stay finite."""
    nodes = f"""{RANGES} {CAUSAL} {PADDING}
        causal_bias = Where (causal, f0, low)
        padding_bias = Where (padding, f0, low)
        bias = Add (causal_bias, padding_bias)"""
    model = simplified(attention_model(CACHE, nodes))
    assert flags(model) == AttentionForm(causal=True, bias=True)
    assert ops(model) == ["Cast", "Where", "Unsqueeze"]


def test_minus_infinity_becomes_the_lowest_float() -> None:
    """Left padding: the source has NaN in rows of padding; the result has none."""
    nodes = f"{RANGES} {CAUSAL} {PADDING} seen = And (causal, padding) bias = Where (seen, f0, inf)"
    model = attention_model(CACHE, nodes, constants="float inf = {-inf}")
    assert simplify(model)
    feeds = {
        "q": np.ones((1, 3, 8), np.float32),
        "k": np.ones((1, 3, 8), np.float32),
        "v": np.ones((1, 3, 8), np.float32),
        "past_key": np.zeros((1, 2, 0, 4), np.float32),
        "past_value": np.zeros((1, 2, 0, 4), np.float32),
        "attention_mask": np.array([[0, 1, 1]]),
    }
    assert np.all(np.isfinite(session(model).run(None, feeds)[0]))


def test_rows_of_zeros_stay_exact() -> None:
    nodes = f"{RANGES} {CAUSAL} {PADDING} seen = And (causal, padding) bias = Where (seen, f0, inf)"
    model = attention_model(CACHE, nodes, constants="float inf = {-inf}", zero_rows=True)
    simplified(model, every=True)


def test_sliding_window() -> None:
    nodes = f"{RANGES} {CAUSAL} {WINDOW} seen = And (causal, near) {BIAS_2D}"
    model = simplified(attention_model(CACHE, nodes, mask="", constants="int64 window = {4}"), every=True)
    assert flags(model) == AttentionForm(causal=True, window=True)
    assert form_of(model)[1].attrs["window"] == 4


@pytest.mark.parametrize("size", [2, 3, 31, 33, 128, 4096, 4097])
def test_sliding_windows_of_all_sizes(size: int) -> None:
    nodes = f"{RANGES} {CAUSAL} {WINDOW} {PADDING} band = And (causal, near) seen = And (band, padding) {BIAS_4D}"
    model = attention_model(CACHE, nodes, constants=f"int64 window = {{{size}}}")
    before = model.copy()
    assert simplify(model)
    if size < 32:
        assert_equal_rows(before, model, window=size)
    assert flags(model) == AttentionForm(causal=True, window=True, bias=True)
    assert form_of(model)[1].attrs["window"] == size


def test_a_window_that_counts_without_the_query() -> None:
    nodes = f"{RANGES} {CAUSAL} {WINDOW} seen = And (causal, near) {BIAS_2D}".replace("Greater", "GreaterOrEqual")
    model = attention_model(CACHE, nodes, mask="", constants="int64 window = {4096}")
    assert simplify(model)
    assert form_of(model)[1].attrs["window"] == 4097


def test_a_window_as_a_band_of_a_triangle() -> None:
    """Without a cache, the upper triangle from a diagonal far below on is a window."""
    nodes = f"""{SHORT_RANGES} {CAUSAL} ones = Cast <to = 6> (causal) band = Trilu <upper = 1> (ones, far)
        seen = Cast <to = 9> (band) {BIAS_2D}"""
    model = attention_model(NO_CACHE, nodes, mask="", constants="int64 far = {-700}")
    assert simplify(model)
    assert form_of(model)[1].attrs["window"] == 701


def test_a_window_in_floats() -> None:
    nodes = f"""{RANGES} {CAUSAL} distance = Sub (row, column) distance_f = Cast <to = 1> (distance)
        near = Less (distance_f, width) seen = And (causal, near) {BIAS_2D}"""
    model = attention_model(CACHE, nodes, mask="", constants="float width = {600.0}")
    assert simplify(model)
    assert form_of(model)[1].attrs["window"] == 600


def test_a_window_meets_one_that_is_there() -> None:
    nodes = f"{RANGES} {CAUSAL} {WINDOW} seen = And (causal, near) {BIAS_2D}"
    model = attention_model(CACHE, nodes, mask="", constants="int64 window = {4}", window_size=2)
    assert form_of(simplified(model, every=True))[1].attrs["window"] == 2


def test_a_constant_table_is_a_causal_mask() -> None:
    """Old GPT-2: a triangle of booleans, cut out by the lengths."""
    table = ", ".join(str(int(j <= i)) for i in range(16) for j in range(16))
    nodes = """
        past_shape = Shape <start = 2, end = 3> (past_key)
        q_shape = Shape <start = 1, end = 2> (q)
        t = Add (past_shape, q_shape)
        rows = Slice (triangle, past_shape, t, v0)
        cut = Slice (rows, v0, t, v1)
        seen = Cast <to = 9> (cut)
        bias_2d = Where (seen, f0, low)
        bias = Unsqueeze (bias_2d, v01)"""
    constant = f"int64[16, 16] triangle = {{{table}}}"
    model = simplified(attention_model(CACHE, nodes, mask="", constants=constant), every=True)
    assert flags(model) == AttentionForm(causal=True)


def test_a_table_with_one_wrong_entry() -> None:
    table = [int(j <= i) for i in range(16) for j in range(16)]
    table[15 * 16 + 2] = 0
    nodes = """
        q_shape = Shape <start = 1, end = 2> (q)
        rows = Slice (triangle, v0, q_shape, v0)
        cut = Slice (rows, v0, q_shape, v1)
        seen = Cast <to = 9> (cut)
        bias_2d = Where (seen, f0, low)
        bias = Unsqueeze (bias_2d, v01)"""
    constant = f"int64[16, 16] triangle = {{{', '.join(map(str, table))}}}"
    assert "no causal, sliding or padding mask" in reason_of(
        attention_model(NO_CACHE, nodes, mask="", constants=constant)
    )


def test_encoder_mask_is_not_expanded() -> None:
    nodes = f"""{PADDING}
        q_shape = Shape <start = 1, end = 2> (q)
        b_shape = Shape <start = 0, end = 1> (attention_mask)
        whole = Concat <axis = 0> (b_shape, v1, q_shape, q_shape)
        seen = Expand (padding, whole)
        {BIAS_4D}"""
    model = attention_model(NO_CACHE, nodes, mask="int64[B, S] attention_mask")
    before = model.copy()
    assert simplify(model)
    assert flags(model) == AttentionForm(bias=True)
    assert ops(model) == ["Cast", "Where", "Unsqueeze"]
    assert_equal_rows(before, model, past=False, every=True)


def test_a_mask_that_hides_nothing_goes() -> None:
    nodes = """
        q_shape = Shape <start = 1, end = 2> (q)
        whole = Concat <axis = 0> (v1, v1, q_shape, q_shape)
        bias = Expand (f0, whole)"""
    model = simplified(attention_model(NO_CACHE, nodes, mask=""), past=False, every=True)
    assert flags(model) == AttentionForm()
    assert ops(model) == []


def test_cross_attention_keeps_the_padding_of_the_encoder() -> None:
    nodes = f"""{PADDING}
        q_shape = Shape <start = 1, end = 2> (q)
        e_shape = Shape <start = 1, end = 2> (k)
        b_shape = Shape <start = 0, end = 1> (attention_mask)
        whole = Concat <axis = 0> (b_shape, v1, q_shape, e_shape)
        seen = Expand (padding, whole)
        {BIAS_4D}"""
    model = attention_model(CROSS, nodes, mask="int64[B, E] attention_mask")
    simplified(model, past=False, cross=True, every=True)
    assert flags(model) == AttentionForm(bias=True)
    assert ops(model) == ["Cast", "Where", "Unsqueeze"]


def test_alibi_stays_without_the_causal_part() -> None:
    nodes = f"""{RANGES} {CAUSAL} {PADDING}
        column_f = Cast <to = 1> (column)
        alibi = Mul (column_f, slopes)
        seen = And (causal, padding)
        mask = Where (seen, f0, low)
        bias = Add (alibi, mask)"""
    constant = "float[1, 2, 1, 1] slopes = {0.5, 0.25}"
    model = simplified(attention_model(CACHE, nodes, constants=constant))
    assert flags(model) == AttentionForm(causal=True, bias=True)
    assert "LessOrEqual" not in ops(model)


def test_a_choice_between_a_bias_and_the_lowest_float() -> None:
    """MPT and Falcon: masked_fill on the positional bias."""
    nodes = f"""{RANGES} {CAUSAL}
        column_f = Cast <to = 1> (column)
        alibi = Mul (column_f, slopes)
        bias = Where (causal, alibi, low)"""
    constant = "float[1, 2, 1, 1] slopes = {0.5, 0.25}"
    model = simplified(attention_model(CACHE, nodes, mask="", constants=constant), every=True)
    assert flags(model) == AttentionForm(causal=True, bias=True)
    assert "Where" not in ops(model)


def test_a_batch_that_is_read_off_something_else() -> None:
    """The shape of another input is asked for its batch; its length has nothing to do with the mask."""
    nodes = f"""{RANGES} {CAUSAL}
        other_shape = Shape (other)
        b_shape = Gather (other_shape, v0)
        t_1d = Reshape (t, last)
        whole = Concat <axis = 0> (b_shape, v1, q_shape, t_1d)
        seen = Expand (causal, whole)
        {BIAS_4D}"""
    model = attention_model(CACHE, nodes, mask="int64[B, L] other")
    assert simplify(model)
    assert flags(model) == AttentionForm(causal=True)


def test_a_length_that_is_read_off_something_else() -> None:
    nodes = f"""{RANGES} {CAUSAL}
        other_shape = Shape (other)
        length = Gather (other_shape, i1)
        near = Less (column, length)
        seen = And (causal, near)
        {BIAS_2D}"""
    assert "no causal, sliding" in reason_of(attention_model(CACHE, nodes, mask="int64[B, L] other"))


def test_float_masks_of_encoders() -> None:
    """1 - mask, filled with the lowest float: only 1 leaves a key visible."""
    nodes = """
        mask_4d = Unsqueeze (attention_mask, v12)
        q_shape = Shape <start = 1, end = 2> (q)
        b_shape = Shape <start = 0, end = 1> (q)
        whole = Concat <axis = 0> (b_shape, v1, q_shape, q_shape)
        wide = Expand (mask_4d, whole)
        mask_f = Cast <to = 1> (wide)
        inverted = Sub (f1, mask_f)
        hidden = Cast <to = 9> (inverted)
        bias = Where (hidden, low, inverted)"""
    model = attention_model(NO_CACHE, nodes, mask="int64[B, S] attention_mask")
    before = model.copy()
    assert simplify(model)
    assert ops(model) == ["Equal", "Where", "Unsqueeze"]
    assert_equal_rows(before, model, past=False, every=True)


def test_rows_that_see_nothing_may_be_opened() -> None:
    """Exporters that give a row of padding everything to look at, so that it is not NaN."""
    nodes = f"""{RANGES} {CAUSAL} {PADDING}
        seen_0 = And (causal, padding)
        mask = Where (seen_0, f0, low)
        best = ReduceMax <keepdims = 1> (mask, last)
        empty = Equal (best, low)
        bias = Where (empty, f0, mask)"""
    model = simplified(attention_model(CACHE, nodes))
    assert flags(model) == AttentionForm(causal=True, bias=True)


NEAR_MISSES = {
    "one distance is hidden, in floats": (
        f"""{RANGES} {CAUSAL} distance = Sub (row, column) distance_f = Cast <to = 1> (distance)
        there = Equal (distance_f, width) elsewhere = Not (there) seen = And (causal, elsewhere) {BIAS_2D}""",
        "",
        "float width = {600.0}",
        "no causal, sliding or padding mask",
    ),
    "a band that begins far away": (
        f"""{RANGES} {CAUSAL} ones = Cast <to = 6> (causal) band = Trilu <upper = 0> (ones, far)
        band_b = Cast <to = 9> (band) seen = And (causal, band_b) {BIAS_2D}""",
        "",
        "int64 far = {-700}",
        "no causal, sliding or padding mask",
    ),
    "bidirectional window": (
        f"{RANGES} {WINDOW} late = Add (row, window) early = Less (column, late) seen = And (near, early) {BIAS_2D}",
        "",
        "int64 window = {3}",
        "no causal, sliding or padding mask",
    ),
    "blocks": (
        f"{RANGES} a = Div (row, window) b = Div (column, window) seen = Equal (a, b) {BIAS_2D}",
        "",
        "int64 window = {4}",
        "it depends on Div",
    ),
    "products of positions": (
        f"{RANGES} square = Mul (row, column) seen = LessOrEqual (square, i1) {BIAS_2D}",
        "",
        "",
        "it multiplies positions",
    ),
    "position ids": (
        f"""{RANGES} ids = Unsqueeze (position_ids, last) seen_3d = LessOrEqual (column, ids)
        seen = Unsqueeze (seen_3d, v1) {BIAS_4D}""",
        "int64[B, S] position_ids",
        "",
        "'position_ids' is no padding mask",
    ),
    "a second mask": (
        f"""{RANGES} {CAUSAL} {PADDING} other_2d = Cast <to = 9> (other) other_4d = Unsqueeze (other_2d, v12)
        both = And (padding, other_4d) seen = And (causal, both) {BIAS_4D}""",
        "int64[B, T] attention_mask, int64[B, T] other",
        "",
        "it depends on 'attention_mask' and 'other'",
    ),
    "a weak mask": (
        f"{RANGES} {CAUSAL} bias_2d = Where (causal, f0, weak) bias = Unsqueeze (bias_2d, v01)",
        "",
        "float weak = {-10.0}",
        "neither 0 nor far below",
    ),
    "one position is hidden": (
        f"{RANGES} {CAUSAL} far = Equal (column, place) not_far = Not (far) seen = And (causal, not_far) {BIAS_2D}",
        "",
        "int64 place = {300}",
        "no causal, sliding or padding mask",
    ),
    "causal from the first key": (
        f"{RANGES} n = Range (i0, s, i1) n_row = Unsqueeze (n, last) seen = LessOrEqual (column, n_row) {BIAS_2D}",
        "",
        "",
        "no causal, sliding or padding mask",
    ),
    "padding of the next key": (
        f"""{RANGES} {CAUSAL} twice = Concat <axis = 1> (attention_mask, attention_mask)
        t_1d = Reshape (t, last) end = Add (t_1d, v1) moved = Slice (twice, v1, end, v1)
        moved_b = Cast <to = 9> (moved) moved_4d = Unsqueeze (moved_b, v12) seen = And (causal, moved_4d) {BIAS_4D}""",
        "int64[B, T] attention_mask",
        "",
        "no causal, sliding or padding mask",
    ),
    "a sum over the mask": (
        f"""{RANGES} {CAUSAL} count = CumSum (attention_mask, i1) seen_2d = Cast <to = 9> (count)
        seen_4d = Unsqueeze (seen_2d, v12) seen = And (causal, seen_4d) {BIAS_4D}""",
        "int64[B, T] attention_mask",
        "",
        "it counts along the input",
    ),
    "the query counts": (
        f"""{RANGES} {CAUSAL} best = ReduceMax <keepdims = 0> (q) some = Greater (best, f0)
        seen = And (causal, some) {BIAS_2D}""",
        "",
        "",
        "'q' is no padding mask",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    nodes, mask, constants, reason = NEAR_MISSES[name]
    assert reason in reason_of(attention_model(CACHE, nodes, mask=mask, constants=constants))


def test_a_small_mask_stays() -> None:
    nodes = f"{PADDING} bias = Where (padding, f0, low)"
    model = attention_model(NO_CACHE, nodes, mask="int64[B, S] attention_mask")
    assert "says what it means already" in reason_of(model)


def test_a_bias_that_is_an_input_stays() -> None:
    model = attention_model(NO_CACHE, "bias = Identity (given)", mask="float[B, 2, S, S] given")
    assert "no padding mask" in reason_of(model)


def test_without_a_cache() -> None:
    nodes = f"{SHORT_RANGES} {CAUSAL} {PADDING} seen = And (causal, padding) {BIAS_4D}"
    model = attention_model(NO_CACHE, nodes, mask="int64[B, S] attention_mask")
    simplified(model, past=False)
    assert flags(model) == AttentionForm(causal=True, bias=True)


def test_fixed_sizes() -> None:
    """A mask for one length only; what it would be at others does not matter."""
    inputs = NO_CACHE.replace("B,", "1,").replace("S,", "5,")
    table = ", ".join("0.0" if j <= i else "-1e9" for i in range(5) for j in range(5))
    model = attention_model(inputs, "bias = Identity (t)", mask="", constants=f"float[1, 1, 5, 5] t = {{{table}}}")
    assert simplify(model)
    assert flags(model) == AttentionForm(causal=True)


def test_a_window_of_one_needs_no_padding() -> None:
    """Each query sees itself or, being padding, nothing."""
    nodes = f"{RANGES} {CAUSAL} {WINDOW} {PADDING} band = And (causal, near) seen = And (band, padding) {BIAS_4D}"
    model = simplified(attention_model(CACHE, nodes, constants="int64 window = {1}"), window=1)
    assert flags(model) == AttentionForm(causal=True, window=True)
