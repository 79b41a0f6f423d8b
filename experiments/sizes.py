"""Model sizes at equal tokens and at equal time, and what little text does to a large model.

python experiments/sizes.py --quick
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study
from study import Study, mean, spread

from config import run
from plots import BLUE, GREEN, ORANGE

SIZES: dict[bool, dict[str, dict[str, Any]]] = {
    True: {
        "2 x 64": {"n_layer": 2, "n_embd": 64},
        "3 x 128": {"n_layer": 3, "n_embd": 128},
        "4 x 192": {"n_layer": 4, "n_embd": 192},
    },
    False: {name: {"preset": name} for name in ("tiny", "small", "medium")},
}
QUICK = {"preset": "tiny", "block_size": 96, "batch_size": 16, "max_steps": 300, "lr_max": 3e-3}
QUICK |= {"compile": False}
FULL = {"block_size": 256, "batch_size": 64, "max_steps": 5000, "dropout": 0.1}
SHARES = {"a tenth": 0.1, "a third": 1 / 3, "all": 1.0}
EVALUATIONS = 9  # of each run


def equal_tokens(this: Study, base: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each size, as many steps each."""
    sizes = SIZES[this.config.quick].items()
    return {name: study.with_seeds(this, f"{name}-tokens", base | size) for name, size in sizes}


def equal_time(
    this: Study, base: dict[str, Any], timed: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each size in the time that the middle one took for equal tokens. The numbers of
    steps are written down, so that they stay when the study is called again."""
    note = this.folder / "steps.json"
    if not note.exists():
        ms = {name: min(r["ms_per_step"] for r in runs) for name, runs in timed.items()}
        middle = list(ms.values())[1]
        steps = {name: max(20, round(base["max_steps"] * middle / m)) for name, m in ms.items()}
        study.write_json(note, steps)
    steps = json.loads(note.read_text())
    return {
        name: study.with_seeds(this, f"{name}-time", evaluated(base | size, steps[name]))
        for name, size in SIZES[this.config.quick].items()
    }


def little_text(this: Study, base: dict[str, Any]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The middle model on a part of the text, with dropout and without, three times as long."""
    base = evaluated(base, 3 * base["max_steps"])
    size = list(SIZES[this.config.quick].values())[1]
    return {
        (name, dropout): study.with_seeds(
            this, f"{name}-dropout{dropout}", base | size | {"dropout": dropout}, share
        )
        for name, share in SHARES.items()
        for dropout in (0.0, 0.2)
    }


def evaluated(flags: dict[str, Any], steps: int) -> dict[str, Any]:
    """The flags with so many steps, evaluated now and then."""
    return flags | {"max_steps": steps, "eval_every": max(1, steps // EVALUATIONS)}


def draw(tokens: dict, time: dict, text: dict) -> Any:
    """Loss over parameters; loss over the steps, by share of the text and dropout."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for runs, color, label in ((tokens, BLUE, "equal tokens"), (time, ORANGE, "equal time")):
        params = [r[0]["params"] / 1e6 for r in runs.values()]
        losses = [[one["val"] for one in r] for r in runs.values()]
        left.plot(params, [mean(x) for x in losses], "-", color=color, label=label)
        for x, values in zip(params, losses, strict=True):
            left.plot([x] * len(values), values, "o", color=color, alpha=0.5)
    left.set(xscale="log", xlabel="million parameters", ylabel="validation loss")
    left.set_title("Size")
    left.legend()
    for (name, dropout), runs in text.items():
        color = dict(zip(SHARES, (ORANGE, GREEN, BLUE), strict=True))[name]
        log = runs[0]["log"][1:]
        label = f"{name} of the text" + (f", dropout {dropout}" if dropout else "")
        style = "--" if dropout else "-"
        right.plot(
            [r["step"] for r in log], [r["val"] for r in log], style, color=color, label=label
        )
    right.set(xlabel="step", ylabel="validation loss", title="Little text, one seed")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    this = study.begin("sizes", argv, __doc__)
    base = QUICK if this.config.quick else FULL
    base = evaluated(base, base["max_steps"])
    tokens = equal_tokens(this, base)
    time = equal_time(this, base, tokens)
    text = little_text(this, base)
    sizes = []
    for way, groups in (("tokens", tokens), ("time", time)):
        for name, runs in groups.items():
            losses = [r["val"] for r in runs]
            row = {"equal": way, "size": name, "parameters": runs[0]["params"]}
            row |= {"steps": runs[0]["flags"]["max_steps"]}
            row |= {"seconds": round(mean([r["seconds"] for r in runs]), 1)}
            sizes.append(row | {"validation loss": mean(losses), "spread": spread(losses)})
    overfitting = []
    for (name, dropout), runs in text.items():
        best, last = ([pick(r) for r in runs] for pick in (lambda r: r["val"], last_loss))
        row = {"text": name, "dropout": dropout, "best loss": mean(best), "spread": spread(best)}
        steps = [min(r["log"], key=lambda record: record["val"])["step"] for r in runs]
        row |= {"at step": round(mean(steps)), "loss at the end": mean(last)}
        row["training loss at the end"] = mean([r["log"][-1]["train"] for r in runs])
        overfitting.append(row)
    tables = {"Sizes": sizes, "Overfitting": overfitting}
    return study.finish(this, tables, draw(tokens, time, text))


def last_loss(result: dict[str, Any]) -> float:
    """The validation loss of a run's last evaluation."""
    return result["log"][-1]["val"]


if __name__ == "__main__":
    run(main)
