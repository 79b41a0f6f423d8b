"""Evaluate checkpoints on a full split of a corpus and print them side by side.

    python evaluate.py                                     best.pt of the newest run
    python evaluate.py checkpoints/a/best.pt checkpoints/b/best.pt
    python evaluate.py checkpoints/a/best.pt --data other.txt --split train
    python evaluate.py --stride 64                         also the loss with more context

The loss is in nats per token, which is comparable between models with the same tokenizer. Bits per
byte (bpb) are comparable between all models evaluated on the same text. top-1 is the accuracy of
the most likely token.

Windows are consecutive, so the first tokens of each are predicted from a short context. --stride S
adds the loss over overlapping windows that begin every S tokens. Only the last S predictions of a
window are scored (all of them in the first window), so each token is still scored once. After the
first window, each prediction uses more than block_size - S tokens of context. That alone makes this
loss lower, so compare only losses of the same stride. It takes block_size / S times as long as the
usual loss.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import utils
from config import DEVICE_HELP, PRECISIONS, GPTConfig
from corpus.corpus import Corpus
from corpus.load import load_corpus
from model import GPT
from sampling.text import last_objective
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.errors import run
from system.settings import UserError, from_dict, setting
from training.setup import pick_precision
from training.task import losses
from utils import autocast, newest_checkpoint

COLUMNS = ("checkpoint", "parameters", "split", "tokens", "loss", "ppl", "bpb", "top-1", "tok/s")


@dataclass
class EvaluateConfig:
    """Which checkpoints are evaluated, and on what."""

    checkpoints: tuple[str, ...] = setting(
        (), "default: best.pt of the newest run", positional=True
    )
    data: str = setting("", "a corpus, as for train.py; default: the checkpoint's own")
    separator: str = setting("", "text between the documents of --data, as for train.py")
    split: str = setting("val", "split of the corpus", choices=("val", "train"))
    stride: int | None = setting(
        None, "also the loss over windows that begin every STRIDE tokens; see above", low=1
    )
    batch_size: int = setting(16, "windows per batch", low=1)
    device: str = setting("auto", DEVICE_HELP)
    precision: str = setting("auto", "auto: the fastest here", choices=PRECISIONS)


@torch.no_grad()
def evaluate_split(
    model: GPT,
    corpus: Corpus,
    config: EvaluateConfig,
    doc_mask: bool,
    stride: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on every token of a split but the first. Raises UserError if there is none.

    Returns the number of predicted tokens, the mean loss in nats, the top-1 accuracy and the tokens
    per second. With doc_mask, tokens attend only within their own document. Windows begin every
    `stride` tokens, 1 to block_size, which is the default; see the top of this file.
    """
    block_size = model.config.block_size
    ids = corpus.val_ids if config.split == "val" else corpus.train_ids
    if len(ids) < 2:
        raise UserError(f"the {config.split} split has {len(ids)} tokens: use a longer text")
    label = f"stride {stride}" if stride else None
    stride = stride or block_size
    overlap = block_size - stride
    starts = utils.even_starts(max(len(ids) - overlap, 2), stride)  # 2: a split within one window
    total_loss = 0.0
    n_correct = n_tokens = 0
    start_time = time.perf_counter()
    batches = losses(model, corpus, ids, starts, config.batch_size, doc_mask, overlap)
    n_batches = math.ceil(len(starts) / config.batch_size)
    with autocast(model.tok.weight.device, config.precision):
        for loss, n_scored, logits, y in tqdm(
            batches, label, n_batches, unit="batch", leave=False, disable=None
        ):
            total_loss += loss * n_scored
            n_correct += int((logits.argmax(dim=-1) == y).sum())
            n_tokens += n_scored
    seconds = time.perf_counter() - start_time
    return {
        "tokens": n_tokens,
        "loss": total_loss / n_tokens,
        "top1": n_correct / n_tokens,
        "tokens_per_second": n_tokens / seconds,
    }


def window_size(path: Path) -> int:
    """The block_size of a checkpoint. Raises UserError if it is missing or damaged."""
    state = utils.read_checkpoint(path)
    with utils.matching_contents(path):
        return int(from_dict(GPTConfig, state["gpt_config"]).block_size)


def evaluate_checkpoint(path: Path, config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """The row of a checkpoint in the table. Raises UserError if its corpus is missing or has
    changed since the training."""
    model, tokenizer, state = utils.load_checkpoint(path, device)
    train_config = state["train_config"]
    data = config.data or train_config.get("data", "")
    if not data:
        raise UserError(f"{path} does not name its corpus: choose one with --data")
    if last_objective(state) == "dpo" and not config.data:
        raise UserError(f"{path} was trained on pairs of answers: choose a text with --data")
    if last_objective(state) == "qa" and not config.data:
        print(f"note: {path} was trained on answers only; this loss includes the questions")
    separator = config.separator or ("" if config.data else train_config.get("separator", ""))
    hold_out = bool(config.data or train_config.get("hold_out", True))
    tokenizer, corpus = load_corpus(
        data, tokenizer=tokenizer, separator=separator, hold_out=hold_out
    )
    if not config.data and corpus.info["sha256"] != state["corpus"].get("sha256"):
        raise UserError(f"{data} is not what {path} was trained on: choose a corpus with --data")
    doc_mask = bool(train_config.get("doc_mask"))
    row = evaluate_split(model, corpus, config, doc_mask)

    ids = corpus.val_ids if config.split == "val" else corpus.train_ids
    n_bytes = corpus.val_bytes if config.split == "val" else corpus.train_bytes
    unknown = tokenizer.specials.get("<UNK>")
    # The bytes of unknown characters cannot be predicted.
    has_bpb = n_bytes and (unknown is None or not (ids[:] == unknown).any())
    bytes_per_token = n_bytes / len(ids) if has_bpb else math.nan
    row["bpb"] = utils.bits_per_byte(row["loss"], bytes_per_token)
    if config.stride is not None:
        loss = evaluate_split(model, corpus, config, doc_mask, config.stride)["loss"]
        row |= {"stride_loss": loss, "stride_bpb": utils.bits_per_byte(loss, bytes_per_token)}
    return {"checkpoint": str(path), "parameters": model.num_params(), "split": config.split} | row


def format_table(rows: list[dict[str, Any]], stride: int | None = None) -> str:
    """The rows as text, in aligned columns with a header."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    if stride is not None:
        lines = [(*COLUMNS, f"loss, stride {stride}", f"bpb, stride {stride}")]
    for row in rows:
        lines.append(
            (
                row["checkpoint"],
                f"{row['parameters'] / 1e6:.2f} M",
                row["split"],
                f"{row['tokens']:,}",
                f"{row['loss']:.4f}",
                f"{math.inf if row['loss'] > 700 else math.exp(row['loss']):.2f}",
                f"{row['bpb']:.4f}",
                f"{row['top1']:.1%}",
                f"{row['tokens_per_second']:,.0f}",
                *(f"{row[key]:.4f}" for key in ("stride_loss", "stride_bpb") if key in row),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for first, *others in lines:
        cells = [word.rjust(width) for word, width in zip(others, widths[1:], strict=True)]
        aligned.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(aligned)


def main(argv: list[str] | None = None) -> int:
    config = parse_args(
        EvaluateConfig, argv, __doc__, check=lambda config: device_problems(config.device)
    )
    paths = [Path(name) for name in config.checkpoints]
    paths = paths or [newest_checkpoint(Path("checkpoints"))]
    device = pick_device(config.device)
    # report damaged checkpoints, and strides that would skip tokens, before anything slow starts
    size, name = min((window_size(path), str(path)) for path in paths)
    if config.stride is not None and config.stride > size:
        raise UserError(f"stride must be at most {size}, the window of {name}, not {config.stride}")
    config.precision, _ = pick_precision(config.precision, device)
    rows: list[dict[str, Any]] = []
    try:
        for path in paths:
            rows.append(evaluate_checkpoint(path, config, device))
    finally:  # print the finished rows even after an error
        if rows:
            print(format_table(rows, config.stride))
    return 0


if __name__ == "__main__":
    run(main)
