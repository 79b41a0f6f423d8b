"""Write tokenizers as tokenizer.json, the format of the `tokenizers` library, and compare both.

Text that looks like a special token is ordinary text for our tokenizers, and a special token for
the library, unless its `encode_special_tokens` is set.
"""

import importlib
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from exporting.probes import PROBES
from system.errors import first_line
from system.settings import UserError
from tokenizer import GPT2_PATTERN, BPETokenizer, CharTokenizer, Tokenizer, to_printable

UNKNOWN = "<UNK>"

# The split patterns whose matches are the same in the regular expressions of tiktoken and of the
# `tokenizers` library: those of GPT-2, o200k_base, cl100k_base, Llama 3, Qwen and SmolLM. In
# cl100k_base's, {1,3} is followed by a +, which for the library is another repetition, and for
# tiktoken forbids to match less ("possessive"); without it tiktoken's matches are the same.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's after a separation of all digits, so that whitespace before a digit is one piece.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}|\s+(?=\p{N})")
KNOWN_PATTERNS = {
    GPT2_PATTERN,
    DIGITS_PATTERN,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    LLAMA3_PATTERN,
    LLAMA3_PATTERN.replace("{1,3}", ""),
}

# --- export


def tokenizer_to_hf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of the tokenizer.json of a tokenizer. Raises UserError if the `tokenizers`
    library, if it is installed, gives other ids with it."""
    added_tokens = [
        {
            "id": i,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for text, i in sorted(tokenizer.specials.items(), key=lambda item: item[1])
    ]
    shared = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "post_processor": None,
    }
    own = char_to_hf(tokenizer) if isinstance(tokenizer, CharTokenizer) else bpe_to_hf(tokenizer)
    content = shared | own
    check_equal(tokenizer, content)
    return content


def char_to_hf(tokenizer: CharTokenizer) -> dict[str, Any]:
    """The entries of tokenizer.json for a character tokenizer: each character is a word, and
    unknown characters get the id of `unknown_char`."""
    vocab = {text: i for i, text in enumerate(tokenizer.texts)}
    return {
        "pre_tokenizer": split_rule(r"[\s\S]"),
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": unknown_char(tokenizer)},
    }


def unknown_char(tokenizer: CharTokenizer) -> str:
    """The token that stands for unknown characters: <UNK>, or a space in a tokenizer without it; a
    newline or the first character if there is no space. A new token would change the model: it
    has an embedding and a logit only for the tokens that it was trained with."""
    candidates = (UNKNOWN, " ", "\n", *tokenizer.chars[:1])
    return next((text for text in candidates if text in tokenizer.texts), UNKNOWN)


def bpe_to_hf(tokenizer: BPETokenizer) -> dict[str, Any]:
    """The entries of tokenizer.json for a byte-level BPE tokenizer."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,  # the split rule has the pattern
    }
    pattern = tokenizer.pattern.replace("{1,3}+", "{1,3}")  # see KNOWN_PATTERNS
    merges = [[to_printable(token) for token in pair] for pair in merges_of(tokenizer)]
    # Special tokens are part of the vocabulary, as in GPT-2's file: the library numbers others
    # consecutively, whatever their ids are.
    vocab = {to_printable(token): i for token, i in tokenizer.ranks.items()} | tokenizer.specials
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split_rule(pattern), byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is not merged, as in tiktoken
        },
    }


def split_rule(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer that splits a text into the matches of a regular expression."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def merges_of(tokenizer: BPETokenizer) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token is merged from, in order of rank.

    A tokenizer stores only the ranks of its tokens, tokenizer.json also the pairs. Encoding the
    bytes of a token with the tokens of lower rank leaves the pair that the token merges. If it
    leaves more, all pairs of tokens that make the token are merges.
    """
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        word = [bytes([b]) for b in token]
        while len(word) > 2:
            merged = [left + right for left, right in pairwise(word)]
            ranks = [tokenizer.ranks.get(candidate, rank) for candidate in merged]
            i = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[i] >= rank:
                break  # no sequence of lower merges produces this token
            word[i : i + 2] = [merged[i]]
        if len(word) == 2:
            yield word[0], word[1]
        elif len(word) > 2:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            yield from (pair for pair in splits if all(half in tokenizer.ranks for half in pair))


# --- comparison


def check_equal(tokenizer: Tokenizer, content: dict[str, Any]) -> None:
    """Compare the ids of about a hundred texts with those of the `tokenizers` library, if it is
    installed. Raises UserError with the first text for which they differ."""
    try:
        library = importlib.import_module("tokenizers")
    except ImportError:
        print("note: the tokenizer is not compared with Hugging Face's (pip install tokenizers)")
        return
    added = [token | {"special": True} for token in content.get("added_tokens") or ()]
    try:
        theirs = library.Tokenizer.from_str(json.dumps(content | {"added_tokens": added}))
    except Exception as error:  # of no particular type
        raise UserError(f"tokenizer.json is invalid: {first_line(error)}") from None
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    for text, i in tokenizer.specials.items():
        if theirs.token_to_id(text) != i:
            raise UserError(
                f"tokenizer.json: the special token {text!r:.60} does not get the id {i}"
            )
    for text in [*PROBES, *tokenizer.specials]:
        if isinstance(tokenizer, CharTokenizer):
            text = "".join(char for char in text if char in tokenizer.chars)
        ids = tokenizer.encode(text).tolist()
        if theirs.encode(text, add_special_tokens=False).ids != ids:
            raise UserError(f"Hugging Face's tokenizer has other ids for the text {text!r}")
        if theirs.decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
            raise UserError(f"Hugging Face's tokenizer decodes the ids of {text!r} differently")
