"""Texts become documents, documents a corpus: what train.py --data takes."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_text
from hypothesis import given
from hypothesis import strategies as st

import corpora
import utils
from config import UserError
from tokenizer import END_OF_TEXT, CharTokenizer

STORIES = [f"story {i}: " + "so it goes, " * (i % 7) + "the end." for i in range(60)]


def write_jsonl(path: Path, texts: list[str] = STORIES, field: str = "text") -> Path:
    lines = (json.dumps({"n": i, field: text}) for i, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, **settings: object) -> list[tuple[str, bool]]:
    return list(corpora.documents(path, **settings))


# --- one text, several documents, records


@pytest.mark.parametrize(("kind", "vocab_size"), [("char", 0), ("bpe", 300), ("bpe", 400)])
def test_one_text_is_split_at_nine_tenths_whatever_the_tokenizer(tmp_path, kind, vocab_size):
    text = make_text()
    (tmp_path / "text.txt").write_text(text)
    tokenizer, corpus = corpora.load_corpus(str(tmp_path / "text.txt"), kind, vocab_size)
    n = len(text) * 9 // 10
    assert tokenizer.decode(corpus.train_ids.tolist()) == text[:n]
    assert tokenizer.decode(corpus.val_ids.tolist()) == text[n:]
    assert (corpus.train_bytes, corpus.val_bytes) == (n, len(text) - n)
    assert corpus.train_docs is None and corpus.separator is None
    assert corpus.train_ids.dtype == (np.uint16 if vocab_size else np.uint8)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_documents_are_whole_in_one_split_and_begin_with_end_of_text(tmp_path, kind):
    path = write_jsonl(tmp_path / "stories.jsonl")
    tokenizer, corpus = corpora.load_corpus(str(path), kind, 300)
    splits = [tokenizer.decode(ids.tolist()) for ids in (corpus.train_ids, corpus.val_ids)]
    found = [text.split(END_OF_TEXT)[1:] for text in splits]
    assert sorted(found[0] + found[1]) == sorted(STORIES) and all(found)
    assert (corpus.train_ids[corpus.train_docs] == corpus.separator).all()
    assert len(corpus.train_docs) == len(found[0]) and corpus.info["documents"] == 60
    assert corpus.val_bytes == len("".join(found[1]).encode())


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_records_become_a_corpus_between_bos_and_eos(tmp_path, kind):
    records = [
        {"question": f"What is {i}?", "answer": f"One more than {i - 1}."} for i in range(30)
    ]
    (tmp_path / "qa.json").write_text(json.dumps(records))
    tokenizer, corpus = corpora.load_corpus(str(tmp_path / "qa.json"), kind, 300)
    text = tokenizer.decode(corpus.train_ids.tolist())
    assert text.startswith("<BOS>Question: What is 0?\nAnswer: One more than -1.<EOS><BOS>")
    assert corpus.separator == 2 and tokenizer.specials["<PAD>"] == 0


def test_the_share_drawn_for_validation_is_near_the_one_asked_for():
    drawn = sum(corpora.is_validation(i, 0.1) for i in range(10_000))
    assert abs(drawn - 1000) < 4 * 30  # four standard deviations of a binomial
    assert not corpora.is_validation(0, 0.999)


def test_two_documents_are_one_to_train_and_one_to_validate_on():
    for texts in ("ab", "abc"):
        train, val = corpora.split_documents(list(texts))
        assert train and val and sorted(train + val) == list(texts)
    with pytest.raises(UserError, match="two documents at least"):
        corpora.split_documents(["a"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere.txt", r"there is no nowhere\.txt"),
        ("tinystories", r"python prepare\.py tinystories"),
        (".", r"no data set that prepare\.py made"),
    ],
)
def test_a_corpus_that_is_not_there_is_an_error(workplace, data, message):
    with pytest.raises(UserError, match=message):
        corpora.load_corpus(data, "char", 0)


@pytest.mark.parametrize("name", ["plays", "tinystories", "shakespeare"])
def test_a_file_goes_before_a_name(workplace, monkeypatch, name):
    monkeypatch.setattr(corpora, "fetch", lambda name: 1 / 0)
    (workplace / name).write_text("of my own")
    assert corpora.find_corpus(name) == Path(name)


def test_a_large_text_is_for_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "IN_MEMORY", 100)
    (tmp_path / "large.txt").write_text("a" * 101)
    with pytest.raises(UserError, match=r"run `python prepare\.py .*large\.txt"):
        corpora.load_corpus(str(tmp_path / "large.txt"), "char", 0)


def test_a_tokenizer_without_a_separator_cannot_take_documents(tmp_path):
    path = write_jsonl(tmp_path / "stories.jsonl")
    tokenizer = CharTokenizer.train(STORIES)
    with pytest.raises(UserError, match=r"no <.endoftext.> to begin"):
        corpora.load_corpus(str(path), "char", 0, tokenizer)


# --- files to documents


def test_a_text_file_is_one_document_or_cut_at_separators(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n--\r\ntwo")
    assert read(path) == [("one\n--\ntwo", True)]
    assert read(path, separator="\n--\n") == [("one", True), ("two", True)]
    assert read(path, separator=END_OF_TEXT) == [("one\n--\ntwo", True)]


@given(st.text(alphabet="ab|\n", max_size=60), st.integers(1, 9))
def test_cutting_does_not_depend_on_the_blocks(text: str, size: int):
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    assert [piece for piece, _ in corpora.cut(blocks, "|\n")] == text.split("|\n")
    parts = list(corpora.cut(blocks, "", part_size=size))
    assert "".join(part for part, _ in parts) == text
    assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part) <= size for part, _ in parts)


def test_characters_are_whole_over_the_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "BLOCK_SIZE", 5)
    (tmp_path / "text.txt").write_bytes("日本語\r\nnaïve".encode())
    assert read(tmp_path / "text.txt") == [("日本語\nnaïve", True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"123456 \xe9t\xe9", r"not UTF-8 text \(byte 7 is 0xe9\)"),
        (b"1234567\xe6\x97", r"not UTF-8 text \(byte 7 is 0xe6\)"),
        (b"1234567\x00", r"binary file \(byte 7 is 0\)"),
    ],
)
def test_what_is_not_text_is_refused_with_its_place(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(utils, "BLOCK_SIZE", 4)
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "text.txt")


def test_bad_bytes_can_be_replaced(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xe9t\xe9")
    assert read(tmp_path / "text.txt", bad_bytes="replace") == [("\ufffdt\ufffd", True)]


def test_jsonl_records_are_documents(tmp_path):
    path = write_jsonl(tmp_path / "posts.jsonl", ["one\nline", "two \u2028 three"], "body")
    assert read(path, text_field="body") == [("one\nline", True), ("two \u2028 three", True)]


def test_half_characters_in_json_become_question_marks(tmp_path):
    (tmp_path / "posts.JSONL").write_text('{"text": "a \\ud83d b"}')
    assert read(tmp_path / "posts.JSONL") == [("a ? b", True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "b"}', "line 2: no text in 'text' .there is text in: title.*--text_field"),
        ('{"text": 5}', "line 2: no text in 'text'"),
        ("[1]", "line 2: no text .* in no field"),
        ('{"text": "b"', "line 2: no JSON"),
        ('{"n": ' + "9" * 5000 + "}", "line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    path = tmp_path / "posts.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(path)
