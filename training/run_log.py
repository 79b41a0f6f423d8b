"""The record of a training run: its files, what it prints, its best step."""

import contextlib
import itertools
import json
import math
import os
import shutil
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig
from system.files import atomic_write
from system.settings import UserError, quote_path
from training.distributed import BUSY, CpuClock, rank, world_size
from viz.curve import Run, best_record, plot_runs, read_records, save_figure, training_steps
from viz.verdict import verdict

Record = dict[str, Any]  # the metrics of an evaluation or of a training step, by name

# The files and folders of a run, by what happens to them. A new run deletes them all.
REWRITTEN = ("log.jsonl", "loss_log.json", "loss_curve.png")  # on resume, or at each evaluation
SAMPLES = "samples.txt"  # on resume, cut back to its length at the checkpoint
CHECKPOINTS = ("best.pt", "latest.pt", "ckpt_*.pt", "adapter.pt")

# Metrics in the order in which they are shown. Others are shown by name, before the learning rate.
FORMATS = {
    "step": "step {}",
    "train": "train {:.4f}",
    "val": "val {:.4f}",
    "ppl": "ppl {:.2f}",
    "bpb": "bpb {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{thousands:.1f}k tok/s",
    "ms_per_step": "{:.1f} ms/step",
}
PLOT_INTERVAL = 5.0  # seconds between two drawings of the curve
PLOT_SHARE = 0.05  # of the time, at most, for drawing: it takes 1.2 s for a million steps
SAMPLE_LINES = 4  # of a sample that are printed
SAMPLE_WIDTH = 100  # of these lines, if the width of the terminal is unknown
BUSY_SECONDS = 5.0  # of steps, at least, to tell whether the CPU is busy


class RunLog:
    """Receives the metrics of every step and evaluation; prints, writes, plots and forwards them.
    Ranks other than 0 only keep the records, which decide when a run stops."""

    def __init__(
        self,
        config: TrainConfig,
        header: dict[str, Any],
        tokens_per_step: int | None = None,
        state: dict[str, Any] | None = None,
        started: float | None = None,
    ):
        """header: the first line of log.jsonl, what is trained. tokens_per_step: for tokens per
        second. state: the checkpoint of the run to resume; without one, a new run begins and the
        files of an earlier run in the folder are deleted. started: with --minutes, when the time of
        the run begins, by time.perf_counter; otherwise it begins now."""
        self.config, self.header, self.tokens_per_step = config, header, tokens_per_step
        self.run_dir = Path(config.out_dir, config.tag)
        self.records: list[Record] = state["log"] if state else []  # of the evaluations
        now = time.perf_counter()
        self.started = started if config.minutes and started else now
        self.started -= state.get("seconds", 0.0) if state else 0.0  # before this process
        self.next_plot = now + PLOT_INTERVAL
        # when the timed interval began, and after which step
        self.clock_time, self.clock_step = now, 0
        self.cpu_clock: CpuClock | None = None  # until it has warned of a busy CPU
        self.timed_step: int | None = None  # the last step whose metrics were read
        self.timed_until = now  # when they were read
        self.metrics: dict[str, float] = {}  # of the last step that was read
        self.bar: tqdm | None = None
        self.writers: list[Callable[[Record], None]] = []  # forward records to other tools
        # Called before each step: with --minutes, it ends the schedule earlier or later.
        self.adjust_schedule: Callable[[int], None] = lambda step: None
        if rank() == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.prepare_files(state)
            records = self.restore_log(state["step"]) if state else []
            if config.tensorboard or config.wandb:
                from training.writers import open_writers  # only with these flags

                self.writers = open_writers(config, self.run_dir, header)
            for record in records:
                self.forward(record)

    def prepare_files(self, state: dict[str, Any] | None) -> None:
        """Delete the files of an earlier run, or cut the samples back to the checkpoint. What a
        killed process was writing is deleted in any case, and what TensorBoard will write again."""
        files = run_files(self.run_dir, ".part") + ([] if state else run_files(self.run_dir))
        if self.config.tensorboard or not state:
            files += (self.run_dir / "tensorboard").glob("events*")
        for file in files:
            file.unlink()
        file, size = self.run_dir / SAMPLES, (state or {}).get("files", {}).get(SAMPLES)
        if size is not None and file.exists() and file.stat().st_size > size:
            os.truncate(file, size)

    def restore_log(self, step: int) -> list[Record]:
        """Write log.jsonl as it was at a checkpoint, but with the current settings: the evaluations
        are in the checkpoint, the training steps in the file. Returns all records."""
        file = self.run_dir / "log.jsonl"
        steps = training_steps(read_records(file)) if file.exists() else []
        records = [*self.records, *(record for record in steps if record["step"] <= step)]
        records.sort(key=lambda record: (record["step"], "val" in record))
        with atomic_write(file) as new_file:
            new_file.write("".join(map(json_line, (self.header, *records))).encode())
        self.write_evaluations()
        return records

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this log."""
        file = self.run_dir / SAMPLES
        files = {SAMPLES: file.stat().st_size} if file.exists() else {}
        return {"log": self.records, "seconds": self.seconds(), "files": files}

    def begin(self, trainer: Any) -> tqdm:
        """The bar that shows the steps, to be used as a context."""
        if self.config.minutes:
            from training.deadline import Deadline  # only with --minutes

            self.adjust_schedule = Deadline(trainer, self).adjust
        if trainer.device.type == "cpu" and world_size() == 1:
            self.cpu_clock = CpuClock()
        settings = {"unit": "step", "leave": False, "disable": True if rank() else None}
        self.bar = tqdm(total=self.config.max_steps, initial=trainer.step, **settings)
        return self.bar

    def training_step(self, step: int, metrics: dict[str, Tensor], lr: float) -> None:
        """Record a step: log its loss every log_every steps, and keep it for the evaluation."""
        first = self.timed_step is None
        due = step % self.config.log_every == 0
        if first or due or self.is_evaluation_step(step):
            numbers = torch.stack([*metrics.values()]).tolist()  # a GPU is waited for once
            self.metrics = dict(zip(metrics, numbers, strict=True))
            self.timed_step, self.timed_until = step, time.perf_counter()
        if first:  # it may have included compilation
            self.restart_clock(step)
        if due and rank() == 0:
            record = {"step": step, **self.metrics, "lr": lr, "seconds": self.seconds()}
            self.append(record)
            self.forward(record)
            self.warn_if_busy(step)
        if self.bar is not None:
            if due:
                self.bar.set_postfix_str(f"loss {self.metrics['loss']:.4f}", refresh=False)
            self.bar.update()

    def is_evaluation_step(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.max_steps

    def begins_with_evaluation(self, step: int) -> bool:
        """Whether a run that starts or resumes at this step is evaluated first: if it is new, or
        its max_steps was lowered to this step."""
        last = self.records[-1]["step"] if self.records else -1
        return last < step and self.is_evaluation_step(step)

    def restart_clock(self, step: int) -> None:
        self.clock_time, self.clock_step = time.perf_counter(), step  # times the steps after this
        if self.cpu_clock:
            self.cpu_clock.restart()

    def warn_if_busy(self, step: int) -> None:
        """Say, once, that other programs slow down the steps of this run."""
        seconds = time.perf_counter() - self.clock_time
        if self.cpu_clock is None or seconds < BUSY_SECONDS:
            return
        slowdown, ms = self.cpu_clock.slowdown(), 1000 * seconds / (step - self.clock_step)
        if slowdown > BUSY:
            self.cpu_clock = None
            alone = f"about {ms / slowdown:.0f} ms alone"
            tqdm.write(f"  other programs use the CPU: a step takes {ms:.0f} ms, {alone}")

    def evaluation(self, step: int, metrics: dict[str, float], lr: float, sample: str) -> bool:
        """Record an evaluation. Returns whether its validation loss is the lowest so far."""
        steps = (self.timed_step or step) - self.clock_step
        seconds = (self.timed_until - self.clock_time) / steps if steps else None
        tokens = self.tokens_per_step
        terms = {n: v for n, v in self.metrics.items() if n not in ("loss", "grad_norm")}
        record = {
            "step": step,
            **metrics,
            **terms,
            "lr": lr,
            "grad_norm": self.metrics.get("grad_norm"),
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            "ms_per_step": 1000 * seconds if seconds else None,
            "seconds": self.seconds(),
        }
        self.records.append(record)
        tqdm.write(status_line(record))
        if rank() == 0:
            self.write_sample(step, sample)
            self.append(record)
            self.write_evaluations()
            self.forward(record)
            if time.perf_counter() > self.next_plot and step < self.config.max_steps:
                with contextlib.suppress(UserError):  # on Windows, an open picture is locked
                    self.plot()
        return record is self.best()

    def seconds(self) -> float:
        """The duration of the run until now, without interruptions."""
        return time.perf_counter() - self.started

    def best(self) -> Record:
        return best_record(self.records)

    def out_of_patience(self) -> bool:
        since_best = len(self.records) - 1 - self.records.index(self.best())
        return 0 < self.config.patience <= since_best

    def write_sample(self, step: int, sample: str) -> None:
        """Append a sample to samples.txt, and print its first lines, wrapped to the terminal."""
        if not sample:
            return
        with open(self.run_dir / SAMPLES, "a", encoding="utf-8", newline="\n") as file:
            file.write(f"--- step {step}{'' if step else ', before training'}\n{sample}\n\n")
        width = max(20, shutil.get_terminal_size((SAMPLE_WIDTH, 24)).columns - 5)
        lines = (part for line in sample.splitlines() for part in textwrap.wrap(line, width))
        tqdm.write(f"  sample at step {step}:" if step else "  sample before training:")
        for line in itertools.islice(lines, SAMPLE_LINES):
            tqdm.write(f"    {line}")

    def append(self, record: Record) -> None:
        """Add a line to log.jsonl. The first line is the header."""
        with open(self.run_dir / "log.jsonl", "a", encoding="utf-8", newline="\n") as file:
            file.write("" if file.tell() else json_line(self.header))
            file.write(json_line(record))

    def write_evaluations(self) -> None:
        lines = ",\n".join(json_line(record).strip() for record in self.records)
        with atomic_write(self.run_dir / "loss_log.json") as file:
            file.write(f"[\n{lines}\n]\n".encode())

    def plot(self) -> None:
        start = time.perf_counter()
        steps = training_steps(read_records(self.run_dir / "log.jsonl"))
        run = Run(str(self.run_dir), self.header, self.records, steps=steps)
        save_figure(plot_runs([run]), self.run_dir / "loss_curve.png")
        now = time.perf_counter()
        self.next_plot = now + max(PLOT_INTERVAL, (now - start) / PLOT_SHARE)

    def forward(self, record: Record) -> None:
        """Send a record to TensorBoard and Weights & Biases, if they are in use."""
        for write in self.writers:
            write({name: value for name, value in record.items() if value is not None})

    def stopped(self, step: int) -> None:
        if rank() == 0:
            self.plot()
            print(
                f"stopped and saved at step {step}; --resume continues from here; next: "
                f"{self.sample_command()}"
            )

    def sample_command(self) -> str:
        """What samples from this run: its best step, or its newest while that is step 0."""
        file = self.run_dir / ("best.pt" if self.best()["step"] else "latest.pt")
        question = ' --prompt "Who are you?"' * ("questions" in self.header["corpus"])
        return f"python generate.py {quote_path(file)}{question}"

    def finish(self, metrics: dict[str, float]) -> None:
        """Report the metrics of the best checkpoint over the whole validation split."""
        words = verdict(self.records, self.header)
        final = {"step": self.best()["step"], **metrics, "verdict": words}
        if rank():
            return
        self.append({"final": final})
        print(
            f"done in {self.records[-1]['seconds']:.0f} s: best at step {final['step']}; over the "
            f"whole validation split: {status_line(metrics)}\n"
            f"verdict: {words}\n"
            f"files: {self.run_dir}/; next: {self.sample_command()}",
            flush=True,
        )
        self.plot()


def run_files(run_dir: Path, suffix: str = "") -> list[Path]:
    """The files of a run in a folder, or with ".part" those not completely written."""
    patterns = (*REWRITTEN, SAMPLES, *CHECKPOINTS)
    return [file for pattern in patterns for file in run_dir.glob(pattern + suffix)]


def json_line(record: Record) -> str:
    """A record as a line of JSON, which has no infinite numbers: the gradient norm of a step that
    overflowed float16 becomes null.

    >>> json_line({"step": 10, "grad_norm": math.inf})
    '{"step": 10, "grad_norm": null}\\n'
    """
    bad = {k: None for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(record | bad) + "\n"


def status_line(record: Record) -> str:
    """The metrics of an evaluation that are known and shown, in one line.

    >>> status_line({"lr": 0.001, "margin": 0.5, "val": 1.23456, "step": 10, "grad_norm": None})
    'step 10 | val 1.2346 | margin 0.500 | lr 1.00e-03'
    """
    names = list(FORMATS)
    at = names.index("lr")
    names[at:at] = [name for name in record if name not in (*FORMATS, "seconds")]
    return " | ".join(
        FORMATS.get(name, "{name} {:.3f}").format(value, name=name, thousands=value / 1000)
        for name in names
        if (value := record.get(name)) is not None
    )


def diverged(step: int, numbers: dict[str, float]) -> UserError:
    """The error of a run whose loss or gradient is infinite or not a number."""
    what = ", ".join(f"{name} {value}" for name, value in numbers.items())
    return UserError(
        f"diverged at step {step} ({what}): try a lower --lr_max, or instead of float16 "
        "--precision float32; checkpoints of earlier steps are kept"
    )
