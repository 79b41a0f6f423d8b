"""Checks before a run that write no files: --dry_run, which prints its parameters, computation,
epochs and an example of its data, and --overfit_batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import GPTConfig, TrainConfig
from model import GPT
from system.device import check_memory
from tokenizer import Tokenizer
from training.setup import LESS_MEMORY, Data, memory_estimate
from utils import get_batch

# By a part of their names, the first that applies; others are embeddings.
COMPONENTS = {"norm": "norms", "attn": "attention", "mlp": "MLP", "head": "output"}
EXAMPLE_CHARS, EXAMPLE_WIDTH = 60, 90


def params_by_component(gpt: GPTConfig) -> dict[str, int]:
    """The parameters of each component, without allocating memory. Tied weights are embeddings."""
    with torch.device("meta"):
        model = GPT(replace(gpt, n_layer=1))
    counts = dict.fromkeys(("embeddings", "attention", "MLP", "norms", "output"), 0)
    for name, p in model.named_parameters():
        component = next((COMPONENTS[part] for part in COMPONENTS if part in name), "embeddings")
        counts[component] += p.numel() * (gpt.n_layer if name.startswith("blocks.") else 1)
    return counts


def flops_per_token(gpt: GPTConfig) -> int:
    """The floating-point operations per token of a training step, 6 N + 12 L H Q T (PaLM, Chowdhery
    et al. 2022, appendix B), of which forward is a third. N are the parameters in matrix products:
    all but the embeddings that are only looked up. The causal mask is not taken into account."""
    counts = params_by_component(gpt)
    n = sum(counts.values()) - counts["embeddings"]
    n += gpt.vocab_size * gpt.n_embd if gpt.tie_weights else 0
    return 6 * n + 12 * gpt.n_layer * gpt.n_head * gpt.head_size * gpt.block_size


def print_parameters(gpt: GPTConfig) -> None:
    counts = params_by_component(gpt)
    tied = " (uses the embeddings: --tie_weights)" if gpt.tie_weights else ""
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"parameters: {parts}{tied}; together {sum(counts.values()):,}")


def print_example(tokenizer: Tokenizer, x: Tensor, y: Tensor) -> None:
    """Print the start of a window x (T,) and its targets y (T,), as text and token by token.
    Targets of -100 are not scored: a question, or padding."""
    print("example from the first batch: the target at each position is the next input")
    scored = (y != -100).nonzero()[:, 0].tolist()
    x, y = x[: scored[-1] + 1], y[: scored[-1] + 1]  # without padding
    for name, ids in (("input", x), ("target", y[y != -100])):
        text = tokenizer.decode(ids[: 4 * EXAMPLE_CHARS].tolist())[:EXAMPLE_CHARS]
        print(f"  {name:8}{text!r}")
    start = max(0, scored[0] - 2)
    rows = ["  input   ", "  target  "]
    for pair in zip(x[start:].tolist(), y[start:].tolist(), strict=True):
        cells = [repr(tokenizer.decode([i])) if i >= 0 else "-" for i in pair]
        width = max(map(len, cells)) + 2
        if len(rows[0]) + width > EXAMPLE_WIDTH:
            break
        rows = [row + f"{cell:{width}}" for row, cell in zip(rows, cells, strict=True)]
    not_scored = " (-: not scored)" * (start < scored[0])
    print(f"token by token{not_scored}:", *(row.rstrip() for row in rows), sep="\n")


def run_check(
    gpt: GPTConfig,
    config: TrainConfig,
    data: Data,
    device: torch.device,
    make_trainer: Callable[..., Any],
) -> int:
    """Print what a pretraining run would do, or with --overfit_batch, do that. Returns the exit
    status. Raises UserError if the run does not fit in memory."""
    if not config.dry_run:
        return overfit_batch(make_trainer(gpt, config))
    print_parameters(gpt)
    flops = flops_per_token(gpt)
    print(
        f"computation: {flops:,} FLOPs per token, forward {flops // 3:,}, backward "
        f"{flops - flops // 3:,}; counted as 6 N + 12 L H Q T (PaLM, appendix B)"
    )
    per_step = config.batch_size * config.grad_accum * gpt.block_size
    corpus, n_tokens = data.corpus, per_step * config.max_steps
    n_train = len(corpus.train_ids)
    print(
        f"training: {per_step:,} tokens per step, {n_tokens:,} in {config.max_steps} steps, "
        f"{n_tokens / n_train:.2f} epochs; {n_tokens * flops:.2g} FLOPs"
    )
    x, y = get_batch(corpus.train_ids, gpt.block_size, 1, config.seed, 0, corpus.train_docs)
    print_example(data.tokenizer, x[0], y[0])
    check_memory(sum(memory_estimate(gpt, config).values()), device, "this run", LESS_MEMORY)
    return 0


def overfit_batch(trainer: Any) -> int:
    """A sanity check that writes no files: train on one batch until its loss is below 0.01. Returns
    the exit status, 0 if that happens within max_steps."""
    with tqdm(range(trainer.config.max_steps), unit="step", leave=False, disable=None) as bar:
        for _ in bar:
            loss = trainer.train_step()["loss"].item()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if loss < 0.01:
                print(f"one batch overfitted: loss {loss:.4f} at step {trainer.step}, as expected")
                return 0
    print(f"one batch could not be overfitted: loss {loss:.4f} after {trainer.step} steps")
    return 1
