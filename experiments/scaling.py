"""How large a model for how much compute? Loss against compute for a family of sizes.

python experiments/scaling.py --quick

Approach 2 of Hoffmann et al. (2022), the IsoFLOP profile: several sizes are trained with the same
compute, a large one on few tokens, a small one on many; a parabola through their losses has its
minimum at the best size. The best sizes of several budgets give power laws, and these predict the
loss of a larger budget, which a run that they have not seen then checks.

Compute is counted as C = 6 N D: N are the weights of the matrices that a token is multiplied with,
the output matrix among them (the embedding is a table, whether it is the same matrix or not), and D
the tokens trained on. What attention computes between tokens is not in it.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study
from study import Study, mean, spread

from config import GPTConfig, from_dict, run, setting
from model import GPT
from plots import BLACK, COLORS

# Muon, with which one learning rate suits all the sizes: 0.02 and 0.04 differ little in the quick
# study. AdamW's best differs between sizes, and a profile is to compare sizes, not learning rates.
RUN: dict[str, Any] = {"optimizer": "muon", "schedule": "linear", "dropout": 0.0}
RUN |= {"token_shift": False}
# The budgets, in floating-point operations, and the widths that are trained with each: the best is
# to be among them, not at an end.
QUICK: dict[str, Any] = {
    "run": RUN | {"n_layer": 2, "n_head": 2, "block_size": 64, "batch_size": 24, "lr_max": 2e-2},
    "widths": {
        0.1e12: (16, 20, 24, 32, 48),
        0.2e12: (20, 24, 32, 40, 56),
        0.4e12: (24, 32, 40, 56, 72),
    },
    "check": 0.8e12,
    "width_step": 4,  # the check's width is a multiple of it
}
QUICK["run"] |= {"compile": False}  # sooner done than compiled
# Larger budgets would repeat the plays, 4 million characters, too often: they want a larger text.
FULL: dict[str, Any] = {
    "run": RUN | {"n_layer": 4, "n_head": 4, "block_size": 256, "batch_size": 32, "lr_max": 1e-2},
    "widths": {
        1e13: (32, 48, 64, 96, 128),
        2e13: (48, 64, 80, 96, 128),
        4e13: (48, 64, 96, 128, 160),
        8e13: (64, 96, 112, 128, 192),
    },
    "check": 1.6e14,
    "width_step": 8,
}
HOFFMANN = {"weights": "0.49", "tokens": "0.51", "loss": ""}  # the exponents that they found


@dataclass
class ScalingConfig:
    """The size of the study and its place."""

    quick: bool = setting(False, "minutes on two cores; else the full size, for a GPU")
    seeds: int = setting(3, "runs of each kind, which tell what is chance", low=1)
    data: str = setting("plays", "the text, as for train.py")
    out_dir: str = setting("checkpoints/studies", "folder of the runs, which are kept")
    results: str = setting("experiments/results", "folder of the tables and pictures")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is")


# --- what the losses say


@dataclass
class Best:
    """The best size for a budget."""

    weights: float
    tokens: float
    loss: float  # nats a token
    where: str  # how it was found


def parabola_minimum(sizes: list[int], losses: list[float]) -> tuple[float, float, str]:
    """The size at the minimum of the parabola that fits the losses over log(size) best, its loss
    there, and where it lies. Beyond the sizes that were trained it says nothing, so the nearest of
    these stands for it; and the best of them where the parabola has no minimum."""
    logs = np.log(sizes)
    bend, slope, height = np.polyfit(logs, losses, 2) if len(sizes) > 2 else (0, 0, 0)
    if bend <= 0:
        i = int(np.argmin(losses))
        return sizes[i], losses[i], "no minimum: the best run"
    bottom = -slope / (2 * bend)
    nearest = min(max(bottom, logs.min()), logs.max())
    where = "among the sizes" if nearest == bottom else "beyond the sizes: the last of them"
    return math.exp(nearest), float(np.polyval((bend, slope, height), nearest)), where


def power_law(x: list[float], y: list[float]) -> tuple[float, float]:
    """The factor k and the exponent a of y = k x^a, the straight line through the logarithms."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), 1)
    return math.exp(log_factor), float(exponent)


def at(law: tuple[float, float], x: float) -> float:
    """The value of a power law at x."""
    return law[0] * x ** law[1]


def best_sizes(losses: dict[float, dict[int, float]]) -> dict[float, Best]:
    """The best size for each budget, from {budget: {weights: loss}}. Runs that diverged, whose loss
    is infinite, are left out."""
    found = {}
    for budget, by_size in losses.items():
        kept = {n: loss for n, loss in by_size.items() if math.isfinite(loss)}
        n, loss, where = parabola_minimum(list(kept), list(kept.values()))
        found[budget] = Best(n, budget / (6 * n), loss, where)
    return found


def power_laws(best: dict[float, Best]) -> dict[str, tuple[float, float]]:
    """The power laws of compute: of the best size, its tokens, its loss. The loss has a part that
    no compute takes away (Hoffmann et al. 2022, equation 2) and this law does not know, so that it
    holds a short way only, and comes out a little low further on."""
    names = ("weights", "tokens", "loss")
    return {n: power_law(list(best), [getattr(b, n) for b in best.values()]) for n in names}


# --- runs


def matrix_weights(gpt: GPTConfig) -> int:
    """The weights of all matrices that a token is multiplied with, N."""
    with torch.device("meta"):  # sizes without numbers
        model = GPT(gpt)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def size_of(this: Study, size: dict[str, Any], width: int) -> int:
    """N of the model of that width."""
    vocab_size = study.corpus_of(this.config.data, "char", 0)[0].vocab_size
    settings = size["run"] | {"n_embd": width, "vocab_size": vocab_size}
    return matrix_weights(from_dict(GPTConfig, settings))


def train_with(
    this: Study, size: dict[str, Any], budget: float, width: int
) -> tuple[dict[str, Any], list[float]]:
    """Spend a budget on the model of that width, with each seed: the row of the table of all runs,
    and the losses. The learning rate falls to 0 with the budget's end."""
    n = size_of(this, size, width)
    a_step = size["run"]["batch_size"] * size["run"]["block_size"]
    steps = max(1, round(budget / (6 * n * a_step)))
    flags = size["run"] | {"n_embd": width, "max_steps": steps, "eval_every": steps}
    runs = study.with_seeds(this, f"{budget:.1e}-{width}", flags)
    losses = [r["val"] for r in runs]
    row = {"TFLOP": budget / 1e12, "channels": width, "weights": n, "steps": steps}
    row |= {"tokens": steps * a_step, "validation loss": mean(losses), "spread": spread(losses)}
    return row | {"ms a step": round(mean([r["ms_per_step"] for r in runs]), 1)}, losses


def nearest_width(this: Study, size: dict[str, Any], n: float) -> int:
    """The width whose model has about n weights."""
    step = size["width_step"]
    width = step
    while size_of(this, size, width) < n:
        width += step
    return min((width, max(width - step, step)), key=lambda w: abs(size_of(this, size, w) - n))


# --- picture and table


def draw(
    losses: dict[float, list[dict[int, float]]],
    best: dict[float, Best],
    laws: dict[str, tuple[float, float]],
    check: tuple[float, list[float]],
) -> Any:
    """The profiles with their minima, and the best losses with the law that predicts the check."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (budget, by_seed), color in zip(losses.items(), COLORS, strict=False):
        for one in by_seed:
            left.semilogx(list(one), list(one.values()), "o", color=color, alpha=0.4)
        sizes = list(by_seed[0])
        means = [mean([one[n] for one in by_seed]) for n in sizes]
        x = np.geomspace(min(sizes), max(sizes))
        if len(sizes) > 2 and all(map(math.isfinite, means)):
            y = np.polyval(np.polyfit(np.log(sizes), means, 2), np.log(x))
            left.plot(x, y, color=color, label=f"{budget / 1e12:g} TFLOP")
        left.plot(best[budget].weights, best[budget].loss, "*", color=color, markersize=16)
        right.loglog(budget, best[budget].loss, "*", color=color, markersize=16)
    sizes = [n for by_seed in losses.values() for n in by_seed[0]]
    ticks = np.geomspace(min(sizes), max(sizes), 5)
    left.set_xticks(ticks, [f"{n / 1000:,.{n < 10_000:d}f}k" for n in ticks])
    left.set(xlabel="weights N", ylabel="validation loss (nats a token)")
    left.set_title("Equal compute: a parabola, its minimum")
    left.legend()
    budget, measured = check
    for ends, style in (((min(best), max(best)), "-"), ((max(best), budget), "--")):
        right.plot(ends, [at(laws["loss"], c) for c in ends], style, color=BLACK)
    star = {"color": "white", "markeredgecolor": BLACK, "markersize": 16, "label": "predicted"}
    right.plot(budget, at(laws["loss"], budget), "*", **star)
    dots = {"color": BLACK, "alpha": 0.5, "label": "measured, a dot a seed"}
    right.plot([budget] * len(measured), measured, "o", **dots)
    right.set_xticks([*best, budget], [f"{c / 1e12:g}" for c in (*best, budget)])
    values = [b.loss for b in best.values()] + [v for v in measured if math.isfinite(v)]
    ticks = np.linspace(min(values), max(values), 5)
    right.set_yticks(ticks, [f"{loss:.2f}" for loss in ticks])
    right.set(xlabel="compute C (TFLOP)", ylabel="validation loss at the best size")
    pairs = zip("NDL", laws.values(), strict=True)
    right.set_title(", ".join(f"{name} ~ $C^{{{law[1]:.2f}}}$" for name, law in pairs))
    right.legend()
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return figure


def check_row(
    budget: float,
    laws: dict[str, tuple[float, float]],
    by_seed: list[dict[str, tuple[float, float]]],
    weights: int,
    measured: list[float],
) -> dict[str, Any]:
    """What the laws said of a budget, and what came."""
    predicted = at(laws["loss"], budget)
    return {
        "TFLOP": budget / 1e12,
        "predicted size": round(at(laws["weights"], budget)),
        "trained size": weights,
        "predicted loss": predicted,
        "spread of predictions": spread([at(one["loss"], budget) for one in by_seed]),
        "measured loss": mean(measured),
        "spread": spread(measured),
        "measured - predicted": mean(measured) - predicted,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    this = study.begin("scaling", argv, __doc__, ScalingConfig)
    size = QUICK if this.config.quick else FULL
    seeds = range(this.config.seeds)
    rows, losses = [], {}  # losses: {budget: [of each seed, {weights: loss}]}
    for budget, widths in size["widths"].items():
        losses[budget] = [{} for _ in seeds]
        for width in widths:
            row, values = train_with(this, size, budget, width)
            rows.append(row)
            for by_size, loss in zip(losses[budget], values, strict=True):
                by_size[row["weights"]] = loss

    means = {c: {n: mean([one[n] for one in of]) for n in of[0]} for c, of in losses.items()}
    best = best_sizes(means)
    laws = power_laws(best)
    by_seed = [power_laws(best_sizes({c: of[i] for c, of in losses.items()})) for i in seeds]

    budget = size["check"]
    width = nearest_width(this, size, at(laws["weights"], budget))
    row, measured = train_with(this, size, budget, width)
    tables = {
        "Best size for each budget": [
            {
                "TFLOP": c / 1e12,
                "weights": round(b.weights),
                "tokens": round(b.tokens),
                "tokens a weight": round(b.tokens / b.weights, 1),
                "validation loss": b.loss,
                "the minimum is": b.where,
            }
            for c, b in best.items()
        ],
        "Laws: powers of compute": [
            {
                "of the best": name,
                "exponent": exponent,
                "spread over seeds": spread([one[name][1] for one in by_seed]),
                "in Hoffmann et al.": HOFFMANN[name],
            }
            for name, (_, exponent) in laws.items()
        ],
        "Check: a run that the laws have not seen": [
            check_row(budget, laws, by_seed, row["weights"], measured)
        ],
        "Runs": [*rows, row],
    }
    return study.finish(this, tables, draw(losses, best, laws, (budget, measured)))


if __name__ == "__main__":
    run(main)
