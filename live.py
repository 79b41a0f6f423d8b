"""The numbers of log.jsonl as they come, for tools that draw them live, where they are installed:
train.py's --tensorboard and --wandb."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import TrainConfig


def open_live(
    config: TrainConfig, run_dir: Path, settings: dict[str, Any]
) -> list[Callable[[dict[str, Any]], None]]:
    """For each of the tools that are asked for a function that takes the record of an evaluation.

    TensorBoard's files are begun anew in run_dir/tensorboard; Weights & Biases gets a new run,
    which stays in run_dir/wandb where WANDB_MODE is offline.
    """
    writers = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        board = SummaryWriter(folder)
        board.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

        def write_board(record: dict[str, Any]) -> None:
            for name, number in numbers(record).items():
                board.add_scalar(name, number, record["step"])
            board.flush()

        writers.append(write_board)
    if config.wandb:
        import wandb

        name = config.tag or None
        online = wandb.init(project="tinyllm", name=name, dir=run_dir, config=settings)
        writers.append(lambda record: online.log(numbers(record), step=record["step"]))
    return writers


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What of a record is a number yet: at step 0 there is no gradient, say."""
    return {name: value for name, value in record.items() if value is not None}
