"""Text of any length for byte pairs: in segments, with special tokens apart."""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, product, takewhile

import regex  # re with Unicode classes such as \p{L}

MAX_PIECE = 1 << 16  # characters; longer ones are divided
Texts = Iterable[str]


def segments(texts: Texts, pattern: str, specials: Texts = ()) -> Iterator[str]:
    """A stream of text in segments whose pieces, the matches of the pattern, are those of the full
    text. Special tokens are segments of their own, the longest if several match. Pieces of more
    than MAX_PIECE characters are divided, because tiktoken fails on a million spaces."""
    names = sorted(filter(None, specials), key=len, reverse=True)
    special = regex.compile("|".join(map(regex.escape, names))) if names else None
    ahead = 2 * MAX_PIECE + max(map(len, names), default=0)  # enough text to find the next cut
    buffer = ""
    for text in chain(texts, [None]):
        buffer += text or ""
        start = 0
        while len(buffer) - start > (0 if text is None else ahead):
            found = special.search(buffer, start, start + ahead) if special else None
            end = found.start() if found else len(buffer)
            if found and end == start:
                end = found.end()
            elif end - start > MAX_PIECE:
                end = start + find_cut(buffer[start : min(end, start + 2 * MAX_PIECE)], pattern)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:] if start else buffer


def find_cut(text: str, pattern: str) -> int:
    """The length of the longest prefix of a text, up to MAX_PIECE, that has the same pieces by
    itself; if spaces start pieces, of the one up to the last space, which is found faster."""
    space = regex.search(r"(?r)(?<=\S) ", text, 0, MAX_PIECE + 1)
    if space and space_starts_piece(pattern):
        return space.start()
    ends = list(takewhile(MAX_PIECE.__ge__, piece_ends(pattern, text)))
    # GPT-2's pieces of "a\n\nb" are a, \n, \n, b, and those of "a\n\n" are a, \n\n.
    while ends and list(piece_ends(pattern, text[: ends[-1]])) != ends:
        ends.pop()
    return ends[-1] if ends else MAX_PIECE


def piece_ends(pattern: str, text: str) -> Iterator[int]:
    """Yield where the pieces of a text end."""
    return (piece.end() for piece in regex.finditer(pattern, text))


@cache
def space_starts_piece(pattern: str) -> bool:
    """Whether a space after a word always starts a piece, as in the patterns of GPT-2, GPT-4 and
    Llama 3. Others are tested on letters, marks, digits, punctuation, symbols and whitespace."""
    kinds = "aS\u5b57\u02b0\u0301\u01c51'./_+$\n "
    for a, b, c in product(kinds, kinds[:-2], kinds):
        ends = [*piece_ends(pattern, a + b), *(2 + end for end in piece_ends(pattern, " " + c))]
        if list(piece_ends(pattern, f"{a}{b} {c}")) != ends:
            return False
    return True
