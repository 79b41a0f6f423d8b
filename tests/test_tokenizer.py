"""Text to ids and back: characters, byte pairs, tiktoken's bpe."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise, repeat
from unittest.mock import Mock

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as tokenizers
from config import ENCODINGS
from corpus import bpe
from corpus.bpe import count_pieces, learn_merges, train_bpe
from system.settings import UserError
from tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    MAX_PIECE,
    QA_SPECIALS,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    from_dict,
)


def test_ids_follow_the_sorted_characters():
    tokenizer = CharTokenizer.train(["hello, wörld\n"])
    assert tokenizer.chars == sorted(set("hello, wörld\n"))
    assert tokenizer.encode("\n ,").tolist() == [0, 1, 2]
    assert tokenizer.vocab_size == 11


@given(st.text(min_size=1), st.text())
def test_a_tokenizer_survives_its_dict(text: str, other: str):
    tokenizer = CharTokenizer.train([text], ["<BOS>"])
    copy = from_dict(tokenizer.to_dict())
    assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert copy.decode(copy.encode(text)) == text
    assert copy.unknown(other) == sorted(set(other) - set(text))
    assert copy.specials == {"<BOS>": 0}


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match="'z', 'ü'"):
        CharTokenizer.train(["abc"]).encode("abzcü")


def test_special_tokens_come_first_and_unknown_characters_become_one_of_them():
    tokenizer = CharTokenizer.train(["ab"], QA_SPECIALS)
    assert tokenizer.specials == {"<PAD>": 0, "<UNK>": 1, "<BOS>": 2, "<EOS>": 3}
    assert tokenizer.encode("azb").tolist() == [4, 1, 5]
    assert tokenizer.decode([2, 4, 3]) == "<BOS>a<EOS>"


def test_an_unknown_or_incomplete_tokenizer_is_rejected():
    with pytest.raises(UserError, match="'magic'"):
        from_dict({"kind": "magic"})
    incomplete, doubled, shared, negative = (BPE.to_dict() for _ in range(4))
    del incomplete["ranks"]["!"]
    negative["ranks"]["!"] = -1
    doubled["ranks"]["!"] = doubled["ranks"]["?"]
    shared["specials"] = {"<x>": shared["ranks"]["!"]}
    for data in (incomplete, doubled, shared, negative):
        with pytest.raises(UserError, match="a token for every byte, and different ids"):
            from_dict(data)
    for pattern in ("", "a*", "|a"):
        with pytest.raises(UserError, match="matches an empty one"):
            from_dict(BPE.to_dict() | {"pattern": pattern})


def naive_merges(counts: Counter[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The definition: count all pairs again for every merge."""
    words = [([bytes([b]) for b in piece.encode()], n) for piece, n in counts.items()]
    known = {bytes([b]) for b in range(256)}
    merges = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, n in words:
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        for word, _ in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
        if left + right not in known:
            known.add(left + right)
            merges.append((left, right))
    return merges


letters = st.lists(st.text(alphabet="abé \n", max_size=30), max_size=8)
words = st.lists(st.sampled_from("the then other there mother loth ether".split()), min_size=50)


@settings(max_examples=300)
@given(letters | words.map(lambda words: [" ".join(words)]), st.integers(1, 100))
def test_merges_equal_those_of_counting_everything_again(texts: list[str], n_merges: int):
    counts = count_pieces(texts)
    assert learn_merges(counts, n_merges) == naive_merges(counts, n_merges)


def test_merges_of_the_worked_example_of_sennrich_et_al_2016():
    # The paper's toy vocabulary: low 5, lower 2, newest 6, widest 3. Its first three merges, e+s,
    # es+t and (with its end-of-word mark left out) l+o, hold here but for the ties.
    counts = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    merges = learn_merges(counts, 4)
    assert merges == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow")]


def test_pieces_are_those_of_gpt2():
    counts = count_pieces(["I'll pay  £30, they've said:\n\n ok"])
    pieces = ["I", "'ll", " pay", " ", " £", "30", ",", " they", "'ve", " said", ":", "\n\n", " ok"]
    assert counts == Counter(pieces)


LESSON = "the cat sat on the mat, and that cat's 42 hats — naïve, 日本語 — lay there too.\n" * 3


def make_bpe(vocab_size: int = 330, first: tuple[str, ...] = ()) -> BPETokenizer:
    return train_bpe(count_pieces([LESSON]), vocab_size, first)


BPE = make_bpe()


def test_special_tokens_have_the_ids_that_were_asked_for():
    tokenizer = make_bpe(300, QA_SPECIALS)
    assert [tokenizer.specials[text] for text in QA_SPECIALS] == [0, 1, 2, 3]
    assert tokenizer.specials[END_OF_TEXT] == 299 and tokenizer.vocab_size == 300
    assert tokenizer.encode("\x00\xff"[0]).tolist() == [4]  # the bytes follow
    assert tokenizer.decode([2, *tokenizer.encode("cat").tolist(), 3]) == "<BOS>cat<EOS>"


def test_too_little_text_gives_a_smaller_vocabulary():
    tokenizer = train_bpe(Counter({"ab": 1}), 1000)
    assert tokenizer.vocab_size == 258  # the bytes, ab, the end of text
    assert tokenizer.encode("ab").tolist() == [256]


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="at least 257"):
        make_bpe(100)


words_and_anything = st.text() | st.text(alphabet="the catsonm,42 '\n—ï日本")


@given(words_and_anything)
def test_the_compiled_encoder_equals_the_plain_one(text: str):
    assert BPE.encode(text).tolist() == BPE.encode_plain(text)


@given(st.lists(st.integers(0, 400)))
def test_any_ids_decode_without_a_crash(ids: list[int]):
    assert isinstance(BPE.decode(ids), str)


def test_invalid_bytes_decode_to_the_replacement_character():
    assert BPE.decode([0xE6, 0x97, ord("a")]) == "\ufffda"


@given(words_and_anything)
def test_text_that_reads_like_a_special_token_stays_text(text: str):
    ids = BPE.encode(text + END_OF_TEXT)
    assert BPE.specials[END_OF_TEXT] not in ids
    assert BPE.decode(ids.tolist()) == text + END_OF_TEXT


def test_a_byte_pair_tokenizer_survives_json():
    copy = from_dict(json.loads(json.dumps(BPE.to_dict())))
    assert copy.to_dict() == BPE.to_dict()
    assert copy.encode(LESSON).tolist() == BPE.encode(LESSON).tolist()
    assert "Ġthe" in BPE.to_dict()["ranks"]  # and people can read it


# As in tiktoken 0.14 for GPT-2, GPT-4 and GPT-4o
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = [GPT2_PATTERN, R50K, CL100K, O200K, r"\w+ ?|[^\w]+"]  # the last joins words and spaces
SPECIALS = (END_OF_TEXT, "<s>", "</s>")
# What texts are made of: words, runs, contractions, marks, and pieces of special tokens
FRAGMENTS = [
    *("the", "Cat", "I'll", "'RE", "don't", "日本語", "かな。", "。", "e\u0301", "ʰ", "42", "½"),
    *("...", "/", "!?", "👍🏽", "_", "'", "\x1c", "\x85", "\u200b"),
    *(" ", " ", "  ", "\n", "\n", "\r\n", "\t", "\u00a0", "\u3000"),
    *("<s>", "<s", "><s>", "</s>", "<", END_OF_TEXT),
]


def random_text(rng: random.Random, n_fragments: int) -> str:
    """Fragments of a few kinds, because all kinds together rarely make a long run."""
    kinds = rng.sample(FRAGMENTS, rng.choice([2, 4, 12]))
    return "".join(rng.choice(kinds) * rng.choice([1, 1, 1, 2, 5]) for _ in range(n_fragments))


# Merges across the boundaries of all patterns, so that the ids show where a text was cut
RANKS = train_bpe(Counter(random_text(random.Random(i), 30) for i in range(99)), 2000).ranks
WITH_PATTERN = [
    BPETokenizer(RANKS, {text: 2000 + i for i, text in enumerate(SPECIALS)}, pattern)
    for pattern in PATTERNS
]
CHARS = CharTokenizer.train(["abc日本。 \n<s>/|endoftx"], (*SPECIALS, "<s><s>"))
SMALL = 24  # characters per piece, instead of MAX_PIECE, to have many cuts in short texts


def tiktoken_ids(tokenizer: BPETokenizer, text: str, allowed: object) -> list[int]:
    return tokenizer.encoding.encode(text, allowed_special=allowed, disallowed_special=())


def in_parts(text: str, sizes: list[int]) -> Iterator[str]:
    """The text in parts of these sizes, again and again."""
    start = 0
    while start < len(text):
        for size in sizes:
            yield text[start : start + size]
            start += size


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "MAX_PIECE", SMALL)


@pytest.mark.parametrize("tokenizer", WITH_PATTERN)
def test_ids_equal_tiktokens_wherever_a_long_text_is_cut(small_pieces, tokenizer):
    rng, n_compared = random.Random(0), 0
    for i in range(600):
        text = random_text(rng, 80)
        allowed: object = [set(), {"<s>", "</s>"}, "all"][i % 3]
        if max(len(piece[0]) for piece in regex.finditer(tokenizer.pattern, text)) <= SMALL:
            n_compared += 1
            found = tokenizer.encode(text, allowed).tolist()
            assert found == tiktoken_ids(tokenizer, text, allowed), repr(text)
    assert n_compared > 200


def test_tiktokens_pattern_for_gpt2_gives_the_pieces_of_the_original_one():
    rng = random.Random(0)
    for _ in range(600):
        text = random_text(rng, 80)
        assert regex.findall(GPT2_PATTERN, text) == regex.findall(R50K, text), repr(text)


@pytest.mark.parametrize("tokenizer", [*WITH_PATTERN, CHARS])
def test_a_stream_has_the_ids_of_the_joined_text(small_pieces, tokenizer):
    rng = random.Random(0)
    for i in range(300):
        text = random_text(rng, 40)
        if tokenizer is CHARS:
            text = "".join(c for c in text if c in CHARS.chars)
        sizes = [rng.choice([0, 1, 3, 50]) for _ in range(4)] + [1]
        allowed: object = [(), ["<s>"], "all"][i % 3]
        ids = tokenizer.encode_iterable(in_parts(text, sizes), allowed)
        assert list(ids) == tokenizer.encode(text, allowed).tolist(), repr(text)


@pytest.mark.parametrize("tokenizer", WITH_PATTERN)
@pytest.mark.parametrize("text", [" ", "\n", "日", "日本。", "7", "!", "a ", "' ", "\n \n", "A"])
def test_long_runs_are_divided_only_where_a_piece_is_longer_than_the_limit(tokenizer, text):
    text = "a" + text * (MAX_PIECE // len(text) - 2) + "b"  # shorter than the limit: not divided
    assert tokenizer.encode(text * 2).tolist() == tiktoken_ids(tokenizer, text * 2, set())


@pytest.mark.parametrize("char", [" ", "日"])
@pytest.mark.parametrize("tokenizer", WITH_PATTERN)
def test_a_piece_longer_than_the_limit_is_divided_at_the_limit(tokenizer, char):
    text = char * (3 * MAX_PIECE + 9)
    parts = in_parts(text, [MAX_PIECE])
    ids = [i for part in parts for i in tiktoken_ids(tokenizer, part, set())]
    assert tokenizer.encode(text).tolist() == ids
    assert list(tokenizer.encode_iterable(in_parts(text, [999]))) == ids


@pytest.mark.parametrize("tokenizer", [*WITH_PATTERN, CHARS])
def test_a_stream_without_end_is_encoded_as_it_comes(tokenizer):
    ids = islice(tokenizer.encode_iterable(repeat("日本 " * 10)), 200_000)
    assert tokenizer.decode(list(ids)).startswith("日本 日本 ")


@pytest.mark.parametrize("tokenizer", [BPE, CHARS])
def test_special_tokens_are_encoded_only_if_they_are_allowed(tokenizer: Tokenizer):
    text = f"<s>a{END_OF_TEXT}"
    end = tokenizer.specials[END_OF_TEXT]
    assert end not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    for allowed in ("all", {END_OF_TEXT}, [END_OF_TEXT]):
        ids = tokenizer.encode(text, allowed_special=allowed).tolist()
        assert ids[-1] == end and ids.count(end) == 1 and tokenizer.decode(ids) == text
    with pytest.raises(UserError, match="no special token '<magic>'"):
        tokenizer.encode(text, allowed_special={"<magic>"})


def test_of_several_special_tokens_the_longest_counts():
    ids = CHARS.encode("<s><s><s>", "all").tolist()
    assert ids == [CHARS.specials["<s><s>"], CHARS.specials["<s>"]]


def test_gpt2_ids_are_the_published_ones_and_those_of_tiktoken():
    try:
        gpt2 = bpe.from_tiktoken("gpt2", seconds=5)
    except UserError as error:
        pytest.skip(str(error))
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.specials == {END_OF_TEXT: 50256} and gpt2.vocab_size == 50257
    copy = from_dict(gpt2.to_dict())
    theirs = tiktoken.get_encoding("gpt2").encode_ordinary(LESSON)
    assert copy.encode(LESSON).tolist() == theirs == copy.encode_plain(LESSON)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_silent_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(bpe.tiktoken, "get_encoding", lambda name: time.sleep(60))
    began = time.perf_counter()
    with pytest.raises(UserError, match=f"encoding {name} could not be downloaded .not complete a"):
        bpe.from_tiktoken(name, seconds=0.1)
    assert time.perf_counter() - began < 30


def test_a_slow_download_is_announced(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(bpe, "NOTE_AFTER", 0.01)

    def slow(name: str) -> tiktoken.Encoding:
        time.sleep(0.2)
        return BPE.encoding

    monkeypatch.setattr(bpe.tiktoken, "get_encoding", slow)
    assert bpe.from_tiktoken("cl100k_base").vocab_size == BPE.vocab_size
    expected = "note: loading the encoding cl100k_base; its first use downloads up to 4 MB\n"
    assert capsys.readouterr().err == expected


def test_no_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    error = ConnectionError("no route to host")
    monkeypatch.setattr(bpe.tiktoken, "get_encoding", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"ConnectionError.*TIKTOKEN_CACHE_DIR.*--tokenizer bpe"):
        bpe.from_tiktoken("gpt2")


def test_a_downloaded_encoding_keeps_its_special_tokens(monkeypatch: pytest.MonkeyPatch):
    ranks = {bytes([b]): b for b in range(256)}
    theirs = tiktoken.Encoding("x", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                               special_tokens={"<|endoftext|>": 300})  # fmt: skip
    monkeypatch.setattr(bpe.tiktoken, "get_encoding", lambda name: theirs)
    ours = bpe.from_tiktoken("cl100k_base")
    assert ours.specials == {"<|endoftext|>": 300} and ours.vocab_size == 301
    assert ours.pattern == r"\S+|\s+" and ours.encode("a b").tolist() == [97, 32, 98]
    for name in ("gpt2", "r50k_base"):  # equal to an imported GPT-2's
        assert bpe.from_tiktoken(name).pattern == GPT2_PATTERN


@pytest.mark.parametrize("chars", ["ba", "aa"])
def test_characters_that_are_not_sorted_are_rejected(chars: str):
    with pytest.raises(UserError, match="the characters are not sorted, or not different"):
        from_dict({"kind": "char", "chars": list(chars), "specials": []})
