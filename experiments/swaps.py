"""One swap at a time, from GPT-2's architecture to today's: what does each part give?

python experiments/swaps.py --quick
"""

import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study
from study import mean, spread

from config import GPTConfig, SampleConfig, run
from generate import generate
from model import GPT
from plots import BLUE, ORANGE

SWAPS: dict[str, dict[str, Any]] = {
    "GPT-2's architecture": {},
    "LayerNorm to RMSNorm": {"norm": "rmsnorm"},
    "GELU to ReLU": {"mlp": "relu"},
    "GELU to SiLU": {"mlp": "silu"},
    "GELU to ReLU squared": {"mlp": "relu2"},
    "GELU to SwiGLU": {"mlp": "swiglu"},  # as many weights: its width is 2/3
    "learned positions to sinusoidal": {"pos": "sinusoidal"},
    "learned positions to none": {"pos": "none"},
    "learned positions to RoPE": {"pos": "rope"},
    "queries and keys normed": {"qk_norm": True},
    "output matrix of its own": {"tie_weights": False},
    "no biases": {"bias": False},
    "norm after the sum": {"post_norm": True},
    "half of the channels from the token before": {"token_shift": True},
    "all of today's (qwen3)": {"arch": "qwen3"},
    "all of today's and the token before": {"arch": "qwen3", "token_shift": True},
}
# Small enough for a fraction of a minute; the full size is the preset of a GPU.
QUICK = {"preset": "tiny", "n_layer": 3, "n_head": 4, "block_size": 96, "batch_size": 16}
QUICK |= {"max_steps": 400, "lr_max": 2e-3, "eval_every": 200, "compile": False}
FULL = {"preset": "medium"}


def cache_speed(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Tokens a second with the keys and values kept, and with all computed anew for each token."""
    sizes = {"n_layer": 4, "n_embd": 128} if quick else {"n_layer": 12, "n_embd": 768}
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=1024, **sizes)).to(device).eval()
    prompt = torch.zeros(1, dtype=torch.long, device=device)
    list(generate(model, prompt, SampleConfig(max_new_tokens=20)))  # to warm up
    rows = []
    for n in (64, 256, 1000):
        rates = {}
        for cache in (True, False):
            settings = SampleConfig(max_new_tokens=n, cache=cache)
            began = time.perf_counter()
            ids = [step.ids for step in generate(model, prompt, settings)]
            ids[-1].tolist()  # waits for a GPU
            rates[cache] = n / (time.perf_counter() - began)
        row = {"tokens generated": n, "tokens/s with cache": round(rates[True])}
        row |= {
            "tokens/s without": round(rates[False]),
            "ratio": round(rates[True] / rates[False], 1),
        }
        rows.append(row)
    return rows


def draw(losses: dict[str, list[float]], cache: list[dict[str, Any]]) -> Any:
    """The loss of each swap, a dot a seed, over the band of the base's seeds; the cache beside."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    base = next(iter(losses.values()))
    left.axvspan(min(base), max(base), color=BLUE, alpha=0.2)
    for y, values in enumerate(losses.values()):
        color = BLUE if y == 0 else ORANGE
        left.plot(values, [y] * len(values), "o", color=color, alpha=0.5)
        left.plot(mean(values), y, "|", color=color, markersize=16, markeredgewidth=2)
    left.set_yticks(range(len(losses)), list(losses))
    left.invert_yaxis()
    left.set(xlabel="validation loss (nats a token), a dot a seed", title="One swap at a time")
    n = [row["tokens generated"] for row in cache]
    for key, color in (("tokens/s with cache", BLUE), ("tokens/s without", ORANGE)):
        right.loglog(n, [row[key] for row in cache], "o-", color=color, label=key)
    right.set_xticks(n, list(map(str, n)))
    right.minorticks_off()
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.set(xlabel="tokens generated", title="With keys and values kept")
    right.legend(loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    this = study.begin("swaps", argv, __doc__)
    rows, losses = [], {}
    for name, swap in SWAPS.items():
        flags = {"arch": "gpt2"} | (QUICK if this.config.quick else FULL) | swap
        runs = study.with_seeds(this, re.sub(r"\W+", "-", name), flags)
        losses[name] = [r["val"] for r in runs]
        base = losses["GPT-2's architecture"]
        rows.append(
            {
                "swap": name,
                "parameters": runs[0]["params"],
                "validation loss": mean(losses[name]),
                "spread": spread(losses[name]),
                "difference": study.difference(base, losses[name])
                if name != "GPT-2's architecture"
                else "",
                "ms a step": round(mean([r["ms_per_step"] for r in runs]), 1),
            }
        )
    cache = cache_speed(this.device, this.config.quick)
    tables = {"One swap at a time": rows, "Cache of keys and values": cache}
    return study.finish(this, tables, draw(losses, cache))


if __name__ == "__main__":
    run(main)
