"""Model sizes at equal tokens and at equal time, and large models on little text.

python -m experiments.sizes
"""

import itertools
from system.start import run

from matplotlib.figure import Figure

from experiments.comparison import LOSS, Row, mean, plot_band, plot_curves
from experiments.study import Runs, compare, kept, loss_columns, parse_study, val_losses
from training.setup import Flags
from viz.curve import BLUE, ORANGE, new_figure

SIZES: dict[str, Flags] = {  # the second size is the reference
    "2 x 64": {"n_layer": 2, "n_embd": 64},
    "3 x 128": {"n_layer": 3, "n_embd": 128},
    "4 x 192": {"n_layer": 4, "n_embd": 192},
}
SHARED: Flags = {"preset": "tiny", "block_size": 96, "batch_size": 16, "max_steps": 300}
SHARED |= {"lr_max": 3e-3, "compile": False}
SHARES = {"a tenth": 0.1, "a third": 1 / 3, "all": 1.0}  # of the training text
DROPOUTS = (0.0, 0.2)
EVALUATIONS = 9  # per run
MIN_STEPS = 20  # of the largest model at equal time


def with_evaluations(flags: Flags, steps: int) -> Flags:
    """The flags for this many steps, with EVALUATIONS evaluations."""
    return flags | {"max_steps": steps, "eval_every": max(1, steps // EVALUATIONS)}


def size_rows(equal: str, group: Runs) -> list[Row]:
    """A row per size. equal: what is equal, "tokens" or "time"."""
    return [
        {
            "equal": equal,
            "size": name,
            "parameters": runs[0]["params"],
            "steps": runs[0]["flags"]["max_steps"],
            "seconds": round(mean([result["seconds"] for result in runs]), 1),
            **loss_columns(runs),
        }
        for name, runs in group.items()
    ]


def overfitting_rows(text_runs: Runs) -> list[Row]:
    """A row per amount of text and dropout; differences are to the same text without dropout."""

    def columns(variant: tuple[str, float]) -> Row:
        runs = text_runs[variant]
        return {
            "text": variant[0],
            "dropout": variant[1],
            "training loss at the end": mean([result["log"][-1]["train"] for result in runs]),
            "loss at the end": mean([result["log"][-1]["val"] for result in runs]),
        }

    first = [i - i % len(DROPOUTS) for i in range(len(text_runs))]  # of each text
    return compare(text_runs, columns, bases=first)


def plot(tokens: Runs, time: Runs, text_runs: Runs) -> Figure:
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    for group, color, label in ((tokens, BLUE, "equal tokens"), (time, ORANGE, "equal time")):
        params = [runs[0]["params"] / 1e6 for runs in group.values()]
        plot_band(left, params, list(map(val_losses, group.values())), "o-", color, label)
    left.set(xscale="log", xlabel="parameters (millions)", ylabel=LOSS)
    left.set_title("Size: mean, lowest and highest seed")

    labels = (f"{name} of the text, dropout {dropout}" for name, dropout in text_runs)
    plot_curves(right, dict(zip(labels, text_runs.values(), strict=True)))
    right.set_title("Little text: mean, lowest and highest seed")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("sizes", argv, __doc__)
    study.n_runs = (2 * len(SIZES) + len(DROPOUTS) * len(SHARES)) * study.config.seeds
    n_steps = SHARED["max_steps"]
    base = with_evaluations(SHARED, n_steps)
    tokens = {n: study.with_seeds(f"{n}-tokens", base | size) for n, size in SIZES.items()}

    ms = {name: min(result["ms_per_step"] for result in runs) for name, runs in tokens.items()}
    _, middle, *_ = SIZES  # all sizes get the time that it took
    steps = kept(
        study.folder / "steps.json",
        lambda: {n: max(MIN_STEPS, round(n_steps * ms[middle] / m)) for n, m in ms.items()},
    )
    time = {
        name: study.with_seeds(f"{name}-time", with_evaluations(base | size, steps[name]))
        for name, size in SIZES.items()
    }

    long = with_evaluations(base | SIZES[middle], 3 * n_steps)
    text_runs: Runs = {}  # by amount of text and dropout
    for (name, share), dropout in itertools.product(SHARES.items(), DROPOUTS):
        flags = long | {"dropout": dropout}
        runs = study.with_seeds(f"{name}-dropout{dropout}", flags, share)
        text_runs[name, dropout] = runs
    tables = {
        "Sizes": size_rows("tokens", tokens) + size_rows("time", time),
        "Overfitting": overfitting_rows(text_runs),
    }
    study.write_results(tables, plot(tokens, time, text_runs))
    return 0


if __name__ == "__main__":
    run(main)
