"""Text to token ids and back: characters, byte pairs, tiktoken's encodings.

Every tokenizer has vocab_size, specials (special token -> id), encode(text) -> ids, decode(ids) ->
text, decode_bytes(ids), unknown(text) -> the characters it cannot encode, and to_dict() for the
checkpoint. Text that looks like a special token is encoded as ordinary text: `encode` never returns
the id of a special token. Byte-pair merges are learned in corpus/bpe.py.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import regex  # re with Unicode classes such as \p{L}
import tiktoken

from config import UserError

END_OF_TEXT = "<|endoftext|>"  # precedes each document of a corpus that has several
QA_SPECIALS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")  # ids 0 to 3, for question/answer records

# GPT-2's pre-tokenization (Radford et al. 2019): English contractions; letters, digits or other
# characters with the space before them; runs of whitespace. Merges stay within these pieces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# --- characters


class CharTokenizer:
    """One token per character: special tokens first, then the characters in sorted order.

    >>> tokenizer = CharTokenizer.train(["hello"])   # e h l o
    >>> tokenizer.encode("hole").tolist()
    [1, 3, 2, 0]
    """

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

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text's characters, (len(text),) int64. Unknown characters become <UNK>;
        raises UserError if the tokenizer does not have that token."""
        if unknown := self.unknown(text):
            names = ", ".join(map(repr, unknown[:10])) + ", ..." * (len(unknown) > 10)
            raise UserError(f"not among the tokenizer's {len(self.chars)} characters: {names}")
        points = code_points(text)
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
        """The tokenizer as plain data."""
        return {"kind": "char", "chars": self.chars, "specials": list(self.specials)}


def code_points(text: str) -> np.ndarray:
    """The Unicode code points of a text, (len(text),) uint32, without a Python loop."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


# --- byte-pair encoding


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016): text is split into pieces, and within each piece
    neighboring tokens are merged as long as together they are a token. Every byte is a token, so
    every text can be encoded.

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

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, 1-D int64: those of encode_plain, a thousand times as fast."""
        encode = self.encoding.encode_to_numpy
        ids = [encode(chunk, disallowed_special=()) for chunk in chunks(text)]
        return np.concatenate(ids).astype(np.int64) if ids else np.zeros(0, dtype=np.int64)

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
        """The characters that cannot be encoded: none."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as plain data, with byte strings in GPT-2's printable alphabet."""
        ranks = {to_printable(token): i for token, i in self.ranks.items()}
        return {"kind": "bpe", "pattern": self.pattern, "specials": self.specials, "ranks": ranks}


def chunks(text: str, size: int = 1 << 14) -> Iterator[str]:
    """A text in chunks of at most `size` characters. A chunk ends before a space that follows a
    word, where every pattern starts a new piece, so the tokens are those of the full text. Without
    such a space it ends after `size` characters, and the tokens may differ.

    tiktoken's regex engine fails on runs of a million spaces, and its time is quadratic in the
    length of a piece.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        while end > start and (text[end] != " " or text[end - 1].isspace()):
            end -= 1
        end = end if end > start else start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def printable_alphabet() -> list[str]:
    """GPT-2's character for each byte: printable ones are unchanged, the others are U+0100 and
    following, so that a space is \u0120."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


PRINTABLE = printable_alphabet()
PRINTABLE_TO_BYTE = {c: b for b, c in enumerate(PRINTABLE)}


def to_printable(token: bytes) -> str:
    """A byte string in GPT-2's printable alphabet."""
    return "".join(PRINTABLE[b] for b in token)


def from_printable(text: str) -> bytes:
    """The byte string that `to_printable` made printable."""
    return bytes(PRINTABLE_TO_BYTE[c] for c in text)


# --- tiktoken's encodings


def from_tiktoken(name: str, seconds: float = 20) -> BPETokenizer:
    """One of the encodings of OpenAI's models, which tiktoken downloads once and caches.

    Raises UserError if it cannot be downloaded within this time.
    """
    result: list[tiktoken.Encoding | Exception] = []

    def download() -> None:
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:
            result.append(error)

    # tiktoken waits for a silent network without a timeout, so it runs in a separate thread.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(seconds)
    encoding = result[0] if result else None
    if not isinstance(encoding, tiktoken.Encoding):
        reason = type(encoding).__name__ if result else f"no answer within {seconds:g} s"
        raise UserError(
            f"the encoding {name} could not be downloaded ({reason}): try again with a network, or "
            "set TIKTOKEN_CACHE_DIR to a cache folder of tiktoken from another machine, or train a "
            "tokenizer on your text with --tokenizer bpe"
        )
    return BPETokenizer(encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str)


Tokenizer = CharTokenizer | BPETokenizer


def from_dict(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described."""
    if data.get("kind") == "char":
        return CharTokenizer(list(data["chars"]), list(data.get("specials", ())))
    if data.get("kind") == "bpe":
        ranks = {from_printable(text): int(i) for text, i in data["ranks"].items()}
        return BPETokenizer(ranks, dict(data["specials"]), data["pattern"])
    raise UserError(f"unknown kind of tokenizer {data.get('kind')!r}")


def to_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as a JSON file that people can read."""
    return json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=0).encode()
