"""What each part of the fast preset contributes: it is trained without one part at a time.

python -m experiments.ablation --quick

AdamW has the learning rate of the laptop preset, all other variants that of the fast preset. A rate
that is tuned for the variant could make a difference smaller.
"""

from system.start import run

from experiments.comparison import plot_differences
from experiments.study import compare, parse_study, val_losses
from training.setup import Flags
from viz.curve import new_figure

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


def main(argv: list[str] | None = None) -> int:
    study = parse_study("ablation", argv, __doc__)
    study.n_runs = len(VARIANTS) * study.config.seeds
    base = {"preset": "fast"} | (QUICK if study.config.quick else {})
    runs = study.train_variants(base, VARIANTS)
    rows = compare(runs, lambda name: {"variant": name})
    losses = {name: val_losses(some) for name, some in runs.items()}
    figure = new_figure(8, 5)
    plot_differences(figure.subplots(), rows, losses, "Without one part of the fast preset")
    study.write_results({"One part at a time": rows}, figure)
    return 0


if __name__ == "__main__":
    run(main)
