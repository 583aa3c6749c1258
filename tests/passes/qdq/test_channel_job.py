"""Weights as integers per channel: tiles, types, guards."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from block_models import weights
from onnx import TensorProto

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import DerivedWeight, weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.ir.weights.kinds import constant
from onnxslim_llm.passes.qdq import channel_job
from onnxslim_llm.passes.qdq.channel_job import ChannelJob

SHAPE = (24, 40)


def job(w: np.ndarray, axis: int | None, kind: str = "int8", **more: object) -> ChannelJob:
    symmetric = bool(more.pop("symmetric", True))
    least = more.pop("least_scale", None)
    source = weight_of(constant("w", w))
    return ChannelJob(source, axis, kind, symmetric, TensorProto.FLOAT, "w", least)  # type: ignore[arg-type]


def results(made: ChannelJob) -> list[np.ndarray]:
    found: tuple[DerivedWeight, ...] = derive(made)
    return [weight.load() for weight in found]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiles_give_what_one_piece_gives(
    axis: int, kind: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weights(1, *SHAPE) + 0.3
    whole = results(job(w, axis, kind, symmetric=symmetric))
    monkeypatch.setattr(channel_job, "_TILE_BYTES", 4 * 7 * SHAPE[1 - axis])
    tiled = job(w, axis, kind, symmetric=symmetric)
    assert len(tiled.tiles()) > 3
    for mine, theirs in zip(results(tiled), whole, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_any_axis_of_any_rank(axis: int | None) -> None:
    w = weights(2, 4, 3, 5)
    codes, scales = results(job(w, axis))
    assert codes.shape == w.shape
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = -1
    near = codes * scales.reshape(shape if axis is not None else ())
    assert np.abs(near - w).max() <= scales.max() / 2 * (1 + 2**-20)


def test_four_bits_are_packed() -> None:
    w = weights(3, 5, 7)
    codes, scales = results(job(w, 1, "int4"))
    assert codes.dtype == ml_dtypes.int4
    assert codes.astype(int).min() >= -8
    near = codes.astype(np.float32) * scales
    assert np.sum((near - w) ** 2) < 0.02 * np.sum(w**2)


def test_scales_do_not_fall_below_the_least() -> None:
    least = np.full(SHAPE[1], 0.5, np.float32)
    least[0] = 0
    _, scales = results(job(weights(4, *SHAPE), 1, least_scale=least))
    assert (scales[1:] == 0.5).all()
    assert scales[0] < 0.5


def test_zero_channels_stay_zero() -> None:
    w = weights(5, *SHAPE)
    w[:, 3] = 0
    codes, scales = results(job(w, 1))
    assert (codes[:, 3] == 0).all()
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


def test_other_parameters_are_other_work() -> None:
    w = weights(6, *SHAPE)
    keys = {job(w, 0).fingerprint, job(w, 1).fingerprint, job(w, 1, "uint8").fingerprint}
    keys.add(job(w, 1, least_scale=np.ones(SHAPE[1], np.float32)).fingerprint)
    assert len(keys) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    w = weights(7, *SHAPE)
    w[2, 2] = bad
    with pytest.raises(ModelError, match="NaN or infinite") as caught:
        results(job(w, 1))
    assert caught.value.where == "tensor 'w'"
