"""Tokenizers written for the `tokenizers` library give its ids, and so do those that are read."""

import copy
import functools
import json
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from conftest import make_text
from hypothesis import strategies as st

from config import ENCODINGS
from corpus.bpe import count_pieces, train_bpe
from exporting.hf_tokenizer import (
    KNOWN_PATTERNS,
    LLAMA3_PATTERN,
    check_equal,
    merges_of,
    split_rule,
    tokenizer_from_hf,
    tokenizer_to_hf,
)
from system.settings import UserError
from tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    PRINTABLE,
    QA_SPECIALS,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    to_printable,
)

library = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
openai_public = pytest.importorskip("tiktoken_ext.openai_public")

# Texts that are hard to split: contractions, digits, runs of whitespace, several scripts.
PARTS = [" ", "  ", "\n", "\r\n", "\t", "\xa0", "\u3000"]
PARTS += "'s 'S 'll 'Re 12 345 ½ ² ٣ é e\u0301 \u017f Ω 日本 हि 🙂 word Word WORD . !?".split(" ")
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.characters(codec="utf-8")), max_size=30)
FUZZ = hypothesis.settings(max_examples=100)


@functools.cache
def learned_ranks() -> dict[bytes, int]:
    """Merges learned from English, digits, whitespace and other scripts."""
    text = make_text() + "it's we'll 12 345 1999 2024\n\n  indented\n" * 20 + "héé 日本語 🙂" * 5
    return train_bpe(count_pieces([text]), 420).ranks


def bpe(pattern: str = GPT2_PATTERN, specials: dict[str, int] | None = None) -> BPETokenizer:
    return BPETokenizer(learned_ranks(), specials or {END_OF_TEXT: 500}, pattern)


def theirs_of(content: dict[str, Any]) -> Any:
    theirs = library.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    return theirs


def in_transformers(content: dict[str, Any]) -> Any:
    theirs = library.Tokenizer.from_str(json.dumps(content))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=theirs)


def assert_same_ids(ours: Tokenizer, encode: Callable[[str], list[int]]) -> None:
    @FUZZ
    @hypothesis.given(TEXTS)
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        ids = ours.encode(text).tolist()
        assert encode(text) == ids and ours.decode(ids) == text

    check()


@pytest.mark.parametrize("pattern", sorted(KNOWN_PATTERNS))
def test_all_known_patterns_split_alike(pattern):
    ours = bpe(pattern)
    content = tokenizer_to_hf(ours)
    theirs = theirs_of(content)
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": pattern}
    assert tokenizer_from_hf(content).to_dict() == ours.to_dict()
    assert_same_ids(ours, lambda text: theirs.encode(text).ids)


@pytest.mark.parametrize("name", ENCODINGS)
def test_tokenizers_with_the_patterns_of_tiktoken_are_exported(monkeypatch, name):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **settings: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **settings: {})
    pattern = getattr(openai_public, name)()["pat_str"]
    ours = bpe(pattern)
    back = tokenizer_from_hf(tokenizer_to_hf(ours))
    assert isinstance(back, BPETokenizer) and back.pattern in KNOWN_PATTERNS
    assert_same_ids(ours, lambda text: back.encode(text).tolist())


def test_special_tokens_keep_their_ids_with_gaps_between_them():
    ours = bpe(specials={"<|a|>": 450, "<|b|>": 600, "<|c|>": 421})
    content = tokenizer_to_hf(ours)
    words = in_transformers(content)
    assert words("<|a|><|b|><|c|>").input_ids == [450, 600, 421]
    assert words.decode([600, 450]) == "<|b|><|a|>"
    assert tokenizer_from_hf(content).to_dict() == ours.to_dict()


def test_a_token_that_no_lower_merge_makes_is_still_found():
    # "abc" has a lower id than both "ab" and "bc", so it is only found as a full piece, or once
    # "ab" was merged, as in tiktoken.
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256, b"xyz": 257, b"ab": 258}
    ours = BPETokenizer(ranks, {}, GPT2_PATTERN)
    theirs = theirs_of(tokenizer_to_hf(ours))
    assert list(merges_of(ours)) == [(b"ab", b"c"), (b"a", b"b")]
    cases = {"abc": [256], "xyz": [257], "xyza": [120, 121, 122, 97], "zabc": [122, 256]}
    for text, ids in cases.items():
        assert theirs.encode(text).ids == ours.encode(text).tolist() == ids


@pytest.mark.parametrize("specials", [(), (END_OF_TEXT,), QA_SPECIALS])
def test_an_unknown_character_is_left_out(specials):
    ours = CharTokenizer.train(["ab \n"], specials)
    words = in_transformers(tokenizer_to_hf(ours))
    assert len(words) == ours.vocab_size
    assert words("aéb日d\n").input_ids == ours.encode("ab\n").tolist()


@FUZZ
@hypothesis.given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_characters_of_every_script_have_the_same_ids(text):
    ours = CharTokenizer.train([text])
    content = tokenizer_to_hf(ours)
    assert theirs_of(content).encode(text).ids == ours.encode(text).tolist()
    assert tokenizer_from_hf(content).to_dict() == ours.to_dict()


def byte_level(add_prefix_space: bool = False, use_regex: bool = True) -> dict[str, Any]:
    values = {"add_prefix_space": add_prefix_space, "trim_offsets": False, "use_regex": use_regex}
    return {"type": "ByteLevel"} | values


def steps_of(content: dict[str, Any]) -> list[Any]:
    return content["pre_tokenizer"]["pretokenizers"]


def as_gpt2(content: dict[str, Any]) -> None:
    """As in the file of OpenAI's GPT-2: merges are strings, ByteLevel has the pattern."""
    content["pre_tokenizer"] = content["decoder"] = byte_level()
    content["post_processor"] = byte_level()
    content["model"] = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "vocab": content["model"]["vocab"],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }


def as_llama3(content: dict[str, Any]) -> None:
    """As in the files of Llama 3: all pairs that make a token are merges, a template adds <BOS>."""
    vocab = content["model"]["vocab"]
    content["pre_tokenizer"]["pretokenizers"][0] = split_rule(LLAMA3_PATTERN)
    content["model"]["merges"] = [
        f"{token[:i]} {token[i:]}"
        for token in sorted(vocab, key=vocab.__getitem__)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab and token != END_OF_TEXT
    ]
    piece = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [piece, text], "pair": [text]}
    ids = {"id": END_OF_TEXT, "ids": [500], "tokens": [END_OF_TEXT]}
    template["special_tokens"] = {END_OF_TEXT: ids}
    content["post_processor"] = {"type": "Sequence", "processors": [byte_level(), template]}


def as_smollm(content: dict[str, Any]) -> None:
    """As in the files of SmolLM: digits are separated first."""
    steps = [{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize("rewrite", [as_gpt2, as_llama3, as_smollm])
def test_other_forms_of_the_same_pipeline_are_imported(rewrite):
    content = tokenizer_to_hf(bpe())
    rewrite(content)
    ours, theirs = tokenizer_from_hf(content), theirs_of(content)
    assert_same_ids(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids)


def rename_token(content: dict[str, Any], old: str, new: str) -> None:
    vocab = content["model"]["vocab"]
    vocab[new] = vocab.pop(old)


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def add_token(tokenizer: dict[str, Any], **values: Any) -> None:
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | values)


ADDED = {"content": "the", "id": 501, "special": False}
BYTES = byte_level(use_regex=False)
DIGITS = {"type": "Digits", "individual_digits": True}
REMOVED = split_rule(GPT2_PATTERN) | {"behavior": "Removed"}
INVERTED = split_rule(GPT2_PATTERN) | {"invert": True}
AT_SPACES = split_rule(GPT2_PATTERN) | {"pattern": {"String": " "}}
METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
BERT = {"type": "BertProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0]}
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
LOWER = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}
WORD_PIECE = {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}}
HASHES = {"continuing_subword_prefix": "##"}
WORD_PIECE |= HASHES | {"max_input_chars_per_word": 100}
Change = Callable[[dict[str, Any]], Any]
UNSUPPORTED: list[tuple[str, Change]] = [
    ("normalizer .*'NFC'", lambda c: c.update(normalizer={"type": "NFC"})),
    ("normalizer .*'Strip'", lambda c: c.update(normalizer=STRIP)),
    ("normalizer .*'Lowercase'", lambda c: c.update(normalizer=LOWER)),
    ("'add_prefix_space': True", lambda c: c.update(pre_tokenizer=byte_level(True))),
    ("'use_regex': False", lambda c: c.update(pre_tokenizer=BYTES)),
    ("pre_tokenizer .*'Whitespace'", lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
    ("pre_tokenizer None", lambda c: c.update(pre_tokenizer=None)),
    ("'Digits'", lambda c: steps_of(c).insert(0, DIGITS)),
    ("pre_tokenizer ", lambda c: steps_of(c).append({"type": "WhitespaceSplit"})),
    ("'Removed'", lambda c: steps_of(c).__setitem__(0, REMOVED)),
    ("'invert': True", lambda c: steps_of(c).__setitem__(0, INVERTED)),
    ("'String'", lambda c: steps_of(c).__setitem__(0, AT_SPACES)),
    ("'Split'", lambda c: steps_of(c).__setitem__(0, split_rule(".+"))),
    ("decoder.type None", lambda c: c.update(decoder=None)),
    ("decoder.type 'Metaspace'", lambda c: c.update(decoder=METASPACE)),
    ("post_processor.type 'BertProcessing'", lambda c: c.update(post_processor=BERT)),
    ("model.type 'Unigram'", lambda c: c.update(model=UNIGRAM, added_tokens=[])),
    ("model.type 'WordPiece'", lambda c: c.update(model=WORD_PIECE, added_tokens=[])),
    ("model.dropout 0.1", lambda c: c["model"].update(dropout=0.1)),
    ("byte_fallback True", lambda c: c["model"].update(byte_fallback=True)),
    ("continuing_subword_prefix '##'", lambda c: c["model"].update(HASHES, merges=[])),
    ("end_of_word_suffix '</w>'", lambda c: c["model"].update(end_of_word_suffix="</w>")),
    ("no token for the byte 0x41", lambda c: rename_token(c, "A", "QQQ")),
    ("token '日本' is not one of bytes", lambda c: rename_token(c, "A", "日本")),
    ("the id 1000000000 is too large", lambda c: c["model"]["vocab"].update(A=10**9)),
    ("different texts have the same id", lambda c: c["model"]["vocab"].update(A=7)),
    ("is invalid", lambda c: c["model"]["vocab"].update(A=-7)),
    ("is invalid", lambda c: c.update(model=None)),
    ("is invalid: .*AQ", lambda c: c["model"]["merges"].append(["A", "Q"])),
    ("are not among the merges", lambda c: c["model"]["merges"].pop()),
    ("not in the order of the ids", swap_merges),
    ("added token 'the' is not supported", lambda c: add_token(c, **ADDED)),
    ("added token '<.*does not get the id 501", lambda c: add_token(c, id=501)),
    ("is invalid", lambda c: add_token(c, content=None)),
    ("added token '<x>' does not get the id 5", lambda c: add_token(c, content="<x>", id=5)),
    ("does not get the id 500", lambda c: c["model"]["vocab"].update({END_OF_TEXT: 999})),
]
UNSUPPORTED_CHARS: list[tuple[str, Change]] = [
    ("ids from 0 without gaps", lambda c: c["model"]["vocab"].update(a=9)),
    ("ids from 0 without gaps", lambda c: c["model"].update(vocab={"b": 1, "a": 2, "\n": 0})),
    ("words of one character", lambda c: c["model"]["vocab"].update(ab=4)),
    ("words of one character", lambda c: c["model"].update(vocab={})),
    ("normalizer .*'NFC'", lambda c: c.update(normalizer={"type": "NFC"})),
    ("pre_tokenizer .*'Whitespace'", lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
    ("decoder.type None", lambda c: c.update(decoder=None)),
    ("post_processor.type 'BertProcessing'", lambda c: c.update(post_processor=BERT)),
]


@pytest.mark.parametrize(
    ("tokenizer", "message", "change"),
    [
        *((bpe(), *case) for case in UNSUPPORTED),
        *((CharTokenizer.train(["abc\n"]), *case) for case in UNSUPPORTED_CHARS),
    ],
)
def test_components_that_are_not_known_to_be_equal_are_named(tokenizer, message, change):
    content = tokenizer_to_hf(tokenizer)
    change(content)
    with pytest.raises(UserError, match=message) as error:
        tokenizer_from_hf(content)
    assert "\n" not in str(error.value)


def test_tokens_that_no_merge_makes_need_ignore_merges():
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256}
    content = tokenizer_to_hf(BPETokenizer(ranks, {}, GPT2_PATTERN))
    tokenizer_from_hf(content)
    content["model"]["ignore_merges"] = False
    with pytest.raises(UserError, match="tokens that no merge makes"):
        tokenizer_from_hf(content)


def test_a_difference_is_reported_with_the_first_text():
    ours, content = bpe(), tokenizer_to_hf(bpe())
    other = copy.deepcopy(content)
    other["pre_tokenizer"] = byte_level(True)
    with pytest.raises(UserError, match="other ids for the text 'The quick brown fox"):
        check_equal(ours, other)
    other = content | {"decoder": {"type": "Fuse"}}
    with pytest.raises(UserError, match=r"decodes the ids of 'The quick .* differently"):
        check_equal(ours, other)
    with pytest.raises(UserError, match=r"the tokenizer is invalid: "):
        check_equal(ours, content | {"model": {"type": "none"}})


def test_digits_that_tiktoken_groups_are_not_exported_in_other_groups():
    # In the library's regular expressions, {1,3}+ matches any number of digits.
    ours = bpe(LLAMA3_PATTERN.replace("{1,3}", "{1,3}+"))
    content = tokenizer_to_hf(ours)
    assert theirs_of(content).encode("1999345").ids == ours.encode("1999345").tolist()
    content["pre_tokenizer"]["pretokenizers"][0] = split_rule(ours.pattern)
    with pytest.raises(UserError, match="other ids for the text"):
        check_equal(ours, content)


def test_random_vocabularies_give_the_same_ids():
    rng = random.Random(0)
    for _ in range(20):
        tokens = {bytes([b]): b for b in range(256)}
        parts = [b"a", b"b", b"c", b" "]
        for i in range(256, 300):
            token = rng.choice(parts) + rng.choice(parts)
            if token not in tokens and to_printable(token).count(PRINTABLE[32]) < 2:
                tokens[token] = i
                parts.append(token)
        ours = BPETokenizer(tokens, {}, GPT2_PATTERN)
        theirs = theirs_of(tokenizer_to_hf(ours))
        for _ in range(100):
            text = "".join(rng.choices("abc ", k=rng.randrange(12)))
            assert theirs.encode(text).ids == ours.encode(text).tolist() == ours.encode_plain(text)


@pytest.mark.parametrize("specials", [(), QA_SPECIALS])
def test_what_transformers_saves_again_is_imported(tmp_path, specials):
    for ours in (CharTokenizer.train([make_text()], specials), bpe()):
        in_transformers(tokenizer_to_hf(ours)).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        assert tokenizer_from_hf(content).to_dict() == ours.to_dict()
