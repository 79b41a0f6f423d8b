"""Model sizes at equal tokens and at equal time, and large models on little text.

python -m experiments.sizes --quick
"""

import json
from typing import TYPE_CHECKING

from experiments.comparison import Row, add_differences, margin, mean
from experiments.study import (
    Result,
    Study,
    loss_columns,
    parse_study,
    val_losses,
    with_seeds,
    write_json,
    write_results,
)
from system.errors import run
from training.setup import Flags
from viz.curve import BLUE, GREEN, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SizeRuns = dict[str, list[Result]]  # size -> a run per seed
TextRuns = dict[tuple[str, float], list[Result]]  # (amount of text, dropout) -> a run per seed

SIZES: dict[bool, dict[str, Flags]] = {  # by --quick; the second size is the reference
    True: {
        "2 x 64": {"n_layer": 2, "n_embd": 64},
        "3 x 128": {"n_layer": 3, "n_embd": 128},
        "4 x 192": {"n_layer": 4, "n_embd": 192},
    },
    False: {name: {"preset": name} for name in ("tiny", "small", "medium")},
}
QUICK: Flags = {"preset": "tiny", "block_size": 96, "batch_size": 16, "max_steps": 300}
QUICK |= {"lr_max": 3e-3, "compile": False}
FULL: Flags = {"block_size": 256, "batch_size": 64, "max_steps": 5000, "dropout": 0.1}
SHARES = {"a tenth": 0.1, "a third": 1 / 3, "all": 1.0}  # of the training text
DROPOUTS = (0.0, 0.2)
EVALUATIONS = 9  # per run
MIN_STEPS = 20  # of the largest model at equal time


def with_evaluations(flags: Flags, steps: int) -> Flags:
    """The flags for this many steps, with EVALUATIONS evaluations."""
    return flags | {"max_steps": steps, "eval_every": max(1, steps // EVALUATIONS)}


def equal_tokens(study: Study, base: Flags) -> SizeRuns:
    """Runs of each size with the same number of steps."""
    sizes = SIZES[study.config.quick].items()
    return {name: with_seeds(study, f"{name}-tokens", base | size) for name, size in sizes}


def equal_time(study: Study, base: Flags, timed: SizeRuns) -> SizeRuns:
    """Runs of each size that take as long as the middle size took at equal tokens. The numbers of
    steps are stored in steps.json, so that a resumed study uses the same ones."""
    file = study.folder / "steps.json"
    if not file.exists():
        ms = {name: min(result["ms_per_step"] for result in runs) for name, runs in timed.items()}
        middle = list(ms.values())[1]
        steps = {
            name: max(MIN_STEPS, round(base["max_steps"] * middle / m)) for name, m in ms.items()
        }
        write_json(file, steps)
    steps = json.loads(file.read_text())
    return {
        name: with_seeds(study, f"{name}-time", with_evaluations(base | size, steps[name]))
        for name, size in SIZES[study.config.quick].items()
    }


def little_text(study: Study, base: Flags) -> TextRuns:
    """The middle size on a share of the text, with and without dropout, for three times as many
    steps."""
    base = with_evaluations(base, 3 * base["max_steps"])
    size = list(SIZES[study.config.quick].values())[1]
    return {
        (name, dropout): with_seeds(
            study, f"{name}-dropout{dropout}", base | size | {"dropout": dropout}, share
        )
        for name, share in SHARES.items()
        for dropout in DROPOUTS
    }


# --- tables and plots


def size_rows(groups: dict[str, SizeRuns]) -> list[Row]:
    """A row per size for each group of runs, "tokens" and "time", by what is equal."""
    return [
        {
            "equal": equal,
            "size": name,
            "parameters": runs[0]["params"],
            "steps": runs[0]["flags"]["max_steps"],
            "seconds": round(mean([result["seconds"] for result in runs]), 1),
            **loss_columns(runs),
        }
        for equal, group in groups.items()
        for name, runs in group.items()
    ]


def overfitting_rows(text_runs: TextRuns) -> list[Row]:
    """A row per amount of text and dropout: the best loss, and the loss at the end. Differences are
    to the same text without dropout."""
    rows = []
    for (name, dropout), runs in text_runs.items():
        columns = loss_columns(runs)
        best_records = [min(result["log"], key=lambda record: record["val"]) for result in runs]
        rows.append(
            {
                "text": name,
                "dropout": dropout,
                "best loss": columns["validation loss"],
                "95% margin": columns["95% margin"],
                "at step": round(mean([record["step"] for record in best_records])),
                "loss at the end": mean([result["log"][-1]["val"] for result in runs]),
                "training loss at the end": mean([result["log"][-1]["train"] for result in runs]),
            }
        )
    first = [i - i % len(DROPOUTS) for i in range(len(rows))]  # of each text
    add_differences(rows, [val_losses(runs) for runs in text_runs.values()], first)
    return rows


def plot_sizes(axes: "Axes", tokens: SizeRuns, time: SizeRuns) -> None:
    """Loss over parameters, at equal tokens and at equal time."""
    for group, color, label in ((tokens, BLUE, "equal tokens"), (time, ORANGE, "equal time")):
        params = [runs[0]["params"] / 1e6 for runs in group.values()]
        means = [mean(val_losses(runs)) for runs in group.values()]
        axes.plot(params, means, "-", color=color, label=label)
        for x, runs in zip(params, group.values(), strict=True):
            axes.plot([x] * len(runs), val_losses(runs), "o", color=color, alpha=0.5)
            half = margin(val_losses(runs))
            axes.errorbar(x, mean(val_losses(runs)), half, fmt="_", color=color, capsize=4)
    axes.set(xscale="log", xlabel="parameters (millions)")
    axes.set(ylabel="validation loss (nats per token)")
    axes.set_title("Size: a dot per seed, bars: 95% interval")
    axes.legend()


def plot_overfitting(axes: "Axes", text_runs: TextRuns) -> None:
    """Loss over steps, by share of the text and dropout."""
    colors = dict(zip(SHARES, (ORANGE, GREEN, BLUE), strict=True))
    for (name, dropout), runs in text_runs.items():
        log = runs[0]["log"][1:]
        label = f"{name} of the text" + (f", dropout {dropout}" if dropout else "")
        axes.plot(
            [record["step"] for record in log],
            [record["val"] for record in log],
            "--" if dropout else "-",
            color=colors[name],
            label=label,
        )
    axes.set(
        xlabel="step", ylabel="validation loss (nats per token)", title="Little text, one seed"
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def plot(tokens: SizeRuns, time: SizeRuns, text_runs: TextRuns) -> "Figure":
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    plot_sizes(left, tokens, time)
    plot_overfitting(right, text_runs)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    study = parse_study("sizes", argv, __doc__)
    n_settings = 2 * len(SIZES[study.config.quick]) + len(DROPOUTS) * len(SHARES)
    study.n_runs = n_settings * study.config.seeds
    base = QUICK if study.config.quick else FULL
    base = with_evaluations(base, base["max_steps"])
    tokens = equal_tokens(study, base)
    time = equal_time(study, base, tokens)
    text_runs = little_text(study, base)
    tables = {
        "Sizes": size_rows({"tokens": tokens, "time": time}),
        "Overfitting": overfitting_rows(text_runs),
    }
    write_results(study, tables, plot(tokens, time, text_runs))
    return 0


if __name__ == "__main__":
    run(main)
