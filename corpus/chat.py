r"""Conversations as token ids: turns of question and answer, after a system text if there is one.

<BOS>System: Be brief.\nQuestion: Why?\nAnswer: So.<EOS><BOS>Question: How?\nAnswer: Well.<EOS>
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from corpus.documents import special_id, split_documents
from tokenizer import Tokenizer, prompt_text

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
