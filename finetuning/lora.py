"""Low-rank adaptation (LoRA, Hu et al. 2021): train a low-rank update of a frozen matrix W,

    y = W x + (alpha / rank) B A x,    A (rank, n_in) random, B (n_out, rank) initially zero

Only A and B are trained and saved: an adapter is a small file that is used with its base model.

Weights are dicts of tensors by name. `plain` weights have the names of model.py. An adapted model
has the name `.linear.weight` instead of `.weight` for a frozen matrix, and its `.A` and `.B`.
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
# The contents of an adapter file: its LoRAConfig, the hash of the base's weights, the settings and
# tokenizer of the adapted model, which may have more tokens than the base, the trained tensors.
ADAPTER_KEYS = {"lora", "base_sha256", "gpt_config", "tokenizer", "tensors"}


@dataclass
class LoRAConfig:
    """Which matrices get an adapter, and of which size."""

    lora_rank: int = setting(
        0, "rank of the LoRA matrices; 0: train all weights", low=0, group="LoRA"
    )
    lora_alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0)
    lora_dropout: float = setting(0.05, "dropout probability of the LoRA input", low=0, below=1)
    lora_targets: str = setting("attn", "which matrices are adapted", choices=tuple(TARGETS))

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / rank."""
        return self.lora_alpha / self.lora_rank


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update. `add_lora` freezes the layer itself."""

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
    """Freeze the model and add low-rank matrices to its targets, in place. The parameters named in
    `also` stay trainable. Raises UserError if the rank is above a matrix's smaller dimension."""
    model.requires_grad_(False)
    for name in also:
        model.get_parameter(name).requires_grad_(True)
    for block in model.blocks:
        for target in TARGETS[config.lora_targets]:
            linear = block.get_submodule(target)
            assert isinstance(linear, nn.Linear)
            if config.lora_rank > (side := min(linear.in_features, linear.out_features)):
                raise UserError(
                    f"--lora_rank {config.lora_rank} is above the smaller side of {target}, {side}"
                )
            parent, _, name = target.rpartition(".")
            adapted = LoRALinear(linear, config).train(model.training)
            setattr(block.get_submodule(parent), name, adapted)


def trained_names(model: nn.Module) -> set[str]:
    """The names of the trainable parameters; tied ones have two names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.requires_grad}


# --- weights of adapted models


def split_adapter(
    weights: dict[str, Tensor], trained: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the weights of an adapted model into plain weights and the adapter's tensors, which
    are those named in `trained`."""
    plain = {
        name.replace(".linear.", "."): tensor
        for name, tensor in weights.items()
        if not name.endswith((".A", ".B"))
    }
    return plain, {name: tensor for name, tensor in weights.items() if name in trained}


def join_adapter(plain: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapted model: the inverse of `split_adapter`."""
    joined = {}
    for name, tensor in plain.items():
        layer, _, kind = name.rpartition(".")
        joined[f"{layer}.linear.{kind}" if f"{layer}.A" in tensors else name] = tensor
    return joined | tensors


def merge_adapter(
    plain: dict[str, Tensor], tensors: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The plain weights of an equal model without adapter: W + scale B A for each adapted W."""
    merged = {name: tensors.get(name, tensor) for name, tensor in plain.items()}
    for name, A in tensors.items():
        if name.endswith(".A"):
            layer = name.removesuffix(".A")
            update = scale * (tensors[f"{layer}.B"] @ A)  # (n_out, n_in)
            merged[f"{layer}.weight"] = plain[f"{layer}.weight"] + update
    return merged


# --- adapter files


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """The hash of the names, shapes, types and values of weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(path: Path, adapter: dict[str, Any]) -> None:
    """Write an adapter file atomically; `adapter` has the keys ADAPTER_KEYS."""
    with utils.atomic_write(path) as file:
        torch.save(adapter, file)


def is_adapter(path: Path) -> bool:
    """Whether a file is an adapter. Raises UserError if it is missing or damaged."""
    content = utils.read_data(path)
    return isinstance(content, dict) and content.keys() >= ADAPTER_KEYS


def read_adapter(path: Path) -> dict[str, Any]:
    """The contents of an adapter file, on the CPU. Raises UserError if it is not an adapter."""
    adapter = utils.read_data(path)
    if not isinstance(adapter, dict) or not adapter.keys() >= ADAPTER_KEYS:
        raise UserError(f"{path} is not an adapter of this program")
    return adapter


def check_adapter(adapter: dict[str, Any], plain: dict[str, Tensor], path: Path) -> None:
    """Raise UserError unless an adapter belongs to a base with these weights. Shapes are compared
    first, because they make a more precise message than the hash."""
    tensors, rank = adapter["tensors"], adapter["lora"]["lora_rank"]
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        weight = plain.get(f"{layer}.weight" if kind in "AB" else name)
        if weight is None:
            raise UserError(f"{path} is for another base: this one has no {layer}")
        n_out, n_in = weight.shape
        expected = {"A": (rank, n_in), "B": (n_out, rank)}.get(kind, (len(tensor), n_in))
        if tensor.shape != expected:
            raise UserError(
                f"{path} is for another base: {name} has shape {tuple(tensor.shape)}, and this "
                f"base needs {expected}"
            )
    if weights_sha256(plain) != adapter["base_sha256"]:
        raise UserError(
            f"{path} is for another base: the shapes are the same, but the weights are different"
        )


@dataclass
class AdapterFormat:
    """Checkpoints of an adapted model: all weights with the adapter merged in, and the adapter."""

    entries: dict[str, Any]
    header: dict[str, Any]  # of the adapter: ADAPTER_KEYS without its tensors
    plain: dict[str, Tensor]  # the weights of the base
    trained: set[str]  # the names of the tensors that are trained
    scale: float

    def pack(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        plain, tensors = split_adapter(weights, self.trained)
        merged = merge_adapter(plain, tensors, self.scale)
        return {"model": merged, "adapter": self.header | {"tensors": tensors}, **self.entries}

    def unpack(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return join_adapter(self.plain, state["adapter"]["tensors"])
