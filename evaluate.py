"""Score checkpoints over a whole split of their corpus, side by side.

    python evaluate.py                                     the newest run's best checkpoint
    python evaluate.py checkpoints/a/best.pt checkpoints/b/best.pt
    python evaluate.py checkpoints/a/best.pt --data other.txt --split train

The loss is in nats a token, so it compares between models with one tokenizer; bits per byte compare
between all that read the same text.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import utils
from config import (
    PRECISIONS,
    UserError,
    from_dict,
    limit_problems,
    parse_flags,
    raise_problems,
    run,
    setting,
)
from corpora import load_corpus
from model import GPT

COLUMNS = ("checkpoint", "parameters", "split", "tokens", "loss", "ppl", "bpb", "top-1", "tok/s")


@dataclass
class EvaluateConfig:
    """What is scored, and how."""

    checkpoints: tuple[str, ...] = setting((), "default: the newest run's best.pt")
    data: str = setting("", "a corpus, as for train.py; default: that of the checkpoint")
    split: str = setting("val", "the part of it", choices=("val", "train"))
    batch_size: int = setting(16, "windows scored at once", low=1)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is")
    precision: str = setting("auto", "auto: the fastest here", choices=PRECISIONS)


@torch.no_grad()
def score(
    model: GPT, corpus: utils.Corpus, config: EvaluateConfig, doc_mask: bool
) -> dict[str, Any]:
    """The mean loss in nats and the share of tokens that were the likeliest (top-1) over a whole
    split, with how many tokens were scored and how many in a second."""
    device = next(model.parameters()).device
    ids = corpus.val_ids if config.split == "val" else corpus.train_ids
    starts = utils.even_starts(len(ids), model.config.block_size)
    total = torch.zeros((), dtype=torch.float64)
    right = count = 0
    began = time.perf_counter()
    for first in tqdm(
        range(0, len(starts), config.batch_size), unit="batch", leave=False, disable=None
    ):
        batch = starts[first : first + config.batch_size]
        x, y = (t.to(device) for t in utils.windows(ids, batch, model.config.block_size))
        docs = (x == corpus.separator).cumsum(dim=1) if doc_mask else None
        with utils.autocast(device, config.precision):
            logits, loss = model(x, y, docs)  # (B, T, V), ()
        scored = int((y != -100).sum())
        total += loss.double().cpu() * scored
        right += int((logits.argmax(dim=-1) == y).sum())
        count += scored
    seconds = time.perf_counter() - began
    return {
        "tokens": count,
        "loss": total.item() / count,
        "top1": right / count,
        "tokens_per_second": count / seconds,
    }


def evaluate(path: Path, config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """The row of a checkpoint's table. Raises UserError where its corpus is gone or changed."""
    model, tokenizer, state = utils.load_checkpoint(path, device)
    trained = state["train_config"]
    data = config.data or trained["data"]
    tokenizer, corpus = load_corpus(data, trained["tokenizer"], 0, tokenizer)
    if not config.data and corpus.info["sha256"] != state["corpus"]["sha256"]:
        raise UserError(f"{data} is not what {path} was trained on: name a corpus with --data")
    doc_mask = bool(trained.get("doc_mask")) and corpus.separator is not None
    row = score(model, corpus, config, doc_mask)
    ids = corpus.val_ids if config.split == "val" else corpus.train_ids
    n_bytes = corpus.val_bytes if config.split == "val" else corpus.train_bytes
    row["bpb"] = utils.bits_per_byte(row["loss"], n_bytes / len(ids))
    unknown = tokenizer.specials.get("<UNK>")
    if unknown is not None and (ids[:] == unknown).any():
        row["bpb"] = math.nan  # what is unknown has bytes, but nobody could have predicted them
    return {"checkpoint": str(path), "parameters": model.num_params(), "split": config.split} | row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, in aligned columns."""
    lines = [COLUMNS]
    for row in rows:
        lines.append(
            (
                row["checkpoint"],
                f"{row['parameters'] / 1e6:.2f} M",
                row["split"],
                f"{row['tokens']:,}",
                f"{row['loss']:.4f}",
                f"{math.exp(row['loss']):.2f}",
                f"{row['bpb']:.4f}",
                f"{row['top1']:.1%}",
                f"{row['tokens_per_second']:,.0f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, EvaluateConfig)
    config = from_dict(EvaluateConfig, flags)
    raise_problems(problems + limit_problems(config) + utils.device_problems(config.device))
    paths = [Path(name) for name in config.checkpoints]
    paths = paths or [utils.newest_checkpoint(Path("checkpoints"))]
    device = utils.pick_device(config.device)
    for path in paths:  # before the slow part
        utils.read_checkpoint(path)
    config.precision, _ = utils.pick_precision(config.precision, device)
    rows = []
    try:
        for path in paths:
            rows.append(evaluate(path, config, device))
    finally:  # what was scored is shown, also before an error
        if rows:
            print(table(rows))
    return 0


if __name__ == "__main__":
    run(main)
