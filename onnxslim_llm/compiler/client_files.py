"""Files that make an artifact run in other people's programs as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from onnxslim_llm.compiler.config_file import changed_config
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.kept_tokens import KeptTokens
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.runtime.genai_config import GENAI_CONFIG_NAME, make_genai_config
from onnxslim_llm.runtime.sidefiles import read_json_object
from onnxslim_llm.runtime.signature import DecoderSignature, find_decoder

__all__ = ["write_client_files"]

CONFIG_NAME = "config.json"
TOKEN_MAP_NAME = "token_map.json"

#: Operators that write new keys and values into the buffer of the old ones: (domain, op) -> {past input: output}.
_IN_PLACE = {("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2}}


def write_client_files(
    artifact: Path, side_files: Path, changes: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[str], list[str]]:
    """Write genai_config.json beside the artifact's model if it is a causal decoder, and config.json if it changes.

    token_map.json says which tokens a model has kept: old ids by new ids.

    Args:
        artifact: The artifact's .onnx file.
        side_files: Folder of the source, with its configuration.
        changes: What `config_changes` returns.

    Returns:
        Names of the files written, and remarks: why one was not.

    Raises:
        OSError: It cannot be written.
    """
    try:
        given = read_json_object(side_files / CONFIG_NAME) if changes else {}
    except ModelError as error:
        return [], [f"{CONFIG_NAME} is not changed: {error.what}"]
    written = []
    config = changed_config(given, changes)
    if config != given:
        _write(artifact.parent / CONFIG_NAME, config)
        written.append(CONFIG_NAME)
    model = open_model(artifact)
    proto = model.to_proto("omit")
    kept = KeptTokens.from_metadata({entry.key: entry.value for entry in proto.metadata_props})
    if kept is not None:
        _write(artifact.parent / TOKEN_MAP_NAME, {"vocabulary": kept.vocabulary, "kept": kept.ids.tolist()})
        written.append(TOKEN_MAP_NAME)
    signature, _ = find_decoder(proto)
    if signature is None:
        return written, []
    in_place = bool(signature.caches) and _is_in_place(model, signature)
    content, notes = make_genai_config(
        signature, side_files, filename=artifact.name, in_place=in_place, config=config or None
    )
    if content is None:
        return written, notes
    _write(artifact.parent / GENAI_CONFIG_NAME, content)
    return [*written, GENAI_CONFIG_NAME], notes


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_in_place(model: Model, signature: DecoderSignature) -> bool:
    """Whether each cache input is read by nothing but an operator that extends it in place.

    Then nothing in the graph takes the size of the buffer for the number of tokens in it.
    """
    tensors = {tensor.name: tensor for tensor in (*model.graph.inputs, *model.graph.outputs)}
    return all(_extends(tensors[pair.past], tensors[pair.present]) for pair in signature.caches)


def _extends(past: gs.Tensor, present: gs.Tensor) -> bool:
    if len(past.outputs) != 1:
        return False
    node = past.outputs[0]
    slots = _IN_PLACE.get((node.domain or "", node.op), {})
    return any(
        node.inputs[i] is past and node.outputs[o] is present
        for i, o in slots.items()
        if i < len(node.inputs) and o < len(node.outputs)
    )
