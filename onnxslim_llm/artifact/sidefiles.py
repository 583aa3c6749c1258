"""Files that belong to a model without being the model: tokenizer, configuration, chat template, licence."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from onnxslim_llm.artifact.manifest import MANIFEST_NAME, REPORT_NAME

__all__ = ["SIDE_FILE_LIMIT", "carry_side_files", "side_files"]

SIDE_FILE_LIMIT = 64 * 2**20
"""Bytes. The largest tokenizer.json in use (256 k tokens) has 35 MB; larger files are weights in some disguise."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names that the Hugging Face and ONNX Runtime GenAI layouts give to the files that a runtime needs beside the model.
_KNOWN = _names(
    "config.json generation_config.json genai_config.json tokenizer.json tokenizer.model "
    "tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "spiece.model chat_template.jinja chat_template.json preprocessor_config.json processor_config.json "
    "quantize_config.json"
)
_KINDS = _names(".json .jinja .model .tiktoken .yaml .yml .toml")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_OURS = frozenset({MANIFEST_NAME, REPORT_NAME})


def side_files(folder: Path, *, only_known: bool) -> tuple[list[Path], list[str]]:
    """The side files that lie directly in `folder`, sorted by name, and notes about large ones that are left behind.

    Args:
        folder: The source model's folder.
        only_known: Take only names that no other file has (for a MODEL that was given as a file: its folder may hold
            anything); otherwise every configuration file, and what the licence wants to be kept.

    Raises:
        OSError: The folder cannot be read.
    """
    taken: list[Path] = []
    notes: list[str] = []
    for path in sorted(folder.iterdir()):
        wanted = path.name in _KNOWN
        if not only_known:
            wanted = wanted or path.suffix in _KINDS or path.name.upper().startswith(_LEGAL)
        # An index of sharded weights would point to weights that are not there.
        index = path.name.endswith(".index.json")
        if not wanted or index or path.name.startswith(".") or path.name in _OURS or not path.is_file():
            continue
        size = path.stat().st_size
        if size > SIDE_FILE_LIMIT:
            notes.append(f"{path.name} is not carried along: {size} bytes, the limit is {SIDE_FILE_LIMIT}")
            continue
        taken.append(path)
    return taken, notes


def carry_side_files(
    folder: Path, destination: Path, *, only_known: bool, stale: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Copy the side files of `folder` into `destination`; the names copied, and notes about those left behind.

    A file that is already in `destination` (the compiler wrote it) is never overwritten. Links are copied as files,
    since a model cache keeps its files behind links.

    Args:
        folder: The source model's folder.
        destination: The artifact's folder.
        only_known: See `side_files`.
        stale: Names of files that say what is no longer so.

    Raises:
        OSError: A file cannot be read or written.
    """
    taken, notes = side_files(folder, only_known=only_known)
    fresh = [path for path in taken if not (destination / path.name).exists()]
    lost = [path.name for path in fresh if path.name in stale]
    notes += [
        f"{name} is not carried along: it describes the source, and the artifact has other sizes" for name in lost
    ]
    fresh = [path for path in fresh if path.name not in lost]
    for path in fresh:
        shutil.copyfile(path, destination / path.name)
    return [path.name for path in fresh], notes
