"""Text to token ids and back: characters, byte pairs, tiktoken's encodings.

Every tokenizer has vocab_size, specials (special token -> id), encode(text) -> ids, decode(ids) ->
text, decode_bytes(ids), unknown(text) -> the characters it cannot encode, and to_dict() for the
checkpoint. encode_iterable(texts) yields the ids of a stream of text, those of the joined text, in
constant memory. Text that looks like a special token is encoded as ordinary text, unless the token
is in `allowed_special`, a set of special tokens or "all". Byte-pair merges are learned in
corpus/bpe.py.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import regex  # re with Unicode classes such as \p{L}
import tiktoken

from system.settings import UserError

END_OF_TEXT = "<|endoftext|>"  # precedes each document of a corpus that has several
# For question/answer records: ids 0 to 3 in a new vocabulary; fine-tuning may add them elsewhere
QA_SPECIALS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")

# GPT-2's pre-tokenization (Radford et al. 2019): English contractions; letters, digits or other
# characters with the space before them; runs of whitespace. Merges stay within these pieces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_PIECE = 1 << 16  # characters; longer texts and pieces are divided
Texts = Iterable[str]


class Encoder(Protocol):
    """What all tokenizers share: special tokens, and text of any length."""

    specials: dict[str, int]
    pattern: str
    max_segment: int = MAX_PIECE  # the characters that encode_segment takes

    def encode_segment(self, text: str) -> np.ndarray: ...

    def encode_segments(self, texts: Texts, allowed_special: Texts) -> Iterator[np.ndarray]:
        """Yield the ids of each segment. Raises UserError if there is no such special token."""
        allowed = set(self.specials if allowed_special == "all" else allowed_special)
        if missing := sorted(allowed - self.specials.keys()):
            raise UserError(f"the tokenizer has no special token {', '.join(map(repr, missing))}")
        from system.segments import segments  # only for long texts and special tokens

        for text in segments(texts, self.pattern, allowed):
            special = text in allowed
            yield np.array([self.specials[text]]) if special else self.encode_segment(text)

    def encode(self, text: str, allowed_special: Texts = ()) -> np.ndarray:
        """The ids of a text, 1-D int64."""
        if len(text) <= self.max_segment and not allowed_special:
            return self.encode_segment(text)
        ids = self.encode_segments([text], allowed_special)
        return np.concatenate([np.zeros(0, dtype=np.int64), *ids])

    def encode_iterable(self, texts: Texts, allowed_special: Texts = ()) -> Iterator[int]:
        """Yield the ids of a stream of text: those of the joined text, in constant memory."""
        for ids in self.encode_segments(texts, allowed_special):
            yield from ids.tolist()


# --- characters


class CharTokenizer(Encoder):
    """One token per character: special tokens first, then the characters in sorted order.

    >>> tokenizer = CharTokenizer.train(["hello"])   # e h l o
    >>> tokenizer.encode("hole").tolist()
    [1, 3, 2, 0]
    """

    pattern = f"(?s:.{{1,{MAX_PIECE}}})"  # any division will do
    max_segment = sys.maxsize

    def __init__(self, chars: Sequence[str], specials: Sequence[str] = ()):
        self.chars = list(chars)
        self.points = np.array([ord(c) for c in chars], dtype=np.uint32)  # sorted, as the chars are
        self.specials = {text: i for i, text in enumerate(specials)}
        self.texts = [*specials, *chars]
        self.vocab_size = len(self.texts)

    @classmethod
    def train(cls, texts: Iterable[str], specials: Sequence[str] = ()) -> "CharTokenizer":
        """The tokenizer of all characters in some texts."""
        return cls(sorted(set().union(*map(set, texts))), specials)

    def encode_segment(self, text: str) -> np.ndarray:
        """The ids of a text's characters, (len(text),) int64. Unknown characters become <UNK>;
        raises UserError if the tokenizer does not have that token."""
        if unknown := self.unknown(text):
            names = ", ".join(map(repr, unknown[:10])) + ", ..." * (len(unknown) > 10)
            raise UserError(f"not among the tokenizer's {len(self.chars)} characters: {names}")
        # UTF-32 is the Unicode code points: this needs no Python loop
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = np.searchsorted(self.points, points)
        if "<UNK>" in self.specials:
            known = np.isin(points, self.points)
            return np.where(known, ids + len(self.specials), self.specials["<UNK>"])
        return ids + len(self.specials)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids."""
        return "".join(self.texts[i] for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of a sequence of ids, in UTF-8."""
        return self.decode(ids).encode("utf-8", "replace")

    def unknown(self, text: str) -> list[str]:
        """The characters of a text that have no id, sorted."""
        return [] if "<UNK>" in self.specials else sorted(set(text) - set(self.chars))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars, "specials": list(self.specials)}


# --- byte-pair encoding


class BPETokenizer(Encoder):
    """Byte-pair encoding (Sennrich et al. 2016): text is split into pieces, and within each piece
    neighbors are merged as long as together they are a token. Every byte is a token, so every text
    can be encoded.

    ranks: byte string -> id, lower ids are merged first; specials: special token -> id.
    """

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int], pattern: str):
        self.ranks, self.specials, self.pattern = ranks, specials, pattern
        self.vocab_size = max(*ranks.values(), *specials.values()) + 1

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The same tokenizer in compiled code."""
        ranks, specials = self.ranks, self.specials
        return tiktoken.Encoding(
            "tinyllm", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=specials
        )

    def encode_segment(self, text: str) -> np.ndarray:
        """The ids of a text, 1-D int64: those of encode_plain, a thousand times as fast."""
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text, by the algorithm itself: in each piece, merge the pair of neighbors
        whose token has the lowest rank, the leftmost first, until no pair is a token."""
        ids = []
        for piece in regex.findall(self.pattern, text):
            word = [bytes([b]) for b in piece.encode("utf-8")]
            while len(word) > 1:
                pairs = [a + b for a, b in pairwise(word)]
                best = min(pairs, key=lambda pair: self.ranks.get(pair, self.vocab_size))
                if best not in self.ranks:
                    break
                i = pairs.index(best)
                word[i : i + 2] = [best]
            ids += [self.ranks[token] for token in word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids; ids without a token are skipped."""
        return b"".join(self.token_bytes.get(i, b"") for i in ids)

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """id -> bytes, including special tokens."""
        specials = {i: text.encode() for text, i in self.specials.items()}
        return {i: token for token, i in self.ranks.items()} | specials

    def unknown(self, text: str) -> list[str]:
        return []  # every text can be encoded

    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as plain data, with byte strings in GPT-2's printable alphabet."""
        ranks = {to_printable(token): i for token, i in self.ranks.items()}
        return {"kind": "bpe", "pattern": self.pattern, "specials": self.specials, "ranks": ranks}


# GPT-2's character for each byte: printable ones are unchanged, the others are U+0100 and
# following, so that a space is \u0120.
OTHERS = [*range(ord("!")), *range(0x7F, 0xA1), 0xAD]
PRINTABLE = [chr(0x100 + OTHERS.index(b) if b in OTHERS else b) for b in range(256)]
PRINTABLE_TO_BYTE = {c: b for b, c in enumerate(PRINTABLE)}


def to_printable(token: bytes) -> str:
    """A byte string in GPT-2's printable alphabet."""
    return "".join(PRINTABLE[b] for b in token)


def from_printable(text: str) -> bytes:
    """The byte string that `to_printable` made printable."""
    return bytes(PRINTABLE_TO_BYTE[c] for c in text)


Tokenizer = CharTokenizer | BPETokenizer


def from_dict(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described."""
    if data.get("kind") == "char":
        if data["chars"] != sorted({*data["chars"]}):
            raise UserError("the characters are not sorted, or not different")
        return CharTokenizer(list(data["chars"]), list(data.get("specials", ())))
    if data.get("kind") == "bpe":
        ranks = {from_printable(text): int(i) for text, i in data["ranks"].items()}
        ids = [*ranks.values(), *data["specials"].values()]
        if len({*ids}) < len(ids) or min(ids) < 0 or {bytes([b]) for b in range(256)} - {*ranks}:
            raise UserError("byte pairs need a token for every byte, and different ids from 0 on")
        if regex.match(data["pattern"], ""):
            raise UserError("the pattern of pieces matches an empty one")
        return BPETokenizer(ranks, dict(data["specials"]), data["pattern"])
    raise UserError(f"unknown kind of tokenizer {data.get('kind')!r}")


def prompt_text(question: str, system: str = "") -> str:
    """The prompt of a question, up to where the answer begins; a system text precedes it."""
    first = f"System: {system.strip()}\n" if system.strip() else ""
    return f"{first}Question: {question.strip()}\nAnswer:"
