"""From GPT-2's architecture to today's, one component at a time: what does each one gain?

    python -m experiments.swaps --quick

Also measured: how much the KV cache speeds up generation.
"""

import time

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from config import GPTConfig, SampleConfig
from experiments.comparison import Row, plot_differences
from experiments.study import compare, parse_study, val_losses
from generate import generate
from model import GPT
from system.errors import run
from training.setup import Flags
from viz.curve import BLUE, ORANGE, new_figure

BASE = "GPT-2's architecture"
SWAPS: dict[str, Flags] = {
    BASE: {},
    "LayerNorm to RMSNorm": {"norm": "rmsnorm"},
    "GELU to ReLU": {"mlp": "relu"},
    "GELU to SiLU": {"mlp": "silu"},
    "GELU to ReLU squared": {"mlp": "relu2"},
    "GELU to SwiGLU": {"mlp": "swiglu"},  # about as many weights: its hidden width is 2/3
    "learned positions to sinusoidal": {"pos": "sinusoidal"},
    "learned positions to none": {"pos": "none"},
    "learned positions to RoPE": {"pos": "rope"},
    "QK-norm": {"qk_norm": True},
    "untied output layer": {"tie_weights": False},
    "no biases": {"bias": False},
    "post-norm": {"post_norm": True},
    "token shift": {"token_shift": True},
    "Qwen3's architecture": {"arch": "qwen3"},
    "Qwen3's architecture, token shift": {"arch": "qwen3", "token_shift": True},
}
# The quick model trains in less than a minute; the full one is the preset for a GPU.
QUICK: Flags = {"preset": "tiny", "n_layer": 3, "n_head": 4, "block_size": 96, "batch_size": 16}
QUICK |= {"max_steps": 400, "lr_max": 2e-3, "eval_every": 200, "compile": False}
FULL: Flags = {"preset": "medium"}


def cache_speed(device: torch.device, quick: bool) -> list[Row]:
    """Tokens per second with a KV cache, and when everything is recomputed for each token."""
    n_layer, n_embd = (4, 128) if quick else (12, 768)
    torch.manual_seed(0)
    gpt = GPTConfig(vocab_size=65, block_size=1024, n_layer=n_layer, n_embd=n_embd)
    model = GPT(gpt).to(device).eval()
    prompt = torch.zeros(1, dtype=torch.long, device=device)
    list(generate(model, prompt, SampleConfig(max_new_tokens=20, seed=1337)))  # warm up
    rows = []
    for n in (64, 256, 1000):
        rates = {}
        for cache in (True, False):
            config = SampleConfig(max_new_tokens=n, cache=cache, seed=1337)
            start = time.perf_counter()
            ids = [step.ids for step in generate(model, prompt, config)]
            ids[-1].tolist()  # wait for the GPU
            rates[cache] = n / (time.perf_counter() - start)
        rows.append(
            {
                "tokens generated": n,
                "tokens/s with cache": round(rates[True]),
                "tokens/s without": round(rates[False]),
                "ratio": round(rates[True] / rates[False], 1),
            }
        )
    return rows


def plot_cache(axes: Axes, rows: list[Row]) -> None:
    """Tokens per second over the length of the text, with and without a cache."""
    n = [row["tokens generated"] for row in rows]
    for key, color in (("tokens/s with cache", BLUE), ("tokens/s without", ORANGE)):
        axes.loglog(n, [row[key] for row in rows], "o-", color=color, label=key)
    axes.set_xticks(n, list(map(str, n)))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="tokens generated", title="KV cache")
    axes.legend(loc="lower left")


def main(argv: list[str] | None = None) -> int:
    study = parse_study("swaps", argv, __doc__)
    study.n_runs = len(SWAPS) * study.config.seeds
    base = {"arch": "gpt2"} | (QUICK if study.config.quick else FULL)
    runs = study.train_variants(base, SWAPS)
    params = {name: some[0]["params"] for name, some in runs.items()}
    rows = compare(runs, lambda name: {"swap": name, "parameters": params[name]}, timed=True)
    cache_rows = cache_speed(study.device, study.config.quick)
    losses = {name: val_losses(some) for name, some in runs.items()}
    figure = new_figure(11, 5)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    plot_differences(left, rows, losses, "One component at a time")
    plot_cache(right, cache_rows)
    tables = {"One component at a time": rows, "Cache: speed of generation": cache_rows}
    study.write_results(tables, figure)
    return 0


if __name__ == "__main__":
    run(main)
