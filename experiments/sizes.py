"""Model sizes at equal tokens and at equal time, and large models on little text.

python -m experiments.sizes --quick
"""

from system.start import run

from matplotlib.figure import Figure

from experiments.comparison import LOSS, Row, add_differences, margin, mean, mean_columns
from experiments.study import Runs, Study, kept, log_values, loss_columns, parse_study, val_losses
from training.setup import Flags
from viz.curve import BLUE, GREEN, ORANGE, new_figure

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


def equal_time(study: Study, base: Flags, timed: Runs) -> Runs:
    """Runs of each size that take as long as the middle size took at equal tokens. The numbers of
    steps are stored in steps.json, so that a resumed study uses the same ones."""
    ms = {name: min(result["ms_per_step"] for result in runs) for name, runs in timed.items()}
    _, middle, *_ = ms.values()
    steps = kept(
        study.folder / "steps.json",
        lambda: {n: max(MIN_STEPS, round(base["max_steps"] * middle / m)) for n, m in ms.items()},
    )
    return {
        name: study.with_seeds(f"{name}-time", with_evaluations(base | size, steps[name]))
        for name, size in SIZES[study.config.quick].items()
    }


def little_text(study: Study, base: Flags) -> Runs:
    """The middle size on a share of the text, with and without dropout, for three times as many
    steps. A variant is (amount of text, dropout)."""
    _, size, *_ = SIZES[study.config.quick].values()
    base = with_evaluations(base | size, 3 * base["max_steps"])
    return {
        (name, dropout): study.with_seeds(
            f"{name}-dropout{dropout}", base | {"dropout": dropout}, share
        )
        for name, share in SHARES.items()
        for dropout in DROPOUTS
    }


# --- tables and plots


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
    """A row per amount of text and dropout: the best loss, and the loss at the end. Differences are
    to the same text without dropout."""
    rows = []
    for (name, dropout), runs in text_runs.items():
        best_records = [min(result["log"], key=lambda record: record["val"]) for result in runs]
        rows.append(
            {
                "text": name,
                "dropout": dropout,
                **mean_columns("best loss", val_losses(runs)),
                "at step": round(mean([record["step"] for record in best_records])),
                "loss at the end": mean([result["log"][-1]["val"] for result in runs]),
                "training loss at the end": mean([result["log"][-1]["train"] for result in runs]),
            }
        )
    first = [i - i % len(DROPOUTS) for i in range(len(rows))]  # of each text
    return add_differences(rows, map(val_losses, text_runs.values()), first)


def plot(tokens: Runs, time: Runs, text_runs: Runs) -> Figure:
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    for group, color, label in ((tokens, BLUE, "equal tokens"), (time, ORANGE, "equal time")):
        params = [runs[0]["params"] / 1e6 for runs in group.values()]
        means = [mean(val_losses(runs)) for runs in group.values()]
        left.plot(params, means, "-", color=color, label=label)
        for x, losses in zip(params, map(val_losses, group.values()), strict=True):
            left.plot([x] * len(losses), losses, "o", color=color, alpha=0.5)
            left.errorbar(x, mean(losses), margin(losses), fmt="_", color=color, capsize=4)
    left.set(xscale="log", xlabel="parameters (millions)", ylabel=LOSS)
    left.set_title("Size: a dot per seed, bars: 95% interval")

    colors = dict(zip(SHARES, (ORANGE, GREEN, BLUE), strict=True))
    for (name, dropout), (result, *_) in text_runs.items():
        steps, losses = log_values(result, "step")[1:], log_values(result, "val")[1:]
        label = f"{name} of the text" + (f", dropout {dropout}" if dropout else "")
        right.plot(steps, losses, "--" if dropout else "-", color=colors[name], label=label)
    right.set(xlabel="step", ylabel=LOSS, title="Little text, one seed")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("sizes", argv, __doc__)
    sizes = SIZES[study.config.quick]
    study.n_runs = (2 * len(sizes) + len(DROPOUTS) * len(SHARES)) * study.config.seeds
    base = QUICK if study.config.quick else FULL
    base = with_evaluations(base, base["max_steps"])
    tokens = {n: study.with_seeds(f"{n}-tokens", base | size) for n, size in sizes.items()}
    time = equal_time(study, base, tokens)
    text_runs = little_text(study, base)
    tables = {
        "Sizes": size_rows("tokens", tokens) + size_rows("time", time),
        "Overfitting": overfitting_rows(text_runs),
    }
    study.write_results(tables, plot(tokens, time, text_runs))
    return 0


if __name__ == "__main__":
    run(main)
