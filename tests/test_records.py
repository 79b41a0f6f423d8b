"""Conversations and preferences: formats of files, validation, encoding, batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model

from corpus.bpe import count_pieces, train_bpe
from corpus.load import load_corpus
from corpus.records import Record, encode_turn, encode_turns, join_turns, read_records, record_text
from finetuning.records import encode_pair, pack_turns, pad_batch
from system.settings import UserError
from tokenizer import QA_SPECIALS, CharTokenizer

SAMPLES = Path(__file__).parent.parent / "data" / "chats"
PAIRS = [
    {"prompt": "the fox", "chosen": " sleeps\n", "rejected": " jumps\n"},
    {"prompt": "the dog", "chosen": "\n", "rejected": " sleeps\n"},
]
TURNS = [("What turns?", "Queries and keys."), ("Why?", "So.")]
RECORDS = [{"question": question, "answer": answer, "id": 1} for question, answer in TURNS]
TEXTS = [record_text(Record([turn])) for turn in TURNS]
TOKENIZERS = [CharTokenizer.train(TEXTS, QA_SPECIALS)]
TOKENIZERS += [train_bpe(count_pieces(TEXTS), 280, QA_SPECIALS)]
# The ids of the characters of "\n :AQSabcdeimnorstuwy", in this order, follow four special tokens.
CHARS = CharTokenizer.train(["System: Question: \nAnswer: abcd"], QA_SPECIALS)
SYSTEM, QUESTION = [9, 24, 20, 21, 14, 16, 6, 5], [8, 22, 14, 20, 21, 15, 18, 17, 6, 5]
ANSWER = [4, 7, 17, 20, 23, 14, 19, 6]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def messages(roles: str) -> dict:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": names.get(c, c), "content": c} for c in roles]}


def test_a_conversation_is_its_turns_and_its_answers_are_scored():
    turns = encode_turns(CHARS, [("a", " b\n"), (" c", "ab")], " d ")
    first = [2, *SYSTEM, 13, 4, *QUESTION, 10, *ANSWER, 5, 11, 3]  # d, a and b
    second = [2, *QUESTION, 12, *ANSWER, 5, 10, 11, 3]  # c and ab
    text = "System: d\nQuestion: a\nAnswer: b\nQuestion: c\nAnswer: ab"
    assert record_text(Record([("a", " b\n"), (" c", "ab")], " d ")) == text
    short = encode_turn(CHARS, "a", "b")
    x, y = pad_batch([join_turns(turns), short], pad=0)
    assert x[0].tolist() == [*first, *second][:-1]
    assert y[0].tolist() == [-100] * 29 + [5, 11, 3] + [-100] * 20 + [5, 10, 11, 3]
    assert x[1].tolist() == [2, *QUESTION, 10, *ANSWER, 5, 11] + [0] * 34
    assert y[1].tolist() == [-100] * 19 + [5, 11, 3] + [-100] * 34


@pytest.mark.parametrize(
    ("size", "lengths"), [(78, [79]), (77, [56, 33]), (55, [56, 33]), (54, [33, 33, 33])]
)  # with the system text, a turn has 33 tokens, otherwise 23; the last one is a target only
def test_long_conversations_are_cut_at_turns_and_each_row_has_the_system_text(size, lengths):
    record = Record([("a", "b"), ("b", "a"), ("c", "c")], system="d")
    rows = [row for (row,) in pack_turns(CHARS, record, size, ask=True)]
    assert [len(row.ids) for row in rows] == lengths
    assert all(row.ids[:10].tolist() == [2, *SYSTEM, 13] for row in rows)
    scored = np.concatenate([row.ids[row.scored] for row in rows])
    assert scored.tolist() == [5, 11, 3, 5, 10, 3, 5, 12, 3]


@pytest.mark.parametrize(("size", "with_history"), [(56, True), (55, False)])
def test_of_a_preference_only_the_last_answers_are_scored(size, with_history):
    record = Record([("a", "b"), ("c", "d")], "d", rejected="ab")
    ((chosen, rejected),) = encode_pair(CHARS, record, size, ask=False)
    prompt = [2, *SYSTEM, 13, 4]
    prompt += [*QUESTION, 10, *ANSWER, 5, 11, 3, 2] * with_history
    prompt += [*QUESTION, 12, *ANSWER]
    for example, answer in ((chosen, [5, 13, 3]), (rejected, [5, 10, 11, 3])):
        assert example.ids.tolist() == prompt + answer
        assert example.ids[example.scored].tolist() == answer


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_encoding_prompt_and_answer_separately_changes_no_token(tokenizer):
    turn = encode_turn(tokenizer, "Why?", "So.")
    assert tokenizer.decode(turn.ids.tolist()) == "<BOS>Question: Why?\nAnswer: So.<EOS>"
    assert tokenizer.decode(turn.ids[turn.scored].tolist()) == " So.<EOS>"
    assert turn.ids[1:-1].tolist() == tokenizer.encode("Question: Why?\nAnswer: So.").tolist()


def test_padding_does_not_change_the_loss():
    examples = [encode_turn(TOKENIZERS[0], *turn) for turn in TURNS]
    model = make_model(vocab_size=TOKENIZERS[0].vocab_size, block_size=64)
    _, together = model(*pad_batch(examples, pad=0))
    sums = []
    for example in examples:
        x, y = pad_batch([example], pad=0)
        sums.append(model(x, y)[1] * (y != -100).sum())
    assert torch.allclose(together, sum(sums) / sum(e.scored.sum() for e in examples), atol=1e-5)


def test_encoding_needs_a_tokenizer_with_the_special_tokens():
    with pytest.raises(UserError, match="has no <BOS>"):
        encode_turn(CharTokenizer.train(TEXTS), "Why?", "So.")


QUESTIONS = json.loads((SAMPLES / "questions.json").read_text())
ONE_TURN = [[(row["question"], row["answer"])] for row in QUESTIONS]
COLORS = [("What color is grass?", "Green."), ("And snow?", "White.")]
APPLES = [
    ("I have three apples.", "Three apples are a good start."),
    ("I eat one. How many are left?", "Two apples are left."),
    ("I eat both.", "Then none is left."),
]


@pytest.mark.parametrize("path", sorted(SAMPLES.iterdir()), ids=lambda path: path.name)
def test_the_same_records_in_all_formats_are_the_same(path: Path, tmp_path: Path):
    lines = (line.strip(",") for line in path.read_text().splitlines() if line[0] == "{")
    rows, preferences = list(map(json.loads, lines)), path.name.startswith("preference")
    lists = any(isinstance(value, list) for row in rows for value in row.values())
    expected = [Record(turns, held_out=i == 3) for i, turns in enumerate(ONE_TURN)]
    if lists:
        expected += [Record(COLORS, "Answer in one word.")]
    if preferences:
        answers = ["I do not know.", "fig, pear, apple", "It is dark.", "Some planet has them."]
        answers += ["Snow is white, because it is made of many small crystals."]
        pairs = zip(expected, answers, strict=lists)
        expected = [r._replace(rejected=text, is_text=not lists) for r, text in pairs]
    elif lists:
        expected += [Record(APPLES)]
    assert read_records(path, preferences) == expected
    copies = {"a.json": json.dumps(rows), "a.jsonl": "\n\n".join(map(json.dumps, rows))}
    if not lists:
        names = [*rows[0], "held_out"] if rows else []
        table = [names, *([row.get(name, "") for name in names] for row in rows)]
        copies["a.csv"] = "\n".join(",".join(f'"{cell}"' for cell in row) for row in table)
    for name, text in copies.items() if rows else []:
        assert read_records(write(tmp_path / name, text), preferences) == expected


@pytest.mark.parametrize(
    ("row", "preferences", "expected"),
    [
        ({"prompt": "a", "completion": "b", "chosen": "c"}, False, Record([("a", "b")])),
        ({"instruction": "a", "output": "b"}, False, Record([("a", "b")])),
        ({"conversations": [{"role": "system", "content": ""}, *messages("ua")["messages"]]},
         False, Record([("u", "a")])),
        ({"instruction": "a", "input": None, "output": "b"}, False, Record([("a", "b")])),
        ({"instruction": "a", "input": " ", "output": "b"}, False, Record([("a", "b")])),
        ({"question": "a\r\nb", "answer": "c\rd \ud800"}, False, Record([("a\nb", "c\nd ?")])),
        ({"prompt": "\n", "chosen": "\n", "rejected": "b"}, True,
         Record([("\n", "\n")], rejected="b", is_text=True)),
        ({"prompt": messages("u")["messages"], "rejected": "c",
          "chosen": messages("a")["messages"][0]}, True, Record([("u", "a")], rejected="c")),
    ],
)  # fmt: skip
def test_variants_of_the_formats(tmp_path: Path, row: dict, preferences: bool, expected: Record):
    assert read_records(write(tmp_path / "a.json", [row]), preferences) == [expected]


@pytest.mark.parametrize("preferences", [False, True])
@pytest.mark.parametrize(
    ("name", "content"), [("a.json", [{"ask": 1, "reply": 2}]), ("a.csv", "ask,reply\nb,c\n"),
                          ("a.jsonl", '5\n\n{"ask": 1, "reply": 2}\n')]
)  # fmt: skip
def test_an_unknown_format_is_one_line_that_names_the_fields(tmp_path, name, content, preferences):
    path = write(tmp_path / name, content)
    fields = "the fields are ask, reply, and should be question, answer | messages | "
    fields += "conversations | instruction, input, output | prompt, completion; a text is .txt"
    if preferences:
        fields = "ask, reply, .* be prompt, chosen, rejected | messages, chosen, rejected$"
    with pytest.raises(UserError, match=fields.replace("|", r"\|")) as error:
        read_records(path, preferences)
    assert "\n" not in str(error.value)
    if not preferences:
        with pytest.raises(UserError, match="unknown format: the fields are ask, reply"):
            load_corpus(str(path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "Why?"}, "answer is missing or not text"),
        ({"question": " ", "answer": "a"}, "question is empty"),
        ("text", 'not an object with question, answer: "text"'),
        ({"question": 5, "answer": ""}, "question is missing or not text"),
        ({"prompt": "a", "chosen": ["b"]}, "chosen is missing or not text"),
        ({"prompt": "a", "chosen": "b"}, "rejected is missing or not text"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "a", "chosen": messages("aua")["messages"], "rejected": "b"}, "one answer eac"),
        (PAIRS[0], "the same texts as in record 1"),
        (PAIRS[1] | {"chosen": PAIRS[1]["rejected"], "rejected": "\n"}, "same .* in record 2"),
        ({"messages": "Why?"}, "messages is missing or not a list"),
        (messages("u"), r"its roles are user, not \(system,\) user, assistant, \.\.\., assistant"),
        ({"messages": []}, "its roles are none"),
        *((messages(roles), "its roles are") for roles in ("au", "uua", "usa", "ssua", "uaa", "s")),
        (messages("uat"), r'messages has no role or no text in \{"role": "t", "content": "t"\}'),
        ({"messages": [{"role": "user"}]}, "messages has no role or no text"),
        ({"messages": ["a"]}, "messages is missing or not a list"),
    ],
)
def test_invalid_records_are_reported_with_their_number_or_skipped(tmp_path, capsys, bad, message):
    kind = next(iter(bad)) if isinstance(bad, dict) else "question"
    good = {"question": RECORDS, "messages": [messages("sua")] * 2, "prompt": PAIRS}[kind]
    preferences = kind == "prompt"
    path = write(tmp_path / "a.json", [*good, bad])
    with pytest.raises(UserError, match=f"a.json: record 3: .*{message}.*; --skip_bad") as error:
        read_records(path, preferences)
    assert "\n" not in str(error.value)
    expected = read_records(write(tmp_path / "good.json", good), preferences)
    assert len(expected) == 2 and capsys.readouterr().err == ""
    assert read_records(path, preferences, skip_bad=True) == expected
    assert "a.json: 1 of 3 records are invalid, skipped: record 3: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"question": "a",\n}]', r"not a list .*invalid JSON.*line 2 column 1"),
        ("a.json", "\n".join(map(json.dumps, RECORDS)), r"Extra data.*or one record .* a \.jsonl"),
        ("a.json", {"question": "a"}, "not a list of records: write"),
        ("a.json", [], r"unknown format: the fields are none \(no records\)"),
        ("a.jsonl", "\n", r"unknown format: the fields are none \(no records\)"),
        ("a.jsonl", '\n{"question": "a"\n1\n2\n3\n\n4\n5\n6', "line 2: invalid.*line 7.*2 more$"),
        ("a.csv", "question,answer\na", "record 1: answer is missing or not text$"),
        ("a.csv", 'question,answer\na,"b', r"a\.csv is not CSV \(unexpected end of data\)"),
    ],
)  # fmt: skip
def test_files_without_a_valid_record_are_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_records(write(tmp_path / name, content), skip_bad=True)
    assert "\n" not in str(error.value)


def test_train_py_learns_conversations_turn_by_turn(tmp_path: Path):
    tokenizer, corpus = load_corpus(str(SAMPLES / "messages.jsonl"))
    question, answer = ONE_TURN[3][0]
    held_out = f"<BOS>Question: {question}\nAnswer: {answer}<EOS>"
    assert tokenizer.decode(corpus.val_ids.tolist()) == held_out
    text = tokenizer.decode(corpus.train_ids[corpus.train_docs[3] :].tolist())
    assert text.startswith(
        "<BOS>System: Answer in one word.\nQuestion: What color is grass?\nAnswer: Green.<EOS>"
        "<BOS>Question: And snow?\nAnswer: White.<EOS><BOS>Question: I have three apples.\n"
    )
    assert corpus.info["documents"] == 6 and corpus.separator is None
    documents = write(tmp_path / "a.jsonl", '{"meta": 1}\n{"text": "ab", "messages": []}\n' * 9)
    tokenizer, corpus = load_corpus(str(documents))
    assert tokenizer.decode(corpus.val_ids.tolist()).startswith("<|endoftext|>ab")
    with pytest.raises(UserError, match="--skip_bad is for questions and answers, not for"):
        load_corpus(str(documents), skip_bad=True)
