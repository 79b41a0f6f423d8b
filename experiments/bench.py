"""Measure speed, side by side in one run: times vary over time on most machines, ratios less.

python -m experiments.bench tokenizers --data data/plays.jsonl --vocab_size 10000
python -m experiments.bench generate --nanogpt path/to/nanoGPT
python -m experiments.bench train --preset laptop --arch gpt2 --nanogpt path/to/nanoGPT
python -m experiments.bench data
python -m experiments.bench gpu --nanogpt path/to/nanoGPT
"""

import functools
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any
from system.start import run

import torch

from config import ARCHS, DEVICE_HELP, PRESETS, SampleConfig, train_settings
from corpus.bpe import count_pieces, train_bpe
from corpus.documents import iter_documents
from corpus.folder import map_ids
from corpus.load import find_corpus
from experiments import baselines, timing
from experiments.baselines import Functions
from experiments.gpu import bench_gpu
from experiments.timing import Row, Training
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.settings import UserError, setting
from training.setup import Flags
from utils import count_params, get_batch

BENCHMARKS = ("tokenizers", "generate", "train", "data", "gpu")


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


def main(argv: list[str] | None = None) -> int:
    config = parse_args(BenchConfig, argv, __doc__)
    functions = {
        "tokenizers": bench_tokenizers,
        "generate": bench_generate,
        "train": bench_train,
        "data": bench_data,
        "gpu": lambda config: bench_gpu(config.nanogpt),
    }
    print(timing.to_table(functions[config.benchmark](config)))
    return 0


if __name__ == "__main__":
    run(main)
