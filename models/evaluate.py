"""Held-out bits per byte of the trained model, and continuations of a few prompts.

Run it with ``python -m models.evaluate models/stdlib-llama``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from models.llama import Llama, load_hf

END_OF_TEXT_ID = 0
# None ends in a line break: the tokenizer joins a line break with the indentation after it.
PROMPTS = (
    "def read_lines(path):",
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n\ndef main():",
)


@torch.no_grad()
def bits_per_byte(model: Llama, tokenizer: Tokenizer, text: str, window: int, stride: int) -> float:
    """Bits of the model's code for ``text`` per UTF-8 byte.

    Windows of ``window`` tokens advance by ``stride``; every token is scored once, with at least
    ``window - stride`` tokens before it where the text has them.
    """
    ids = torch.tensor([END_OF_TEXT_ID, *tokenizer.encode(text).ids])
    nats, scored = 0.0, 1  # ids[:scored] are done; the leading end-of-text token needs no code
    while scored < len(ids):
        end = min(max(scored + stride, window), len(ids))
        start = max(0, end - window)
        chunk = ids[start:end]
        logits = model.logits(model.hidden(chunk[None, :-1]))[0]
        losses = cross_entropy(logits, chunk[1:], reduction="none")
        nats += float(losses[scored - start - 1 :].double().sum())
        scored = end
    return nats / math.log(2) / len(text.encode("utf-8"))


@torch.no_grad()
def generate(model: Llama, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """Continue ``prompt`` with the cache; ``temperature`` 0 takes the most likely token each time."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    step = torch.tensor([ids])
    config = model.config
    empty = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
    cache = [(empty, empty)] * config.num_hidden_layers
    for _ in range(min(tokens, config.max_position_embeddings - len(ids))):
        positions = torch.arange(len(ids) - step.shape[1], len(ids))[None]
        logits, cache = model(step, torch.ones(1, len(ids), dtype=torch.int64), positions, cache)
        last = logits[0, -1]
        if temperature > 0:
            chosen = int(torch.multinomial(torch.softmax(last / temperature, -1), 1, generator=generator))
        else:
            chosen = int(last.argmax())
        if chosen == END_OF_TEXT_ID:
            break
        ids.append(chosen)
        step = torch.tensor([[chosen]])
    return str(tokenizer.decode(ids))


def main() -> None:
    """Print bits per byte on heldout.txt and some generated text."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="default: heldout.txt beside the model")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_hf(args.model)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = (args.text or args.model / "heldout.txt").read_text(encoding="utf-8")
    tokens = len(tokenizer.encode(text).ids)
    value = bits_per_byte(model, tokenizer, text, args.window, args.stride)
    print(f"{value:.4f} bits per byte, {len(text.encode()) / tokens:.3f} bytes per token, {tokens} tokens")
    print(f"perplexity {2 ** (value * len(text.encode()) / tokens):.3f} per token")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            print(f"--- temperature {temperature}\n{generate(model, tokenizer, prompt, 120, temperature, seed=0)}")


if __name__ == "__main__":
    main()
