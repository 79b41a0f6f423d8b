"""Low-rank adaptation (LoRA, Hu et al. 2021): a frozen matrix W learns a difference of low rank,

    y = W x + (alpha / rank) B A x,    A (rank, n_in) random, B (n_out, rank) zero at the start

so that little has to be trained, and kept: an adapter is a small file that goes with its base.

Weights are dicts of tensors by name here: `plain` ones have the names of model.py, those of an
adapted model have `.linear.weight` for a frozen matrix's `.weight`, and `.A` and `.B` beside it.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import utils
from config import UserError, setting
from model import GPT

TARGETS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn.qkv",),
    "attn": ("attn.qkv", "attn.proj"),
    "mlp": ("mlp.fc", "mlp.proj"),
    "all": ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"),
}
# In an adapter's file: a LoRAConfig, the hash of its base's weights, the adapted model's settings
# and tokenizer, which may have more tokens than the base's, and what was trained, by name.
ADAPTER_KEYS = {"lora", "base_sha256", "gpt_config", "tokenizer", "tensors"}


@dataclass
class LoRAConfig:
    """Which matrices are adapted, and how."""

    lora_rank: int = setting(
        0, "train matrices of this rank beside frozen weights; 0: all weights", low=0, group="LoRA"
    )
    lora_alpha: float = setting(32.0, "their product counts alpha / rank", above=0)
    lora_dropout: float = setting(0.05, "share of their inputs dropped in training", low=0, below=1)
    lora_targets: str = setting("attn", "the matrices adapted", choices=tuple(TARGETS))

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.lora_alpha / self.lora_rank


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank difference."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.empty(config.lora_rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, config.lora_rank))
        nn.init.normal_(self.A, std=1 / math.sqrt(linear.in_features))
        self.scale = config.scale
        self.drop = nn.Dropout(config.lora_dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = self.drop(x) @ self.A.T  # (B, T, rank)
        return self.linear(x) + low @ self.B.T * self.scale  # (B, T, n_out)


def add_lora(model: GPT, config: LoRAConfig, also: Iterable[str] = ()) -> None:
    """Freeze the model and put low-rank matrices beside its targets, in place; the parameters named
    in `also` go on being trained. Raises UserError for a rank above a matrix's smaller side."""
    model.requires_grad_(False)
    for name in also:
        model.get_parameter(name).requires_grad_(True)
    for block in model.blocks:
        for target in TARGETS[config.lora_targets]:
            linear = block.get_submodule(target)
            if config.lora_rank > (side := min(linear.weight.shape)):
                raise UserError(
                    f"--lora_rank {config.lora_rank} is above the smaller side of {target}, {side}"
                )
            part, _, name = target.rpartition(".")
            adapted = LoRALinear(linear, config).train(model.training)
            setattr(block.get_submodule(part), name, adapted)


def trained_names(model: nn.Module) -> set[str]:
    """The names of the tensors that training changes; of tied ones, both."""
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


# --- weights: adapted, plain, merged


def split(weights: dict[str, Tensor], trained: set[str]) -> tuple[dict[str, Tensor], ...]:
    """The weights of an adapted model as plain ones and the adapter's tensors."""
    plain = {
        name.replace(".linear.", "."): tensor
        for name, tensor in weights.items()
        if not name.endswith((".A", ".B"))
    }
    return plain, {name: tensor for name, tensor in weights.items() if name in trained}


def join(plain: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapted model, which `split` took apart."""
    joined = {}
    for name, tensor in plain.items():
        layer, _, kind = name.rpartition(".")
        joined[f"{layer}.linear.{kind}" if f"{layer}.A" in tensors else name] = tensor
    return joined | tensors


def merge(plain: dict[str, Tensor], tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Plain weights with the adapter in them, W + scale B A: the same model without the adapter."""
    merged = {name: tensors.get(name, tensor) for name, tensor in plain.items()}
    for name in tensors:
        if name.endswith(".A"):
            layer = name.removesuffix(".A")
            merged[f"{layer}.weight"] = plain[f"{layer}.weight"] + scale * (
                tensors[f"{layer}.B"] @ tensors[name]
            )
    return merged


# --- the adapter's file


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """The hash of weights: names, shapes, numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(path: Path, adapter: dict[str, Any]) -> None:
    """Write an adapter alone."""
    with utils.atomic_write(path) as file:
        torch.save(adapter, file)


def is_adapter(path: Path) -> bool:
    """Whether a file is an adapter. Raises UserError for one that is missing or damaged."""
    content = utils.read_data(path)
    return isinstance(content, dict) and content.keys() >= ADAPTER_KEYS


def read_adapter(path: Path) -> dict[str, Any]:
    """An adapter's content, on the CPU, read as data only. Raises UserError for another file."""
    if not is_adapter(path):
        raise UserError(f"{path} was refused: it is not an adapter of this program")
    return utils.read_data(path)


def check_adapter(adapter: dict[str, Any], plain: dict[str, Tensor], path: Path) -> None:
    """Raise UserError where an adapter does not belong to the weights of this base: shapes first,
    which tell more, then the hash."""
    tensors, rank = adapter["tensors"], adapter["lora"]["lora_rank"]
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        weight = plain.get(f"{layer}.weight" if kind in "AB" else name)
        if weight is None:
            raise UserError(f"{path} is for another base: this one has no {layer}")
        n_out, n_in = weight.shape
        wanted = {"A": (rank, n_in), "B": (n_out, rank)}.get(kind, (len(tensor), n_in))
        if tensor.shape != wanted:
            raise UserError(
                f"{path} is for another base: {name} is {tuple(tensor.shape)}, and here it would "
                f"be {wanted}"
            )
    if weights_sha256(plain) != adapter["base_sha256"]:
        raise UserError(f"{path} is for another base: of the same shape, but with other weights")
