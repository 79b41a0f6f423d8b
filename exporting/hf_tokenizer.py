"""Convert tokenizers to and from tokenizer.json, the format of the `tokenizers` library."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from config import UserError
from tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    from_printable,
    to_printable,
)


def tokenizer_to_hf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of the tokenizer.json of a tokenizer."""
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
    if isinstance(tokenizer, CharTokenizer):
        return shared | char_to_hf(tokenizer)
    return shared | bpe_to_hf(tokenizer)


def char_to_hf(tokenizer: CharTokenizer) -> dict[str, Any]:
    """The entries of tokenizer.json for a character tokenizer: each character is a word."""
    # The format requires an unknown token: without <UNK> it is the first character.
    unknown = "<UNK>" if "<UNK>" in tokenizer.specials else tokenizer.chars[0]
    vocab = {text: i for i, text in enumerate(tokenizer.texts)}
    return {
        "pre_tokenizer": split_rule(r"[\s\S]"),
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": unknown},
    }


def bpe_to_hf(tokenizer: BPETokenizer) -> dict[str, Any]:
    """The entries of tokenizer.json for a byte-level BPE tokenizer."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,  # the split rule has the pattern
    }
    pre_tokenizers = [split_rule(tokenizer.pattern), byte_level]
    merges = [[to_printable(token) for token in pair] for pair in merges_of(tokenizer)]
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {to_printable(token): i for token, i in tokenizer.ranks.items()},
            "merges": merges,
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
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
    bytes of a token with the tokens of lower rank leaves the pair that the token merges.
    """
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        word = [bytes([b]) for b in token]
        while len(word) > 2:
            merged = [left + right for left, right in pairwise(word)]
            ranks = [tokenizer.ranks.get(candidate, rank) for candidate in merged]
            i = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[i] >= rank:
                break  # no sequence of merges produces this token
            word[i : i + 2] = [merged[i]]
        if len(word) == 2:
            yield word[0], word[1]


def tokenizer_from_hf(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises UserError unless it is byte-level BPE or one that
    `char_to_hf` wrote."""
    model = content["model"]
    specials = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    if model["type"] == "WordLevel" and all(len(t) == 1 or t in specials for t in model["vocab"]):
        chars = [text for text in model["vocab"] if text not in specials]
        return CharTokenizer(chars, sorted(specials, key=lambda text: specials[text]))

    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if model["type"] != "BPE" or "ByteLevel" not in kinds:
        raise UserError(
            "only byte-level BPE tokenizers can be imported, and this one is "
            f"{model['type']} after {', '.join(map(str, kinds))}"
        )
    patterns = [step["pattern"]["Regex"] for step in steps if step.get("type") == "Split"]
    vocab = {text: i for text, i in model["vocab"].items() if text not in specials}
    ranks = {from_printable(text): i for text, i in vocab.items()}
    return BPETokenizer(ranks, specials, patterns[0] if patterns else GPT2_PATTERN)
