"""Text to token ids and back. A tokenizer travels inside the checkpoint, as the dict that `to_dict`
gives.

Every tokenizer has vocab_size, encode(text) -> ids, decode(ids) -> text, unknown(text) -> what it
cannot encode.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from config import UserError


class CharTokenizer:
    """One token per character; ids follow the sorted order of the characters.

    >>> tokenizer = CharTokenizer.train("hello")   # e h l o
    >>> tokenizer.encode("hole").tolist()
    [1, 3, 2, 0]
    """

    def __init__(self, chars: list[str]):
        self.chars = chars
        self.vocab_size = len(chars)
        self.points = np.array(
            [ord(c) for c in chars], dtype=np.uint32
        )  # sorted, as the characters are

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The tokenizer of all the characters in a text."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text's characters, (len(text),) int64. Raises UserError where a character is
        not known."""
        if unknown := self.unknown(text):
            raise UserError(f"not among the {self.vocab_size} characters known: {unknown}")
        return np.searchsorted(self.points, code_points(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids."""
        return "".join(self.chars[i] for i in ids)

    def unknown(self, text: str) -> list[str]:
        """The characters of a text that have no id, sorted."""
        return sorted(set(text) - set(self.chars))

    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as plain data, for a checkpoint."""
        return {"kind": "char", "chars": self.chars}


def code_points(text: str) -> np.ndarray:
    """The Unicode numbers of a text's characters, (len(text),) uint32, without a Python loop."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def from_dict(data: dict[str, Any]) -> CharTokenizer:
    """The tokenizer that `to_dict` wrote."""
    if data.get("kind") != "char":
        raise UserError(f"unknown kind of tokenizer {data.get('kind')!r}")
    return CharTokenizer(list(data["chars"]))
