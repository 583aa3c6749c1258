"""What masks of zeros cost, for each method, pattern, and with and without a refit; see `loss_bench`.

Mean KL divergence in nats, or mean 1 - cosine for encoders.

    python benchmarks/pruning/table.py                                   # the sample model
    python benchmarks/pruning/table.py --data FOLDER                     # the story models and MiniLM, too
    python benchmarks/pruning/table.py --write                           # put the tables into docs/pruning.md
    python benchmarks/pruning/table.py --passes "prune_neurons{share=0.5}"   # bytes and figures of any list of passes
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
from collections.abc import Iterator
from pathlib import Path

from doc_table import PAGE, head, line, write
from loss_bench import LossBench, subjects

PATTERNS = ("unstructured", "2:4")
#: What is said of a method, and its options.
METHODS = {
    "magnitude": "method=magnitude",
    "Wanda, within columns": "method=wanda, compare=column",
    "Wanda": "method=wanda",
    "Taylor": "method=taylor",
    "Fisher": "method=fisher",
    "SparseGPT": "method=sparsegpt",
}
OF_LIKELIHOOD = ("method=taylor", "method=fisher")
#: Ways to share out zeros and to get there, all with a refit.
SHARES = (0.5, 0.7)
WAYS = {
    "SparseGPT, uniform": "method=sparsegpt",
    "SparseGPT, by outliers": "method=sparsegpt, allocation=outliers",
    "SparseGPT, by sensitivity": "method=sparsegpt, allocation=sensitivity",
    "SparseGPT, 4 steps": "method=sparsegpt, steps=4",
    "SparseGPT, 4 steps, by sensitivity": "method=sparsegpt, steps=4, allocation=sensitivity",
    "Fisher, 4 steps, by sensitivity": "method=fisher, steps=4, allocation=sensitivity",
}


def _matching(options: dict[str, str], pattern: str) -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in options.items() if fnmatch.fnmatch(name, pattern))


def _loss(bench: LossBench, options: str) -> str:
    return f"{bench.measure(f'prune_weights{{{options}}}').loss:.3f}"


def masks(bench: LossBench, rows: str) -> Iterator[list[str]]:
    """Measure each method with both patterns, and with and without a refit."""
    for name, options in _matching(METHODS, rows):
        if options in OF_LIKELIHOOD and bench.subject.kind != "decoder":
            continue  # vectors have no likelihood whose gradient would say something
        cells = []
        for pattern in PATTERNS:
            for refit in ("false", "true"):
                same = pattern != "unstructured" and "column" in options  # groups of 4 lie in a column anyway
                cells.append("" if same else _loss(bench, f"{options}, pattern='{pattern}', refit={refit}"))
        yield [bench.subject.name, name, *cells]


def ways(bench: LossBench, rows: str) -> Iterator[list[str]]:
    """Measure ways to share out the zeros."""
    for name, options in _matching(WAYS, rows):
        if "fisher" in options and bench.subject.kind != "decoder":
            continue
        yield [bench.subject.name, name, *(_loss(bench, f"{options}, sparsity={share}") for share in SHARES)]


HEADS = {
    "masks": ["model", "method", "50 %", "50 %, refit", "2:4", "2:4, refit"],
    "ways": ["model", "way", *(f"{share:.0%}" for share in SHARES)],
}
TABLES = {"masks": masks, "ways": ways}


def details(bench: LossBench, lists: list[str]) -> Iterator[list[str]]:
    """Measure any lists of passes."""
    yield ["passes", "bytes", "zeros", "KL or 1 - cos", "perplexity", "KL p99", "top-1"]
    for passes in lists:
        result = bench.measure(passes)
        found = result.difference
        rest = (found.ppl_ratio, found.kld_p99, found.top1_agreement) if found else ()
        yield [f"`{passes}`", f"{result.bytes:,}", *(f"{figure:.3f}" for figure in (result.zeros, result.loss, *rest))]


def main() -> None:
    """Measure and print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the story models")
    parser.add_argument("--models", default="*", help="pattern of names")
    parser.add_argument("--rows", default="*", help="pattern of the first words of rows")
    parser.add_argument("--table", choices=TABLES, help="only this one")
    parser.add_argument("--passes", action="append", help="instead of the tables; may be repeated")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--write", action="store_true", help="into docs/pruning.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        found = subjects(args.data, args.models, args.tokens, work)
        benches = [LossBench(s, work / f"statistics {s.name}") for s in found]
        if args.passes:
            for bench in benches:
                for cells in details(bench, args.passes):
                    print(line(cells), flush=True)
            return
        for name in [args.table] if args.table else TABLES:
            lines = head(HEADS[name])
            print("\n".join(lines), flush=True)
            for bench in benches:
                for cells in TABLES[name](bench, args.rows):
                    lines.append(line(cells))
                    print(lines[-1], flush=True)
            if args.write:
                write(PAGE, name, lines)


if __name__ == "__main__":
    main()
