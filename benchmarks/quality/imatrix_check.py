"""Is the importance matrix that the quality table gives llama.cpp the one that llama.cpp's own tool collects?

    python benchmarks/quality/imatrix_check.py --tool LLAMA_IMATRIX

The tool reads text, not token ids: it gets the sample model with a vocabulary of one character a token, and the
calibration tokens spelled in these. It is built from llama.cpp's sources (`cmake --build . --target llama-imatrix`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from gguf_peer import read_checkpoint, write_gguf
from llama_checkpoint import LlamaCheckpoint
from peers_gguf import Importances, importances
from subjects import WINDOW, Subject, sample

#: The first of many thousand characters that no tokenizer treats specially.
_FIRST_CHARACTER = 0x4E00


def collect(tool: Path, subject: Subject, model: LlamaCheckpoint, folder: Path) -> Importances:
    """Let llama-imatrix collect mean squares of the inputs on the subject's calibration tokens."""
    import gguf

    words = [chr(_FIRST_CHARACTER + token) for token in range(model.vocab)]
    source, text, out = (folder / name for name in ("f32.gguf", "text.txt", "imatrix.gguf"))
    write_gguf(model, source, words)
    ids = json.loads(subject.calibration.read_text())["tokens"]
    text.write_text("".join(words[token] for token in ids), encoding="utf-8")
    size = str(WINDOW)
    command = [tool, "-m", source, "-f", text, "-o", out, "-c", size, "-b", size, "-t", "1", "--no-ppl"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    found = {tensor.name: np.asarray(tensor.data, np.float64).ravel() for tensor in gguf.GGUFReader(out).tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    counts = {int(found[f"{name}.counts"][0]) for name in names}
    print(f"llama-imatrix saw {counts} of {len(ids)} tokens")
    return {name: found[f"{name}.in_sum2"] / found[f"{name}.counts"] for name in names}


def main() -> None:
    """Print how far the two are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", type=Path, required=True, help="the program llama-imatrix")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subject = sample(folder, WINDOW)
        assert subject.checkpoint is not None
        model = read_checkpoint(subject.checkpoint)
        theirs = collect(args.tool, subject, model, folder)
        ours = importances(subject, model.layers, folder)
    if theirs.keys() != ours.keys():
        raise SystemExit(f"of other tensors: {sorted(theirs.keys() ^ ours.keys())}")
    sums = [theirs[name].sum() / ours[name].sum() for name in ours]
    channels = [float(np.abs(theirs[name] / ours[name] - 1).max()) for name in ours]
    correlations = [float(np.corrcoef(theirs[name], ours[name])[0, 1]) for name in ours]
    print(f"{len(ours)} tensors: correlation at least {min(correlations):.8f}")
    print(
        f"sums of a tensor: {min(sums):.6f} to {max(sums):.6f} times ours; a channel: at most {max(channels):.2%} off"
    )


if __name__ == "__main__":
    main()
