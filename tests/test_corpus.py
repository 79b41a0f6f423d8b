"""Files become documents and documents a corpus, the argument of train.py --data."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_text
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import finetune
import prepare
import train
from config import SampleConfig
from corpus import bpe, documents, download, folder, load, records
from corpus import corpus as corpus_module
from corpus import text as text_module
from corpus.corpus import Corpus, check_length
from generate import stream_texts
from model import GPT
from system.settings import UserError
from tokenizer import END_OF_TEXT, CharTokenizer
from utils import load_checkpoint

STORIES = [f"story {i}: " + "so it goes, " * (i % 7) + "the end." for i in range(60)]


def write_jsonl(path: Path, texts: list[str] = STORIES, field: str = "text") -> Path:
    lines = (json.dumps({"n": i, field: text}) for i, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(path: Path, **settings: object) -> list[tuple[str, bool]]:
    return list(documents.iter_documents(path, **settings))


@pytest.mark.parametrize(("kind", "vocab_size"), [("char", 0), ("bpe", 300), ("bpe", 400)])
def test_one_text_is_split_at_nine_tenths_whatever_the_tokenizer(tmp_path, kind, vocab_size):
    text = make_text() + "\u20ac" * 99  # each of three bytes
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer, corpus = load.load_corpus(str(tmp_path / "text.txt"), kind, vocab_size)
    n = len(text) * 9 // 10
    assert tokenizer.decode(corpus.train_ids.tolist()) == text[:n]
    assert tokenizer.decode(corpus.val_ids.tolist()) == text[n:]
    assert (corpus.train_bytes, corpus.val_bytes) == (n, len(text) - n + 2 * 99)
    assert corpus.train_docs is None and corpus.separator is None
    assert corpus.train_ids.dtype == (np.uint16 if vocab_size else np.uint8)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_each_document_is_in_one_split_and_starts_with_end_of_text(tmp_path, kind):
    path = write_jsonl(tmp_path / "stories.jsonl")
    tokenizer, corpus = load.load_corpus(str(path), kind, 300)
    splits = [tokenizer.decode(ids.tolist()) for ids in (corpus.train_ids, corpus.val_ids)]
    found = [text.split(END_OF_TEXT)[1:] for text in splits]
    assert sorted(found[0] + found[1]) == sorted(STORIES) and all(found)
    assert (corpus.train_ids[corpus.train_docs] == corpus.separator).all()
    assert len(corpus.train_docs) == len(found[0]) and corpus.info["documents"] == 60
    sizes = [len("".join(texts).encode()) for texts in found]
    assert [corpus.train_bytes, corpus.val_bytes] == sizes


def test_an_encoding_of_tiktoken_is_used_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(make_text())
    tokenizer = CharTokenizer.train([make_text()])
    monkeypatch.setattr(bpe, "from_tiktoken", {"cl100k_base": tokenizer}.__getitem__)
    assert load.load_corpus(str(tmp_path / "text.txt"), "cl100k_base")[0] is tokenizer


def test_the_validation_share_is_close_to_the_requested_one():
    selected = sum(documents.is_validation(i, 0.1) for i in range(10_000))
    assert abs(selected - 1000) < 4 * 30  # four standard deviations of a binomial
    assert not documents.is_validation(0, 0.999)


def test_both_splits_have_at_least_one_document():
    for texts in ("ab", "abc"):
        train, val = documents.split_documents(list(texts))
        assert train and val and sorted(train + val) == list(texts)
    with pytest.raises(UserError, match="one has 1: add some, or train on all with --no-hold_out"):
        documents.split_documents(["a"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere.txt", r"there is no nowhere\.txt"),
        ("", "there is no ''"),
        ("tinystories", r"python prepare\.py tinystories"),
        ("empty", r"no text in the folder empty \(3 binary, question or not UTF-8 files\)"),
    ],
)
def test_a_missing_corpus_is_an_error(workplace, data, message):
    write_folder(Path("empty"), {"photo.jpg": b"\xff\xd8\0", "data.json": b"{}", ".git/a": b"a"})
    Path("empty/chats.jsonl").write_text('{"question": "Who?", "answer": "I."}')
    with pytest.raises(UserError, match=message):
        load.load_corpus(data, "char", 0)


@pytest.mark.parametrize("name", ["plays", "tinystories", "shakespeare"])
def test_a_file_takes_precedence_over_a_named_data_set(workplace, monkeypatch, name):
    monkeypatch.setattr(download, "fetch", lambda name: 1 / 0)
    (workplace / name).write_text("of my own")
    assert load.find_corpus(name) == Path(name)


def test_a_large_text_needs_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_IN_MEMORY", 100)
    (tmp_path / "large.txt").write_text("a" * 101)
    with pytest.raises(UserError, match=r"run `python prepare\.py .*large\.txt"):
        load.load_corpus(str(tmp_path / "large.txt"), "char", 0)
    with pytest.raises(UserError, match="--name NAME --tokenizer CHECKPOINT`"):
        load.load_corpus(str(tmp_path / "large.txt"), tokenizer=CharTokenizer.train(["a"]))


def test_documents_need_a_tokenizer_with_a_separator(tmp_path):
    path = write_jsonl(tmp_path / "stories.jsonl")
    tokenizer = CharTokenizer.train(STORIES)
    with pytest.raises(UserError, match=r"no <.endoftext.> token, which separates"):
        load.load_corpus(str(path), "char", 0, tokenizer)


def test_a_corpus_shorter_than_a_window_is_rejected():
    corpus = Corpus(np.zeros(9), np.zeros(2), {}, 9, 2)  # one window with its last target
    check_length(corpus, 8)
    corpus.train_ids = np.zeros(8)
    with pytest.raises(UserError, match="8 tokens to train and 2 to validate on, and a window"):
        check_length(corpus, 8)
    corpus.train_docs = np.array([0, 4])  # documents are padded
    check_length(corpus, 8)
    corpus.val_ids = np.zeros(1)
    with pytest.raises(UserError, match="8 tokens to train and 1 to validate on"):
        check_length(corpus, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_devices_and_pipes_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(UserError, match="is a device or a pipe: give a file or a folder"):
            load.load_corpus(path, "char", 0)


def test_records_that_change_while_they_are_read_are_an_error(tmp_path, monkeypatch):
    path = tmp_path / "qa.json"
    path.write_text(json.dumps([{"question": "a", "answer": "b"}] * 4))
    original = records.read_records
    read_and_change = lambda path, *_: [original(path), path.write_text("")][0]  # noqa: E731
    monkeypatch.setattr(records, "read_records", read_and_change)
    with pytest.raises(UserError, match=r"qa\.json changed while it was read: try again"):
        load.load_corpus(str(path))


def test_tinyshakespeare_is_recognized_by_its_hash(tmp_path, monkeypatch):
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of sha256sum
    assert text_module.KNOWN_NAMES[sha256] == "tinyshakespeare"
    (tmp_path / "text.txt").write_text(make_text())
    info = load.load_corpus(str(tmp_path / "text.txt"))[1].info
    assert info["name"] == "text.txt"
    monkeypatch.setitem(text_module.KNOWN_NAMES, info["sha256"], "known")
    assert load.load_corpus(str(tmp_path / "text.txt"))[1].info["name"] == "known"


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_separator_divides_a_text_file_as_it_does_in_prepare(workplace, capsys, kind):
    path = workplace / "stories.txt"
    path.write_text(f"\n{END_OF_TEXT}\n".join(["", *STORIES[:20], " ", *STORIES[20:]]))
    load.load_corpus(str(path), kind, 300)
    hint = f'contains {END_OF_TEXT}, read as ordinary text: with --separator "{END_OF_TEXT}"'
    assert capsys.readouterr().err.count(hint) == 1
    tokenizer, corpus = load.load_corpus(str(path), kind, 300, separator=END_OF_TEXT)
    assert hint not in capsys.readouterr().err
    flags = [f"--separator={END_OF_TEXT}", f"--tokenizer={kind}", "--name=set"]
    assert prepare.main([str(path), *flags, *["--vocab_size=300"] * (kind == "bpe")]) == 0
    prepared = folder.open_dataset(Path("data/set"))[1]
    assert corpus.train_ids.tolist() == prepared.train_ids.tolist()
    assert corpus.val_ids.tolist() == prepared.val_ids.tolist()
    assert tokenizer.decode(corpus.val_ids.tolist()).split(END_OF_TEXT)[1] in STORIES


def test_a_separator_can_have_line_ends_and_is_for_text_files_only(tmp_path):
    (tmp_path / "a.txt").write_text("one\n--\ntwo\n--\nthree")
    tokenizer, corpus = load.load_corpus(str(tmp_path / "a.txt"), separator="\\n--\\n")
    assert tokenizer.decode(corpus.train_ids.tolist()).split(END_OF_TEXT)[1] == "one"
    assert corpus.info["documents"] == 3
    with pytest.raises(UserError, match=r"the separator '###\\n' does not occur in .*a\.txt"):
        load.load_corpus(str(tmp_path / "a.txt"), separator="###\\n")
    path = write_jsonl(tmp_path / "a.jsonl")
    for data in (path, tmp_path):
        with pytest.raises(UserError, match="--separator is for text files, and"):
            load.load_corpus(str(data), separator="--")


def test_a_model_is_trained_resumed_finetuned_and_evaluated_with_a_separator(workplace, capsys):
    (workplace / "a.txt").write_text(END_OF_TEXT.join(STORIES * 3))
    flags = ["--data=a.txt", f"--separator={END_OF_TEXT}"]
    assert train.main([*TINY_RUN, *flags, "--doc_mask"]) == 0
    with pytest.raises(UserError, match="--separator is"):
        train.main(["--resume", "--separator=--"])
    assert train.main(["--resume", "--max_steps=25"]) == 0
    best = "checkpoints/best.pt"
    assert evaluate.main([best]) == 0
    short = ["--max_steps=2", "--eval_every=2", "--eval_windows=2", "--sample_tokens=0"]
    short += ["--device=cpu", "--batch_size=2", "--no-compile"]
    assert finetune.main([best, *flags, *short]) == 0
    assert "also occur in the training split" in capsys.readouterr().err


NAMES = ("a.txt", "b/c.md", "B.py")
TEXTS = {name: f"{name} is a story of its own.\n".encode() * 30 for name in NAMES}
OTHERS = {"photo.jpg": b"\xff\xd8\0\1", "latin.txt": b"caf\xe9", ".git/x": b"hidden"}
OTHERS["qa.json"] = b"[]"


def test_the_texts_of_a_folder_are_documents_as_in_prepare(workplace, capsys):
    write_folder(workplace / "letters", TEXTS | OTHERS | {"more.jsonl": b'{"text": "a"}\n' * 9})
    tokenizer, corpus = load.load_corpus("letters")
    skipped = "skipping 3 binary, question or not UTF-8 files (latin.txt, photo.jpg, qa.json)"
    assert capsys.readouterr().err.count(f"letters: {skipped}") == 1
    Path("letters/latin.txt").unlink()
    assert prepare.main(["letters", "--tokenizer=char"]) == 0
    prepared = folder.open_dataset(Path("data/letters"))[1]
    assert corpus.train_ids.tolist() == prepared.train_ids.tolist()
    assert corpus.val_ids.tolist() == prepared.val_ids.tolist()
    texts = tokenizer.decode(corpus.train_ids).split(END_OF_TEXT)[1:]
    assert texts[:2] == [TEXTS["B.py"].decode(), TEXTS["a.txt"].decode()]  # capitals first
    assert (corpus.info["name"], corpus.info["documents"]) == ("letters", 12)


def test_a_folder_of_texts_is_trained_evaluated_resumed_and_verified(workplace):
    write_folder(workplace / "letters", TEXTS | {"latin.txt": "é à\n".encode("cp1252") * 99})
    flags = ["--data=letters", "--encoding=cp1252", "--doc_mask"]
    assert train.main([*TINY_RUN, *flags]) == 0
    assert evaluate.main(["checkpoints/best.pt"]) == 0
    assert train.main(["--resume", "--max_steps=25"]) == 0
    short = ["--max_steps=2", "--eval_every=2", "--sample_tokens=0", "--device=cpu", "--no-compile"]
    assert finetune.main(["checkpoints/best.pt", *short, *flags]) == 0
    _, tokenizer, state = load_checkpoint("checkpoints/best.pt")
    with pytest.raises(UserError, match="is not what the checkpoint was trained on"):
        load.training_corpus(tokenizer, state | {"corpus": state["corpus"] | {"questions": 9}})
    Path("letters/a.txt").write_text("a.txt is a story")
    with pytest.raises(UserError, match="letters has changed since this run began"):
        train.main(["--resume", "--max_steps=30"])
    with pytest.raises(UserError, match="letters is not what the checkpoint was trained on"):
        evaluate.main(["checkpoints/best.pt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good \xff bad", r"not UTF-8 text \(byte 5 is 0xff\): .*iconv -f .* --bad_bytes replace"),
        (b"\x00\x01\x80", r"binary file or UTF-16 text \(byte 0 is 0\): save it as UTF-8 text"),
        ("UTF-16".encode("utf-16-le"), r"binary file or UTF-16 text \(byte 1 is 0\): save it as"),
        (b"\xff\xfea\x00", "is UTF-16 text: save it as UTF-8"),
        (b"\xef\xbb\xbf good \xff", r"not UTF-8 text \(byte 9 is 0xff\)"),
        (b"123456 \xe9t\xe9", r"not UTF-8 text \(byte 7 is 0xe9\)"),
        (b"1234567\xe6\x97", r"not UTF-8 text \(byte 7 is 0xe6\)"),
        (b"1234567\x00", r"binary file or UTF-16 text \(byte 7 is 0\)"),
    ],
)
def test_a_file_not_in_utf8_is_rejected_with_the_position(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(text_module, "READ_SIZE", 4)
    (tmp_path / "text.txt").write_bytes(content)
    for function in (read, text_module.read_text):
        with pytest.raises(UserError, match=message):
            function(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("text", "encoding", "others"),
    [
        ("Ein Käse für Zoë, „schön“.", "cp1252", "--encoding mac_roman reads"),
        ("Привет, мир, как дела", "cp1251", "--encoding mac_roman reads"),
        ("你好世界。今天天气很好", "gb18030", "--encoding cp1251 reads"),
        ("吾輩は猫である。名前", "shift_jis", "--encoding gb18030 reads"),
    ],
)
def test_another_encoding_is_proposed_and_read(workplace, text, encoding, others):
    Path("a.txt").write_bytes(b"first line\n" * 20 + f"{text}\nlast\n".encode(encoding))
    with pytest.raises(UserError, match=others) as error:
        load.load_corpus("a.txt")
    assert f"--encoding {encoding} reads {text!r}" in str(error.value)
    tokenizer, corpus = load.load_corpus("a.txt", encoding=encoding, hold_out=False)
    assert text in tokenizer.decode(corpus.train_ids)
    documents = load.load_corpus("a.txt", separator="\\n", encoding=encoding, hold_out=False)
    assert text in documents[0].decode(documents[1].train_ids)
    config = {"data": "a.txt", "encoding": encoding, "hold_out": False}
    same = load.training_corpus(tokenizer, {"train_config": config, "corpus": corpus.info})
    assert (same.train_ids == corpus.train_ids).all()
    Path("a.csv").write_bytes(f'question,answer\nall?,"{text}"\n'.encode(encoding))
    with pytest.raises(UserError, match=f"--encoding {encoding} reads"):
        load.load_corpus("a.csv")
    tokenizer, corpus = load.load_corpus("a.csv", encoding=encoding, hold_out=False)
    assert text in tokenizer.decode(corpus.train_ids)
    Path("set").mkdir()
    Path("set", "manifest.json").touch()
    with pytest.raises(UserError, match="--encoding is for files of text"):
        load.load_corpus("set", encoding=encoding)


def test_a_checkpoint_is_no_text(workplace):
    Path("a.pt").write_bytes(b"PK\0\0")
    with pytest.raises(UserError, match="to continue the run of a checkpoint, give --resume and"):
        load.load_corpus("a.pt")


def test_an_empty_text_is_rejected(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"text\.txt is empty"):
        load.load_corpus(str(tmp_path / "text.txt"))


def test_a_text_file_is_one_document_or_split_at_separators(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n--\r\ntwo")
    assert text_module.read_text(path) == "one\n--\ntwo"
    assert read(path) == [("one\n--\ntwo", True)]
    assert read(path, separator="\n--\n") == [("one", True), ("two", True)]
    assert read(path, separator=END_OF_TEXT) == [("one\n--\ntwo", True)]


@given(st.text(alphabet="ab|\n", max_size=60), st.integers(1, 9))
def test_splitting_does_not_depend_on_the_size_of_reads(text: str, size: int):
    stream = [text[i : i + size] for i in range(0, len(text), size)]
    assert [document for document, _ in documents.split_stream(stream, "|\n")] == text.split("|\n")


def test_characters_and_line_ends_across_reads_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "READ_SIZE", 5)
    (tmp_path / "text.txt").write_bytes("日本語\r\nnaïve".encode())
    assert read(tmp_path / "text.txt") == [("日本語\nnaïve", True)]


def test_jsonl_records_are_documents_with_the_characters_of_text_files(tmp_path):
    path = write_jsonl(tmp_path / "posts.JSONL", ["one\r\nline\r", "a \u2028 b \ud83d"], "body")
    assert read(path, text_field="body") == [("one\nline\n", True), ("a \u2028 b ?", True)]


@pytest.mark.parametrize("line", ['{"text": "b"', '{"n": ' + "9" * 5000 + "}", "[" * 100_000])
def test_an_invalid_jsonl_line_is_reported_with_its_number(tmp_path, line):
    path = tmp_path / "posts.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2: invalid JSON"):
        read(path)


def test_lines_without_text_are_skipped_and_counted(tmp_path, capsys):
    path = write_jsonl(tmp_path / "posts.jsonl", [None, *STORIES, None])
    with path.open("a") as file:
        file.write('\n{"title": "no text"}\n{"text": 5}\n[1]\n')
    _, corpus = load.load_corpus(str(path), "char", 0)
    assert corpus.info["documents"] == 60
    message = "posts.jsonl: skipped 5 lines without text in field 'text'; the first is line 1\n"
    assert capsys.readouterr().err.count(message) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"body": null}', r"line 1: no text in field 'text' \(fields with text: none\)"),
        ('\n{"title": "a", "body": "b"}\n[1]', r"line 2: no text .*: title, body\): name ano"),
        ('{"body": "a"}\n' * 5 + '{"text": "a"}', r"line 1: no text .*--text_field NAME"),
    ],
)
def test_without_any_text_the_fields_are_named(tmp_path, monkeypatch, lines, message):
    monkeypatch.setattr(documents, "MAX_WITHOUT_TEXT", 4)
    (tmp_path / "posts.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "posts.jsonl")


def test_blank_documents_alone_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "posts.jsonl", ["", " \n"])
    for hold_out in (True, False):
        with pytest.raises(UserError, match="has no documents: all of it is blank"):
            load.load_corpus(str(path), hold_out=hold_out)


def test_without_holding_out_both_splits_are_everything(workplace, capsys):
    write_jsonl(workplace / "stories.jsonl", STORIES)
    records = [{"question": "Who?", "answer": "I.", "held_out": True}] * 2
    (workplace / "qa.json").write_text(json.dumps(records))
    (workplace / "one.json").write_text(json.dumps(records[:1]))
    text = (workplace / "data/input.txt").read_text()
    for data, expected in (
        ("data/input.txt", text),
        ("stories.jsonl", "".join(END_OF_TEXT + story for story in STORIES)),
        ("one.json", "<BOS>Question: Who?\nAnswer: I.<EOS>"),
        ("qa.json", "<BOS>Question: Who?\nAnswer: I.<EOS>" * 2),
    ):
        tokenizer, corpus = load.load_corpus(data, hold_out=False)
        for ids in (corpus.train_ids, corpus.val_ids):
            assert tokenizer.decode(ids.tolist()) == expected
        assert corpus.train_bytes == corpus.val_bytes
    assert corpus.info["documents"] == 2 and corpus.separator == tokenizer.specials["<BOS>"]
    assert capsys.readouterr().err == ""  # validation documents are training documents on purpose


def test_a_prepared_data_set_is_split_already(workplace):
    write_jsonl(workplace / "posts.jsonl", STORIES)
    assert prepare.main(["posts.jsonl", "--tokenizer=char"]) == 0
    with pytest.raises(UserError, match=r"--no-hold_out is for files, and data.posts/ is split"):
        load.load_corpus("data/posts", hold_out=False)


RECORDS = [
    {"question": f"What is {i} plus one?", "answer": f"It is {i + 1}, as {i} and one."}
    for i in range(40)
]
SMALL_RUN = (
    "--device=cpu --precision=float32 --preset=fast --no-grow_windows --n_layer=2 --n_embd=64 "
    "--block_size=96 --lr_max=1e-2 --batch_size=6 --eval_every=1000 --sample_tokens=0 "
    "--data=qa.json"
).split()


def answer(model: GPT, tokenizer: CharTokenizer, question: str) -> str:
    """The greedy answer to a question, up to <EOS>."""
    prompt = tokenizer.encode(f"<BOS>Question: {question}\nAnswer:", "all")
    greedy = SampleConfig(temperature=0, max_new_tokens=40)
    pieces = stream_texts(model, tokenizer, greedy, torch.tensor(prompt))
    return "".join(piece for (piece,) in pieces)


@pytest.mark.parametrize(("n", "steps"), [(2, 60), pytest.param(20, 250, marks=pytest.mark.slow)])
def test_a_model_trained_on_a_few_records_answers_them(workplace, n, steps):
    (workplace / "qa.json").write_text(json.dumps(RECORDS[:n]))
    assert train.main([*SMALL_RUN, "--no-hold_out", f"--max_steps={steps}"]) == 0
    model, tokenizer, state = load_checkpoint(Path("checkpoints/best.pt"), torch.device("cpu"))
    answers = [answer(model, tokenizer, record["question"]) for record in RECORDS[:n]]
    assert answers == [f" {record['answer']}" for record in RECORDS[:n]]
    # evaluate.py scores what the run validated on
    path, config = Path("checkpoints/best.pt"), evaluate.EvaluateConfig()
    row = evaluate.evaluate_checkpoints([path], config, torch.device("cpu"))
    assert float(row["loss"]) == pytest.approx(state["log"][-1]["val"], abs=1e-4)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("n", [2, 40])
def test_a_few_records_are_enough_for_the_default_window(workplace, capsys, n, tokenizer):
    (workplace / "qa.json").write_text(json.dumps(RECORDS[:n]))
    flags = ["--preset=quick", "--block_size=192", "--max_steps=2", "--data=qa.json"]
    assert train.main([*flags, "--device=cpu", f"--tokenizer={tokenizer}"]) == 0
    note = rf"note: [123] of {n} records are held out .*--no-hold_out trains on all"
    assert re.search(note, capsys.readouterr().err)


def test_notes_are_printed_by_one_process(capsys, monkeypatch):
    text_module.note("once")
    monkeypatch.setenv("RANK", "1")
    text_module.note("again")
    assert capsys.readouterr().err == "note: once\n"


def test_a_long_line_is_searched_once(tmp_path, monkeypatch):
    class Text(str):
        n_searched = 0

        def __add__(self, other: str) -> "Text":
            return Text(str(self) + str(other))

        def __radd__(self, other: str) -> "Text":
            return Text(str(other) + str(self))

        def find(self, text: str, start: int = 0) -> int:
            Text.n_searched += len(self) - start
            return str(self).find(text, start)

    stream = [Text("x" * 100) for _ in range(100)]
    assert list(documents.split_stream(stream, "<end>")) == [("x" * 10_000, True)]
    assert 10_000 <= Text.n_searched <= 2 * 10_000


def test_finetuning_measures_forgetting_on_what_the_base_validated_on(workplace):
    assert train.main([*TINY_RUN, "--no-hold_out"]) == 0
    _, tokenizer, state = load_checkpoint("checkpoints/best.pt")
    old = load.training_corpus(tokenizer, state)
    assert len(old.val_ids) == len((workplace / "data/input.txt").read_text())
