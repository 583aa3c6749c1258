"""genai_config.json: what onnxruntime-genai must be told about a decoder, from its signature and its side files.

Rules of the file: onnxruntime-genai 0.18, src/config.h; https://onnxruntime.ai/docs/genai/reference/config.html.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.sidefiles import SideFiles, read_json_object
from onnxslim_llm.runtime.signature import CachePair, DecoderSignature, cache_slot

__all__ = ["ASSUMED_CONTEXT", "GENAI_CONFIG_NAME", "make_genai_config"]

GENAI_CONFIG_NAME = "genai_config.json"
#: Context length where no side file says it; the file must have one.
ASSUMED_CONTEXT = 2048

#: The type for decoders of any architecture. Others change what genai feeds, and the graph's own inputs say that.
_ANY_DECODER = "decoder"
#: Parts of models that consist of several graphs: we compiled one of them.
_SEVERAL_GRAPHS = ("encoder", "embedding", "vision", "speech", "encoder_decoder_init")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SEARCH = ("temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "no_repeat_ngram_size")
#: Names of the same fact in the configurations of different architectures.
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_VOCAB = ("vocab_size",)


class _RefusalError(Exception):
    """Why genai cannot run a model; never leaves this file."""


def make_genai_config(
    signature: DecoderSignature,
    folder: Path,
    *,
    filename: str,
    in_place: bool,
    config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the content of genai_config.json, and remarks; None with the reason if genai cannot run the model.

    A genai_config.json in `folder` is kept, and corrected where it contradicts the graph.

    Args:
        signature: The decoder's inputs and outputs.
        folder: Where config.json, generation_config.json and the like are, if there are any.
        filename: The model's file, relative to genai_config.json.
        in_place: The graph writes new keys and values into the buffers of the old ones.
        config: Instead of config.json in `folder`.
    """
    try:
        given = read_json_object(folder / GENAI_CONFIG_NAME)
        config = read_json_object(folder / "config.json") if config is None else config
        generation = read_json_object(folder / "generation_config.json")
        side = SideFiles.of(folder)
    except ModelError as error:
        return None, [f"{GENAI_CONFIG_NAME} is not written: {error.where}: {error.what}"]
    try:
        decoder = _decoder(signature, config, filename)
        return _whole(given, decoder, signature, config, generation, side, in_place)
    except _RefusalError as refusal:
        return None, [f"{GENAI_CONFIG_NAME} is not written: {refusal}"]


def _whole(
    given: Mapping[str, Any],
    decoder: dict[str, Any],
    signature: DecoderSignature,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    side: SideFiles,
    in_place: bool,
) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    result = deepcopy(dict(given))
    model = _section(result, "model")
    model.setdefault("type", _ANY_DECODER)
    parts = [name for name in _SEVERAL_GRAPHS if name in model]
    parts += [name for name in ("pipeline",) if name in _section(model, "decoder")]
    if parts:
        raise _RefusalError(f"the source's own describes a model of several graphs ({parts[0]})")
    vocab = signature.vocab or _first(config, _VOCAB) or model.get("vocab_size")
    if vocab is None:
        raise _RefusalError("neither the graph nor config.json says the size of the vocabulary")
    model["vocab_size"] = vocab
    if "context_length" not in model:
        if side.context_length is None:
            notes.append(
                f"no side file says the context length: {GENAI_CONFIG_NAME} says {ASSUMED_CONTEXT}, correct it there"
            )
        model["context_length"] = side.context_length or ASSUMED_CONTEXT
    for name in _TOKENS:
        value = generation.get(name, config.get(name))
        if value is not None:
            model.setdefault(name, value)
    _correct(_section(model, "decoder"), decoder)
    search = _section(result, "search")
    search.setdefault("max_length", model["context_length"])
    for name, value in _search(generation).items():
        search.setdefault(name, value)
    # genai lets the cache share one buffer by default, which a graph that concatenates answers with a shape error.
    search["past_present_share_buffer"] = in_place and bool(search.get("past_present_share_buffer", True))
    return result, notes


def _section(parent: dict[str, Any], name: str) -> dict[str, Any]:
    section = parent.setdefault(name, {})
    if not isinstance(section, dict):
        raise _RefusalError(f"in the source's own, '{name}' is no object")
    return section


def _correct(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put what the graph says in the place of what was said before; how a session is opened stays."""
    for name, value in new.items():
        if name == "session_options" and isinstance(old.get(name), dict):
            continue
        old[name] = value


def _search(generation: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"do_sample": bool(generation.get("do_sample", False)), "num_beams": 1}
    found.update({name: generation[name] for name in _SEARCH if generation.get(name) is not None})
    return found


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _decoder(signature: DecoderSignature, config: Mapping[str, Any], filename: str) -> dict[str, Any]:
    keys, values, heads, size = _cache(signature)
    inputs = {"input_ids": signature.ids}
    _check_inputs(signature)
    if signature.mask is not None:
        inputs["attention_mask"] = signature.mask
    if signature.positions is not None:
        inputs["position_ids"] = signature.positions
    inputs |= {"past_key_names": keys[0], "past_value_names": values[0]}
    outputs = {"logits": signature.logits, "present_key_names": keys[1], "present_value_names": values[1]}
    decoder: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "filename": filename,
        "num_hidden_layers": len(signature.caches) // 2,
        "num_key_value_heads": heads,
        "head_size": size,
        "inputs": inputs,
        "outputs": outputs,
    }
    for name, spellings in (("hidden_size", _HIDDEN), ("num_attention_heads", _HEADS)):
        number = _first(config, spellings)
        if number is not None:
            decoder[name] = number
    return decoder


def _check_inputs(signature: DecoderSignature) -> None:
    if signature.extras:
        raise _RefusalError(f"genai does not feed the input '{signature.extras[0].name}'")
    if signature.mask_rank != 2:
        raise _RefusalError(f"genai makes masks of 2 dimensions; '{signature.mask}' has {signature.mask_rank}")
    if signature.batch is not None or signature.length is not None:
        raise _RefusalError(f"the sizes of '{signature.ids}' are fixed")
    kinds = {str(t) for t in (signature.mask_dtype, signature.positions_dtype) if t is not None}
    if len(kinds) > 1 or kinds - {"int32", "int64"}:
        raise _RefusalError(f"attention mask and positions are {' and '.join(sorted(kinds))}, genai wants one type")


def _cache(signature: DecoderSignature) -> tuple[tuple[str, str], tuple[str, str], int, int]:
    """Return ((past, present) of the keys, the same of the values, heads, head size); names with %d for the layer."""
    caches = signature.caches
    if not caches:
        raise _RefusalError("the model has no KV cache; --add-kv-cache gives it one")
    if len(caches) % 2:
        raise _RefusalError("its cache does not consist of one key and one value per layer")
    shapes = {pair.shape for pair in caches}
    first = caches[0]
    if len(shapes) > 1 or len(first.shape) != 4 or (first.batch_axis, first.sequence_axis) != (0, 2):
        listed = ", ".join(sorted(str(list(shape)) for shape in shapes))
        raise _RefusalError(f"the cache is {listed}; genai wants [batch, heads, sequence, size] in all layers")
    heads, size = first.shape[1], first.shape[3]
    if heads is None or size is None:
        raise _RefusalError(f"'{first.past}' does not say its number of heads and their size")
    keys, values = _template(caches, "key"), _template(caches, "value")
    if keys is None or values is None:
        raise _RefusalError(f"the names of its cache are not numbered from 0 on: '{first.past}', ...")
    return keys, values, heads, size


def _template(caches: tuple[CachePair, ...], part: str) -> tuple[str, str] | None:
    """Return (past, present) of the keys or values with %d in the place of the layer's number."""
    slots = ((cache_slot(pair.past), pair) for pair in caches)
    pairs = [pair for slot, pair in sorted(slots, key=lambda item: item[0] or (0, "")) if slot and slot[1] == part]
    if not pairs:
        return None
    found = []
    for names in ([pair.past for pair in pairs], [pair.present for pair in pairs]):
        # Try every number of the first name: "kv2_cache.0.key" has two.
        for place in re.finditer(r"0", names[0]):
            head, tail = names[0][: place.start()], names[0][place.end() :]
            if "%" not in head + tail and all(name == f"{head}{i}{tail}" for i, name in enumerate(names)):
                found.append(f"{head}%d{tail}")
                break
    return (found[0], found[1]) if len(found) == 2 else None
