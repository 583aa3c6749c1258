"""The textual form of pipelines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_llm.errors import UsageError
from onnxslim_llm.rewrite.syntax import format_pipeline, parse_pipeline, parse_value

_names = st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True)
_scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
)
_values = st.one_of(
    _scalars,
    st.lists(_scalars, max_size=3),
    st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), _scalars, max_size=2),
)
_steps = st.lists(st.tuples(_names, st.dictionaries(_names, _values, max_size=3)), max_size=4)


@given(_steps)
def test_what_is_formatted_is_parsed_back(steps: list[tuple[str, dict[str, object]]]) -> None:
    assert parse_pipeline(format_pipeline(steps)) == steps


def test_options_and_bare_words() -> None:
    text = "fuse_rms_norm, quantize_weights{bits=4, method=search, exclude=['lm_head', \"a,b{\"], tied = true}"
    expected = {"bits": 4, "method": "search", "exclude": ["lm_head", "a,b{"], "tied": True}
    assert parse_pipeline(text) == [("fuse_rms_norm", {}), ("quantize_weights", expected)]


def test_an_empty_text_is_an_empty_pipeline() -> None:
    assert parse_pipeline(" ") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fold{", "missing at the end"),
        ("fold}", "unbalanced '}'"),
        ("fold{a=[1}", "unbalanced '}'"),
        ("fold{'a}", "missing at the end"),
        ("fold{bits}", "not of the form option=value"),
        ("fold{4=bits}", "not of the form option=value"),
        ("fold x", "unexpected 'x' after 'fold'"),
        ("4fold", "a pass name is expected"),
    ],
)
def test_malformed_text_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text)
    assert said in caught.value.what
    assert caught.value.where == text


@pytest.mark.parametrize(
    ("text", "value"), [("4", 4), ("0.5", 0.5), ("true", True), ("rtn", "rtn"), ("[1, 2]", [1, 2])]
)
def test_values(text: str, value: object) -> None:
    assert parse_value(text) == value
