"""The loss of several models together: the mean of the probabilities that they predict.

    python -m experiments.ensemble checkpoints/a/best.pt checkpoints/b/best.pt checkpoints/c/best.pt

The models have the same tokenizer and window, and were trained on the same text, for example with
different seeds. Sampling from them together would take as long as from all of them.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from config import DEVICE_HELP
from corpus.load import training_corpus
from evaluate import EvaluateConfig, evaluate_split
from experiments.study import to_markdown
from model import GPT
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.errors import run
from system.settings import UserError, setting
from utils import load_checkpoint


@dataclass
class EnsembleConfig:
    """Which models are evaluated."""

    checkpoints: tuple[str, ...] = setting((), "two or more", positional=True)
    device: str = setting("auto", DEVICE_HELP)

    def problems(self) -> list[str]:
        """Too few checkpoints."""
        return (
            [] if len(set(self.checkpoints)) > 1 else ["give the paths of two or more checkpoints"]
        )


class Ensemble(nn.Module):
    """Predicts the mean of the models' probabilities."""

    def __init__(self, models: list[GPT]):
        super().__init__()
        self.models, self.config = nn.ModuleList(models), models[0].config

    def forward(self, idx: Tensor, targets: Tensor, docs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T, V) and their mean loss, as from a GPT."""
        logs = [model(idx, docs=docs)[0].float().log_softmax(dim=-1) for model in self.models]
        mixed = torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))  # (B, T, V)
        return mixed, nn.functional.nll_loss(mixed.flatten(0, 1), targets.flatten())


def check_alike(states: dict[str, dict[str, Any]]) -> None:
    """Raise UserError if models have different tokenizers, windows or texts."""
    (first, one), *others = states.items()
    for name, other in others:
        for what in ("tokenizer", "corpus"):
            if one[what] != other[what]:
                raise UserError(f"{first} and {name} have different values of {what}")
        if one["train_config"].get("doc_mask") != other["train_config"].get("doc_mask"):
            raise UserError(f"{first} and {name} have different values of doc_mask")
        if one["gpt_config"]["block_size"] != other["gpt_config"]["block_size"]:
            raise UserError(f"{first} and {name} have different windows (block_size)")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    config = parse_args(
        EnsembleConfig, argv, __doc__, check=lambda config: device_problems(config.device)
    )
    loaded = {
        name: load_checkpoint(name, pick_device(config.device)) for name in config.checkpoints
    }
    check_alike({name: state for name, (_, _, state) in loaded.items()})
    models = [model for model, _, _ in loaded.values()]
    _, tokenizer, state = loaded[config.checkpoints[0]]
    corpus = training_corpus(tokenizer, state)
    doc_mask = bool(state["train_config"].get("doc_mask"))
    settings = EvaluateConfig(precision="float32")
    rows = [
        {"model": name, "loss": evaluate_split(model, corpus, settings, doc_mask)["loss"]}
        for name, model in zip(loaded, models, strict=True)
    ]
    together = cast(GPT, Ensemble(models))  # it has what an evaluation uses
    loss = evaluate_split(together, corpus, settings, doc_mask)["loss"]
    print(to_markdown([*rows, {"model": f"all {len(models)}", "loss": loss}]))
    return 0


if __name__ == "__main__":
    run(main)
