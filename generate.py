"""Sample text from a checkpoint.

python generate.py                           500 tokens from the newest run's best checkpoint
python generate.py checkpoints/best.pt --prompt "ROMEO:" --temperature 0.9 --top_k 50 --seed 42
python generate.py --chat                    talk with it
python generate.py --sweep "temperature=0.5,0.8,1.1 top_k=20,40"      what the settings do
"""

import codecs
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import SampleConfig, from_dict, parse_flags, raise_problems, run
from model import GPT, KVCache
from tokenizer import END_OF_TEXT, Tokenizer
from utils import (
    atomic_write,
    device_problems,
    load_checkpoint,
    newest_checkpoint,
    pick_device,
    read_text,
)


def adjust_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The distribution that the next tokens are drawn from: logits (B, V) -> probabilities, and the
    ids they belong to, likeliest first, both (B, V), or (B, k) under top-k.

    In this order: temperature divides the logits (0: all to the likeliest token); top-k keeps the
    k likeliest (0: all; Fan et al. 2018); top-p keeps of these the nucleus, the smallest set of
    likeliest tokens whose probabilities reach top_p (Holtzman et al. 2020); min-p drops those with
    less than min_p of the likeliest's probability (Nguyen et al. 2024). Of equally likely tokens
    the lower id comes first.
    """
    logits, ids = logits.float().sort(dim=-1, descending=True, stable=True)  # (B, V) both
    if top_k or temperature == 0:
        k = top_k if temperature else 1
        logits, ids = logits[:, :k], ids[:, :k]
    # With the largest logit at 0, no temperature is too small to divide by.
    probs = ((logits - logits[:, :1]) / (temperature or 1)).softmax(dim=-1)
    if top_p < 1:
        likelier = probs.cumsum(dim=-1) - probs  # what all the likelier tokens have together
        probs = probs.masked_fill(likelier >= top_p, 0.0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs[:, :1], 0.0)
    return probs / probs.sum(dim=-1, keepdim=True), ids


def sample_logits(logits: Tensor, uniform: Tensor, **settings: float) -> Tensor:
    """Draw the next token of each row: logits (B, V), uniform (B,) in [0, 1) -> ids (B,).

    The settings are those of `adjust_logits`; at temperature 0 the first of the likeliest comes
    without a draw. The draw inverts the cumulative distribution at `uniform`.

    >>> probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    >>> sample_logits(probabilities.log(), torch.tensor([0.6]), top_p=0.6)  # 1 or 2, 4/7 to 3/7
    tensor([2])
    """
    if settings.get("temperature") == 0:
        return logits.argmax(dim=-1)
    probs, ids = adjust_logits(logits, **settings)
    cumulative = probs.cumsum(dim=-1)
    drawn = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)
    drawn = drawn.minimum((probs > 0).sum(dim=-1) - 1)  # rounding must not lead past the nucleus
    return ids.gather(1, drawn[:, None]).squeeze(1)


def penalize_repetition(logits: Tensor, text: Tensor, penalty: float) -> Tensor:
    """Make the tokens that stand in the text (B, T) rarer: their logits (B, V) are divided by the
    penalty where positive, multiplied where negative (Keskar et al. 2019)."""
    found = logits.gather(1, text)
    return logits.scatter(1, text, torch.where(found > 0, found / penalty, found * penalty))


def prefill(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """Read a text (B, T) into the empty cache; the logits of what may follow, (B, V)."""
    cache.length = 0
    return model(ids, cache=cache)[0][:, -1]


def decode(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """Read one more token (B,) into the cache; the logits of what may follow, (B, V)."""
    return model(ids[:, None], cache=cache)[0][:, -1]


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits: whole numbers up to 127, and a scale for each row (as
    the weights of Dettmers et al. 2022)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1).clamp(min=1e-12) / 126
        self.register_buffer("scale", scale.bfloat16())  # 8 bits: 126, so that none rounds to 128
        weight = (linear.weight.detach() / self.scale.float()[:, None]).round()
        self.register_buffer("weight", weight.to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (rows, n_in), bfloat16
        if len(flat) < 8 and x.device.type == "cpu":
            # torch has no public name for this product, which never makes the weights wider
            y = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        else:  # many rows share the cost of making them wider
            y = nn.functional.linear(flat, self.weight.bfloat16()) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def lower_precision(model: nn.Module, precision: str) -> None:
    """Keep the weights in a lower precision, for a token costs the time to read them. With int8
    those are the linear layers'; all else is bfloat16 then. Angles stay in float32."""
    if precision == "float32":
        return
    if precision == "int8":
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.Linear):
                    setattr(parent, name, Int8Linear(module))
    dtype = torch.bfloat16 if precision == "int8" else getattr(torch, precision)
    for name, parameter in model.named_parameters():
        if "q_norm" not in name and "k_norm" not in name:  # which get queries and keys in float32
            parameter.data = parameter.data.to(dtype)


def cache_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type of the cache: on a CPU float32, in which its attention kernel is the fastest."""
    lower = precision in ("bfloat16", "float16") and device.type != "cpu"
    return getattr(torch, precision) if lower else torch.float32


class Step(NamedTuple):
    """What a step of generation gives."""

    ids: Tensor  # (B,), the next token of each text; -1 for a text that has ended
    logits: Tensor  # (B, V), that they were drawn from


@torch.no_grad()
def generate(
    model: GPT, prompt: Tensor, config: SampleConfig, ends: Sequence[int] = ()
) -> Iterator[Step]:
    """Continue a prompt, ids (T,), in num_samples ways, by max_new_tokens or until each has ended
    with a token of `ends`; yields a Step a token.

    Sample i depends on (seed, i) alone, not on how many are asked for. The model sees at most
    block_size tokens: when a text has become longer, or the prompt is, it goes on from the last
    half window, which is read into the cache anew. With cache=False all that it sees is computed
    anew at each step, to the same result.
    """
    device, size, n_new = prompt.device, model.config.block_size, config.max_new_tokens
    draws = [
        np.random.default_rng((config.seed, i)).random(n_new, dtype=np.float32)
        for i in range(config.num_samples)
    ]
    uniform = torch.from_numpy(np.stack(draws)).to(device)  # (B, max_new_tokens)
    B, T = config.num_samples, len(prompt)
    text = torch.cat([prompt.repeat(B, 1), prompt.new_zeros(B, n_new)], dim=1)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    cache = KVCache(model.config, B, device, cache_dtype(device, config.precision))
    begin = 0  # the first token that the model sees
    for step in range(n_new):
        end = T + step
        fresh = step == 0
        if end - begin > size:
            begin, fresh = end - max(size // 2, 1), True
        if not config.cache:
            logits = model(text[:, begin:end])[0][:, -1]
        elif fresh:
            logits = prefill(model, text[:, begin:end], cache)
        else:
            logits = decode(model, text[:, end - 1], cache)
        if config.repetition_penalty != 1:
            logits = penalize_repetition(logits, text[:, begin:end], config.repetition_penalty)
        ids = sample_logits(logits, uniform[:, step], **knobs(config))
        text[:, end] = ids
        yield Step(ids.masked_fill(ended, -1) if ends else ids, logits)
        for token in ends:
            ended = ended | (ids == token)
        if ends and bool(ended.all()):
            return


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


def knobs(config: SampleConfig) -> dict[str, float]:
    """The settings of `adjust_logits`."""
    return {k: getattr(config, k) for k in ("temperature", "top_k", "top_p", "min_p")}


@torch.no_grad()
def beam_search(
    model: GPT, prompt: Tensor, beams: int, n_new: int, ends: Sequence[int] = ()
) -> list[tuple[float, list[int]]]:
    """The likeliest continuations of a prompt (T,) that a search with so many beams finds, best
    first: (score, ids). The score is the mean log-probability of the new tokens, an end of text
    (one of `ends`) included, so that short texts have no advantage (Wu et al. 2016, with a length
    penalty of 1). Longer texts than the window go on from the last half of it, as in `generate`.
    """
    size = model.config.block_size
    text = prompt.repeat(beams, 1)  # (B, T)
    scores = torch.full((beams,), -math.inf, device=prompt.device)
    scores[0] = 0.0  # the beams are equal at first: one goes on
    cache = KVCache(model.config, beams, prompt.device)
    begin, fresh, finished = 0, True, []
    for step in range(1, n_new + 1):
        if text.size(1) - begin > size:
            begin, fresh = text.size(1) - max(size // 2, 1), True
        if fresh:
            logits = prefill(model, text[:, begin:], cache)
        else:
            logits = decode(model, text[:, -1], cache)
        fresh = False
        totals = scores[:, None] + logits.float().log_softmax(dim=-1)  # (B, V)
        best, places = totals.flatten().topk(min(2 * beams, totals.numel()))
        rows, tokens = places // totals.size(1), places % totals.size(1)
        going = []  # of twice as many candidates at least as many as there are beams go on
        for i, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            if token in ends and len(going) < beams:
                ids = [*text[row, len(prompt) :].tolist(), token]
                finished.append((best[i].item() / step, ids))
            elif token not in ends and len(going) < beams:
                going.append(i)
        rows, scores = rows[going], best[going]
        text = torch.cat([text[rows], tokens[going, None]], dim=1)
        cache.select(rows)
        if len(finished) >= beams:
            break
    else:
        new = text[:, len(prompt) :].tolist()
        finished += [(s / n_new, ids) for s, ids in zip(scores.tolist(), new, strict=True)]
    return sorted(finished, reverse=True)[:beams]


# --- text


def end_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text."""
    return [i for text, i in tokenizer.specials.items() if text in (END_OF_TEXT, "<EOS>")]


class TextWriter:
    """The text of a sample as its tokens come: whole characters only, for a token may end in the
    midst of one, and nothing from an end of text or a stop string on."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ends = end_tokens(tokenizer)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # what may be the beginning of a stop string
        self.done = False

    def add(self, token: int) -> str:
        """The text that a further token lets out."""
        if self.done or token < 0 or token in self.ends:
            return self.finish()
        self.held += self.utf8.decode(self.tokenizer.decode_bytes([token]))
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.held = self.held[: min(found)]
            return self.finish()
        keep = max(
            (n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])),
            default=0,
        )
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def finish(self) -> str:
        """What is still held back; nothing comes after it."""
        text = "" if self.done else self.held + self.utf8.decode(b"", final=True)
        self.done, self.held = True, ""
        return text


def stream_texts(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: Tensor
) -> Iterator[list[str]]:
    """The continuations of a prompt (T,), step by step: what each of the samples gains."""
    writers = [TextWriter(tokenizer, config.stop.split("|")) for _ in range(config.num_samples)]
    for step in generate(model, prompt, config, end_tokens(tokenizer)):
        yield [w.add(i) for w, i in zip(writers, step.ids.tolist(), strict=True)]
        if all(writer.done for writer in writers):
            return
    yield [writer.finish() for writer in writers]


def prompt_start(tokenizer: Tokenizer, prompt: Tensor) -> str:
    """What of a prompt (T,) is shown: all but an end of text, which stands for an empty one."""
    return tokenizer.decode(i for i in prompt.tolist() if i not in end_tokens(tokenizer))


def sample_text(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> list[str]:
    """The prompt's continuations as texts, each with the prompt before it: num_samples of them, or
    the one that a beam search finds best."""
    prompt = encode_prompt(tokenizer, config.prompt).to(next(model.parameters()).device)
    start = prompt_start(tokenizer, prompt)
    if config.beams:
        found = beam_search(
            model, prompt, config.beams, config.max_new_tokens, end_tokens(tokenizer)
        )
        writers = [TextWriter(tokenizer, config.stop.split("|")) for _ in found]
        texts = [
            "".join(map(w.add, ids)) + w.finish()
            for w, (_, ids) in zip(writers, found, strict=True)
        ]
        return [f"{start}{t}\n[{s:.4f} a token]" for t, (s, _) in zip(texts, found, strict=True)]
    steps = stream_texts(model, tokenizer, config, prompt)
    bar = tqdm(steps, total=config.max_new_tokens, unit="token", leave=False, disable=None)
    return [start + "".join(pieces) for pieces in zip(*bar, strict=True)]


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
    ways = ("chat", "show_probs", "sweep", "stream", "beams")
    asked = [f"--{name}" for name in ways if getattr(config, name)]
    if len(asked) > 1:
        problems.append(f"{' and '.join(asked)}: give one of them")
    if {"--chat", "--show_probs", "--stream"} & set(asked) and (
        config.num_samples > 1 or config.output_file
    ):
        problems.append(f"{asked[0]} writes to the terminal: no --num_samples, --output_file")
    if config.output_file and not Path(config.output_file).parent.is_dir():
        problems.append(f"there is no folder {Path(config.output_file).parent} for --output_file")
    raise_problems(problems)

    config.checkpoint = config.checkpoint or str(newest_checkpoint(Path("checkpoints")))
    device = pick_device(config.device)
    model, tokenizer, state = load_checkpoint(Path(config.checkpoint), device)
    lower_precision(model, config.precision)
    if config.compile:
        model.compile(dynamic=True)
    first_lines = header(config, state)
    if config.prompt_file:
        config.prompt = read_text(Path(config.prompt_file))

    if config.chat or config.show_probs or config.sweep:
        import play  # which samples with the functions of this file

        if config.chat:
            play.chat(model, tokenizer, config)
        elif config.show_probs:
            for line in play.show_probs(model, tokenizer, config):
                print(line, flush=True)
        else:
            print(play.sweep(model, tokenizer, config, first_lines))
        return 0
    if config.stream is None:
        one = config.num_samples == 1 and not config.beams
        config.stream = one and not config.output_file and sys.stdout.isatty()
    if config.stream:
        prompt = encode_prompt(tokenizer, config.prompt).to(device)
        print(prompt_start(tokenizer, prompt), end="", flush=True)
        for (piece,) in stream_texts(model, tokenizer, config, prompt):
            print(piece, end="", flush=True)
        print()
        return 0
    texts = sample_text(model, tokenizer, config)
    rule = "\n" + "-" * 40 + "\n"
    if config.output_file:
        with atomic_write(Path(config.output_file)) as file:
            file.write((first_lines + rule.join(texts) + "\n").encode())
        print(f"{len(texts)} texts: {config.output_file}")
    else:
        print(rule.join(texts))
    return 0


if __name__ == "__main__":
    run(main)
