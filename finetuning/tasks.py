"""The tasks of fine-tuning, each next to the formula of its loss: another text, questions and
answers, distillation, preferences (DPO)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import SampleConfig, TrainConfig
from corpus.corpus import Corpus
from corpus.records import encode_record
from generate import stream_texts
from model import GPT
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer
from training.distributed import all_reduce, rank, world_size
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
        self.get_batch, self.loss = text.get_batch, text.loss

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        metrics = self.pretraining.evaluate(model, full)
        if self.old is None:
            return metrics
        n_windows = None if full else self.pretraining.config.eval_windows
        return metrics | {"old": self.pretraining.mean_loss(model, self.old.val_ids, n_windows)}

    def sample(self, model: GPT) -> str:
        text = self.pretraining  # of text, even if the base answers questions
        return sample_from_newline(model, text.tokenizer, text.config.sample_tokens, qa=False)


# --- distillation


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    y: Tensor,
    hard: Tensor,
    temperature: float,
    alpha: float,
) -> Tensor:
    """alpha T^2 KL(p || q) + (1 - alpha) hard, where p and q are softmax(logits / T) of teacher and
    student, logits (B, T, V) both, and hard is the usual loss (Hinton et al. 2015, section 2). T^2
    because the gradient of the soft loss shrinks with 1/T^2. Both losses are averaged over the
    tokens y (B, T) that are not -100."""
    log_p, log_q = (
        F.log_softmax(logits.float() / temperature, dim=-1)  # (B, T, V)
        for logits in (teacher, student)
    )
    soft = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)  # (B, T)
    return alpha * temperature**2 * soft[y != -100].mean() + (1 - alpha) * hard


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
        settings = (self.temperature, self.alpha)
        return {"loss": distillation_loss(logits, teacher_logits, y, hard, *settings)}


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
        n = self.config.eval_windows
        train, exact_train = self.score(model, "train", n)
        val, exact = self.score(model, "val", None if full else n)
        metrics = {} if full else {"train": train}
        return metrics | {"val": val, "exact": exact, "exact_train": exact_train}

    def score(self, model: GPT, split: str, n: int | None) -> tuple[float, float]:
        """The mean loss per scored token, and the fraction of exact answers, over n evenly spaced
        records of a split, or all (None). Greedy generation gives an answer exactly if each of its
        tokens is the most likely one after the correct tokens before it."""

        def measure(records: Sequence[list[Example]]) -> Tensor:
            x, y = (t.to(self.device) for t in self.batch(records))
            logits, scored = model(x)[0], y != -100
            exact = ((logits.argmax(dim=-1) == y) | ~scored).all(dim=1)
            return torch.stack([-log_probability(logits, y), scored.sum(dim=1), exact], dim=1)

        records = evenly_spaced(self.splits[split], n)
        loss, n_tokens, n_exact = sum_rows(measure, records, self.config.batch_size)
        return loss / n_tokens, n_exact / len(records)

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
    """-log sigmoid(r(chosen) - r(rejected)) of each pair, (B,), from the `rewards` (B,) of both
    (DPO, Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(chosen - rejected)


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
    """Preferring the chosen text of each pair to the rejected one, close to the reference model.

    Trained without dropout, as in Hugging Face's TRL: the model equals its reference at first, so
    that all rewards are 0, and later a reward is the effect of training, not of dropped channels.
    """

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
        return {"loss": dpo_loss(*self.rewards(model, x, y)).mean()}

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        n = None if full else self.config.eval_windows
        metrics = {} if full else {"train": self.score(model, "train", n)["loss"]}
        val = self.score(model, "val", n)
        return metrics | {"val": val.pop("loss")} | val

    def score(self, model: GPT, split: str, n: int | None) -> Metrics:
        """Over n evenly spaced pairs of a split, or all (None): the mean loss, the mean margin
        r(chosen) - r(rejected), and the accuracy, the fraction of pairs with a positive margin."""

        def measure(pairs: Sequence[list[Example]]) -> Tensor:
            x, y = (t.to(self.device) for t in self.batch(pairs))
            chosen, rejected = self.rewards(model, x, y)
            columns = [dpo_loss(chosen, rejected), chosen - rejected, chosen > rejected]
            return torch.stack(columns, dim=1)

        pairs = evenly_spaced(self.splits[split], n)
        sums = sum_rows(measure, pairs, self.config.batch_size)
        names = ("loss", "margin", "accuracy")
        return {name: total / len(pairs) for name, total in zip(names, sums, strict=True)}

    def sample(self, model: GPT) -> str:
        return sample_from_newline(model, self.tokenizer, self.config.sample_tokens)


# --- records as batches


def encode_pair(tokenizer: Tokenizer, pair: dict[str, str], ask: bool) -> list[Example]:
    """The chosen and the rejected text of a preference pair, each after the prompt, and with the
    token that ends a text of this model: <EOS> if it has answered questions, else <|endoftext|> if
    it knows it. ask: the prompt is a question and the texts are answers, as in `encode_record`."""
    if ask:
        answers = (pair["chosen"], pair["rejected"])
        records = [{"question": pair["prompt"], "answer": answer} for answer in answers]
        return [encode_record(tokenizer, record) for record in records]
    prompt = tokenizer.encode(pair["prompt"])
    ends = [tokenizer.specials[end] for end in ("<EOS>", END_OF_TEXT) if end in tokenizer.specials]
    texts = (
        np.concatenate([tokenizer.encode(pair[key]), ends[:1]]) for key in ("chosen", "rejected")
    )
    return [(np.concatenate([prompt, text]).astype(np.int64), len(prompt)) for text in texts]


def encode_splits(
    objective: str,
    splits: Sequence[list[Any]],
    tokenizer: Tokenizer,
    block_size: int,
    skip_long: bool,
    ask: bool,
) -> Splits:
    """The records of both splits as examples that fit the window; ask: see `encode_pair`. Prints
    how many were too long. Raises UserError if a split is empty after that."""
    encoded: Splits = {}
    for name, records in zip(("train", "val"), splits, strict=True):
        if objective == "qa":
            examples = [[encode_record(tokenizer, record)] for record in records]
        else:
            examples = [encode_pair(tokenizer, record, ask) for record in records]
        fitted = (fit_window(e, block_size, skip_long) for e in examples)
        encoded[name] = [e for e in fitted if e is not None]
        n_long = sum(max(len(ids) for ids, _ in e) > block_size + 1 for e in examples)
        n_out = len(examples) - len(encoded[name])
        if not encoded[name]:
            raise UserError(
                f"no {name} record fits the window of {block_size} tokens: shorten the answers, or "
                "use a model with a longer window" + ", or leave out --long skip" * skip_long
            )
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
    """The items of a micro-batch, without repetition: a function of (seed, step, micro_step). The
    micro-batches of a step together are the batch that a larger batch_size would give, unless there
    are fewer records: then some are repeated."""
    size, n_micro_steps = min(config.batch_size, len(items)), config.grad_accum
    rng = np.random.default_rng((config.seed, step, 0))
    chosen = rng.choice(len(items), min(size * n_micro_steps, len(items)), replace=False)
    chosen = np.resize(chosen, size * n_micro_steps)  # repeats them if there are too few
    return [items[i] for i in chosen[size * micro_step :][:size]]


def evenly_spaced(items: Sequence[Any], n: int | None) -> Sequence[Any]:
    """At most n items, evenly spaced; all if n is None."""
    if n is None or n >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)]


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in batches of this size."""
    return (items[i : i + size] for i in range(0, len(items), size))


def sum_rows(
    measure: Callable[[Sequence[Any]], Tensor], items: Sequence[Any], batch_size: int
) -> list[float]:
    """The sums of the columns that measure(batch) -> (B, n) returns, a row per item, over all
    items. The processes share the items; each computes equally many batches, as FSDP requires, so
    its last one may include an item that another process counts."""
    own = items[rank() :: world_size()]
    missing = math.ceil(len(items) / world_size()) - len(own)
    batches = in_batches([*own, *items[:missing]], batch_size)
    rows = torch.cat([measure(batch).cpu() for batch in batches])[: len(own)]
    return all_reduce(rows.double().sum(dim=0)).tolist()
