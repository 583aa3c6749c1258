"""The same model as GGUF: written in float32, then quantized by llama.cpp itself, with and without importances.

    python benchmarks/quality/gguf_peer.py models/stdlib-llama -o sample.gguf --type Q4_K_M
    python benchmarks/quality/gguf_peer.py stories260K.bin -o stories.gguf

Llama only. Needs the packages gguf and llama-cpp-python; the quantizer is the one in its library. The files have no
vocabulary: they are fed token ids. Where a row is no multiple of 256, llama.cpp takes another type than the one asked
for (Q4_K becomes Q5_0, Q6_K becomes Q8_0, ...); `--types` shows what each tensor got.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gguf_llama import LlamaSizes, llama_gguf
from llama_checkpoint import LlamaCheckpoint, read_hugging_face, read_llama2c
from numpy.typing import NDArray

from onnxslim_llm.runtime.gguf import load_llama_cpp, quiet

#: llama.cpp's numbers of its mixtures.
TYPES = {
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
}


def write_gguf(model: LlamaCheckpoint, path: Path, words: Sequence[str] = ()) -> None:
    """Write a float32 GGUF of the architecture llama; without `words` it has no vocabulary."""
    import gguf

    sizes = LlamaSizes(
        hidden=model.hidden,
        intermediate=model.intermediate,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.hidden // model.heads,
        vocab=model.vocab,
        context=model.context,
        epsilon=model.epsilon,
        theta=model.theta,
    )
    with llama_gguf(path, sizes, gguf.LlamaFileType.ALL_F32, words) as writer:
        for name, array in model.tensors.items():
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array, np.float32))


def quantize(
    source: Path, out: Path, kind: str, importances: Mapping[str, NDArray[np.floating[Any]]] | None = None
) -> None:
    """Let llama.cpp quantize a GGUF file.

    Args:
        source: float32 GGUF.
        out: where the result goes.
        kind: one of `TYPES`.
        importances: mean square of each input channel by tensor name: the importance matrix of llama.cpp.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    llama = load_llama_cpp()
    log = quiet(llama)
    options = llama.llama_model_quantize_default_params()
    options.ftype = TYPES[kind]
    options.nthread = 1
    held = {name: np.ascontiguousarray(values, np.float32) for name, values in (importances or {}).items()}
    entries = (llama.llama_model_imatrix_data * (len(held) + 1))()  # one more: an empty name ends the list
    for entry, (name, values) in zip(entries, held.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if held:
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(llama.llama_model_imatrix_data))
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(options)):
        reasons = [line.strip() for line in log.messages if any(map(str.isalpha, line))]  # not the rules around them
        raise RuntimeError(f"llama.cpp does not make {kind} of it: {'; '.join(reasons) or 'no reason given'}")


def tensor_types(path: Path) -> Counter[str]:
    """How many tensors have which type."""
    import gguf

    return Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)


def read_checkpoint(path: Path) -> LlamaCheckpoint:
    """Read a Hugging Face folder or a llama2.c file."""
    return read_hugging_face(path) if path.is_dir() else read_llama2c(path)


def main() -> None:
    """Convert one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Hugging Face folder, or llama2.c .bin")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--type", choices=["F32", *TYPES], default="F32")
    parser.add_argument("--types", action="store_true", help="print how many tensors have which type")
    args = parser.parse_args()
    plain = args.out if args.type == "F32" else args.out.with_suffix(".f32.gguf")
    write_gguf(read_checkpoint(args.checkpoint), plain)
    if args.type != "F32":
        quantize(plain, args.out, args.type)
        plain.unlink()
    if args.types:
        print(dict(tensor_types(args.out)))


if __name__ == "__main__":
    main()
