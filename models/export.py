"""Export the trained model to ONNX with a key/value cache and compare it with PyTorch in ONNX Runtime.

Inputs and outputs are named as Optimum names them; batch, sequence and past length are free. ``torchscript`` is the
tracing exporter most published models went through, ``dynamo`` the newer one (it needs the package onnxscript).

    python -m models.export models/stdlib-llama -o models/stdlib-llama/model.onnx --exporter torchscript
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.llama import KeyValue, Llama, LlamaConfig, load_hf

OPSET = 20  # the newest that the tracing exporter writes
MAX_DELTA = 1e-4  # logits of size ~10 in float32, summed in another order: 10 * 2**-23 * sqrt(layers * hidden) ~ 5e-5
BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "past_sequence_length + sequence_length",
)


class WithFlatOutputs(nn.Module):
    """The step with a cache, its outputs flattened to logits, then key and value of each layer."""

    def __init__(self, model: Llama) -> None:
        """Wrap ``model`` without copying it."""
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[KeyValue]
    ) -> tuple[Tensor, ...]:
        """See :meth:`models.llama.Llama.forward`."""
        logits, presents = self.model(input_ids, attention_mask, position_ids, past_key_values)
        return (logits, *(tensor for present in presents for tensor in present))


def cache_names(config: LlamaConfig, prefix: str) -> list[str]:
    """``prefix``.0.key, ``prefix``.0.value, ``prefix``.1.key, ..."""
    return [f"{prefix}.{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]


def random_cache(config: LlamaConfig, batch: int, length: int) -> list[KeyValue]:
    """A cache of ``length`` arbitrary positions."""
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]


def dynamic_axes(config: LlamaConfig) -> dict[str, dict[int, str]]:
    """Name of every free dimension of every input and output."""
    axes = {name: {0: BATCH, 1: SEQUENCE} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: BATCH, 1: TOTAL}
    axes |= {name: {0: BATCH, 2: PAST} for name in cache_names(config, "past_key_values")}
    axes |= {name: {0: BATCH, 2: TOTAL} for name in cache_names(config, "present")}
    return axes


def export(model: Llama, path: Path, exporter: str) -> None:
    """Write ``model`` as one self-contained ONNX file with the exporter ``torchscript`` or ``dynamo``."""
    config, batch, tokens, past = model.config, 2, 3, 5
    arguments = (
        torch.randint(0, config.vocab_size, (batch, tokens)),
        torch.ones(batch, past + tokens, dtype=torch.int64),
        torch.arange(past, past + tokens).repeat(batch, 1),
        random_cache(config, batch, past),
    )
    inputs = ["input_ids", "attention_mask", "position_ids", *cache_names(config, "past_key_values")]
    outputs = ["logits", *cache_names(config, "present")]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about every Python branch on a fixed size
        if exporter == "torchscript":
            torch.onnx.export(
                WithFlatOutputs(model), arguments, str(path), dynamo=False, opset_version=OPSET,
                input_names=inputs, output_names=outputs, dynamic_axes=dynamic_axes(config),
            )  # fmt: skip
        else:
            free = torch.export.Dim.DYNAMIC
            cache_shapes = [({0: free, 2: free}, {0: free, 2: free}) for _ in range(config.num_hidden_layers)]
            torch.onnx.export(
                WithFlatOutputs(model), arguments, str(path), dynamo=True, external_data=False,
                input_names=inputs, output_names=outputs,
                dynamic_shapes=({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, cache_shapes),
            )  # fmt: skip
            name_dimensions(path, dynamic_axes(config))
    onnx.checker.check_model(str(path), full_check=True)


def name_dimensions(path: Path, axes: dict[str, dict[int, str]]) -> None:
    """Replace the dynamo exporter's invented dimension names (s77, ...) by the ones in ``axes``."""
    proto = onnx.load(path)
    values = [*proto.graph.input, *proto.graph.output]
    renamed: dict[str, str] = {}
    for value in values:
        for axis, name in axes.get(value.name, {}).items():
            if old := value.type.tensor_type.shape.dim[axis].dim_param:
                renamed.setdefault(old, name)
    for value in [*values, *proto.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]
    onnx.save(proto, path)


@dataclass(frozen=True)
class Case:
    """One comparison: ``left`` and ``right`` padded positions are masked in every row but the first."""

    batch: int
    tokens: int
    past: int = 0
    left: int = 0
    right: int = 0


CASES = (
    Case(1, 1), Case(1, 17), Case(2, 9), Case(1, 1, past=6), Case(2, 1, past=40), Case(2, 5, past=11),
    Case(2, 12, left=4), Case(2, 12, right=3), Case(2, 1, past=12, left=4), Case(1, 512),
)  # fmt: skip


def deltas(model: Llama, path: Path) -> Iterator[tuple[Case, float]]:
    """Largest absolute difference between ONNX Runtime and PyTorch over all outputs, per case."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    for case in CASES:
        total = case.past + case.tokens
        mask = torch.ones(case.batch, total, dtype=torch.int64)
        mask[1:, : case.left] = 0
        mask[1:, total - case.right :] = 0
        ids = torch.randint(0, model.config.vocab_size, (case.batch, case.tokens))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, case.past :]
        cache = random_cache(model.config, case.batch, case.past)
        with torch.no_grad():
            want = WithFlatOutputs(model)(ids, mask, positions, cache)
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(),
            **dict(zip(cache_names(model.config, "past_key_values"), (t.numpy() for kv in cache for t in kv),
                       strict=True)),
        }  # fmt: skip
        got = session.run(None, feeds)
        yield case, max(float(np.abs(g - w.numpy()).max()) for g, w in zip(got, want, strict=True))


def main() -> None:
    """Export and check; exit status 1 when ONNX Runtime and PyTorch differ."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument("--exporter", choices=("torchscript", "dynamo"), default="torchscript")
    args = parser.parse_args()
    model = load_hf(args.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    export(model, args.out, args.exporter)
    worst = 0.0
    for case, delta in deltas(model, args.out):
        worst = max(worst, delta)
        print(f"{case}: max |delta| {delta:.2e}")
    proto = onnx.load(args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {len(proto.graph.node)} nodes, max |delta| {worst:.2e}")
    if not worst < MAX_DELTA:
        raise SystemExit(f"{args.out} differs from PyTorch by {worst:.2e}, more than {MAX_DELTA:.0e}")


if __name__ == "__main__":
    main()
