"""Train the sample model on the CPU: Muon for the matrices, AdamW for embedding and norms, bfloat16 autocast.

Each process works on its own share of every batch and gradients are averaged between them; with one thread per
process no operator waits at a thread barrier, which on a shared machine is faster than one process with more
threads. The schedule follows the time budget, so a run ends when planned whatever else the machine does.

    python -m models.train -o build/stdlib-llama --minutes 50
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

from models.corpus import collect
from models.llama import Llama, LlamaConfig, save_hf
from models.tokenizer import END_OF_TEXT

Tokens = NDArray[np.uint16]

MICRO_TOKENS = 2048  # tokens of one forward and backward pass: activations stay in cache
LIBRARY_SHARE = 0.6  # of the windows; the rest are the library's tests, which are longer and more repetitive
CHECK_WINDOWS = 64  # held-out windows of the running check
SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, apart from the machine."""

    minutes: float = 50.0
    seed: int = 1
    batch_tokens: int = 8192  # doubled once progress passes ``grow_at``
    grow_at: float = 0.4
    window: int = 256
    long_window: int = 512  # from ``long_at`` on
    long_at: float = 0.85
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02  # share of the run
    final_lr: float = 0.01  # share of the peak

    def lr_scale(self, progress: float) -> float:
        """Linear warm-up, then half a cosine down to ``final_lr``; ``progress`` goes from 0 to 1."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.02)
        phase = (progress - self.warmup) / (1 - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0)))


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """One stream of ids, each document after an end-of-text token."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    ids = [np.array([separator, *e.ids], dtype=np.uint16) for e in tokenizer.encode_batch(texts)]
    return np.concatenate(ids)


def load_streams(tokenizer_folder: Path, cache: Path) -> dict[str, Tokens]:
    """Token streams ``library``, ``tests`` and ``held_out``, kept in the file ``cache``."""
    if not cache.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        corpus = collect()
        np.savez(
            cache,
            library=encode(tokenizer, [d.text for d in corpus.train if not d.is_test]),
            tests=encode(tokenizer, [d.text for d in corpus.train if d.is_test]),
            held_out=encode(tokenizer, [d.text for d in corpus.held_out]),
        )
    with np.load(cache) as stored:
        return {name: stored[name] for name in stored.files}


def windows(stream: Tokens, starts: NDArray[np.int64], length: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets (len(starts), length)."""
    rows = stream[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def draw(streams: dict[str, Tokens], rng: np.random.Generator, length: int) -> tuple[Tensor, Tensor]:
    """A random micro-batch of training windows."""
    count = MICRO_TOKENS // length
    from_library = int(rng.binomial(count, LIBRARY_SHARE))
    parts = []
    for name, n in (("library", from_library), ("tests", count - from_library)):
        starts = rng.integers(0, len(streams[name]) - length - 1, size=n)
        parts.append(windows(streams[name], starts, length))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def next_token_loss(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(model.hidden(inputs))
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def make_optimizers(model: Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024; update scaled to AdamW's size, Liu et al. 2025) and AdamW."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name]
    embedding = [model.model.embed_tokens.weight]
    norms = [p for p in model.parameters() if p.dim() == 1]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=recipe.adam_lr,
        betas=(0.9, 0.95),
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def average(model: Llama, loss: float, elapsed: float, processes: int) -> tuple[float, float]:
    """Average gradients, loss and elapsed seconds over all processes; returns the last two."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([loss, elapsed])])
    if processes > 1:
        dist.all_reduce(flat)
        flat /= processes
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
        offset += grad.numel()
    return float(flat[-2]), float(flat[-1])


def train(rank: int, processes: int, threads: int, out: Path, tokenizer_folder: Path, recipe: Recipe) -> None:
    """The work of one process; process 0 logs, saves checkpoints and writes the final model."""
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=processes)
    streams = load_streams(tokenizer_folder, out / "tokens.npz")
    model = Llama(LlamaConfig())
    optimizers = make_optimizers(model, recipe)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "elapsed": 0.0}
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        state = saved["state"]
    loss_of = torch.compile(next_token_loss, dynamic=False)
    check = np.linspace(0, len(streams["held_out"]) - recipe.window - 2, CHECK_WINDOWS).astype(np.int64)
    started, last_save, before = time.monotonic(), time.monotonic(), float(state["elapsed"])
    # The first call compiles for about half a minute; it counts, like everything else, against the budget.
    while (progress := state["elapsed"] / (60 * recipe.minutes)) < 1:
        length = recipe.long_window if progress > recipe.long_at else recipe.window
        batch = recipe.batch_tokens * (2 if progress > recipe.grow_at else 1)
        micro_batches = max(1, batch // (MICRO_TOKENS * processes))
        rng = np.random.default_rng([recipe.seed, rank, state["step"]])
        total = 0.0
        for _ in range(micro_batches):
            loss = loss_of(model, *draw(streams, rng, length)) / micro_batches
            torch.autograd.backward(loss)
            total += float(loss.detach())
        total, state["elapsed"] = average(model, total, before + time.monotonic() - started, processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * recipe.lr_scale(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        state["tokens"] += micro_batches * MICRO_TOKENS * processes
        if rank == 0 and state["step"] % 50 == 0:
            record = {**state, "loss": round(total, 4), "progress": round(progress, 4), "window": length}
            if state["step"] % 250 == 0:
                with torch.no_grad():
                    rows = [windows(streams["held_out"], part, recipe.window) for part in np.split(check, 8)]
                    record["held_out_loss"] = round(sum(float(loss_of(model, *r)) for r in rows) / len(rows), 4)
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            if time.monotonic() - last_save > SAVE_SECONDS:
                last_save = time.monotonic()
                contents = [o.state_dict() for o in optimizers]
                torch.save({"model": model.state_dict(), "optimizers": contents, "state": state}, f"{checkpoint}.new")
                os.replace(f"{checkpoint}.new", checkpoint)
    if rank == 0:
        save_hf(model, out)
        summary = {**state, "recipe": recipe.__dict__, "processes": processes, "torch": torch.__version__}
        (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(summary))
    if processes > 1:
        dist.destroy_process_group()


def main() -> None:
    """Train, or go on from the checkpoint in the output folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/stdlib-llama"))
    parser.add_argument("--tokenizer", type=Path, default=Path("models/stdlib-llama"), help="tokenizer.json's folder")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--muon-lr", type=float, default=Recipe.muon_lr)
    parser.add_argument("--long-at", type=float, default=Recipe.long_at, help="share of the run before long windows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    args = parser.parse_args()
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    load_streams(args.tokenizer, out / "tokens.npz")
    (out / "rendezvous").unlink(missing_ok=True)
    recipe = Recipe(minutes=args.minutes, seed=args.seed, muon_lr=args.muon_lr, long_at=args.long_at)
    work = (args.processes, args.threads, out, args.tokenizer, recipe)
    spawn(train, args=work, nprocs=args.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
