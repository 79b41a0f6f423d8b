"""Speed, measured side by side in one run, for machines are noisy and ratios less so.

python experiments/bench.py tokenizers --data data/plays.jsonl --vocab_size 10000
python experiments/bench.py generate --nanogpt path/to/nanoGPT
"""

import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from utils import pick_device


@dataclass
class BenchConfig:
    """What is measured."""

    what: str = setting("", "", choices=("tokenizers", "generate"), positional=True)
    data: str = setting("plays", "the text")
    vocab_size: int = setting(10_000, "tokens that byte-pair encoding learns", low=258)
    preset: str = setting("medium", "the model", choices=tuple(PRESETS))
    arch: str = setting("gpt2", "its architecture", choices=tuple(ARCHS))
    tokens: int = setting(500, "tokens to generate", low=10)
    nanogpt: str = setting("", "a checkout of nanoGPT, to measure beside ours")
    device: str = setting("cpu", "cpu, cuda, mps")
    repeats: int = setting(3, "runs of each, of which the median counts", low=1)


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
    flags = {"preset": config.preset, "arch": config.arch, "vocab_size": 65}
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
    spec = importlib.util.spec_from_file_location("nanogpt", Path(config.nanogpt, "model.py"))
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = nanogpt
    spec.loader.exec_module(nanogpt)
    sizes = {k: getattr(gpt, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}
    model = nanogpt.GPT(nanogpt.GPTConfig(**sizes, vocab_size=65, dropout=0.0)).to(device).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {
        "nanoGPT": lambda: model.generate(ids, config.tokens, temperature=0.8, top_k=40).tolist()
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, BenchConfig)
    config = from_dict(BenchConfig, flags)
    raise_problems(problems + limit_problems(config))
    try:
        benches = {"tokenizers": bench_tokenizers, "generate": bench_generate}
        print(benches[config.what](config))
    except OSError as error:
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    run(main)
