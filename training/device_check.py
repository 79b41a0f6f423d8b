"""Whether a GPU computes what the CPU does, and faster: checked by the first run on it.

PyTorch can be wrong without a message: on MPS, in gradients of large batches (pytorch issue 177116)
and in attention (195910, 181133). A small model with the components, window and head size of the
run is compared: the loss and gradients of a batch, and ten greedy tokens with and without cache.
"""

import contextlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import GPTConfig, SampleConfig, TrainConfig
from generate import generate
from model import GPT
from system.files import atomic_write
from system.settings import UserError, first_line
from utils import autocast, count_params

CACHE_DIR = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
SIZES: dict[str, Any] = {"vocab_size": 256, "n_layer": 2, "n_embd": 128, "n_inner": 256}
SIZES |= {"n_head": 2, "dropout": 0.0, "tie_weights": False}  # tied, they repeat the last token
# Of each gradient, relative to its norm. Measured on a CPU: up to 0.00001, 0.024 and 0.003, except
# for ReLU, which is not smooth, 0.08 and 0.04. Where attention sees later tokens, above 0.5.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.2, "float16": 0.1}
Results = dict[str, Tensor]  # what a device has computed, by name
# What is wrong; what is wrong with fused attention; the seconds of a step there, and on the CPU
Verdict = tuple[str, str, float, float]


def compute(gpt: GPTConfig, batch_size: int, device: Any, precision: str) -> tuple[Results, float]:
    """What a device computes, and the seconds that a loss and its gradients take. The weights are
    larger than usual, so that the next tokens depend on attention."""
    torch.manual_seed(1)
    model = GPT(gpt)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    ids = torch.randint(gpt.vocab_size, (1 + batch_size, gpt.block_size + 1)).to(device)
    weights = dict(model.to(device).named_parameters())
    for batch in (ids[:1], ids[1:]):  # the first is slow, and pytorch issue 177116 needs two sizes
        start = time.perf_counter()
        with autocast(device, precision):
            loss = model(batch[:, :-1], batch[:, 1:], loss_only=True)[1]
        gradients = torch.autograd.grad(loss, list(weights.values()))
        results = {"loss": loss.detach().cpu()}  # waits for the device
        seconds = time.perf_counter() - start
    named = zip(weights, gradients, strict=True)
    results |= {f"gradient of {name}": gradient.cpu() for name, gradient in named}
    for cache in (True, False):
        name = f"tokens with{'' if cache else 'out'} the KV cache"
        results[name] = torch.tensor(math.nan)
        sampling = SampleConfig(max_new_tokens=10, num_samples=2, temperature=0, cache=cache)
        with contextlib.suppress(UserError):  # logits that are not finite
            steps = generate(model.eval(), ids[0, : gpt.block_size // 2 + 1], sampling)
            results[name] = torch.stack([step.ids.cpu().float() for step in steps])  # (10, 2)
    return results, seconds


def difference(found: Results, exact: Results, precision: str) -> str:
    """What differs by more than rounding; empty if nothing does."""
    limits = {"loss": TOLERANCE[precision] / 10, "gradient": TOLERANCE[precision], "tokens": 0.0}
    # what is nearly zero is all rounding
    smallest = 0.001 * max(exact[name].norm() for name in exact if "gradient" in name)
    for name, values in exact.items():
        error = (found[name] - values).norm() / (values.norm() + smallest)
        if not error <= limits[name.split()[0]]:  # or if it is NaN
            return f"wrong {name}, by {error:.1%}"
    return ""


def use_fused_attention(wanted: bool) -> None:
    """Let PyTorch use fused kernels of attention, or only its formula (on MPS, model.py's)."""
    for kernel in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(wanted)


def compare(gpt: GPTConfig, batch_size: int, device: torch.device, precision: str) -> Verdict:
    """Compare a device with the CPU and, if it differs, once more without fused attention."""
    exact, cpu_seconds = compute(gpt, batch_size, torch.device("cpu"), "float32")
    found, seconds = compute(gpt, batch_size, device, precision)
    wrong = wrong_fused = difference(found, exact, precision)
    if wrong:
        use_fused_attention(False)
        found, seconds = compute(gpt, batch_size, device, precision)
        wrong = difference(found, exact, precision)
    return wrong, wrong_fused, seconds, cpu_seconds


def remembered(gpt: GPTConfig, batch_size: int, device: torch.device, precision: str) -> Verdict:
    """What `compare` finds, or has found on this machine with this version of PyTorch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = (torch.__version__, platform.platform(), platform.node(), name)
    key = repr((*machine, precision, batch_size, asdict(gpt)))
    file = Path(os.path.expanduser(CACHE_DIR), "tinyllm", "devices.json")
    verdicts: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # missing or damaged
        verdicts = dict(json.loads(file.read_text(encoding="utf-8")))
        wrong, wrong_fused, seconds, cpu_seconds = verdicts[key]
        return str(wrong), str(wrong_fused), float(seconds), float(cpu_seconds)
    verdicts[key] = compare(gpt, batch_size, device, precision)
    with contextlib.suppress(OSError, UserError):  # then the next run compares again
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as content:
            content.write(json.dumps(verdicts, indent=1).encode())
    return verdicts[key]


def passes_check(gpt: GPTConfig, config: TrainConfig, device: torch.device, precision: str) -> bool:
    """Whether to use a GPU for a run; prints why (not). With config.device "auto", it must also be
    faster than the CPU; otherwise UserError is raised if it is wrong."""
    batch_size = 2
    if device.type == "mps":  # which is wrong for many tokens only: compute as many as the run
        batch_size = max(1, min(config.batch_size, 2**16 // gpt.block_size))
    small = replace(gpt, **SIZES, n_kv_head=1 if gpt.n_kv_head < gpt.n_head else 2)
    try:
        wrong, wrong_fused, *times = remembered(small, batch_size, device, precision)
    except RuntimeError as error:  # forgotten: other programs may have used its memory
        wrong, wrong_fused, *times = first_line(error), "", 0.0, 0.0
    use_fused_attention(bool(wrong) or not wrong_fused)
    if wrong and config.device != "auto":
        raise UserError(f"{device} cannot be used ({wrong}): use --device cpu")
    # For each layer a GPU must start at least as many kernels, and a CPU compute all products.
    seconds = times[0] * gpt.n_layer / small.n_layer
    n_large, n_small = (count_params(c)[0] for c in (replace(gpt, vocab_size=256), small))
    cpu_seconds = times[1] * n_large * config.batch_size / n_small / batch_size
    if config.device == "auto" and (wrong or cpu_seconds < seconds):
        slower = f"a step takes {cpu_seconds:.2g} s, there {seconds:.2g} s or more"
        print(f"device check: the CPU instead of {device}: {wrong or slower}")
        return False
    plain = f" with plain attention, else {wrong_fused}" if wrong_fused else ""
    print(f"device check: {device} computes what the CPU does{plain}")
    return True
