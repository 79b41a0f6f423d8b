"""Explore a trained model: chat with it, see its token probabilities, compare sampling settings.

    python explore.py chat
    python explore.py probs checkpoints/best.pt --max_tokens 20
    python explore.py sweep --settings "temperature=0.5,0.8,1.1 top_k=20,40"

chat continues a conversation; a model trained on questions answers them, as --system TEXT says.
probs prints the most likely tokens at each step. sweep samples with every combination of
--settings, and prints the samples and their statistics; --output_file writes them to a file too.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any
from system.start import run

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import SampleConfig
from corpus.records import Turn, encode_turns
from generate import adjust_logits, generate, load_for_sampling, sampling_settings, stream_texts
from model import GPT
from sampling.checks import sampling_problems
from sampling.output import format_table, header, write_text
from sampling.text import (
    TextWriter,
    answers_questions,
    decode_prompt,
    encode_prompt,
    end_tokens,
    model_prompt,
    warn_if_cut,
)
from system.command_line import parse_args
from system.settings import UserError, setting
from tokenizer import Tokenizer
from viz.internals import logit_lens

# The actions, and the flags that each of them would ignore.
UNUSED_FLAGS = {
    "chat": "settings lens prompt prompt_file num_samples beams stream output_file",
    "probs": "settings system num_samples beams stop stream output_file",
    "sweep": "lens system beams stream",
}
SWEPT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
N_SHOWN = 5  # probabilities per step of probs


@dataclass
class ExploreConfig:
    action: str = setting("", "first argument", choices=tuple(UNUSED_FLAGS), positional=True)
    settings: str = setting("temperature=0.5,0.8,1.1", "sweep: the values to compare")
    lens: bool = setting(False, "probs: also print what each layer would predict")
    system: str = setting("", "chat: text before the first question, which says how to answer")


# --- chat


def chat_prompt(tokenizer: Tokenizer, turns: list[Turn], system: str, size: int) -> list[int]:
    """The ids of a conversation, up to where the answer to its last question begins; without its
    oldest turns, as far as there would be more than `size` ids."""
    for first in range(len(turns)):
        *past, last = encode_turns(tokenizer, turns[first:], system)
        ids = [*chain(*(turn.ids for turn in past)), *last.ids[~last.scored]]
        if len(ids) <= size:
            break
    return ids


def known_text(tokenizer: Tokenizer, text: str) -> str:
    """A text without the characters that the tokenizer does not know, with a warning."""
    return decode_prompt(tokenizer, encode_prompt(tokenizer, text, qa=False))


def chat(model: GPT, tokenizer: Tokenizer, config: SampleConfig, system: str = "") -> None:
    """Talk with a model until an empty line or Ctrl-D. A model fine-tuned on questions gets each
    line as a question, and the system text before the first one; any other model continues the
    line. The conversation stays in the context until /new; if questions and answers fill more than
    the window, less up to a quarter of it for the next answer, the oldest turns are left out."""
    print("an empty line ends the chat, /new starts a new one")
    asked, size = config.qa and answers_questions(tokenizer), model.config.block_size
    system = known_text(tokenizer, system)
    context: list[int] = []
    turns: list[Turn] = []
    while line := read_user_line():
        if line == "/new":
            context, turns = [], []
            continue
        if asked:
            line, room = known_text(tokenizer, line), min(config.max_new_tokens, size // 4)
            context = chat_prompt(tokenizer, [*turns, (line, "")], system, size - room)
        else:
            context += encode_prompt(tokenizer, line, qa=False).tolist()
        prompt = torch.tensor(context, device=model.tok.weight.device)
        warn_if_cut("the conversation", len(prompt), size)
        reply = ""
        for (piece,) in stream_texts(model, tokenizer, config, prompt):
            reply += piece
            print(piece, end="", flush=True)
        print()
        unknown = tokenizer.unknown(reply)  # a special token is text now, such as <PAD>
        reply = "".join(c for c in reply if c not in unknown)
        turns.append((line, reply))
        context += tokenizer.encode(reply).tolist()


def read_user_line() -> str:
    """A line from the terminal without surrounding spaces; empty at the end of the input."""
    if sys.stdin is None:
        raise UserError("explore.py chat reads your messages from standard input, which is closed")
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


# --- token probabilities


def token_probabilities(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, lens: bool = False
) -> Iterator[str]:
    """Generate one sample; yields a line per token: the sampled token, and the most likely tokens
    with their probabilities under the sampling settings."""
    prompt = model_prompt(model, tokenizer, config)
    text = prompt.tolist()
    for step in generate(model, prompt, config, end_tokens(tokenizer)):
        text += step.ids.tolist()
        probs, ids = adjust_logits(step.logits, **sampling_settings(config))  # (1, V) both
        most_likely = zip(probs[0, :N_SHOWN].tolist(), ids[0, :N_SHOWN].tolist(), strict=True)
        shown = "  ".join(f"{tokenizer.decode([i])!r} {p:.3f}" for p, i in most_likely if p)
        yield f"{tokenizer.decode(step.ids.tolist())!r:14} from  {shown}"
    if lens:
        yield from lens_table(model, tokenizer, prompt.new_tensor(text), len(text) - len(prompt))


def lens_table(model: GPT, tokenizer: Tokenizer, text: Tensor, n: int) -> Iterator[str]:
    """The last n tokens of a text (T,) in one window, and what each layer would have predicted."""
    window = text[-model.config.block_size - 1 :]
    values, tokens = logit_lens(model, window[:-1]).max(dim=-1)  # (n_layer, T) both
    yield "\ntoken".ljust(16) + " ".join(f"after layer {i:<3}" for i in range(len(values))).rstrip()
    for at in range(-min(n, len(window) - 1), 0):
        pairs = zip(tokens[:, at].tolist(), values[:, at].tolist(), strict=True)
        cells = "".join(f"{f'{tokenizer.decode([i])!r} {p:.3f}':16}" for i, p in pairs)
        yield f"{tokenizer.decode([int(window[at])])!r:14} {cells}".rstrip()


# --- sweeps


def parse_sweep(text: str) -> list[dict[str, Any]]:
    """All combinations of the settings of a sweep. Raises UserError if the text is invalid.

    >>> parse_sweep("temperature=0.5,1 top_k=20")
    [{'temperature': 0.5, 'top_k': 20}, {'temperature': 1.0, 'top_k': 20}]
    """
    lists: dict[str, list[str]] = {}
    for word in text.split() or [""]:
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in SWEPT or name in lists:
            names = ", ".join(SWEPT)
            raise UserError(f"{word!r} is not NAME=A,B,... with one of {names}, each once")
        lists[name] = [f"--{name}={value}" for value in values.split(",")]
    configs = [parse_args(SampleConfig, list(flags), "") for flags in product(*lists.values())]
    return [{name: getattr(config, name) for name in lists} for config in configs]


def sample_with_statistics(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig
) -> tuple[list[str], dict[str, float]]:
    """The texts of num_samples samples, and statistics of their tokens:

    entropy: mean entropy, in nats, of the distributions that the tokens were sampled from
    distinct-1, distinct-2: distinct tokens and token pairs, as a share of all (Li et al. 2016)
    log-probability: mean log-probability of the tokens under the model as it is: at temperature 1,
    without top-k, repetition penalty etc.
    """
    prompt = model_prompt(model, tokenizer, config)
    entropies: list[float] = []
    log_probs: list[float] = []
    ids: list[list[int]] = [[] for _ in range(config.num_samples)]
    writers = [TextWriter(tokenizer, config.stop.split("|")) for _ in ids]
    texts = [decode_prompt(tokenizer, prompt)] * len(ids)
    steps = generate(model, prompt, config, end_tokens(tokenizer))
    bar = tqdm(steps, total=config.max_new_tokens, unit="token", leave=False, disable=None)
    for step in bar:
        probs, _ = adjust_logits(step.logits, **sampling_settings(config))
        entropy = -torch.xlogy(probs, probs).sum(dim=-1)  # (B,)
        losses = F.cross_entropy(step.model_logits, step.ids, reduction="none", ignore_index=-1)
        for i, token in enumerate(step.ids.tolist()):
            if not writers[i].done:
                ids[i].append(token)
                entropies.append(entropy[i].item())
                log_probs.append(-losses[i].item())
                texts[i] += writers[i].add(token)
        if all(writer.done for writer in writers):
            break
    return [text + writer.finish() for text, writer in zip(texts, writers, strict=True)], {
        "entropy": sum(entropies) / len(entropies),
        "distinct-1": distinct_ngrams(ids, 1),
        "distinct-2": distinct_ngrams(ids, 2),
        "log-probability": sum(log_probs) / len(log_probs),
    }


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """The number of different n-grams in the texts, as a share of all their n-grams.

    >>> distinct_ngrams([[1, 2, 1, 2, 3]], 2)  # 12, 21, 12, 23
    0.75
    """
    ngrams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def run_sweep(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, sweep: str, first_lines: str
) -> Iterator[str]:
    """Sample with each combination of settings. Yields the samples, and then the lines of a table
    of their statistics; --output_file gets both, below `first_lines`."""
    lines, rows = [], []
    for values in parse_sweep(sweep):
        name = " ".join(f"{key}={value:g}" for key, value in values.items())
        samples, found = sample_with_statistics(model, tokenizer, replace(config, **values))
        for sample in samples:
            lines.append(f"--- {name}\n{sample}\n")
            yield lines[-1]
        rows.append({"settings": name} | {key: f"{value:.3f}" for key, value in found.items()})
    table = format_table(rows)
    yield table
    if config.output_file:
        write_text(Path(config.output_file), first_lines + "\n".join([*lines, table]) + "\n")
        yield f"samples: {config.output_file}"


# --- command line


def explore_problems(explore: ExploreConfig, config: SampleConfig) -> list[str]:
    """Flags that the action would ignore, invalid sweeps, and what is invalid in generate.py."""
    found = sampling_problems(config)
    given = vars(config) | vars(explore)
    defaults = vars(SampleConfig()) | vars(ExploreConfig())
    unused = UNUSED_FLAGS.get(explore.action, "").split()
    if explore.action == "sweep":
        try:
            unused += parse_sweep(explore.settings)[0]
        except UserError as error:
            found.append(f"--settings: {error}")
    ignored = [f"--{name}" for name in unused if given[name] != defaults[name]]
    if ignored:
        found.append(f"{explore.action} does not use {', '.join(ignored)} here: leave it out")
    return found


def main(argv: list[str] | None = None) -> int:
    explore, config = parse_args(
        (ExploreConfig, SampleConfig), argv, __doc__, check=explore_problems
    )
    model, tokenizer, state = load_for_sampling(config, chat=explore.action == "chat")
    if explore.action == "chat":
        if explore.system and not (config.qa and answers_questions(tokenizer)):
            raise UserError("--system is for a model that answers questions: leave it out")
        chat(model, tokenizer, config, explore.system)
        return 0
    if explore.action == "probs":
        lines = token_probabilities(model, tokenizer, config, explore.lens)
    else:
        command = f"python explore.py sweep --settings={shlex.quote(explore.settings)}"
        first_lines = header(config, state, command)
        lines = run_sweep(model, tokenizer, config, explore.settings, first_lines)
    for line in lines:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    run(main)
