"""The quality table's own arithmetic: readers of checkpoints, bytes, comparison; and GGUF against ONNX Runtime."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from contestants import weight_bytes
from encoder_quality import compare
from gguf_peer import quantize, write_gguf
from llama_checkpoint import Llama2cTokenizer, read_hugging_face, read_llama2c
from onnx import TensorProto, helper, numpy_helper
from render import markdown
from subjects import parameters, sentences

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.gguf import GgufDecoder
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.verify.quality import evaluate

#: Two runtimes sum float32 products in their own order.
SAME = 1e-8


def test_a_llama2c_checkpoint(tmp_path: Path) -> None:
    hidden, ffn, layers, heads, kv_heads, vocab, context = 8, 12, 2, 4, 2, 16, 6
    rng = np.random.default_rng(0)
    shapes = [(vocab, hidden), (layers, hidden), (layers, hidden, hidden), (layers, 4, hidden), (layers, 4, hidden)]
    shapes += [(layers, hidden, hidden), (layers, hidden), (layers, ffn, hidden), (layers, hidden, ffn)]
    shapes += [(layers, ffn, hidden), (hidden,), (context, 1), (context, 1)]
    arrays = [rng.standard_normal(shape).astype("<f4") for shape in shapes]
    file = tmp_path / "model.bin"
    head = struct.pack("<7i", hidden, ffn, layers, heads, kv_heads, vocab, context)
    file.write_bytes(head + b"".join(a.tobytes() for a in arrays))
    model = read_llama2c(file)
    assert (model.layers, model.vocab, model.context) == (layers, vocab, context)
    assert np.array_equal(model.tensors["blk.1.attn_k"], arrays[3][1])
    assert np.array_equal(model.tensors["blk.0.ffn_up"], arrays[9][0])
    assert np.array_equal(model.tensors["output_norm"], arrays[10])
    assert "output" not in model.tensors
    file.write_bytes(head)
    with pytest.raises(ValueError, match="no llama2"):
        read_llama2c(file)


def test_the_best_pair_merges_first(tmp_path: Path) -> None:
    pieces = [(b"<unk>", 0.0), (b"<s>", 0.0), (b"</s>", 0.0)]
    pieces += [(f"<0x{i:02X}>".encode(), 0.0) for i in range(256)]
    pieces += [(b" ", -5.0), (b"a", -5.0), (b"b", -5.0), (b"ab", -2.0), (b"ba", -1.0), (b" a", -3.0), (b"aba", -4.0)]
    raw = struct.pack("<i", 8) + b"".join(struct.pack("<fi", score, len(p)) + p for p, score in pieces)
    (tmp_path / "tok.bin").write_bytes(raw)
    words = Llama2cTokenizer(tmp_path / "tok.bin", len(pieces))
    named = {piece: i for i, (piece, _) in enumerate(pieces)}
    # " aba": "ba" has the best score, then " a" before it.
    assert words.encode("aba") == [1, named[b" a"], named[b"ba"]]
    assert words.encode("é")[-2:] == [3 + byte for byte in "é".encode()]


def test_equal_weights_count_once(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    tensors = [numpy_helper.from_array(a, n) for n, a in (("e", table), ("same", table), ("turned", table.T.copy()))]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 8]) for n in "xy"]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors))
    onnx.save(model, tmp_path / "m.onnx")
    assert parameters(tmp_path / "m.onnx") == table.size
    bare = weight_bytes(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:])))
    assert 2 * table.nbytes < weight_bytes(model) < 2 * table.nbytes + bare + 100


def test_sentence_vectors() -> None:
    source = np.eye(3)
    same = compare(source, source)
    assert (same.distance_mean, same.mse, same.neighbour) == (0, 0, 1)
    turned = np.array([[0.6, 0.8, 0], [0, 1, 0], [0, 0, 1.0]])
    assert compare(source, turned).distance_mean == pytest.approx(0.4 / 3)
    assert sentences("x = 1  # Return the number of open files in the folder.\n", 5) == [
        "Return the number of open files in the folder."
    ]


def cell(group: str, name: str, size: int, kl: float) -> dict[str, Any]:
    about = {"subject": "m", "group": group, "name": name, "stamp": f"{group} 1; 5 tokens", "date": "2026-11-21"}
    return {**about, "bytes": size, "bpw": size / 8, "kl_mean": kl, "kl_p99": kl, "ppl_ratio": 1.0, "top1": 1.0}


def test_duels_are_fought_with_the_peers_that_no_smaller_one_beats() -> None:
    cells = [cell("p", "small", 10, 0.5), cell("p", "worse", 12, 0.6), cell("p", "big", 20, 0.1)]
    cells += [cell("ours", "one", 11, 0.4), cell("ours", "two", 19, 0.05)]
    about = {"kind": "decoder", "parameters": 8, "window": 4, "tokens": 5}
    text = markdown({"subjects": {"m": about}, "cells": {c["name"]: c for c in cells}, "machine": "here"})
    duels = text.partition("best peer")[2]
    assert "| p small | 1.25 | 0.5 | none so small |" in duels
    assert "| p big | 2.50 | 0.1 | two | 2.38 | 0.05 | 0.50 |" in duels
    assert "worse" not in duels


@pytest.fixture(scope="module")
def gguf_file(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("gguf") / "f32.gguf"
    write_gguf(read_hugging_face(sample_dir), path)
    return path


def test_the_written_gguf_is_the_same_model(sample_dir: Path, gguf_file: Path) -> None:
    found = evaluate(
        gguf_file,
        sample_dir / "heldout.txt",
        load_tokenizer(sample_dir),
        versus=sample_dir / "model.onnx",
        window=64,
        max_tokens=200,
        threads=1,
    )
    assert found.difference is not None
    assert found.difference.kld_mean < SAME
    assert found.difference.top1_agreement == 1
    assert found.difference.greedy is not None
    assert found.difference.greedy.prefix_match == 1


def test_importances_change_what_llama_cpp_does(sample_dir: Path, gguf_file: Path, tmp_path: Path) -> None:
    ones = {f"blk.{i}.ffn_up.weight": np.ones(256, np.float32) for i in range(5)}
    steep = {name: np.geomspace(1e-3, 1e3, 256).astype(np.float32) for name in ones}
    for name, importances in (("a", ones), ("b", steep)):
        quantize(gguf_file, tmp_path / f"{name}.gguf", "Q4_0", importances)
    a, b = ((tmp_path / f"{name}.gguf").read_bytes() for name in "ab")
    assert len(a) == len(b) < gguf_file.stat().st_size / 5
    assert a != b


def test_a_gguf_decoder_goes_on_and_back(gguf_file: Path) -> None:
    decoder = GgufDecoder(gguf_file, context=32, threads=1)
    ids = np.arange(12)[None]
    whole, _ = decoder.prefill(ids)
    first, state = decoder.prefill(ids[:, :5])
    rest, _ = decoder.prefill(ids[:, 5:], state)
    assert np.allclose(np.concatenate([first, rest], axis=1), whole, atol=1e-3)
    again, _ = decoder.prefill(ids[:, 5:7], state)
    assert np.allclose(again, whole[:, 5:7], atol=1e-3)
    with pytest.raises(UsageError, match="do not fit"):
        decoder.prefill(np.zeros((1, 40), np.int64))
    with pytest.raises(UsageError, match="one row"):
        decoder.prefill(np.zeros((2, 4), np.int64))


def test_what_is_no_gguf_is_told(tmp_path: Path, gguf_file: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="cannot load"):
        GgufDecoder(tmp_path / "bad.gguf")
    with pytest.raises(UsageError, match="no such GGUF file"):
        GgufDecoder(tmp_path / "missing.gguf")
