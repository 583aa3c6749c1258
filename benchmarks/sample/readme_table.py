"""The README's table: the sample model and its artifacts, size, quality and speed, measured in one run.

    python benchmarks/sample/readme_table.py            print the table
    python benchmarks/sample/readme_table.py --write    put it into README.md between its markers

Every figure comes from the command line's own `compile`, `eval` and `bench`, as a user would run them: quality on the
held-out text that ships with the model, speed interleaved over all models, medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onnxslim_llm.artifact.environment import cpu_features, cpu_name, usable_cpus

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "models" / "stdlib-llama"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
#: (recipe, target); the first line of the table is the source itself.
ARTIFACTS = (
    ("safe", "portable"),
    ("safe", "ort-cpu"),
    ("int8", "portable"),
    ("int4", "portable"),
    ("int4", "ort-cpu"),
    ("int4", "ort-cpu-ops"),
    ("int4-fast", "ort-cpu-ops"),
    ("int4-calibrated", "ort-cpu-ops"),
)
FEATURES = ("avx2", "avx512_vnni", "amx_int8")


def command(*arguments: str) -> Any:
    """Run onnxslim-llm and return what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "onnxslim_llm", *arguments, "--json", "-q"], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def measure(tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Compile, evaluate and time everything; one record a line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [SAMPLE]
        records: list[dict[str, Any]] = [{"name": "source, float32"}]
        for recipe, target in ARTIFACTS:
            folder = Path(scratch) / f"{recipe}-{target}"
            data = ("--calib", str(SAMPLE / "calib.txt")) if recipe == "int4-calibrated" else ()
            where = ("-o", str(folder), "--recipe", recipe, "--target", target)
            manifest = command("compile", str(SAMPLE), *where, *data)
            files = {f["path"]: f["bytes"] for f in manifest["artifact"]["files"]}
            record = {"name": f"`{recipe}`, {target}", "bytes": sum(files.values())}
            record["once"] = manifest["source"]["weight_bytes"] - manifest["source"]["bytes_by_role"].get("lm_head", 0)
            text = str(SAMPLE / "heldout.txt")
            window = str(json.loads((SAMPLE / "config.json").read_text())["max_position_embeddings"])
            limits = ("--max-tokens", str(tokens), "--window", window)
            record |= command("eval", str(folder), "--text", text, "--vs", str(SAMPLE), *limits)
            folders.append(folder)
            records.append(record)
        versus = [part for folder in folders[1:] for part in ("--vs", str(folder))]
        speeds = command("bench", str(SAMPLE), *versus, "--repeats", str(repeats))["results"]
        records[0] |= {
            "bytes": speeds[0]["file_bytes"],
            "once": records[1]["once"],
            "ppl_artifact": records[1]["ppl_source"],
        }
        for record, speed in zip(records, speeds, strict=True):
            record |= {key: speed[key] for key in ("prefill_tokens_per_second", "decode_tokens_per_second")}
    return records


def table(records: list[dict[str, Any]], tokens: int) -> str:
    """Return the table with its footnote."""
    source = records[0]
    lines = [
        "| | MB | of the float32 weights | perplexity | mean KL | same top token | decode | prefill |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        kl = "" if "kld_mean" not in r else "< 1e-9" if r["kld_mean"] < 1e-9 else f"{r['kld_mean']:.2g}"
        top = f"{100 * r['top1_agreement']:.1f} %" if "top1_agreement" in r else ""
        ratio = f" ({r['ppl_ratio']:.3f}x)" if "ppl_ratio" in r else ""
        speed = [f"{r[key] / source[key]:.2f}x" for key in ("decode_tokens_per_second", "prefill_tokens_per_second")]
        size = [f"{r['bytes'] / 1e6:.2f}", f"{r['bytes'] / r['once']:.3f}x"]
        cells = [r["name"], *size, f"{r['ppl_artifact']:.2f}{ratio}", kl, top, *speed]
        lines.append(f"| {' | '.join(cells)} |")
    has = [name for name in FEATURES if name in cpu_features()] or ["no AVX2"]
    machine = f"{cpu_name() or 'unknown CPU'}, {usable_cpus()} cores, {', '.join(has)}"
    lines += [
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {machine}, by `python benchmarks/sample/readme_table.py`: graph and "
        f"weights; float32 weights with the tied embedding counted once; {tokens} held-out tokens; speed relative to "
        "the source in ONNX Runtime, prompt of 256 tokens, KV cache in use.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text = table(measure(args.tokens, args.repeats), args.tokens)
    print(text)
    if args.write:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
