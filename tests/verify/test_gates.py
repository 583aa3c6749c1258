from __future__ import annotations

import math

import pytest

from onnxslim_llm.errors import UsageError
from onnxslim_llm.verify.gates import KINDS, Gate, default_gates, evaluate, lossless_limit, parse_gate


def by_figure(kind: str, **options: object) -> dict[str, Gate]:
    return {gate.figure: gate for gate in default_gates(kind, **{"decoder": True, **options})}  # type: ignore[arg-type]


def test_lossless_decoder() -> None:
    gates = by_figure("lossless", absmax=30.0)
    assert gates["max_abs"] == Gate("max_abs", 1e-3)
    assert gates["greedy_prefix_match"] == Gate("greedy_prefix_match", 1.0, "min")
    assert gates["nonfinite"].limit == 0
    assert "kl_mean" not in gates


def test_lossless_in_half_precision_follows_the_logits() -> None:
    small, large = (by_figure("lossless", precision="float16", absmax=m)["max_abs"].limit for m in (8.0, 32.0))
    assert large == pytest.approx(4 * small)
    assert lossless_limit("bfloat16", 8.0) == pytest.approx(8 * lossless_limit("float16", 8.0))
    assert lossless_limit("float16", 0.0) == lossless_limit("float32", 1e9)
    assert "kl_mean" in by_figure("lossless", precision="float16")


def test_limits_loosen_with_fewer_bits_and_fewer_parameters() -> None:
    for parameters in (10**6, 10**9, 7 * 10**9):
        limits = [by_figure(kind, parameters=parameters)["kl_mean"].limit for kind in ("int8", "int4", "int3", "int2")]
        assert limits == sorted(limits)
    by_size = [by_figure("int4", parameters=n)["kl_mean"].limit for n in (10**6, 10**9, 7 * 10**9)]
    assert by_size == sorted(by_size, reverse=True)


def test_other_models_are_judged_by_noise() -> None:
    limits = [by_figure(kind, decoder=False)["sqnr_db"].limit for kind in ("int8", "int4", "int3", "int2")]
    assert limits == sorted(limits, reverse=True)
    assert by_figure("lossless", decoder=False, absmax=500.0)["max_abs"].limit == pytest.approx(0.5)
    assert "greedy_prefix_match" not in by_figure("lossless", decoder=False)


def test_every_kind_forbids_non_finite_values() -> None:
    for kind in KINDS:
        for decoder in (True, False):
            assert by_figure(kind, decoder=decoder)["nonfinite"] == Gate("nonfinite", 0.0)
    assert list(by_figure("none")) == ["nonfinite"]


def test_unknown_kind() -> None:
    with pytest.raises(UsageError, match="unknown gate kind 'int5'") as caught:
        default_gates("int5", decoder=True)
    assert "int" in caught.value.todo


def test_evaluate() -> None:
    gates = [Gate("kl_mean", 0.1), Gate("cosine", 0.9, "min"), Gate("max_abs", 1.0), Gate("sqnr_db", 1.0, "min")]
    results = evaluate(gates, {"kl_mean": 0.1, "cosine": 0.8, "max_abs": math.nan, "sqnr_db": None})
    assert [r.ok for r in results] == [True, False, False, False]
    assert str(results[1]) == "cosine 0.8, must be >= 0.9"
    assert "not measured" in str(results[3])
    assert not evaluate([Gate("ppl_ratio", 1.0)], {})[0].ok


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("kl_mean <= 0.05", Gate("kl_mean", 0.05)),
        ("cosine>=0.99", Gate("cosine", 0.99, "min")),
        (" max_abs  <=  1e-3 ", Gate("max_abs", 1e-3)),
    ],
)
def test_parse(text: str, gate: Gate) -> None:
    assert parse_gate(text) == gate
    assert parse_gate(str(gate)) == gate


@pytest.mark.parametrize("text", ["", "kl_mean", "kl_mean < 3", "kl_mean <= many", "kl_mean == 1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="not a gate"):
        parse_gate(text)


def test_parse_suggests_a_figure() -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate("kl_meen <= 1")
    assert "kl_mean" in caught.value.todo


def test_8_bit_activations_have_gates_of_their_own() -> None:
    (_, decoder) = default_gates("w8a8", decoder=True, parameters=10**9)
    (_, other) = default_gates("w8a8", decoder=False)
    assert (decoder.figure, decoder.limit) == ("kl_mean", 0.05)
    # A noise of -17 dB that is independent of the signal leaves a cosine of 0.99.
    assert other.figure == "sqnr_db"
    assert 1 / (1 + 10 ** (-other.limit / 10)) ** 0.5 == pytest.approx(0.99, abs=5e-4)
