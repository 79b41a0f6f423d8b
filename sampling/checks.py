"""Checks before text is generated: settings that exclude each other, files, memory."""

import os
from pathlib import Path

import torch
from torch import Tensor

from config import GPTConfig, SampleConfig
from system.device import check_memory, device_problems
from system.settings import UserError

# What beam search, which draws no random numbers, would ignore.
NOT_WITH_BEAMS = (
    *("num_samples", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    *("stream", "cache", "compile"),
)
MAX_PROMPT_FILE = 64 << 20  # bytes; a model sees only a few thousand tokens at the end


def sampling_problems(config: SampleConfig) -> list[str]:
    """Settings that exclude each other, and devices and folders that do not exist."""
    found = device_problems(config.device)
    if config.prompt_file and config.prompt != SampleConfig.prompt:
        found.append("--prompt and --prompt_file: give one of them")
    if config.beams:
        ignored = [n for n in NOT_WITH_BEAMS if getattr(config, n) != getattr(SampleConfig, n)]
        found += [f"{name} has no effect with --beams: leave it out" for name in ignored]
    if config.compile and not config.cache:
        found.append("--compile needs the cache: leave out --no-cache")
    if config.stream and not config.beams and (config.num_samples > 1 or config.output_file):
        found.append("--stream writes to the terminal: no --num_samples, --output_file")
    prompt_file = config.prompt_file
    if os.path.isfile(prompt_file) and os.path.getsize(prompt_file) > MAX_PROMPT_FILE:
        found.append(f"--prompt_file {prompt_file} is larger than {MAX_PROMPT_FILE >> 20} MiB")
    if config.output_file:
        from system.files import file_problems  # only with --output_file

        problems = file_problems(Path(config.output_file), mark=b"# model trained on ")
        found += [f"--output_file: {problem}" for problem in problems]
    return found


def sampling_bytes(gpt: GPTConfig, config: SampleConfig, n_prompt: int) -> int:
    """The memory that generation needs besides the weights, estimated, with all numbers as float32
    and a prompt of n_prompt tokens."""
    n_new = config.max_new_tokens
    n_text = n_prompt + n_new
    n_window = min(n_text, gpt.block_size)
    width = 6 * gpt.n_embd + 2 * gpt.n_inner + 2 * gpt.n_head * gpt.head_size
    cached = 8 * gpt.n_layer * gpt.n_kv_head * gpt.head_size * gpt.block_size
    logits = gpt.vocab_size if config.cache else n_window * gpt.vocab_size
    # ids (8), random numbers and their copy (4 + 4), a string and its place in a list (80)
    per_text = 8 * n_text + (8 + 80) * n_new + 4000  # the objects that belong to a text
    per_text += cached * (2 if config.beams else bool(config.cache))  # beams: copied to reorder
    per_text += 4 * n_window * width + 4 * logits + 32 * gpt.vocab_size  # sorted, with ids
    return per_text * (config.beams or config.num_samples)


def check_sampling_memory(
    gpt: GPTConfig, config: SampleConfig, n_prompt: int, device: torch.device
) -> None:
    """Raise UserError if generation would need more memory than there is."""
    name = "beams" if config.beams else "num_samples"
    what = f"--{name} {getattr(config, name)} with --max_new_tokens {config.max_new_tokens}"
    check_memory(sampling_bytes(gpt, config, n_prompt), device, what)


def check_finite(logits: Tensor) -> None:
    """Raise UserError if the largest logit is infinite or not a number: nothing can be sampled."""
    if not bool(logits.max().isfinite()):
        raise UserError(
            "the model's logits are not finite: its weights are damaged, its training diverged, or "
            "its values are too large for this --precision"
        )
