"""What the tests of exports share: checkpoints and adapters of small models."""

from pathlib import Path
from typing import Any

import torch

from config import TrainConfig
from finetuning.lora import LoRAConfig, add_lora, trained_names
from model import GPT
from system.files import save_checkpoint
from tokenizer import Tokenizer


def save_model(path: str | Path, model: GPT, tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """Write a checkpoint of an untrained model. Returns its contents."""
    state: dict[str, Any] = {
        "gpt_config": vars(model.config),
        "train_config": vars(TrainConfig()),
        "tokenizer": tokenizer.to_dict(),
        "corpus": {"name": "text", "bytes": 0, "sha256": ""},
        "model": model.state_dict(),
        "optimizers": [],
        "scaler": {},
        "step": 0,
        "log": [],
    }
    state |= more
    save_checkpoint(Path(path), state)
    return state


def make_adapter(model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    """An adapter with random weights, which the model has afterwards."""
    gpt_config, settings = vars(model.config).copy(), LoRAConfig(lora_rank=2)
    add_lora(model, settings)
    for name, weight in model.named_parameters():
        if name.endswith(".B"):
            weight.data = torch.randn_like(weight)
    weights = model.state_dict()
    return {
        "lora": vars(settings),
        "base_sha256": "",
        "gpt_config": gpt_config,
        "tokenizer": tokenizer.to_dict(),
        "tensors": {name: weights[name] for name in trained_names(model)},
    }
