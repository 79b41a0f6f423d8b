"""Convert low-rank adapters to the format of the `peft` library: a folder with adapter_config.json
and adapter_model.safetensors."""

from pathlib import Path
from typing import Any

from torch import Tensor

from config import GPTConfig, UserError, from_dict
from exporting.folders import new_folder, write_json
from exporting.hf_model import matching_arch, split_sizes, tensor_names
from exporting.huggingface import save_tensors
from finetuning import lora


def export_adapter(path: Path, folder: Path, overwrite: bool = False) -> None:
    """Write an adapter as a folder that `peft` loads onto the exported base. Raises UserError if it
    cannot be converted, or if the folder exists, unless it is an export and `overwrite` is set."""
    with new_folder(folder, overwrite) as tmp_path:
        settings, weights = adapter_to_peft(lora.read_adapter(path))
        write_json(tmp_path / "adapter_config.json", settings)
        save_tensors(weights, tmp_path / "adapter_model.safetensors")


def adapter_to_peft(adapter: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of adapter_config.json and the weights by peft's names. Raises UserError if the
    adapter contains embeddings of new tokens."""
    tensors = adapter["tensors"]
    if any(not name.endswith((".A", ".B")) for name in tensors):
        raise UserError("the adapter contains new tokens: --merge it into its base and export that")
    config = from_dict(GPTConfig, adapter["gpt_config"])
    arch = matching_arch(config)
    weights: dict[str, Tensor] = {}
    targets = set()
    for ours, theirs in tensor_names(config, arch):
        layer = ours.removesuffix(".weight")
        if f"{layer}.A" not in tensors:
            continue
        # If our matrix concatenates several of theirs, each has its rows of B, and all the same A.
        A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]  # (rank, n_in), (n_out, rank)
        chunks = B.split(split_sizes(config, ours)) if len(theirs) > 1 else (B,)
        for name, chunk in zip(theirs, chunks, strict=True):
            module = name.removesuffix(".weight")
            weights[f"base_model.model.{module}.lora_A.weight"] = A.clone()  # safetensors: no views
            weights[f"base_model.model.{module}.lora_B.weight"] = chunk.contiguous()
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
