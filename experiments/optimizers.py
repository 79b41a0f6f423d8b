"""SGD, SGD with momentum, AdamW and Muon, each at its tuned learning rate; gradient clipping.

    python -m experiments.optimizers

The learning rate is tuned for each optimizer with a seed that is not used afterwards, on a grid
that is extended until the best rate is inside. All else is equal: warmup, a cosine schedule to 0,
gradients clipped to a norm of 1, no weight decay (SGD's depends on the learning rate). Thresholds
of clipping are compared at the rates that were tuned for a threshold of 1.
"""

import math
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch
from system.start import run

from matplotlib.figure import Figure

from config import OPTIMIZERS
from experiments.comparison import LOSS, Row, plot_curves
from experiments.study import Runs, Study, compare, gradient_norms, parse_study
from training.setup import Flags
from viz.curve import COLORS, new_figure

Tuning = dict[str, dict[float, float]]  # optimizer -> learning rate -> validation loss

BASE, MOMENTUM = "AdamW", "SGD with momentum"
FLAGS: dict[str, Flags] = {
    BASE: {"optimizer": "adamw"},
    "Muon": {"optimizer": "muon"},
    MOMENTUM: {"optimizer": "sgd"},
    "SGD": {"optimizer": "sgd"},
}
EXPONENTS = {BASE: -5, "Muon": -4, MOMENTUM: -1, "SGD": 1}  # the middle of the grid is 10^(n/2)
GRID = 2  # rates on both sides of the middle, at first
EXTENSIONS = 4  # of the grid, at most
TUNING_SEED = 0  # the others are 1, 2, ...
CLIP = 1.0
THRESHOLDS = (0.0, CLIP, 0.3, 0.1)  # 0: no clipping
CLIPPED = (BASE, MOMENTUM)  # optimizers with which thresholds are compared

# The preset for laptops, smaller.
SHARED: Flags = {"preset": "laptop", "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 16}
SHARED |= {"max_steps": 300, "eval_every": 25, "eval_windows": 32}
COMMON: Flags = {"weight_decay": 0.0, "log_every": 1}


def named_flags(study: Study, name: str, rate: float, clip: float) -> tuple[str, Flags]:
    """The folder and the flags of an optimizer's runs at a learning rate and a threshold."""
    flags = COMMON | SHARED | FLAGS[name] | {"lr_max": rate, "grad_clip": clip}
    return f"{name}-rate{rate:g}-clip{clip:g}", flags


def options_of(name: str) -> AbstractContextManager[Any]:
    """The context in which an optimizer trains: --optimizer sgd has momentum otherwise."""
    return patch.dict(OPTIMIZERS["sgd"].options, {"momentum": 0.0} if name == "SGD" else {})


def tune(study: Study, name: str) -> dict[float, float]:
    """The validation loss for each rate of the grid, extended until the best one is inside."""
    middle = EXPONENTS[name]
    todo = list(range(middle - GRID, middle + GRID + 1))
    limit = len(todo) + EXTENSIONS
    losses: dict[int, float] = {}
    while todo:
        for n in todo:
            rate = rate_of(n)
            folder, flags = named_flags(study, name, rate, CLIP)
            result = study.make_run(f"{folder}-{TUNING_SEED}", flags | {"seed": TUNING_SEED})
            losses[n] = result["val"]
        best = min(losses, key=losses.__getitem__)
        todo = [n for n in (best - 1, best + 1) if n not in losses and len(losses) < limit]
        study.n_runs += len(todo)
    return {rate_of(n): losses[n] for n in sorted(losses)}


def rate_of(n: int) -> float:
    """10^(n/2), with two digits.

    >>> rate_of(-5), rate_of(-4)
    (0.0032, 0.01)
    """
    return float(f"{10 ** (n / 2):.2g}")


def best_rate(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def clipping_rows(clipped: Runs) -> list[Row]:
    """A row per optimizer and threshold; differences are to no clipping."""

    def columns(variant: tuple[str, float]) -> Row:
        name, clip = variant
        norms = gradient_norms(clipped[variant])
        share = sum(norm > (clip or math.inf) for norm in norms) / len(norms)
        return {
            "optimizer": name,
            "threshold": f"{clip:g}" if clip else "none",
            "clipped steps": f"{share:.0%}",
        }

    names = [name for name, _ in clipped]
    return compare(clipped, columns, bases=[names.index(name) for name in names])


def plot(tuning: Tuning, runs: Runs, clipped: Runs) -> Figure:
    figure = new_figure(12, 8.5)
    (left, right), bottom = figure.subplots(2, 2)
    labels = (f"{name}, learning rate {best_rate(tuning[name]):g}" for name in runs)
    plot_curves(left, dict(zip(labels, runs.values(), strict=True)))
    left.set_title("At the best learning rates: mean, lowest and highest seed")

    for losses, color in zip(tuning.values(), COLORS, strict=False):
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        right.semilogx(list(finite), list(finite.values()), ".-", color=color)
        right.plot(best_rate(losses), min(losses.values()), "*", color=color, markersize=14)
    right.set(xlabel="peak learning rate", ylabel=LOSS)
    right.set_title("Tuning: one seed, colors as on the left")

    for axes, name in zip(bottom, CLIPPED, strict=True):
        for clip, color in zip(THRESHOLDS, COLORS, strict=False):
            norms = gradient_norms(clipped[name, clip][:1])
            label = f"clipped to {clip:g}" if clip else "not clipped"
            axes.semilogy(norms, color=color, linewidth=0.8, label=label)
            if clip:
                axes.axhline(clip, color=color, linestyle=":")
        axes.margins(y=0.3)  # room for the legend
        axes.set(xlabel="step", ylabel="gradient norm before clipping", title=f"{name}, one seed")
        axes.legend(loc="upper right", ncols=2)
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("optimizers", argv, __doc__)
    n_clipping = len(CLIPPED) * (len(THRESHOLDS) - 1)  # with CLIP, the runs are those of `runs`
    study.n_runs = len(FLAGS) * (2 * GRID + 1) + (len(FLAGS) + n_clipping) * study.config.seeds
    tuning: Tuning = {}
    best: dict[str, float] = {}
    runs: Runs = {}
    for name in FLAGS:
        with options_of(name):
            tuning[name] = tune(study, name)
            best[name] = best_rate(tuning[name])
            runs[name] = study.with_seeds(*named_flags(study, name, best[name], CLIP))
    clipped: Runs = {}
    for name in CLIPPED:
        for clip in THRESHOLDS:
            clipped[name, clip] = runs[name]
            if clip != CLIP:
                with options_of(name):
                    folder, flags = named_flags(study, name, best[name], clip)
                    clipped[name, clip] = study.with_seeds(folder, flags)
    rates = {name: {"optimizer": name, "learning rate": f"{best[name]:g}"} for name in FLAGS}
    tables = {
        "Optimizers at their best learning rates": compare(runs, rates.__getitem__, timed=True),
        "Clipping": clipping_rows(clipped),
        "Tuning": [
            {"optimizer": name, "learning rate": f"{rate:g}", "validation loss": loss}
            for name, losses in tuning.items()
            for rate, loss in losses.items()
        ],
    }
    study.write_results(tables, plot(tuning, runs, clipped))
    return 0


if __name__ == "__main__":
    run(main)
