"""The learning rate: its peak for each window length, and its schedule; and gradient accumulation
compared with large batches.

    python -m experiments.lr_context
"""

import itertools
from system.start import run

from matplotlib.figure import Figure

from config import train_settings
from experiments.comparison import LOSS, plot_band, plot_curves, plot_seeds
from experiments.study import Runs, compare, loss_columns, parse_study, val_losses
from training.setup import Flags
from viz.curve import BLUE, COLORS, new_figure

SHARED: Flags = {"preset": "tiny", "batch_size": 12, "max_steps": 300, "eval_every": 50}
SHARED |= {"compile": False}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WINDOWS = (32, 128, 256)
MICRO_BATCHES = (1, 2, 4)
SCHEDULES: dict[str, Flags] = {
    "cosine to 0": {"schedule": "cosine"},
    "cosine to a tenth": {"schedule": "cosine", "lr_min": 0.1},  # times the peak
    "linear to 0": {"schedule": "linear"},
    "cosine to 0, no warmup": {"schedule": "cosine", "warmup_steps": 0},
    "constant": {"schedule": "linear", "lr_min": 1.0},
}


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
    gpt, config = train_settings(SHARED, study.device.type)
    n_variants = len(WINDOWS) * len(RATES) + len(SCHEDULES) + len(MICRO_BATCHES)
    study.n_runs = n_variants * study.config.seeds

    rates: Runs = {}  # each peak rate with each window, with equal tokens per step
    for window, rate in itertools.product(WINDOWS, RATES):
        batch_size = config.batch_size * gpt.block_size // window
        flags = SHARED | {"block_size": window, "batch_size": batch_size, "lr_max": rate}
        rates[window, rate] = study.with_seeds(f"window{window}-rate{rate:g}", flags)
    # the peak rate with the lowest mean loss over all windows, all with equally many seeds
    sums = {p: sum(sum(val_losses(rates[window, p])) for window in WINDOWS) for p in RATES}
    peak = min(sums, key=sums.__getitem__)
    base = SHARED | {"lr_max": peak, "block_size": gpt.block_size, "batch_size": config.batch_size}
    schedules: Runs = {}
    for name, schedule in SCHEDULES.items():
        flags = base | schedule | {"lr_min": schedule.get("lr_min", 0.0) * peak}
        schedules[name] = study.with_seeds(name, flags)
    accumulation: Runs = {}  # the same windows per step as one batch or as several micro-batches
    for n in MICRO_BATCHES:
        flags = base | {"batch_size": config.batch_size // n, "grad_accum": n}
        runs = study.with_seeds(f"accumulate{n}", flags)
        accumulation[f"{n} x {flags['batch_size']} windows"] = runs
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
