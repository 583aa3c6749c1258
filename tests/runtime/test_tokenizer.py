from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.runtime.tokenizer import load_tokenizer

TEXT = "def naïve(x): return '日本 🙂🙃' + x  # ünïcode"


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def f(x): return x"] * 4, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def byte_fallback(tmp_path: Path) -> Path:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for letter in "▁defrtunx(:)'":
        vocab.setdefault(letter, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_streams_whole_characters_that_join_to_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    words = load_tokenizer(request.getfixturevalue(kind))
    ids = words.encode(TEXT)
    pieces = list(words.stream(ids))
    assert "".join(pieces) == words.decode(ids) == TEXT
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_cut_character_ends_as_a_replacement_character(kind: str, request: pytest.FixtureRequest) -> None:
    words = load_tokenizer(request.getfixturevalue(kind))
    whole = words.encode(TEXT)
    for length in range(1, len(whole) + 1):
        text = "".join(words.stream(whole[:length]))
        complete = text.rstrip("\ufffd")
        assert TEXT.startswith(complete)
        assert len(text) - len(complete) <= 3  # a character of four bytes that lacks its last
        if complete != text:
            assert len(complete.encode()) < len(TEXT.encode())
    assert "".join(words.stream(whole[:-1])) != TEXT


def test_special_tokens_do_not_show_in_a_stream(byte_fallback: Path) -> None:
    words = load_tokenizer(byte_fallback)
    assert list(words.stream([*words.encode("def"), 2])) == ["d", "e", "f"]


def test_special_tokens(byte_fallback: Path) -> None:
    words = load_tokenizer(byte_fallback)
    assert words.encode("d")[0] == 1
    assert words.encode("d", special=False)[0] != 1
    assert words.decode([1, *words.encode("d", special=False), 2]) == "d"
    assert words.decode([2], special=True) == "</s>"
    assert words.size == 3 + 256 + 13


def test_end_tokens_come_from_the_side_files(byte_level: Path) -> None:
    assert load_tokenizer(byte_level).eos == ()
    (byte_level / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert load_tokenizer(byte_level).eos == (0,)
    (byte_level / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 17]}))
    assert load_tokenizer(byte_level).eos == (0, 17)


def test_found_from_folder_model_file_and_file_itself(byte_level: Path) -> None:
    (byte_level / "model.onnx").touch()
    for path in (byte_level, byte_level / "model.onnx", byte_level / "tokenizer.json", str(byte_level)):
        assert load_tokenizer(path).path == byte_level / "tokenizer.json"


def test_none_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer found") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in caught.value.where
    assert "--tokenizer" in caught.value.todo


def test_a_mistyped_path_is_not_its_parent_folder(byte_level: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer found") as caught:
        load_tokenizer(byte_level / "typo")
    assert caught.value.where == str(byte_level / "typo")


def test_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"no": "tokenizer"}')
    with pytest.raises(ModelError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_library_not_installed(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ResourceError, match="'tokenizers' library") as caught:
        load_tokenizer(byte_level)
    assert "onnxslim-llm[text]" in caught.value.todo


def test_the_sample_tokenizer_keeps_every_byte(sample_dir: Path) -> None:
    words = load_tokenizer(sample_dir)
    text = (sample_dir / "heldout.txt").read_text(encoding="utf-8")[:3000]
    ids = words.encode(text)
    assert words.decode(ids) == text
    assert "".join(words.stream(ids)) == text
    assert words.eos
