"""The lowest validation loss in a given time: train each recipe with several seeds, in turns.

python -m experiments.speedrun --nanogpt path/to/nanoGPT                  quick, laptop, fast
python -m experiments.speedrun --recipes four_minutes,six_minutes,twenty_minutes
python -m experiments.speedrun --recipes medium                           on a GPU

The seconds are those from starting the command to its last validation loss, with nothing compiled
beforehand. speedrun.jsonl has all validation losses of each run, and what it depends on. Our losses
are over the whole validation split; nanoGPT's is its own estimate, from random windows. The time of
nanoGPT's recipe for a CPU is the unit in which experiments/records.md compares times, because it
has less noise than seconds.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import NamedTuple
from system.start import run

import torch
from tqdm import tqdm

from corpus.load import find_corpus
from corpus.text import file_info
from experiments.baselines import nanogpt_command, nanogpt_problems
from experiments.comparison import mean
from experiments.study import to_markdown
from experiments.timing import ROOT, run_record
from system.command_line import parse_args
from system.device import pick_device
from system.files import folder_problems
from system.settings import UserError, setting

# Repeated texts need much more weight decay than usual, and larger models more (Kim et al. 2025).
LONG = "--preset fast --max_steps 2400 --eval_every 600 --log_every 50"
RECIPES = {
    "quick": "--preset quick",
    "laptop": "--preset laptop",
    "fast": "--preset fast",
    "medium": "--preset medium",  # for a GPU
    "four_minutes": f"{LONG} --n_embd 192 --n_head 3 --lr_max 4.9e-3 --weight_decay 1",
    "six_minutes": f"{LONG} --n_embd 256 --n_head 4 --lr_max 4.2e-3 --weight_decay 1",
    "twenty_minutes": (
        f"{LONG} --n_layer 6 --n_embd 384 --n_head 6 --lr_max 3.5e-3 --weight_decay 2"
    ),
}
BASELINE = "nanoGPT"


@dataclass
class SpeedrunConfig:
    recipes: str = setting("quick,laptop,fast", f"names, separated by commas: {', '.join(RECIPES)}")
    seeds: str = setting("1337,1338,1339", "random seeds of our runs, separated by commas")
    nanogpt: str = setting("", "path of nanoGPT's repository, to compare with it")
    data: str = setting("shakespeare", "text, as for train.py")
    results: str = setting("checkpoints/studies/results", "folder of the log, speedrun.jsonl")

    def problems(self) -> list[str]:
        unknown = [name for name in self.recipes.split(",") if name not in RECIPES]
        found = [f"no recipe {name!r}: choose from {', '.join(RECIPES)}" for name in unknown]
        if not all(seed.isdecimal() for seed in self.seeds.split(",")):
            found.append(f"seeds must be numbers separated by commas, not {self.seeds!r}")
        return found + nanogpt_problems(self.nanogpt) + folder_problems(Path(self.results))


class Timed(NamedTuple):
    seconds: float  # since the start of the command
    loss: float


def time_losses(command: list[str], cwd: str, environment: dict[str, str]) -> list[Timed]:
    """Run a training command. Returns each validation loss that it prints, with the time."""
    losses = []
    last_line = ""
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout  # a pipe, as requested
        for line in process.stdout:
            last_line = line.strip() or last_line
            seconds = time.perf_counter() - start
            if found := re.search(r"\bval(?:idation)?(?: loss)? ([\d.]+)", line):
                losses.append(Timed(round(seconds, 1), float(found[1])))
    if not losses or process.returncode:
        raise UserError(f"{' '.join(command[1:3])} failed: {last_line}")
    return losses


def measure(name: str, seed: str, config: SpeedrunConfig) -> Timed:
    """The seconds and the loss of one run, with empty caches of compiled code."""
    data, flags = find_corpus(config.data).resolve(), RECIPES.get(name, "")
    with tempfile.TemporaryDirectory() as folder:
        command, cwd = ["train.py", *flags.split(), "--data", str(data)], str(ROOT)
        command += ["--out_dir", folder, "--seed", seed]
        if name == BASELINE:
            command, cwd = nanogpt_command(config.nanogpt, data, folder), config.nanogpt
        caches = {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
        losses = time_losses([sys.executable, *command], cwd, os.environ | caches)
    precision = "float32" if name == BASELINE else "auto"
    record = run_record(file_info(data), precision, pick_device("auto"))
    record |= {"date": f"{datetime.date.today()}", "recipe": name, "flags": flags, "seed": seed}
    record |= {"losses": [loss._asdict() for loss in losses]}
    with open(Path(config.results, "speedrun.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")
    return losses[-1]


def table(results: dict[str, list[Timed]]) -> str:
    """The seconds and losses of the runs by recipe; times are relative to the first recipe."""
    rows = []
    medians = {name: median_high(run.seconds for run in runs) for name, runs in results.items()}
    unit, *_ = medians.values()
    for name, runs in results.items():
        row = {"recipe": name, "seconds": ", ".join(f"{run.seconds:.1f}" for run in runs)}
        row |= {"median": f"{medians[name]:.1f}", "relative": f"{medians[name] / unit:.2f}"}
        row["validation loss"] = ", ".join(f"{run.loss:.4f}" for run in runs)
        rows.append(row | {"mean": f"{mean([run.loss for run in runs]):.4f}"})
    return to_markdown(rows)


def main(argv: list[str] | None = None) -> int:
    config = parse_args(SpeedrunConfig, argv, __doc__)
    Path(config.results).mkdir(parents=True, exist_ok=True)
    names = [BASELINE] * bool(config.nanogpt) + config.recipes.split(",")
    results: dict[str, list[Timed]] = {name: [] for name in names}
    runs = [(name, seed) for seed in config.seeds.split(",") for name in names]
    for name, seed in tqdm(runs, unit="run", disable=None):
        result = measure(name, seed, config)
        results[name].append(result)
        tqdm.write(f"{name}, seed {seed}: {result.seconds:.1f} s, loss {result.loss:.4f}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{table(results)}")
    return 0


if __name__ == "__main__":
    run(main)
