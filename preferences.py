"""Preferences, as JSON lines {"prompt": ..., "chosen": ..., "rejected": ...}: the chosen text goes
on better from the prompt than the rejected one."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from config import raise_problems
from generate import encode_prompt, end_tokens
from tokenizer import Tokenizer
from utils import read_text, whole_characters

KEYS = ("prompt", "chosen", "rejected")


def read_pairs(path: Path) -> list[dict[str, str]]:
    """The preferences of a .jsonl file: prompt, chosen and rejected in each line. Raises UserError,
    which names each bad line."""
    pairs, problems, seen = [], [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: no JSON ({error})")
            continue
        if found := pair_problems(pair):
            problems += [f"line {number}: {problem}" for problem in found]
            continue
        pair = {key: whole_characters(pair[key]) for key in KEYS}
        first = seen.setdefault(
            (pair["prompt"], *sorted((pair["chosen"], pair["rejected"]))), number
        )
        if first != number:
            problems.append(f"line {number}: the same texts as in line {first}")
        pairs.append(pair)
    if len(problems) > 5:
        problems = [*problems[:5], f"and {len(problems) - 5} more"]
    raise_problems([f"{path}: " + ", ".join(problems)] if problems else [])
    return pairs


def pair_problems(pair: Any) -> list[str]:
    """What is wrong with a line of preferences."""
    if not isinstance(pair, dict):
        return [f"no object with prompt, chosen and rejected but {json.dumps(pair)[:40]}"]
    found = [
        f"{key} is missing or no text" if not isinstance(pair.get(key), str) else f"{key} is empty"
        for key in KEYS
        if not isinstance(pair.get(key), str) or not pair[key].strip(" ")
    ]
    if not found and pair["chosen"] == pair["rejected"]:
        found = ["chosen and rejected are the same"]
    return found


def encode_pair(tokenizer: Tokenizer, pair: dict[str, str]) -> list[tuple[np.ndarray, int]]:
    """The chosen and the rejected text, each after the prompt, and ended where the tokenizer has a
    token for that; each with how many ids are the prompt's."""
    prompt = encode_prompt(tokenizer, pair["prompt"]).numpy()
    end = sorted(end_tokens(tokenizer))[:1]  # <EOS> before <|endoftext|>
    texts = (np.concatenate([tokenizer.encode(pair[key]), end]) for key in KEYS[1:])
    return [(np.concatenate([prompt, text]).astype(np.int64), len(prompt)) for text in texts]
