"""The learning rate: how high, how long a window bears it, how it begins and ends; and whether
batches one after the other are as good as one large one.

python experiments/lr_context.py --quick
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study
from study import Study, mean, spread

import train
from config import run, train_settings
from model import GPT
from plots import COLORS

QUICK = {"preset": "tiny", "batch_size": 12, "max_steps": 300, "eval_every": 50}
QUICK |= {"compile": False}
FULL = {"preset": "medium"}
RATES = {True: (1e-3, 3e-3, 1e-2, 3e-2), False: (3e-4, 1e-3, 2e-3, 4e-3)}
WINDOWS = {True: (32, 128, 256), False: (64, 256, 1024)}
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine to 0": {"schedule": "cosine"},
    "cosine to a tenth": {"schedule": "cosine", "lr_min": 0.1},  # times the peak
    "a line to 0": {"schedule": "linear"},
    "cosine to 0, no warmup": {"schedule": "cosine", "warmup_steps": 0},
    "constant": {"schedule": "linear", "lr_min": 1.0},
}


def rate_by_window(this: Study, base: dict[str, Any]) -> list[dict[str, Any]]:
    """Each peak rate with each window, at equal tokens a step."""
    rows = []
    tokens = base["batch_size"] * base["block_size"]
    for window in WINDOWS[this.config.quick]:
        for rate in RATES[this.config.quick]:
            flags = base | {"block_size": window, "batch_size": tokens // window, "lr_max": rate}
            losses = [
                r["val"] for r in study.with_seeds(this, f"window{window}-rate{rate:g}", flags)
            ]
            row = {"window": window, "peak rate": f"{rate:g}"}
            rows.append(row | {"validation loss": mean(losses), "spread": spread(losses)})
    return rows


def schedules(this: Study, base: dict[str, Any]) -> list[dict[str, Any]]:
    """Each way for the rate to begin and to end."""
    rows: list[dict[str, Any]] = []
    first: list[float] = []
    for name, flags in SCHEDULES.items():
        flags = base | flags | {"lr_min": flags.get("lr_min", 0.0) * base["lr_max"]}
        losses = [r["val"] for r in study.with_seeds(this, name.replace(" ", "-"), flags)]
        first = first or losses
        row = {"schedule": name, "validation loss": mean(losses), "spread": spread(losses)}
        apart = study.difference(first, losses) if rows else ""
        rows.append(row | {"difference": apart})
    return rows


def accumulation(this: Study, base: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """As many windows a step, in one batch or several; the curves, by name."""
    rows, curves = [], {}
    first: list[float] = []
    for parts in (1, 2, 4):
        flags = base | {"batch_size": base["batch_size"] // parts, "grad_accum": parts}
        name = f"{parts} x {flags['batch_size']} windows"
        runs = study.with_seeds(this, f"accumulate{parts}", flags)
        losses = [r["val"] for r in runs]
        first = first or losses
        curves[name] = runs[0]["log"]
        row = {"batches a step": name, "validation loss": mean(losses), "spread": spread(losses)}
        row |= {"difference": study.difference(first, losses) if rows else ""}
        rows.append(row | {"ms a step": round(mean([r["ms_per_step"] for r in runs]), 1)})
    return rows, curves


def rate_range(this: Study, base: dict[str, Any], steps: int = 150) -> list[tuple[float, float]]:
    """The loss of each batch while the rate grows from 1e-5 by the same factor each step, until the
    loss is 1.3 times its lowest: how high a rate is borne (Smith 2017). Pairs of rate and loss,
    smoothed over about ten steps."""
    gpt, config = train_settings({"data": this.config.data} | base, this.device.type)
    config = replace(config, warmup_steps=0, max_steps=10**9)  # no schedule but this one
    tokenizer, corpus = study.corpus_of(config.data, config.tokenizer, 0)
    train.prepare_machine(config, this.device)
    model = GPT(replace(gpt, vocab_size=tokenizer.vocab_size))
    trainer = train.Trainer(model, tokenizer, corpus, config, this.device)
    pairs: list[tuple[float, float]] = []
    smooth = math.log(tokenizer.vocab_size)
    for i in range(steps):
        config.lr_max = 1e-5 * (1.0 / 1e-5) ** (i / steps)
        loss = trainer.train_step()[0].item()
        smooth += 0.1 * (loss - smooth)
        pairs.append((config.lr_max, smooth))
        if not math.isfinite(smooth) or smooth > 1.3 * min(loss for _, loss in pairs):
            break
    return [pair for pair in pairs if math.isfinite(pair[1])]


def draw(
    grid: list[dict[str, Any]],
    range_: list[tuple[float, float]],
    ends: list[dict[str, Any]],
    curves: dict[str, list[dict[str, Any]]],
) -> Any:
    """Four panels: rate by window, the range of rates, schedules, accumulation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (windows, ranges), (ways, parts) = figure.subplots(2, 2)
    for color, window in zip(COLORS, sorted({row["window"] for row in grid}), strict=False):
        rows = [row for row in grid if row["window"] == window]
        rates = [float(row["peak rate"]) for row in rows]
        losses, errors = ([row[k] for row in rows] for k in ("validation loss", "spread"))
        halves = [e / 2 if math.isfinite(e) else 0.0 for e in errors]
        label = f"window {window}"
        windows.errorbar(rates, losses, halves, fmt="o-", capsize=3, color=color, label=label)
    windows.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss")
    windows.set_title("Rate by window, at equal tokens")
    windows.legend()
    ranges.semilogx(*zip(*range_, strict=True), color=COLORS[0])
    best = min(range_, key=lambda pair: pair[1])
    ranges.axvline(best[0], color=COLORS[1], linestyle="--", label=f"lowest at {best[0]:.1g}")
    ranges.set(xlabel="learning rate, growing step by step", ylabel="training loss, smoothed")
    ranges.set_title("How high a rate is borne")
    ranges.legend()
    names = [row["schedule"] for row in ends]
    halves = [row["spread"] / 2 for row in ends]
    values = [row["validation loss"] for row in ends]
    ways.errorbar(values, range(len(ends)), xerr=halves, fmt="o", capsize=3, color=COLORS[0])
    ways.set_yticks(range(len(ends)), names)
    ways.invert_yaxis()
    ways.set(xlabel="validation loss", title="How the rate begins and ends")
    for color, style, (name, log) in zip(COLORS, ("-", "--", ":"), curves.items(), strict=False):
        losses = [record["val"] for record in log]
        parts.plot([r["step"] for r in log], losses, style, color=color, label=name, linewidth=2)
    parts.set(xlabel="step", ylabel="validation loss", title="One batch, or several in turn")
    parts.legend()
    for axes in (windows, ranges, ways, parts):
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    this = study.begin("lr_context", argv, __doc__)
    base = QUICK if this.config.quick else FULL
    gpt, config = train_settings(base, this.device.type)
    base = base | {"block_size": gpt.block_size, "batch_size": config.batch_size}
    grid = rate_by_window(this, base)
    means = {
        rate: mean([row["validation loss"] for row in grid if row["peak rate"] == rate])
        for rate in {row["peak rate"] for row in grid}
    }
    base |= {"lr_max": float(min(means, key=means.__getitem__))}  # the best for all windows
    ends = schedules(this, base)
    batches, curves = accumulation(this, base)
    range_ = rate_range(this, base)
    tables = {"Rate by window": grid, "Schedules": ends, "Accumulation": batches}
    tables["Range of rates"] = [
        {"learning rate": f"{r:.1e}", "training loss": loss} for r, loss in range_[::10]
    ]
    return study.finish(this, tables, draw(grid, range_, ends, curves))


if __name__ == "__main__":
    run(main)
