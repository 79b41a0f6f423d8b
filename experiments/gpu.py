"""Check what a GPU computes, and measure how fast. Without one: a test with a tiny model."""

import contextlib
import copy
import functools
import gc
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import train
from config import SampleConfig, train_settings
from corpus.corpus import Corpus
from experiments.baselines import nanogpt_step
from experiments.timing import time_losses, time_once
from generate import generate
from model import GPT
from sampling.quantize import lower_precision
from system.settings import UserError
from tokenizer import CharTokenizer
from train import Trainer
from training.checks import flops_per_token
from training.setup import Flags, memory_estimate, pick_precision
from training.task import Pretraining
from utils import read_checkpoint

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
VOCAB_SIZE = 65
RUN_SECONDS = 180
TARGET_LOSS = 1.4697  # nanoGPT's for TinyShakespeare on one A100, in three minutes
# Dense bfloat16 (before Ampere float16) TFLOP/s with sums in float32, from NVIDIA's data sheets.
PEAKS = {
    **{"T4": 65, "V100": 125, "A10G": 70, "A10": 125, "A100": 312, "L4": 121, "L40S": 362},
    **{"RTX 3090": 71, "RTX 4090": 165, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250},
}
TINY: Flags = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4}
TINY |= {"vocab_size": VOCAB_SIZE, "lr_max": 3e-3, "warmup_steps": 5, "compile": False}


class Scale(NamedTuple):
    """How much is measured."""

    models: dict[str, Flags]
    steps: int  # timed, after as many to warm up
    n_tokens: int  # sampled
    batch_sizes: tuple[int, ...]
    run: str  # flags of the run that is timed
    compile: bool


FULL = Scale(
    {"medium": {"preset": "medium", "vocab_size": VOCAB_SIZE},
     "124 M": {"preset": "gpt2", "arch": "gpt2", "vocab_size": 50304}},
    20, 250, (1, 8, 64), "--preset medium --data shakespeare", True,
)  # fmt: skip
TOY = Scale(
    {"toy": TINY}, 2, 40, (1, 2),
    f"--preset quick --device cpu --max_steps 20 --eval_every 10 --data {ROOT}/data/example.txt",
    False,
)  # fmt: skip


class Row(NamedTuple):
    what: str
    result: str
    problem: bool = False


# --- models


def make_trainer(
    flags: Flags, device: torch.device, precision: str = "float32", compiled: bool = False
) -> Trainer:
    """A trainer on a sequence that can be learned in part."""
    gpt, config = train_settings(flags, device.type)
    config.precision, config.compile = precision, compiled
    torch.manual_seed(0)
    ids = (np.arange(1_000_000) ** 2 // 7 % VOCAB_SIZE).astype(np.uint8)
    corpus = Corpus(ids, ids, {"name": "numbers"}, len(ids), len(ids))
    tokenizer = CharTokenizer([chr(i) for i in range(VOCAB_SIZE)])
    task = Pretraining(corpus, tokenizer, gpt.block_size, config, device)
    return Trainer(GPT(gpt), task, config, device)


def losses(trainer: Trainer, n_steps: int) -> Tensor:
    """The losses of the next steps, on the CPU."""
    return torch.stack([trainer.train_step()["loss"] for _ in range(n_steps)]).cpu()


# --- checks


def check_losses(device: torch.device) -> Row:
    """50 steps in float32, on the device and on the CPU: rounding differs, by less than 0.001."""
    ours, theirs = (losses(make_trainer(TINY, d), 50) for d in (device, CPU))
    largest = (ours - theirs).abs().max().item()
    return Row(
        "losses of 50 steps, float32", f"within {largest:.1g} of the CPU's", not largest < 1e-3
    )


def check_precisions(device: torch.device) -> list[Row]:
    """40 steps in each precision: the last losses are those of float32, with a margin of 0.05."""
    means = {}
    for precision in ("float32", "bfloat16", "float16"):
        means[precision] = losses(make_trainer(TINY, device, precision), 40)[-10:].mean().item()
    exact = means.pop("float32")
    return [
        Row(f"loss in {p}", f"{mean:.4f}, float32 {exact:.4f}", not abs(mean - exact) < 0.05)
        for p, mean in means.items()
    ]


def check_generation(device: torch.device) -> Row:
    """The tokens that a trained model samples in float32, with each cache, and on the CPU."""
    trainer = make_trainer(TINY, device)
    losses(trainer, 40)
    model = trainer.model.eval()
    texts = [sample(model, device, 3, 50, cache=cache) for cache in (True, False)]
    texts.append(sample(copy.deepcopy(model).to(CPU), CPU, 3, 50))
    same = all(torch.equal(text, texts[0]) for text in texts)
    return Row("sampling in float32", "equals the CPU's" if same else "differs", not same)


def check_runs(device: torch.device) -> list[Row]:
    """A run with train.py; the same resumed in the middle; the same with DDP in one process."""
    text = Path(ROOT, "data", "example.txt")
    flags = f"--preset quick --max_steps 20 --eval_every 10 --save_every 10 --data {text} "
    flags += f"--device {device.type} --no-compile --precision float32 --sample_tokens 0"
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder, name) for name in ("whole", "resumed", "ddp")}
        run_train(f"{flags} --out_dir {runs['whole']}")
        runs["resumed"].mkdir()
        for path in runs["whole"].iterdir():
            name = {"latest.pt": "", "ckpt_00010.pt": "latest.pt"}.get(path.name, path.name)
            if name and path.is_file():
                shutil.copy(path, runs["resumed"] / name)
        run_train(f"--resume --out_dir {runs['resumed']}")
        torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "1"}
        torchrun |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        with mock.patch.dict(os.environ, torchrun):
            run_train(f"{flags} --out_dir {runs['ddp']}")
        models = {n: read_checkpoint(path / "latest.pt")["model"] for n, path in runs.items()}
    weights = {name: torch.cat([t.flatten() for t in m.values()]) for name, m in models.items()}
    errors = {n: (weights[n] - weights["whole"]).abs().max().item() for n in ("resumed", "ddp")}
    return [Row(f"{n} run", f"weights within {e:.1g}", not e < 1e-3) for n, e in errors.items()]


def run_train(flags: str) -> None:
    """train.py, silently, in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(flags.split())


# --- measurements


def peak_flops(name: str) -> float | None:
    """The peak of a card, if it is known, from the longest name in the table that fits.

    >>> peak_flops("NVIDIA H100 PCIe"), peak_flops("NVIDIA L40S"), peak_flops("Quadro")
    (756000000000000.0, 362000000000000.0, None)
    """
    found = [card for card in PEAKS if re.search(rf"\b{card}\b", name)]
    return 1e12 * PEAKS[max(found, key=len)] if found else None


def training_row(name: str, flags: Flags, scale: Scale, device: torch.device, nanogpt: str) -> Row:
    """Tokens per second, milliseconds per step, MFU, and peak memory in the best precision: of
    train.py's step, or of nanoGPT's if a checkout is given."""
    precision = pick_precision("auto", device)[0]
    gpt, config = train_settings(flags | {"precision": precision}, device.type)
    step: Callable[[], Any]
    if nanogpt:
        step = nanogpt_step(nanogpt, flags, precision, scale.compile, str(device))
    else:
        step = make_trainer(flags, device, precision, scale.compile).train_step

    def steps() -> None:
        for _ in range(scale.steps):
            step()
        torch.zeros(1, device=device).item()  # wait for the device

    if device.type == "cuda":
        gc.collect()  # a compiled model refers to itself
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps()  # warm up, and compile
    seconds = time_once(steps) / scale.steps
    rate = config.batch_size * gpt.block_size / seconds
    result = f"{rate:,.0f} tokens/s, {1000 * seconds:.1f} ms/step"
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))
        result += f", MFU {rate * flops_per_token(gpt) / peak:.3f}" if peak else ""
        result += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    estimate = sum(memory_estimate(gpt, config).values()) / 1e9
    result += "" if nanogpt else f" (estimate {estimate:.2f} GB)"
    return Row(f"{'nanoGPT' if nanogpt else 'training'}, {name}, {precision}", result)


def cuda_graphs_row(name: str, flags: Flags, scale: Scale, device: torch.device) -> Row:
    """What CUDA graphs change, which launch all kernels of a small model at once: not the loss."""
    precision = pick_precision("auto", device)[0]
    trainers = [make_trainer(flags, device, precision, scale.compile) for _ in range(2)]
    if scale.compile:
        trainers[0].model.compile(dynamic=False)
    without, with_graphs = (losses(trainer, 50) for trainer in trainers)
    largest = (without - with_graphs).abs().max().item()
    times = [time_once(functools.partial(losses, trainer, scale.steps)) for trainer in trainers]
    result = f"losses within {largest:.1g}, {times[0] / times[1]:.2f} times as fast"
    return Row(f"CUDA graphs, {name}, {precision}", result, not largest < 0.05)


def sample(model: GPT, device: torch.device, batch: int, n: int, **settings: Any) -> Tensor:
    """n tokens of each of a batch of texts, (batch, n), on the CPU."""
    prompt = torch.zeros(1, dtype=torch.long, device=device)
    config = SampleConfig(max_new_tokens=n, num_samples=batch, seed=1, **settings)
    return torch.stack([step.ids for step in generate(model, prompt, config)], dim=1).cpu()


def sampling_rows(scale: Scale, device: torch.device) -> list[Row]:
    """Tokens per second of the first model at several batch sizes, in the best precision."""
    name, flags = next(iter(scale.models.items()))
    precision = pick_precision("auto", device)[0]
    model = GPT(train_settings(flags, device.type)[0]).to(device).eval()
    lower_precision(model, precision)
    rows = []
    for batch in scale.batch_sizes:
        settings = {"precision": precision, "compile": scale.compile}
        torch.compiler.reset()  # or later batch sizes would get more general kernels
        run = functools.partial(sample, model, device, batch, scale.n_tokens, **settings)
        run()  # compile
        rate = batch * scale.n_tokens / time_once(run)
        rows.append(Row(f"sampling {name}, batch size {batch}", f"{rate:,.0f} tokens/s"))
    return rows


def run_row(scale: Scale) -> Row:
    """A run of train.py: when its loss is TARGET_LOSS, with the start of the command, and its best
    loss in the time."""
    torch.cuda.empty_cache()  # for the other process
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *scale.run.split(), "--out_dir", folder]
        evaluations = time_losses(command, str(ROOT), dict(os.environ), RUN_SECONDS)
    best = min(evaluations, key=lambda evaluation: evaluation.loss)
    reached = [f"{e.seconds:.1f} s" for e in evaluations if e.loss <= TARGET_LOSS]
    return Row(
        f"train.py {scale.run.partition(' --data')[0]}",
        f"loss {TARGET_LOSS}: {(reached or ['not reached'])[0]}; "
        f"best {best.loss:.4f} after {best.seconds:.1f} s",
    )


# --- the table


def output_of(command: str) -> str:
    """What a command prints; "?" if it does not work."""
    status, output = subprocess.getstatusoutput(f"cd '{ROOT}' && {command}")
    return "?" if status else output.splitlines()[0]


def attempt(what: str, measure: Callable[[], Row | list[Row]]) -> list[Row]:
    """The rows of a measurement, or its error: the others are measured all the same."""
    try:
        rows = measure()
    except (RuntimeError, UserError) as error:  # also those of PyTorch, CUDA and the compiler
        return [Row(what, (str(error).splitlines() or [repr(error)])[0], True)]
    return rows if isinstance(rows, list) else [rows]


def bench_gpu(nanogpt: str = "") -> str:
    """The checks and measurements as a Markdown table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    scale = FULL if is_cuda else TOY
    torch.set_float32_matmul_precision("highest")  # TF32 rounds factors to 10 bits
    measurements: dict[str, Callable[[], Row | list[Row]]] = {
        "losses": functools.partial(check_losses, device),
        "precisions": functools.partial(check_precisions, device),
        "sampling": functools.partial(check_generation, device),
        "runs": functools.partial(check_runs, device),  # train.py allows TF32 from here on
    }
    checkouts = ["", nanogpt] if nanogpt else [""]
    for (name, flags), path in itertools.product(scale.models.items(), checkouts):
        measure = functools.partial(training_row, name, flags, scale, device, path)
        measurements[f"{'nanoGPT' if path else 'training'}, {name}"] = measure
    small = next(iter(scale.models.items()))
    measurements |= {
        "speed of sampling": functools.partial(sampling_rows, scale, device),
        "CUDA graphs": functools.partial(cuda_graphs_row, *small, scale, device),
        "run": functools.partial(run_row, scale),
    }
    rows = [row for what, measure in measurements.items() for row in attempt(what, measure)]
    card = torch.cuda.get_device_name(device) if is_cuda else "no GPU: a test with a tiny model"
    driver = output_of("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    commit = output_of("git rev-parse --short HEAD")
    head = f"| {card} | driver {driver}, torch {torch.__version__}, commit {commit} |\n|---|---|"
    lines = (f"| {r.what} | {'WRONG: ' * r.problem}{r.result} |" for r in rows)
    return "\n".join([head, *lines])
