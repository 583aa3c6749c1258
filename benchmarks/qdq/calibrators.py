"""What each calibrator, and leaving sensitive products in float, gives on the sample model in 8 bits.

    python benchmarks/qdq/calibrators.py [--tokens 8192]

Mean KL divergence of the next token, and the share of equal most likely tokens, against the fused float model on text
that neither training nor calibration has seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from speed import ROOT, SAMPLE, sample

VARIANTS: dict[str, tuple[str, ...]] = {
    **{name: (f"calibrator={name}", "sensitive_below_db=0") for name in ("minmax", "moving_average", "entropy")},
    **{name: (f"calibrator={name}", "sensitive_below_db=0") for name in ("percentile", "mse")},
    **{f"mse, below {limit} dB in float": (f"sensitive_below_db={limit}",) for limit in (28, 35)},
}


def divergence(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the mean KL divergence of distributions given as logits [..., V]."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (wanted, found))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float(np.mean(np.sum(np.exp(p) * (p - q), -1)))


def main() -> None:
    """Compile every variant, run it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of the calibration text")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import onnxslim_llm as osl
    from onnxslim_llm.runtime.tokenizer import load_tokenizer
    from onnxslim_llm.targets import get_target

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model, text, given = sample(work)
        ids = load_tokenizer(SAMPLE).encode(text.read_text(encoding="utf-8")[: 8 * args.tokens])[: args.tokens]
        calibration = work / "calibration.jsonl"
        calibration.write_text(json.dumps({"tokens": list(ids)}) + "\n")

        def logits(recipe: str, *settings: str) -> NDArray[Any]:
            named = [f"quantize_activations.{setting}" for setting in settings]
            out = work / "out"
            options = {"target": "ort-cpu", "recipe": recipe, "settings": named, "calib": calibration}
            osl.compile(model, out, verify="off", force=True, **options)  # type: ignore[arg-type]
            session = get_target("ort-cpu").open(out / "model.onnx", threads=2)
            return np.concatenate([session.run(each, ["logits"])["logits"] for each in given], axis=1)

        wanted = logits("safe")
        print("| ranges | mean KL | top-1 |")
        print("|---|---|---|")
        for name, settings in VARIANTS.items():
            found = logits("w8a8", *settings)
            agreement = np.mean(found.argmax(-1) == wanted.argmax(-1))
            print(f"| {name} | {divergence(found, wanted):.4f} | {agreement:.1%} |", flush=True)


if __name__ == "__main__":
    main()
