"""What the tests of exports share: checkpoints of small models."""

from pathlib import Path
from typing import Any

from config import TrainConfig
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
