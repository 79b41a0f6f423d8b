"""What do temperature, top-k and top-p do to samples, and when in training do they become words?

python experiments/sampling.py --quick
python experiments/sampling.py checkpoints/mine/best.pt    a model of yours, and the ckpt_*.pt
                                                           beside it, which --save_every keeps

Each knob is turned alone, the others off. Measured are the entropy of the distributions that the
tokens are drawn from; the surprise, minus the mean log-probability of the tokens under the model
as it is; distinct-1 and distinct-2, the share of different tokens and pairs among all (Li et al.
2016). The validation text's surprise and distinct-n stand beside: what people write is neither the
likeliest nor the most varied (Holtzman et al. 2020).
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study
from study import Study, mean, spread

import evaluate
import utils
from config import SampleConfig, UserError, run, setting
from corpora import load_corpus
from generate import sample_text
from model import GPT
from play import distinct, measure
from plots import BLACK, BLUE, GREEN, ORANGE
from tokenizer import Tokenizer

KNOBS: dict[str, tuple[float, ...]] = {
    "temperature": (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5),
    "top_k": (1, 2, 4, 8, 16, 32, 64),
    "top_p": (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0),
}
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
QUICK: dict[str, Any] = {
    "run": {"preset": "quick", "max_steps": 640, "eval_every": 160, "save_every": 80},
    "samples": {"num_samples": 8, "max_new_tokens": 250},  # of each seed
}
FULL: dict[str, Any] = {
    "run": {"preset": "medium", "save_every": 500},
    "samples": {"num_samples": 32, "max_new_tokens": 500},
}
MEASURES = ("entropy", "surprise", "distinct-1", "distinct-2")


@dataclass
class SamplingConfig:
    """What is sampled from, the size of the study and its place."""

    checkpoint: str = setting("", "default: one that is trained for it", positional=True)
    quick: bool = setting(False, "minutes on two cores; else the full size, for a GPU")
    seeds: int = setting(3, "of the sampling, which tell what is chance", low=1)
    data: str = setting("", "the text; default: the checkpoint's, else shakespeare")
    out_dir: str = setting("checkpoints/studies", "folder of the run, which is kept")
    results: str = setting("experiments/results", "folder of the tables and pictures")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is")


def find_checkpoint(this: Study, size: dict[str, Any]) -> Path:
    """The checkpoint that was given, or the best one of a run made for the study."""
    if this.config.checkpoint:
        return Path(this.config.checkpoint)
    this.config.data = this.config.data or "shakespeare"
    study.make_run(this, "model", size["run"] | {"seed": 1})
    return this.folder / "model" / "best.pt"


# --- the knobs


def sweep(
    model: GPT, tokenizer: Tokenizer, samples: dict[str, int], seeds: int
) -> dict[str, list[dict[str, Any]]]:
    """What each value of each knob gives: {knob: [{"value", measure: [of each seed]}]}."""
    found: dict[str, list[dict[str, Any]]] = {}
    for knob, values in KNOBS.items():
        found[knob] = []
        for value in values:
            settings = SampleConfig(**samples, **(OFF | {knob: value}))
            each = [measure(model, tokenizer, replace(settings, seed=s)) for s in range(seeds)]
            row: dict[str, Any] = {"value": value}
            row |= {name: [one[name] for one in each] for name in each[0]}
            row["surprise"] = [-p for p in row.pop("log-probability")]
            found[knob].append(row)
    return found


def of_people(ids: np.ndarray, surprise: float, samples: dict[str, int]) -> dict[str, float]:
    """The measures of the validation text, for distinct-n in as many pieces as are sampled."""
    n, length = samples["num_samples"], samples["max_new_tokens"]
    starts = utils.even_starts(len(ids), length, n)
    pieces = [ids[start : start + length].tolist() for start in starts]
    return {"surprise": surprise} | {f"distinct-{k}": distinct(pieces, k) for k in (1, 2)}


def knob_rows(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The table of the knobs: means, each with its spread over the seeds."""
    rows = []
    for knob, values in found.items():
        for one in values:
            row = {"knob": knob, "value": f"{one['value']:g}"}
            for name in MEASURES:
                row |= {name: mean(one[name]), f"spread of {name}": spread(one[name])}
            rows.append(row)
    return rows


# --- the checkpoints


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; an apostrophe may stand inside.

    >>> words_of("ROMEO:\\nIt's 3 o'clock--'tis late")
    ['romeo', "it's", "o'clock", 'tis', 'late']
    """
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower())


def share_known(texts: list[str], known: set[str]) -> float:
    """The share of the words of some texts that are known. The last of each may be cut off, and is
    left out; 0 where there is none.

    >>> share_known(["to be or nto to b"], {"to", "be", "or"})
    0.8
    """
    words = [word for text in texts for word in words_of(text)[:-1]]
    return sum(word in known for word in words) / max(1, len(words))


def loss_of(model: GPT, corpus: utils.Corpus, state: dict[str, Any]) -> float:
    """The mean loss of a checkpoint's model over the validation split, in nats a token."""
    doc_mask = bool(state["train_config"].get("doc_mask")) and corpus.separator is not None
    settings = evaluate.EvaluateConfig(precision="float32")
    return evaluate.score(model, corpus, settings, doc_mask)["loss"]


def judge(
    this: Study, path: Path, corpus: utils.Corpus, known: set[str], samples: dict[str, int]
) -> dict[str, Any]:
    """How good a checkpoint is: its loss over the validation split, and of its samples, at the
    usual temperature of 0.8 and with each seed, the share of known words and distinct-2; a line."""
    model, tokenizer, state = utils.load_checkpoint(path, this.device)
    texts = [
        sample_text(model, tokenizer, SampleConfig(**samples, seed=seed))
        for seed in range(this.config.seeds)
    ]
    ids = [[tokenizer.encode(text).tolist() for text in of_seed] for of_seed in texts]
    return {
        "step": state["step"],
        "loss": loss_of(model, corpus, state),
        "known": [share_known(of_seed, known) for of_seed in texts],
        "distinct-2": [distinct(of_seed, 2) for of_seed in ids],
        "line": next((line for line in texts[0][0].splitlines() if line.strip()), ""),
    }


def checkpoint_rows(judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the checkpoints."""
    return [
        {
            "step": one["step"],
            "validation loss": one["loss"],
            "words of the training text": mean(one["known"]),
            "spread of words": spread(one["known"]),
            "distinct-2": mean(one["distinct-2"]),
            "spread of distinct-2": spread(one["distinct-2"]),
            "first line of a sample": one["line"].replace("|", "\\|"),
        }
        for one in judged
    ]


# --- picture


def band(axes: Any, x: list[Any], values: list[list[float]], color: str, label: str) -> None:
    """A line through the means of some seeds, in a band from the least to the most."""
    axes.plot(x, [mean(v) for v in values], ".-", color=color, label=label)
    least, most = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(x, least, most, color=color, alpha=0.25)


def draw(
    found: dict[str, list[dict[str, Any]]], people: dict[str, float], judged: list[dict[str, Any]]
) -> Any:
    """A column for each knob, the measures in nats above, the shares below, the validation text's
    dotted; and one for the checkpoints."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    panels = figure.subplots(2, 4, sharex="col")
    colors = {"entropy": BLUE, "surprise": ORANGE, "distinct-1": BLUE, "distinct-2": ORANGE}
    for column, (knob, rows) in enumerate(found.items()):
        x = [row["value"] for row in rows]
        for name, color in colors.items():
            axes = panels[int(name.startswith("distinct")), column]
            band(axes, x, [row[name] for row in rows], color, name)
            if name in people:
                axes.axhline(people[name], color=color, linestyle=":")
        panels[0, column].set_title(knob.replace("_", "-"))
        panels[1, column].set_xlabel(knob.replace("_", "-"))
        if knob == "top_k":
            panels[1, column].set_xscale("log", base=2)
            panels[1, column].set_xticks(x, [f"{k:g}" for k in x])
    steps = [one["step"] for one in judged]
    top, bottom = panels[:, 3]
    top.plot(steps, [one["loss"] for one in judged], ".-", color=BLACK, label="validation loss")
    band(bottom, steps, [one["known"] for one in judged], GREEN, "words of the training text")
    band(bottom, steps, [one["distinct-2"] for one in judged], ORANGE, "distinct-2")
    top.set_title("checkpoints, temperature 0.8")
    bottom.set_xlabel("step")
    panels[0, 0].set_ylabel("nats a token")
    panels[1, 0].set_ylabel("share; dotted: of the validation text")
    bottom.set_ylim(0, 1)
    for axes in panels[:, [0, 3]].flat:
        axes.legend()
    bottom.legend(loc="center right")
    for row, last in ((0, 3), (1, 3)):  # the knobs of a row on one scale
        ends = [axes.get_ylim() for axes in panels[row, :last]]
        for axes in panels[row, :last]:
            axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    this = study.begin("sampling", argv, __doc__, SamplingConfig)
    size = QUICK if this.config.quick else FULL
    path = find_checkpoint(this, size)
    model, tokenizer, state = utils.load_checkpoint(path, this.device)
    trained = state["train_config"]
    data = this.config.data or trained["data"]
    tokenizer, corpus = load_corpus(data, trained["tokenizer"], 0, tokenizer)
    if corpus.info["sha256"] != state["corpus"]["sha256"]:
        raise UserError(f"{data} is not what {path} was trained on: name its text with --data")
    known = set(words_of(tokenizer.decode(corpus.train_ids.tolist())))
    checkpoints = sorted(path.parent.glob("ckpt_*.pt"))
    if not checkpoints:
        print(f"no ckpt_*.pt beside {path}, which --save_every keeps: it stands alone")
    samples = size["samples"]
    judged = [judge(this, each, corpus, known, samples) for each in checkpoints or [path]]
    found = sweep(model, tokenizer, samples, this.config.seeds)
    people = of_people(corpus.val_ids, loss_of(model, corpus, state), samples)
    tables = {
        "Knobs: each turned alone": knob_rows(found),
        "Checkpoints of the run": checkpoint_rows(judged),
        "Validation text": [people],
    }
    return study.finish(this, tables, draw(found, people, judged))


if __name__ == "__main__":
    run(main)
