"""The learning rate: its peak for each window length, its schedule, the highest rate before
divergence; and gradient accumulation compared with large batches.

    python -m experiments.lr_context --quick
"""

import math
from typing import TYPE_CHECKING, Any

from config import train_settings
from experiments.comparison import Row, add_differences, mean
from experiments.study import (
    Study,
    loss_columns,
    make_trainer,
    mean_ms_per_step,
    parse_study,
    val_losses,
    with_seeds,
    write_results,
)
from system.errors import run
from training.setup import Flags
from viz.curve import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUICK: Flags = {"preset": "tiny", "batch_size": 12, "max_steps": 300, "eval_every": 50}
QUICK |= {"compile": False}
FULL: Flags = {"preset": "medium"}
RATES = {True: (1e-3, 3e-3, 1e-2, 3e-2), False: (3e-4, 1e-3, 2e-3, 4e-3)}  # by --quick
WINDOWS = {True: (32, 128, 256), False: (64, 256, 1024)}
MICRO_BATCHES = (1, 2, 4)
SCHEDULES: dict[str, Flags] = {
    "cosine to 0": {"schedule": "cosine"},
    "cosine to a tenth": {"schedule": "cosine", "lr_min": 0.1},  # times the peak
    "linear to 0": {"schedule": "linear"},
    "cosine to 0, no warmup": {"schedule": "cosine", "warmup_steps": 0},
    "constant": {"schedule": "linear", "lr_min": 1.0},
}

# The range test: the learning rate grows by a constant factor per step, until the loss has risen.
FIRST_RATE, LAST_RATE = 1e-5, 1.0
RANGE_STEPS = 150
SMOOTHING = 0.1  # weight of the newest loss: an average over about ten steps
MAX_RISE = 1.3  # stop at this multiple of the lowest loss


def compare_rates(study: Study, base: Flags) -> list[Row]:
    """Each peak learning rate with each window length, with the same number of tokens per step."""
    rows = []
    tokens = base["batch_size"] * base["block_size"]
    for window in WINDOWS[study.config.quick]:
        for rate in RATES[study.config.quick]:
            flags = base | {"block_size": window, "batch_size": tokens // window, "lr_max": rate}
            runs = with_seeds(study, f"window{window}-rate{rate:g}", flags)
            rows.append({"window": window, "peak rate": f"{rate:g}", **loss_columns(runs)})
    return rows


def best_rate(rows: list[Row]) -> float:
    """The peak learning rate with the lowest mean loss over all windows."""
    means = {
        rate: mean([row["validation loss"] for row in rows if row["peak rate"] == rate])
        for rate in {row["peak rate"] for row in rows}
    }
    return float(min(means, key=means.__getitem__))


def compare_schedules(study: Study, base: Flags) -> list[Row]:
    """Each schedule with the same peak learning rate; differences are to the first one."""
    rows: list[Row] = []
    losses: list[list[float]] = []
    for name, schedule in SCHEDULES.items():
        lr_min = schedule.get("lr_min", 0.0) * base["lr_max"]
        runs = with_seeds(study, name.replace(" ", "-"), base | schedule | {"lr_min": lr_min})
        losses.append(val_losses(runs))
        rows.append({"schedule": name, **loss_columns(runs)})
    add_differences(rows, losses)
    return rows


def compare_accumulation(study: Study, base: Flags) -> tuple[list[Row], dict[str, Any]]:
    """The same windows per step as one batch or as several micro-batches. Returns the rows, and
    the log of the first seed by name."""
    rows: list[Row] = []
    logs: dict[str, Any] = {}
    losses: list[list[float]] = []
    for n in MICRO_BATCHES:
        flags = base | {"batch_size": base["batch_size"] // n, "grad_accum": n}
        name = f"{n} x {flags['batch_size']} windows"
        runs = with_seeds(study, f"accumulate{n}", flags)
        losses.append(val_losses(runs))
        logs[name] = runs[0]["log"]
        row = {"batches per step": name, **loss_columns(runs)}
        rows.append(row | {"ms per step": mean_ms_per_step(runs)})
    add_differences(rows, losses)
    return rows, logs


def range_test(study: Study, base: Flags) -> list[tuple[float, float]]:
    """The learning-rate range test of Smith (2017): pairs of learning rate and smoothed training
    loss while the rate grows from FIRST_RATE towards LAST_RATE, until the loss has risen."""
    # With a schedule this long, the learning rate is lr_max, which is set before each step.
    trainer = make_trainer(study, base | {"warmup_steps": 0, "max_steps": 10**9})
    pairs: list[tuple[float, float]] = []
    smoothed = math.log(trainer.model.config.vocab_size)  # the loss of uniform guessing
    for i in range(RANGE_STEPS):
        rate = FIRST_RATE * (LAST_RATE / FIRST_RATE) ** (i / RANGE_STEPS)
        trainer.config.lr_max = rate
        smoothed += SMOOTHING * (trainer.train_step()["loss"].item() - smoothed)
        if not math.isfinite(smoothed):
            break
        pairs.append((rate, smoothed))
        if smoothed > MAX_RISE * min(loss for _, loss in pairs):
            break
    return pairs


# --- plots


def margins(rows: list[Row]) -> list[float]:
    """The lengths of the error bars."""
    return [row["95% margin"] if math.isfinite(row["95% margin"]) else 0.0 for row in rows]


def plot_rates(axes: "Axes", rows: list[Row]) -> None:
    for color, window in zip(COLORS, sorted({row["window"] for row in rows}), strict=False):
        chosen = [row for row in rows if row["window"] == window]
        axes.errorbar(
            [float(row["peak rate"]) for row in chosen],
            [row["validation loss"] for row in chosen],
            margins(chosen),
            fmt="o-",
            capsize=3,
            color=color,
            label=f"window {window}",
        )
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss (nats per token)")
    axes.set_title("Peak learning rate by window, at equal tokens")
    axes.legend()


def plot_range(axes: "Axes", pairs: list[tuple[float, float]]) -> None:
    axes.semilogx(*zip(*pairs, strict=True), color=COLORS[0])
    best, _ = min(pairs, key=lambda pair: pair[1])
    axes.axvline(best, color=COLORS[1], linestyle="--", label=f"lowest loss at {best:.1g}")
    axes.set(
        xlabel="learning rate, growing every step",
        ylabel="training loss (nats per token), smoothed",
    )
    axes.set_title("Learning-rate range test")
    axes.legend()


def plot_schedules(axes: "Axes", rows: list[Row]) -> None:
    values = [row["validation loss"] for row in rows]
    y = range(len(rows))
    axes.errorbar(values, y, xerr=margins(rows), fmt="o", capsize=3, color=COLORS[0])
    axes.set_yticks(y, [row["schedule"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="validation loss (nats per token)", title="Schedule")


def plot_accumulation(axes: "Axes", logs: dict[str, Any]) -> None:
    for color, style, (name, log) in zip(COLORS, ("-", "--", ":"), logs.items(), strict=False):
        steps, values = ([record[key] for record in log] for key in ("step", "val"))
        axes.plot(steps, values, style, color=color, label=name, linewidth=2)
    axes.set(
        xlabel="step", ylabel="validation loss (nats per token)", title="Gradient accumulation"
    )
    axes.legend()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    study = parse_study("lr_context", argv, __doc__)
    n_settings = len(WINDOWS[study.config.quick]) * len(RATES[study.config.quick])
    n_settings += len(SCHEDULES) + len(MICRO_BATCHES)
    study.n_runs = n_settings * study.config.seeds
    base = QUICK if study.config.quick else FULL
    gpt, config = train_settings(base, study.device.type)
    base = base | {"block_size": gpt.block_size, "batch_size": config.batch_size}
    rates = compare_rates(study, base)
    base |= {"lr_max": best_rate(rates)}
    schedules = compare_schedules(study, base)
    accumulation, logs = compare_accumulation(study, base)
    pairs = range_test(study, base)
    tables = {
        "Rate by window": rates,
        "Schedules": schedules,
        "Accumulation": accumulation,
        "Range test": [
            {"learning rate": f"{rate:.1e}", "training loss": loss} for rate, loss in pairs[::10]
        ],
    }
    figure = new_figure(10, 7.5)
    panels = figure.subplots(2, 2)
    plot_rates(panels[0, 0], rates)
    plot_range(panels[0, 1], pairs)
    plot_schedules(panels[1, 0], schedules)
    plot_accumulation(panels[1, 1], logs)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    write_results(study, tables, figure)
    return 0


if __name__ == "__main__":
    run(main)
