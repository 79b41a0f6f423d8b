"""Ways to look at a model, for generate.py: talk with it, see its probabilities, compare settings.

python generate.py --chat
python generate.py --show_probs --max_tokens 20
python generate.py --sweep "temperature=0.5,0.8,1.1 top_k=20,40"
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from config import SampleConfig, UserError, convert, raise_problems
from generate import (
    adjust_logits,
    encode_prompt,
    end_tokens,
    generate,
    knobs,
    sample_text,
    stream_texts,
)
from model import GPT
from qa import prompt_text
from tokenizer import Tokenizer
from utils import atomic_write

SWEPT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def chat(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Talk with a model until an empty line or Ctrl-D: one that knows questions answers them,
    another goes on from what is written. What was said stays in its context; /new forgets it."""
    asks = "<BOS>" in tokenizer.specials
    print("an empty line ends, /new forgets what was said")
    device = next(model.parameters()).device
    context: list[int] = []
    while line := read_line():
        if line == "/new":
            context = []
            continue
        if asks:
            context.append(tokenizer.specials["<BOS>"])
        text = prompt_text(line) if asks else line
        context += encode_prompt(tokenizer, text).tolist()
        prompt = torch.tensor(context, device=device)
        written = ""
        for (piece,) in stream_texts(model, tokenizer, config, prompt):
            written += piece
            print(piece, end="", flush=True)
        print()
        context += tokenizer.encode(written).tolist()
        context += [tokenizer.specials["<EOS>"]] if asks else []


def read_line() -> str:
    """A line from the user, empty at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def show_probs(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> Iterator[str]:
    """A line a step: the token that was drawn, and the five likeliest with the probabilities that
    they were drawn with."""
    prompt = encode_prompt(tokenizer, config.prompt).to(next(model.parameters()).device)
    for step in generate(model, prompt, config, end_tokens(tokenizer)):
        probs, ids = adjust_logits(step.logits[:1], **knobs(config))
        likeliest = zip(probs[0, :5].tolist(), ids[0, :5].tolist(), strict=True)
        shown = "  ".join(f"{tokenizer.decode([i])!r} {p:.3f}" for p, i in likeliest if p)
        yield f"{tokenizer.decode([max(step.ids[0].item(), 0)])!r:14} from  {shown}"


# --- sweeps


def parse_sweep(text: str) -> list[dict[str, Any]]:
    """The settings of a sweep, each combination once. Raises UserError where it cannot be read.

    >>> parse_sweep("temperature=0.5,1 top_k=20")
    [{'temperature': 0.5, 'top_k': 20}, {'temperature': 1.0, 'top_k': 20}]
    """
    known = {f.name: f for f in fields(SampleConfig) if f.name in SWEPT}
    lists = {}
    for word in text.split():
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if name not in known or not equals:
            raise UserError(f"--sweep: {word!r} is not NAME=A,B,... with one of {', '.join(SWEPT)}")
        try:
            lists[name] = [convert(known[name], value) for value in values.split(",")]
        except ValueError as error:
            raise UserError(f"--sweep: {error}") from None
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def measure(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> dict[str, float]:
    """How free and how varied samples are: the mean entropy, in nats, of the distributions that the
    tokens were drawn from; distinct-1 and distinct-2, the share of different tokens and pairs among
    all (Li et al. 2016); the mean log-probability of the tokens under the model as it is."""
    prompt = encode_prompt(tokenizer, config.prompt).to(next(model.parameters()).device)
    entropies, log_probs = [], []
    texts: list[list[int]] = [[] for _ in range(config.num_samples)]
    for step in generate(model, prompt, config, end_tokens(tokenizer)):
        probs, _ = adjust_logits(step.logits, **knobs(config))
        entropy = -torch.xlogy(probs, probs).sum(dim=-1)  # (B,)
        own = (
            step.logits.float().log_softmax(dim=-1).gather(1, step.ids.clamp(min=0)[:, None])[:, 0]
        )
        for i, token in enumerate(step.ids.tolist()):
            if token >= 0:
                texts[i].append(token)
                entropies.append(entropy[i].item())
                log_probs.append(own[i].item())
    return {
        "entropy": sum(entropies) / len(entropies),
        "distinct-1": distinct(texts, 1),
        "distinct-2": distinct(texts, 2),
        "log-probability": sum(log_probs) / len(log_probs),
    }


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """The number of different n-grams in some texts over the number of all.

    >>> distinct([[1, 2, 1, 2, 3]], 2)  # 12, 21, 12, 23
    0.75
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def sweep(model: GPT, tokenizer: Tokenizer, config: SampleConfig, first_lines: str) -> str:
    """Sample with each combination of settings; the samples go to a file as one table, the measures
    are returned as text."""
    path = Path(config.output_file or "sweep.md")
    lines = ["settings".ljust(40) + "entropy  distinct-1  distinct-2  log-probability"]
    rows = ["| settings | sample |", "|---|---|"]
    settings = [replace(config, **values) for values in parse_sweep(config.sweep)]
    raise_problems([problem for each in settings for problem in each.problems()])
    for each, values in zip(settings, parse_sweep(config.sweep), strict=True):
        name = " ".join(f"{key}={value:g}" for key, value in values.items())
        found = measure(model, tokenizer, each)
        lines.append(
            f"{name:40}{found['entropy']:7.3f}{found['distinct-1']:12.3f}"
            f"{found['distinct-2']:12.3f}{found['log-probability']:17.3f}"
        )
        for text in sample_text(model, tokenizer, each):
            cell = text.strip("\n").replace("|", "\\|").replace("\n", "<br>")
            rows.append(f"| {name} | {cell} |")
    with atomic_write(path) as file:
        file.write((first_lines + "\n".join(rows) + "\n").encode())
    return "\n".join([*lines, f"samples: {path}"])
