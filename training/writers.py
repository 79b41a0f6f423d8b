"""TensorBoard and Weights & Biases."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import TrainConfig

Writer = Callable[[dict[str, Any]], None]  # forwards the metrics of a record to another tool


def open_writers(config: TrainConfig, run_dir: Path, settings: dict[str, Any]) -> list[Writer]:
    """A function per requested tool, TensorBoard and Weights & Biases, that takes a record.

    TensorBoard's files in run_dir/tensorboard are written again from step 0; Weights & Biases gets
    a new run, stored in run_dir/wandb if WANDB_MODE is offline.
    """
    writers: list[Writer] = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # optional package

        board = SummaryWriter(run_dir / "tensorboard")
        board.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

        def write_board(record: dict[str, Any]) -> None:
            for name, number in record.items():
                board.add_scalar(name, number, record["step"])
            board.flush()

        writers.append(write_board)
    if config.wandb:
        import wandb  # optional package

        own = {"name": config.tag or None, "dir": run_dir, "config": settings}
        run = wandb.init(project="tinyllm", reinit=True, **own)  # with --minutes, a second run
        writers.append(lambda record: run.log(record, step=record["step"]))
    return writers
