"""Kill runs at random moments, resume them, and compare with an uninterrupted run, bit for bit.

    python -m tests.crash --kills 100                  about a minute
    python -m tests.crash --only train --seed 7 --minutes 10

Half of the kills come at a random time. The others come before or after a random file operation,
and so hit every moment of a save. A killed training run is resumed, or started again if it had
saved nothing, until it is finished; then its checkpoints, log and samples must equal those of a run
that was never killed, except for times. A killed `prepare` or `export` must leave the old folder or
the new one, complete. In the end no temporary files may remain.

Each command runs in a fork of this process, which has imported everything, on the inputs of
tests/fuzz.py.
"""

import builtins
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from system.start import run

import torch

from system.command_line import parse_args
from system.folders import restore_folder
from system.settings import setting
from tests.fuzz import fork, redirect, run_script, temporary_folder
from tests.fuzz_cases import BPE, LLAMA, make_fixtures
from training.run_log import RunLog

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LIMIT = 300  # seconds; a command that takes longer hangs
MAX_LIVES = 40  # of a run: if it is killed more often, something else is wrong
# Entries that differ between equal runs, or in a resumed one.
NOT_COMPARED = {"seconds", "tokens_per_second", "ms_per_step", "files"}
NOT_COMPARED |= {"out_dir", "tag", "resume", "overwrite"}
OPERATIONS = [
    (os, name) for name in "fsync replace rename unlink truncate mkdir rmdir open".split()
]
OPERATIONS += [(builtins, "open")]

RUN = "--data=data/input.txt --tag=run --device=cpu --no-compile --precision=float32"
RUN += " --batch_size=4 --eval_every=5 --save_every=10 --eval_windows=4 --sample_tokens=10"
SIZES = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --optimizer=muon --dropout=0.1"


class Job(NamedTuple):
    """A command that is killed, and the folder that it writes."""

    argv: str
    folder: str = "checkpoints/run"
    replaces: bool = False  # the folder, which exists; otherwise it is resumed
    share: int = 3  # of the trials


JOBS = {
    "train": Job(f"{RUN} {SIZES} --max_steps=60", share=12),
    "finetune": Job(f"{LLAMA} {RUN} --dropout=0.1 --lora_rank=2 --max_steps=30"),
    "prepare": Job(
        "data/input.txt --name=set --vocab_size=280 --workers=1 --overwrite", "data/set", True
    ),
    "export": Job(f"{BPE} hf --overwrite", "hf", True),
}


@dataclass
class CrashConfig:
    """How often what is killed."""

    kills: int = setting(100, "number of kills", low=1)
    seed: int = setting(0, "seed of the moments", low=0)
    minutes: float = setting(0.0, "stop after this time; 0: never", low=0)
    only: str = setting("", "one command; default: all", choices=("", *JOBS))


# --- one command


class Killer:
    """Counts the file operations of this process, and sends it a signal at one of them."""

    def __init__(self, number: int, at: int):
        self.number, self.at, self.count = number, at, 0
        for module, name in OPERATIONS:
            setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, operation: Callable) -> Callable:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = operation(*args, **kwargs)
            self.tick()
            return result

        return counting

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)


def run_child(name: str, argv: str, folder: Path, number: int, at: int) -> int:
    """Run a command as its script does. Returns its exit status."""
    os.chdir(folder)
    redirect(folder)
    RunLog.plot = lambda self: None  # type: ignore[method-assign]  # slower than everything else
    signal.alarm(LIMIT)
    os.fsync = lambda fd: None  # slow, and without effect on a kill: the pages are the kernel's
    killer = Killer(number, at)
    status = run_script(name, argv.split())
    Path(folder, "operations").write_text(str(killer.count))
    return status


def run_command(
    name: str, argv: str, folder: Path, number: int = 0, at: int = 0, delay: float = 0.0
) -> tuple[int, str]:
    """Run a command in a child process. If `number` is given, send it this signal, at a file
    operation or after a delay. Returns its exit status, negative after a signal, and its stderr."""
    pid = fork(run_child, name, argv, folder, number, at)
    if delay:
        time.sleep(delay)
        os.kill(pid, number)  # if it has ended, it still has its id
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, (folder / "stderr").read_text() if (folder / "stderr").exists() else ""


# --- comparison


def content(path: Path) -> Any:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in value.keys() - NOT_COMPARED:
            yield from leaves(value[key], f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{place}[{i}]")
    else:
        is_tensor = isinstance(value, torch.Tensor)
        yield place, (value.dtype, value.tolist()) if is_tensor else value


def contents(folder: Path) -> dict[str, Any]:
    """The values in the files of a folder by file and place."""
    found = {}
    for path in filter(Path.is_file, folder.glob("*")):
        try:
            found |= {path.name: "a file"} | dict(leaves(content(path), path.name))
        except Exception as error:
            found[path.name] = f"cannot be read: {error}"
    return found


def compare(folder: Path, expected: Path) -> list[str]:
    ours, theirs = contents(folder), contents(expected)
    places = [p for p in sorted(ours.keys() | theirs.keys()) if ours.get(p) != theirs.get(p)]
    return [f"{p}: {str(ours.get(p))[:60]}, not {str(theirs.get(p))[:60]}" for p in places[:3]]


# --- trials


class Trials:
    """Kills commands, and counts what goes wrong."""

    def __init__(self, settings: CrashConfig, top: Path):
        self.settings, self.top, self.rng = settings, top, random.Random(settings.seed)
        self.kills: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        self.moment = ""
        self.started = time.monotonic()

    def run(self) -> None:
        make_fixtures(self.top / "old")
        names = [self.settings.only] if self.settings.only else list(JOBS)
        for name in names:  # what each makes if it is not killed
            shutil.copytree(self.top / "old", self.top / name)
            start = time.monotonic()
            status, stderr = run_command(name, JOBS[name].argv, self.top / name)
            assert status == 0, stderr
            self.seconds[name] = time.monotonic() - start
            self.operations[name] = int((self.top / name / "operations").read_text())
        self.started = time.monotonic()
        while not self.done():
            name = self.rng.choices(names, [JOBS[name].share for name in names])[0]
            folder = self.top / "trial"
            shutil.copytree(self.top / "old", folder)
            finished = (self.replace if JOBS[name].replaces else self.resume)(name, folder)
            if finished:
                for problem in self.differences(name, folder):
                    self.report(name, f"at the end, {problem}")
                left = [p.name for p in folder.rglob("*") if re.search(r"\.(part|old)$", p.name)]
                if left:
                    self.report(name, f"at the end, there is {', '.join(left)}")
            shutil.rmtree(folder)

    def differences(self, name: str, folder: Path, expected: str = "") -> list[str]:
        return compare(*(f / JOBS[name].folder for f in (folder, self.top / (expected or name))))

    def done(self) -> bool:
        late = time.monotonic() - self.started > 60 * (self.settings.minutes or 1e9)
        return late or self.kills.total() >= self.settings.kills

    def report(self, name: str, problem: str, detail: str = "") -> None:
        """Print and count a problem. Numbers are left out of the count, to group similar ones."""
        self.problems[f"{name}: {re.sub('[0-9.]+', 'N', problem)}"] += 1
        print(f"{name}: {problem}\n    last kill: {self.moment}\n    {detail[-900:]}", flush=True)

    def kill(self, name: str, argv: str, folder: Path) -> int:
        """Run a command that is killed, unless it is finished before. Returns its exit status."""
        number, delay, at = self.rng.choice(SIGNALS), 0.0, 0
        if self.rng.random() < 0.5:
            delay = max(1e-3, self.seconds[name] * self.rng.random())
        else:
            at = self.rng.randint(1, self.operations[name])
        self.moment = f"{number.name} {f'after {delay:.2f} s' if delay else f'at operation {at}'}"
        status, stderr = run_command(name, argv, folder, number, at, delay)
        if status:
            self.kills[number.name] += 1
        if "Traceback" in stderr:
            self.report(name, f"traceback: {stderr.splitlines()[-1]}", stderr)
        elif status not in (0, -number, 128 + number):
            self.report(name, f"status {status}", stderr)
        return status

    def resume(self, name: str, folder: Path) -> bool:
        """Kill and resume a run until it is finished. Returns whether that succeeds."""
        job = JOBS[name]
        for life in range(MAX_LIVES):
            saved = (folder / job.folder / "latest.pt").exists()
            argv = "--resume --tag=run" if saved else job.argv + " --overwrite" * (life > 0)
            if life and (self.done() or self.rng.random() < 0.2):
                status, stderr = run_command(name, argv, folder)
            else:
                status, stderr = self.kill(name, argv, folder), ""
            if status == 0:
                return True
            if status in (1, 2, 99):
                self.report(name, f"status {status} of {argv[:8]}", stderr)
                return False
        return False

    def replace(self, name: str, folder: Path) -> bool:
        """Kill a command that replaces a folder, which must leave the old or the new one, and run
        it again. Returns whether that succeeds."""
        argv = JOBS[name].argv
        self.kill(name, argv, folder)
        restore_folder(folder / JOBS[name].folder)  # as the next command does
        wrong = [self.differences(name, folder, expected) for expected in ("old", name)]
        if all(wrong):
            self.report(name, "neither the old nor the new folder", str(wrong))
        status, stderr = run_command(name, argv, folder)
        if status:
            self.report(name, f"status {status} when it is run again", stderr)
        return status == 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 1 if there was a problem."""
    settings = parse_args(CrashConfig, argv, __doc__ or "")
    torch.set_num_threads(1)
    with temporary_folder() as top:
        trials = Trials(settings, top)
        trials.run()
    minutes = (time.monotonic() - trials.started) / 60
    print("\nproblems by kind:")
    for problem, n in trials.problems.most_common():
        print(f"{n:5} {problem}")
    n_kills, n_problems = trials.kills.total(), trials.problems.total()
    by_signal = ", ".join(f"{name}: {n}" for name, n in trials.kills.items())
    print(f"{n_problems} problems in {n_kills} kills ({by_signal}), {n_kills / minutes:.0f}/min")
    return 1 if n_problems else 0


if __name__ == "__main__":
    run(main)
