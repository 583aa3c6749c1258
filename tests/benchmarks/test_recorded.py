from __future__ import annotations

import numpy as np
from recorded import Recorded
from reference_decoder import DecoderSpec, build

from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

#: The same tokens in one run or in two: float32 sums in another order.
ROUNDING = 1e-4


def test_a_second_run_gives_the_same_logits_without_the_model() -> None:
    runner = DecoderRunner(open_session(build(DecoderSpec()), threads=1))
    recorded = Recorded(runner)
    ids = np.arange(9)[None]
    first, state = recorded.prefill(ids[:, :5])
    second, _ = recorded.prefill(ids[:, 5:], state)
    whole, _ = runner.prefill(ids)
    assert np.allclose(np.concatenate([first, second], axis=1), whole, atol=ROUNDING)
    runner.prefill = None  # type: ignore[method-assign]  # calling it would fail
    again, remembered = recorded.prefill(ids[:, :5])
    assert again is first
    assert recorded.prefill(ids[:, 5:], remembered)[0] is second


def test_what_is_new_after_something_remembered_is_run() -> None:
    runner = DecoderRunner(open_session(build(DecoderSpec()), threads=1))
    recorded = Recorded(runner)
    ids = np.arange(9)[None]
    recorded.prefill(ids[:, :5])
    _, remembered = recorded.prefill(ids[:, :5])
    rest, _ = recorded.prefill(ids[:, 5:], remembered)
    assert np.allclose(rest, runner.prefill(ids)[0][:, 5:], atol=ROUNDING)
