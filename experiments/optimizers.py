"""SGD, SGD with momentum, AdamW and Muon, each at its tuned learning rate; gradient clipping.

    python -m experiments.optimizers --quick

The learning rate is tuned for each optimizer with a seed that is not used afterwards, on a grid
that is extended until the best rate is inside. All else is equal: warmup, a cosine schedule to 0,
gradients clipped to a norm of 1, no weight decay (SGD's depends on the learning rate). Thresholds
of clipping are compared at the rates that were tuned for a threshold of 1.
"""

import contextlib
import math
import statistics
from typing import TYPE_CHECKING, Any

import train
from experiments.comparison import Row, add_differences, mean
from experiments.study import (
    Result,
    Study,
    gradient_norms,
    loss_columns,
    make_run,
    mean_ms_per_step,
    parse_study,
    replaced,
    val_losses,
    with_seeds,
    write_results,
)
from system.errors import run
from training.setup import Flags
from viz.curve import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PlainSGD(train.Trainer):
    """--optimizer sgd, which has momentum, without it."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        for group in self.optimizers["sgd"].param_groups:
            group["momentum"] = 0.0


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

QUICK: Flags = {"preset": "laptop", "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 16}
QUICK |= {"max_steps": 300, "eval_every": 25, "eval_windows": 32}
FULL: Flags = {"preset": "medium", "max_steps": 1000, "eval_every": 50}
COMMON: Flags = {"weight_decay": 0.0, "log_every": 1}


# --- runs


def run_flags(study: Study, name: str, rate: float, clip: float = CLIP) -> Flags:
    """The flags of an optimizer with a learning rate and a clipping threshold."""
    size = QUICK if study.config.quick else FULL
    return COMMON | size | FLAGS[name] | {"lr_max": rate, "grad_clip": clip}


def run_name(name: str, rate: float, clip: float = CLIP) -> str:
    """The folder of these runs."""
    return f"{name.replace(' ', '-')}-rate{rate:g}-clip{clip:g}"


def trainer_of(name: str) -> contextlib.AbstractContextManager[None]:
    """The context in which an optimizer trains."""
    return replaced(train, "Trainer", PlainSGD) if name == "SGD" else contextlib.nullcontext()


def tune(study: Study, name: str) -> dict[float, float]:
    """The validation loss for each learning rate of the grid, which is extended as long as the best
    rate is at its end."""
    middle = EXPONENTS[name]
    todo = list(range(middle - GRID, middle + GRID + 1))
    limit = len(todo) + EXTENSIONS
    losses: dict[int, float] = {}
    while todo:
        for n in todo:
            rate = rate_of(n)
            flags = run_flags(study, name, rate) | {"seed": TUNING_SEED}
            result = make_run(study, f"{run_name(name, rate)}-{TUNING_SEED}", flags)
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


# --- tables


def optimizer_rows(best: dict[str, float], runs: dict[str, list[Result]]) -> list[Row]:
    """A row per optimizer at its best learning rate; differences are to AdamW."""
    rows: list[Row] = [
        {
            "optimizer": name,
            "learning rate": f"{best[name]:g}",
            **loss_columns(results),
            "ms per step": mean_ms_per_step(results),
        }
        for name, results in runs.items()
    ]
    add_differences(rows, [val_losses(results) for results in runs.values()])
    return rows


def tuning_rows(tuning: dict[str, dict[float, float]]) -> list[Row]:
    return [
        {"optimizer": name, "learning rate": f"{rate:g}", "validation loss": loss}
        for name, losses in tuning.items()
        for rate, loss in losses.items()
    ]


def clipping_rows(clipped: dict[tuple[str, float], list[Result]]) -> list[Row]:
    """A row per optimizer and threshold; differences are to no clipping."""
    rows: list[Row] = []
    for (name, clip), results in clipped.items():
        norms = [norm for result in results for norm in gradient_norms(result)]
        share = sum(norm > (clip or math.inf) for norm in norms) / len(norms)
        rows.append(
            {
                "optimizer": name,
                "threshold": f"{clip:g}" if clip else "none",
                "clipped steps": f"{share:.0%}",
                "median gradient norm": statistics.median(norms),
                "highest": max(norms),
                **loss_columns(results),
            }
        )
    names = [name for name, _ in clipped]
    values = [val_losses(results) for results in clipped.values()]
    add_differences(rows, values, bases=[names.index(name) for name in names])
    return rows


# --- the figure


def plot_curves(axes: "Axes", best: dict[str, float], runs: dict[str, list[Result]]) -> None:
    """The mean validation loss over the steps, in a band from the lowest to the highest seed."""
    for (name, results), color in zip(runs.items(), COLORS, strict=False):
        logs = [result["log"] for result in results]
        by_step = [[record["val"] for record in some] for some in zip(*logs, strict=False)]
        steps = [record["step"] for record in logs[0]][: len(by_step)]
        label = f"{name}, learning rate {best[name]:g}"
        axes.plot(steps, [mean(v) for v in by_step], color=color, label=label)
        low, high = [min(v) for v in by_step], [max(v) for v in by_step]
        axes.fill_between(steps, low, high, color=color, alpha=0.25)
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.set_title("At the best learning rates: mean, lowest and highest seed")
    axes.legend()


def plot_tuning(axes: "Axes", tuning: dict[str, dict[float, float]]) -> None:
    """The loss over the learning rate, without those that diverged; a star at the best one."""
    for losses, color in zip(tuning.values(), COLORS, strict=False):
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        axes.semilogx(list(finite), list(finite.values()), ".-", color=color)
        axes.plot(best_rate(losses), min(losses.values()), "*", color=color, markersize=14)
    axes.set(xlabel="peak learning rate", ylabel="validation loss (nats per token)")
    axes.set_title("Tuning: one seed, colors as on the left")


def plot_norms(axes: "Axes", name: str, clipped: dict[tuple[str, float], list[Result]]) -> None:
    """The gradient norms of the first seed for each threshold, which is a dotted line."""
    highest = 0.0
    for clip, color in zip(THRESHOLDS, COLORS, strict=False):
        norms = gradient_norms(clipped[name, clip][0])
        label = f"clipped to {clip:g}" if clip else "not clipped"
        axes.semilogy(norms, color=color, linewidth=0.8, label=label)
        if clip:
            axes.axhline(clip, color=color, linestyle=":")
        highest = max(highest, *norms)
    axes.set_ylim(top=6 * highest)  # room for the legend
    axes.set(xlabel="step", ylabel="gradient norm before clipping", title=f"{name}, one seed")
    axes.legend(loc="upper right", ncols=2)


def plot(
    tuning: dict[str, dict[float, float]],
    runs: dict[str, list[Result]],
    clipped: dict[tuple[str, float], list[Result]],
) -> "Figure":
    figure = new_figure(12, 8.5)
    panels = figure.subplots(2, 2)
    plot_curves(panels[0, 0], {name: best_rate(losses) for name, losses in tuning.items()}, runs)
    plot_tuning(panels[0, 1], tuning)
    for axes, name in zip(panels[1], CLIPPED, strict=True):
        plot_norms(axes, name, clipped)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    study = parse_study("optimizers", argv, __doc__)
    n_clipping = len(CLIPPED) * (len(THRESHOLDS) - 1)  # with CLIP, the runs are those of `runs`
    study.n_runs = len(FLAGS) * (2 * GRID + 1) + (len(FLAGS) + n_clipping) * study.config.seeds
    tuning: dict[str, dict[float, float]] = {}
    runs: dict[str, list[Result]] = {}
    for name in FLAGS:
        with trainer_of(name):
            tuning[name] = tune(study, name)
            rate = best_rate(tuning[name])
            runs[name] = with_seeds(study, run_name(name, rate), run_flags(study, name, rate))
    best = {name: best_rate(losses) for name, losses in tuning.items()}
    clipped: dict[tuple[str, float], list[Result]] = {}
    for name in CLIPPED:
        for clip in THRESHOLDS:
            flags = run_flags(study, name, best[name], clip)
            folder = run_name(name, best[name], clip)
            with trainer_of(name):
                again = [] if clip == CLIP else with_seeds(study, folder, flags)
            clipped[name, clip] = again or runs[name]
    tables = {
        "Optimizers at their best learning rates": optimizer_rows(best, runs),
        "Clipping": clipping_rows(clipped),
        "Tuning": tuning_rows(tuning),
    }
    write_results(study, tables, plot(tuning, runs, clipped))
    return 0


if __name__ == "__main__":
    run(main)
