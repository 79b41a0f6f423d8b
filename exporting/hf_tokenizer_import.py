"""Read tokenizer.json, the format of the `tokenizers` library, a pipeline of components.

Only pipelines that are known to give the same ids as our tokenizers are accepted: those of GPT-2,
Llama 3 and their relatives, and those that hf_tokenizer.py writes.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from corpus.text import read_text
from exporting.folders import read_json
from exporting.hf_tokenizer import (
    DIGITS_PATTERN,
    KNOWN_PATTERNS,
    UNKNOWN,
    check_equal,
    merges_of,
    split_rule,
)
from system.settings import UserError
from tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    PRINTABLE,
    PRINTABLE_TO_BYTE,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    from_printable,
    to_printable,
)


def tokenizer_from_hf(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises UserError, with the component's name, unless its
    components are known to give the same ids, and if the `tokenizers` library finds others."""
    require(content, "", {"normalizer": (None,)}, others=True)
    model = content.get("model")
    specials = specials_from_hf(content.get("added_tokens"))
    if not isinstance(model, dict) or not is_vocab(model.get("vocab"), specials):
        raise UserError("tokenizer.json: model has no vocab of different texts and ids")
    if model.get("type") == "WordLevel":
        tokenizer: Tokenizer = char_from_hf(content, specials)
    else:
        tokenizer = bpe_from_hf(content, specials)
    check_equal(tokenizer, content)
    return tokenizer


def gpt2_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a GPT-2 in its older format: vocab.json (token -> id), merges.txt (pairs by
    rank) and added_tokens.json. Raises UserError if they are damaged or of another tokenizer."""
    settings_file, added_file = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    kind = settings.get("tokenizer_class")
    if kind not in (None, "GPT2Tokenizer", "GPT2TokenizerFast") or settings.get("add_prefix_space"):
        raise UserError(
            f"{folder} has vocab.json and merges.txt of a tokenizer that is not GPT-2's ({kind}"
            f"{', add_prefix_space' * bool(settings.get('add_prefix_space'))}): save its "
            "tokenizer.json there, with tokenizer.save_pretrained"
        )
    vocab = read_json(folder / "vocab.json")
    added = read_json(added_file) if added_file.exists() else {}
    added |= {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
    lines = read_text(folder / "merges.txt").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {
        "added_tokens": [
            {"content": text, "id": i, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, i in added.items()
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [line for line in lines if line]},
    }
    return tokenizer_from_hf(content)


# The value of a key that is missing; all others are None.
DEFAULTS = {"use_regex": True, "byte_fallback": False, "ignore_merges": False}


def require(
    part: Any, name: str, allowed: dict[str, tuple[Any, ...]], others: bool = False
) -> None:
    """Raise UserError unless a part of tokenizer.json is an object with allowed values, and has no
    other keys."""
    if not isinstance(part, dict):
        raise UserError(f"tokenizer.json: {name} is {part!r:.60}, which is not supported")
    for key, values in allowed.items():
        if (value := part.get(key, DEFAULTS.get(key))) not in values:
            kind = value.get("type") if isinstance(value, dict) else value
            where = f"{name}.{key}".lstrip(".")
            raise UserError(f"tokenizer.json: {where} {kind!r:.60} is not supported")
    if unknown := [] if others else [key for key in part if key not in allowed]:
        raise UserError(f"tokenizer.json: {name}.{unknown[0]} is not supported")


def specials_from_hf(added_tokens: Any) -> dict[str, int]:
    """The added tokens, with their ids. They are never produced from text, so that those that
    change how ordinary text is split are not supported."""
    specials: dict[str, int] = {}
    for token in added_tokens if isinstance(added_tokens, list) else [added_tokens]:
        match token:
            case None if added_tokens is None:
                continue
            case {"content": str(text), "id": int(i)} if text and i >= 0:
                tag = text.startswith("<") and text.endswith(">")
                special = token.get("special") is True or tag
                if not special or specials.setdefault(text, i) != i:
                    raise UserError(
                        f"tokenizer.json: the added token {text!r:.60} is not supported"
                    )
            case _:
                raise UserError("tokenizer.json: added_tokens must be a list of texts with ids")
    return specials


def is_vocab(vocab: Any, specials: dict[str, int]) -> bool:
    """Whether texts and ids, with those of the special tokens, correspond one to one."""
    if not isinstance(vocab, dict) or not vocab:
        return False
    if any(type(i) is not int or not 0 <= i < 1 << 31 for i in vocab.values()):
        return False
    both = vocab | specials
    agree = all(vocab.get(text, i) == i for text, i in specials.items())
    return agree and len(set(both.values())) == len(both)


def char_from_hf(content: dict[str, Any], specials: dict[str, int]) -> CharTokenizer:
    """The character tokenizer that `char_to_hf` wrote."""
    model = content["model"]
    require(
        model,
        "model",
        {
            "type": ("WordLevel",),
            "vocab": (model["vocab"],),
            "unk_token": (UNKNOWN, *model["vocab"]),
        },
    )
    require(content.get("pre_tokenizer"), "pre_tokenizer", allowed_values(split_rule(r"[\s\S]")))
    require(content.get("decoder"), "decoder", {"type": ("Fuse",)})
    check_post_processor(content.get("post_processor"))
    ordered = sorted(specials, key=specials.__getitem__)
    chars = sorted(text for text in model["vocab"] if text not in specials)
    if any(len(char) != 1 for char in chars):
        raise UserError("tokenizer.json: WordLevel is only supported with words of one character")
    tokenizer = CharTokenizer(chars, ordered)
    if (
        not chars
        or {text: i for i, text in enumerate(tokenizer.texts)} != model["vocab"] | specials
    ):
        raise UserError(
            "tokenizer.json: WordLevel is only supported with ids from 0 without gaps, first those "
            "of the special tokens, then those of the characters in sorted order"
        )
    return tokenizer


def allowed_values(part: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Exactly the values of a part, for `require`."""
    return {key: (value,) for key, value in part.items()}


def bpe_from_hf(content: dict[str, Any], specials: dict[str, int]) -> BPETokenizer:
    """A byte-level BPE tokenizer. Raises UserError unless it can only give the same ids."""
    model = content["model"]
    require(
        model,
        "model",
        {
            "type": ("BPE",),
            "dropout": (None, 0),
            "continuing_subword_prefix": (None, ""),
            "end_of_word_suffix": (None, ""),
            "byte_fallback": (False,),
            "ignore_merges": (True, False),
        },
        others=True,  # an unknown token is not needed: every byte has a token
    )
    pattern = pattern_from_hf(content.get("pre_tokenizer"))
    require(content.get("decoder"), "decoder", {"type": ("ByteLevel",)}, others=True)
    check_post_processor(content.get("post_processor"))
    texts = [text for text in model["vocab"] if text not in specials]
    for text in texts:
        if not text or not PRINTABLE_TO_BYTE.keys() >= set(text):
            raise UserError(f"tokenizer.json: the token {text!r:.60} is not one of bytes")
    known = set(texts)
    if missing := [byte for byte, text in enumerate(PRINTABLE) if text not in known]:
        raise UserError(f"tokenizer.json: there is no token for the byte {missing[0]:#04x}")
    ranks = {from_printable(text): model["vocab"][text] for text in texts}
    tokenizer = BPETokenizer(ranks, specials, pattern)
    check_merges(tokenizer, model)
    return tokenizer


def pattern_from_hf(pre_tokenizer: Any) -> str:
    """The split pattern of GPT-2's pre-tokenizer, ByteLevel; of SmolLM's, which separates digits
    first; or of that of Llama 3 and `bpe_to_hf`: a split by a pattern, then ByteLevel without its
    own."""
    byte_level: dict[str, tuple[Any, ...]] = {
        "type": ("ByteLevel",),
        "add_prefix_space": (False,),
        "trim_offsets": (True, False, None),
        "use_regex": (True,),
    }
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "Sequence":
        require(pre_tokenizer, "pre_tokenizer", byte_level)
        return GPT2_PATTERN
    steps = pre_tokenizer.get("pretokenizers")
    steps = steps if isinstance(steps, list) else []
    kinds = [step.get("type") if isinstance(step, dict) else step for step in steps]
    if kinds == ["Digits", "ByteLevel"]:
        require(steps[0], "pre_tokenizer", {"type": ("Digits",), "individual_digits": (True,)})
        require(steps[1], "pre_tokenizer", byte_level)
        return DIGITS_PATTERN
    if kinds != ["Split", "ByteLevel"]:
        raise UserError(f"tokenizer.json: the pre_tokenizer {kinds!r:.200} is not supported")
    require(steps[1], "pre_tokenizer", byte_level | {"use_regex": (False,)})
    rules = [split_rule(pattern) for pattern in sorted(KNOWN_PATTERNS)]
    if steps[0] not in rules:
        raise UserError(f"tokenizer.json: the pre_tokenizer {steps[0]!r:.200} is not supported")
    return steps[0]["pattern"]["Regex"]


def check_post_processor(part: Any) -> None:
    """Raise UserError unless a post-processor at most adds special tokens around a text."""
    steps = [part] if not isinstance(part, dict) else part.get("processors", [part])
    for step in steps if isinstance(steps, list) else [steps]:
        if step is not None:
            kinds = ("ByteLevel", "TemplateProcessing")
            require(step, "post_processor", {"type": kinds}, others=True)


def check_merges(tokenizer: BPETokenizer, model: dict[str, Any]) -> None:
    """Raise UserError unless merging by a list of pairs is the same as by the ids of the tokens.

    In each span of text, merging by ids only ever meets the pairs of `merges_of`. So these must be
    among the pairs, in the order of the ids of the tokens that they make. A token that no pair
    makes is only found by ignore_merges.
    """
    merges, vocab = model.get("merges"), model["vocab"]
    pairs: list[tuple[str, str]] = []
    for merge in merges if isinstance(merges, list) else [None]:
        texts = merge.split(" ") if isinstance(merge, str) else merge
        match texts:
            case [str(left), str(right)] if {left, right, left + right} <= vocab.keys():
                pairs.append((left, right))
            case _:
                raise UserError(f"tokenizer.json: {merge!r:.60} in merges does not make a token")
    if any(vocab[a + b] > vocab[c + d] for (a, b), (c, d) in pairwise(pairs)):
        raise UserError("tokenizer.json: the merges are not in the order of the ids")
    listed, made = set(pairs), set()
    for pair in merges_of(tokenizer):
        left, right = map(to_printable, pair)
        made.add(left + right)
        if (left, right) not in listed:
            raise UserError(f"tokenizer.json: {left!r} and {right!r} are not among the merges")
    if not model.get("ignore_merges") and len(made) != len(tokenizer.ranks) - 256:
        raise UserError("tokenizer.json: there are tokens that no merge makes")
