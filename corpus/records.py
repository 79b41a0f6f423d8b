"""Question/answer records and preference pairs, for fine-tuning.

Records are a JSON file, [{"question", "answer"}, ...]. Those with "held_out": true are for
validation, and other keys are ignored. A record is encoded as

    <BOS>Question: What is RoPE?\nAnswer: Positions as rotations.<EOS>

Preference pairs are a .jsonl file, one {"prompt", "chosen", "rejected"} per line.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from corpus.corpus import Corpus, make_tokenizer
from corpus.documents import build_corpus, special_id, split_documents
from corpus.text import file_info, json_text, note, read_text
from system.settings import UserError
from tokenizer import QA_SPECIALS, Tokenizer, prompt_text

Record = dict[str, Any]

RECORD_KEYS = ("question", "answer")
PAIR_KEYS = ("prompt", "chosen", "rejected")
MAX_PROBLEMS = 5  # shown; a file with a wrong key has one problem per record


# --- reading and validation


def raise_invalid(path: Path, problems: list[str]) -> None:
    """Raise a UserError that lists the first problems of a file, if there are any."""
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more"]
    if problems:
        raise UserError(f"{path}: {', '.join(problems)}")


def text_problems(record: Any, keys: tuple[str, ...], blank: str | None = None) -> list[str]:
    """What is invalid in an object that must have text in all keys; text of only `blank` characters
    (None: whitespace) is invalid too."""
    if not isinstance(record, dict):
        return [f"not an object with {', '.join(keys)}: {json.dumps(record)[:40]}"]
    found = []
    for key in keys:
        text = record.get(key)
        if not isinstance(text, str):
            found.append(f"{key} is missing or not text")
        elif not text.strip(blank):
            found.append(f"{key} is empty")
    return found


def read_records(path: Path) -> list[Record]:
    """The records of a .json file. Raises UserError, which gives the position of each invalid
    record."""
    try:
        records = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({error}): it must be one list, "
            '[{"question": "...", "answer": "..."}, ...], not one record per line'
        ) from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} must be a list of records, each with a question and an answer")
    problems = [
        f"record {number}: {problem}"
        for number, record in enumerate(records, 1)
        for problem in text_problems(record, RECORD_KEYS)
    ]
    raise_invalid(path, problems)
    return [record | {key: json_text(record[key]) for key in RECORD_KEYS} for record in records]


def read_pairs(path: Path) -> list[dict[str, str]]:
    """The preference pairs of a .jsonl file. Raises UserError, which gives the number of each
    invalid line."""
    pairs: list[dict[str, str]] = []
    problems: list[str] = []
    lines: dict[tuple[str, ...], int] = {}  # the texts of a pair -> the line that has them
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: invalid JSON ({error})")
            continue
        # A line end alone is a valid prompt or text: only spaces count as empty.
        found = text_problems(pair, PAIR_KEYS, blank=" ")
        if not found and pair["chosen"] == pair["rejected"]:
            found = ["chosen and rejected are the same"]
        if found:
            problems += [f"line {number}: {problem}" for problem in found]
            continue
        pair = {key: json_text(pair[key]) for key in PAIR_KEYS}
        # A pair with chosen and rejected exchanged is a contradiction, so their order is ignored.
        texts = (pair["prompt"], *sorted((pair["chosen"], pair["rejected"])))
        if (first := lines.setdefault(texts, number)) != number:
            problems.append(f"line {number}: the same texts as in line {first}")
        pairs.append(pair)
    raise_invalid(path, problems)
    return pairs


# --- records as text and as ids


def record_text(record: Record) -> str:
    """A record as text, without <BOS> and <EOS>."""
    return f"{prompt_text(record['question'])} {record['answer'].strip()}"


def encode_record(tokenizer: Tokenizer, record: Record) -> tuple[np.ndarray, int]:
    """The ids of a record (T,), with <BOS> and <EOS>, and the number of ids before the answer.

    Raises UserError if the tokenizer does not have these tokens.
    """
    bos, eos = (special_id(tokenizer, text) for text in ("<BOS>", "<EOS>"))
    prompt = tokenizer.encode(prompt_text(record["question"]))
    # A BPE piece starts at the space before the answer, so encoding both separately gives the same
    # ids as encoding the full text.
    answer = tokenizer.encode(f" {record['answer'].strip()}")
    return np.concatenate([[bos], prompt, answer, [eos]]), 1 + len(prompt)


# --- a corpus of records


def split_records(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The training and the validation records: those marked "held_out": true are for validation; if
    none or all are marked, they are split as documents are."""
    val = [record for record in records if record.get("held_out") is True]
    if not 0 < len(val) < len(records):
        return split_documents(records)
    return [record for record in records if record.get("held_out") is not True], val


def load_records(
    path: Path, kind: str, bpe_vocab_size: int, tokenizer: Tokenizer | None, hold_out: bool = True
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a file of question/answer records, each one a document."""
    info = file_info(path)
    records = read_records(path)
    splits = split_records(records) if hold_out else (records, records)
    if hold_out and tokenizer is None:  # a new run
        note(
            f"{len(splits[1])} of {len(records)} records are held out for validation: "
            "--no-hold_out trains on all"
        )
    texts = [[record_text(record) for record in split] for split in splits]
    tokenizer = tokenizer or make_tokenizer(kind, bpe_vocab_size, texts, QA_SPECIALS)
    ids = [[encode_record(tokenizer, record)[0] for record in split] for split in splits]
    return tokenizer, build_corpus(ids, texts, info, tokenizer.vocab_size, hold_out)
