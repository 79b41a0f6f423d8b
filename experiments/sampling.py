"""What do temperature, top-k and top-p do to samples, and when in training do samples become words?

    python -m experiments.sampling --quick
    python -m experiments.sampling checkpoints/mine/best.pt

The second form uses a model of yours, and the ckpt_*.pt next to it, which --save_every keeps. By
default --data is the text that the model was trained on.

Each sampling setting is varied alone, with the others off. Measured are the entropy of the
distributions that the tokens are sampled from; the surprise, which is minus the mean
log-probability of the tokens at temperature 1; and distinct-1 and distinct-2, the distinct tokens
and token pairs as a share of all (Li et al. 2016). The validation text is shown for comparison:
human text is neither the most probable nor the most varied text (Holtzman et al. 2020).
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import SampleConfig, UserError, setting
from corpus.load import Corpus, load_corpus
from evaluate import EvaluateConfig, evaluate_split
from experiments.comparison import Row, margin, mean
from experiments.provenance import run_record
from experiments.study import Study, make_run, parse_study, write_results
from explore import distinct_ngrams, sample_statistics
from generate import sample_text
from model import GPT
from system.errors import run
from tokenizer import Tokenizer
from training.setup import Flags
from utils import TokenStream, even_starts, load_checkpoint
from viz.runs import BLACK, BLUE, GREEN, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Sweep = dict[str, list[dict[str, Any]]]  # see `sweep`

SWEEPS: dict[str, tuple[float, ...]] = {
    "temperature": (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5),
    "top_k": (1, 2, 4, 8, 16, 32, 64),
    "top_p": (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0),
}
OFF: Flags = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
STATISTICS = ("entropy", "surprise", "distinct-1", "distinct-2")


@dataclass
class Plan:
    """What is trained and sampled."""

    flags: Flags  # of the run
    num_samples: int  # per seed
    length: int  # of a sample, in tokens


QUICK = Plan({"preset": "quick", "max_steps": 640, "eval_every": 160, "save_every": 80}, 8, 250)
FULL = Plan({"preset": "medium", "save_every": 500}, 32, 500)


@dataclass
class SamplingConfig:
    """Settings of this study only."""

    checkpoint: str = setting("", "default: train a model for this study", positional=True)


def find_checkpoint(study: Study, plan: Plan) -> Path:
    """The checkpoint given by the user, or the best one of a run made for the study."""
    if study.options.checkpoint:
        return Path(study.options.checkpoint)
    study.config.data = study.config.data or "shakespeare"
    study.n_runs = 1
    make_run(study, "model", plan.flags | {"seed": 1})
    return study.folder / "model" / "best.pt"


def check_unchanged(corpus: Corpus, data: str, path: Path, state: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint was trained on another corpus."""
    if corpus.info["sha256"] != state["corpus"]["sha256"]:
        raise UserError(f"{path} was not trained on {data}: give --data its text")


def sample_config(plan: Plan, **settings: Any) -> SampleConfig:
    return SampleConfig(num_samples=plan.num_samples, max_new_tokens=plan.length, **settings)


def validation_loss(model: GPT, corpus: Corpus, state: dict[str, Any]) -> float:
    """The mean loss over the validation split, in nats per token."""
    doc_mask = bool(state["train_config"].get("doc_mask"))
    return evaluate_split(model, corpus, EvaluateConfig(precision="float32"), doc_mask)["loss"]


# --- sampling settings


def sweep(model: GPT, tokenizer: Tokenizer, plan: Plan, n_seeds: int) -> Sweep:
    """The statistics of samples for each value of each sampling setting: {setting: a list of
    {"value": value, statistic: [one per seed]}}."""
    found: Sweep = {}
    for name, values in SWEEPS.items():
        found[name] = []
        for value in values:
            config = sample_config(plan, **(OFF | {name: value}))
            by_seed = [
                sample_statistics(model, tokenizer, replace(config, seed=s)) for s in range(n_seeds)
            ]
            point: dict[str, Any] = {"value": value}
            point |= {key: [each[key] for each in by_seed] for key in by_seed[0]}
            point["surprise"] = [-p for p in point.pop("log-probability")]
            found[name].append(point)
    return found


def validation_statistics(ids: TokenStream, loss: float, plan: Plan) -> dict[str, float]:
    """The statistics of the validation text; distinct-n of as many pieces as are sampled."""
    starts = even_starts(len(ids), plan.length, plan.num_samples)
    pieces = [ids[start : start + plan.length].tolist() for start in starts]
    return {"surprise": loss} | {f"distinct-{n}": distinct_ngrams(pieces, n) for n in (1, 2)}


def sweep_rows(found: Sweep) -> list[Row]:
    """The means over the seeds, each with the half width of its confidence interval."""
    rows = []
    for name, points in found.items():
        for point in points:
            row: Row = {"setting": name, "value": f"{point['value']:g}"}
            for key in STATISTICS:
                row |= {key: mean(point[key]), f"95% margin of {key}": margin(point[key])}
            rows.append(row)
    return rows


# --- checkpoints


def split_words(text: str) -> list[str]:
    """The words of a text in lower case; they may contain apostrophes.

    >>> split_words("ROMEO:\\nIt's 3 o'clock--'tis late")
    ['romeo', "it's", "o'clock", 'tis', 'late']
    """
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower())


def known_share(texts: list[str], known: set[str]) -> float:
    """The share of the words in the texts that are known; 0 if there are no words. The last word of
    each text is ignored, as it may be incomplete.

    >>> known_share(["to be or nto to b"], {"to", "be", "or"})
    0.8
    """
    words = [word for text in texts for word in split_words(text)[:-1]]
    return sum(word in known for word in words) / max(1, len(words))


def evaluate_checkpoint(
    study: Study, path: Path, corpus: Corpus, known: set[str], plan: Plan
) -> dict[str, Any]:
    """The step of a checkpoint, its validation loss, and of its samples at temperature 0.8 the
    share of known words and distinct-2, each with every seed, and a line as an example."""
    model, tokenizer, state = load_checkpoint(path, study.device)
    texts = [
        sample_text(model, tokenizer, sample_config(plan, seed=seed))
        for seed in range(study.config.seeds)
    ]
    ids = [[tokenizer.encode(text).tolist() for text in by_seed] for by_seed in texts]
    return {
        "step": state["step"],
        "loss": validation_loss(model, corpus, state),
        "known": [known_share(by_seed, known) for by_seed in texts],
        "distinct-2": [distinct_ngrams(by_seed, 2) for by_seed in ids],
        "line": next((line for line in texts[0][0].splitlines() if line.strip()), ""),
    }


def checkpoint_rows(evaluated: list[dict[str, Any]]) -> list[Row]:
    return [
        {
            "step": each["step"],
            "validation loss": each["loss"],
            "words of the training text": mean(each["known"]),
            "95% margin of words": margin(each["known"]),
            "distinct-2": mean(each["distinct-2"]),
            "95% margin of distinct-2": margin(each["distinct-2"]),
            "first line of a sample": each["line"].replace("|", "\\|"),
        }
        for each in evaluated
    ]


# --- plots


def plot_band(
    axes: "Axes", x: list[Any], values: list[list[float]], color: str, label: str
) -> None:
    """A line through the mean over the seeds, in a band from the lowest to the highest."""
    axes.plot(x, [mean(v) for v in values], ".-", color=color, label=label)
    lowest, highest = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(x, lowest, highest, color=color, alpha=0.25)


def plot_sweeps(panels: Any, found: Sweep, validation: dict[str, float]) -> None:
    """A column per sampling setting: the statistics in nats above, the shares below; dotted lines
    for the validation text. panels: an array of axes, (2, settings)."""
    colors = {"entropy": BLUE, "surprise": ORANGE, "distinct-1": BLUE, "distinct-2": ORANGE}
    for (name, points), column in zip(found.items(), panels.T, strict=False):
        x = [point["value"] for point in points]
        for key, color in colors.items():
            axes = column[int(key.startswith("distinct"))]
            plot_band(axes, x, [point[key] for point in points], color, key)
            if key in validation:
                axes.axhline(validation[key], color=color, linestyle=":")
        top, bottom = column
        top.set_title(name.replace("_", "-"))
        bottom.set_xlabel(name.replace("_", "-"))
        if name == "top_k":
            bottom.set_xscale("log", base=2)
            bottom.set_xticks(x, [f"{k:g}" for k in x])
    for row in panels:  # one scale per row
        limits = [axes.get_ylim() for axes in row]
        for axes in row:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    panels[0, 0].set_ylabel("nats per token")
    panels[1, 0].set_ylabel("share; dotted: validation text")
    for axes in panels[:, 0]:
        axes.legend()


def plot_checkpoints(panels: Any, evaluated: list[dict[str, Any]]) -> None:
    """The validation loss, above, and the statistics of samples over the steps of a run. panels:
    two axes."""
    top, bottom = panels
    steps = [each["step"] for each in evaluated]
    top.plot(steps, [e["loss"] for e in evaluated], ".-", color=BLACK, label="validation loss")
    plot_band(bottom, steps, [e["known"] for e in evaluated], GREEN, "words of the training text")
    plot_band(bottom, steps, [e["distinct-2"] for e in evaluated], ORANGE, "distinct-2")
    top.set_title("checkpoints, temperature 0.8")
    bottom.set_xlabel("step")
    bottom.set_ylim(0, 1)
    top.legend()
    bottom.legend(loc="center right")


def plot(found: Sweep, validation: dict[str, float], evaluated: list[dict[str, Any]]) -> "Figure":
    figure = new_figure(14, 6.5)
    panels = figure.subplots(2, 4, sharex="col")
    plot_sweeps(panels[:, :3], found, validation)
    plot_checkpoints(panels[:, 3], evaluated)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    study = parse_study("sampling", argv, __doc__, SamplingConfig, data="")
    plan = QUICK if study.config.quick else FULL
    path = find_checkpoint(study, plan)
    model, tokenizer, state = load_checkpoint(path, study.device)
    data = study.config.data or state["train_config"]["data"]
    tokenizer, corpus = load_corpus(data, tokenizer=tokenizer)
    check_unchanged(corpus, data, path, state)
    study.records.append(run_record(corpus.info, "float32", study.device))  # of the samples
    known = set(split_words(tokenizer.decode(corpus.train_ids[:].tolist())))
    checkpoints = sorted(path.parent.glob("ckpt_*.pt"))
    if not checkpoints:
        print(f"there are no ckpt_*.pt next to {path}, which --save_every keeps: using it alone")
    evaluated = [
        evaluate_checkpoint(study, each, corpus, known, plan) for each in checkpoints or [path]
    ]
    found = sweep(model, tokenizer, plan, study.config.seeds)
    loss = validation_loss(model, corpus, state)
    validation = validation_statistics(corpus.val_ids, loss, plan)
    tables = {
        "Sampling settings, each varied alone": sweep_rows(found),
        "Checkpoints of the run": checkpoint_rows(evaluated),
        "Validation text": [validation],
    }
    write_results(study, tables, plot(found, validation, evaluated))
    return 0


if __name__ == "__main__":
    run(main)
