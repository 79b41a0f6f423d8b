"""Question/answer records: read, tokenized, masked, padded."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model

import qa
from config import UserError
from tokenizer import QA_SPECIALS, BPETokenizer, CharTokenizer, count_pieces

RECORDS = [
    {"id": 1, "category": "parts", "question": "What turns?", "answer": "Queries and keys."},
    {"question": "Why?", "answer": "So."},
]
TEXTS = [qa.record_text(record) for record in RECORDS]
TOKENIZERS = [
    CharTokenizer.train(TEXTS, QA_SPECIALS),
    BPETokenizer.train(count_pieces(TEXTS), 280, QA_SPECIALS),
]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_record_becomes_question_and_answer_between_bos_and_eos(tokenizer):
    ids, n_prompt = qa.encode_record(tokenizer, RECORDS[1])
    assert tokenizer.decode(ids.tolist()) == "<BOS>Question: Why?\nAnswer: So.<EOS>"
    assert tokenizer.decode(ids[:n_prompt].tolist()) == "<BOS>Question: Why?\nAnswer:"
    assert (ids[0], ids[-1]) == (2, 3)
    joined = tokenizer.encode("Question: Why?\nAnswer: So.")
    assert ids[1:-1].tolist() == joined.tolist()  # the seam changes no token


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_batch_learns_answers_only_and_is_padded_at_the_right(tokenizer):
    examples = [qa.encode_record(tokenizer, record) for record in RECORDS]
    x, y = qa.qa_batch(examples, pad=0)
    assert x.shape == y.shape == (2, len(examples[0][0]) - 1)
    for row, (ids, n_prompt) in enumerate(examples):
        n = len(ids) - 1
        assert x[row, :n].tolist() == ids[:-1].tolist()
        assert (x[row, n:] == 0).all() and (y[row, n:] == -100).all()
        learned = y[row][y[row] != -100].tolist()
        assert learned == ids[n_prompt:].tolist() and learned[-1] == 3
        assert (y[row, : n_prompt - 1] == -100).all()


def test_padding_changes_no_loss():
    examples = [qa.encode_record(TOKENIZERS[0], record) for record in RECORDS]
    model = make_model(vocab_size=TOKENIZERS[0].vocab_size, block_size=64)
    _, together = model(*qa.qa_batch(examples, pad=0))
    sums = []
    for example in examples:
        x, y = qa.qa_batch([example], pad=0)
        sums.append(model(x, y)[1] * (y != -100).sum())
    n_learned = sum(len(ids) - n_prompt for ids, n_prompt in examples)
    assert torch.allclose(together, sum(sums) / n_learned, atol=1e-5)


def test_records_are_read(tmp_path: Path):
    assert qa.read_records(write(tmp_path / "qa.json", RECORDS)) == RECORDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*RECORDS, {"question": "Why?"}], "record 3: answer is missing or no text"),
        ([{"question": " ", "answer": "a"}], "record 1: question is empty"),
        ([*RECORDS, "text"], 'record 3: it is no object but "text"'),
        ([{"question": 5, "answer": ""}], "record 1: question .* no text, record 1: answer is emp"),
        ([{}] * 9, "and 13 more"),
        ('[{"question": "a",\n}]', r"not JSON.*line 2 column 1"),
        ({"question": "a"}, "a list of records"),
        ([], "a list of records"),
    ],
)
def test_bad_records_are_named_by_their_position(tmp_path: Path, content: object, message: str):
    with pytest.raises(UserError, match=message):
        qa.read_records(write(tmp_path / "qa.json", content))


def test_a_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(UserError, match="has no <BOS>"):
        qa.encode_record(CharTokenizer.train(TEXTS), RECORDS[0])
