"""The loss of several models together: the mean of the probabilities that they predict.

    python -m experiments.ensemble checkpoints/a/best.pt checkpoints/b/best.pt checkpoints/c/best.pt

The models have the same tokenizer and window, and were trained on the same text, for example with
different seeds. Sampling from them together would take as long as from all of them.
"""

import math
from dataclasses import dataclass
from typing import Any, cast
from system.start import run

import torch
from torch import Tensor, nn

from config import DEVICE_HELP
from corpus.load import training_corpus
from evaluate import EvaluateConfig, evaluate_split
from experiments.study import to_markdown
from model import GPT
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.settings import UserError, setting
from utils import load_checkpoint


@dataclass
class EnsembleConfig:
    """Which models are evaluated."""

    checkpoints: tuple[str, ...] = setting((), "two or more", positional=True)
    device: str = setting("auto", DEVICE_HELP)

    def problems(self) -> list[str]:
        """Too few checkpoints."""
        enough = len(set(self.checkpoints)) > 1
        return [] if enough else ["give the paths of two or more checkpoints"]


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


def check_alike(states: dict[str, dict[str, Any]]) -> None:
    """Raise UserError if models have different tokenizers, windows, texts or splits."""
    settings = {n: s["train_config"] | s["gpt_config"] | s for n, s in states.items()}
    (first, one), *others = settings.items()
    for name, other in others:
        for what in ("tokenizer", "corpus", "block_size", "doc_mask", "separator", "hold_out"):
            if one.get(what) != other.get(what):
                raise UserError(f"{first} and {name} have different values of {what}")


def main(argv: list[str] | None = None) -> int:
    config = parse_args(
        EnsembleConfig, argv, __doc__, check=lambda config: device_problems(config.device)
    )
    device = pick_device(config.device)
    loaded = {name: load_checkpoint(name, device) for name in config.checkpoints}
    check_alike({name: state for name, (_, _, state) in loaded.items()})
    _, tokenizer, state = loaded[config.checkpoints[0]]
    corpus = training_corpus(tokenizer, state)
    doc_mask = bool(state["train_config"].get("doc_mask"))
    settings = EvaluateConfig(precision="float32")
    models = {name: model for name, (model, _, _) in loaded.items()}
    models[f"all {len(models)}"] = cast(GPT, Ensemble(list(models.values())))
    rows = []
    for name, model in models.items():
        loss = evaluate_split(model, corpus, settings, doc_mask)["loss"]
        rows.append({"model": name, "loss": loss})
    print(to_markdown(rows))
    return 0


if __name__ == "__main__":
    run(main)
