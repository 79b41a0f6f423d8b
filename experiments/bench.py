"""Measure speed, side by side in one run: times vary over time on most machines, ratios less.

python -m experiments.bench tokenizers --data data/plays.jsonl --vocab_size 10000
python -m experiments.bench generate --nanogpt path/to/nanoGPT
python -m experiments.bench train --preset laptop --arch gpt2 --nanogpt path/to/nanoGPT
python -m experiments.bench data
python -m experiments.bench gpu --nanogpt path/to/nanoGPT
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import ARCHS, DEVICE_HELP, PRESETS, SampleConfig, train_settings
from corpus.bpe import count_pieces, train_bpe
from corpus.corpus import Corpus
from corpus.documents import iter_documents
from corpus.folder import map_token_files
from corpus.load import find_corpus
from experiments.baselines import (
    Functions,
    hf_samplers,
    hf_tokenizer,
    llama_cpp_samplers,
    nanogpt_sampler,
    nanogpt_step,
)
from experiments.gpu import bench_gpu
from experiments.timing import (
    StepMaker,
    matmul_flops,
    median,
    median_seconds,
    memory_bandwidth,
    step_costs,
    time_once,
)
from generate import generate
from model import GPT
from sampling.quantize import Int8Linear, lower_precision
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.errors import run
from system.settings import UserError, setting
from tokenizer import CharTokenizer
from train import Trainer
from training.checks import flops_per_token
from training.setup import Flags
from training.task import Pretraining
from utils import count_params, get_batch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ("tokenizers", "generate", "train", "data", "gpu")
VOCAB_SIZE = 65  # of the models: the characters of TinyShakespeare


@dataclass
class BenchConfig:
    """What is measured."""

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


def model_flags(config: BenchConfig) -> Flags:
    """The flags of the model that is measured."""
    flags = {"preset": config.preset, "vocab_size": VOCAB_SIZE}
    return flags | ({"arch": config.arch} if config.arch else {})


# --- tokenizers


def bench_tokenizers(config: BenchConfig) -> str:
    """Training and encoding: ours, Hugging Face's tokenizers if they are installed, and tiktoken's
    encoder with the vocabulary that ours learned."""
    path = find_corpus(config.data or "plays")
    texts = [text for text, _ in iter_documents(path)]
    text = "\n".join(texts)
    megabytes = len(text.encode()) / 1e6
    train = functools.partial(learn_bpe, texts, config.bpe_vocab_size)
    ours = train()
    ours.encode(text[:1000])  # builds its encoder
    functions: Functions = {
        "ours, train": train,
        "ours, encode": lambda: ours.encode(text),
        "tiktoken, encode": lambda: ours.encoding.encode_ordinary(text),
    }
    functions |= hf_tokenizer(texts, config.bpe_vocab_size)
    lines = [f"{path}: {megabytes:.2f} MB, {config.bpe_vocab_size} tokens"]
    for name, seconds in median_seconds(functions, config.repeats).items():
        lines.append(f"{name:24}{seconds:8.2f} s{megabytes / seconds:10.1f} MB/s")
    return "\n".join(lines)


def learn_bpe(texts: list[str], vocab_size: int) -> Any:
    return train_bpe(count_pieces(texts), vocab_size)


# --- generation


def bench_generate(config: BenchConfig) -> str:
    """Tokens per second and sample at temperature 0.8 and top-k 40: ours without and with a cache,
    in each precision, compiled, and ten samples as a batch; Hugging Face's; nanoGPT's;
    llama.cpp's, which is greedy, on a CPU."""
    device = pick_device(config.device)
    bandwidth = memory_bandwidth(device)
    gpt, _ = train_settings(model_flags(config), device.type)
    samplers: Functions = {}
    weight_bytes: dict[str, int] = {}
    for name, sample in sample_configs(config.tokens).items():
        model = GPT(gpt).to(device).eval()
        lower_precision(model, sample.precision)
        samplers[f"ours, {name}"] = functools.partial(sample_ours, model, sample)
        weight_bytes[f"ours, {name}"] = linear_bytes(model)
    samplers |= hf_samplers(config.tokens, gpt, device)
    samplers |= nanogpt_sampler(config.nanogpt, config.tokens, gpt, device)
    if device.type == "cpu":
        samplers |= llama_cpp_samplers(config.tokens, gpt)
    for sampler in samplers.values():
        sampler()  # warm up, and compile
    lines = [
        f"{config.preset}, {config.tokens} tokens, {device}, {torch.get_num_threads()} threads",
        f"memory bandwidth: {bandwidth / 1e9:.0f} GB/s",
        f"{'':34}{'tokens/s':>8}{'MB per token':>15}{'of the bandwidth':>19}",
    ]
    for name, seconds in median_seconds(samplers, config.repeats).items():
        rate = config.tokens / seconds
        line = f"{name:34}{rate:8.0f}"
        if n_bytes := weight_bytes.get(name):
            line += f"{n_bytes / 1e6:15.1f}{rate * n_bytes / bandwidth:19.0%}"
        lines.append(line)
    return "\n".join(lines)


def sample_configs(n_tokens: int) -> dict[str, SampleConfig]:
    """The ways of sampling to compare, by name."""
    base = {"max_new_tokens": n_tokens, "temperature": 0.8, "top_k": 40, "seed": 1337}
    settings: dict[str, dict[str, Any]] = {"no cache": {"cache": False}}
    settings |= {f"cache, {p}": {"precision": p} for p in ("float32", "bfloat16", "int8")}
    for p in ("float32", "bfloat16", "int8"):
        settings[f"cache, {p}, compiled"] = {"precision": p, "compile": True}
    for p in ("float32", "bfloat16"):
        settings[f"cache, {p}, ten samples"] = {"precision": p, "num_samples": 10}
    return {name: SampleConfig(**(base | more)) for name, more in settings.items()}


def sample_ours(model: GPT, sample: SampleConfig) -> None:
    """Generate from a prompt of one token."""
    prompt = torch.zeros(1, dtype=torch.long, device=model.tok.weight.device)
    for step in generate(model, prompt, sample):
        last = step.ids
    last.tolist()  # wait for the GPU


def linear_bytes(model: GPT) -> int:
    """The size of the weights of the linear layers, which are read for each token."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Int8Linear)]
    tensors = [t for m in linears for t in m.state_dict().values()]
    return sum(t.numel() * t.element_size() for t in tensors)


# --- training


def bench_train(config: BenchConfig) -> str:
    """Training steps, eager and compiled, in each precision: tokens per second, model FLOP
    utilization (MFU: the share of the rate at which this machine multiplies matrices), peak memory;
    nanoGPT's model for comparison. Each has its own process, and they take turns."""
    device = pick_device(config.device)
    flags = model_flags(config)
    gpt, train_config = train_settings(flags, device.type)
    flops = flops_per_token(gpt)
    tokens = train_config.batch_size * gpt.block_size
    peaks = {p: matmul_flops(device, p) for p in ("float32", "bfloat16")}
    products = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {p}" for p, peak in peaks.items())
    lines = [
        f"{config.preset}, {config.arch or 'its own'} architecture, {count_params(gpt)[0]:,} "
        f"parameters, batches of {train_config.batch_size} x {gpt.block_size}, {device}, "
        f"{torch.get_num_threads()} threads",
        f"matrix products: {products}",
        f"{'':34}tokens/s   ms/step   GFLOP/s    MFU   peak MB",
    ]
    makers: dict[str, StepMaker] = {}
    precisions: dict[str, str] = {}
    for compiled in (False, True):
        for precision in peaks:
            name = f"{precision}, {'compiled' if compiled else 'eager'}"
            args = (flags, precision, compiled, config.device)
            makers[f"ours, {name}"] = (our_step, args)
            if config.nanogpt:
                makers[f"nanoGPT, {name}"] = (nanogpt_step, (config.nanogpt, *args))
            precisions |= {f"ours, {name}": precision, f"nanoGPT, {name}": precision}
    for name, cost in step_costs(makers, config.steps, config.repeats).items():
        rate = tokens / cost.seconds
        lines.append(
            f"{name:34}{rate:8,.0f}{1000 * cost.seconds:10.1f}{rate * flops / 1e9:10.0f}"
            f"{rate * flops / peaks[precisions[name]]:7.0%}{cost.memory / 1e6:10,.0f}"
        )
    return "\n".join(lines)


def our_step(
    flags: Flags, precision: str, compiled: bool, device_name: str
) -> Callable[[], Tensor]:
    """A training step of train.py, on random tokens."""
    gpt, config = train_settings(flags, "")
    config.precision, config.compile = precision, compiled
    device = pick_device(device_name)
    ids = np.random.default_rng(0).integers(VOCAB_SIZE, size=1_000_000).astype(np.uint8)
    corpus = Corpus(ids, ids, {"name": "random"}, len(ids), len(ids))
    tokenizer = CharTokenizer([chr(i) for i in range(VOCAB_SIZE)])
    task = Pretraining(corpus, tokenizer, gpt.block_size, config, device)
    trainer = Trainer(GPT(gpt), task, config, device)
    return lambda: trainer.train_step()["loss"]


# --- reading batches


def bench_data(config: BenchConfig) -> str:
    """The time to read a batch from data sets of 10 MB and 10 GB, in one file and in several, which
    are memory-mapped as those of prepare.py. (The files are sparse, so they take no disk space.)"""
    gpt, train_config = train_settings({"preset": config.preset}, "")
    lines = [f"batches of {train_config.batch_size} x {gpt.block_size} tokens"]
    datasets = {"10 MB": (10**7, 1), "10 GB": (10**10, 1), "10 GB in 20 files": (10**10, 20)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, n_files) in datasets.items():
            paths = [Path(folder, f"{name}_{i}.bin") for i in range(n_files)]
            for path in paths:
                with open(path, "wb") as file:
                    file.truncate(size // n_files)
            read = functools.partial(
                get_batch, map_token_files(paths, "uint16"), gpt.block_size, train_config.batch_size
            )
            times = [time_once(functools.partial(read, 0, number)) for number in range(200)]
            lines.append(f"{name:34}{1000 * median(times):8.2f} ms per batch")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    config = parse_args(
        BenchConfig, argv, __doc__, check=lambda config: device_problems(config.device)
    )
    functions = {
        "tokenizers": bench_tokenizers,
        "generate": bench_generate,
        "train": bench_train,
        "data": bench_data,
        "gpu": lambda config: bench_gpu(config.nanogpt),
    }
    try:
        print(functions[config.benchmark](config))
    except OSError as error:
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    run(main)
