"""Convert low-rank adapters to the format of the `peft` library: a folder with adapter_config.json
and adapter_model.safetensors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import GPTConfig
from exporting.folders import new_folder, write_json
from exporting.hf_model import arch_or_custom, split_sizes, tensor_names
from exporting.huggingface import save_tensors
from finetuning import lora
from model import GPT
from system.errors import first_line
from system.settings import UserError, all_problems, raise_problems


def export_adapter(path: Path, folder: Path, overwrite: bool = False) -> None:
    """Write an adapter as a folder that `peft` loads onto the exported base. Raises UserError if it
    cannot be converted, or if the folder exists, unless it is an export and `overwrite` is set."""
    with new_folder(folder, overwrite) as tmp_path:
        adapter = lora.read_adapter(path)
        try:
            settings, weights = adapter_to_peft(adapter)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"invalid adapter {path}: {first_line(error)}") from None
        write_json(tmp_path / "adapter_config.json", settings)
        save_tensors(weights, tmp_path / "adapter_model.safetensors")


def adapter_to_peft(adapter: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of adapter_config.json and the weights by peft's names. Raises UserError if the
    adapter contains embeddings of new tokens."""
    tensors = adapter["tensors"]
    if any(not name.endswith((".A", ".B")) for name in tensors):
        raise UserError("the adapter contains new tokens: --merge it into its base and export that")
    config = GPTConfig(**adapter["gpt_config"])  # raises TypeError for an unknown setting
    raise_problems(all_problems(config))
    arch, rank = arch_or_custom(config), adapter["lora"]["lora_rank"]
    weights: dict[str, Tensor] = {}
    targets, used = set(), set()
    if config.n_layer > len(tensors):
        raise ValueError(f"it has {len(tensors)} tensors for {config.n_layer} layers")
    with torch.device("meta"):  # for the shapes
        state = GPT(config).state_dict()
    for ours, theirs in tensor_names(config, arch):
        layer = ours.removesuffix(".weight")
        if f"{layer}.A" not in tensors:
            continue
        # If our matrix concatenates several of theirs, each has its rows of B, and all the same A.
        A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]  # (rank, n_in), (n_out, rank)
        n_out, n_in = state[ours].shape
        if A.shape != (rank, n_in) or B.shape != (n_out, rank):
            raise ValueError(f"{layer} does not have the shapes of the rank {rank}")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"{layer} contains values that are not finite numbers")
        chunks = B.split(split_sizes(config, ours)) if len(theirs) > 1 else (B,)
        for name, chunk in zip(theirs, chunks, strict=True):
            module = name.removesuffix(".weight")
            weights[f"base_model.model.{module}.lora_A.weight"] = A.clone()  # safetensors: no views
            weights[f"base_model.model.{module}.lora_B.weight"] = chunk.contiguous()
            targets.add(".".join(module.split(".")[-2:]))
        used.add(layer)
    if extra := [name for name in tensors if name[:-2] not in used]:
        raise ValueError(f"there is no layer for {extra[0]}")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": adapter["lora"]["lora_alpha"],
        "lora_dropout": adapter["lora"]["lora_dropout"],
        "target_modules": sorted(targets),
        "fan_in_fan_out": arch == "gpt2",  # its linear layers store (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    return settings, weights
