"""What each part of the fast preset contributes: it is trained without one part at a time.

python -m experiments.ablation --quick

AdamW has the learning rate of the laptop preset, all other variants that of the fast preset. A rate
that is tuned for the variant could make a difference smaller.
"""

import re
from typing import TYPE_CHECKING

from experiments.comparison import Row, add_differences, plot_differences
from experiments.study import loss_columns, parse_study, val_losses, with_seeds, write_results
from system.errors import run
from training.setup import Flags
from viz.curve import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = "fast"
VARIANTS: dict[str, Flags] = {
    BASE: {},
    "AdamW instead of Muon": {"optimizer": "adamw", "lr_max": 4e-3},
    "cosine instead of linear decay": {"schedule": "cosine"},
    "no token shift": {"token_shift": False},
    "windows do not grow": {"grow_windows": False},
    "windows of 192, batch size 12": {"block_size": 192, "batch_size": 12},
    "RMSNorm instead of LayerNorm": {"norm": "rmsnorm"},
    "SwiGLU instead of squared ReLU": {"mlp": "swiglu"},
    "four heads instead of two": {"n_head": 4},
    "no QK-norm": {"qk_norm": False},
    "learning rate 4e-3 instead of 6e-3": {"lr_max": 4e-3},
    "learning rate 9e-3": {"lr_max": 9e-3},
    "weight decay 0 instead of 0.1": {"weight_decay": 0.0},
    "weight decay 0.3": {"weight_decay": 0.3},
}
QUICK: Flags = {"max_steps": 500, "eval_every": 500}


def plot(rows: list[Row], losses: list[list[float]]) -> "Figure":
    figure = new_figure(8, 5)
    axes = figure.subplots()
    plot_differences(axes, list(VARIANTS), rows, losses, "Without one part of the fast preset")
    axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    study = parse_study("ablation", argv, __doc__)
    study.n_runs = len(VARIANTS) * study.config.seeds
    rows: list[Row] = []
    losses: list[list[float]] = []
    for name, change in VARIANTS.items():
        flags = {"preset": "fast"} | (QUICK if study.config.quick else {}) | change
        runs = with_seeds(study, re.sub(r"\W+", "-", name), flags)
        losses.append(val_losses(runs))
        rows.append({"variant": name, **loss_columns(runs)})
    add_differences(rows, losses)
    write_results(study, {"One part at a time": rows}, plot(rows, losses))
    return 0


if __name__ == "__main__":
    run(main)
