"""Question/answer records and preference pairs: reading, validation, encoding, batches."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model

from corpus import records
from corpus.bpe import count_pieces, train_bpe
from finetuning.records import pad_batch
from system.settings import UserError
from tokenizer import QA_SPECIALS, CharTokenizer

RECORDS = [
    {"id": 1, "category": "parts", "question": "What turns?", "answer": "Queries and keys."},
    {"question": "Why?", "answer": "So."},
]
TEXTS = [records.record_text(record) for record in RECORDS]
TOKENIZERS = [
    CharTokenizer.train(TEXTS, QA_SPECIALS),
    train_bpe(count_pieces(TEXTS), 280, QA_SPECIALS),
]


PAIRS = [
    {"prompt": "the fox", "chosen": " sleeps\n", "rejected": " jumps\n"},
    {"prompt": "the dog", "chosen": "\n", "rejected": " sleeps\n"},
]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_record_is_encoded_between_bos_and_eos(tokenizer):
    ids, n_prompt = records.encode_record(tokenizer, RECORDS[1])
    assert tokenizer.decode(ids.tolist()) == "<BOS>Question: Why?\nAnswer: So.<EOS>"
    assert tokenizer.decode(ids[:n_prompt].tolist()) == "<BOS>Question: Why?\nAnswer:"
    assert (ids[0], ids[-1]) == (2, 3)
    together = tokenizer.encode("Question: Why?\nAnswer: So.")
    assert ids[1:-1].tolist() == together.tolist()  # splitting it changes no token


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_targets_are_the_answers_only_and_padding_is_at_the_right(tokenizer):
    examples = [records.encode_record(tokenizer, record) for record in RECORDS]
    x, y = pad_batch(examples, pad=0)
    assert x.shape == y.shape == (2, len(examples[0][0]) - 1)
    for row, (ids, n_prompt) in enumerate(examples):
        n = len(ids) - 1
        assert x[row, :n].tolist() == ids[:-1].tolist()
        assert (x[row, n:] == 0).all() and (y[row, n:] == -100).all()
        scored = y[row][y[row] != -100].tolist()
        assert scored == ids[n_prompt:].tolist() and scored[-1] == 3
        assert (y[row, : n_prompt - 1] == -100).all()


def test_padding_does_not_change_the_loss():
    examples = [records.encode_record(TOKENIZERS[0], record) for record in RECORDS]
    model = make_model(vocab_size=TOKENIZERS[0].vocab_size, block_size=64)
    _, together = model(*pad_batch(examples, pad=0))
    sums = []
    for example in examples:
        x, y = pad_batch([example], pad=0)
        sums.append(model(x, y)[1] * (y != -100).sum())
    n_scored = sum(len(ids) - n_prompt for ids, n_prompt in examples)
    assert torch.allclose(together, sum(sums) / n_scored, atol=1e-5)


def test_records_are_read_with_the_characters_of_text_files(tmp_path: Path):
    path = write(tmp_path / "qa.json", [*RECORDS, {"question": "a\r\nb", "answer": "c\rd \ud800"}])
    assert records.read_records(path) == [*RECORDS, {"question": "a\nb", "answer": "c\nd ?"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*RECORDS, {"question": "Why?"}], "record 3: answer is missing or not text"),
        ([{"question": " ", "answer": "a"}], "record 1: question is empty"),
        ([*RECORDS, "text"], 'record 3: not an object with question, answer: "text"'),
        ([{"question": 5, "answer": ""}], "record 1: question .* not text, record 1: answer is em"),
        ([{}] * 9, "and 13 more"),
        ('[{"question": "a",\n}]', r"not JSON.*line 2 column 1"),
        ("\n".join(map(json.dumps, RECORDS)), "Extra data.*must be one list, .* not one reco"),
        ({"question": "a"}, "must be a list of records"),
        ([], "must be a list of records"),
    ],
)
def test_invalid_records_are_reported_with_their_position(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        records.read_records(write(tmp_path / "qa.json", content))


def test_pairs_are_read_and_empty_lines_skipped(tmp_path: Path):
    lines = [json.dumps(PAIRS[0]), "", json.dumps(PAIRS[1]), ""]
    assert records.read_pairs(write(tmp_path / "pairs.jsonl", "\n".join(lines))) == PAIRS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 3: chosen is missing or not text, line 3: rejected is missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 3: .* are the same"),
        ('{"prompt": "a", "chosen": " ", "rejected": "b"}', "line 3: chosen is empty"),
        ('{"prompt": "a", "chosen"}', "line 3: invalid JSON .*column 25"),
        ("[1, 2]", r"line 3: not an object with prompt, chosen, rejected: \[1, 2\]"),
        ("1\n" * 9, "line 7: not .*, and 4 more"),
        (json.dumps(PAIRS[0]), "line 3: the same texts as in line 1"),
        (
            json.dumps(PAIRS[1] | {"chosen": PAIRS[1]["rejected"], "rejected": PAIRS[1]["chosen"]}),
            "line 3: the same texts as in line 2",
        ),
    ],
)
def test_invalid_pairs_are_reported_with_their_line(tmp_path: Path, line: str, message: str):
    path = write(tmp_path / "pairs.jsonl", "\n".join([*map(json.dumps, PAIRS), line]))
    with pytest.raises(UserError, match=message) as error:
        records.read_pairs(path)
    assert "\n" not in str(error.value)


def test_encoding_needs_a_tokenizer_with_the_special_tokens():
    with pytest.raises(UserError, match="has no <BOS>"):
        records.encode_record(CharTokenizer.train(TEXTS), RECORDS[0])
