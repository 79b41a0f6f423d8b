"""The learning rate: its peak for each window length, and its schedule; and gradient accumulation
compared with large batches.

    python -m experiments.lr_context --quick
"""

import itertools
from system.start import run

from matplotlib.figure import Figure

from config import train_settings
from experiments.comparison import LOSS, mean, plot_band, plot_curves, plot_seeds
from experiments.study import Runs, Study, compare, loss_columns, parse_study, val_losses
from training.setup import Flags
from viz.curve import BLUE, COLORS, new_figure

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


def train_rates(study: Study, base: Flags) -> Runs:
    """Each peak rate with each window, with equal tokens per step. A variant is (window, rate)."""
    runs: Runs = {}
    tokens, quick = base["batch_size"] * base["block_size"], study.config.quick
    for window, rate in itertools.product(WINDOWS[quick], RATES[quick]):
        flags = base | {"block_size": window, "batch_size": tokens // window, "lr_max": rate}
        runs[window, rate] = study.with_seeds(f"window{window}-rate{rate:g}", flags)
    return runs


def best_rate(rates: Runs) -> float:
    """The peak learning rate with the lowest mean loss over all windows."""
    losses: dict[float, list[float]] = {}
    for (_, rate), runs in rates.items():
        losses.setdefault(rate, []).extend(val_losses(runs))
    return min(losses, key=lambda rate: mean(losses[rate]))


def train_schedules(study: Study, base: Flags) -> Runs:
    """Each schedule with the same peak learning rate."""
    runs = {}
    for name, schedule in SCHEDULES.items():
        flags = base | schedule | {"lr_min": schedule.get("lr_min", 0.0) * base["lr_max"]}
        runs[name] = study.with_seeds(name, flags)
    return runs


def train_accumulation(study: Study, base: Flags) -> Runs:
    """The same windows per step as one batch or as several micro-batches."""
    runs = {}
    for n in MICRO_BATCHES:
        flags = base | {"batch_size": base["batch_size"] // n, "grad_accum": n}
        runs[f"{n} x {flags['batch_size']} windows"] = study.with_seeds(f"accumulate{n}", flags)
    return runs


def plot(rates: Runs, schedules: Runs, accumulation: Runs) -> Figure:
    figure = new_figure(15, 4)
    by_rate, by_schedule, curves = figure.subplots(1, 3)

    for color, window in zip(COLORS, dict.fromkeys(window for window, _ in rates), strict=False):
        losses = {rate: val_losses(runs) for (w, rate), runs in rates.items() if w == window}
        label = f"window {window}"
        plot_band(by_rate, list(losses), list(losses.values()), "o-", color, label)
    by_rate.set(title="Peak learning rate by window, at equal tokens", xscale="log")
    by_rate.set(xlabel="peak learning rate", ylabel=LOSS)

    groups = {name: val_losses(runs) for name, runs in schedules.items()}
    plot_seeds(by_schedule, groups, [BLUE] * len(groups))
    by_schedule.set(xlabel=LOSS, title="Schedule: one dot per seed, bars: 95% interval")

    plot_curves(curves, accumulation)
    curves.set(title="Gradient accumulation: mean, lowest and highest seed")
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("lr_context", argv, __doc__)
    n_settings = len(WINDOWS[study.config.quick]) * len(RATES[study.config.quick])
    study.n_runs = (n_settings + len(SCHEDULES) + len(MICRO_BATCHES)) * study.config.seeds
    base = QUICK if study.config.quick else FULL
    gpt, config = train_settings(base, study.device.type)
    base = base | {"block_size": gpt.block_size, "batch_size": config.batch_size}
    rates = train_rates(study, base)
    base |= {"lr_max": best_rate(rates)}
    schedules, accumulation = train_schedules(study, base), train_accumulation(study, base)
    tables = {
        "Rate by window": [
            {"window": window, "peak rate": f"{rate:g}", **loss_columns(runs)}
            for (window, rate), runs in rates.items()
        ],
        "Schedules": compare(schedules, lambda name: {"schedule": name}),
        "Accumulation": compare(accumulation, lambda n: {"batches per step": n}, timed=True),
    }
    study.write_results(tables, plot(rates, schedules, accumulation))
    return 0


if __name__ == "__main__":
    run(main)
