"""Shared by the studies: runs that are trained once and kept, statistics, tables.

A study trains models that differ in one setting, each with several seeds. An interrupted study
resumes with the same command: finished runs are read from their folders, and an unfinished run
continues from its last checkpoint. Tables and plots go to a folder that Git ignores; only
--results experiments/results replaces the published ones.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import train
from config import DEVICE_HELP, TrainConfig, train_settings
from corpus.corpus import Corpus, check_length
from corpus.load import load_corpus
from experiments.comparison import Row, margin, mean
from experiments.provenance import describe, run_record
from model import GPT
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.files import atomic_write
from system.settings import UserError, all_problems, from_dict, raise_problems, setting
from tokenizer import Tokenizer
from training.setup import Flags, setup_machine
from training.task import Pretraining
from utils import read_checkpoint
from viz.curve import save_figure
from viz.runs import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]  # of a run: see `make_run`

NOT_RECORDED = ("out_dir", "results", "device")  # flags that do not change what is trained
TABLE_NOTE = """\
95% margin: the confidence interval of a mean over the seeds is the mean plus or minus the margin
(t distribution). A difference is paired by seed, with its own 95% interval; p is the p-value of the
paired t-test, corrected for all comparisons of its table (Holm). Below 0.05 it is significant."""


@dataclass
class StudyConfig:
    """The size of a study and its folders."""

    quick: bool = setting(False, "minutes on two CPU cores; off: the full size, for a GPU")
    seeds: int = setting(3, "runs per setting, to tell effects from noise", low=1)
    data: str = setting("shakespeare", "text, as for train.py")
    out_dir: str = setting("checkpoints/studies", "folder of the runs, which are kept")
    results: str = setting(
        "checkpoints/studies/results",
        "folder of the tables and plots; experiments/results replaces the published ones",
    )
    device: str = setting("auto", DEVICE_HELP)


@dataclass
class Study:
    """A study with its settings."""

    name: str
    config: StudyConfig
    device: torch.device
    command: str  # that repeats it
    options: Any = None  # settings that only this study has
    n_runs: int = 0  # in total
    seconds: list[float] = field(default_factory=list)  # that each finished run took
    records: list[dict[str, Any]] = field(default_factory=list)  # what each of them depends on

    @property
    def full_name(self) -> str:
        """The name of its folder and files, different for the quick and the full size."""
        return self.name + "_quick" * self.config.quick

    @property
    def folder(self) -> Path:
        """The folder of its runs."""
        return Path(self.config.out_dir, self.full_name)

    def progress(self) -> str:
        """Which run is next, and about how long the rest will take if the remaining runs take as
        long as the finished ones."""
        n_done = len(self.seconds)
        left = (self.n_runs - n_done) * mean(self.seconds) if n_done else 0
        about = f", about {format_duration(left)} left" if n_done else ""
        return f"run {n_done + 1} of {self.n_runs}{about}"


def parse_study(
    name: str,
    argv: list[str] | None,
    doc: str,
    options: type | None = None,
    data: str = StudyConfig.data,
) -> Study:
    """Read the command line of a study. options: a dataclass of further settings; data: the default
    of --data. Raises UserError if a setting is invalid."""
    classes = (StudyConfig, options) if options else (StudyConfig,)
    config, *rest = parse_args(
        classes,
        argv,
        doc,
        resolve=lambda flags: tuple(from_dict(cls, {"data": data} | flags) for cls in classes),
        check=lambda config, *rest: device_problems(config.device),
    )
    command = command_of(name, [config, *rest], data)
    return Study(name, config, pick_device(config.device), command, *rest)


def command_of(name: str, configs: list[Any], data: str) -> str:
    """The command of a study, for its record: the seeds, and the flags that are not the defaults.
    Of a file with a text, only the name."""
    words = ["python", "-m", f"experiments.{name}"]
    for config in configs:
        for f in fields(config):
            value, default = getattr(config, f.name), data if f.name == "data" else f.default
            if f.name in NOT_RECORDED or (value == default and f.name != "seeds"):
                continue
            if isinstance(value, bool):
                words += ["--" + "no-" * (not value) + f.name]
            else:
                words += [f"--{f.name}", Path(value).name if f.name == "data" else f"{value}"]
    return shlex.join(words)


# --- runs


@functools.lru_cache(maxsize=4)
def cached_corpus(data: str, tokenizer: str, bpe_vocab_size: int) -> tuple[Tokenizer, Corpus]:
    """`load_corpus`, once for all runs that share a text and a tokenizer."""
    return load_corpus(data, tokenizer, bpe_vocab_size)


def study_corpus(study: Study, flags: Flags) -> tuple[Tokenizer, Corpus]:
    """The tokenizer and the corpus of a run with these flags."""
    config = from_dict(TrainConfig, {"data": study.config.data} | flags)
    return cached_corpus(config.data, config.tokenizer, config.bpe_vocab_size)


def make_trainer(study: Study, flags: Flags, share: float = 1.0) -> train.Trainer:
    """A trainer with the flags of train.py, on this share of the training tokens."""
    gpt, config = train_settings(flags, study.device.type)
    raise_problems(all_problems(gpt) + all_problems(config))
    tokenizer, corpus = study_corpus(study, flags)
    if share < 1:
        n = round(len(corpus.train_ids) * share)
        docs = None if corpus.train_docs is None else corpus.train_docs[corpus.train_docs < n]
        corpus = replace(corpus, train_ids=corpus.train_ids[:n], train_docs=docs)
    check_length(corpus, gpt.block_size)
    torch.compiler.reset()  # or the compiled code of earlier models would fill its cache
    with contextlib.redirect_stdout(io.StringIO()):
        setup_machine(config, study.device)
    model = GPT(replace(gpt, vocab_size=tokenizer.vocab_size))
    task = Pretraining(corpus, tokenizer, gpt.block_size, config, study.device)
    return train.Trainer(model, task, config, study.device)


def make_run(study: Study, name: str, flags: Flags, share: float = 1.0) -> Result:
    """The result of a run with the flags of train.py, on this share of the training tokens. A
    finished run is read from its folder, an unfinished one is resumed.

    The result has flags, params, val (the loss of the best checkpoint over the whole validation
    split, in nats per token; infinite if the run diverged), bpb, seconds (of the training steps
    only), ms_per_step, log, its evaluations, and record, see `run_record`. Raises UserError if the
    folder contains a run with other settings, and KeyboardInterrupt if the user stops the run.
    """
    folder = study.folder / name
    flags = {"data": study.config.data, "sample_tokens": 0} | flags | {"out_dir": str(folder)}
    settings = flags | {"share": share}
    file = folder / "study.json"
    result: Result = json.loads(file.read_text()) if file.exists() else {"flags": settings}
    if result["flags"] != settings:
        raise UserError(
            f"{folder} contains a run with other settings: delete it, or give another --out_dir"
        )
    if "val" not in result:
        print(f"{study.full_name}, {study.progress()}: {name} ...", end=" ", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, result)  # so that an interrupted run is resumed with these settings only
        result |= train_one(study, flags, share)
        write_json(file, result)
        print(f"validation loss {result['val']:.4f}, {result['seconds']:.0f} s", flush=True)
    study.seconds.append(result["log"][-1]["seconds"])
    study.records.append(result.get("record", {}))
    return result


def train_one(study: Study, flags: Flags, share: float) -> Result:
    """Train with these flags without printing, from latest.pt if there is one."""
    trainer = make_trainer(study, flags, share)
    run_dir = Path(flags["out_dir"])
    latest = run_dir / "latest.pt"
    state = read_checkpoint(latest) if latest.exists() else None
    final = {"val": math.inf, "bpb": math.inf}  # if it diverges
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            status, _ = train.run_training(trainer, state)
    except UserError as error:
        if not str(error).startswith("diverged"):
            raise
    else:
        if status:
            print("stopped; the same command resumes it")
            raise KeyboardInterrupt
        summary = read_run(run_dir).final
        final = {key: summary[key] for key in final}
    log = read_run(run_dir).log
    info = trainer.task.format.entries["corpus"]
    record = run_record(info, trainer.config.precision, study.device)
    params = trainer.model.num_params()
    return final | {"params": params, "log": log, "record": record} | step_times(log)


def step_times(log: list[dict[str, Any]]) -> dict[str, float]:
    """The time of a run's training steps, without evaluations: seconds in total, ms_per_step."""
    steps = [record["step"] for record in log]
    ms = [record["ms_per_step"] or 0.0 for record in log[1:]]  # None after only one step
    spans = [b - a for a, b in itertools.pairwise(steps)]
    seconds = sum(n * m / 1000 for n, m in zip(spans, ms, strict=True))
    return {"seconds": seconds, "ms_per_step": 1000 * seconds / max(1, steps[-1])}


def with_seeds(study: Study, name: str, flags: Flags, share: float = 1.0) -> list[Result]:
    """`make_run` with each seed."""
    seeds = range(1, study.config.seeds + 1)
    return [make_run(study, f"{name}-{seed}", flags | {"seed": seed}, share) for seed in seeds]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module or class is replaced while the context is open."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- numbers of runs


def format_duration(seconds: float) -> str:
    """A duration in one unit.

    >>> [format_duration(s) for s in (59, 60, 5000, 8000)]
    ['59 s', '1 min', '83 min', '2.2 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def val_losses(runs: list[Result]) -> list[float]:
    """The validation loss of each run."""
    return [result["val"] for result in runs]


def loss_columns(runs: list[Result]) -> Row:
    """The mean of the validation losses, with the half width of its confidence interval."""
    return {"validation loss": mean(val_losses(runs)), "95% margin": margin(val_losses(runs))}


def gradient_norms(result: Result) -> list[float]:
    """The norm of the gradient before clipping, for each step of a run with log_every 1."""
    steps = read_run(Path(result["flags"]["out_dir"])).steps
    return [record["grad_norm"] for record in steps if record["grad_norm"] is not None]


def mean_ms_per_step(runs: list[Result]) -> float:
    """The mean time of a training step, rounded."""
    return round(mean([result["ms_per_step"] for result in runs]), 1)


# --- tables and plots


def format_cell(value: Any, sign: str = "") -> str:
    """A value in a Markdown table. sign: "+" shows it for positive numbers too."""
    if isinstance(value, float) and not math.isfinite(value):
        return "-"
    if isinstance(value, float) and 0 < abs(value) < 1e-4:
        return f"{value:{sign}.0e}"
    if isinstance(value, float):
        return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign},.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def to_markdown(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    signs = dict.fromkeys(("difference", "95% from", "to"), "+")
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([format_cell(row[name], signs.get(name, "")) for name in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(rows: list[Row]) -> str:
    """Rows as CSV, with all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_results(study: Study, tables: dict[str, list[Row]], figure: "Figure") -> None:
    """Print the tables, by title, and write them with the figure: NAME.png, NAME.md, NAME.csv for
    the first table, and NAME_WORD.csv for each further one, where WORD begins its title. NAME.json
    records the command, and what each run depends on (`run_record`)."""
    folder = Path(study.config.results)
    folder.mkdir(parents=True, exist_ok=True)
    records = [r for i, r in enumerate(study.records) if r not in study.records[:i]]
    counts = [{"runs": study.records.count(r)} | r for r in records]
    file = folder / f"{study.full_name}.json"
    write_file(file, json.dumps({"command": study.command, "made by": counts}, indent=2) + "\n")
    text = [f"# {study.name}", f"`{study.command}`", f"{describe(records)} ({file.name})."]
    for i, (title, rows) in enumerate(tables.items()):
        word = re.findall(r"\w+", title)[0].lower()
        name = study.full_name + f"_{word}" * (i > 0)
        write_file(folder / f"{name}.csv", to_csv(rows))
        text += [f"## {title}", to_markdown(rows)]
        print(f"\n{title}\n{to_markdown(rows)}")
    text += [TABLE_NOTE, f"![{study.name}]({study.full_name}.png)"]
    write_file(folder / f"{study.full_name}.md", "\n\n".join(text) + "\n")
    save_figure(figure, folder / f"{study.full_name}.png")
    print(f"\nresults: {folder / study.full_name}.md, .csv, .json and .png")


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value))


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())
