r"""Reads conversations and preferences from files, in the formats that are in common use.

A file is a JSON list (.json), a table (.csv), or has one JSON object per line (all others). The
first record that has all fields of a format decides which format the file has. Other fields are
ignored, except "held_out": true marks a record for validation. As tokens, a conversation is a
sequence of turns, after a system text if there is one:

<BOS>System: Be brief.\nQuestion: Why?\nAnswer: So.<EOS><BOS>Question: How?\nAnswer: Well.<EOS>
"""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corpus.corpus import Corpus, make_tokenizer
from corpus.documents import build_corpus, json_text, parse_json, special_id, split_documents
from corpus.text import file_info, note, read_text
from system.settings import UserError
from tokenizer import QA_SPECIALS, Tokenizer, prompt_text

Fields = tuple[str, ...]  # of a format

QUESTIONS: tuple[Fields, ...] = (
    ("question", "answer"),
    ("messages",),  # OpenAI's: [{"role": "user", "content": "..."}, ...]
    ("conversations",),  # ShareGPT's: [{"from": "human", "value": "..."}, ...]
    ("instruction", "input", "output"),  # Alpaca's; the input may be missing or empty
    ("prompt", "completion"),
)
PREFERENCES = (("prompt", "chosen", "rejected"), ("messages", "chosen", "rejected"))
LISTS = ("messages", "conversations")  # the other fields are texts
ANSWERS = ("answer", "output", "completion", "chosen", "rejected")  # the other texts are the user's
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of OpenAI's roles
MAX_PROBLEMS = 5  # shown; a file with a wrong key has one problem per record

Turn = tuple[str, str]  # a question and its answer


class Record(NamedTuple):
    """A conversation, or a preference: a conversation with another answer to its last question."""

    turns: list[Turn]
    system: str = ""
    held_out: bool = False  # for validation
    rejected: str = ""  # of a preference: the answer that is worse than the one in `turns`
    is_text: bool = False  # of a preference: its prompt is a text, which may be no question


class Example(NamedTuple):
    """What is trained as one row of a batch."""

    ids: np.ndarray  # (T,)
    scored: np.ndarray  # (T,) bool: the ids that count in the loss, those of answers


def record_text(record: Record) -> str:
    """A record as text, without <BOS> and <EOS>: what the tokenizer must be able to encode."""
    if record.is_text:
        return "".join([*record.turns[0], record.rejected])
    texts = [
        f"{prompt_text(question, '' if i else record.system)} {answer.strip()}"
        for i, (question, answer) in enumerate(record.turns)
    ]
    return "\n".join([*texts, record.rejected] if record.rejected else texts)


def encode_turn(tokenizer: Tokenizer, question: str, answer: str, system: str = "") -> Example:
    """A question and its answer, with <BOS> and <EOS>. Raises UserError if they do not exist."""
    bos, eos = (special_id(tokenizer, text) for text in ("<BOS>", "<EOS>"))
    prompt = np.append(bos, tokenizer.encode(prompt_text(question, system)))
    # A BPE piece starts at the space before the answer, so encoding both separately gives the same
    # ids as encoding the full text.
    reply = np.append(tokenizer.encode(f" {answer.strip()}"), eos)
    scored = np.arange(len(prompt) + len(reply)) >= len(prompt)
    return Example(np.concatenate([prompt, reply]), scored)


def encode_turns(tokenizer: Tokenizer, turns: list[Turn], system: str = "") -> list[Example]:
    """The turns of a conversation, the first with the system text."""
    return [encode_turn(tokenizer, *turn, "" if i else system) for i, turn in enumerate(turns)]


def join_turns(turns: Iterable[Example]) -> Example:
    ids, scored = zip(*turns, strict=True)
    return Example(np.concatenate(ids), np.concatenate(scored))


def split_records(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The training and the validation records: those marked as held out are for validation; if none
    or all are marked, they are split as documents are."""
    val = [record for record in records if record.held_out]
    if not 0 < len(val) < len(records):
        return split_documents(records)
    return [record for record in records if not record.held_out], val


def read_objects(path: Path, encoding: str) -> list[tuple[str, Any]]:
    """The records of a file as they are, each with its position; instead of a line that is not
    JSON, the error. Raises UserError if the file is not a list or a table."""
    text, suffix = read_text(path, encoding), path.suffix.lower()
    if suffix not in (".json", ".csv"):
        lines = enumerate(text.split("\n"), 1)
        return [(f"line {number}", parse_json(line)) for number, line in lines if line.strip()]
    try:
        rows = csv.DictReader(io.StringIO(text), strict=True)
        records = list(rows) if suffix == ".csv" else parse_json(text)
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error})") from None
    if not isinstance(records, list):
        problem = f" ({records})" * isinstance(records, ValueError)
        advice = "write [{...}, {...}], or one record per line in a .jsonl file"
        raise UserError(f"{path} is not a list of records{problem}: {advice}")
    return [(f"record {number}", record) for number, record in enumerate(records, 1)]


def find_format(path: Path, records: list[tuple[str, Any]], formats: tuple[Fields, ...]) -> Fields:
    """The fields of the format that a file has. Raises UserError if it has none of them."""
    found = [record.keys() for _, record in records if isinstance(record, dict)]
    for keys in found:
        for fields in formats:
            if keys >= {*fields} - {"input"}:
                return fields
    if records and not found:
        return formats[0]  # for the problems of each record
    names = ", ".join(map(str, found[0]))[:100] if found else "none (no records)"
    known = " | ".join(", ".join(fields) for fields in formats)
    texts = "; a text is .txt, or .jsonl with a field text (prepare.py --text_field NAME: another)"
    problem = f"unknown format: the fields are {names}, and should be {known}"
    raise UserError(f"{path}: {problem}{texts * (formats is QUESTIONS)}")


def messages_in(record: dict[str, Any], field: str, blank: str | None) -> list[tuple[str, str]]:
    """The role and the text of each message in a field: a text, a message, or a list of messages.
    Raises ValueError for others, and for text of only `blank` characters (None: whitespace)."""
    value = record.get(field)
    if isinstance(value, str) and field not in LISTS:
        value = {"role": "assistant" if field in ANSWERS else "user", "content": value}
    found = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict):
            raise ValueError(f"{field} is missing or not {'a list' if field in LISTS else 'text'}")
        role = message.get("role", message.get("from"))
        role, text = ROLES.get(str(role), role), message.get("content", message.get("value"))
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise ValueError(f"{field} has no role or no text in {json.dumps(message)[:60]}")
        if not text.strip(blank) and role != "system":
            raise ValueError(f"{field} is empty")
        found.append((role, json_text(text)))
    return found


def parse_record(record: Any, fields: Fields, blank: str | None) -> Record:
    """A record of a file, in the format with these fields. Raises ValueError if it is invalid."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"not an object with {', '.join(fields)}: {json.dumps(record)[:40]}")
    if "input" in fields and str(record.get("input") or "").strip():  # continues the question
        parts = [text for field in fields[:2] for _, text in messages_in(record, field, blank)]
        record = record | {"instruction": "\n".join(parts)}
    messages = {field: messages_in(record, field, blank) for field in fields if field != "input"}
    rejected = messages.pop("rejected", [])
    every = [message for listed in messages.values() for message in listed]
    system = every.pop(0)[1] if every and every[0][0] == "system" else ""
    roles, texts = [role for role, _ in every], [text for _, text in every]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        shown = ", ".join(roles)[:60] or "none"
        raise ValueError(f"its roles are {shown}, not (system,) user, assistant, ..., assistant")
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    held_out = str(record.get("held_out")).lower() == "true"  # a text in .csv
    if "rejected" not in fields:
        return Record(turns, system, held_out)
    if [role for role, _ in messages["chosen"] + rejected] != ["assistant"] * 2:
        raise ValueError("chosen and rejected must be one answer each")
    if texts[-1] == rejected[0][1]:
        raise ValueError("chosen and rejected are the same")
    return Record(turns, system, held_out, rejected[0][1], isinstance(record[fields[0]], str))


def read_records(
    path: Path, preferences: bool = False, skip_bad: bool = False, encoding: str = "utf-8"
) -> list[Record]:
    """The conversations or preferences of a file. Those that cannot be used are skipped and counted
    with skip_bad, if there are others; else raises UserError with their positions."""
    objects = read_objects(path, encoding)
    fields = find_format(path, objects, PREFERENCES if preferences else QUESTIONS)
    blank = " " if preferences else None  # a line end alone is a valid text of a preference
    records: list[Record] = []
    problems: list[str] = []
    positions: dict[tuple[Any, ...], str] = {}  # the texts of a preference -> where it is
    for position, value in objects:
        try:
            record = parse_record(value, fields, blank)
            # With chosen and rejected exchanged it is a contradiction, so their order is ignored.
            *history, (question, chosen) = record.turns
            texts = (record.system, *history, question, *sorted((chosen, record.rejected)))
            if preferences and (first := positions.setdefault(texts, position)) != position:
                raise ValueError(f"the same texts as in {first}")
            records.append(record)
        except ValueError as error:
            problems.append(f"{position}: {error}")
    more = f", and {len(problems) - MAX_PROBLEMS} more" * (len(problems) > MAX_PROBLEMS)
    shown = ", ".join(problems[:MAX_PROBLEMS]) + more
    if problems and not (skip_bad and records):
        advice = "; --skip_bad of train.py and finetune.py leaves them out" * bool(records)
        raise UserError(f"{path}: {shown}{advice}")
    if problems:
        note(f"{path}: {len(problems)} of {len(objects)} records are invalid, skipped: {shown}")
    return records


def load_records(
    path: Path,
    kind: str,
    bpe_vocab_size: int,
    tokenizer: Tokenizer | None,
    hold_out: bool = True,
    skip_bad: bool = False,
    encoding: str = "utf-8",
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a file of conversations, each one a document."""
    info, records = file_info(path), read_records(path, False, skip_bad, encoding)
    splits = split_records(records) if hold_out else (records, records)
    if hold_out and tokenizer is None:  # a new run
        note(
            f"{len(splits[1])} of {len(records)} records are held out for validation: "
            "--no-hold_out trains on all"
        )
    texts = [[record_text(record) for record in split] for split in splits]
    tokenizer = tokenizer or make_tokenizer(kind, bpe_vocab_size, texts, QA_SPECIALS)
    ids = [[join_turns(encode_turns(tokenizer, r.turns, r.system)).ids for r in s] for s in splits]
    info["questions"] = len(records)
    corpus = build_corpus(ids, texts, info, tokenizer.vocab_size, hold_out)
    if any(len(record.turns) > 1 for record in records):
        corpus.separator = None  # <BOS> precedes each turn, so --doc_mask would separate them
    return tokenizer, corpus
