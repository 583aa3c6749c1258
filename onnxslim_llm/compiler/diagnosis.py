"""What each compressed layer lost, measured: the outputs of its product in source and artifact, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxslim_llm.artifact.manifest import LayerError
from onnxslim_llm.errors import SlimError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.stats.taps import product_outputs

__all__ = ["measure_layers"]

#: Both models run with all products' outputs kept: larger ones are not diagnosed.
LARGEST_BYTES = 1 << 30
#: Tokens of the run.
TOKENS = 256


def measure_layers(
    layers: Sequence[LayerError], source: Path, artifact: Path, tokens: Sequence[int] | None, threads: int
) -> list[LayerError]:
    """Return the layers with the measured error of their outputs, where both models still name these.

    Args:
        layers: What was compressed.
        source: The .onnx file.
        artifact: What was made of it.
        tokens: Of real text, for a decoder; random ones are used without.
        threads: Of the runtime.
    """
    model = open_model(source)
    if not layers or model.weight_bytes() > LARGEST_BYTES:
        return list(layers)
    from onnxslim_llm.verify.layers import compare_layers  # loads the runtime

    outputs = product_outputs(model.to_proto("omit").graph)
    wanted = {outputs[layer.name] for layer in layers if layer.name in outputs}
    try:
        cut = None if tokens is None else tokens[:TOKENS]
        found = compare_layers(source, artifact, threads=threads, token_ids=cut, names=wanted)
    except SlimError:  # a diagnosis is no reason to fail: fused products have no outputs to compare
        return list(layers)
    measured = {error.name: error.sqnr_db for error in found.layers}
    return [
        layer.model_copy(update={"sqnr_db": measured.get(outputs.get(layer.name, ""), layer.sqnr_db)})
        for layer in layers
    ]
