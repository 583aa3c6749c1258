"""Statistics after passes have changed the inputs of products: the same as those of the changed inputs."""

import numpy as np
import pytest

from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.statistics import Statistics
from onnxslim_llm.stats.taps import Tap
from onnxslim_llm.stats.transforms import Kept, Multiplied, Scaled, Transform

K = 12
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(200, K)).astype(np.float32)
FACTOR = RNG.uniform(0.5, 2, K).astype(np.float32)
CHANNELS = np.array([7, 1, 4])
MATRIX = RNG.normal(size=(K, 5)).astype(np.float32)
#: Rows are changed in float32 before they are summed; their moments are changed in float64.
TOLERANCE = 1e-5


def moments_of(rows: np.ndarray) -> Moments:
    """Return the moments of some rows."""
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return moments


@pytest.mark.parametrize(
    ("transform", "changed"),
    [(Scaled(FACTOR), ROWS * FACTOR), (Kept(CHANNELS), ROWS[:, CHANNELS]), (Multiplied(MATRIX), ROWS @ MATRIX)],
    ids=["scaled", "kept", "multiplied"],
)
def test_moments_of_changed_rows(transform: Transform, changed: np.ndarray) -> None:
    found, wanted = transform.apply(moments_of(ROWS)), moments_of(changed)
    assert transform.size == found.size == wanted.size
    assert found.count == wanted.count
    for name in ("gram", "total", "square"):
        expected = getattr(wanted, name)
        np.testing.assert_allclose(getattr(found, name), expected, atol=TOLERANCE * np.abs(expected).max())
    if not isinstance(transform, Multiplied):
        np.testing.assert_allclose(found.absolute, wanted.absolute, rtol=TOLERANCE)
        np.testing.assert_allclose(found.largest, wanted.largest, rtol=TOLERANCE)
    else:  # an estimate for normal rows, and a bound
        np.testing.assert_allclose(found.absolute, wanted.absolute, rtol=0.2)
        assert (found.largest >= wanted.largest).all()


def test_statistics_follow_the_changes_of_passes(tmp_path) -> None:
    statistics = Statistics(tmp_path, "key")
    statistics.put(Tap("x", K, 0, ["w", "v"]), moments_of(ROWS), moments_of(ROWS[:50]))
    after = statistics.changed("w", Scaled(FACTOR)).changed("b", Multiplied(MATRIX), origin="w")
    assert statistics.of_weight("b") is None
    first, second = after.of_weight("w"), after.of_weight("b")
    assert first is not None
    assert second is not None
    assert (first.size, second.size) == (K, 5)
    untouched, source = after.of_weight("v"), statistics.of_weight("w")
    assert untouched is not None
    assert source is not None
    assert len({first.digest, second.digest, untouched.digest}) == 3
    assert untouched.digest == source.digest
    expected = moments_of((ROWS * FACTOR) @ MATRIX).gram
    assert expected is not None
    np.testing.assert_allclose(second.load().fit.gram, expected, atol=TOLERANCE * np.abs(expected).max())


def test_moments_without_second_moments_cannot_be_mixed() -> None:
    moments = Moments(K, with_gram=False)
    moments.add(ROWS)
    with pytest.raises(ValueError, match="without H"):
        Multiplied(MATRIX).apply(moments)
