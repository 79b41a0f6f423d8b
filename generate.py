"""Sample text from a checkpoint.

python generate.py                           500 characters from the newest run's best checkpoint
python generate.py checkpoints/best.pt --prompt "ROMEO:" --temperature 0.9 --top_k 50 --seed 42
"""

import codecs
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import SampleConfig, from_dict, parse_flags, raise_problems, run
from model import GPT
from tokenizer import END_OF_TEXT, Tokenizer
from utils import (
    atomic_write,
    device_problems,
    load_checkpoint,
    newest_checkpoint,
    pick_device,
    read_text,
)


def sample_logits(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draw the next token of each row: logits (B, V), uniform (B,) in [0, 1) -> ids (B,).

    In this order: temperature divides the logits (0: the likeliest token, no draw); top-k keeps the
    k likeliest (0: all; Fan et al. 2018); top-p keeps of these the nucleus, the smallest set of
    likeliest tokens whose probabilities reach top_p (Holtzman et al. 2020). Of equally likely
    tokens the lower id comes first. The draw inverts the cumulative distribution at `uniform`.

    >>> probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    >>> sample_logits(probabilities.log(), torch.tensor([0.6]), top_p=0.6)  # 1 or 2, 4/7 to 3/7
    tensor([2])
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float().sort(dim=-1, descending=True, stable=True)  # (B, V) both
    if top_k:
        logits, ids = logits[:, :top_k], ids[:, :top_k]
    # With the largest logit at 0, no temperature is too small to divide by.
    probs = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    likelier = probs.cumsum(dim=-1) - probs  # what all the likelier tokens have together
    probs = probs.masked_fill(likelier >= top_p, 0.0)
    cumulative = probs.cumsum(dim=-1)
    drawn = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)
    drawn = drawn.minimum((probs > 0).sum(dim=-1) - 1)  # rounding must not lead past the nucleus
    return ids.gather(1, drawn[:, None]).squeeze(1)


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, config: SampleConfig) -> Iterator[Tensor]:
    """Continue a prompt, ids (T,), in num_samples ways; yields the next ids (B,) max_new_tokens
    times.

    Sample i depends on (seed, i) alone, not on how many are asked for. Of a text longer than
    block_size the model sees the last block_size tokens.
    """
    device = prompt.device
    draws = [
        np.random.default_rng((config.seed, i)).random(config.max_new_tokens, dtype=np.float32)
        for i in range(config.num_samples)
    ]
    uniform = torch.from_numpy(np.stack(draws)).to(device)  # (B, max_new_tokens)
    ids = prompt.repeat(config.num_samples, 1)  # (B, T)
    for step in range(config.max_new_tokens):
        ids = ids[:, -model.config.block_size :]
        logits, _ = model(ids)  # (B, T, V)
        next_ids = sample_logits(
            logits[:, -1], uniform[:, step], config.temperature, config.top_k, config.top_p
        )
        ids = torch.cat([ids, next_ids[:, None]], dim=1)
        yield next_ids


def encode_prompt(tokenizer: Tokenizer, text: str) -> Tensor:
    """The ids of a prompt (T,), without what the tokenizer does not know, which a warning names.

    For an empty prompt stands <|endoftext|>, with which documents begin; where there is none, a
    newline, or the first token there is.
    """
    if unknown := tokenizer.unknown(text):
        names = " ".join(map(repr, unknown))
        print(f"warning: the model does not know {names}; left out of the prompt", file=sys.stderr)
        text = "".join(c for c in text if c not in unknown)
    if not text and not tokenizer.specials and not tokenizer.unknown("\n"):
        text = "\n"
    if not text:
        return torch.tensor([tokenizer.specials.get(END_OF_TEXT, 0)])
    return torch.from_numpy(tokenizer.encode(text))


def sample_text(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> list[str]:
    """The prompt's continuations as texts, num_samples of them, each with the prompt before it."""
    prompt = encode_prompt(tokenizer, config.prompt).to(next(model.parameters()).device)
    steps = generate(model, prompt, config)
    bar = tqdm(steps, total=config.max_new_tokens, unit="token", leave=False, disable=None)
    new_ids = torch.stack(list(bar), dim=1)  # (B, max_new_tokens)
    return [tokenizer.decode([*prompt.tolist(), *row]) for row in new_ids.tolist()]


def stream_text(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Write one continuation to stdout, each token as soon as it is sampled, but whole characters
    only: a token may end in the midst of one."""
    prompt = encode_prompt(tokenizer, config.prompt).to(next(model.parameters()).device)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    print(utf8.decode(tokenizer.decode_bytes(prompt.tolist())), end="", flush=True)
    for next_ids in generate(model, prompt, config):
        print(utf8.decode(tokenizer.decode_bytes(next_ids.tolist())), end="", flush=True)
    print(utf8.decode(b"", final=True))


def header(config: SampleConfig, state: dict[str, Any]) -> str:
    """The first lines of an output file: the model, and the command that writes this file again."""
    command = "python generate.py"
    for name, field in SampleConfig.__dataclass_fields__.items():
        value = getattr(config, name)
        if value != field.default:
            quoted = shlex.quote(str(value)).replace("\n", "'$'\\n''")  # one line, also in a shell
            command += f" --{name}={quoted}"
    return f"# a model of {state['corpus']['name']}, step {state['step']}\n# {command}\n\n"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, SampleConfig)
    config = from_dict(SampleConfig, flags)
    problems += config.problems() + device_problems(config.device)
    if "prompt" in flags and config.prompt_file:
        problems.append("--prompt and --prompt_file: give one of them")
    if config.stream and (config.num_samples > 1 or config.output_file):
        problems.append(
            "--stream writes one sample to the terminal: no --num_samples, --output_file"
        )
    if config.output_file and not Path(config.output_file).parent.is_dir():
        problems.append(f"there is no folder {Path(config.output_file).parent} for --output_file")
    raise_problems(problems)

    config.checkpoint = config.checkpoint or str(newest_checkpoint(Path("checkpoints")))
    device = pick_device(config.device)
    model, tokenizer, state = load_checkpoint(Path(config.checkpoint), device)
    first_lines = header(config, state)
    if config.prompt_file:
        config.prompt = read_text(Path(config.prompt_file))

    if config.stream is None:
        config.stream = config.num_samples == 1 and not config.output_file and sys.stdout.isatty()
    if config.stream:
        stream_text(model, tokenizer, config)
        return 0
    texts = sample_text(model, tokenizer, config)
    rule = "\n" + "-" * 40 + "\n"
    if config.output_file:
        with atomic_write(Path(config.output_file)) as file:
            file.write((first_lines + rule.join(texts) + "\n").encode())
        print(f"{config.num_samples} x {config.max_new_tokens} tokens: {config.output_file}")
    else:
        print(rule.join(texts))
    return 0


if __name__ == "__main__":
    run(main)
