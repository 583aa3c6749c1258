"""Numbers as people read them, at the edges."""

from __future__ import annotations

import pytest

from onnxslim_llm.report.format import bytes_text, count_text, ratio_text, seconds_text, shape_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (2_200_000_000, "2.20 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes(size: float, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (1e-5, "<1 ms"), (0.0123, "12 ms"), (0.9996, "1.00 s"), (59.99, "59.99 s"), (754.4, "12 min 34 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_others() -> None:
    assert count_text(1234567) == "1\u202f234\u202f567"
    assert ratio_text(1, 0) == "–"
    assert ratio_text(1, 4) == "0.25x"
    assert shape_text((1, "seq", None)) == "1 x seq x ?"
    assert shape_text(()) == "scalar"
