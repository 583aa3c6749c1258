"""What low rank costs and saves: splitting by several methods at equal parameters, and compensation of int4 errors.

See `loss_bench` for what a row does.

    python benchmarks/pruning/low_rank.py                            # the sample model
    python benchmarks/pruning/low_rank.py --data FOLDER              # the story models and MiniLM, too
    python benchmarks/pruning/low_rank.py --write                    # put the tables into docs/pruning.md
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from doc_table import PAGE, head, line, write
from loss_bench import LossBench, Result, subjects

#: Share of the parameters of each weight that its factors have.
RATIOS = (0.9, 0.8)
METHODS = ("svd", "asvd", "whitened")
#: Everything in 4 bits but the tables: what there is to compensate.
INT4 = "quantize_weights{{method={method}, sensitive_bits=4}}"
QUANTIZERS = ("rtn", "search", "calibrated")
COMPENSATION = "compensate_low_rank{rank=32, budget=0.038}"


def splits(bench: LossBench) -> Iterator[list[str]]:
    """Measure all ways to split at equal parameters."""
    for ratio in RATIOS:
        taken = 0
        for method in METHODS:
            result = bench.measure(f"split_low_rank{{method={method}, ratio={ratio}, shared=false}}")
            assert result.parameters is not None
            taken = result.parameters[1]
            yield [bench.subject.name, method, f"{ratio} of each weight", *_split_cells(result)]
        for shared in ("false", "true"):
            result = bench.measure(f"split_low_rank{{budget={taken}, shared={shared}, align=4}}")
            what = "shared out, one A an input" if shared == "true" else "shared out over the weights"
            yield [bench.subject.name, "whitened", what, *_split_cells(result)]


def _split_cells(result: Result) -> list[str]:
    before, after = result.parameters or (1, 1)
    ppl = f"{result.difference.ppl_ratio:.3f}" if result.difference else "-"
    return [f"{after / before:.3f}", f"{result.bytes:,}", f"{result.loss:.4f}", ppl]


def compensations(bench: LossBench) -> Iterator[list[str]]:
    """Measure int4 with and without compensation."""
    for method in QUANTIZERS:
        steps = INT4.format(method=method)
        plain, better = bench.measure(steps), bench.measure(f"{steps}, {COMPENSATION}")
        more = better.bytes / plain.bytes - 1
        cells = [f"{plain.bytes:,}", f"{plain.loss:.4f}", f"{better.loss:.4f}"]
        yield [bench.subject.name, method, *cells, f"{more:+.1%}", f"{1 - better.loss / plain.loss:.0%}"]


HEADS: dict[str, tuple[str, ...]] = {
    "splits": ("model", "method", "ranks", "parameters", "bytes", "KL or 1 - cos", "perplexity"),
    "compensations": ("model", "int4 by", "bytes", "KL or 1 - cos", "compensated", "bytes more", "gap closed"),
}
TABLES: dict[str, Callable[[LossBench], Iterator[list[str]]]] = {"splits": splits, "compensations": compensations}


def main() -> None:
    """Measure and print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the story models")
    parser.add_argument("--work", type=Path, help="where models and calibration data are prepared; kept")
    parser.add_argument("--models", default="*", help="pattern of names")
    parser.add_argument("--table", choices=TABLES, help="only this one")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--write", action="store_true", help="into docs/pruning.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        found = subjects(args.data, args.models, args.tokens, work)
        benches = [LossBench(s, Path(scratch) / f"statistics {s.name}") for s in found]
        for name in [args.table] if args.table else TABLES:
            lines = head(HEADS[name])
            print("\n".join(lines), flush=True)
            for bench in benches:
                for cells in TABLES[name](bench):
                    lines.append(line(cells))
                    print(lines[-1], flush=True)
            if args.write:
                write(PAGE, f"low rank {name}", lines)


if __name__ == "__main__":
    main()
