"""Text to token ids and back: characters, byte-pair encoding trained here, tiktoken's encodings.

Every tokenizer has vocab_size, specials (text -> id of the special tokens), encode(text) -> ids,
decode(ids) -> text, unknown(text) -> what it cannot encode, and travels inside the checkpoint as
the dict that `to_dict` gives. Text that happens to read like a special token stays text:
`encode` never makes a special token, who wants one takes its id from `specials`.
"""

import heapq
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import regex  # the standard library's re with Unicode classes such as \p{L}; tiktoken brings it
import tiktoken
from tqdm import tqdm

from config import UserError

END_OF_TEXT = "<|endoftext|>"  # stands before each document of a corpus that has several
QA_SPECIALS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")  # ids 0 to 3, in tokenizers for questions

# What may become one token, as GPT-2 has it (Radford et al. 2019): English contractions, then runs
# of letters, digits or others, with the space before them; at last, spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# --- characters


class CharTokenizer:
    """One token per character: special tokens first, then the characters in their order.

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
        """The tokenizer of all the characters in some texts."""
        return cls(sorted(set().union(*map(set, texts))), specials)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text's characters, (len(text),) int64. An unknown character becomes <UNK>;
        raises UserError where there is no such token."""
        if unknown := self.unknown(text):
            names = ", ".join(map(repr, unknown[:10])) + ", ..." * (len(unknown) > 10)
            raise UserError(f"not among the {len(self.chars)} characters known: {names}")
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
        """The tokenizer as plain data, for a checkpoint."""
        return {"kind": "char", "chars": self.chars, "specials": list(self.specials)}


def code_points(text: str) -> np.ndarray:
    """The Unicode numbers of a text's characters, (len(text),) uint32, without a Python loop."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


# --- byte-pair encoding: training


def count_pieces(texts: Iterable[str], pattern: str = GPT2_PATTERN) -> Counter[str]:
    """How often each piece stands in the texts; merges never cross from one piece to the next."""
    split = regex.compile(pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        for part in parts(text):
            counts.update(split.findall(part))
    return counts


def learn_merges(counts: Counter[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The byte pairs to merge, in the order in which they were learned (Sennrich et al. 2016).

    Each piece begins as its single bytes. Count the pairs of neighbours in all pieces; make the
    most frequent pair one token, everywhere, left to right; repeat, n_merges times or until no
    piece has two tokens. Of pairs that are equally frequent, the lexicographically greater pair of
    byte strings goes first, so that the result does not depend on the order of the corpus.

    An example: in "low lower lowest" both l+o and o+w stand 3 times, and o+w is the greater. Then
    l+ow, 3 times; of low+e and the space + low, 2 times each, low+e is the greater; and so on:

    >>> learn_merges(count_pieces(["low lower lowest"]), 5)
    [(b'o', b'w'), (b'l', b'ow'), (b'low', b'e'), (b' ', b'lowe'), (b's', b't')]

    Counting everything anew after each merge would be the same, but slow: only the pieces that held
    the pair are touched, and only their pairs counted down and up again. The most frequent pair is
    on top of a heap, whose entries may be out of date: such a one is put right when it comes up.
    """
    tokens = [bytes([b]) for b in range(256)]  # id -> bytes
    ids = {token: i for i, token in enumerate(tokens)}
    # The heap gives the smallest entry first, so a greater byte string needs a smaller key: each
    # byte b as the character 255 - b, and an end that is above all, for "ab" comes before "abc".
    turned = bytes(range(255, -1, -1))
    keys = [token.translate(turned).decode("latin-1") + "\u0100" for token in tokens]

    words = [(list(piece.encode("utf-8", "replace")), n) for piece, n in counts.items()]
    pair_counts: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # pair -> words it stands in
    for i, (word, n) in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += n
            where[pair].add(i)

    def entry(pair: tuple[int, int]) -> tuple[int, str, str, tuple[int, int]]:
        return -pair_counts[pair], keys[pair[0]], keys[pair[1]], pair

    heap = [entry(pair) for pair in pair_counts]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    bar = tqdm(total=n_merges, desc="merging", unit="token", leave=False, disable=None)
    while heap and len(merges) < n_merges:
        count, *_, pair = heapq.heappop(heap)
        if pair_counts[pair] != -count:  # other merges have taken some of them
            if pair_counts[pair]:
                heapq.heappush(heap, entry(pair))
            continue
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in ids:
            ids[merged] = len(tokens)
            tokens.append(merged)
            keys.append(merged.translate(turned).decode("latin-1") + "\u0100")
            merges.append((tokens[pair[0]], tokens[pair[1]]))
            bar.update()
        new = ids[merged]
        changed = set()
        for i in where.pop(pair):
            old, n = words[i]
            word = merge_pair(old, pair, new)
            words[i] = word, n
            for other in pairwise(old):
                pair_counts[other] -= n
            for other in pairwise(word):
                pair_counts[other] += n
                if new in other:  # only pairs with the new token can have become more
                    where[other].add(i)
                    changed.add(other)
        for other in changed:
            heapq.heappush(heap, entry(other))
    bar.close()
    return merges


def merge_pair(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """The word with each occurrence of the pair, left to right, as the one new token.

    >>> merge_pair([1, 1, 1, 2], (1, 1), 9)
    [9, 1, 2]
    """
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# --- byte-pair encoding: text to ids


class BPETokenizer:
    """Byte-pair encoding: text is cut into pieces, and in each piece neighbours are merged for as
    long as together they are a known token. Every byte is a token, so every text has ids.

    ranks: byte string -> id, lower ones merged earlier; specials: text -> id.
    """

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int], pattern: str):
        self.ranks, self.specials, self.pattern = ranks, specials, pattern
        self.vocab_size = max(*ranks.values(), *specials.values()) + 1

    @classmethod
    def train(
        cls, counts: Counter[str], vocab_size: int, first_specials: Sequence[str] = ()
    ) -> "BPETokenizer":
        """The tokenizer that `count_pieces` of a corpus teaches: first_specials, the 256 bytes, the
        merges, <|endoftext|>. With too little text for vocab_size tokens it has fewer."""
        first = len(first_specials)
        n_merges = vocab_size - 256 - first - 1
        if n_merges < 0:
            raise UserError(f"a BPE vocabulary has at least {257 + first} tokens: its bytes")
        tokens = [bytes([b]) for b in range(256)]
        tokens += [left + right for left, right in learn_merges(counts, n_merges)]
        ranks = {token: first + i for i, token in enumerate(tokens)}
        specials = {text: i for i, text in enumerate(first_specials)}
        return cls(ranks, {**specials, END_OF_TEXT: first + len(tokens)}, GPT2_PATTERN)

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The same tokenizer in compiled code."""
        ranks, specials = self.ranks, self.specials
        return tiktoken.Encoding(
            "tinyllm", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=specials
        )

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, 1-D; the same as encode_plain's, a thousand times as fast."""
        encode = self.encoding.encode_to_numpy
        found = [encode(part, disallowed_special=()) for part in parts(text)]
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, dtype=np.int64)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text, for reading: in each piece, as long as there is a pair of neighbours
        that is a token, merge the pair whose token has the lowest rank, the leftmost first."""
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
        """The text of a sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids; an id that no token has, has none."""
        return b"".join(self.token_bytes.get(i, b"") for i in ids)

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """id -> bytes, of special tokens too."""
        specials = {i: text.encode() for text, i in self.specials.items()}
        return {i: token for token, i in self.ranks.items()} | specials

    def unknown(self, text: str) -> list[str]:
        """What cannot be encoded: nothing."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as plain data, for a checkpoint; bytes in GPT-2's printable alphabet."""
        ranks = {visible(token): i for token, i in self.ranks.items()}
        return {"kind": "bpe", "pattern": self.pattern, "specials": self.specials, "ranks": ranks}


def parts(text: str, size: int = 1 << 14) -> Iterator[str]:
    """A text in parts of at most `size` characters, which tokenize as the whole does: each but the
    last ends before a space that follows a word, where every pattern begins a new piece.

    tiktoken's search fails on runs of a million spaces, and its time grows with the square of the
    length of a piece. Where there is no such place, the cut is made anywhere.
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


def printable_bytes() -> list[str]:
    """GPT-2's character for each byte: itself where it is printable, else one from U+0100 on, so
    that a space is shown as \u0120."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


VISIBLE = printable_bytes()
INVISIBLE = {c: b for b, c in enumerate(VISIBLE)}


def visible(token: bytes) -> str:
    """A byte string in GPT-2's printable alphabet."""
    return "".join(VISIBLE[b] for b in token)


# --- tiktoken's encodings


def from_tiktoken(name: str, seconds: float = 20) -> BPETokenizer:
    """One of the encodings of OpenAI's models, which tiktoken downloads once and keeps.

    Raises UserError where it has not arrived after so many seconds.
    """
    result: list[tiktoken.Encoding | Exception] = []

    def get() -> None:
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:
            result.append(error)

    # tiktoken waits for a silent network without an end, so it does that in a thread of its own.
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result or isinstance(result[0], Exception):
        reason = type(result[0]).__name__ if result else f"nothing came in {seconds:g} s"
        raise UserError(
            f"the encoding {name} could not be downloaded ({reason}): try again with a network, or "
            "set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled on another machine, or train "
            "one on your text with --tokenizer bpe"
        )
    encoding = result[0]
    return BPETokenizer(encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str)


Tokenizer = CharTokenizer | BPETokenizer


def from_dict(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` wrote."""
    if data.get("kind") == "char":
        return CharTokenizer(list(data["chars"]), list(data.get("specials", ())))
    if data.get("kind") == "bpe":
        ranks = {bytes(INVISIBLE[c] for c in text): int(i) for text, i in data["ranks"].items()}
        return BPETokenizer(ranks, dict(data["specials"]), data["pattern"])
    raise UserError(f"unknown kind of tokenizer {data.get('kind')!r}")


def to_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as a file that people can read."""
    return json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=0).encode()
