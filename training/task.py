"""What a Trainer trains: the Task protocol, and pretraining on a corpus."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from config import SampleConfig, TrainConfig
from corpus.corpus import Corpus
from generate import sample_text
from model import GPT
from tokenizer import Tokenizer
from training.distributed import all_reduce, rank, world_size
from utils import bits_per_byte, even_starts, get_batch, windows

Batch = tuple[Tensor, ...]
Metrics = dict[str, float]
MAX_GPU_TOKENS = 1 << 28  # as int32, a gigabyte of GPU memory
MAX_EXP = 700.0  # exp overflows above 709; a diverged loss can be larger


class CheckpointFormat(Protocol):
    """Translates between the weights of a model and the contents of its checkpoints."""

    entries: dict[str, Any]  # the same in all checkpoints of a run: "tokenizer", "corpus", ...

    def pack(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """The contents for these weights: "model", and the entries."""

    def unpack(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The weights in a checkpoint that `pack` wrote."""


@dataclass
class PlainFormat:
    """Checkpoints that contain the weights unchanged."""

    entries: dict[str, Any]

    def pack(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        return {"model": weights, **self.entries}

    def unpack(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return state["model"]


class Task(Protocol):
    """What is trained: data, loss, evaluation. More tasks are in finetuning/tasks.py."""

    format: CheckpointFormat
    tokens_per_step: int | None  # for tokens per second; None if it varies

    def get_batch(self, step: int, micro_step: int) -> tuple[Batch, Tensor]:
        """A micro-batch, and the number of tokens (or pairs) that its loss averages. A pure
        function of the arguments and the seed, so that resumed runs see the same data."""

    def loss(self, model: nn.Module, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Scalars by name: "loss" is minimized, the others are only logged."""

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        """The metrics of the model: "val", which decides which step is best, and others. `full`:
        over the whole validation split, at the end of a run."""

    def sample(self, model: GPT) -> str:
        """Sample text for the log."""


class Pretraining:
    """Next-token prediction on a corpus."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        block_size: int,
        config: TrainConfig,
        device: torch.device,
        format: CheckpointFormat | None = None,
    ):
        self.corpus, self.tokenizer, self.block_size = corpus, tokenizer, block_size
        self.config, self.device = config, device
        self.train_ids = to_gpu_if_small(corpus.train_ids, device)
        self.tokens_per_step: int | None = config.batch_size * config.grad_accum * block_size
        entries = {"tokenizer": tokenizer.to_dict(), "corpus": corpus.info}
        self.format = format or PlainFormat(entries)

    def get_batch(self, step: int, micro_step: int) -> tuple[Batch, Tensor]:
        config = self.config
        number = step * config.grad_accum + micro_step  # of all the batches of the run
        parts = self.parts_of_window(step)
        seed = config.seed + parts - 1  # other positions than in the batches of other windows
        T, B, docs = self.block_size // parts, config.batch_size * parts, self.corpus.train_docs
        x, y = get_batch(self.train_ids, T, B, seed, number, docs)
        return (x, y), (y != -100).sum()

    def parts_of_window(self, step: int) -> int:
        """How many parts windows are divided into at a step. With grow_windows, 4 in the first half
        of the run, then 2 until 80%: a small model first learns from the last few tokens, and short
        windows are faster."""
        if not self.config.grow_windows:
            return 1
        progress = step / self.config.max_steps
        parts = 4 if progress < 0.5 else 2 if progress < 0.8 else 1
        return min(parts, self.block_size)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": model(x, y, self.document_numbers(x), loss_only=True)[1]}

    def document_numbers(self, x: Tensor) -> Tensor | None:
        """With doc_mask, the number of each token's document within its window, (B, T)."""
        return self.corpus.document_numbers(x) if self.config.doc_mask else None

    def evaluate(self, model: GPT, full: bool = False) -> Metrics:
        n_windows = None if full else self.config.eval_windows
        metrics = {}
        if not full:
            metrics["train"] = self.mean_loss(model, self.corpus.train_ids, n_windows)
        val = self.mean_loss(model, self.corpus.val_ids, n_windows)
        bpb = bits_per_byte(val, self.corpus.bytes_per_token)
        return metrics | {"val": val, "ppl": math.exp(min(val, MAX_EXP)), "bpb": bpb}

    def mean_loss(self, model: GPT, ids: np.ndarray, n_windows: int | None) -> float:
        """The mean loss in nats per token over evenly spaced windows of a stream, or over all of it
        (None). The processes share the windows."""
        starts = even_starts(len(ids), self.block_size, n_windows)
        # FSDP needs equally many forward passes in all processes: pad with windows past the end
        starts = np.pad(starts, (0, -len(starts) % world_size()), constant_values=len(ids))
        starts = starts[rank() :: world_size()]
        total, count = 0.0, 0
        doc_mask, batch_size = self.config.doc_mask, self.config.batch_size
        for loss, n, _, _ in losses(model, self.corpus, ids, starts, batch_size, doc_mask):
            total, count = total + loss * n, count + n
        sums = all_reduce(torch.tensor([total, count], dtype=torch.float64)).tolist()
        return sums[0] / sums[1]

    def sample(self, model: GPT) -> str:
        return sample_from_newline(model, self.tokenizer, self.config.sample_tokens)


def losses(
    model: GPT,
    corpus: Corpus,
    ids: np.ndarray,
    starts: np.ndarray,
    batch_size: int,
    doc_mask: bool,
    overlap: int = 0,
) -> Iterator[tuple[float, int, Tensor, Tensor]]:
    """Yields per batch of the windows at `starts`: the mean loss in nats per token, the number of
    scored tokens, the logits (B, T, V) and the targets (B, T). Not scored, -100: positions past the
    end of the stream, and the first `overlap` of each window but the stream's first."""
    device = next(model.parameters()).device
    for i in range(0, len(starts), batch_size):
        batch = starts[i : i + batch_size]
        x, y = windows(ids, batch, model.config.block_size)  # (B, T) both
        y[torch.from_numpy(batch > 0), :overlap] = -100
        x, y = x.to(device), y.to(device)
        logits, loss = model(x, y, corpus.document_numbers(x) if doc_mask else None)
        if n_scored := int((y != -100).sum()):  # FSDP's padding has none
            yield loss.item(), n_scored, logits, y


def sample_from_newline(model: GPT, tokenizer: Tokenizer, n_tokens: int, qa: bool = True) -> str:
    config = SampleConfig(prompt="\n", max_new_tokens=n_tokens, seed=1337, qa=qa)
    return sample_text(model, tokenizer, config)[0]


def to_gpu_if_small(ids: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """Token ids in GPU memory if they take at most a gigabyte: then no step waits for the host.
    Others stay where they are, which may be a file larger than memory."""
    if device.type == "cpu" or len(ids) > MAX_GPU_TOKENS:
        return ids
    return torch.from_numpy(ids.astype(np.int32)).to(device)
