"""How large a model for how much compute? Loss against compute for a family of sizes.

    python -m experiments.scaling

Approach 2 of Hoffmann et al. (2022), the IsoFLOP profile: several sizes are trained with the same
compute, a large one on few tokens, a small one on many. The minimum of a parabola through their
losses is the best size for this budget. The best sizes of several budgets give power laws, which
predict the loss for a larger budget; a run that the laws were not fitted to checks the prediction.
Compute is C = 6 N D: N weights in the matrices that each token is multiplied with, D tokens.
"""

import math
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple
from system.start import run

import numpy as np
from matplotlib.figure import Figure

from config import GPTConfig
from experiments.comparison import LOSS, Row, margin, mean, mean_columns
from experiments.study import Study, loss_columns, parse_study, val_losses
from system.settings import from_dict
from training.checks import params_by_component
from training.setup import Flags
from viz.curve import BLACK, COLORS, new_figure

Profile = dict[int, list[float]]  # weights -> the validation loss of each seed
Law = tuple[float, float]  # factor k and exponent a of y = k x^a


# Muon suits all sizes with one learning rate: 0.02 and 0.04 differ little in this study. AdamW's
# best learning rate differs between sizes, and a profile should compare only the sizes.
SHARED: Flags = {"optimizer": "muon", "schedule": "linear", "lr_max": 2e-2, "token_shift": False}
SHARED |= {"n_layer": 2, "n_head": 2, "block_size": 64, "batch_size": 24, "dropout": 0.0}
SHARED |= {"compile": False}  # it takes longer than it saves
# FLOP -> the widths trained with this budget. The best one should not be the first or the last.
WIDTHS: dict[float, tuple[int, ...]] = {
    0.1e12: (16, 20, 24, 32, 48),
    0.2e12: (20, 24, 32, 40, 56),
    0.4e12: (24, 32, 40, 56, 72),
}


class Best(NamedTuple):
    weights: float
    loss: float  # nats per token
    minimum: str  # how it was found


def parabola_minimum(sizes: list[int], losses: list[float]) -> Best:
    """The size at the minimum of a parabola fitted to the losses over log(size); within the range
    of the trained sizes, outside of which it is not valid."""
    logs = np.log(sizes)
    curvature, slope, height = np.polyfit(logs, losses, 2) if len(sizes) > 2 else (0, 0, 0)
    if curvature <= 0:
        i = int(np.argmin(losses))
        return Best(sizes[i], losses[i], "no minimum: the lowest loss")
    bottom = -slope / (2 * curvature)
    nearest = min(max(bottom, logs.min()), logs.max())
    found = "within the sizes" if nearest == bottom else "beyond the sizes: the nearest"
    loss = float(np.polyval((curvature, slope, height), nearest))
    return Best(math.exp(nearest), loss, found)


def evaluate_law(law: Law, x: float) -> float:
    return law[0] * x ** law[1]


def best_sizes(
    profiles: dict[float, Profile], loss_of: Callable[[list[float]], float]
) -> dict[float, Best]:
    """The best size for each budget. loss_of: the loss of a size from those of its seeds; a size
    with an infinite loss, which has diverged, is left out."""
    found = {}
    for budget, profile in profiles.items():
        losses = {n: loss_of(by_seed) for n, by_seed in profile.items()}
        kept = {n: loss for n, loss in losses.items() if math.isfinite(loss)}
        found[budget] = parabola_minimum(list(kept), list(kept.values()))
    return found


def fit_laws(best: dict[float, Best]) -> dict[str, Law]:
    """The power laws from compute to the best size, its tokens and its loss, by linear fits to the
    logarithms. They have no constant part, which no compute removes (Hoffmann et al. 2022, equation
    2), so they hold nearby only."""
    sizes = {
        "weights": [b.weights for b in best.values()],
        "tokens": [budget / (6 * b.weights) for budget, b in best.items()],
        "loss": [b.loss for b in best.values()],
    }
    lines = {name: np.polyfit(np.log([*best]), np.log(y), 1) for name, y in sizes.items()}
    return {name: (math.exp(height), float(slope)) for name, (slope, height) in lines.items()}


def weights_of_width(study: Study, width: int) -> int:
    """N of the model of this width: the weights of the matrices that a token is multiplied with."""
    vocab_size = study.corpus(SHARED)[0].vocab_size
    settings = SHARED | {"n_embd": width, "vocab_size": vocab_size}
    counts = params_by_component(from_dict(GPTConfig, settings))
    return counts["attention"] + counts["MLP"] + vocab_size * width


def train_width(study: Study, budget: float, width: int) -> tuple[Row, list[float]]:
    """Spend a budget on the model of this width: the row in the table of all runs, the losses."""
    n = weights_of_width(study, width)
    tokens_per_step = SHARED["batch_size"] * SHARED["block_size"]
    steps = max(1, round(budget / (6 * n * tokens_per_step)))
    flags = SHARED | {"n_embd": width, "max_steps": steps, "eval_every": steps}
    runs = study.with_seeds(f"{budget:.1e}-{width}", flags)
    row = {
        "TFLOP": budget / 1e12,
        "channels": width,
        "weights": n,
        "steps": steps,
        "tokens": steps * tokens_per_step,
        **loss_columns(runs, timed=True),
    }
    return row, val_losses(runs)


def nearest_width(study: Study, n: float) -> int:
    step = 2 * SHARED["n_head"]  # RoPE needs heads of an even size
    widths = range(step, 2 * max(map(max, WIDTHS.values())), step)
    return min(widths, key=lambda width: abs(weights_of_width(study, width) - n))


def result_tables(
    best: dict[float, Best], laws_by_seed: list[dict[str, Law]], row: Row, measured: list[float]
) -> dict[str, list[Row]]:
    """The tables of the best sizes, of the laws, and of what they predict for a measured run."""
    best_rows = [
        {
            "TFLOP": budget / 1e12,
            "weights": round(b.weights),
            "tokens": round(budget / (6 * b.weights)),
            "tokens per weight": round(budget / (6 * b.weights) / b.weights, 1),
            "validation loss": b.loss,
            "minimum": b.minimum,
        }
        for budget, b in best.items()
    ]
    laws = fit_laws(best)
    law_rows = [
        {
            "at the best size": name,
            "exponent": exponent,
            "95% margin": margin([by_name[name][1] for by_name in laws_by_seed]),
        }
        for name, (_, exponent) in laws.items()
    ]
    budget = 1e12 * row["TFLOP"]
    predicted, *predictions = (
        evaluate_law(by_name["loss"], budget) for by_name in (laws, *laws_by_seed)
    )
    check_row = {
        "TFLOP": row["TFLOP"],
        "predicted size": round(evaluate_law(laws["weights"], budget)),
        "trained size": row["weights"],
        "predicted loss": predicted,
        "95% margin of the prediction": margin(predictions),
        **mean_columns("measured loss", measured),
        "measured - predicted": mean(measured) - predicted,
    }
    return {
        "Best size for each budget": best_rows,
        "Laws: powers of compute": law_rows,
        "Check: a run that the laws were not fitted to": [check_row],
    }


def plot(
    profiles: dict[float, Profile],
    best: dict[float, Best],
    laws: dict[str, Law],
    budget: float,
    measured: list[float],
) -> Figure:
    """Left: loss over size for each budget and seed. Right: loss at the best size over compute."""
    figure = new_figure(11, 5)
    left, right = figure.subplots(1, 2)
    for (c, profile), color in zip(profiles.items(), COLORS, strict=False):
        sizes, means = list(profile), [mean(losses) for losses in profile.values()]
        for n, losses in profile.items():
            left.semilogx([n] * len(losses), losses, "o", color=color, alpha=0.4)
        if len(sizes) > 2 and all(map(math.isfinite, means)):
            x = np.geomspace(min(sizes), max(sizes))
            y = np.polyval(np.polyfit(np.log(sizes), means, 2), np.log(x))
            left.plot(x, y, color=color, label=f"{c / 1e12:g} TFLOP")
        left.plot(best[c].weights, best[c].loss, "*", color=color, markersize=16)
        right.plot(c, best[c].loss, "*", color=color, markersize=16)
    all_sizes = [n for profile in profiles.values() for n in profile]
    ticks = np.geomspace(min(all_sizes), max(all_sizes), 5)
    left.set_xticks(ticks, [f"{n / 1000:,.{n < 10_000:d}f}k" for n in ticks])
    left.set(xlabel="weights N", ylabel=LOSS, title="Equal compute: parabolas and their minima")

    x = np.geomspace(min(best), budget)
    right.semilogx(x, [evaluate_law(laws["loss"], c) for c in x], "--", color=BLACK, label="law")
    label = f"measured at {budget / 1e12:g} TFLOP, not fitted"
    right.plot([budget] * len(measured), measured, "o", color=BLACK, alpha=0.5, label=label)
    right.set_xticks([*best, budget], [f"{c / 1e12:g}" for c in (*best, budget)])
    right.set(xlabel="compute C (TFLOP)", ylabel=LOSS, title="Loss at the best size")
    for axes in (left, right):
        axes.minorticks_off()
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("scaling", argv, __doc__, data="plays")
    study.n_runs = (sum(map(len, WIDTHS.values())) + 1) * study.config.seeds
    rows = []
    profiles: dict[float, Profile] = {budget: {} for budget in WIDTHS}
    for budget, widths in WIDTHS.items():
        for width in widths:
            row, losses = train_width(study, budget, width)
            rows.append(row)
            profiles[budget][row["weights"]] = losses
    best = best_sizes(profiles, mean)
    laws = fit_laws(best)
    laws_by_seed = [
        fit_laws(best_sizes(profiles, itemgetter(i))) for i in range(study.config.seeds)
    ]
    budget = 2 * max(WIDTHS)  # of the run that checks the prediction
    width = nearest_width(study, evaluate_law(laws["weights"], budget))
    row, measured = train_width(study, budget, width)
    tables = result_tables(best, laws_by_seed, row, measured) | {"Runs": [*rows, row]}
    study.write_results(tables, plot(profiles, best, laws, budget, measured))
    return 0


if __name__ == "__main__":
    run(main)
