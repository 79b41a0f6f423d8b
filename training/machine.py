"""What this machine can do: precision, compilation, memory."""

import ctypes
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import GPTConfig, TrainConfig
from model import GPT
from system.compiler import compiler_problem
from system.settings import UserError
from training.distributed import world_size
from utils import TokenStream, count_params

MAX_GPU_TOKENS = 1 << 28  # as int32, a gigabyte of GPU memory
MAX_GRAPH_PARAMS = 20_000_000  # of a model whose kernels are launched by CUDA graphs
WORTHWHILE_SPEEDUP = 1.5  # of bfloat16 on a CPU; a smaller one is lost to the conversions


def to_gpu_if_small(ids: TokenStream, device: torch.device) -> TokenStream | Tensor:
    """Token ids in GPU memory if they take at most a gigabyte: then no step waits for the host.
    Others stay where they are, which may be files larger than memory."""
    if device.type == "cpu" or not isinstance(ids, np.ndarray) or len(ids) > MAX_GPU_TOKENS:
        return ids
    return torch.from_numpy(ids.astype(np.int32)).to(device)


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision of matrix products, and the reason: `auto` is the fastest one on the device
    that trains well."""
    if name != "auto":
        return name, "as requested"
    if device.type == "cuda":
        if has_bfloat16(device):
            return "bfloat16", "supported by this GPU"
        return "float16", "this GPU has no bfloat16"
    if device.type == "cpu":
        ratio = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
        reason = f"bfloat16 matrix products are {ratio:.1f} times as fast as float32 here"
        return "bfloat16" if ratio > WORTHWHILE_SPEEDUP else "float32", reason
    return "float32", "the default on this device"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device (of GPUs, the current one) computes in bfloat16. NVIDIA GPUs before Ampere
    (T4, V100, RTX 20) only emulate it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def matmul_seconds(dtype: torch.dtype) -> float:
    """The time of a product of two 512 x 512 matrices on the CPU, the best of eight."""
    a = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def pick_compile(wanted: bool | None, device: torch.device) -> bool:
    """Whether to use torch.compile: as requested, else if it works. Raises UserError if it is
    requested and does not work."""
    if wanted is False or (wanted is None and device.type == "mps"):
        return False
    problem = compiler_problem(device)
    if problem and wanted:
        raise UserError(f"--compile does not work here ({problem}): give --no-compile")
    if problem:
        print(f"not compiling: {problem}")
    return not problem


def compile_model(model: GPT, config: TrainConfig, device: torch.device, same_shapes: bool) -> None:
    """Compile the model in place, before it is wrapped with DDP or FSDP.

    On a GPU it is one graph, as PyTorch's documentation recommends ("Where to apply torch.compile":
    the highest level), so that the loss too is fused. By default, a second shape makes
    torch.compile generate more general kernels, for dynamic shapes. This is turned off if all
    batches have the same shape, or one of a few (grow_windows has three). On a CPU, where compiling
    takes as long as many steps, and with FSDP, which gathers the weights of a block between the
    graphs, each block is compiled: blocks are alike, so one compilation serves all.

    The kernels of a small model take less time than launching them. CUDA graphs ("reduce-overhead")
    launch them all at once. A graph writes its results to the same memory every time, gradients
    included, so a second micro-step would overwrite the sum (pytorch issues 96693 and 169545), and
    DDP reads gradients by itself: only steps of one micro-step in one process use them.
    """
    if device.type == "cuda" and config.parallel != "fsdp":
        one_batch = same_shapes and config.grad_accum == world_size() == 1
        mode = "reduce-overhead" if one_batch and model.num_params() <= MAX_GRAPH_PARAMS else None
        model.compile(dynamic=False if same_shapes else None, mode=mode)
        return
    for block in model.blocks:
        block.compile()


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones. Otherwise Linux takes
    it back and clears it every step, and training on a CPU takes a quarter longer."""
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        m_mmap_max, m_trim_threshold = -4, -1  # from malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def memory_estimate(gpt: GPTConfig, config: TrainConfig) -> dict[str, int]:
    """The memory that training needs per process, in bytes, by use: weights, gradients, optimizer
    state (two averages per weight for AdamW, one for SGD and Muon, which has the blocks' matrices),
    and what a step needs. FSDP divides the first three by the number of processes.

    The activations are counted from the formulas of model.py: for GPT-2's components, 10 C + 3 F
    numbers per block and token; newer components have more operations (compiling fuses some of
    them). With grad_checkpoint only C per block and token are kept, plus all those of the block
    being recomputed. The logits count twice, once in float32, with their gradient.
    """
    n_params, n_per_block = count_params(gpt)
    with_one = {"muon": gpt.n_layer * n_per_block, "sgd": n_params}  # weights with one average
    n_averages = 2 * n_params - with_one.get(config.optimizer, 0)
    n_shards = world_size() if config.parallel == "fsdp" else 1
    width = 4 if config.precision == "float32" else 2
    C = 10 + 4 * (gpt.norm == "rmsnorm") + 4 * gpt.qk_norm + 2 * (gpt.pos == "rope")
    per_block = (C * gpt.n_embd + (5 if gpt.mlp == "swiglu" else 3) * gpt.n_inner) * width
    all_blocks = gpt.n_layer * per_block
    if config.grad_checkpoint:
        all_blocks = gpt.n_layer * gpt.n_embd * 4 + per_block
    per_token = all_blocks + gpt.vocab_size * (width + 8)
    n_tokens = config.batch_size * gpt.block_size
    return {
        "weights": 4 * n_params // n_shards,
        "gradients": 4 * n_params // n_shards,
        "optimizer": 4 * n_averages // n_shards,
        "activations": n_tokens * per_token,
        "batches": n_tokens * 16 * config.grad_accum // world_size(),
    }
