"""Byte-pair tokenizers: with merges learned from text, or tiktoken's encodings."""

import heapq
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex  # the standard library's re with Unicode classes such as \p{L}; tiktoken brings it
import tiktoken
from tqdm import tqdm

from corpus.text import note
from system.segments import segments
from system.settings import UserError
from tokenizer import END_OF_TEXT, GPT2_PATTERN, BPETokenizer

NOTE_AFTER = 3  # seconds; most machines read a cached encoding in less

Pair = tuple[int, int]  # the ids of two adjacent tokens
Word = tuple[list[int], int]  # the ids of a piece of text, and how often the piece occurs


def count_pieces(texts: Iterable[str], pattern: str = GPT2_PATTERN) -> Counter[str]:
    """How often each piece, a match of the pattern, occurs. Merges never cross their borders."""
    regular = regex.compile(pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        for segment in segments([text], pattern):
            counts.update(regular.findall(segment))
    return counts


def count_pairs(words: list[Word]) -> tuple[Counter[Pair], defaultdict[Pair, set[int]]]:
    """How often each pair occurs, and the indices of the words in which it occurs."""
    pair_counts: Counter[Pair] = Counter()
    pair_words: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (word, n) in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += n
            pair_words[pair].add(i)
    return pair_counts, pair_words


def merge_pair(word: list[int], pair: Pair, new: int) -> list[int]:
    """The word with each occurrence of the pair, left to right, replaced by the token `new`.

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


def apply_merge(
    pair: Pair,
    new: int,
    words: list[Word],
    pair_counts: Counter[Pair],
    pair_words: defaultdict[Pair, set[int]],
) -> set[Pair]:
    """Replace a pair by the token `new` in all words, and update the counts in place. Returns the
    pairs that contain the new token, the only ones whose count can have increased.

    Only the words that contain the pair are changed and recounted, which is much faster than
    counting all pairs again after each merge.
    """
    new_pairs = set()
    for i in pair_words.pop(pair):
        old_word, n = words[i]
        word = merge_pair(old_word, pair, new)
        words[i] = word, n
        for other in pairwise(old_word):
            pair_counts[other] -= n
        for other in pairwise(word):
            pair_counts[other] += n
            if new in other:
                pair_words[other].add(i)
                new_pairs.add(other)
    return new_pairs


def descending_key(token: bytes) -> tuple[int, ...]:
    """A key that sorts the other way round than the token: b"ab", which is greater than its prefix
    b"a", is before it.

    >>> descending_key(b"b") < descending_key(b"ab") < descending_key(b"a")
    True
    """
    return (*(-byte for byte in token), 1)


def learn_merges(counts: Counter[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The byte pairs to merge, in the order in which they are learned (Sennrich et al. 2016).

    Each piece starts as its single bytes. Count the pairs of adjacent tokens in all pieces, replace
    the most frequent pair by a new token, everywhere, left to right; repeat until there are
    n_merges merges or no pairs. Of equally frequent pairs the lexicographically greater pair of
    byte strings is merged first, so that the result does not depend on the order of the corpus.

    Example: in "low lower lowest" both l+o and o+w occur 3 times, and o+w is greater. Then l+ow
    occurs 3 times; low+e and space+low occur twice, and low+e is greater; and so on:

    >>> learn_merges(count_pieces(["low lower lowest"]), 5)
    [(b'o', b'w'), (b'l', b'ow'), (b'low', b'e'), (b' ', b'lowe'), (b's', b't')]
    """
    tokens = [bytes([b]) for b in range(256)]  # id -> bytes
    ids = {token: i for i, token in enumerate(tokens)}
    keys = [descending_key(token) for token in tokens]
    words = [(list(piece.encode("utf-8", "replace")), n) for piece, n in counts.items()]
    pair_counts, pair_words = count_pairs(words)

    def heap_entry(pair: Pair) -> tuple[int, tuple[int, ...], tuple[int, ...], Pair]:
        return -pair_counts[pair], keys[pair[0]], keys[pair[1]], pair

    # The heap returns the most frequent pair first. Entries are not updated when counts change: an
    # outdated entry is recognized, and pushed again, when it reaches the top.
    heap = [heap_entry(pair) for pair in pair_counts]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    bar = tqdm(total=n_merges, desc="merging", unit="token", leave=False, disable=None)
    while heap and len(merges) < n_merges:
        negative_count, *_, pair = heapq.heappop(heap)
        if pair_counts[pair] != -negative_count:
            if pair_counts[pair]:
                heapq.heappush(heap, heap_entry(pair))
            continue
        left, right = tokens[pair[0]], tokens[pair[1]]
        if left + right not in ids:  # otherwise another pair has formed the same token before
            ids[left + right] = len(tokens)
            tokens.append(left + right)
            keys.append(descending_key(left + right))
            merges.append((left, right))
            bar.update()
        for new_pair in apply_merge(pair, ids[left + right], words, pair_counts, pair_words):
            heapq.heappush(heap, heap_entry(new_pair))
    bar.close()
    return merges


def train_bpe(
    counts: Counter[str], vocab_size: int, first_specials: Sequence[str] = ()
) -> BPETokenizer:
    """The tokenizer learned from the `count_pieces` of a corpus.

    Its ids are first_specials, the 256 bytes, the merges, <|endoftext|>. If the text has too few
    pairs for vocab_size tokens, the vocabulary is smaller. Raises UserError if vocab_size is too
    small for the bytes and special tokens.
    """
    n_specials = len(first_specials)
    n_merges = vocab_size - 256 - n_specials - 1
    if n_merges < 0:
        raise UserError(
            f"a BPE vocabulary needs at least {257 + n_specials} tokens: the 256 bytes and the "
            "special tokens"
        )
    tokens = [bytes([b]) for b in range(256)]
    tokens += [left + right for left, right in learn_merges(counts, n_merges)]
    ranks = {token: n_specials + i for i, token in enumerate(tokens)}
    specials = {text: i for i, text in enumerate(first_specials)}
    return BPETokenizer(ranks, {**specials, END_OF_TEXT: n_specials + len(tokens)}, GPT2_PATTERN)


def from_tiktoken(name: str, seconds: float = 300) -> BPETokenizer:
    """One of the encodings of OpenAI's models, which tiktoken downloads once and caches. Raises
    UserError if it cannot be downloaded within this time."""
    result: list[tiktoken.Encoding | Exception] = []

    def download() -> None:
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:
            result.append(error)

    # tiktoken waits for a silent network without a timeout, so it runs in a separate thread.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(min(seconds, NOTE_AFTER))
    if thread.is_alive():
        note(f"loading the encoding {name}; its first use downloads up to 4 MB")
        thread.join(seconds)
    encoding = result[0] if result else None
    if not isinstance(encoding, tiktoken.Encoding):
        slow = f"not complete after {seconds:g} s: the network is slow or silent"
        reason = type(encoding).__name__ if result else slow
        raise UserError(
            f"the encoding {name} could not be downloaded ({reason}): try again with a network, or "
            "set TIKTOKEN_CACHE_DIR to a cache folder of tiktoken from another machine, or train a "
            "tokenizer on your text with --tokenizer bpe"
        )
    # tiktoken's own pattern for GPT-2 gives the same ids. With the original one, the tokenizer is
    # equal to that of a GPT-2 imported from Hugging Face.
    pattern = GPT2_PATTERN if name in ("gpt2", "r50k_base") else encoding._pat_str
    return BPETokenizer(encoding._mergeable_ranks, encoding._special_tokens, pattern)
