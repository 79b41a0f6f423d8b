"""Records as batches: how they are read, encoded, padded and evaluated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from corpus.records import encode_record, read_pairs, read_records, record_text
from corpus.text import note
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer
from training.distributed import all_reduce, rank, world_size
from training.task import CheckpointFormat

Example = tuple[np.ndarray, int]  # the ids of a text (T,), and how many of them are its prompt


class Split(NamedTuple):
    """The records of a split that fit the window."""

    records: list[list[Example]]  # a question has one example, a pair two
    n_long: int = 0  # how many do not fit


Splits = dict[str, Split]  # train and val


class RecordKind(NamedTuple):
    """A kind of records, from the file to examples."""

    read: Callable[[Path], list[Any]]
    text: Callable[[Any], str]  # of a record, with the characters that the tokenizer must have
    encode: Callable[[Tokenizer, Any, bool], list[Example]]  # see `encode_pair`


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


ANSWERS = RecordKind(
    read_records, record_text, lambda tokenizer, record, ask: [encode_record(tokenizer, record)]
)
PAIRS = RecordKind(read_pairs, lambda pair: "".join(pair.values()), encode_pair)


def encode_splits(
    kind: RecordKind,
    splits: Sequence[list[Any]],
    tokenizer: Tokenizer,
    block_size: int,
    ask: bool,
) -> Splits:
    """The records of both splits as examples; ask: see `encode_pair`. Those longer than the window,
    whose prompts generate.py would cut, are left out. Raises UserError if a split is empty then."""
    encoded: Splits = {}
    for name, records in zip(("train", "val"), splits, strict=True):
        examples = [kind.encode(tokenizer, record, ask) for record in records]
        sizes = [max(len(ids) for ids, _ in e) - 1 for e in examples]  # windows that fit them
        fitted = [e for e, size in zip(examples, sizes, strict=True) if size <= block_size]
        n_long = len(examples) - len(fitted)
        advice = f"use a model trained with --block_size {max(sizes)} or more, or shorten them"
        if not fitted:
            raise UserError(f"no {name} record fits the window of {block_size} tokens: {advice}")
        if n_long:
            note(
                f"{n_long} of {len(examples)} {name} records are longer than the window of "
                f"{block_size} tokens: they are left out (questions: not answered); {advice}"
            )
        encoded[name] = Split(fitted, n_long)
    return encoded


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


@dataclass
class Records:
    """The records of both splits, in batches of x and y (B, T). Those of pairs have the chosen
    texts first, (2B, T)."""

    splits: Splits
    tokenizer: Tokenizer
    config: TrainConfig
    device: torch.device
    format: CheckpointFormat

    def batch(self, records: Sequence[list[Example]]) -> tuple[Tensor, Tensor]:
        examples = [example for side in zip(*records, strict=True) for example in side]
        return pad_batch(examples, self.tokenizer.specials.get("<PAD>", 0))

    def random_batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """The records of a micro-batch, without repetition: a function of (seed, step, micro_step).
        The micro-batches of a step together are the batch that a larger batch_size would give,
        unless there are fewer records: then some are repeated."""
        items, n_micro_steps = self.splits["train"].records, self.config.grad_accum
        size = min(self.config.batch_size, len(items))
        rng = np.random.default_rng((self.config.seed, step, 0))
        chosen = rng.choice(len(items), min(size * n_micro_steps, len(items)), replace=False)
        chosen = np.resize(chosen, size * n_micro_steps)  # repeats them if there are too few
        return self.batch([items[i] for i in chosen[size * micro_step :][:size]])

    def totals(
        self, measure: Callable[[Tensor, Tensor], list[Tensor]], split: str, n: int | None
    ) -> list[float]:
        """The sums of the columns that measure(x, y) returns, (B,) each, over n evenly spaced
        records of a split, or all (None); and how many these are. The processes share the records;
        each computes equally many batches, as FSDP requires, so its last one may include a record
        that another process counts."""
        items = self.splits[split].records
        n = min(n or len(items), len(items))
        chosen = [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)]
        own = chosen[rank() :: world_size()]
        padded = [*own, *chosen[: math.ceil(n / world_size()) - len(own)]]
        rows = []
        for i in range(0, len(padded), self.config.batch_size):
            batch = self.batch(padded[i : i + self.config.batch_size])
            x, y = (t.to(self.device) for t in batch)
            rows.append(torch.stack(measure(x, y), dim=1).cpu())
        sums = torch.cat(rows)[: len(own)].double().sum(dim=0)
        return [*all_reduce(sums).tolist(), n]
