"""llama.cpp in the quality table, and the importance matrices that it gets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf_peer
import numpy as np
from contestants import Contestant, package_stamp
from numpy.typing import NDArray
from subjects import Subject

from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.progress import Silent

#: Mean square of each input channel by tensor.
Importances = dict[str, NDArray[np.floating[Any]]]

#: Mixtures of types, from 2 to 8 bits.
_KINDS = (
    *("Q2_K", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K_M", "Q4_0", "IQ4_XS", "IQ4_NL"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
#: Of these, those that llama.cpp refuses to make without an importance matrix.
_NEED_IMPORTANCES = {"IQ2_M", "IQ3_XXS", "IQ3_XS"}
#: These become IQ4_NL or Q4_0, which are rows of their own, where a matrix's rows are no multiple of a block.
_WHOLE_BLOCKS = {"Q2_K", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "Q3_K_S", "IQ4_NL"}
_BLOCK = 256
#: By model: they are collected once.
_KNOWN: dict[str, Importances] = {}


def gguf_peers() -> Iterator[Contestant]:
    """float32, and each mixture with and without an importance matrix."""
    stamp = package_stamp("llama-cpp-python")
    yield Contestant("llama.cpp", "F32", partial(_gguf, "", False), stamp, kinds=("decoder",))
    for kind in _KINDS:
        for weighted in (True,) if kind in _NEED_IMPORTANCES else (False, True):
            name = f"{kind}, imatrix" if weighted else kind
            make = partial(_gguf, kind, weighted)
            fits = _has_whole_blocks if kind in _WHOLE_BLOCKS else lambda _: True
            yield Contestant("llama.cpp", name, make, stamp, kinds=("decoder",), fits=fits)


def _has_whole_blocks(subject: Subject) -> bool:
    assert subject.checkpoint is not None
    model = gguf_peer.read_checkpoint(subject.checkpoint)
    return model.hidden % _BLOCK == model.intermediate % _BLOCK == 0


def _gguf(kind: str, weighted: bool, subject: Subject, folder: Path) -> Path:
    assert subject.checkpoint is not None
    model = gguf_peer.read_checkpoint(subject.checkpoint)
    plain = folder / "f32.gguf"
    gguf_peer.write_gguf(model, plain)
    if not kind:
        return plain
    out = folder / "model.gguf"
    gguf_peer.quantize(plain, out, kind, importances(subject, model.layers, folder) if weighted else None)
    return out


def importances(subject: Subject, layers: int, folder: Path) -> Importances:
    """Mean squares of the inputs of every layer's products, on our calibration tokens: what llama-imatrix collects."""
    if subject.name in _KNOWN:
        return _KNOWN[subject.name]
    calibrator = Calibrator(subject.model, subject.calibration, folder / "statistics", 1, Silent())
    statistics = calibrator.statistics()
    assert statistics is not None
    squares = []
    for tap in statistics.taps:
        stored = statistics.of_tensor(tap.tensor)
        assert stored is not None
        both = stored.load()
        squares.append((both.fit.square + both.held.square) / (both.fit.count + both.held.count))
    calibrator.discard()
    assert len(squares) == 4 * layers + 1, "four inputs a layer, and the classifier's"
    readers = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
    _KNOWN[subject.name] = {
        f"blk.{layer}.{part}.weight": squares[4 * layer + i]
        for layer in range(layers)
        for i, parts in enumerate(readers)
        for part in parts
    }
    return _KNOWN[subject.name]
