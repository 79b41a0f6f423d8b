"""What do temperature, top-k and top-p do to samples, and when in training do samples become words?

    python -m experiments.sampling --quick

Each sampling setting is varied alone, with the others off. Measured are the statistics of
explore.py; the surprise is minus the mean log-probability. The validation text is shown for
comparison: human text is neither the most probable nor the most varied (Holtzman et al. 2020).
Samples are also compared along a run, and along one that overfits: on little text, read often.
"""

import re
from dataclasses import replace
from typing import Any
from system.start import run

import torch
from matplotlib.figure import Figure

from config import SampleConfig
from corpus.corpus import Corpus
from evaluate import EvaluateConfig, evaluate_split
from experiments.comparison import Row, mean, mean_columns, plot_band
from experiments.study import Study, parse_study
from experiments.timing import run_record
from explore import distinct_ngrams, sample_with_statistics
from generate import sample_text
from model import GPT
from tokenizer import Tokenizer
from training.setup import Flags
from utils import even_starts, load_checkpoint
from viz.curve import BLACK, BLUE, GREEN, ORANGE, new_figure

Point = dict[str, Any]  # column -> a value, or a list with one per seed

SWEEPS: dict[str, tuple[float, ...]] = {
    "temperature": (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5),
    "top_k": (1, 2, 4, 8, 16, 32, 64),
    "top_p": (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0),
}
OFF: Flags = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
STATISTICS = ("entropy", "surprise", "distinct-1", "distinct-2")
WORDS = "words of the training text"  # a column: their share of the words of samples

QUICK: Flags = {"preset": "quick", "max_steps": 640, "eval_every": 160, "save_every": 80}
QUICK_OVERFITTED: Flags = QUICK | {"max_steps": 1500, "eval_every": 150, "save_every": 150}
FULL: Flags = {"preset": "medium", "save_every": 500}
SAMPLES: dict[bool, Flags] = {  # by --quick
    True: {"num_samples": 8, "max_new_tokens": 250},
    False: {"num_samples": 32, "max_new_tokens": 500},
}
SHARE = 0.05  # of the text is what the run that overfits reads


def split_loss(model: GPT, corpus: Corpus, split: str) -> float:
    """The mean loss over the validation split, or over as much of the training split."""
    corpus = replace(corpus, train_ids=corpus.train_ids[: len(corpus.val_ids)])
    config = EvaluateConfig(split=split, precision="float32")
    return evaluate_split(model, corpus, config, doc_mask=False)["loss"]


def table_row(point: Point) -> Row:
    """A point with the mean and the margin of each list."""
    row: Row = {}
    for name, value in point.items():
        if isinstance(value, list):
            row |= mean_columns(name, value, f"95% margin of {name.split()[0]}")
        else:
            row[name] = value
    return row


def sweep(study: Study, model: GPT, tokenizer: Tokenizer) -> list[Point]:
    """The statistics of samples for each value of each sampling setting."""
    points = []
    for name, value in [(name, value) for name, values in SWEEPS.items() for value in values]:
        settings = SAMPLES[study.config.quick] | OFF | {name: value}
        by_seed = [
            sample_with_statistics(model, tokenizer, SampleConfig(**settings, seed=seed))[1]
            for seed in range(study.config.seeds)
        ]
        for found in by_seed:
            found["surprise"] = -found["log-probability"]
        point: Point = {"setting": name, "value": f"{value:g}"}
        points.append(point | {key: [found[key] for found in by_seed] for key in STATISTICS})
    return points


def validation_statistics(
    study: Study, model: GPT, tokenizer: Tokenizer, corpus: Corpus
) -> dict[str, float]:
    """The statistics of the validation text, of as many pieces as are sampled."""
    ids, train_text = corpus.val_ids, tokenizer.decode(corpus.train_ids[:].tolist())
    samples = SAMPLES[study.config.quick]
    starts = even_starts(len(ids), samples["max_new_tokens"], samples["num_samples"])
    pieces = [ids[start : start + samples["max_new_tokens"]].tolist() for start in starts]
    distinct = {f"distinct-{n}": distinct_ngrams(pieces, n) for n in (1, 2)}
    copied = [longest_copy(tokenizer.decode(piece), train_text) for piece in pieces]
    surprise = split_loss(model, corpus, "val")
    return {"surprise": surprise} | distinct | {"characters copied": mean(copied)}


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


def longest_copy(text: str, source: str) -> int:
    """The length of the longest passage of a text that occurs in the source.

    >>> longest_copy("to be or so", "not to be is to be")  # "to be "
    6
    """
    longest = 0
    for start in range(len(text)):
        while text[start : start + longest + 1] in source and start + longest < len(text):
            longest += 1
    return longest


def evaluate_models(study: Study, name: str, tokenizer: Tokenizer, corpus: Corpus) -> list[Point]:
    """For the untrained model and each checkpoint of a run: the losses, and statistics of samples
    with each seed at temperature 0.8."""
    train_text = tokenizer.decode(corpus.train_ids[:].tolist())
    known = set(split_words(train_text))
    samples = SAMPLES[study.config.quick]
    paths = sorted((study.folder / name).glob("ckpt_*.pt"))
    points = []
    for i, path in enumerate([paths[0], *paths]):
        model, _, state = load_checkpoint(path, study.device)
        step = state["step"]
        if i == 0:
            torch.manual_seed(state["train_config"]["seed"])
            step, model = 0, GPT(model.config).to(study.device).eval()
        texts = [
            sample_text(model, tokenizer, SampleConfig(**samples, seed=seed))
            for seed in range(study.config.seeds)
        ]
        ids = [[tokenizer.encode(text).tolist() for text in by_seed] for by_seed in texts]
        copied = [[longest_copy(text, train_text) for text in by_seed] for by_seed in texts]
        sample = texts[0][0].strip()[:100]
        points.append(
            {
                "step": step,
                "training loss": split_loss(model, corpus, "train"),
                "validation loss": split_loss(model, corpus, "val"),
                WORDS: [known_share(by_seed, known) for by_seed in texts],
                "distinct-2": [distinct_ngrams(by_seed, 2) for by_seed in ids],
                "characters copied": [mean(by_seed) for by_seed in copied],
                "beginning of a sample": sample.replace("\n", " / ").replace("|", "\\|"),
            }
        )
    return points


def plot(
    points: list[Point], validation: dict[str, float], evaluated: dict[str, list[Point]]
) -> Figure:
    """A column per sampling setting, then one per run with the losses above, samples below."""
    figure = new_figure(16, 6.5)
    parts: Any = figure.subfigures(1, 2, width_ratios=[len(SWEEPS), len(evaluated)])
    panels = parts[0].subplots(2, len(SWEEPS), sharex="col", sharey="row")
    for name, column in zip(SWEEPS, panels.T, strict=True):
        some = [point for point in points if point["setting"] == name]
        x = [float(point["value"]) for point in some]
        for i, key in enumerate(STATISTICS):
            axes, color = column[i // 2], (BLUE, ORANGE)[i % 2]
            plot_band(axes, x, [point[key] for point in some], ".-", color, key)
            if key in validation:
                axes.axhline(validation[key], color=color, linestyle=":")
        column[1].set_xlabel(name.replace("_", "-"))
        if name == "top_k":
            column[1].set_xscale("log", base=2)
            column[1].set_xticks(x, [f"{k:g}" for k in x])
    panels[0, 0].set_ylabel("nats per token; dotted: validation text")
    panels[1, 0].set_ylabel("share; dotted: validation text")

    panels = parts[1].subplots(2, len(evaluated), sharex="col")
    for (top, bottom), (title, some) in zip(panels.T, evaluated.items(), strict=True):
        steps = [point["step"] for point in some]
        for key, style in (("training loss", ".--"), ("validation loss", ".-")):
            top.plot(steps, [point[key] for point in some], style, color=BLACK, label=key)
        for key, color in ((WORDS, GREEN), ("distinct-2", ORANGE)):
            plot_band(bottom, steps, [point[key] for point in some], ".-", color, key)
        top.set_title(title)
        bottom.set(xlabel="step", ylim=(0, 1))
        bottom.legend(loc="center right", fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> int:
    study = parse_study("sampling", argv, __doc__)
    study.n_runs = 2
    flags, overfitted = (QUICK, QUICK_OVERFITTED) if study.config.quick else (FULL, FULL)
    study.make_run("model", flags | {"seed": 1})
    study.make_run("overfitted", overfitted | {"seed": 1}, SHARE)
    model, tokenizer, _ = load_checkpoint(study.folder / "model" / "best.pt", study.device)
    _, corpus = study.corpus(flags)
    study.records.append(run_record(corpus.info, "float32", study.device))  # of the samples
    points = sweep(study, model, tokenizer)
    validation = validation_statistics(study, model, tokenizer, corpus)
    part = replace(corpus, train_ids=corpus.train_ids[: round(len(corpus.train_ids) * SHARE)])
    overfitting = f"Overfitting, on {SHARE:.0%} of the text"
    evaluated = {
        "Checkpoints": evaluate_models(study, "model", tokenizer, corpus),
        overfitting: evaluate_models(study, "overfitted", tokenizer, part),
    }
    all_points = {"Sampling settings, each varied alone": points} | evaluated
    tables = {title: [table_row(point) for point in some] for title, some in all_points.items()}
    tables["Validation text"] = [validation]
    study.write_results(tables, plot(points, validation, evaluated))
    return 0


if __name__ == "__main__":
    run(main)
