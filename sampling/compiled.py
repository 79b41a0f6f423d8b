"""Compiled sampling: one graph for all steps of one token, and a KV cache with fixed shapes."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from config import GPTConfig
from model import KVCache


class StaticCache(KVCache):
    """Its length is a tensor: attention reads block_size tokens and masks the unused ones."""

    length: Tensor  # ()

    def __init__(self, config: GPTConfig, batch_size: int, **factory: Any):
        super().__init__(config, batch_size, **factory)
        self.length = torch.zeros_like(self.layers[0][0][0, 0, 0, 0], dtype=torch.long)
        if self.length.is_cuda:  # CUDA graphs only write to memory that stays in place
            for tensor in (self.length, self.shift_state, *itertools.chain(*self.layers)):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the keys and values (B, K, T, D) of a layer; returns the whole memory, (B, K,
        block_size, D), and the mask (T, block_size)."""
        keys, values = self.layers[layer]
        places = torch.arange(keys.size(2), device=keys.device)
        at = self.length + places[: k.size(2)]  # (T,)
        keys.index_copy_(2, at, k.to(keys.dtype))
        values.index_copy_(2, at, v.to(values.dtype))
        return keys, values, places <= at[:, None]


def compile_step(step: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`generate.next_tokens`, compiled as one graph."""
    # On a CPU, a C++ wrapper around the kernels makes int8 steps of `medium` 1.2 times as fast.
    on_gpu = device.type == "cuda"  # a CUDA graph launches all kernels of a step at once
    options: dict[str, Any] = {"cpp_wrapper": device.type == "cpu", "triton.cudagraphs": on_gpu}
    torch._dynamo.config.recompile_limit = 64  # a sweep has many combinations of settings
    compiled = torch.compile(step, fullgraph=True, options=options)

    def replay(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*args)
        return result._make(t.clone() for t in result)  # the next step overwrites the originals

    return replay if on_gpu else compiled
