"""onnxslim-llm generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH

__all__ = ["command"]


@click.command("generate")
@click.argument("model_dir", type=PATH)
@click.option("--prompt", required=True, help="The text to go on from; - reads it from stdin.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token (greedy).")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample from the k likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest p of probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--tokenizer", type=PATH, help="tokenizer.json or its folder. [default: the model's folder]")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Of the runtime; 0: its own choice.")
@output_options
def command(
    model_dir: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    tokenizer: Path | None,
    threads: int,
    output: Output,
) -> None:
    """Continue a text with the model in MODEL_DIR; the text streams to stdout."""
    from onnxslim_llm.cli.sessions import open_decoder
    from onnxslim_llm.ir.model import resolve_model_path
    from onnxslim_llm.runtime.generate import Sampling, generate
    from onnxslim_llm.runtime.sidefiles import SideFiles
    from onnxslim_llm.runtime.tokenizer import load_tokenizer

    sampling = Sampling(temperature, top_k, top_p, seed)
    path = resolve_model_path(model_dir)
    runner = open_decoder(path, threads=threads)  # first: what is no decoder needs no tokenizer
    words = load_tokenizer(tokenizer or path)
    text: str = sys.stdin.read() if prompt == "-" else prompt
    ids = words.encode(text)
    start = time.perf_counter()
    made: list[int] = []

    def tokens() -> Iterator[int]:
        limit = SideFiles.of(words.path.parent).context_length
        for token in generate(
            runner, ids, max_new_tokens=max_new_tokens, sampling=sampling, eos=words.eos, context_length=limit
        ):
            made.append(token)
            yield token

    pieces: list[str] = []
    for piece in words.stream(tokens()):
        pieces.append(piece)
        if not output.json:
            click.echo(piece, nl=False)
    seconds = time.perf_counter() - start
    speed = len(made) / seconds if seconds else 0.0
    if output.json:
        figures = {"prompt_tokens": len(ids), "new_tokens": len(made), "seconds": seconds, "tokens_per_second": speed}
        output.result({"prompt": text, "text": "".join(pieces), "token_ids": made, **figures})
        return
    click.echo()
    output.note(f"{len(made)} tokens in {seconds:.2f} s, {speed:.1f} tokens/s, the prompt's {len(ids)} included")
