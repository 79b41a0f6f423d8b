"""Low-rank adaptation (LoRA, Hu et al. 2021): train a low-rank update of a frozen matrix W,

    y = W x + (alpha / rank) B A x,    A (rank, n_in) random, B (n_out, rank) initially zero

Only A and B are trained and saved, and the embeddings if there are new tokens: an adapter is a
small file that is used with its base model.

Weights are dicts of tensors by name. An adapted model has the `plain` weights of model.py and, for
each adapted matrix, `.A` and `.B`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenizer as tokenizers
import utils
from config import GPTConfig
from finetuning.new_tokens import EMBEDDINGS, is_extension
from model import GPT
from system.settings import UserError, all_problems, from_dict, raise_problems, setting
from tokenizer import Tokenizer

TARGETS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn.qkv",),
    "attn": ("attn.qkv", "attn.proj"),
    "mlp": ("mlp.fc", "mlp.proj"),
    "all": ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"),
}
# The contents of an adapter file: its LoRAConfig, the hash of the base's weights, the settings and
# tokenizer of the adapted model, which may have more tokens than the base, the trained tensors.
ADAPTER_TYPES: dict[str, type] = {
    **dict.fromkeys(("lora", "gpt_config", "tokenizer", "tensors"), dict),
    "base_sha256": str,
}


@dataclass
class LoRAConfig:
    lora_rank: int = setting(0, "rank of A and B; 0: train all weights", low=0, group="LoRA")
    lora_alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0, high=1e6)
    lora_dropout: float = setting(0.05, "dropout probability of the LoRA input", low=0, below=1)
    lora_targets: str = setting("attn", "which matrices are adapted", choices=tuple(TARGETS))

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.lora_rank


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update. `add_lora` freezes the layer itself."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.A = nn.Parameter(torch.empty(config.lora_rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, config.lora_rank))
        nn.init.normal_(self.A, std=1 / math.sqrt(linear.in_features))
        self.scale = config.scale
        self.drop = nn.Dropout(config.lora_dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = self.drop(x) @ self.A.T  # (B, T, rank)
        return F.linear(x, self.weight, self.bias) + low @ self.B.T * self.scale  # (B, T, n_out)


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


def merge_adapter(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The plain weights of an equal model without adapter: W + scale B A for each adapted W."""
    merged = {name: t for name, t in weights.items() if not name.endswith((".A", ".B"))}
    for name, A in weights.items():
        if name.endswith(".A"):
            layer = name.removesuffix(".A")
            update = scale * (weights[f"{layer}.B"] @ A)  # (n_out, n_in)
            merged[f"{layer}.weight"] = weights[f"{layer}.weight"] + update
    return merged


# --- adapter files


def is_adapter(path: Path) -> bool:
    """Whether a file is an adapter. Raises UserError if it is missing or damaged."""
    content = utils.read_data(path)
    return isinstance(content, dict) and "base_sha256" in content


def read_adapter(path: Path) -> dict[str, Any]:
    """The contents of an adapter file, on the CPU. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"there is no adapter {path}: name the adapter.pt of a --lora_rank run")
    adapter = utils.read_data(path)
    if not isinstance(adapter, dict) or not ADAPTER_TYPES.keys() <= adapter.keys():
        raise UserError(f"{path} is not the adapter.pt of a --lora_rank run")
    check_contents(adapter, path)
    return adapter


def check_contents(adapter: dict[str, Any], path: Path) -> None:
    """Raise UserError unless an adapter's settings are valid and its tensors fit the model."""
    with utils.matching_contents(path):
        utils.check_types(adapter, ADAPTER_TYPES)
        lora, tensors = adapter["lora"], adapter["tensors"]
        if missing := {f.name for f in fields(LoRAConfig)} - lora.keys():
            raise KeyError(min(missing))
        config, gpt_config = LoRAConfig(**lora), from_dict(GPTConfig, adapter["gpt_config"])
        raise_problems(all_problems(config) + all_problems(gpt_config))
        if not config.lora_rank or gpt_config.n_layer > len(tensors):
            raise ValueError("fewer tensors than its settings say")
        tokenizer = tokenizers.from_dict(adapter["tokenizer"])
        if tokenizer.vocab_size > gpt_config.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens, {gpt_config.vocab_size} embeddings")
    with torch.device("meta"):  # not within matching_contents: see utils.load_checkpoint
        model = GPT(gpt_config)
        add_lora(model, config, also=EMBEDDINGS if EMBEDDINGS[0] in tensors else ())
    with utils.matching_contents(path):
        weights = model.state_dict()
        expected = {name: (weights[name].shape, torch.float32) for name in trained_names(model)}
        for name in expected.keys() | tensors.keys():
            if expected.get(name) != (tensors[name].shape, tensors[name].dtype):
                raise ValueError(f"{name} is of another shape or type, or not adapted")
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} is not finite")
        tables = [tensors[name] for name in EMBEDDINGS if name in tensors]
        if gpt_config.tie_weights and tables and not torch.equal(*tables):
            raise ValueError(f"{' and '.join(EMBEDDINGS)} are tied, but different")


def check_adapter(
    adapter: dict[str, Any], config: GPTConfig, tokenizer: Tokenizer, weights_hash: str, path: Path
) -> None:
    """Raise UserError unless an adapter, which `check_contents` accepts, belongs to the base with
    these settings, this tokenizer and this hash of its weights."""
    problem = f"{path} is for another base"
    if weights_hash != adapter["base_sha256"]:
        raise UserError(f"{problem}: the weights are different")
    new, own = (
        tokenizers.from_dict(adapter["tokenizer"]),
        from_dict(GPTConfig, adapter["gpt_config"]),
    )
    vocab_size = max(config.vocab_size, new.vocab_size)
    if own != replace(config, dropout=own.dropout, vocab_size=vocab_size):
        raise UserError(f"{problem}: the weights are the same, but the settings are different")
    extended = EMBEDDINGS[0] in adapter["tensors"] and is_extension(new, tokenizer)
    if new.to_dict() != tokenizer.to_dict() and not extended:
        raise UserError(f"{problem}: the weights are the same, but the tokenizer is different")


@dataclass
class AdapterFormat:
    """Checkpoints of an adapted model: all weights with the adapter merged in, and the adapter."""

    entries: dict[str, Any]
    header: dict[str, Any]  # of the adapter: ADAPTER_TYPES without its tensors
    plain: dict[str, Tensor]  # the weights of the base
    trained: set[str]  # the names of the tensors that are trained
    scale: float

    def pack(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        tensors = {name: weight for name, weight in weights.items() if name in self.trained}
        adapter = self.header | {"tensors": tensors}
        return {"model": merge_adapter(weights, self.scale), "adapter": adapter, **self.entries}

    def unpack(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return self.plain | state["adapter"]["tensors"]
