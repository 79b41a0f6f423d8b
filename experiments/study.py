"""What the studies share: runs that are made once and kept, their table and their picture.

A study trains models that differ in one thing, with several seeds. Started again, it goes on where
it was stopped: a run that is finished is read from its folder, one that was cut off is taken up.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import utils
from config import UserError, limit_problems, parse_flags, raise_problems, setting, train_settings
from corpora import load_corpus
from model import GPT
from plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class StudyConfig:
    """The size of a study and its place."""

    quick: bool = setting(False, "minutes on two cores; else the full size, for a GPU")
    seeds: int = setting(3, "runs of each kind, which tell what is chance", low=1)
    data: str = setting("shakespeare", "the text, as for train.py")
    out_dir: str = setting("checkpoints/studies", "folder of the runs, which are kept")
    results: str = setting("experiments/results", "folder of the tables and pictures")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is")


@dataclass
class Study:
    """A study that runs: its settings, where its runs and its results go."""

    name: str
    config: Any  # a StudyConfig, or a study's own with the same fields
    device: torch.device

    @property
    def full_name(self) -> str:
        """The name of its files: a quick study is another than the full one."""
        return self.name + "_quick" * self.config.quick

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return Path(self.config.out_dir, self.full_name)


def begin(name: str, argv: list[str] | None, doc: str, kind: type = StudyConfig) -> Study:
    """Read a study's command line, and find its mistakes before the first run."""
    flags, problems = parse_flags(argv, doc, kind)
    config = kind(**{f.name: flags[f.name] for f in fields(kind) if f.name in flags})
    raise_problems(problems + limit_problems(config) + utils.device_problems(config.device))
    return Study(name, config, utils.pick_device(config.device))


# --- runs


@functools.lru_cache(maxsize=4)
def corpus_of(data: str, tokenizer: str, vocab_size: int) -> tuple[Any, utils.Corpus]:
    """`load_corpus`, once for all runs that share a text and a tokenizer."""
    return load_corpus(data, tokenizer, vocab_size, None)


def make_run(study: Study, name: str, flags: dict[str, Any], share: float = 1.0) -> dict[str, Any]:
    """The result of a run with the flags of train.py: read where it is finished, taken up where it
    was stopped, else made. `share` is how much of the training text it sees.

    The result has flags, params, val (the loss of the best checkpoint over the whole validation
    split, nats a token; infinite for a run that diverged), bpb, seconds (of the steps alone),
    ms_per_step, and log, its evaluations. Raises UserError where the folder is of another run,
    KeyboardInterrupt where the user stops it.
    """
    folder = study.folder / name
    flags = {"data": study.config.data, "sample_tokens": 0} | flags | {"out_dir": str(folder)}
    made_with = flags | {"share": share}
    note = folder / "study.json"
    known = json.loads(note.read_text()) if note.exists() else {"flags": made_with}
    if known["flags"] != made_with:
        raise UserError(f"{folder} has a run with other settings: remove it, or give --out_dir")
    if "val" not in known:
        print(f"{study.full_name}: {name} ...", end=" ", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(note, known)  # whose run this is, should it be cut off
        known |= train_one(study, flags, share)
        write_json(note, known)
        print(f"validation loss {known['val']:.4f}, {known['seconds']:.0f} s", flush=True)
    return known


def train_one(study: Study, flags: dict[str, Any], share: float) -> dict[str, Any]:
    """Train with these flags, quietly, or go on with it."""
    gpt, config = train_settings(flags, study.device.type)
    raise_problems(gpt.problems() + config.problems())
    tokenizer, corpus = corpus_of(config.data, config.tokenizer, gpt.vocab_size)
    if share < 1:
        n = round(len(corpus.train_ids) * share)
        docs = None if corpus.train_docs is None else corpus.train_docs[corpus.train_docs < n]
        corpus = replace(corpus, train_ids=corpus.train_ids[:n], train_docs=docs)
    utils.check_length(corpus, gpt.block_size)
    latest = Path(config.out_dir, "latest.pt")
    state = utils.read_checkpoint(latest) if latest.exists() else None
    torch.compiler.reset()  # what was compiled for other models would only fill its cache
    words = io.StringIO()
    with contextlib.redirect_stdout(words):
        train.prepare_machine(config, study.device)
        model = GPT(replace(gpt, vocab_size=tokenizer.vocab_size))
        trainer = train.Trainer(model, tokenizer, corpus, config, study.device)
        try:
            status = train.train_to_the_end(trainer, state)
        except UserError as error:
            if not str(error).startswith("diverged"):
                raise
            status = None
    if status:
        print("stopped; the same command goes on from here")
        raise KeyboardInterrupt
    final = {"val": math.inf, "bpb": math.inf}
    if status == 0:
        summary = json.loads((trainer.run_dir / "loss_log.json").read_text())
        final = {key: summary["final"][key] for key in ("val", "bpb")}
    return final | {"params": trainer.n_params, "log": trainer.log} | step_times(trainer.log)


def step_times(log: list[dict[str, Any]]) -> dict[str, float]:
    """The seconds that the steps of a run took, without its evaluations, and those of one."""
    steps = [record["step"] for record in log]
    ms = [record["ms_per_step"] or 0.0 for record in log[1:]]  # None: the first step alone
    spans = [b - a for a, b in itertools.pairwise(steps)]
    seconds = sum(n * m / 1000 for n, m in zip(spans, ms, strict=True))
    return {"seconds": seconds, "ms_per_step": 1000 * seconds / max(1, steps[-1])}


def with_seeds(
    study: Study, name: str, flags: dict[str, Any], share: float = 1.0
) -> list[dict[str, Any]]:
    """`make_run` with each seed."""
    seeds = range(1, study.config.seeds + 1)
    return [make_run(study, f"{name}-{s}", flags | {"seed": s}, share) for s in seeds]


# --- what the runs say


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def spread(values: list[float]) -> float:
    """The distance between the largest and the smallest: what chance does at least. Of one value it
    is not known: no number."""
    if len(values) < 2:
        return math.nan
    return max(values) - min(values) if math.isfinite(max(values)) else math.inf


def difference(base: list[float], other: list[float]) -> str:
    """How much the mean of `other` differs from that of `base`, in words: none where it is not
    larger than the spread of either; not known with one run of each.

    >>> difference([1.50, 1.52], [1.40, 1.41]), difference([1.50, 1.52], [1.50, 1.51])
    ('-0.1050', 'none')
    """
    if not math.isfinite(max(other)):
        return "diverged"
    if min(len(base), len(other)) < 2:
        return f"{mean(other) - mean(base):+.4f} (one run)"
    apart = mean(other) - mean(base)
    return f"{apart:+.4f}" if abs(apart) > max(spread(base), spread(other)) else "none"


def in_cell(value: Any) -> str:
    """A value as it stands in a table."""
    if isinstance(value, float) and not math.isfinite(value):
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of Markdown, the keys of the first as its head."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([in_cell(v) for v in r.values()] for r in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def finish(study: Study, tables: dict[str, list[dict[str, Any]]], figure: "Figure") -> int:
    """Write the results, NAME.png, NAME.md, NAME.csv of the first table and NAME_WORD.csv of each
    further one (the first word of its title), and print the tables."""
    folder = Path(study.config.results)
    folder.mkdir(parents=True, exist_ok=True)
    command = f"python experiments/{study.name}.py{' --quick' * study.config.quick}"
    head = f"`{command} --seeds {study.config.seeds}` on {machine(study.device)}"
    text = [f"# {study.name}", head]
    for i, (title, rows) in enumerate(tables.items()):
        word = re.findall(r"\w+", title)[0].lower()
        name = study.full_name + f"_{word}" * (i > 0)
        with utils.atomic_write(folder / f"{name}.csv") as file:
            file.write(as_csv(rows).encode())
        text += [f"## {title}", markdown(rows)]
        print(f"\n{title}\n{markdown(rows)}")
    text.append(f"![{study.name}]({study.full_name}.png)")
    with utils.atomic_write(folder / f"{study.full_name}.md") as file:
        file.write(("\n\n".join(text) + "\n").encode())
    save_figure(figure, folder / f"{study.full_name}.png")
    print(f"\nresults: {folder / study.full_name}.md, .csv and .png")
    return 0


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV, with numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def machine(device: torch.device) -> str:
    """The kind of machine that the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with utils.atomic_write(path) as file:
        file.write(json.dumps(value).encode())
