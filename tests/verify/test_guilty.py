from __future__ import annotations

import numpy as np
import onnx
import pytest
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import UsageError
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.verify.check import Verification, Verifier
from onnxslim_llm.verify.guilty import find_guilty, first_failing


@pytest.mark.parametrize("passes", [1, 2, 3, 8, 31])
def test_finds_every_position_in_few_checks(passes: int) -> None:
    for guilty in range(passes):
        asked: list[int] = []

        def fails(count: int, guilty: int = guilty, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count > guilty

        assert first_failing(passes, fails) == guilty
        assert len(asked) <= 2 + np.ceil(np.log2(passes)) + 1


def test_nobody_is_guilty() -> None:
    assert first_failing(5, lambda count: False) is None
    assert first_failing(5, lambda count: True) is None
    assert first_failing(0, lambda count: False) is None


def test_breaking_and_repairing_passes_still_give_a_breaking_one() -> None:
    wrong_after = {2, 3, 6, 7, 8}
    found = first_failing(8, lambda count: count in wrong_after)
    assert found is not None
    assert found + 1 in wrong_after
    assert found not in wrong_after


def opened(proto: onnx.ModelProto) -> Session:
    return open_session(proto, threads=1)


def test_a_decoder_broken_by_its_third_pass() -> None:
    good, bad = build(DecoderSpec()), build(DecoderSpec())
    tensor = next(t for t in bad.graph.initializer if t.name == "lm_head.weight")
    weight = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight * np.float32(1.01), tensor.name))
    verifier = Verifier(good, threads=1)
    names = ["fold", "share", "scale", "lower"]
    found = find_guilty(verifier, [good, good, good, bad, bad], names, opened, "lossless")
    assert found is not None
    assert (found.index, found.name) == (2, "scale")
    assert isinstance(found.failure, Verification)
    assert "max_abs" in {gate.gate for gate in found.failure.failed}
    assert find_guilty(verifier, [good, good], ["fold"], opened, "lossless") is None


def test_a_snapshot_that_does_not_open_is_bad() -> None:
    good, broken = build(DecoderSpec()), build(DecoderSpec())
    broken.graph.node[3].op_type = "NoSuchOp"
    found = find_guilty(Verifier(good, threads=1), [good, good, broken], ["a", "b"], opened, "lossless")
    assert found is not None
    assert found.name == "b"
    assert "NoSuchOp" in str(found.failure)


def test_names_must_fit() -> None:
    good = build(DecoderSpec())
    with pytest.raises(UsageError, match="2 snapshots need 1 pass names, not 2"):
        find_guilty(Verifier(good, threads=1), [good, good], ["a", "b"], opened, "lossless")
