"""Learn from trained models: a new model, the student, learns the text and the probabilities that
its teachers give to the next token (distillation, Hinton et al. 2015).

A text that is read many times teaches more that way, even if student and teacher are equal in size
(Kim et al. 2025). Several teachers are averaged. Loaded only with --teacher.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig, TrainConfig
from model import GPT
from system.settings import UserError, raise_problems
from tokenizer import Tokenizer
from training.resume import weights_sha256
from training.task import Pretraining, Task
from utils import load_checkpoint, read_checkpoint

# The settings of a run that describe its text.
OWN_CORPUS = ("data", "separator", "hold_out", "encoding", "skip_bad")


class Teachers(NamedTuple):
    """Trained models with the same tokenizer."""

    models: list[GPT]
    tokenizer: Tokenizer
    sha256: list[str]  # of their weights

    def task(self, text: Pretraining) -> Task:
        return DistillationTask(text, self)


def teacher_paths(text: str) -> list[Path]:
    """Checkpoints separated by commas, or one whose path contains a comma."""
    return [Path(text)] if Path(text).exists() else list(map(Path, text.split(",")))


def load_teachers(
    gpt_config: GPTConfig, config: TrainConfig, state: dict[str, Any] | None
) -> Teachers:
    """The teachers of a student with these settings. `state` is the checkpoint of the run that is
    resumed. Raises UserError if they do not fit."""
    paths, run_dir = teacher_paths(config.teacher), Path(config.out_dir, config.tag)
    loaded = [load_checkpoint(path, torch.device("cpu")) for path in paths]
    models, tokenizers, states = zip(*loaded, strict=True)
    sha256 = [weights_sha256(own["model"]) for own in states]
    found = []
    for path, model, tokenizer in zip(paths, models, tokenizers, strict=True):
        if tokenizer.to_dict() != tokenizers[0].to_dict():
            found.append(f"{path} and {paths[0]} have different tokenizers")
        if (size := model.config.block_size) < gpt_config.block_size:
            found.append(f"the window of {path}, {size} tokens, is shorter than the student's")
        if run_dir.resolve() in (path.resolve(), path.resolve().parent):
            found.append(f"{run_dir}/ contains {path}: give the run another --tag")
    if config.overfit_batch:  # a student's loss has no limit of 0
        found.append("--overfit_batch tests learning from the text: leave out --teacher")
    if state and state.get("teachers", sha256) != sha256:
        found.append(f"{config.teacher} has changed since this run began: name the original")
    raise_problems(found)
    return Teachers(list(models), tokenizers[0], sha256)


def corpus_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of the text that the first teacher was trained on, unless the flags name one."""
    if "data" in flags:
        return {}
    state = read_checkpoint(teacher_paths(flags["teacher"])[0])
    if not state["corpus"]["sha256"]:
        raise UserError("give --data: the text that an imported teacher was trained on is unknown")
    saved = state["train_config"]
    return {name: saved[name] for name in OWN_CORPUS if name in saved}


def distillation_loss(
    student: Tensor,
    teachers: list[Tensor],
    y: Tensor,
    hard: Tensor,
    temperature: float,
    share: float,
) -> Tensor:
    """share T^2 KL(p || q) + (1 - share) hard, where q is softmax(logits / T) of the student and p
    the mean of those of the teachers, logits (B, T, V) all, and hard is the usual loss (Hinton et
    al. 2015, section 2). T^2 because the gradient of the soft loss shrinks with 1/T^2. Both losses
    are averaged over the tokens y (B, T) that are not -100."""
    log_q, *log_ps = (
        F.log_softmax(logits.float() / temperature, dim=-1)  # (B, T, V)
        for logits in (student, *teachers)
    )
    log_p = torch.stack(log_ps).logsumexp(dim=0) - math.log(len(log_ps))
    soft = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)  # (B, T)
    return share * temperature**2 * soft[y != -100].mean() + (1 - share) * hard


class DistillationTask:
    """Next-token prediction, from a text and from the teachers' mean distribution."""

    def __init__(self, text: Pretraining, teachers: Teachers):
        self.text, self.config = text, text.config
        self.teachers = [model.to(text.device).requires_grad_(False) for model in teachers.models]
        for model in self.teachers if text.config.compile else ():
            for block in model.blocks:
                block.compile()
        self.format, self.tokens_per_step = text.format, text.tokens_per_step
        self.format.entries["teachers"] = teachers.sha256
        self.get_batch, self.evaluate, self.sample = text.get_batch, text.evaluate, text.sample
        self.corpus, self.mean_loss = text.corpus, text.mean_loss  # for --minutes

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        docs, config = self.text.document_numbers(x), self.config
        with torch.no_grad():
            targets = [teacher(x, docs=docs)[0] for teacher in self.teachers]
        logits, hard = model(x, y, docs)
        size = min(t.size(-1) for t in (logits, *targets))  # imported models have unused rows
        targets = [t[..., :size] for t in targets]
        own = (config.teacher_temperature, config.teacher_share)
        return {"loss": distillation_loss(logits[..., :size], targets, y, hard, *own)}
