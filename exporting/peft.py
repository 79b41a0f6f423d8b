"""Convert low-rank adapters to folders for the `peft` library."""

from pathlib import Path
from typing import Any

from torch import Tensor

import utils
from config import GPTConfig
from exporting.folders import new_folder, write_json
from exporting.hf_model import arch_or_custom, split_rows, tensor_names
from exporting.huggingface import save_tensors
from finetuning import lora
from system.settings import UserError, quote_path


def export_adapter(path: Path, folder: Path, overwrite: bool = False) -> None:
    """Write an adapter as a folder that `peft` loads onto the exported base. Raises UserError if it
    cannot be converted, or if the folder exists, unless it is an export and `overwrite` is set."""
    with new_folder(folder, overwrite) as tmp_path:
        adapter = lora.read_adapter(path)
        with utils.matching_contents(path):  # read_adapter ignores unknown settings
            config = GPTConfig(**adapter["gpt_config"])
        if any(not name.endswith((".A", ".B")) for name in adapter["tensors"]):
            raise UserError(
                f"{path} contains new tokens, which peft cannot add: export the merged model, "
                f"python finetune.py BASE.pt --merge {quote_path(path)} --tag merged, then "
                f"python export.py checkpoints/merged/best.pt {quote_path(folder)}"
            )
        settings, weights = adapter_to_peft(adapter, config)
        write_json(tmp_path / "adapter_config.json", settings)
        save_tensors(weights, tmp_path / "adapter_model.safetensors")


def adapter_to_peft(
    adapter: dict[str, Any], config: GPTConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of adapter_config.json, and the weights by peft's names."""
    tensors = adapter["tensors"]
    arch = arch_or_custom(config)
    weights: dict[str, Tensor] = {}
    targets = set()
    for ours, theirs in tensor_names(config, arch):
        layer = ours.removesuffix(".weight")
        if f"{layer}.A" not in tensors:
            continue
        # If our matrix concatenates several of theirs, each has its rows of B, and all the same A.
        A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]  # (rank, n_in), (n_out, rank)
        for name, rows in split_rows(B, config, ours, theirs).items():
            module = name.removesuffix(".weight")
            weights[f"base_model.model.{module}.lora_A.weight"] = A.clone()  # safetensors: no views
            weights[f"base_model.model.{module}.lora_B.weight"] = rows.contiguous()
            targets.add(".".join(module.split(".")[-2:]))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": adapter["lora"]["lora_rank"],
        "lora_alpha": adapter["lora"]["lora_alpha"],
        "lora_dropout": adapter["lora"]["lora_dropout"],
        "target_modules": sorted(targets),
        "fan_in_fan_out": arch == "gpt2",  # its linear layers store (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    return settings, weights
