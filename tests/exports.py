"""What the tests of exports share: checkpoints and adapters of small models."""

from pathlib import Path
from typing import Any

import torch

from config import TrainConfig
from finetuning.lora import LoRAConfig, add_lora, trained_names
from model import GPT
from system.files import save_checkpoint
from tokenizer import Tokenizer
from training.resume import weights_sha256


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


def make_adapter(
    model: GPT,
    tokenizer: Tokenizer,
    settings: LoRAConfig = LoRAConfig(lora_rank=2),  # noqa: B008 (nothing changes it)
    also: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The contents of an adapter file with random weights, which the model has afterwards. `also`:
    the weights that are trained besides."""
    base_sha256 = weights_sha256(model.state_dict())
    add_lora(model, settings, also)
    for name, weight in model.named_parameters():
        if name.endswith(".B"):
            weight.data = 0.3 * torch.randn_like(weight)
    weights = model.state_dict()
    return {
        "lora": vars(settings).copy(),
        "base_sha256": base_sha256,
        "gpt_config": vars(model.config).copy(),
        "tokenizer": tokenizer.to_dict(),
        "tensors": {name: weights[name] for name in trained_names(model)},
    }
