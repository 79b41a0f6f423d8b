"""Measure speed, side by side in one run: times vary over time on most machines, ratios less.

python -m experiments.bench tokenizers --data data/plays.jsonl --vocab_size 10000
python -m experiments.bench generate --nanogpt path/to/nanoGPT
python -m experiments.bench train --preset laptop --arch gpt2 --nanogpt path/to/nanoGPT
python -m experiments.bench data
python -m experiments.bench gpu --nanogpt path/to/nanoGPT
"""

import contextlib
import copy
import functools
import io
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_high
from timeit import timeit
from typing import Any
from unittest import mock
from system.start import run

import torch
from torch import Tensor

import train
from config import ARCHS, DEVICE_HELP, PRESETS, SampleConfig, train_settings
from corpus.bpe import count_pieces, train_bpe
from corpus.documents import iter_documents
from corpus.folder import map_ids
from corpus.load import find_corpus
from experiments import baselines, timing
from experiments.baselines import Functions
from experiments.timing import ROOT, Row, Training, git_commit, make_trainer, sample
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.settings import UserError, first_line, setting
from train import Trainer
from training.setup import Flags, pick_precision
from utils import count_params, get_batch, read_checkpoint

BENCHMARKS = ("tokenizers", "generate", "train", "data", "gpu")
CPU = torch.device("cpu")
TINY: Flags = {"preset": "laptop", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
TINY |= {"batch_size": 4, "lr_max": 3e-3, "warmup_steps": 5, "vocab_size": timing.VOCAB_SIZE}
GPT2: Flags = {"preset": "gpt2", "arch": "gpt2"}
MODELS: dict[str, Flags] = {
    "medium": {"preset": "medium", "vocab_size": timing.VOCAB_SIZE},
    "124 M": GPT2 | {"vocab_size": 50257},  # as train.py --tokenizer gpt2 trains it
    # Compiling pads the products of 50,257 rows itself, to multiples of 8, where that is faster.
    "124 M, vocabulary of 50,304 = 786 x 64": GPT2 | {"vocab_size": 50304},
}


@dataclass
class BenchConfig:
    benchmark: str = setting("", "", choices=BENCHMARKS, positional=True)
    data: str = setting("", "text; default: plays for tokenizers, else shakespeare")
    bpe_vocab_size: int = setting(10_000, "of the tokenizers", low=258, alias="vocab_size")
    preset: str = setting("medium", "sizes of the model", choices=tuple(PRESETS))
    arch: str = setting("gpt2", "architecture; '': the preset's", choices=("", *ARCHS))
    tokens: int = setting(500, "tokens to generate", low=10)
    steps: int = setting(10, "training steps per timing", low=1)
    nanogpt: str = setting("", "path of nanoGPT's repository, to compare with it")
    device: str = setting("cpu", DEVICE_HELP)
    repeats: int = setting(3, "timings of each, of which the median counts", low=1)

    def problems(self) -> list[str]:
        return baselines.nanogpt_problems(self.nanogpt) + device_problems(self.device)


def model_flags(config: BenchConfig) -> Flags:
    flags = {"preset": config.preset, "vocab_size": timing.VOCAB_SIZE}
    return flags | ({"arch": config.arch} if config.arch else {})


def compared(functions: Callable[[], Functions]) -> Functions:
    """The functions of another implementation; none, with a hint, if it is not installed."""
    try:
        return functions()
    except (ImportError, UserError) as error:
        print(f"not compared: {error}")
        return {}


def bench_tokenizers(config: BenchConfig) -> list[Row]:
    """Training and encoding: ours, Hugging Face's tokenizers if they are installed, and tiktoken's
    encoder with the vocabulary that ours learned."""
    path = find_corpus(config.data or "plays")
    texts = [text for text, _ in iter_documents(path)]
    text = "\n".join(texts)
    megabytes = len(text.encode()) / 1e6

    def train() -> Any:
        return train_bpe(count_pieces(texts), config.bpe_vocab_size)

    ours = train()
    ours.encode(text[:1000])  # builds its encoder
    functions: Functions = {
        "ours, train": train,
        "ours, encode": lambda: ours.encode(text),
        "tiktoken, encode": lambda: ours.encoding.encode_ordinary(text),
    }
    functions |= compared(lambda: baselines.hf_tokenizer(texts, config.bpe_vocab_size))
    rows = [Row(f"{path}", f"{megabytes:.2f} MB, {config.bpe_vocab_size} tokens")]
    for name, seconds in timing.median_seconds(functions, config.repeats).items():
        rows.append(Row(name, f"{seconds:.2f} s, {megabytes / seconds:.1f} MB/s"))
    return rows


def bench_generate(config: BenchConfig) -> list[Row]:
    """Tokens per second and sample at temperature 0.8 and top-k 40: ours without and with a cache,
    in each precision, compiled, and ten samples as a batch; Hugging Face's; nanoGPT's;
    llama.cpp's, which is greedy, on a CPU."""
    device, n = pick_device(config.device), config.tokens
    gpt, _ = train_settings(model_flags(config), device.type)
    settings: dict[str, dict[str, Any]] = {"no cache": {"cache": False}}
    for p in ("float32", "bfloat16", "int8"):
        settings[f"cache, {p}"] = {"precision": p}
        settings[f"cache, {p}, compiled"] = {"precision": p, "compile": True}
        settings[f"cache, {p}, ten samples"] = {"precision": p, "num_samples": 10}
    base = {"max_new_tokens": n, "temperature": 0.8, "top_k": 40, "seed": 1337}
    ours = {f"ours, {name}": SampleConfig(**(base | more)) for name, more in settings.items()}
    others = compared(lambda: baselines.hf_samplers(n, gpt, device))
    others |= compared(lambda: baselines.nanogpt_samplers(config.nanogpt, n, gpt, device))
    if device.type == "cpu":
        others |= compared(lambda: baselines.llama_cpp_samplers(n, gpt))
    head = Row(f"{config.preset}, {n} tokens", f"{device}, {torch.get_num_threads()} threads")
    return [head, *timing.sampling_rows(gpt, device, ours, others, config.repeats)]


def bench_train(config: BenchConfig) -> list[Row]:
    """Training steps, eager and compiled, in each precision, of nanoGPT's model too."""
    device, flags = pick_device(config.device), model_flags(config)
    gpt, train_config = train_settings(flags, device.type)
    trainings = []
    for compiled, precision in itertools.product((False, True), ("float32", "bfloat16")):
        own = tuple((flags | {"precision": precision, "compile": compiled}).items())
        name = f"{precision}, {'compiled' if compiled else 'eager'}"
        trainings.append(Training(f"ours, {name}", own, device))
        if config.nanogpt:
            trainings.append(Training(f"nanoGPT, {name}", own, device, config.nanogpt))
    head = Row(
        f"{config.preset}, {count_params(gpt)[0]:,} parameters, "
        f"batches of {train_config.batch_size} x {gpt.block_size}",
        f"{device}, {torch.get_num_threads()} threads",
    )
    return [head, *timing.training_rows(trainings, config.steps, config.repeats)]


def bench_data(config: BenchConfig) -> list[Row]:
    """The time to read a batch from data sets of 10 MB and 10 GB, memory-mapped as those of
    prepare.py. (The files are sparse, so they take no disk space.)"""
    gpt, train_config = train_settings({"preset": config.preset}, "")
    rows = [Row("data set", f"batches of {train_config.batch_size} x {gpt.block_size} tokens")]
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("10 MB", 10**7), ("10 GB", 10**10)):
            path = Path(folder, f"{name}.bin")
            with open(path, "wb") as file:
                file.truncate(size)
            ids = map_ids(path, "uint16")
            read = functools.partial(get_batch, ids, gpt.block_size, train_config.batch_size, 0)
            times = [timing.time_once(functools.partial(read, i)) for i in range(200)]
            rows.append(Row(name, f"{1000 * median_high(times):.2f} ms per batch"))
    return rows


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
    flags = "--preset quick --max_steps 20 --eval_every 10 --save_every 10 --eval_windows 8 "
    flags += f"--sample_tokens 0 --device {device} --precision float32 --no-compile"
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


def host_rows(flags: Flags, device: torch.device) -> list[Row]:
    """The time of a step without the model: batch, clipping, optimizer. It limits small models."""
    rows = []
    for optimizer in ("adamw", "muon"):
        trainer = make_trainer(flags | {"optimizer": optimizer, "compile": False}, device)
        for p in trainer.params:
            p.grad = torch.zeros_like(p)
        terms = {"loss": torch.zeros((), device=device, requires_grad=True)}
        keep = mock.patch.object(torch.optim.Optimizer, "zero_grad", lambda self: None)
        run = functools.partial(losses, trainer, 20)
        with keep, mock.patch.object(trainer.task, "loss", lambda *args, terms=terms: terms):
            seconds = min(timeit(run, number=1) for _ in range(5)) / 20
        rows.append(Row(f"step without the model, {optimizer}", f"{1000 * seconds:.2f} ms"))
    return rows


def attempt(what: str, measure: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """The rows of a measurement, or its error: the others are measured all the same."""
    try:
        return measure(*args)
    except (RuntimeError, UserError) as error:  # also those of PyTorch, CUDA and the compiler
        return [Row(what, first_line(error), True)]


def bench_gpu(config: BenchConfig) -> list[Row]:
    """What a GPU computes, compared with the CPU, and how fast. Without one, with a tiny model."""
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
        for checkout in dict.fromkeys(("", config.nanogpt)):
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
    rows += attempt("step without the model", host_rows, flags, device)
    return rows + attempt("CUDA graphs", cuda_graphs_rows, name, flags, device, n_steps)


def main(argv: list[str] | None = None) -> int:
    config = parse_args(BenchConfig, argv, __doc__)
    functions = {
        "tokenizers": bench_tokenizers,
        "generate": bench_generate,
        "train": bench_train,
        "data": bench_data,
        "gpu": bench_gpu,
    }
    print(timing.to_table(functions[config.benchmark](config)))
    return 0


if __name__ == "__main__":
    run(main)
