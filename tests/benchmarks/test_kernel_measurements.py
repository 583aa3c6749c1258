"""The kernel benchmark's file, its limits and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench import copies_for, measure
from measurements import Measurement, append, finished, limits_of, load
from tables import markdown, text

OURS = Measurement(
    name="ours_int8_b32_auto",
    k=2048,
    n=4096,
    rows=1,
    threads=1,
    us=200.0,
    best_us=190.0,
    runs=5,
    limit="read",
    of_limit=0.93,
    limits={"read": 15.0, "amx_bf16": 3500.0},
    kernels=None,
)
ORT = replace(OURS, name="ort_nbits4_b32", us=350.0, limit=None, of_limit=None)
AMX_MACHINE = ["avx2_fma", "avx2_int8", "avx512_fma", "avx512vnni_int8", "amx_int8", "amx_bf16"]
AVX2_MACHINE = ["avx2_fma", "avx2_int8"]


def test_a_file_resumes_by_cells_and_the_last_of_equal_measurements_counts(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    append(path, [OURS])
    append(path, [replace(OURS, us=180.0), ORT])
    known = load(path)
    assert [(m.name, m.us) for m in known] == [(OURS.name, 180.0), (ORT.name, 350.0)]
    both = {OURS.name, ORT.name}
    assert finished(known, 2048, 4096, 1, 1, both)
    assert not finished(known, 2048, 4096, 1, 2, both)
    assert not finished(known, 2048, 4096, 1, 1, both | {"llama_q4_0"})


@pytest.mark.parametrize(
    ("rows", "isa", "accuracy", "peaks", "limit"),
    [
        (1, "auto", "int8", AMX_MACHINE, "read"),
        (4, "avx2", "exact", AVX2_MACHINE, "read"),
        (16, "auto", "int8", AMX_MACHINE, "avx512vnni_int8"),
        (16, "auto", "exact", AMX_MACHINE, "avx512_fma"),
        (64, "auto", "int8", AMX_MACHINE, "amx_bf16"),
        (64, "auto", "exact", AMX_MACHINE, "avx512_fma"),
        (64, "avx512vnni", "int8", AMX_MACHINE, "avx512vnni_int8"),
        (64, "auto", "int8", AVX2_MACHINE, "avx2_int8"),
        (64, "scalar", "int8", AMX_MACHINE, None),
        (64, "auto", "int8", [], None),
    ],
)
def test_which_limit_binds(rows: int, isa: str, accuracy: str, peaks: list[str], limit: str | None) -> None:
    name, amount = limits_of(rows, 1000, 10, 20, isa, accuracy, peaks)
    assert name == limit
    assert amount == {"read": 1000, None: 0}.get(name, 2 * rows * 10 * 20)


def test_markdown_has_a_column_for_each_peer_that_was_measured() -> None:
    lines = markdown([OURS, ORT]).splitlines()
    assert lines[2] == "| K x N | M | ours, µs | ORT level 4 |"
    assert lines[4] == "| 2048 x 4096 | 1 | 200 (93% of read) | 1.75x |"
    assert "llama" not in lines[2]
    assert "read 15 to 15" in lines[-1]


def test_markdown_of_several_of_ours_holds_peers_against_the_default() -> None:
    slower = replace(OURS, name="ours_exact_b32_auto", us=700.0, limit="avx2_int8", of_limit=0.5)
    lines = markdown([slower, OURS, ORT]).splitlines()
    assert lines[2] == "| K x N | M | ours, int8, auto, µs | ours, exact, auto, µs | ORT level 4 |"
    assert lines[4] == "| 2048 x 4096 | 1 | 200 (93% of read) | 700 (50% of AVX2) | 1.75x |"


def test_text_gives_ratios_to_the_first() -> None:
    assert "x  1.75" in text([OURS, ORT]).splitlines()[-1]


def test_few_rows_leave_the_caches_and_many_take_fewer_copies() -> None:
    assert copies_for(1e6, 1000, 1000, 16, 560e6) == 560
    assert copies_for(1e6, 1000, 1000, 1024, 560e6) == 20
    assert copies_for(1e9, 1000, 1000, 1, 560e6) == 1


class Sleepless:
    """Says that it took long without taking any time."""

    def __init__(self) -> None:
        self.calls = 0

    def seconds(self) -> float:
        self.calls += 1
        return float(self.calls)


def test_candidates_run_in_turn_and_the_warm_up_does_not_count() -> None:
    candidates = {"a": Sleepless(), "b": Sleepless()}
    assert measure(candidates, budget=0.0, least=3) == {"a": [2.0, 3.0, 4.0], "b": [2.0, 3.0, 4.0]}
