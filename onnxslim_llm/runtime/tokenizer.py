"""Text to token ids and back with the `tokenizers` library, also piece by piece while a model generates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.runtime.sidefiles import SideFiles

__all__ = ["TextTokenizer", "load_tokenizer"]


class TextTokenizer:
    """A Hugging Face tokenizer.json with the end tokens that its folder names.

    Attributes:
        eos: ids that end a text, possibly none.
        path: the tokenizer.json.
    """

    def __init__(self, tokenizer: Any, path: Path, side: SideFiles) -> None:
        self._tokenizer = tokenizer
        self.path = path
        eos = list(side.eos)
        named = None if side.eos_text is None else tokenizer.token_to_id(side.eos_text)
        if named is not None and named not in eos:
            eos.append(named)
        self.eos: tuple[int, ...] = tuple(eos)

    @property
    def size(self) -> int:
        """Number of ids, added tokens included; ids are below it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer's own template adds, such as a start token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`, special tokens left out unless `special`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as soon as it is complete, never half a character.

        Bytes that stay incomplete come at the end, as U+FFFD.
        """
        from tokenizers.decoders import DecodeStream

        stream, pending = DecodeStream(skip_special_tokens=True), list[int]()
        for token in ids:
            pending.append(token)
            piece = stream.step(self._tokenizer, token)
            if piece:
                pending.clear()
                yield piece
        rest = self.decode(pending)
        if rest:
            yield rest


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Load the tokenizer of a model folder, of the folder of a model file, or a tokenizer.json itself.

    Raises:
        UsageError: there is no tokenizer.json.
        ModelError: the file is no tokenizer.
        ResourceError: the `tokenizers` library is not installed.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = path if path.suffix == ".json" else folder / "tokenizer.json"
    if not (path.exists() and file.is_file()):  # a mistyped path is not its parent folder
        raise UsageError(
            "no tokenizer found",
            where=str(file if path.exists() else path),
            todo="put the model's tokenizer.json there; `eval` and `generate` also take --tokenizer",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ResourceError(
            "text needs the 'tokenizers' library, which is not installed", todo="pip install 'onnxslim-llm[text]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every defect
        raise ModelError(f"not a tokenizer: {error}", where=str(file)) from error
    return TextTokenizer(tokenizer, file, SideFiles.of(file.parent))
