"""The learning rate: its peak for each window length, and its schedule; and gradient accumulation
compared with large batches.

    python -m experiments.lr_context --quick
"""

import itertools

from system.start import run

from matplotlib.figure import Figure

from config import train_settings
from experiments.comparison import LOSS, Row, mean
from experiments.study import Runs, Study, compare, log_values, loss_columns, parse_study
from training.setup import Flags
from viz.curve import COLORS, new_figure

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


def compare_rates(study: Study, base: Flags) -> list[Row]:
    """Each peak learning rate with each window length, with the same number of tokens per step."""
    rows = []
    tokens = base["batch_size"] * base["block_size"]
    quick = study.config.quick
    for window, rate in itertools.product(WINDOWS[quick], RATES[quick]):
        flags = base | {"block_size": window, "batch_size": tokens // window, "lr_max": rate}
        runs = study.with_seeds(f"window{window}-rate{rate:g}", flags)
        rows.append({"window": window, "peak rate": f"{rate:g}", **loss_columns(runs)})
    return rows


def best_rate(rows: list[Row]) -> float:
    """The peak learning rate with the lowest mean loss over all windows."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        losses.setdefault(row["peak rate"], []).append(row["validation loss"])
    return float(min(losses, key=lambda rate: mean(losses[rate])))


def train_schedules(study: Study, base: Flags) -> Runs:
    """Each schedule with the same peak learning rate."""
    runs = {}
    for name, schedule in SCHEDULES.items():
        flags = base | schedule | {"lr_min": schedule.get("lr_min", 0.0) * base["lr_max"]}
        runs[name] = study.with_seeds(name.replace(" ", "-"), flags)
    return runs


def train_accumulation(study: Study, base: Flags) -> Runs:
    """The same windows per step as one batch or as several micro-batches."""
    runs = {}
    for n in MICRO_BATCHES:
        flags = base | {"batch_size": base["batch_size"] // n, "grad_accum": n}
        runs[f"{n} x {flags['batch_size']} windows"] = study.with_seeds(f"accumulate{n}", flags)
    return runs


def plot(rates: list[Row], schedules: list[Row], accumulation: Runs) -> Figure:
    figure = new_figure(15, 4)
    by_rate, by_schedule, curves = figure.subplots(1, 3)

    for color, window in zip(COLORS, sorted({row["window"] for row in rates}), strict=False):
        rows = [row for row in rates if row["window"] == window]
        x = [float(row["peak rate"]) for row in rows]
        losses, bars = [row["validation loss"] for row in rows], [row["95% margin"] for row in rows]
        label = f"window {window}"
        by_rate.errorbar(x, losses, bars, fmt="o-", capsize=3, color=color, label=label)
    by_rate.set(title="Peak learning rate by window, at equal tokens", xscale="log")
    by_rate.set(xlabel="peak learning rate", ylabel=LOSS)

    for y, row in enumerate(schedules):
        x, bar = row["validation loss"], row["95% margin"]
        by_schedule.errorbar(x, y, xerr=bar, fmt="o", capsize=3, color=COLORS[0])
    by_schedule.set_yticks(range(len(schedules)), [row["schedule"] for row in schedules])
    by_schedule.invert_yaxis()
    by_schedule.set(xlabel=LOSS, title="Schedule")

    for i, (name, (first, *_)) in enumerate(accumulation.items()):
        steps, losses = log_values(first, "step"), log_values(first, "val")
        curves.plot(steps, losses, ("-", "--", ":")[i], color=COLORS[i], label=name, linewidth=2)
    curves.set(xlabel="step", ylabel=LOSS, title="Gradient accumulation")
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("lr_context", argv, __doc__)
    n_settings = len(WINDOWS[study.config.quick]) * len(RATES[study.config.quick])
    study.n_runs = (n_settings + len(SCHEDULES) + len(MICRO_BATCHES)) * study.config.seeds
    base = QUICK if study.config.quick else FULL
    gpt, config = train_settings(base, study.device.type)
    base = base | {"block_size": gpt.block_size, "batch_size": config.batch_size}
    rates = compare_rates(study, base)
    base |= {"lr_max": best_rate(rates)}
    schedules, accumulation = train_schedules(study, base), train_accumulation(study, base)
    schedule_rows = compare(schedules, lambda name: {"schedule": name})
    tables = {
        "Rate by window": rates,
        "Schedules": schedule_rows,
        "Accumulation": compare(accumulation, lambda n: {"batches per step": n}, timed=True),
    }
    study.write_results(tables, plot(rates, schedule_rows, accumulation))
    return 0


if __name__ == "__main__":
    run(main)
