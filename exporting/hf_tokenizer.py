# ruff: noqa: RUF001 (unusual characters on purpose)
"""Tokenizers as tokenizer.json, the format of the `tokenizers` library: a pipeline of components.

Only pipelines that are known to give the same ids as our tokenizers are read: those of GPT-2,
Llama 3 and their relatives, and those that are written here. In both directions, the ids of about a
hundred texts are compared with those of the library.

Text that looks like a special token is ordinary text for our tokenizers, and a special token for
the library, unless its `encode_special_tokens` is set.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from exporting.folders import import_optional
from system.settings import UserError, first_line
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

# The split patterns whose matches are the same in the regular expressions of tiktoken and of the
# `tokenizers` library: those of GPT-2, o200k_base, cl100k_base, Llama 3, Qwen and SmolLM. In
# cl100k_base's, {1,3} is followed by a +, which for the library is another repetition, and for
# tiktoken forbids to match less ("possessive"); without it tiktoken's matches are the same.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
# GPT-2's after a separation of all digits, so that whitespace before a digit is one piece.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}|\s+(?=\p{N})")
TIKTOKEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
KNOWN_PATTERNS = {
    GPT2_PATTERN,
    DIGITS_PATTERN,
    TIKTOKEN_GPT2,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    LLAMA3_PATTERN,
    QWEN_PATTERN,
}
# Bytes as printable characters; with use_regex, after a split by GPT-2's pattern.
MAX_ID = 1 << 24  # the library takes 10 s to write a vocabulary with an id of 10**9
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTE_LEVEL |= {"use_regex": True}


def library_pattern(pattern: str) -> str:
    """A pattern of tiktoken as one of KNOWN_PATTERNS, if it is known."""
    return pattern.replace("{1,3}+", "{1,3}")


# --- export


def tokenizer_to_hf(tokenizer: Tokenizer, specials: dict[str, int] | None = None) -> dict[str, Any]:
    """The content of tokenizer.json; `specials` replaces the tokenizer's. Raises UserError if the
    library gives other ids with it."""
    library = import_optional("tokenizers")
    Split, ByteLevel = library.pre_tokenizers.Split, library.pre_tokenizers.ByteLevel
    specials = tokenizer.specials if specials is None else specials
    if isinstance(tokenizer, CharTokenizer):
        # Byte pairs without a merge: each character is a token, and unknown ones are left out.
        vocab = {text: i for i, text in enumerate(tokenizer.texts)}
        theirs = library.Tokenizer(library.models.BPE(vocab | specials, []))
        theirs.pre_tokenizer = Split(library.Regex(r"[\s\S]"), "isolated")
        theirs.decoder = library.decoders.Fuse()
    else:
        # Special tokens are part of the vocabulary, as in GPT-2's file: the library numbers others
        # consecutively, whatever their ids are.
        vocab = {to_printable(token): i for token, i in tokenizer.ranks.items()}
        merges = [(to_printable(left), to_printable(right)) for left, right in merges_of(tokenizer)]
        # ignore_merges: a piece that is a token is not merged, as in tiktoken
        model = library.models.BPE(vocab | specials, merges, ignore_merges=True)
        theirs = library.Tokenizer(model)
        split = Split(library.Regex(library_pattern(tokenizer.pattern)), "isolated")
        steps = [split, ByteLevel(add_prefix_space=False, use_regex=False)]
        theirs.pre_tokenizer = library.pre_tokenizers.Sequence(steps)
        theirs.decoder = library.decoders.ByteLevel()
    theirs.add_special_tokens(sorted(specials, key=specials.__getitem__))
    content: dict[str, Any] = json.loads(theirs.to_str())
    check_equal(tokenizer, content)
    return content


def token_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The ids of all tokens but the special ones, by their bytes in UTF-8."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.ranks
    chars = enumerate(tokenizer.chars, len(tokenizer.specials))
    return {char.encode("utf-8", "surrogatepass"): i for i, char in chars}


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


# --- import


def tokenizer_from_hf(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises UserError, with the component's name, unless its
    components are known to give the same ids, and if the library finds others."""
    theirs = read_pipeline(content)
    if (highest := max(theirs.get_vocab().values(), default=0)) >= MAX_ID:
        raise UserError(f"tokenizer.json: the id {highest} is too large")
    # The components as the library writes them, with all defaults. Offsets in the text do not
    # change the ids.
    parts = json.loads(theirs.to_str().replace('"trim_offsets":false', '"trim_offsets":true'))
    specials = {}
    for token in content.get("added_tokens", []):
        text, i = token["content"], token["id"]
        # Special tokens are never produced from text; others change how ordinary text is split.
        if not token["special"] and not (text.startswith("<") and text.endswith(">")):
            raise UserError(f"tokenizer.json: the added token {text!r:.60} is not supported")
        if theirs.token_to_id(text) != i:
            raise UserError(f"tokenizer.json: the added token {text!r:.60} does not get the id {i}")
        specials[text] = i
    require(parts["model"], "type", ("BPE",), "model.")
    vocab = content["model"]["vocab"]
    ids = (vocab | specials).values()
    if len(set(ids)) < len(ids):
        raise UserError("tokenizer.json: different texts have the same id")
    require(parts, "normalizer", (None,))
    post = parts["post_processor"] or {}  # it may add special tokens around a text
    for part in post.get("processors", [post] if post else []):
        require(part, "type", ("ByteLevel", "TemplateProcessing"), "post_processor.")
    if parts["decoder"] == {"type": "Fuse"}:
        tokenizer: Tokenizer = char_from_hf(parts, vocab, specials)
    else:
        tokenizer = bpe_from_hf(parts, vocab, specials)
    check_equal(tokenizer, content)
    return tokenizer


def require(part: dict[str, Any], key: str, allowed: tuple[Any, ...], where: str = "") -> None:
    """Raise UserError unless the value of a key is one of those allowed."""
    if part[key] not in allowed:
        raise UserError(f"tokenizer.json: {where}{key} {part[key]!r:.300} is not supported")


def char_from_hf(
    parts: dict[str, Any], vocab: dict[str, int], specials: dict[str, int]
) -> CharTokenizer:
    """A character tokenizer, as `tokenizer_to_hf` writes it, without an added end token."""
    require(parts, "pre_tokenizer", (split_rule(r"[\s\S]"),))
    chars = sorted(text for text in vocab if text not in specials)
    end = [END_OF_TEXT] if specials.get(END_OF_TEXT) == len(vocab) - 1 else []
    order = sorted(specials.keys() - {*end}, key=specials.__getitem__)
    ids = {text: i for i, text in enumerate([*order, *chars, *end])}
    if {len(char) for char in chars} != {1} or ids != vocab | specials:
        raise UserError(
            "tokenizer.json: characters are only supported as words of one character and ids from "
            "0 without gaps: special tokens, then characters in sorted order"
        )
    return CharTokenizer(chars, order)


def split_rule(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer that splits a text into the matches of a regular expression."""
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def bpe_from_hf(
    parts: dict[str, Any], vocab: dict[str, int], specials: dict[str, int]
) -> BPETokenizer:
    """A byte-level BPE tokenizer. Raises UserError unless it can only give the same ids."""
    model = parts["model"]
    require(model, "dropout", (None, 0), "model.")
    require(model, "continuing_subword_prefix", (None, ""), "model.")
    require(model, "end_of_word_suffix", (None, ""), "model.")
    require(model, "byte_fallback", (False,), "model.")
    require(parts["decoder"] or {"type": None}, "type", ("ByteLevel",), "decoder.")
    plain = BYTE_LEVEL | {"use_regex": False}
    steps = [(p, [split_rule(p), plain]) for p in sorted(KNOWN_PATTERNS)]
    steps += [(DIGITS_PATTERN, [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL])]
    known: list[tuple[str, Any]] = [(GPT2_PATTERN, BYTE_LEVEL)]
    known += [(p, {"type": "Sequence", "pretokenizers": pair}) for p, pair in steps]
    require(parts, "pre_tokenizer", tuple(part for _, part in known))
    pattern = next(pattern for pattern, part in known if part == parts["pre_tokenizer"])
    texts = [text for text in vocab if text not in specials]
    for text in texts:
        if not text or not PRINTABLE_TO_BYTE.keys() >= set(text):
            raise UserError(f"tokenizer.json: the token {text!r:.60} is not one of bytes")
    if missing := [byte for byte, text in enumerate(PRINTABLE) if text not in vocab]:
        raise UserError(f"tokenizer.json: there is no token for the byte {missing[0]:#04x}")
    ranks = {from_printable(text): vocab[text] for text in texts}
    tokenizer = BPETokenizer(ranks, specials, pattern)
    check_merges(tokenizer, model["merges"], model["ignore_merges"])
    return tokenizer


def check_merges(
    tokenizer: BPETokenizer, merges: list[tuple[str, str]], ignore_merges: bool
) -> None:
    """Raise UserError unless merging by a list of pairs is the same as by the ids of the tokens.

    In each span of text, merging by ids only ever meets the pairs of `merges_of`. So these must be
    among the pairs, in the order of the ids of the tokens that they make. A token that no pair
    makes is only found by ignore_merges.
    """
    listed = [(from_printable(left), from_printable(right)) for left, right in merges]
    ids = [tokenizer.ranks.get(left + right, -1) for left, right in listed]
    if ids != sorted(ids):
        raise UserError("tokenizer.json: the merges are not in the order of the ids")
    needed, pairs = list(merges_of(tokenizer)), set(listed)
    for left, right in needed:
        if (left, right) not in pairs:
            raise UserError(f"tokenizer.json: {left!r} and {right!r} are not among the merges")
    if not ignore_merges and len({a + b for a, b in needed}) != len(tokenizer.ranks) - 256:
        raise UserError("tokenizer.json: there are tokens that no merge makes")


# --- comparison

# Scripts, whitespace, contractions, symbols.
LINES = r"""
The quick brown fox jumps over the lazy dog. Hello, world!
don't I'll we've they're I'd it's I'm DON'T I'LL WE'VE THEY'RE I'D IT'S I'M
's't're've'm'll'd 'S'T'Re'vE rock 'n' roll ''quoted'' ' ſ 'ſ
CamelCase snake_case kebab-case UPPER mixedCASE naïve Ünïcödé Straße ǅ ﬁ İi ıI þæð Türkçe żółć Việt
ελληνικά Ωμέγα Русский текст Українська мова български ქართული Հայերեն Ꮳꮃꭹ
עברית שלום العربية مرحبا فارسی اردو ﷺ हिन्दी नमस्ते বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം ਪੰਜਾਬੀ සිංහල
ไทย สวัสดี ລາວ မြန်မာ ខ្មែរ བོད་སྐད አማርኛ 中文 你好，世界。 日本語のテキスト、カタカナ。 한국어 ﾊﾝ ＦＵＬＬ
𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒜 𐍈𐌰 𐤀 𠀀 ٣٤٥ १२३ Ⅳ ½ ² ① 1½2
0 7 42 365 1984 12345 1234567890 12345678901234567890 3.14159 -2.5e-10 1,000,000 0x1F 007 1st 1a2b3c
a+b=c*(d-e)/f%g !?.,;:"#$%&/()=|{[<>]}\^~`@_ -- --- ... … !!!??? //// “b” €£¥§©®™°±×÷ → ∞ ≠ ∑
😀 😀😃😄 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ☃ ♥ word😀word
def f(x):  return x ** 2  # <div class="a">text</div> https://example.com/a?b=c&d=%20 C:\Windows
<|endoftext|> <|im_start|>user<|im_end|> <s></s> [CLS] <PAD><UNK><BOS><EOS> <think></think> <|
pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaftskapitän
"""
RUNS = ("", " ", "  ", "    ", "\n", "\n\n", " \n", "\n  ", " \n\n ", "\r\n", "\t", "\t\n", "\xa0")
SPACES = "\r\x0b\x0c\x00\x01\x1c\x1f\x7f\x85\u2003\u2028\u3000\ufeff"
PROBES = [
    "",
    *LINES.strip().split("\n"),
    LINES,
    *(left + run + right for run in RUNS for left in ("", "a", "1", "!") for right in ("", "b")),
    *(f"a{space}b {space} c" for space in SPACES),
    "e\u0301 a\u0308\u0323 \u0301 \u200bzero\u200dwidth \u212b \u1100\u1161",  # not in normal form
    "x" * 1000,
    "ab" * 500 + " " * 100 + "9" * 100 + "." * 100 + "\n" * 100 + "é" * 100,
]


def read_pipeline(content: dict[str, Any]) -> Any:
    """The library's tokenizer of a tokenizer.json. Raises UserError if it is invalid."""
    library = import_optional("tokenizers")
    try:
        return library.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # of no particular type
        raise UserError(f"the tokenizer is invalid: {first_line(error)}") from None


def check_equal(tokenizer: Tokenizer, content: dict[str, Any]) -> None:
    """Raise UserError with the first probe for which the library has other ids or other text."""
    added = [token | {"special": True} for token in content.get("added_tokens", [])]
    theirs = read_pipeline(content | {"added_tokens": added})
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    for text in [*PROBES, *tokenizer.specials]:
        if isinstance(tokenizer, CharTokenizer):
            text = "".join(char for char in text if char in tokenizer.chars)
        ids = tokenizer.encode(text).tolist()
        if theirs.encode(text, add_special_tokens=False).ids != ids:
            raise UserError(f"Hugging Face's tokenizer has other ids for the text {text!r}")
        if theirs.decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
            raise UserError(f"Hugging Face's tokenizer decodes the ids of {text!r} differently")
