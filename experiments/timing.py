"""The speed of functions, of the machine, of training steps and of sampling; and what measured
numbers depend on: commit, corpus, precision, machine, versions.

What is compared is measured in turns, because the speed of a machine varies over time.
"""

import contextlib
import functools
import math
import multiprocessing
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import GPTConfig, SampleConfig, train_settings
from corpus.corpus import Corpus
from experiments.baselines import Functions, nanogpt_step
from generate import generate
from model import GPT
from sampling.quantize import Int8Linear, lower_precision
from tokenizer import CharTokenizer
from train import Trainer, new_trainer
from training.checks import flops_per_token
from training.setup import Data, Flags, keep_freed_memory
from training.task import Pretraining

ROOT = Path(__file__).parent.parent
VOCAB_SIZE = 65  # the characters of TinyShakespeare


class Row(NamedTuple):
    what: str
    result: str
    problem: bool = False


def to_table(rows: list[Row]) -> str:
    """Rows as a Markdown table. The first one is its head."""
    head, *lines = (f"| {r.what} | {'WRONG: ' * r.problem}{r.result} |" for r in rows)
    return "\n".join([head, "|---|---|", *lines])


def run_record(corpus: dict[str, Any], precision: str, device: torch.device) -> dict[str, Any]:
    """What a run depends on besides its flags. corpus: the `info` of a Corpus."""
    return {
        "commit": git_commit(),
        "corpus": {name: corpus.get(name) for name in ("name", "bytes", "sha256")},
        "precision": precision,
        "machine": device_name(device),
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }


@functools.cache
def git_commit() -> str:
    """The commit of the code at the first call, and whether its Python files were changed since."""
    try:
        head = git("rev-parse", "HEAD")
        changed = git("diff", "--name-only", "HEAD", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")


def git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # on Linux
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    n = torch.get_num_threads()
    return f"{device.type}, {n} thread{'s' * (n > 1)}, {name}"


def time_once(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_seconds(functions: Functions, repeats: int) -> dict[str, float]:
    """The median time of each function. They are called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(time_once(function))
    return {name: median_high(seconds) for name, seconds in times.items()}


@functools.cache
def matmul_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations per second in the product of two large matrices, at best."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=getattr(torch, precision))
    times = [time_once(lambda: (a @ a)[0, 0].item()) for _ in range(9)]  # item() waits for the GPU
    return 2 * n**3 / min(times)


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in bytes: on a GPU that of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Training(NamedTuple):
    name: str
    flags: tuple[tuple[str, Any], ...]  # of train.py, with the precision
    device: torch.device
    nanogpt: str = ""  # path of nanoGPT's repository: a step of its model instead of ours


def make_trainer(flags: Flags, device: torch.device) -> Trainer:
    """A trainer on a sequence that can be learned in part."""
    gpt, config = train_settings(flags, device.type)
    ids = (np.arange(1_000_000) ** 2 // 7 % VOCAB_SIZE).astype(np.uint8)
    corpus = Corpus(ids, ids, {"name": "numbers"}, len(ids), len(ids))
    tokenizer = CharTokenizer([chr(i) for i in range(VOCAB_SIZE)])
    return new_trainer(Pretraining, device, gpt, config, Data(tokenizer, corpus))


@functools.cache
def make_step(training: Training) -> Callable[[], Tensor]:
    """A function that makes a training step and returns its loss."""
    if training.nanogpt:
        return nanogpt_step(training.nanogpt, dict(training.flags), training.device)
    trainer = make_trainer(dict(training.flags), training.device)
    return lambda: trainer.train_step()["loss"]


def run_steps(training: Training, n: int) -> float:
    """Make n training steps, in a process of their own. Returns its peak memory."""
    keep_freed_memory()
    step = make_step(training)
    for _ in range(n):
        loss = step()
    loss.item()  # wait for the GPU
    return peak_memory(training.device)


def training_rows(trainings: list[Training], n_steps: int, repeats: int) -> list[Row]:
    """Tokens per second, time per step, MFU (model FLOP utilization: the share of the speed of
    large matrix products), and peak memory. Each training has a process; they take turns."""
    context = multiprocessing.get_context("spawn")

    def run(training: Training) -> float:
        return pools[training.name].submit(run_steps, training, n_steps).result()

    with contextlib.ExitStack() as stack:
        pools = {t.name: stack.enter_context(ProcessPoolExecutor(1, context)) for t in trainings}
        runs: Functions = {t.name: functools.partial(run, t) for t in trainings}
        memory = {name: run() for name, run in runs.items()}  # warms up, and compiles
        seconds = median_seconds(runs, repeats)
    rows = []
    for training in trainings:
        gpt, config = train_settings(dict(training.flags), training.device.type)
        step_seconds = seconds[training.name] / n_steps
        rate = config.batch_size * gpt.block_size / step_seconds
        flops = rate * flops_per_token(gpt)
        peak = matmul_flops(training.device, config.precision)
        result = f"{rate:,.0f} tokens/s, {1000 * step_seconds:.1f} ms/step, {flops / 1e9:,.0f} of "
        result += f"{peak / 1e9:,.0f} GFLOP/s (MFU {flops / peak:.0%}), "
        result += f"{memory[training.name] / 1e6:,.0f} MB"
        rows.append(Row(training.name, result))
    return rows


def sample(model: GPT, config: SampleConfig) -> Tensor:
    """The tokens that follow a prompt of one token, (num_samples, max_new_tokens), on the CPU."""
    prompt = torch.zeros(1, dtype=torch.long, device=model.tok.weight.device)
    return torch.stack([step.ids for step in generate(model, prompt, config)], dim=1).cpu()


def sampling_rows(
    gpt: GPTConfig,
    device: torch.device,
    configs: dict[str, SampleConfig],
    others: Functions,
    repeats: int,
) -> list[Row]:
    """Tokens per second in texts of the same length, of our model with these settings and of other
    samplers, in turns; of ours, also the size of the linear layers, read for each token."""
    samplers: Functions = {}
    megabytes: dict[str, float] = {}
    for name, config in configs.items():
        model = GPT(gpt).to(device).eval()
        lower_precision(model, config.precision)
        samplers[name] = functools.partial(sample, model, config)
        linears = [m for m in model.modules() if isinstance(m, nn.Linear | Int8Linear)]
        tensors = [t for m in linears for t in m.state_dict().values()]
        megabytes[name] = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    torch._dynamo.config.automatic_dynamic_shapes = False  # kernels for each batch size
    for sampler in (samplers | others).values():
        sampler()  # warms up, and compiles
    rows = []
    n_tokens = max(config.max_new_tokens for config in configs.values())
    for name, seconds in median_seconds(samplers | others, repeats).items():
        rate = n_tokens / seconds
        result = f"{rate:,.0f} tokens/s"
        if name in configs:
            result = f"{configs[name].num_samples} x {result}, {megabytes[name]:.1f} MB per token"
        rows.append(Row(name, result))
    return rows
