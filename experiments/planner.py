"""The scaling law of --minutes: fit it to runs, and check its predictions on others.

    python -m experiments.planner

Trains models of the sizes of training/plan.py for different times on several texts, and fits the
constants of the law to the runs marked `fit`. All that the law knows about a text is the loss of a
pilot, a short run of the smallest model. It must then predict the runs marked `check`, which are
not used for the fit. Copy the constants that this prints to LAW in training/plan.py.
"""

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any
from system.start import run

import numpy as np
from matplotlib.figure import Figure
from scipy import optimize

from corpus.sources import find_sources
from experiments.comparison import Row, margin, mean
from experiments.study import Study, parse_study
from training.plan import SIZES, Law, Pilot, Run, block_params, settings, size_flags, step_tokens
from training.setup import Flags
from viz.curve import BLACK, COLORS, new_figure

BPE: Flags = {"tokenizer": "bpe", "bpe_vocab_size": 2000}
TEXTS: dict[str, Flags] = {
    "shakespeare": {},
    "shakespeare, BPE": BPE,
    "plays": {"data": "plays"},
    "plays, BPE": BPE | {"data": "plays"},
    "100 kB": {},  # the first 100 kB of shakespeare, in the folder of the study
}
# text, size (its number in SIZES), dropout, weight decay: steps of the runs to fit and to check
RUNS: dict[tuple[str, int, float, float], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("shakespeare", 0, 0, 0.1): ((150, 600), (2400,)),
    ("shakespeare", 1, 0, 0.1): ((100, 1600), (400,)),
    ("shakespeare", 2, 0, 0.1): ((100, 1200), (400,)),
    ("shakespeare", 2, 0.2, 0.1): ((400,), ()),
    ("shakespeare", 3, 0, 0.1): ((150,), (400,)),
    ("shakespeare, BPE", 0, 0, 0.1): ((150, 600), ()),
    ("shakespeare, BPE", 1, 0, 0.1): ((400, 1200), ()),
    ("shakespeare, BPE", 2, 0, 0.1): ((600,), (200,)),
    ("shakespeare, BPE", 2, 0.2, 0.1): ((600,), ()),
    ("shakespeare, BPE", 3, 0, 0.1): ((), (300,)),
    ("plays", 0, 0, 0.1): ((150, 600), ()),
    ("plays", 1, 0, 0.1): ((1600,), (400,)),
    ("plays", 2, 0, 0.1): ((400,), (1000,)),
    ("plays", 3, 0, 0.1): ((150,), ()),
    ("plays, BPE", 0, 0, 0.1): ((150, 600), ()),
    ("plays, BPE", 1, 0, 0.1): ((1200,), (400,)),
    ("plays, BPE", 2, 0, 0.1): ((400,), (900,)),
    ("plays, BPE", 3, 0, 0.1): ((150,), ()),
    ("100 kB", 0, 0, 0.1): ((75, 150, 300, 600, 1200), ()),
    ("100 kB", 1, 0, 0.1): ((75, 150, 600), (300,)),
    ("100 kB", 2, 0, 0.1): ((150, 300), (75,)),
    ("100 kB", 2, 0.2, 0.1): ((300,), (600,)),
    ("100 kB", 3, 0, 0.1): ((75,), (150,)),
    ("100 kB", 3, 0.2, 0.1): ((), (300,)),
    ("shakespeare", 4, 0, 0.1): ((60,), (150,)),
    ("shakespeare", 2, 0, 1.0): ((600,), (1600,)),
    ("shakespeare", 3, 0, 1.0): ((2000,), (1200,)),
    ("shakespeare, BPE", 2, 0, 1.0): ((600,), ()),
    ("shakespeare, BPE", 3, 0, 1.0): ((), (600,)),
    ("plays", 2, 0, 1.0): ((1000,), ()),
    ("100 kB", 2, 0, 1.0): ((300,), ()),
    ("100 kB", 2, 0.2, 1.0): ((600,), (300,)),
    ("100 kB", 3, 0.2, 1.0): ((600,), ()),
}
PILOTS = (150, 600)  # steps: of the plan for one minute and for longer times here
OVERFITTED = 0.1  # nats above the best loss: there, the weight of a run in the fit is a half
# Where the fit starts: constants of this order
START = (0.2, 0.2, 0.2, 0.3, 0.04, 0.01, 0.3, 0.35, 6.0, 0.03, 1.0)
PRIOR = 0.1  # nats that a constant costs that differs from these by a factor of e


def train_all(study: Study) -> list[Row]:
    """The table of all runs. Their checkpoints, which take gigabytes, are deleted."""
    short_text = study.folder / "short.txt"
    short_text.parent.mkdir(parents=True, exist_ok=True)
    short_text.write_bytes(find_sources([study.config.data])[0][0].read_bytes()[:100_000])
    study.n_runs = study.config.seeds * sum(len(n) for uses in RUNS.values() for n in uses)
    rows: list[Row] = []
    for seed, (key, uses) in itertools.product(range(1, study.config.seeds + 1), RUNS.items()):
        text, size, dropout, decay = key
        for use, steps in [("fit", n) for n in uses[0]] + [("check", n) for n in uses[1]]:
            flags = TEXTS[text] | {"dropout": dropout, "weight_decay": decay, "max_steps": steps}
            if text == "100 kB":
                flags["data"] = str(short_text)
            flags = size_flags(SIZES[size], flags) | {"eval_every": max(1, steps // 5)}
            name = f"{text}-{size}-{dropout}-{decay}-{steps}-{seed}"
            result = study.make_run(name, flags | {"seed": seed})
            for file in Path(result["flags"]["out_dir"]).glob("*.pt"):
                file.unlink()
            tokenizer, corpus = study.corpus(flags)
            gpt, config = settings(flags | {"vocab_size": tokenizer.vocab_size})
            last, best = result["log"][-1], min(record["val"] for record in result["log"])
            rows.append(
                {
                    "use": use,
                    "text": text,
                    "size": f"{gpt.n_layer} x {gpt.n_embd}",
                    "params": block_params(gpt),
                    "dropout": dropout,
                    "weight decay": decay,
                    "steps": steps,
                    "seed": seed,
                    "window": round(gpt.block_size * corpus.bytes_per_token, 1),
                    "epochs": round(steps * step_tokens(gpt, config) / len(corpus.train_ids), 2),
                    "unique": len(corpus.train_ids),
                    # at the end: if that is the best step, over the whole split
                    "loss": round(result["val"] if last["val"] == best else last["val"], 4),
                    "best": round(result["val"], 4),
                }
            )
    return rows


def run_of(row: Row) -> Run:
    size = (row["params"], row["steps"], row["epochs"], row["window"])
    return Run(*size, row["dropout"], row["weight decay"])


def pilots(rows: list[Row]) -> dict[tuple[str, float, float], Pilot]:
    smallest = min(row["params"] for row in rows)
    return {
        (row["text"], row["steps"], row["seed"]): Pilot(run_of(row), row["unique"], row["loss"])
        for row in rows
        if row["params"] == smallest and row["steps"] in PILOTS
    }


def pairs(rows: list[Row], use: str) -> list[tuple[Pilot, Row]]:
    """Each run with this use, after each shorter pilot on its text with the same seed."""
    return [
        (pilot, row)
        for (text, _, seed), pilot in pilots(rows).items()
        for row in rows
        if (row["use"], row["text"], row["seed"]) == (use, text, seed)
        if row["params"] > pilot.run.n_params or row["steps"] > pilot.run.steps
    ]


def error(pilot: Pilot, row: Row, law: Law) -> float:
    return pilot.predict(run_of(row), law) - row["loss"]


def fit(rows: list[Row]) -> Law:
    """The constants with the smallest squared error over all pairs of the runs for the fit. All
    constants are positive: the fit is over their logarithms, with a weak prior, because the runs
    hardly tell the effect of the size from that of the window. By how much a run overfits does not
    matter if it is much: such runs have a lower weight."""
    data = pairs(rows, "fit")
    excess = np.array([row["loss"] - row["best"] for _, row in data])
    weights = 1 / np.sqrt(1 + (excess / OVERFITTED) ** 2)

    def errors(logs: np.ndarray) -> np.ndarray:
        law = Law(*np.exp(logs).tolist())
        errors = weights * [error(pilot, row, law) for pilot, row in data]
        return np.append(errors, PRIOR * (logs - np.log(START)))

    start = np.log(START)
    logs = optimize.least_squares(errors, start, bounds=(start - 9, start + 9), xtol=1e-12).x
    return Law(*(float(f"{value:.4g}") for value in np.exp(logs)))


def prediction_rows(rows: list[Row], law: Law, use: str) -> list[Row]:
    """The runs with this use, and the errors predicted from each pilot: means over the seeds."""
    names = ("text", "size", "dropout", "weight decay", "steps", "epochs")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["use"] == use:
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    found = pilots(rows)
    table = []
    for key, group in groups.items():
        losses = [row["loss"] for row in group]
        cells = dict(zip(names, key, strict=True)) | {"steps": int(group[0]["steps"])}
        cells |= {"measured": mean(losses), "95% margin": margin(losses)}
        for steps in PILOTS:
            errors = [error(found[row["text"], steps, row["seed"]], row, law) for row in group]
            cells[f"error from {steps} steps"] = mean(errors)
            cells[f"95% margin, {steps} steps"] = margin(errors)
        table.append(cells)
    return table


def plot(rows: list[Row], law: Law) -> Figure:
    """The predicted loss over the measured one, relative to the pilot's."""
    figure = new_figure(6, 5)
    axes = figure.subplots()
    for text, color in zip(TEXTS, COLORS, strict=False):
        for use, marker in (("fit", "o"), ("check", "*")):
            points = [(row["loss"] / p.loss, p.predict(run_of(row), law) / p.loss)
                      for p, row in pairs(rows, use) if row["text"] == text]  # fmt: skip
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, marker, color=color, alpha=0.7, label=f"{text}, {use}")
    axes.plot([0.75, 1.15], [0.75, 1.15], color=BLACK, linewidth=1)
    axes.set(
        xlabel="measured loss / loss of the pilot", ylabel="predicted loss / loss of the pilot"
    )
    axes.legend(fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("planner", argv, __doc__)
    rows = train_all(study)
    law = fit(rows)
    tables = {
        "Runs": rows,
        "Check: runs that the law was not fitted to": prediction_rows(rows, law, "check"),
        "Fit: runs that the law was fitted to": prediction_rows(rows, law, "fit"),
        "Law": [asdict(law)],
    }
    study.write_results(tables, plot(rows, law))
    print(f"\nLAW = {law}")
    return 0


if __name__ == "__main__":
    run(main)
