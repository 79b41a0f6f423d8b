"""Characters, byte pairs or GPT-2's tokens? Bits per byte of models trained for the same time.

python experiments/tokenization.py --quick

A token of a larger vocabulary stands for more text, so that a window reaches further and a step
reads more; but the matrix that scores the vocabulary grows, and a step takes longer. All models are
the same but for it. The time of a step is measured first, then each tokenizer gets as many steps as
fit into the same seconds, and the schedule ends with them. The steps are kept in steps.json beside
the runs, so that the study can go on where it was stopped.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study
from study import Study, mean, spread

import tokenizer as tokenizers
import train
from config import UserError, run, setting, train_settings
from corpora import is_dataset
from model import GPT
from plots import COLORS

QUICK: dict[str, Any] = {
    "run": {"preset": "quick", "eval_windows": 32},
    "vocabularies": (500, 2000),
    "seconds": 20.0,
}
FULL: dict[str, Any] = {
    "run": {"preset": "medium"},
    "vocabularies": (500, 2000, 8000),
    "seconds": 600.0,
}


@dataclass
class TokenizationConfig:
    """The size of the study and its place."""

    quick: bool = setting(False, "minutes on two cores; else the full size, for a GPU")
    seconds: float = setting(0.0, "of training for each run; 0: 20 when quick, else 600", low=0)
    seeds: int = setting(3, "runs of each kind, which tell what is chance", low=1)
    data: str = setting("plays", "the text, as for train.py")
    out_dir: str = setting("checkpoints/studies", "folder of the runs, which are kept")
    results: str = setting("experiments/results", "folder of the tables and pictures")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is")


def choices(vocabularies: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The tokenizers by name, as flags of train.py; GPT-2's where it can be had."""
    found: dict[str, dict[str, Any]] = {"characters": {"tokenizer": "char"}}
    for size in vocabularies:
        found[f"byte pairs, {size:,}"] = {"tokenizer": "bpe", "vocab_size": size}
    try:
        tokenizers.from_tiktoken("gpt2")
        found["GPT-2's"] = {"tokenizer": "gpt2"}
    except UserError as error:
        print(f"without GPT-2's tokenizer: {error}")
    return found


def corpus_with(this: Study, flags: dict[str, Any]) -> tuple[Any, Any]:
    """The tokenizer of these flags and the corpus in its tokens."""
    return study.corpus_of(this.config.data, flags["tokenizer"], flags.get("vocab_size", 0))


def step_seconds(this: Study, flags: dict[str, Any]) -> float:
    """The time of a training step, the median of three short spans, after the first steps."""
    gpt, config = train_settings(flags, this.device.type)
    tokenizer, corpus = corpus_with(this, flags)
    train.prepare_machine(config, this.device)
    model = GPT(replace(gpt, vocab_size=tokenizer.vocab_size))
    trainer = train.Trainer(model, tokenizer, corpus, config, this.device)
    spans = []
    for n in (3, 5, 5, 5):  # the first ones compile, and fill caches
        began = time.perf_counter()
        for _ in range(n):
            loss, _ = trainer.train_step()
        loss.item()  # waits for a GPU
        spans.append((time.perf_counter() - began) / n)
    return statistics.median(spans[1:])


def steps_in(this: Study, name: str, flags: dict[str, Any], seconds: float) -> int:
    """How many steps fit into so many seconds: measured once, then read from steps.json."""
    file = this.folder / "steps.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if name not in known:
        known[name] = max(1, round(seconds / step_seconds(this, flags)))
        file.parent.mkdir(parents=True, exist_ok=True)
        study.write_json(file, known)
    return known[name]


def curve(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The seconds of training and the bits per byte of a run's evaluations."""
    steps = [record["step"] for record in result["log"]]
    return [s * result["ms_per_step"] / 1000 for s in steps], [r["bpb"] for r in result["log"]]


def draw(results: dict[str, list[dict[str, Any]]]) -> Any:
    """The bits per byte of each tokenizer, a dot a seed, and how each came there over the time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for y, ((name, runs), color) in enumerate(zip(results.items(), COLORS, strict=False)):
        values = [r["bpb"] for r in runs]
        left.plot(values, [y] * len(values), "o", color=color, alpha=0.5)
        left.plot(mean(values), y, "|", color=color, markersize=24, markeredgewidth=2)
        for i, one in enumerate(runs):
            label = {"label": name} if i == 0 else {}
            right.plot(*curve(one), ".-", color=color, alpha=0.6, **label)
    left.set_yticks(range(len(results)), list(results))
    left.set_ylim(len(results) - 0.5, -0.5)
    left.set(xlabel="bits per byte over the validation split", title="At equal time, a dot a seed")
    right.set(xlabel="seconds of training", ylabel="bits per byte", title="On the way")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    this = study.begin("tokenization", argv, __doc__, TokenizationConfig)
    if is_dataset(this.config.data):
        raise UserError(f"{this.config.data} has its tokenizer already: give --data a text")
    size = QUICK if this.config.quick else FULL
    seconds = this.config.seconds or size["seconds"]
    rows, results = [], {}
    for name, choice in choices(size["vocabularies"]).items():
        tokenizer, corpus = corpus_with(this, choice)
        folder = f"{'-'.join(map(str, choice.values()))}-{seconds:g}s"
        flags = size["run"] | choice
        flags["max_steps"] = steps = steps_in(this, folder, flags, seconds)
        flags["eval_every"] = math.ceil(steps / 6)
        results[name] = runs = study.with_seeds(this, folder, flags)
        values = [r["bpb"] for r in runs]
        base = [r["bpb"] for r in results["characters"]]
        rows.append(
            {
                "tokenizer": name,
                "vocabulary": tokenizer.vocab_size,
                "bytes a token": round(corpus.bytes_per_token, 2),
                "parameters": runs[0]["params"],
                "steps": steps,
                "seconds": mean([r["seconds"] for r in runs]),
                "loss a token": mean([r["val"] for r in runs]),
                "bits per byte": mean(values),
                "spread": spread(values),
                "difference": study.difference(base, values) if name != "characters" else "",
            }
        )
    return study.finish(this, {"Tokenizers at equal time": rows}, draw(results))


if __name__ == "__main__":
    run(main)
