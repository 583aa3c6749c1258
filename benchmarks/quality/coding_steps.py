"""What each step of calibrated coding saves of the error in a product's output, and what it costs.

    python benchmarks/quality/coding_steps.py                    the sample model
    python benchmarks/quality/coding_steps.py --model FILE --calib FILE
    python benchmarks/quality/coding_steps.py --cost             processor time on a tile of 2,048 x 512

Errors are those on samples held out, of 256 columns of a weight behind every fourth input; geometric means, GPTQ = 1.
The last row is what we do not do: rows in the order of falling mean squares, with scales fixed before (act-order with
static groups).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.passes.quantize.codes.coding import InputKnowledge, best_codes, knowledge_of, nearest_codes
from onnxslim_llm.passes.quantize.codes.compensate import Coded, Grid, compensate
from onnxslim_llm.passes.quantize.codes.polish import polish
from onnxslim_llm.stats.curvature import inverse_factor, output_error

Array = NDArray[Any]

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "stdlib-llama"
SCHEMES = (WeightScheme(4, 64, True, "calibrated", "float16"), WeightScheme(3, 32, False, "calibrated", "float16"))
EVERY, COLUMNS = 4, 256
TILE = (2048, 512)
REPEATS = 5


def half(scales: Array) -> Array:
    """Round scales as they are stored."""
    return scales.astype(np.float16).astype(np.float32)


def compensated(piece: Array, scheme: WeightScheme, known: InputKnowledge, counts: Array) -> Coded:
    """GPTQ with scales that are searched with these weights of squared errors."""

    def fit(rows: Array, start: int) -> Grid:
        part = np.ascontiguousarray(counts[start : start + len(rows)])
        found = nearest_codes(np.ascontiguousarray(rows), replace(scheme, block=0), part)
        return Grid(found.scales[0], found.zeros[0])

    assert known.factor is not None
    return compensate(piece, known.factor, scheme.block_rows(len(piece)), (1 << scheme.bits) - 1, fit)


def reordered(piece: Array, scheme: WeightScheme, known: InputKnowledge) -> Coded:
    """GPTQ over rows in the order of falling mean squares; scales are those of the weighted search."""
    order = np.argsort(-known.importance, kind="stable")
    factor = inverse_factor(known.gram[np.ix_(order, order)])
    assert factor is not None
    found = nearest_codes(piece, scheme, known.importance)
    groups = order // scheme.block_rows(len(piece))

    def fit(rows: Array, start: int) -> Grid:
        return Grid(found.scales[groups[start]], found.zeros[groups[start]])

    turned = compensate(np.ascontiguousarray(piece[order]), factor, 1, (1 << scheme.bits) - 1, fit)
    codes = np.empty_like(turned.codes)
    codes[order] = turned.codes
    return Coded(codes, found.scales, found.zeros)


def ways(piece: Array, scheme: WeightScheme, known: InputKnowledge) -> Iterator[tuple[str, Coded]]:
    """Code a piece of a weight in every way."""
    assert known.factor is not None
    block, levels = scheme.block_rows(len(piece)), (1 << scheme.bits) - 1
    yield "search without data", nearest_codes(piece, scheme)
    yield "search weighted by mean squares", nearest_codes(piece, scheme, known.importance)
    yield "GPTQ, scales by mean squares", compensated(piece, scheme, known, known.importance)
    counts = (1 / np.square(np.diagonal(known.factor), dtype=np.float64)).astype(np.float32)
    ours = compensated(piece, scheme, known, counts)
    yield "GPTQ", ours
    for sweeps in (1, 2, 4):
        yield f"polished, sweeps: {sweeps}", polish(piece, ours, known.gram, block, levels, half, sweeps)
    other = reordered(piece, scheme, known)
    yield "act-order, polished, sweeps: 2", polish(piece, other, known.gram, block, levels, half, 2)


def compare(model: Path, calib: Path) -> None:
    """Print the errors."""
    weights = {tensor.name: tensor for tensor in onnx.load(model).graph.initializer}
    with tempfile.TemporaryDirectory() as scratch:
        statistics = Calibrator(model, calib, Path(scratch), 1, Silent()).statistics()
        assert statistics is not None
        for scheme in SCHEMES:
            logs: dict[str, list[float]] = {}
            for tap in statistics.taps[::EVERY]:
                whole = onnx.numpy_helper.to_array(weights[tap.weights[0]]).astype(np.float32)
                piece = np.ascontiguousarray((whole if len(whole) == tap.size else whole.T)[:, :COLUMNS])
                moments = statistics.of_tensor(tap.tensor)
                assert moments is not None
                known = knowledge_of(moments)
                for name, coded in ways(piece, scheme, known):
                    lost = piece - coded.dequantized(scheme.block_rows(len(piece)))
                    logs.setdefault(name, []).append(float(np.log(output_error(lost, known.held).sum())))
            base = np.mean(logs["GPTQ"])
            print(f"{scheme.bits} bits, blocks of {scheme.block}, zero points: {not scheme.symmetric}")
            for name, found in logs.items():
                print(f"  {name:<34} {np.exp(np.mean(found) - base):.3f}")


def cost() -> None:
    """Print processor times, by that of the product of H and the tile."""
    rows = TILE[0]
    rng = np.random.default_rng(0)
    mixing = np.eye(rows, dtype=np.float32) + 0.02 * rng.standard_normal((rows, rows), dtype=np.float32)
    inputs = rng.standard_normal((5 * rows, rows), dtype=np.float32) @ mixing
    gram, held = (part.T @ part for part in (inputs[rows:], inputs[:rows]))
    piece = rng.standard_normal(TILE, dtype=np.float32)
    importance = (np.diagonal(gram) / (4 * rows)).astype(np.float32)
    known = InputKnowledge(importance, inverse_factor(gram), gram, held)
    scheme = SCHEMES[0]
    coded = compensated(piece, scheme, known, importance)
    product = _seconds(lambda: gram @ piece)
    print(f"product {product * 1e3:.0f} ms of one thread")
    for name, work in (
        ("GPTQ", lambda: compensated(piece, scheme, known, importance)),
        ("one sweep of polish", lambda: polish(piece, coded, gram, scheme.block, 15, half, 1)),
        ("held-out check of one coding", lambda: output_error(piece, held)),
        ("everything", lambda: best_codes(piece, scheme, known)),
    ):
        print(f"  {name:<30} {_seconds(work) / product:.1f}")


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Compare, or tell the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAMPLE / "model.onnx")
    parser.add_argument("--calib", type=Path, default=SAMPLE / "calib.txt")
    parser.add_argument("--cost", action="store_true", help="set OPENBLAS_NUM_THREADS=1")
    args = parser.parse_args()
    if args.cost:
        cost()
    else:
        compare(args.model, args.calib)


if __name__ == "__main__":
    main()
