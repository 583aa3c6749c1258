"""Exports by the model builder of onnxruntime-genai: GroupQueryAttention, fused from the start, with a KV cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from zoo.families import VOCAB, Family
from zoo.weights import build

__all__ = ["export"]

_TIME_LIMIT = 300  # seconds

# The builder 0.18 is written for transformers 5, Optimum's exporter for 4.57. What it misses in 4.57: two classes of
# multimodal models, which it imports but uses for no family of the zoo, and the newer spelling of RoPE in the
# configuration. In a process of its own, as the builder changes sys.path.
_DRIVER = """
import runpy, transformers
for name in ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"):
    if not hasattr(transformers, name):
        setattr(transformers, name, type(name, (), {}))
load = transformers.AutoConfig.from_pretrained
def from_pretrained(*args, **kwargs):
    config = load(*args, **kwargs)
    if hasattr(config, "rope_scaling"):
        scaling = config.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        config.rope_parameters = {**scaling, "rope_type": kind, "rope_theta": config.rope_theta}
        del config.rope_scaling
    return config
transformers.AutoConfig.from_pretrained = from_pretrained
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
"""


def export(family: Family, folder: Path) -> None:
    """Write model.onnx, its data and genai_config.json in float32 for the CPU into `folder`.

    Raises:
        RuntimeError: the builder does not know the architecture or fails; its last line.
    """
    source = folder / "huggingface"
    build(family).save_pretrained(source)
    _write_tokenizer(source)
    options = ["-m", family.name, "-i", source, "-o", folder, "-p", "fp32", "-e", "cpu", "-c", folder / "cache"]
    # Caches as long as the text, as from every other exporter, also where a window would do with less.
    options += ["--extra_options", "windowed_kv_cache=false"]
    command = [sys.executable, "-c", _DRIVER, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False)
    if done.returncode or not any(folder.glob("*.onnx")):
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")


def _write_tokenizer(folder: Path) -> None:
    """The builder wants a tokenizer; one word a token is enough."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", unk_token="t0"
    ).save_pretrained(folder)
