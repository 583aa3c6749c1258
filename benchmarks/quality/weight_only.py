"""What weight-only quantization costs and saves: bytes, perplexity and KL divergence for a table of settings.

Every row compiles the model with `cleanup, quantize_weights{...}`, lowers it to a target, saves it and evaluates it in
the target's own runtime next to the source, on the same tokens.

    python benchmarks/quality/weight_only.py                            # the sample model, the table of settings below
    python benchmarks/quality/weight_only.py --setting "bits=4, block=32" --tokens 20000
    python benchmarks/quality/weight_only.py --setting "method=calibrated" --calib models/stdlib-llama/calib.txt
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.targets import get_target
from onnxslim_llm.verify.quality import evaluate

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "stdlib-llama"

#: Options of quantize_weights, one row each.
SETTINGS = (
    "bits=8, block=0",
    "bits=8, block=32",
    "bits=4, block=32, method=rtn",
    "bits=4, block=32, method=rtn, symmetric=false",
    "bits=4, block=32",
    "bits=4, block=32, symmetric=false",
    "bits=4, block=32, scale_dtype=float16",
    "bits=4, block=32, symmetric=false, scale_dtype=float16",
    "bits=4, block=16, scale_dtype=float16",
    "bits=4, block=16, symmetric=false, scale_dtype=float16",
    "bits=4, block=64, scale_dtype=float16",
    "bits=4, block=128, scale_dtype=float16",
    "bits=4, block=0",
    "bits=4, block=32, embedding_bits=4, lm_head_bits=4, scale_dtype=float16",
    "bits=4, block=16, embedding_bits=4, lm_head_bits=4, scale_dtype=float16",
    "bits=4, block=32, embedding_bits=0, lm_head_bits=0, scale_dtype=float16",
)


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        setting: Options of quantize_weights.
        bytes: Size of the artifact, graph and weights.
        bytes_ratio: That, divided by the source's weights, each counted once.
        ppl_ratio: Perplexity divided by the source's.
        kld_mean, kld_p99: KL(source || artifact) over tokens, in nats.
        top1: Share of tokens where both find the same token the likeliest.
    """

    setting: str
    bytes: int
    bytes_ratio: float
    ppl_ratio: float
    kld_mean: float
    kld_p99: float
    top1: float


def measure(
    model: Path, text: Path, setting: str, target_name: str, tokens: int | None, threads: int, calibrator: Calibrator
) -> Row:
    """Compile with one setting and compare with the source."""
    target = get_target(target_name)
    source = open_model(model)
    quantize = Pipeline(f"quantize_weights{{{setting}}}")
    # One context for all: cleaning up ties weights, and the statistics of the tied one follow.
    context = Context(target=target, statistics=calibrator.wanted_by(quantize.passes))
    Pipeline("cleanup").run(source, context)
    distinct = source.weight_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for pipeline in (quantize, Pipeline(target.lowering)):
            pipeline.run(source, context)
        artifact = Path(folder) / "model.onnx"
        size = save_model(source, artifact, SaveOptions(jobs=2)).bytes
        quality = evaluate(
            target.open(artifact, threads=threads),
            text,
            load_tokenizer(model.parent),
            versus=open_session(model, threads=threads),
            max_tokens=tokens,
            threads=threads,
        )
    found = quality.difference
    assert found is not None
    return Row(setting, size, size / distinct, found.ppl_ratio, found.kld_mean, found.kld_p99, found.top1_agreement)


def main() -> None:
    """Print the table, and its rows as JSON lines if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAMPLE / "model.onnx")
    parser.add_argument("--text", type=Path, default=SAMPLE / "heldout.txt")
    parser.add_argument("--setting", action="append", help="options of quantize_weights; may be repeated")
    parser.add_argument("--target", default="portable")
    parser.add_argument("--tokens", type=int, default=None, help="default: the whole text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calib", type=Path, default=SAMPLE / "calib.txt", help="for method=calibrated; or: self")
    parser.add_argument("--json", type=Path, default=None, help="append the rows here")
    args = parser.parse_args()
    print(f"{'bytes':>9} {'ratio':>6} {'ppl':>7} {'KL':>8} {'KL p99':>7} {'top-1':>6}  setting ({args.target})")
    with tempfile.TemporaryDirectory() as statistics:
        calibrator = Calibrator(args.model, args.calib, Path(statistics), args.threads, Silent())
        for setting in args.setting or SETTINGS:
            row = measure(args.model, args.text, setting, args.target, args.tokens, args.threads, calibrator)
            print(
                f"{row.bytes:>9} {row.bytes_ratio:>6.4f} {row.ppl_ratio:>7.4f} {row.kld_mean:>8.5f} "
                f"{row.kld_p99:>7.4f} {row.top1:>6.4f}  {row.setting}",
                flush=True,
            )
            if args.json is not None:
                with args.json.open("a") as file:
                    file.write(json.dumps({"target": args.target, **asdict(row)}) + "\n")


if __name__ == "__main__":
    main()
