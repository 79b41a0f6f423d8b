"""Evaluate checkpoints on a full split of a corpus and print them side by side.

    python evaluate.py                                     best.pt of the newest run
    python evaluate.py checkpoints/a/best.pt checkpoints/b/best.pt
    python evaluate.py checkpoints/a/best.pt --data other.txt --split train
    python evaluate.py --stride 64                         also the loss with more context
    python evaluate.py a/best.pt b/best.pt --ensemble      also the mean of their probabilities

The loss is in nats per token, which is comparable between models with the same tokenizer. Bits per
byte (bpb) are comparable between all models evaluated on the same text. top-1 is the accuracy of
the most likely token.

Windows are consecutive, so the first tokens of each are predicted from a short context. --stride S
adds the loss over overlapping windows that begin every S tokens, in which only the last S
predictions are scored: from more than block_size - S tokens of context. That alone makes this loss
lower: compare only losses of the same stride. It takes block_size / S times as long.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from system.start import run

import torch
from torch import Tensor, nn
from tqdm import tqdm

import utils
from config import DEVICE_HELP, PRECISIONS, TEXT_ENCODINGS
from corpus.corpus import Corpus
from corpus.load import load_corpus, training_corpus
from model import GPT
from sampling.output import format_table
from sampling.text import last_objective
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.settings import UserError, setting
from training.setup import pick_precision
from training.task import MAX_EXP, losses
from utils import autocast, newest_checkpoint


@dataclass
class EvaluateConfig:
    checkpoints: tuple[str, ...] = setting(
        (), "default: best.pt of the newest run", positional=True
    )
    data: str = setting("", "a corpus, as for train.py; default: the checkpoint's own")
    separator: str = setting("", "text between the documents of --data, as for train.py")
    encoding: str = setting("utf-8", "of the text of --data", choices=TEXT_ENCODINGS)
    split: str = setting("val", "split of the corpus", choices=("val", "train"))
    stride: int | None = setting(
        None, "also the loss over windows that begin every STRIDE tokens; see above", low=1
    )
    ensemble: bool = setting(False, "also all together: the mean of their probabilities")
    batch_size: int = setting(16, "windows per batch", low=1)
    device: str = setting("auto", DEVICE_HELP)
    precision: str = setting("auto", "auto: the fastest here", choices=PRECISIONS)


class Ensemble(nn.Module):
    """Predicts the mean of the models' probabilities."""

    def __init__(self, models: list[GPT]):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.config, self.tok = models[0].config, models[0].tok  # which an evaluation reads

    def forward(self, idx: Tensor, targets: Tensor, docs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T, V) and their mean loss, as from a GPT."""
        logs = [model(idx, docs=docs)[0].float().log_softmax(dim=-1) for model in self.models]
        mixed = torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))  # (B, T, V)
        return mixed, nn.functional.nll_loss(mixed.flatten(0, 1), targets.flatten())


def check_alike(states: list[dict[str, Any]], names: list[str]) -> None:
    """Raise UserError if models with these states differ in one of these settings."""
    settings = [s["train_config"] | s["gpt_config"] | s for s in states]
    for name in names:
        if any(other.get(name) != settings[0].get(name) for other in settings):
            raise UserError(f"the models of an ensemble have different values of {name}")


@torch.no_grad()
def evaluate_split(
    model: GPT, corpus: Corpus, config: EvaluateConfig, doc_mask: bool, stride: int | None = None
) -> dict[str, Any]:
    """Evaluate a model on every token of a split but the first. Raises UserError if there is none.
    With doc_mask, tokens attend only within their own document. Windows begin every `stride`
    tokens, 1 to block_size, which is the default; see the top of this file."""
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
    batches = losses(model, corpus, ids, starts, config.batch_size, doc_mask, overlap)
    n_batches = math.ceil(len(starts) / config.batch_size)
    with autocast(model.tok.weight.device, config.precision):
        bar = tqdm(batches, label, n_batches, unit="batch", leave=False, disable=None)
        for loss, n_scored, logits, y in bar:
            total_loss += loss * n_scored
            n_correct += int((logits.argmax(dim=-1) == y).sum())
            n_tokens += n_scored
    return {"tokens": n_tokens, "loss": total_loss / n_tokens, "top1": n_correct / n_tokens}


def evaluate_checkpoints(
    paths: list[Path], config: EvaluateConfig, device: torch.device
) -> dict[str, str]:
    """The row of a checkpoint, or of an ensemble, in the table, by column."""
    loaded = [utils.load_checkpoint(path, device) for path in paths]
    models = [model for model, _, _ in loaded]
    path, (model, tokenizer, state) = paths[0], loaded[0]
    if len(paths) > 1:
        same_text = ["corpus", "separator", "hold_out"] * (not config.data)
        names = ["tokenizer", "vocab_size", "block_size", "doc_mask", *same_text]
        check_alike([state for _, _, state in loaded], names)
        model = cast(GPT, Ensemble(models))
    objective = "" if config.data else last_objective(state)
    if objective == "dpo":
        raise UserError(f"{path} was trained on pairs of answers: choose a text with --data")
    if objective in ("chat", "qa") and "questions" in state["corpus"]:
        print(f"note: {path} was trained on answers only; this loss includes the questions")
    if config.data:
        _, corpus = load_corpus(
            config.data, "", 0, tokenizer, config.separator, encoding=config.encoding
        )
    else:
        try:
            corpus = training_corpus(tokenizer, state)
        except UserError as error:
            raise UserError(f"{path}: {error}; choose a corpus with --data") from None
    doc_mask = bool(state["train_config"].get("doc_mask"))
    result = evaluate_split(model, corpus, config, doc_mask)

    ids = corpus.val_ids if config.split == "val" else corpus.train_ids
    n_bytes = corpus.val_bytes if config.split == "val" else corpus.train_bytes
    unknown = tokenizer.specials.get("<UNK>")
    # The bytes of unknown characters cannot be predicted.
    has_bpb = n_bytes and (unknown is None or not (ids[:] == unknown).any())
    bytes_per_token = n_bytes / len(ids) if has_bpb else math.nan
    loss = result["loss"]
    row = {
        "checkpoint": f"all {len(paths)} together" if len(paths) > 1 else str(path),
        "parameters": f"{sum(model.num_params() for model in models) / 1e6:.2f} M",
        "split": config.split,
        "tokens": f"{result['tokens']:,}",
        "loss": f"{loss:.4f}",
        "ppl": f"{math.inf if loss > MAX_EXP else math.exp(loss):.2f}",
        "bpb": f"{utils.bits_per_byte(loss, bytes_per_token):.4f}",
        "top-1": f"{result['top1']:.1%}",
    }
    if config.stride is not None:
        loss = evaluate_split(model, corpus, config, doc_mask, config.stride)["loss"]
        row[f"loss, stride {config.stride}"] = f"{loss:.4f}"
        row[f"bpb, stride {config.stride}"] = f"{utils.bits_per_byte(loss, bytes_per_token):.4f}"
    return row


def main(argv: list[str] | None = None) -> int:
    config = parse_args(
        EvaluateConfig, argv, __doc__, check=lambda config: device_problems(config.device)
    )
    if (config.separator or config.encoding != "utf-8") and not config.data:
        raise UserError("--separator and --encoding are for --data: leave them out, or give both")
    paths = [Path(name) for name in config.checkpoints]
    paths = paths or [newest_checkpoint(Path("checkpoints"))]
    if config.ensemble and len(set(paths)) < 2:
        raise UserError("--ensemble needs two or more checkpoints")
    device = pick_device(config.device)
    for path in paths:  # damaged ones, and strides that would skip tokens: before anything slow
        size = utils.load_checkpoint(path)[0].config.block_size
        if (config.stride or 0) > size:
            raise UserError(f"--stride must be at most {size}, the window of {path}")
    config.precision, _ = pick_precision(config.precision, device)
    rows: list[dict[str, str]] = []
    try:
        for group in [[path] for path in paths] + [paths] * config.ensemble:
            rows.append(evaluate_checkpoints(group, config, device))
    finally:  # print the finished rows even after an error
        if rows:
            print(format_table(rows))
    return 0


if __name__ == "__main__":
    run(main)
