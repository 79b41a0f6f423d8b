"""Classic mistakes, one at a time: what they do to the losses, the samples and the verdict.

    python -m experiments.mistakes

Each mistake is a subclass or a function that replaces one part of the correct code while a run
trains, or settings. Some mistakes make the losses too good. The honest loss is that of the last
token of windows of text that no run reads, given only the tokens before it, as in sampling.
"""

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from system.start import run

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import model as model_parts
import train
from corpus.corpus import Corpus
from experiments import study as studies
from experiments.comparison import Row, add_differences, mean, mean_columns
from experiments.optimizers import SHARED
from experiments.study import Result, Runs, Study, kept, parse_study
from model import GPT, AttentionContext, Block, Mask, fused_attention, plain_attention
from training.setup import Flags
from training.task import Pretraining
from utils import even_starts, load_checkpoint, windows
from viz.curve import BLUE, ORANGE, new_figure
from viz.verdict import verdict


def attend_everywhere(q: Tensor, k: Tensor, v: Tensor, visible: Mask = None) -> Tensor:
    """Attention without the causal mask: tokens attend to later ones, the answers."""
    everywhere = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device)  # (T, S)
    return plain_attention(q, k, v, everywhere)[0]


def attend_unscaled(q: Tensor, k: Tensor, v: Tensor, visible: Mask = None) -> Tensor:
    """Attention scores that are not divided by sqrt(D): the factor cancels the division."""
    return fused_attention(q * math.sqrt(q.size(-1)), k, v, visible)


class UnshiftedGPT(GPT):
    """The target of each token is the token itself, not the next one."""

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(idx, None if targets is None else idx, *args, **kwargs)


class ResidualFreeBlock(Block):
    """Each sublayer replaces its input instead of adding to it."""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        x = self.drop(self.attn(self.sublayer_input(x, 0, context), context)).to(x.dtype)
        return self.drop(self.mlp(self.sublayer_input(x, 1, context))).to(x.dtype)


class NoZeroGrad(train.Trainer):
    """The gradients of all earlier steps are added up."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        for optimizer in self.optimizers.values():
            vars(optimizer)["zero_grad"] = lambda: None


class LateClipping(train.Trainer):
    """Clips the gradients after the optimizer has used them."""

    def train_step(self) -> dict[str, Tensor]:
        max_norm, self.config.grad_clip = self.config.grad_clip, 0.0  # no clipping in the step
        metrics = super().train_step()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.config.grad_clip = max_norm
        return metrics


class NoEvalMode(train.Trainer):
    """Evaluates and samples without model.eval(): dropout stays on."""

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        with torch.no_grad():
            yield


class TrainsOnValidation(Pretraining):
    """The training split contains the validation split."""

    def __init__(self, corpus: Corpus, *args: Any):
        both = np.concatenate([corpus.train_ids[:], corpus.val_ids[:]])
        super().__init__(replace(corpus, train_ids=both), *args)


class ShuffledTokens(Pretraining):
    """Tokens are shuffled, as rows of a table would be; each split by itself."""

    def __init__(self, corpus: Corpus, *args: Any):
        shuffle = np.random.default_rng(0).permutation
        train_ids, val_ids = shuffle(corpus.train_ids[:]), shuffle(corpus.val_ids[:])
        super().__init__(replace(corpus, train_ids=train_ids, val_ids=val_ids), *args)


@dataclass(frozen=True)
class Mistake:
    sign: str
    flags: Flags = field(default_factory=dict)
    # The owner of a part, its name, and the new part; by default it is the same.
    replacement: tuple[Any, str, Any] = (train, "Trainer", train.Trainer)

    def context(self) -> AbstractContextManager[Any]:
        return patch.object(*self.replacement)


BASE = "correct"
HIGH_RATE = 3e-2
MISTAKES: dict[str, Mistake] = {
    BASE: Mistake("the validation loss is a little above the training loss, both fall"),
    "no causal mask": Mistake(
        "a loss far below any published one, and samples that repeat one character or are empty",
        replacement=(model_parts, "fused_attention", attend_everywhere),
    ),
    "targets not shifted": Mistake(
        "the loss falls to almost 0, and a sample repeats the last token of the prompt",
        replacement=(studies, "GPT", UnshiftedGPT),
    ),
    "no zero_grad": Mistake(
        "the gradient norm never falls below the clipping threshold: old gradients are in it",
        replacement=(train, "Trainer", NoZeroGrad),
    ),
    "clipping after the step": Mistake(
        "not the losses: nothing limits a step after a peak of the gradient norm",
        replacement=(train, "Trainer", LateClipping),
    ),
    "high learning rate": Mistake("for comparison: with warmup", {"lr_max": HIGH_RATE}),
    "high learning rate, no warmup": Mistake(
        "the loss rises again within the first ten steps, long before the first evaluation",
        {"lr_max": HIGH_RATE, "warmup_steps": 0},
    ),
    "no residual connections": Mistake(
        "the loss stays near that of token frequencies, however long it trains",
        replacement=(model_parts, "Block", ResidualFreeBlock),
    ),
    "scores not scaled": Mistake(
        "not the losses: higher peaks of the gradient norm",
        replacement=(model_parts, "fused_attention", attend_unscaled),
    ),
    "dropout in evaluation": Mistake(
        "both losses are a little too high, and two evaluations of the same weights differ",
        replacement=(train, "Trainer", NoEvalMode),
    ),
    "training on validation data": Mistake(
        "no gap between training and validation loss, even after several epochs",
        replacement=(studies, "Pretraining", TrainsOnValidation),
    ),
    "shuffled tokens": Mistake(
        "the loss is that of token frequencies; decoded batches are not text",
        replacement=(studies, "Pretraining", ShuffledTokens),
    ),
}

# Dropout, so that forgetting to turn it off has an effect.
COMMON: Flags = {"dropout": 0.2, "sample_tokens": 100, "log_every": 1}
SHARE = 0.25  # of the training text is read; the honest loss is measured on the rest
HONEST_WINDOWS = 2000


def honest_loss(study: Study, result: Result) -> float:
    """The honest loss of the last checkpoint of a run, kept in its folder; infinite if it diverged.
    Called in the context of the mistake, which may be a part of the model."""
    if not math.isfinite(result["val"]):
        return math.inf
    folder = Path(result["flags"]["out_dir"])

    def measure() -> float:
        model, _, _ = load_checkpoint(folder / "latest.pt", study.device)
        _, corpus = study.corpus(result["flags"])
        text = corpus.train_ids[round(len(corpus.train_ids) * SHARE) :]
        return last_token_loss(model, text, study.device)

    return kept(folder / "honest.json", measure)


@torch.no_grad()
def last_token_loss(model: GPT, text: np.ndarray, device: torch.device) -> float:
    """The mean loss of a model in eval mode for the last token of windows of a text."""
    T = model.config.block_size
    starts = even_starts(len(text), T, HONEST_WINDOWS)
    starts = starts[starts < len(text) - T]  # no padding
    x, y = windows(text, starts, T)
    batches = zip(x.to(device).split(64), y[:, -1].to(device).split(64), strict=True)
    losses = [F.cross_entropy(model(x)[0][:, -1], y, reduction="none") for x, y in batches]
    return torch.cat(losses).mean().item()


def last_sample(result: Result) -> str:
    text = Path(result["flags"]["out_dir"], "samples.txt").read_text(encoding="utf-8")
    *_, step, sample = re.split(r"^--- step (\d+).*\n", text, flags=re.MULTILINE)
    if int(step) < result["log"][-1]["step"]:  # such texts are not in the file
        return "(only newlines)"
    return " / ".join(sample.strip("\n").split("\n")).replace("|", "\\|")


def final_losses(runs: list[Result], split: str) -> list[float]:
    """The loss of a split, "train" or "val", at the end of each run; infinite if it diverged."""
    return [r["log"][-1][split] if math.isfinite(r["val"]) else math.inf for r in runs]


def short_verdict(result: Result, vocab_size: int) -> str:
    if not math.isfinite(result["val"]):
        return "stopped: the loss or a gradient is not finite"
    return re.split("[:;]", verdict(result["log"], result["flags"] | {"vocab_size": vocab_size}))[0]


def loss_rows(runs: Runs) -> list[Row]:
    """What the runs show: the losses at the end, and the gradient norms before clipping."""
    rows: list[Row] = []
    val = {name: final_losses(results, "val") for name, results in runs.items()}
    for name, results in runs.items():
        norms = studies.gradient_norms(results)
        rows.append(
            {
                "mistake": name,
                "training loss": mean(final_losses(results, "train")),
                "lowest gradient norm": min(norms, default=math.nan),
                "highest": max(norms, default=math.nan),
                **mean_columns("validation loss", val[name]),
            }
        )
    return add_differences(rows, val.values())


GRAY = "#999999"


def plot(runs: Runs, honest: dict[str, list[float]], top: float) -> Figure:
    """The curves of the first seed of each mistake, over those of the correct run: the training
    loss, dashed, and the validation loss. top: the highest loss that is shown."""
    figure = new_figure(13, 8.5)
    *panels, legend = figure.subplots(3, 4, sharex=True, sharey=True).flat
    correct, *names = runs
    titles = {name: f"{name}\nhonest loss: {mean(losses):.2f}" for name, losses in honest.items()}
    for axes, name in zip(panels, names, strict=False):
        for shown, colors in ((correct, (GRAY, GRAY)), (name, (ORANGE, BLUE))):
            log = runs[shown][0]["log"]
            steps = [record["step"] for record in log]
            axes.plot(steps, [record["train"] for record in log], "--", color=colors[0])
            axes.plot(steps, [record["val"] for record in log], color=colors[1])
        axes.set_title(titles[name], fontsize=10)
        axes.set_ylim(0, top)
    legend.axis("off")
    for label, colors in (("correct", (GRAY, GRAY)), ("with the mistake", (ORANGE, BLUE))):
        legend.plot([], "--", color=colors[0], label=f"{label}: training loss")
        legend.plot([], color=colors[1], label=f"{label}: validation loss")
    legend.legend(loc="center", frameon=False)
    legend.set_title(titles[correct], fontsize=10)
    figure.supxlabel("step")
    figure.supylabel("loss (nats per token)")
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("mistakes", argv, __doc__)
    study.n_runs = len(MISTAKES) * study.config.seeds
    base = COMMON | SHARED
    runs: Runs = {}
    honest: dict[str, list[float]] = {}
    for name, mistake in MISTAKES.items():
        with mistake.context():
            runs[name] = study.with_seeds(name, base | mistake.flags, SHARE)
            honest[name] = [honest_loss(study, result) for result in runs[name]]
    honest_rows = [{"mistake": n, **mean_columns("honest loss", v)} for n, v in honest.items()]
    vocab_size = study.corpus(base)[0].vocab_size
    tables = {
        "What the runs show": loss_rows(runs),
        "Honest losses": add_differences(honest_rows, honest.values()),
        "Signs": [  # of the first seed
            {
                "mistake": name,
                "verdict": short_verdict(results[0], vocab_size),
                "sample": last_sample(results[0]),
                "how to recognize it": MISTAKES[name].sign,
            }
            for name, results in runs.items()
        ],
    }
    study.write_results(tables, plot(runs, honest, top=1.1 * math.log(vocab_size)))
    return 0


if __name__ == "__main__":
    run(main)
