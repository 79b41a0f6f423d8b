"""Speed, measured side by side in one run, for machines are noisy and ratios less so.

python experiments/bench.py tokenizers --data data/plays.jsonl --vocab_size 10000
python experiments/bench.py generate --nanogpt path/to/nanoGPT
python experiments/bench.py train --preset laptop --arch gpt2 --nanogpt path/to/nanoGPT
python experiments/bench.py data
python experiments/bench.py time_to_loss --nanogpt path/to/nanoGPT
"""

import functools
import importlib.util
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizer as tokenizers
from config import (
    ARCHS,
    PRESETS,
    GPTConfig,
    SampleConfig,
    UserError,
    from_dict,
    limit_problems,
    parse_flags,
    raise_problems,
    run,
    setting,
    train_settings,
)
from corpora import documents, find_corpus
from generate import Int8Linear, generate, lower_precision
from model import GPT
from train import Trainer
from utils import Corpus, autocast, get_batch, keep_freed_memory, map_ids, pick_device

DEFAULT_DATA = {
    "tokenizers": "plays",
    "generate": "",
    "train": "",
    "data": "",
    "time_to_loss": "shakespeare",
}
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class BenchConfig:
    """What is measured."""

    what: str = setting("", "", choices=tuple(DEFAULT_DATA), positional=True)
    data: str = setting("", "the text; default: plays for the tokenizers, else shakespeare")
    vocab_size: int = setting(10_000, "tokens that byte-pair encoding learns", low=258)
    preset: str = setting("medium", "the model", choices=tuple(PRESETS))
    arch: str = setting("gpt2", "its architecture; '': the preset's own", choices=("", *ARCHS))
    tokens: int = setting(500, "tokens to generate", low=10)
    steps: int = setting(10, "training steps to time at once", low=1)
    runs: str = setting("quick,laptop,baseline", "presets to train, with commas")
    nanogpt: str = setting("", "a checkout of nanoGPT, to measure beside ours")
    device: str = setting("cpu", "cpu, cuda, mps")
    repeats: int = setting(3, "runs of each, of which the median counts", low=1)


def model_flags(config: BenchConfig, vocab_size: int) -> dict[str, Any]:
    """The flags of the model that is measured."""
    flags = {"preset": config.preset, "vocab_size": vocab_size}
    return flags | ({"arch": config.arch} if config.arch else {})


def median_seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each function, called in turns, so that a machine that becomes slower
    does so for all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: sorted(seconds)[repeats // 2] for name, seconds in times.items()}


def bench_tokenizers(config: BenchConfig) -> str:
    """Training and encoding: ours, Hugging Face's `tokenizers` where it is installed, tiktoken's
    encoder with the vocabulary that ours learned."""
    path = find_corpus(config.data)
    texts = [text for text, _ in documents(path)]
    text = "\n".join(texts)

    def train() -> tokenizers.BPETokenizer:
        return tokenizers.BPETokenizer.train(tokenizers.count_pieces(texts), config.vocab_size)

    ours = train()
    ours.encode(text[:1000])
    rows = {
        "ours, train": train,
        "ours, encode": lambda: ours.encode(text),
        "tiktoken, encode": lambda: ours.encoding.encode_ordinary(text),
    }
    try:
        import tokenizers as hf

        theirs = hf.ByteLevelBPETokenizer()
        rows["Hugging Face, train"] = lambda: theirs.train_from_iterator(
            texts, config.vocab_size, show_progress=False
        )
        rows["Hugging Face, encode"] = lambda: theirs.encode(text)
    except ImportError:
        print("tokenizers is not installed: pip install tokenizers, to compare with it")
    lines = [f"{path}: {len(text.encode()) / 1e6:.2f} MB, {config.vocab_size} tokens"]
    # Hugging Face's trainer comes before its encoder, which takes what was learned.
    for name, seconds in median_seconds(rows, config.repeats).items():
        lines.append(f"{name:24}{seconds:8.2f} s{len(text.encode()) / 1e6 / seconds:10.1f} MB/s")
    return "\n".join(lines)


# --- generation


def bench_generate(config: BenchConfig) -> str:
    """Tokens per second at temperature 0.8 and top-k 40, one text: ours with and without cache, in
    each precision, compiled, and ten texts at once; Hugging Face's and nanoGPT's where they are."""
    device = pick_device(config.device)
    bandwidth = memory_bandwidth(device)
    lines = [
        f"{config.preset}, {config.tokens} tokens, {device}, {torch.get_num_threads()} threads"
    ]
    lines.append(f"memory is read at {bandwidth / 1e9:.0f} GB/s")
    lines.append(f"{'':34}tokens/s   MB a token   of the bandwidth")
    flags = model_flags(config, 65)
    gpt, _ = train_settings(flags, device.type)
    ways = [("no cache", "float32", {"cache": False})]
    ways += [(f"cache, {p}", p, {}) for p in ("float32", "bfloat16", "int8")]
    ways += [("cache, int8, compiled", "int8", {"compile": True})]
    ways += [(f"cache, {p}, ten texts", p, {"num_samples": 10}) for p in ("float32", "bfloat16")]
    samplers: dict[str, Callable[[], Any]] = {}
    n_bytes: dict[str, int] = {}
    for name, precision, settings in ways:
        model = GPT(gpt).to(device).eval()
        lower_precision(model, precision)
        if settings.get("compile"):
            model.compile(dynamic=True)
        sampling = {"max_new_tokens": config.tokens, "temperature": 0.8, "top_k": 40}
        sample = SampleConfig(**(sampling | settings), precision=precision)
        samplers[f"ours, {name}"] = functools.partial(sample_ours, model, sample)
        linears = [m for m in model.modules() if isinstance(m, nn.Linear | Int8Linear)]
        tensors = [t for m in linears for t in m.state_dict().values()]
        n_bytes[f"ours, {name}"] = sum(t.numel() * t.element_size() for t in tensors)
    samplers |= hf_samplers(config.tokens, gpt, device)
    samplers |= nanogpt_sampler(config, gpt, device)
    for sampler in samplers.values():
        sampler()  # to warm up, and to compile
    for name, seconds in median_seconds(samplers, config.repeats).items():
        rate = config.tokens / seconds
        line = f"{name:34}{rate:8.0f}"
        if name in n_bytes:
            line += f"{n_bytes[name] / 1e6:13.1f}{rate * n_bytes[name] / bandwidth:19.0%}"
        lines.append(line)
    return "\n".join(lines)


def sample_ours(model: GPT, sample: SampleConfig) -> None:
    """Generate from one token on."""
    prompt = torch.zeros(1, dtype=torch.long, device=model.tok.weight.device)
    for step in generate(model, prompt, sample):
        last = step.ids
    last.tolist()  # waits for a GPU


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large tensor reads, at best."""
    x = torch.ones(1 << 26, device=device)  # 256 MB, more than any cache

    def read() -> None:
        x.sum().item()

    read()
    return x.numel() * 4 / min(median_seconds({"": read}, 1)[""] for _ in range(10))


def hf_samplers(n: int, gpt: GPTConfig, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Hugging Face's generate, on models of the same sizes."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: pip install transformers, to compare with it")
        return {}
    transformers.logging.set_verbosity_error()
    sizes = {"vocab_size": 65, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    models = {
        "GPT-2": transformers.GPT2Config(
            **sizes, n_layer=gpt.n_layer, n_head=gpt.n_head, n_embd=gpt.n_embd, n_positions=2048
        ),
        "Llama": transformers.LlamaConfig(
            **sizes, num_hidden_layers=gpt.n_layer, num_attention_heads=gpt.n_head,
            hidden_size=gpt.n_embd, intermediate_size=gpt.n_inner, max_position_embeddings=2048,
        ),
    }  # fmt: skip
    samplers = {}
    for name, theirs in models.items():
        model = transformers.AutoModelForCausalLM.from_config(theirs).to(device).eval()
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)

        def sample(model: Any = model, ids: torch.Tensor = ids) -> None:
            model.generate(
                ids, max_new_tokens=n, min_new_tokens=n, do_sample=True, temperature=0.8, top_k=40
            )[0].tolist()

        samplers[f"Hugging Face, {name}"] = sample
    return samplers


def nanogpt_sampler(
    config: BenchConfig, gpt: GPTConfig, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """nanoGPT's sampler, on a model of the same sizes."""
    if not config.nanogpt:
        print("nanoGPT: give --nanogpt the path of a checkout, to compare with it")
        return {}
    model = nanogpt_model(config.nanogpt, gpt).to(device).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {
        "nanoGPT": lambda: model.generate(ids, config.tokens, temperature=0.8, top_k=40).tolist()
    }


def nanogpt_model(checkout: str, gpt: GPTConfig) -> nn.Module:
    """nanoGPT's model in the sizes of ours."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(checkout, "model.py"))
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = nanogpt
    spec.loader.exec_module(nanogpt)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    return nanogpt.GPT(nanogpt.GPTConfig(**{name: getattr(gpt, name) for name in names}))


# --- training

VOCAB_SIZE = 65


def bench_train(config: BenchConfig) -> str:
    """Training steps, eager and compiled, in each precision: tokens per second, the share of the
    rate at which this machine multiplies matrices (MFU), peak memory; nanoGPT's model beside them.

    Each way has a process of its own, and they take turns. A token takes 6 floating-point
    operations a weight, and 12 a layer, channel and position in attention (Chowdhery et al. 2022,
    appendix B).
    """
    device = pick_device(config.device)
    flags = model_flags(config, VOCAB_SIZE)
    gpt, run = train_settings(flags, device.type)
    model = GPT(gpt)
    n_weights = model.num_params() - (0 if gpt.tie_weights else model.tok.weight.numel())
    if gpt.pos == "learned":
        n_weights -= model.pos.table.weight.numel()
    flops = 6 * n_weights + 12 * gpt.n_layer * gpt.n_head * gpt.head_size * gpt.block_size
    tokens = run.batch_size * gpt.block_size
    rates = {p: matrix_rate(device, p) for p in ("float32", "bfloat16")}
    lines = [
        f"{config.preset}, {config.arch or 'as it is'}, {model.num_params():,} parameters, "
        f"batches of {run.batch_size} x {gpt.block_size}, {device}, {torch.get_num_threads()} "
        "threads",
        "matrices are multiplied at "
        + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {p}" for p, rate in rates.items()),
        f"{'':34}tokens/s   ms/step   GFLOP/s    MFU   peak MB",
    ]
    ways = {}
    for compiled in (False, True):
        for precision in rates:
            name = f"{precision}, {'compiled' if compiled else 'eager'}"
            ways[f"ours, {name}"] = (our_step, flags, precision, compiled, config.device)
            if config.nanogpt:
                args = (config.nanogpt, flags, precision, compiled, config.device)
                ways[f"nanoGPT, {name}"] = (nanogpt_step, *args)
    for name, (seconds, memory) in step_seconds(ways, config.steps, config.repeats).items():
        rate, peak = tokens / seconds, rates["bfloat16" if "bfloat16" in name else "float32"]
        lines.append(
            f"{name:34}{rate:8,.0f}{1000 * seconds:10.1f}{rate * flops / 1e9:10.0f}"
            f"{rate * flops / peak:7.0%}{memory / 1e6:10,.0f}"
        )
    return "\n".join(lines)


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second in the product of two large matrices, at best."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=getattr(torch, precision))

    def multiply() -> None:
        (a @ a)[0, 0].item()  # waits for a GPU

    multiply()
    return 2 * n**3 / min(median_seconds({"": multiply}, 1)[""] for _ in range(8))


def step_seconds(ways: dict[str, tuple], n: int, repeats: int) -> dict[str, tuple[float, float]]:
    """The median seconds of a step, and the peak memory in bytes, of each way: a function that
    makes a step in a process of its own, and its arguments."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, way in ways.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve_steps, args=(theirs, *way), daemon=True).start()
        pipes[name].recv()  # has warmed up
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory = {}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            pipe.send(n)
            seconds, memory[name] = pipe.recv()
            times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(0)  # no more
    return {name: (sorted(times[name])[repeats // 2], memory[name]) for name in ways}


def serve_steps(pipe: Any, make: Callable[..., Callable[[], Tensor]], *args: Any) -> None:
    """In a process of its own: make a step, warm up, and time as many as are asked for, till none
    is."""
    keep_freed_memory()
    step = make(*args)
    for _ in range(3):
        step().item()
    pipe.send(None)
    while n := pipe.recv():
        began = time.perf_counter()
        for _ in range(n):
            loss = step()
        loss.item()
        seconds = (time.perf_counter() - began) / n
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes, on Linux
        pipe.send((seconds, torch.cuda.max_memory_allocated() if loss.is_cuda else peak))


def our_step(
    flags: dict[str, Any], precision: str, compiled: bool, device: str
) -> Callable[[], Tensor]:
    """A training step of train.py, on random tokens."""
    gpt, config = train_settings(flags, "")
    config.precision, config.compile = precision, compiled
    ids = np.random.default_rng(0).integers(VOCAB_SIZE, size=1_000_000).astype(np.uint8)
    corpus = Corpus(ids, ids, {"name": "random"}, len(ids), len(ids))
    tokenizer = tokenizers.CharTokenizer([chr(i) for i in range(VOCAB_SIZE)])
    trainer = Trainer(GPT(gpt), tokenizer, corpus, config, pick_device(device))
    return lambda: trainer.train_step()[0]


def nanogpt_step(
    checkout: str, flags: dict[str, Any], precision: str, compiled: bool, device: str
) -> Callable[[], Tensor]:
    """A training step of nanoGPT's model and optimizer, on random tokens."""
    gpt, run = train_settings(flags, "")
    model = nanogpt_model(checkout, gpt).to(device).train()
    kind = pick_device(device).type
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), kind)
    model = torch.compile(model) if compiled else model
    ids = torch.randint(VOCAB_SIZE, (1_000_000,))
    T = gpt.block_size

    def step() -> Tensor:
        starts = torch.randint(len(ids) - T, (run.batch_size,))
        x = torch.stack([ids[i : i + T] for i in starts]).to(device)
        y = torch.stack([ids[i + 1 : i + 1 + T] for i in starts]).to(device)
        with autocast(torch.device(kind), precision):
            _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def bench_data(config: BenchConfig) -> str:
    """The time to read a batch of data sets of 10 MB and of 10 GB, in one file and in many:
    memory-mapped, as prepare.py makes them (here sparse files, which take no room)."""
    gpt, run = train_settings({"preset": config.preset}, "")
    lines = [f"batches of {run.batch_size} x {gpt.block_size} tokens"]
    sets = {"10 MB": (10**7, 1), "10 GB": (10**10, 1), "10 GB in 20 files": (10**10, 20)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, n_files) in sets.items():
            paths = [Path(folder, f"{name}_{i}.bin") for i in range(n_files)]
            for path in paths:
                with open(path, "wb") as file:
                    file.truncate(size // n_files)
            ids = map_ids(paths, "uint16")
            times = []
            for number in range(200):
                began = time.perf_counter()
                get_batch(ids, gpt.block_size, run.batch_size, 0, number)
                times.append(time.perf_counter() - began)
            lines.append(f"{name:34}{1000 * sorted(times)[100]:8.2f} ms a batch")
    return "\n".join(lines)


# --- time to a loss


def bench_time_to_loss(config: BenchConfig) -> str:
    """Seconds from the command until the loss is on the screen, with everything that is compiled
    compiled anew; the loss is over the whole validation split (nanoGPT: its own estimate). Of some
    presets and of nanoGPT's recipe for a CPU, in turns."""
    data = str(find_corpus(config.data).resolve())
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for _ in range(config.repeats):
        for name in [*(["nanoGPT"] if config.nanogpt else []), *config.runs.split(",")]:
            with tempfile.TemporaryDirectory() as folder:
                caches = {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
                environment = os.environ | caches
                if name == "nanoGPT":
                    command, cwd = nanogpt_command(config.nanogpt, Path(data), folder)
                else:
                    command = f"train.py --preset {name} --data {data} --out_dir {folder}".split()
                    cwd = str(ROOT)
                took, loss = time_to_loss([sys.executable, *command], cwd, environment)
                seconds.setdefault(name, []).append(took)
                losses.setdefault(name, []).append(loss)
            print(f"{name:12}{seconds[name][-1]:8.1f} s{losses[name][-1]:10.4f}", flush=True)
    lines = [f"medians of {config.repeats}, {config.device}, {torch.get_num_threads()} threads"]
    middle = config.repeats // 2
    first = sorted(next(iter(seconds.values())))[middle]
    for name in seconds:
        time_, loss = (sorted(values)[middle] for values in (seconds[name], losses[name]))
        lines.append(
            f"{name:12}{time_:8.1f} s{loss:10.4f}   {time_ / first:.2f} of the first's time"
        )
    return "\n".join(lines)


def time_to_loss(command: list[str], cwd: str, environment: dict[str, str]) -> tuple[float, float]:
    """Run a training; when its last validation loss was printed, in seconds, and that loss."""
    began = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    environment = environment | {"PYTHONUNBUFFERED": "1"}
    last = None
    with subprocess.Popen(command, cwd=cwd, env=environment, **pipes) as process:
        for line in process.stdout:
            if found := re.search(r"val(?:idation)? loss ([\d.]+)", line):
                last = time.perf_counter() - began, float(found[1])
        errors = process.stderr.read()
    if process.returncode or last is None:
        raise UserError(f"{' '.join(command[1:3])} failed: {errors.strip().splitlines()[-1:]}")
    return last


def nanogpt_command(checkout: str, text: Path, out_dir: str) -> tuple[list[str], str]:
    """The command of nanoGPT's README for a CPU, and the folder to run it in."""
    folder = Path(checkout, "data", "shakespeare_char")
    if not (folder / "train.bin").exists():
        shutil.copy(text, folder / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, capture_output=True)
    recipe = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
        "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
        "--lr_decay_iters=2000 --dropout=0.0"
    )
    command = ["train.py", "config/train_shakespeare_char.py", *recipe.split()]
    return [*command, f"--out_dir={out_dir}"], checkout


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, BenchConfig)
    config = from_dict(BenchConfig, flags)
    raise_problems(problems + limit_problems(config))
    try:
        config.data = config.data or DEFAULT_DATA[config.what]
        benches = {
            "tokenizers": bench_tokenizers,
            "generate": bench_generate,
            "train": bench_train,
            "data": bench_data,
            "time_to_loss": bench_time_to_loss,
        }
        print(benches[config.what](config))
    except OSError as error:
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    run(main)
