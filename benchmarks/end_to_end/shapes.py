"""The same random decoder for each runtime: ONNX, compiled with and without our operators, and GGUF."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gguf_decoder import write_gguf
from reference_decoder import PRESETS, DecoderSpec, write

from onnxslim_llm.compiler import compile as compile_model

SHAPES: dict[str, DecoderSpec] = {
    "tiny": PRESETS["small"],
    "tinyllama-1.1b": PRESETS["1.1b"],
    "llama-3.2-1b": DecoderSpec(
        vocab=128256,
        hidden=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=8192,
        tied="transpose",
        rope_theta=500000.0,
    ),
}
"""Sizes of published models; "tiny" is for trying the script. Activations are float32, as onnxruntime-genai's builder
has them for CPUs."""

COMPILED = ("ort-cpu", "ort-cpu-ops")
"""Targets that are compared; both get one cache buffer that is extended in place, and logits of the last token only."""
LLAMA = "llama.cpp"
SETTINGS = (
    "quantize_weights.symmetric=true",
    "quantize_weights.method=rtn",
    *(f"quantize_weights.{role}_bits=4" for role in ("embedding", "lm_head", "sensitive")),
)
"""4 bits and a scale for 32 weights everywhere, as Q4_0 has; the recipe gives roles that lose most 8 bits."""


def prepare(shape: str, folder: Path, names: list[str]) -> dict[str, Path]:
    """Write what is missing in `folder`; returns the file of each contestant.

    Args:
        shape: a key of `SHAPES`.
        folder: up to 8 GB for the larger shapes.
        names: of `COMPILED` and `LLAMA`.
    """
    spec = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for name in names:
        if name == LLAMA:
            found[name] = folder / "q4_0.gguf"
            if not found[name].exists():
                write_gguf(spec, found[name])
            continue
        found[name] = folder / name / "model.onnx"
        if not found[name].exists():
            source = folder / "source.onnx"
            if not source.exists():
                partial = folder / "partial" / source.name
                partial.parent.mkdir(exist_ok=True)
                write(spec, partial)
                for file in sorted(partial.parent.iterdir(), reverse=True):  # the data first, the model last
                    file.rename(folder / file.name)
            compile_model(
                source,
                folder / name,
                target=name,
                recipe="int4-fast",
                settings=SETTINGS,
                kv_cache="shared",
                logits="last",
                verify="off",
                force=True,
            )
    return found
