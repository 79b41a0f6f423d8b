"""Question/answer records, as JSON: [{"id", "category", "question", "answer"}, ...], of which the
last two are required. A record becomes

    <BOS>Question: What is RoPE?\nAnswer: Positions as rotations.<EOS>
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError, raise_problems
from tokenizer import Tokenizer
from utils import whole_characters


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file. Raises UserError, which names each bad record by its position."""
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in UTF-8: {error}") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} must hold a list of records with a question and an answer each")
    problems = [f"record {i}: {p}" for i, r in enumerate(records, 1) for p in record_problems(r)]
    if len(problems) > 5:
        problems = [*problems[:5], f"and {len(problems) - 5} more"]
    raise_problems([f"{path}: " + ", ".join(problems)] if problems else [])
    texts = ("question", "answer")
    return [record | {key: whole_characters(record[key]) for key in texts} for record in records]


def record_problems(record: Any) -> list[str]:
    """What is wrong with a record."""
    if not isinstance(record, dict):
        return [f"it is no object but {json.dumps(record)[:40]}"]
    texts = {key: record.get(key) for key in ("question", "answer")}
    return [
        f"{key} is missing or no text" if not isinstance(text, str) else f"{key} is empty"
        for key, text in texts.items()
        if not isinstance(text, str) or not text.strip()
    ]


def prompt_text(question: str) -> str:
    """What stands before the answer; so a model is asked."""
    return f"Question: {question.strip()}\nAnswer:"


def record_text(record: dict[str, Any]) -> str:
    """A record as text."""
    return f"{prompt_text(record['question'])} {record['answer'].strip()}"


def encode_record(tokenizer: Tokenizer, record: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The ids of a record (T,), with <BOS> and <EOS>, and how many of them come before the answer.

    Raises UserError where the tokenizer has no such tokens.
    """
    bos, eos = (special_id(tokenizer, text) for text in ("<BOS>", "<EOS>"))
    prompt = tokenizer.encode(prompt_text(record["question"]))
    # The answer begins with its space, where a new piece begins anyway.
    answer = tokenizer.encode(f" {record['answer'].strip()}")
    return np.concatenate([[bos], prompt, answer, [eos]]), 1 + len(prompt)


def special_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a special token. Raises UserError where the tokenizer does not have it."""
    if text not in tokenizer.specials:
        raise UserError(f"the tokenizer has no {text}: questions need --tokenizer bpe or char")
    return tokenizer.specials[text]


def qa_batch(examples: Sequence[tuple[np.ndarray, int]], pad: int) -> tuple[Tensor, Tensor]:
    """Records from `encode_record` as a batch, x and y (B, T), padded at the right to the longest.

    y[b, t] is the token after x[b, t], and -100, which the loss leaves out, over the question and
    the padding: the model learns to answer and to end, not to ask. Causal attention looks back
    only, so the padding needs no mask.
    """
    T = max(len(ids) for ids, _ in examples) - 1
    x = torch.full((len(examples), T), pad)
    y = torch.full((len(examples), T), -100)
    for b, (ids, n_prompt) in enumerate(examples):
        tokens = torch.from_numpy(ids.astype(np.int64))
        x[b, : len(ids) - 1] = tokens[:-1]
        y[b, n_prompt - 1 : len(ids) - 1] = tokens[n_prompt:]
    return x, y
