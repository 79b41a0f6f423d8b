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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import train
from config import DEVICE_HELP, TrainConfig, train_settings
from corpus.corpus import Corpus, check_length
from corpus.load import load_corpus
from experiments.comparison import Row, add_differences, mean, mean_columns, plot_differences
from experiments.timing import run_record
from model import GPT
from plots import read_run
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.files import atomic_write
from system.settings import UserError, all_problems, from_dict, raise_problems, setting
from tokenizer import Tokenizer
from training.setup import Flags, setup_machine
from training.task import Pretraining
from training.teachers import load_teachers
from utils import read_checkpoint
from viz.curve import new_figure, save_figure

Result = dict[str, Any]  # of a run: its flags, and see `Study.train_one`
Runs = dict[Any, list[Result]]  # variant -> a run per seed

TABLE_NOTE = """\
95% margin: the confidence interval of a mean over the seeds is the mean plus or minus the margin
(t distribution). A difference is paired by seed, with its own 95% interval; p is the p-value of the
paired t-test, corrected for all comparisons of its table (Holm). Below 0.05 it is significant."""


@dataclass
class StudyConfig:
    seeds: int = setting(3, "runs per setting, to tell effects from noise", low=1)
    data: str = setting("shakespeare", "text, as for train.py")
    out_dir: str = setting("checkpoints/studies", "folder of the runs, which are kept")
    results: str = setting("checkpoints/studies/results", "folder of the tables and plots")
    device: str = setting("auto", DEVICE_HELP)


def step_times(log: list[dict[str, Any]]) -> dict[str, float]:
    """The time of a run's training steps, without evaluations: seconds in total, ms_per_step."""
    seconds = sum(  # the time of a step is None after only one
        (record["step"] - before["step"]) * (record["ms_per_step"] or 0.0) / 1000
        for before, record in itertools.pairwise(log)
    )
    return {"seconds": seconds, "ms_per_step": 1000 * seconds / max(1, log[-1]["step"])}


def gradient_norms(runs: list[Result]) -> list[float]:
    """The norm of the gradient before clipping at each step of runs with log_every 1."""
    logs = [read_run(Path(result["flags"]["out_dir"])).steps for result in runs]
    return [line["grad_norm"] for steps in logs for line in steps if line["grad_norm"] is not None]


def val_losses(runs: list[Result]) -> list[float]:
    return [result["val"] for result in runs]


def loss_columns(runs: list[Result], timed: bool = False) -> Row:
    """The mean of the validation losses with its margin; if timed, also the time of a step."""
    columns = mean_columns("validation loss", val_losses(runs))
    if timed:
        columns["ms per step"] = round(mean([result["ms_per_step"] for result in runs]), 1)
    return columns


def compare(
    runs: Runs, columns: Callable[[Any], Row], timed: bool = False, bases: list[int] | None = None
) -> list[Row]:
    """A row for each variant: columns(variant), `loss_columns` and `add_differences`."""
    rows = [columns(variant) | loss_columns(some, timed) for variant, some in runs.items()]
    return add_differences(rows, map(val_losses, runs.values()), bases)


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
    signs = dict.fromkeys(("difference", "95% from", "to"), "+")
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([format_cell(row[name], signs.get(name, "")) for name in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    return text.getvalue()


def kept(file: Path, compute: Callable[[], Any]) -> Any:
    """The value in a JSON file, which is computed if there is no file yet."""
    if not file.exists():
        write_file(file, json.dumps(compute()))
    return json.loads(file.read_text())


def write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


cached_corpus = functools.lru_cache(maxsize=4)(load_corpus)  # several runs share a corpus


def val_half(corpus: Corpus, second: bool = False) -> Corpus:
    """The corpus with the first half of its validation tokens, on which settings are chosen, or
    with the second, which speedrun.py evaluates once per recipe."""
    n = len(corpus.val_ids)
    ids = corpus.val_ids[n // 2 :] if second else corpus.val_ids[: n // 2]
    return replace(corpus, val_ids=ids, val_bytes=corpus.val_bytes * len(ids) // n)


@dataclass
class Study:
    name: str
    config: StudyConfig
    device: torch.device
    command: str  # that repeats it
    n_runs: int = 0  # in total
    seconds: list[float] = field(default_factory=list)  # that each finished run took
    records: list[dict[str, Any]] = field(default_factory=list)  # what each of them depends on

    @property
    def folder(self) -> Path:
        """The folder of its runs; its results have the same name."""
        return Path(self.config.out_dir, self.name)

    def progress(self) -> str:
        """Which run is next, and how long the rest takes if its runs take as long as the others."""
        n_done = len(self.seconds)
        progress = f"run {n_done + 1} of {self.n_runs}"
        if n_done:
            left = round((self.n_runs - n_done) * mean(self.seconds))
            progress += f", about {timedelta(seconds=left)} left"
        return progress

    def corpus(self, flags: Flags) -> tuple[Tokenizer, Corpus]:
        """The tokenizer and the corpus of a run with these flags, with half of its validation."""
        config = from_dict(TrainConfig, {"data": self.config.data} | flags)
        tokenizer, corpus = cached_corpus(config.data, config.tokenizer, config.bpe_vocab_size)
        return tokenizer, val_half(corpus)

    def make_trainer(self, flags: Flags, share: float = 1.0) -> train.Trainer:
        """A trainer with the flags of train.py, on this share of the training tokens."""
        gpt, config = train_settings(flags, self.device.type)
        raise_problems(all_problems(gpt) + all_problems(config))
        tokenizer, corpus = self.corpus(flags)
        if share < 1:
            n = round(len(corpus.train_ids) * share)
            docs = None if corpus.train_docs is None else corpus.train_docs[corpus.train_docs < n]
            corpus = replace(corpus, train_ids=corpus.train_ids[:n], train_docs=docs)
        check_length(corpus, gpt.block_size)
        torch.compiler.reset()  # or the compiled code of earlier models would fill its cache
        with contextlib.redirect_stdout(io.StringIO()):
            setup_machine(config, self.device)
        model = GPT(replace(gpt, vocab_size=tokenizer.vocab_size))
        text = Pretraining(corpus, tokenizer, gpt.block_size, config, self.device)
        task = load_teachers(gpt, config, None).task(text) if config.teacher else text
        return train.Trainer(model, task, config, self.device)

    def make_run(self, name: str, flags: Flags, share: float = 1.0) -> Result:
        """The result of a run with the flags of train.py, on this share of the training tokens. A
        finished run is read from its folder, an unfinished one is resumed. Raises UserError if the
        folder has a run with other settings, and KeyboardInterrupt if the user stops the run."""
        folder = self.folder / re.sub(r"[^\w.+-]+", "-", name)
        flags = {"data": self.config.data, "sample_tokens": 0} | flags | {"out_dir": str(folder)}
        settings = flags | {"share": share, "validation": "first half"}
        file = folder / "study.json"
        # Written before the run, so that an interrupted run is resumed with these settings only.
        result: Result = kept(file, lambda: {"flags": settings})
        if result["flags"] != settings:
            raise UserError(
                f"{folder} contains a run with other settings: delete it, or give another --out_dir"
            )
        if "val" not in result:
            print(f"{self.folder.name}, {self.progress()}: {name} ...", end=" ", flush=True)
            result |= self.train_one(flags, share)
            write_file(file, json.dumps(result))
            print(f"validation loss {result['val']:.4f}, {result['seconds']:.0f} s", flush=True)
        self.seconds.append(result["log"][-1]["seconds"])
        self.records.append(result["record"])
        return result

    def train_one(self, flags: Flags, share: float) -> Result:
        """Train with these flags without printing, from latest.pt if there is one. The result has
        val (the loss of the best checkpoint over the validation half, in nats per token; infinite
        if the run diverged), log (its evaluations), and the times of `step_times`."""
        trainer = self.make_trainer(flags, share)
        run_dir = Path(flags["out_dir"])
        latest = run_dir / "latest.pt"
        state = read_checkpoint(latest) if latest.exists() else None
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                status, _ = train.run_training(trainer, state)
        except UserError as error:
            if not str(error).startswith("diverged"):
                raise
            status = 0
        if status:
            print("stopped; the same command resumes it")
            raise KeyboardInterrupt
        run = read_run(run_dir)
        info = trainer.task.format.entries["corpus"]
        return {
            "val": run.final.get("val", math.inf),
            "bpb": run.final.get("bpb", math.inf),
            "params": trainer.model.num_params(),
            "log": run.log,
            "record": run_record(info, trainer.config.precision, self.device),
            **step_times(run.log),
        }

    def with_seeds(self, name: str, flags: Flags, share: float = 1.0) -> list[Result]:
        seeds = range(1, self.config.seeds + 1)
        return [self.make_run(f"{name}-{seed}", flags | {"seed": seed}, share) for seed in seeds]

    def write_results(self, tables: dict[str, list[Row]], figure: Figure) -> None:
        """Print the tables, by title, and write them with the figure: NAME.png, NAME.md, NAME.csv
        for the first table, and NAME_WORD.csv for each further one, where WORD begins its title.
        NAME.json records the command, and what each run depends on (`run_record`)."""
        path = Path(self.config.results, self.folder.name)
        records = [r for i, r in enumerate(self.records) if r not in self.records[:i]]
        counts = [{"runs": self.records.count(r)} | r for r in records]
        made_by = {"command": self.command, "made by": counts}
        write_file(path.with_suffix(".json"), json.dumps(made_by, indent=2) + "\n")
        made = (
            f"* runs: {r['runs']}; commit {r['commit']}; {r['corpus']['name']} (sha256 "
            f"{r['corpus']['sha256'][:12]}); {r['precision']}; {r['machine']}; {r['versions']}"
            for r in counts
        )
        text = [f"# {self.name}", f"`{self.command}`", "\n".join(made)]
        for i, (title, rows) in enumerate(tables.items()):
            word = re.findall(r"\w+", title)[0].lower()
            write_file(path.with_name(f"{path.name}{f'_{word}' * (i > 0)}.csv"), to_csv(rows))
            text += [f"## {title}", to_markdown(rows)]
            print(f"\n{title}\n{to_markdown(rows)}")
        text += [TABLE_NOTE, f"![{self.name}]({path.name}.png)"]
        write_file(path.with_suffix(".md"), "\n\n".join(text) + "\n")
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0] and not axes.get_legend():
                axes.legend()
        save_figure(figure, path.with_suffix(".png"))
        print(f"\nresults: {path}.md, .csv, .json and .png")


def parse_study(name: str, argv: list[str] | None, doc: str, data: str = StudyConfig.data) -> Study:
    """Read the command line of a study. data: the default of --data."""
    config = parse_args(
        StudyConfig,
        argv,
        doc,
        resolve=lambda flags: (from_dict(StudyConfig, {"data": data} | flags),),
        check=lambda config: device_problems(config.device),
    )
    command = f"python -m experiments.{name} --seeds {config.seeds}"
    if config.data != data:  # only the name of a file, which is published
        command += f" --data {shlex.quote(Path(config.data).name)}"
    return Study(name, config, pick_device(config.device), command)


def run_variants(study: Study, base: Flags, variants: dict[str, Flags], title: str) -> int:
    """A study that compares variants with the first one: flags that are added to the base."""
    study.n_runs = len(variants) * study.config.seeds
    runs: Runs = {name: study.with_seeds(name, base | flags) for name, flags in variants.items()}
    params = {name: some[0]["params"] for name, some in runs.items()}
    return write_variants(study, runs, lambda n: {"variant": n, "parameters": params[n]}, title)


def write_variants(study: Study, runs: Runs, columns: Callable[[Any], Row], title: str) -> int:
    """Write the table and the figure of variants that are compared with the first one."""
    rows = compare(runs, columns, timed=True)
    figure = new_figure(8, 5)
    losses = {name: val_losses(some) for name, some in runs.items()}
    plot_differences(figure.subplots(), rows, losses, title)
    study.write_results({title: rows}, figure)
    return 0
