"""Classic mistakes, one at a time: what they do to the losses, the samples and the verdict.

    python -m experiments.mistakes --quick

Each mistake is a few lines below: a subclass or a function that replaces one part of the correct
code while a run trains, or settings. Four numbers tell them apart. The training and the validation
loss are what the person who makes the mistake sees: some mistakes make them too good. The honest
loss is that of the last token of windows of text that no run reads, given only the tokens before
it, which is what a sampler needs.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as model_parts
import train
from corpus.load import Corpus
from experiments import study as studies
from experiments.comparison import Row, add_differences, margin, mean
from experiments.study import (
    Result,
    Study,
    make_run,
    parse_study,
    replaced,
    study_corpus,
    write_json,
    write_results,
)
from model import GPT, AttentionContext, Block, fused_attention, plain_attention
from system.errors import run
from training.setup import Flags
from training.task import Pretraining
from utils import even_starts, load_checkpoint, windows
from viz.runs import BLUE, ORANGE, new_figure
from viz.verdict import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# --- the mistakes


def attend_everywhere(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention without the causal mask: tokens attend to later ones, the answers."""
    everywhere = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device)  # (T, S)
    return plain_attention(q, k, v, everywhere, bias)[0]


def attend_unscaled(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention scores that are not divided by sqrt(D): the factor cancels the division."""
    return fused_attention(q * math.sqrt(q.size(-1)), k, v, visible, bias)


class UnshiftedGPT(GPT):
    """The target of each token is the token itself, not the next one."""

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(idx, None if targets is None else idx, *args, **kwargs)


class GPTWithoutZeroGrad(GPT):
    """The gradients of all earlier steps are added up."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class ResidualFreeBlock(Block):
    """Each sublayer replaces its input instead of adding to it."""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        x = self.drop(self.attn(self.sublayer_input(x, 0, context), context))
        return self.drop(self.mlp(self.sublayer_input(x, 1, context)))


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

    @contextlib.contextmanager
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
