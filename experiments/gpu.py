"""Check what a GPU computes, and measure how fast. Without one: a test with a tiny model."""

import contextlib
import copy
import functools
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from timeit import timeit
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import train
from config import SampleConfig, train_settings
from experiments import timing
from experiments.timing import ROOT, Row, Training, git_commit, make_trainer, sample
from system.errors import first_line
from system.settings import UserError
from train import Trainer
from training.setup import Flags, pick_precision
from utils import read_checkpoint

CPU = torch.device("cpu")
TINY: Flags = {"preset": "laptop", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
TINY |= {"batch_size": 4, "lr_max": 3e-3, "warmup_steps": 5, "vocab_size": timing.VOCAB_SIZE}
MODELS: dict[str, Flags] = {
    "medium": {"preset": "medium", "vocab_size": timing.VOCAB_SIZE},
    "124 M": {"preset": "gpt2", "arch": "gpt2", "vocab_size": 50304},
}


def losses(trainer: Trainer, n_steps: int) -> Tensor:
    return torch.stack([trainer.train_step()["loss"] for _ in range(n_steps)]).cpu()


def check_losses(device: torch.device) -> list[Row]:
    """50 steps on the device, compared with float32 on the CPU: in float32, rounding differs, by
    less than 0.001; in lower precisions, the mean of the last losses by less than 0.05."""
    exact, rows = losses(make_trainer(TINY | {"precision": "float32"}, CPU), 50), []
    for precision in ("float32", "bfloat16", "float16"):
        found = losses(make_trainer(TINY | {"precision": precision}, device), 50)
        error, limit = (found - exact)[-10:].mean().abs().item(), 0.05
        if precision == "float32":
            error, limit = (found - exact).abs().max().item(), 1e-3
        result = f"within {error:.1g} of the CPU's in float32"
        rows.append(Row(f"losses of 50 steps, {precision}", result, not error < limit))
    return rows


def check_sampling(device: torch.device) -> list[Row]:
    """The tokens that a trained model samples in float32, with each cache, and on the CPU."""
    trainer = make_trainer(TINY | {"precision": "float32"}, device)
    losses(trainer, 40)
    model = trainer.model.eval()
    config = SampleConfig(max_new_tokens=50, num_samples=3, seed=1)
    texts = [sample(model, config), sample(model, replace(config, cache=False))]
    texts.append(sample(copy.deepcopy(model).to(CPU), config))
    same = all(torch.equal(text, texts[0]) for text in texts)
    return [Row("sampling in float32", "equals the CPU's" if same else "differs", not same)]


def check_runs(device: torch.device) -> list[Row]:
    """A run with train.py; the same resumed in the middle; the same with DDP in one process."""
    flags = "--preset quick --max_steps 20 --eval_every 10 --save_every 10 --sample_tokens 0 "
    flags += f"--device {device} --precision float32 --no-compile"
    words = [*flags.split(), f"--data={ROOT / 'data/example.txt'}"]
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "1"}
    torchrun |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        whole, resumed, ddp = (Path(folder, name) for name in ("whole", "resumed", "ddp"))
        train.main([*words, f"--out_dir={whole}"])
        shutil.copytree(whole, resumed)
        (resumed / "ckpt_00010.pt").replace(resumed / "latest.pt")
        train.main(["--resume", f"--out_dir={resumed}"])
        with mock.patch.dict(os.environ, torchrun):
            train.main([*words, f"--out_dir={ddp}"])
        models = [read_checkpoint(run / "latest.pt")["model"] for run in (whole, resumed, ddp)]
    weights, *others = (torch.cat([t.flatten() for t in m.values()]) for m in models)
    errors = [(other - weights).abs().max().item() for other in others]
    return [
        Row(f"{name} run", f"weights within {error:.1g}", not error < 1e-3)
        for name, error in zip(("resumed", "ddp"), errors, strict=True)
    ]


def cuda_graphs_rows(name: str, flags: Flags, device: torch.device, n_steps: int) -> list[Row]:
    """What CUDA graphs change, which launch all kernels of a small model at once: not the loss."""
    trainers = [make_trainer(flags, device) for _ in range(2)]
    if flags["compile"]:
        trainers[0].model.compile(dynamic=False)
    without, with_graphs = (losses(trainer, 50) for trainer in trainers)
    largest = (without - with_graphs).abs().max().item()
    times = [timeit(functools.partial(losses, trainer, n_steps), number=1) for trainer in trainers]
    result = f"losses within {largest:.1g}, {times[0] / times[1]:.2f} times as fast"
    return [Row(f"CUDA graphs, {name}", result, not largest < 0.05)]


def attempt(what: str, measure: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """The rows of a measurement, or its error: the others are measured all the same."""
    try:
        return measure(*args)
    except (RuntimeError, UserError) as error:  # also those of PyTorch, CUDA and the compiler
        return [Row(what, first_line(error), True)]


def bench_gpu(nanogpt: str = "") -> list[Row]:
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    card, driver = "no GPU: a test with a tiny model", "none"
    models, n_steps, n_tokens = {"toy": TINY}, 2, 40
    if is_cuda:
        card = torch.cuda.get_device_name(device)
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        driver = subprocess.getoutput(query).splitlines()[0]
        models, n_steps, n_tokens = MODELS, 20, 250
    rows = [Row(card, f"driver {driver}, torch {torch.__version__}, commit {git_commit()}")]
    torch.set_float32_matmul_precision("highest")  # TF32 rounds factors to 10 bits
    for check in (check_losses, check_sampling, check_runs):
        rows += attempt(check.__name__, check, device)  # check_runs, the last, allows TF32
    precision, _ = pick_precision("auto", device)
    rows.append(Row("precision of the measurements", precision))
    settings: dict[str, Any] = {"precision": precision, "compile": is_cuda}
    models = {name: flags | settings for name, flags in models.items()}
    for name, flags in models.items():
        for checkout in ("", nanogpt) if nanogpt else ("",):
            what = f"{'nanoGPT' if checkout else 'training'}, {name}"
            training = Training(what, tuple(flags.items()), device, checkout)
            rows += attempt(what, timing.training_rows, [training], n_steps, 1)
    name, flags = next(iter(models.items()))
    settings |= {"max_new_tokens": n_tokens, "seed": 1}
    configs = {
        f"sampling {name}, batch size {batch}": SampleConfig(**settings, num_samples=batch)
        for batch in (1, 8, 64)
    }
    gpt, _ = train_settings(flags, device.type)
    rows += attempt("speed of sampling", timing.sampling_rows, gpt, device, configs, {}, 1)
    return rows + attempt("CUDA graphs", cuda_graphs_rows, name, flags, device, n_steps)
