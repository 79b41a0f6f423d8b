"""The objectives of fine-tuning: another text, distillation, questions and answers, preferences
(DPO). Each is a task, next to the formula of its loss, and an entry of OBJECTIVES."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig, SampleConfig, TrainConfig
from corpus.load import training_corpus
from finetuning.lora import LoRAConfig
from finetuning.records import Encode, Records, encode_pair, pack_turns
from generate import stream_texts
from model import GPT
from sampling.text import last_objective
from system.settings import UserError, setting
from tokenizer import QA_SPECIALS, Tokenizer
from training.distributed import local_rank_zero_first
from training.task import Batch, Metrics, Pretraining, Task, sample_from_newline
from training.teachers import Teachers


class Base(NamedTuple):
    """The model that fine-tuning starts from."""

    model: GPT
    tokenizer: Tokenizer
    state: dict[str, Any]  # its checkpoint
    sha256: str  # of its weights
    trained: TrainConfig  # how it was trained, as far as that matters here
    lr: float  # the peak learning rate of pretraining, for AdamW


class Setup(NamedTuple):
    """What is decided about a run before its data are read."""

    settings: "FinetuneConfig"
    adapt: LoRAConfig
    config: TrainConfig
    gpt_config: GPTConfig
    base: Base
    teachers: Teachers | None = None
    state: dict[str, Any] | None = None  # the checkpoint to resume

    @property
    def run_dir(self) -> Path:
        return Path(self.config.out_dir, self.config.tag)


# --- another text


class TextTask:
    """Learning another corpus. Also logs the loss on the old one, if its text can be read."""

    def __init__(self, text: Pretraining, setup: Setup, model: GPT):
        self.text, self.old = text, None
        self.format, self.tokens_per_step = text.format, text.tokens_per_step
        self.get_batch, self.loss = text.get_batch, text.loss
        if last_objective(setup.base.state) == "dpo":  # pairs are not a text
            return
        with local_rank_zero_first():  # it may be downloaded
            try:  # inside, so that a failure does not keep the other processes waiting
                self.old = training_corpus(text.tokenizer, setup.base.state)
            except UserError as error:
                print(f"not logging the loss on the old corpus: {error}")

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        metrics = self.text.evaluate(model, full)
        if self.old is not None:
            n_windows = None if full else self.text.config.eval_windows
            metrics["old"] = self.text.mean_loss(model, self.old.val_ids, n_windows)
        return metrics

    def sample(self, model: GPT) -> str:
        text = self.text  # qa=False: of text, even if the base answers questions
        return sample_from_newline(model, text.tokenizer, text.config.sample_tokens, qa=False)


# --- distillation


def distillation(text: Pretraining, setup: Setup, model: GPT) -> Task:
    """Learning from the text and from the teachers."""
    assert setup.teachers is not None
    return setup.teachers.task(text)


# --- questions and answers


class QATask:
    """Answering questions: only the answers and their <EOS> are scored."""

    tokens_per_step: int | None = None

    def __init__(self, records: Records, setup: Setup, model: GPT):
        self.records, self.format = records, records.format

    def get_batch(self, step: int, micro_step: int) -> tuple[Batch, Tensor]:
        x, y = self.records.random_batch(step, micro_step)
        return (x, y), (y != -100).sum()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": model(x, y)[1]}

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        n = self.records.config.eval_windows
        train, exact_train = self.score(model, "train", n)
        val, exact = self.score(model, "val", None if full else n)
        metrics = {} if full else {"train": train}
        return metrics | {"val": val, "exact": exact, "exact_train": exact_train}

    def score(self, model: GPT, split: str, n: int | None) -> tuple[float, float]:
        """The mean loss per scored token, and the fraction of exact answers, over n evenly spaced
        records of a split, or all (None). Greedy generation gives an answer exactly if each of its
        tokens is the most likely one after the correct tokens before it. Each answer of a
        conversation counts by itself, after the true turns before it; too long ones are wrong."""

        def measure(x: Tensor, y: Tensor) -> list[Tensor]:
            logits, scored = model(x)[0], y != -100
            answers = (scored & ~F.pad(scored, (1, 0))[:, :-1]).cumsum(dim=1)  # (B, T), 1, 2, ...
            wrong = (scored & (logits.argmax(dim=-1) != y)).float()
            wrong = torch.zeros_like(wrong).scatter_add(1, answers, wrong)  # tokens per answer
            n_answers = answers[:, -1]
            n_exact = n_answers - wrong.count_nonzero(dim=1)
            return [-log_probability(logits, y), scored.sum(dim=1), n_exact, n_answers]

        loss, n_tokens, n_exact, n_answers, _ = self.records.totals(measure, split, n)
        fitting, n_long = self.records.splits[split]
        n_fitting = sum(int((s[1:] & ~s[:-1]).sum()) for ((_, s),) in fitting)  # answers
        share = n_fitting / (n_fitting + n_long)
        return loss / n_tokens, n_exact / n_answers * share

    def sample(self, model: GPT) -> str:
        tokenizer, config = self.records.tokenizer, self.records.config
        greedy = SampleConfig(temperature=0, max_new_tokens=config.sample_tokens)
        texts = []
        for ((ids, scored),) in self.records.splits["val"].records[:2]:
            prompt = torch.from_numpy(ids[: scored.argmax()])  # of the first answer
            steps = stream_texts(model, tokenizer, greedy, prompt.to(self.records.device))
            answer = "".join(piece for (piece,) in steps)
            texts.append(tokenizer.decode(prompt[1:].tolist()) + answer)
        return "\n".join(texts)


# --- preferences


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected)) of each pair, (B,), from the rewards (B,) of both (DPO,
    Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(chosen - rejected)


def log_probability(logits: Tensor, y: Tensor) -> Tensor:
    """The log-probability of the tokens y (B, T) that are not -100, summed over each text, (B,)."""
    log_p = logits.float().log_softmax(dim=-1)  # (B, T, V)
    return log_p.gather(2, y.clamp(min=0)[:, :, None]).squeeze(2).masked_fill(y == -100, 0).sum(1)


class DPOTask:
    """Preferring the chosen text of each pair to the rejected one, close to the reference model,
    which is the model as training begins.

    Trained without dropout, as in Hugging Face's TRL: the model equals its reference at first, so
    that all rewards are 0, and later a reward is the effect of training, not of dropped channels.
    """

    tokens_per_step: int | None = None

    def __init__(self, records: Records, setup: Setup, model: GPT):
        self.records, self.format = records, records.format
        reference = copy.deepcopy(model).to(records.device)
        self.reference, self.beta = reference.eval().requires_grad_(False), setup.settings.beta

    def get_batch(self, step: int, micro_step: int) -> tuple[Batch, Tensor]:
        x, y = self.records.random_batch(step, micro_step)
        return (x, y), torch.tensor(len(x) // 2)  # the loss is a mean over pairs

    def rewards(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The implicit rewards (equation 5) of the chosen and the rejected texts, (B,) each."""
        with torch.no_grad():
            before = log_probability(self.reference(x)[0], y)  # (2B,)
        return (self.beta * (log_probability(model(x)[0], y) - before)).chunk(2)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": dpo_loss(*self.rewards(model, x, y)).mean()}

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        n = None if full else self.records.config.eval_windows
        metrics = {} if full else {"train": self.score(model, "train", n)["loss"]}
        val = self.score(model, "val", n)
        return metrics | {"val": val.pop("loss")} | val

    def score(self, model: GPT, split: str, n: int | None) -> Metrics:
        """Over n evenly spaced pairs of a split, or all (None): the mean loss, the mean margin
        r(chosen) - r(rejected), and the accuracy, the fraction of pairs with a positive margin."""

        def measure(x: Tensor, y: Tensor) -> list[Tensor]:
            chosen, rejected = self.rewards(model, x, y)
            return [dpo_loss(chosen, rejected), chosen - rejected, chosen > rejected]

        loss, margin, n_right, n_pairs = self.records.totals(measure, split, n)
        return {"loss": loss / n_pairs, "margin": margin / n_pairs, "accuracy": n_right / n_pairs}

    def sample(self, model: GPT) -> str:
        tokenizer, config = self.records.tokenizer, self.records.config
        return sample_from_newline(model, tokenizer, config.sample_tokens)


# --- the objectives


@dataclass(frozen=True)
class Objective:
    """What fine-tuning trains for: a task, and the settings of its runs."""

    task: Callable[[Any, Setup, GPT], Task]  # the first argument: Pretraining or Records
    lr_scale: float  # peak learning rate relative to pretraining's
    defaults: dict[str, Any]  # that differ from pretraining's
    flags: tuple[str, ...]  # that not all objectives have
    records: Encode | None = None  # None: the data are a text
    specials: tuple[str, ...] | None = None  # that records need; None: no tokens are added
    teacher: bool = False  # needs --teacher, but no data
    dropout: bool = True  # may be trained with dropout


TEXT_FLAGS = ("doc_mask", "grow_windows", "separator")
# Runs are short, data sets small, and batches of records vary in length, for each of which
# torch.compile would compile again. Answers are memorized; the others must not make the model
# forget. A student's loss has no limit of 0, so one batch cannot be overfitted.
OBJECTIVES = {
    "text": Objective(
        TextTask,
        lr_scale=0.1,
        defaults={"max_steps": 500, "batch_size": 12, "eval_every": 100},
        flags=(*TEXT_FLAGS, "overfit_batch"),
        specials=(),  # and those of documents
    ),
    "chat": Objective(
        QATask,
        lr_scale=1.0,
        defaults={"max_steps": 600, "batch_size": 16, "eval_every": 100, "compile": False}
        | {"data": "data/qa.json"},
        flags=("overfit_batch", "skip_bad"),
        records=pack_turns,
        specials=QA_SPECIALS,
    ),
    "distill": Objective(
        distillation,
        lr_scale=0.1,
        defaults={"max_steps": 1500, "batch_size": 12, "eval_every": 250},
        flags=(*TEXT_FLAGS, "skip_bad", "teacher", "teacher_share", "teacher_temperature"),
        teacher=True,
    ),
    "dpo": Objective(
        DPOTask,
        lr_scale=0.01,
        defaults={"max_steps": 200, "batch_size": 8, "eval_every": 50, "compile": False}
        | {"dropout": 0.0, "lora_dropout": 0.0},
        flags=("beta", "overfit_batch", "skip_bad"),
        records=encode_pair,
        dropout=False,
    ),
}
OBJECTIVES["qa"] = OBJECTIVES["chat"]  # its old name


@dataclass
class FinetuneConfig:
    source: str = setting("", "checkpoint to fine-tune", positional=True, group="fine-tuning",
                          alias="checkpoint base model model_name_or_path")  # fmt: skip
    objective: str = setting("text", "what to train for; qa: as chat", choices=tuple(OBJECTIVES))
    beta: float = setting(0.1, "dpo: KL penalty strength", above=0)
    merge: str = setting("", "adapter.pt to merge into its base, without training")
