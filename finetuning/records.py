"""Records as batches: how they are read, encoded, padded and evaluated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from corpus.records import Example, Record, encode_turn, encode_turns, join_turns
from corpus.text import note
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer
from training.distributed import all_reduce, rank, world_size
from training.task import CheckpointFormat

Row = list[Example]  # of a batch: a conversation has one example, a pair two


class Split(NamedTuple):
    """The records of a split that fit the window."""

    records: list[Row]
    n_long: int = 0  # how many do not fit; of a conversation, how many turns


Splits = dict[str, Split]  # train and val
# The rows of a record: tokenizer, record, block_size, ask (see `encode_pair`)
Encode = Callable[[Tokenizer, Record, int, bool], list[Row]]


def pack_turns(tokenizer: Tokenizer, record: Record, block_size: int, ask: bool) -> list[Row]:
    """A conversation, in one row if it fits the window; otherwise as many whole turns as fit, the
    next ones in a second row, and so on, each with the system text. A longer turn is alone."""
    packed: list[Example] = []
    for question, answer in record.turns:
        turn = encode_turn(tokenizer, question, answer)
        if packed and len(packed[-1].ids) + len(turn.ids) - 1 <= block_size:
            packed[-1] = join_turns([packed[-1], turn])
        else:
            packed.append(encode_turn(tokenizer, question, answer, record.system))
    return [[example] for example in packed]


def encode_pair(tokenizer: Tokenizer, record: Record, block_size: int, ask: bool) -> list[Row]:
    """The chosen and the rejected text of a preference, each after the prompt.

    ask: the prompt is a question and the texts are answers. So it is with messages: only the last
    answer is scored, and the oldest turns are left out if all do not fit the window. Otherwise they
    are texts, with the token that ends a text of this model: <EOS> if it has answered questions,
    else <|endoftext|> if it knows it.
    """
    *history, (prompt, chosen) = record.turns
    pair: list[Example] = []
    if ask or not record.is_text:
        for first in range(len(record.turns)):
            pair = []
            for answer in (chosen, record.rejected):
                turns = [*history[first:], (prompt, answer)]
                *past, last = encode_turns(tokenizer, turns, record.system)
                past = [turn._replace(scored=np.zeros_like(turn.scored)) for turn in past]
                pair.append(join_turns([*past, last]))
            if max(len(example.ids) for example in pair) - 1 <= block_size:
                break
        return [pair]
    start = tokenizer.encode(prompt)
    ends = [tokenizer.specials[end] for end in ("<EOS>", END_OF_TEXT) if end in tokenizer.specials]
    for text in (chosen, record.rejected):
        ids = np.concatenate([start, tokenizer.encode(text), ends[:1]]).astype(np.int64)
        pair.append(Example(ids, np.arange(len(ids)) >= len(start)))
    return [pair]


def encode_splits(
    encode: Encode, splits: Sequence[list[Record]], tokenizer: Tokenizer, block_size: int, ask: bool
) -> Splits:
    """The records of both splits as examples; ask: see `encode_pair`. Those longer than the window,
    whose prompts generate.py would cut, are left out. Raises UserError if a split is empty then."""
    encoded: Splits = {}
    for name, records in zip(("train", "val"), splits, strict=True):
        examples = [e for r in records for e in encode(tokenizer, r, block_size, ask)]
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

    y[b, t] is the token after x[b, t], or -100, which the loss ignores, in the prompts and the
    padding. Causal attention never attends to later tokens, so the padding needs no mask.
    """
    T = max(len(ids) for ids, _ in examples) - 1
    x = torch.full((len(examples), T), pad)
    y = torch.full((len(examples), T), -100)
    for b, (ids, scored) in enumerate(examples):
        x[b, : len(ids) - 1] = torch.from_numpy(ids[:-1])
        y[b, : len(ids) - 1] = torch.from_numpy(np.where(scored, ids, -100)[1:])
    return x, y


@dataclass
class Records:
    """The records of both splits, in batches x, y (B, T); of pairs, chosen texts first (2B, T)."""

    splits: Splits
    tokenizer: Tokenizer
    config: TrainConfig
    device: torch.device
    format: CheckpointFormat

    def batch(self, records: Sequence[Row]) -> tuple[Tensor, Tensor]:
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
