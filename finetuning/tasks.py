"""The tasks of fine-tuning, each next to the formula of its loss: another text, questions and
answers, distillation, preferences (DPO)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import SampleConfig, TrainConfig, UserError
from corpus.load import Corpus
from corpus.records import encode_record
from generate import encode_prompt, end_tokens, stream_texts
from model import GPT
from tokenizer import Tokenizer
from training.task import Batch, CheckpointFormat, Metrics, Pretraining, sample_from_newline

Example = tuple[np.ndarray, int]  # the ids of a text (T,), and how many of them are its prompt
Splits = dict[str, list[list[Example]]]  # train and val: a question has one example, a pair two

# --- another text


@dataclass
class TextTask:
    """Next-token prediction on another corpus. Also logs the loss on the old one, as "old"."""

    pretraining: Pretraining
    old: Corpus | None

    def __post_init__(self) -> None:
        text = self.pretraining
        self.format, self.tokens_per_step = text.format, text.tokens_per_step
        self.get_batch, self.loss, self.sample = text.get_batch, text.loss, text.sample

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        metrics = self.pretraining.evaluate(model, full)
        if self.old is None:
            return metrics
        n_windows = self.pretraining.config.eval_windows
        return metrics | {"old": self.pretraining.mean_loss(model, self.old.val_ids, n_windows)}


# --- distillation


def distillation_loss(
    student: Tensor, teacher: Tensor, hard: Tensor, temperature: float, alpha: float
) -> Tensor:
    """alpha T^2 KL(p || q) + (1 - alpha) hard, where p and q are softmax(logits / T) of teacher and
    student, logits (B, T, V) both, and hard is the usual loss (Hinton et al. 2015, section 2). T^2
    because the gradient of the soft loss shrinks with 1/T^2."""
    log_p, log_q = (
        F.log_softmax(logits.float().flatten(0, 1) / temperature, dim=-1)  # (B T, V)
        for logits in (teacher, student)
    )
    soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * hard


@dataclass
class DistillationTask:
    """Next-token prediction, from the text and from a teacher's distribution."""

    pretraining: Pretraining
    teacher: GPT
    temperature: float
    alpha: float

    def __post_init__(self) -> None:
        text = self.pretraining
        self.format, self.tokens_per_step = text.format, text.tokens_per_step
        self.get_batch, self.evaluate, self.sample = text.get_batch, text.evaluate, text.sample

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        docs = self.pretraining.document_numbers(x)
        with torch.no_grad():
            teacher_logits = self.teacher(x, docs=docs)[0]
        logits, hard = model(x, y, docs)
        loss = distillation_loss(logits, teacher_logits, hard, self.temperature, self.alpha)
        return {"loss": loss}


# --- questions and answers


@dataclass
class QATask:
    """Answering questions: only the answers and their <EOS> are scored."""

    splits: Splits
    tokenizer: Tokenizer
    config: TrainConfig
    device: torch.device
    format: CheckpointFormat
    tokens_per_step: int | None = None

    def batch(self, records: Sequence[list[Example]]) -> Batch:
        """Records as a padded batch, x and y (B, T)."""
        return pad_batch([example for (example,) in records], self.tokenizer.specials["<PAD>"])

    def get_batch(self, step: int, micro_step: int) -> tuple[Batch, Tensor]:
        x, y = self.batch(random_items(self.splits["train"], self.config, step, micro_step))
        return (x, y), (y != -100).sum()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": model(x, y)[1]}

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        n = None if full else self.config.eval_windows
        metrics = {} if full else {"train": self.mean_loss(model, "train", n)}
        metrics["val"] = self.mean_loss(model, "val", n)
        metrics["exact"] = self.exact_answers(model, "val")
        metrics["exact_train"] = self.exact_answers(model, "train")
        return metrics

    def mean_loss(self, model: GPT, split: str, n: int | None) -> float:
        """The mean loss per scored token over n evenly spaced records of a split, or all (None)."""
        total, count = 0.0, 0
        for records in in_batches(evenly_spaced(self.splits[split], n), self.config.batch_size):
            x, y = (t.to(self.device) for t in self.batch(records))
            scored = int((y != -100).sum())
            total, count = total + model(x, y)[1].item() * scored, count + scored
        return total / count

    def exact_answers(self, model: GPT, split: str) -> float:
        """The fraction of answers that greedy generation gives word for word: those of which every
        token is the most likely one after the correct tokens before it."""
        found: list[bool] = []
        records = evenly_spaced(self.splits[split], self.config.eval_windows)
        for some in in_batches(records, self.config.batch_size):
            x, y = (t.to(self.device) for t in self.batch(some))
            correct = (model(x)[0].argmax(dim=-1) == y) | (y == -100)  # (B, T)
            found += correct.all(dim=1).tolist()
        return sum(found) / len(found)

    def sample(self, model: GPT) -> str:
        greedy = SampleConfig(temperature=0, max_new_tokens=self.config.sample_tokens)
        texts = []
        for ((ids, n_prompt),) in self.splits["val"][:2]:
            prompt = torch.from_numpy(ids[:n_prompt]).to(self.device)
            steps = stream_texts(model, self.tokenizer, greedy, prompt)
            answer = "".join(piece for (piece,) in steps)
            texts.append(self.tokenizer.decode(ids[1:n_prompt].tolist()) + answer)
        return "\n".join(texts)


# --- preferences


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected)), averaged over the pairs, from the `rewards` (B,) of
    both (DPO, Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(chosen - rejected).mean()


def rewards(model: nn.Module, reference: GPT, x: Tensor, y: Tensor, beta: float) -> Tensor:
    """beta log(pi(y|x) / pi_ref(y|x)), the implicit reward of a model (equation 5), for a batch of
    texts, (B,)."""
    with torch.no_grad():
        before = log_probability(reference(x)[0], y)
    return beta * (log_probability(model(x)[0], y) - before)


def log_probability(logits: Tensor, y: Tensor) -> Tensor:
    """The log-probability of the tokens y (B, T) that are not -100, summed over each text, (B,)."""
    log_p = logits.float().log_softmax(dim=-1)  # (B, T, V)
    return log_p.gather(2, y.clamp(min=0)[:, :, None]).squeeze(2).masked_fill(y == -100, 0).sum(1)


@dataclass
class DPOTask:
    """Preferring the chosen text of each pair to the rejected one, close to the reference model."""

    splits: Splits
    tokenizer: Tokenizer
    reference: GPT
    beta: float
    config: TrainConfig
    device: torch.device
    format: CheckpointFormat
    tokens_per_step: int | None = None

    def batch(self, pairs: Sequence[list[Example]]) -> Batch:
        """Pairs as a padded batch, x and y (2B, T), the chosen texts first."""
        texts = [text for side in zip(*pairs, strict=True) for text in side]
        return pad_batch(texts, self.tokenizer.specials.get("<PAD>", 0))

    def get_batch(self, step: int, micro_step: int) -> tuple[Batch, Tensor]:
        pairs = random_items(self.splits["train"], self.config, step, micro_step)
        return self.batch(pairs), torch.tensor(len(pairs))  # the loss is a mean over pairs

    def rewards(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The rewards of the chosen and of the rejected texts, (B,) each."""
        return rewards(model, self.reference, x, y, self.beta).chunk(2)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": dpo_loss(*self.rewards(model, x, y))}

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        n = None if full else self.config.eval_windows
        metrics = {} if full else {"train": self.mean_loss(model, "train", n)}
        metrics["val"] = self.mean_loss(model, "val", n)
        margins = torch.cat([self.margins(model, pairs) for pairs in self.batches("val", None)])
        metrics["margin"] = margins.mean().item()
        metrics["accuracy"] = (margins > 0).float().mean().item()  # of pairs in the right order
        return metrics

    def batches(self, split: str, n: int | None) -> Iterator[Sequence[list[Example]]]:
        return in_batches(evenly_spaced(self.splits[split], n), self.config.batch_size)

    def margins(self, model: GPT, pairs: Sequence[list[Example]]) -> Tensor:
        """r(chosen) - r(rejected) of each pair, (B,)."""
        x, y = (t.to(self.device) for t in self.batch(pairs))
        return torch.sub(*self.rewards(model, x, y))

    def mean_loss(self, model: GPT, split: str, n: int | None) -> float:
        """The mean loss per pair over n evenly spaced pairs of a split, or all (None)."""
        total, count = 0.0, 0
        for pairs in self.batches(split, n):
            x, y = (t.to(self.device) for t in self.batch(pairs))
            total += self.loss(model, x, y)["loss"].item() * len(pairs)
            count += len(pairs)
        return total / count

    def sample(self, model: GPT) -> str:
        return sample_from_newline(model, self.tokenizer, self.config.sample_tokens)


# --- records as batches


def encode_pair(tokenizer: Tokenizer, pair: dict[str, str]) -> list[Example]:
    """The chosen and the rejected text of a preference pair, each after the prompt, and with an end
    token if the tokenizer has one."""
    prompt = encode_prompt(tokenizer, pair["prompt"]).numpy()
    end = sorted(end_tokens(tokenizer))[:1]  # the end token of the lowest id
    texts = (np.concatenate([tokenizer.encode(pair[key]), end]) for key in ("chosen", "rejected"))
    return [(np.concatenate([prompt, text]).astype(np.int64), len(prompt)) for text in texts]


def encode_splits(
    objective: str,
    splits: Sequence[list[Any]],
    tokenizer: Tokenizer,
    block_size: int,
    skip_long: bool,
) -> Splits:
    """The records of both splits as examples that fit the window. Prints how many were too long.
    Raises UserError if a split is empty after that."""
    encoded: Splits = {}
    for name, records in zip(("train", "val"), splits, strict=True):
        if objective == "qa":
            examples = [[encode_record(tokenizer, record)] for record in records]
        else:
            examples = [encode_pair(tokenizer, record) for record in records]
        fitted = (fit_window(e, block_size, skip_long) for e in examples)
        encoded[name] = [e for e in fitted if e is not None]
        n_long = sum(max(len(ids) for ids, _ in e) > block_size + 1 for e in examples)
        n_out = len(examples) - len(encoded[name])
        if not encoded[name]:
            raise UserError(f"no {name} record fits the window of {block_size} tokens")
        if n_long:
            print(
                f"{n_long} of {len(examples)} {name} records are longer than the window of "
                f"{block_size} tokens: {n_out} left out, {n_long - n_out} cut at the start"
            )
    return encoded


def fit_window(
    examples: Sequence[Example], block_size: int, skip_long: bool
) -> list[Example] | None:
    """Examples with the same prompt, cut at its start so that the longest one fits the window. None
    if they are to be skipped, or if the text after the prompt alone is too long."""
    excess = max(len(ids) for ids, _ in examples) - block_size - 1
    if excess <= 0:
        return list(examples)
    if skip_long or excess >= min(n_prompt for _, n_prompt in examples):
        return None
    return [(ids[excess:], n_prompt - excess) for ids, n_prompt in examples]


def pad_batch(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Examples as a batch, x and y (B, T), padded on the right to the longest.

    y[b, t] is the token after x[b, t], or -100, which the loss ignores, in the prompt and the
    padding. Causal attention never attends to later tokens, so the padding needs no mask.
    """
    T = max(len(ids) for ids, _ in examples) - 1
    x = torch.full((len(examples), T), pad)
    y = torch.full((len(examples), T), -100)
    for b, (ids, n_prompt) in enumerate(examples):
        tokens = torch.from_numpy(ids.astype(np.int64))
        x[b, : len(ids) - 1] = tokens[:-1]
        y[b, n_prompt - 1 : len(ids) - 1] = tokens[n_prompt:]
    return x, y


def random_items(
    items: Sequence[Any], config: TrainConfig, step: int, micro_step: int
) -> list[Any]:
    """The items of a micro-batch, without repetition: a function of (seed, step, micro_step)."""
    rng = np.random.default_rng((config.seed, step, micro_step))
    chosen = rng.choice(len(items), min(config.batch_size, len(items)), replace=False)
    return [items[i] for i in chosen]


def evenly_spaced(items: Sequence[Any], n: int | None) -> Sequence[Any]:
    """At most n items, evenly spaced; all if n is None."""
    if n is None or n >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)]


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in batches of this size."""
    return (items[i : i + size] for i in range(0, len(items), size))
