"""prepare.py: texts become a data set; a run that fails leaves nothing behind."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import fuzz_damage
import numpy as np
import pytest
from conftest import TINY_RUN
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_corpus import STORIES, write_jsonl

import evaluate
import prepare
import train
from corpus import clean as cleaning
from corpus import dataset, folder, load, sources
from corpus import text as text_module
from corpus.clean import Chunk, CleanConfig, RemovalStats, clean, new_stats
from corpus.corpus import make_tokenizer
from corpus.documents import is_validation
from corpus.sources import DatasetConfig, SourceReader
from system.settings import UserError
from tokenizer import END_OF_TEXT, CharTokenizer

ROOT = Path(__file__).parent.parent


def make(*words: str, vocab_size: int = 300, name: str = "set") -> dict:
    """Run prepare.py and return the manifest of the data set."""
    flags = [f"--name={name}", f"--vocab_size={vocab_size}"]
    assert prepare.main([*words, *flags]) == 0
    return json.loads(Path("data", name, "manifest.json").read_text())


def make_of(documents: list[str], *words: str, **settings: Any) -> dict:
    """Write these documents to stories.jsonl and make a data set of them."""
    write_jsonl(Path("stories.jsonl"), documents)
    return make("stories.jsonl", *words, **settings)


@pytest.fixture
def stories(workplace: Path) -> dict:
    """The manifest of a data set, data/set, that was made of stories.jsonl."""
    return make_of(STORIES)


def texts(split: str) -> list[str]:
    tokenizer, corpus = folder.open_dataset(Path("data/set"))
    ids = corpus.train_ids if split == "train" else corpus.val_ids
    return tokenizer.decode(ids.tolist()).split(END_OF_TEXT)[1:]


def all_texts() -> list[str]:
    return texts("train") + texts("val")


def test_the_manifest_records_the_sources(workplace):
    (workplace / "a.txt").write_bytes(b"abc")  # whose hash is known from FIPS 180-2
    manifest = make("a.txt", "--tokenizer=char")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["sources"] == [{"path": "a.txt", "bytes": 3, "sha256": digest}]
    assert manifest["settings"]["seed"] == 1337 and "numpy" in manifest["versions"]


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(workplace, capsys):
    folder = workplace / "letters"
    (folder / "old").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / "old" / "c.txt").write_text("third")
    (folder / ".notes").write_text("hidden")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\x00\x01")
    (folder / "qa.json").write_text('[{"question": "a", "answer": "b"}]')
    make("letters", "--tokenizer=char", "--val_share=0.01")
    assert all_texts() == ["first", "second", "third"]
    assert "skipping 2 binary or .json files (photo.jpg, qa.json)" in capsys.readouterr().err


LINES = ["", "drop", "a", "a ", "drop it", " b a", "a\tb", " ", "no drop ", "<|", "ab ba a b", "é"]
FLAGS = {"": [], "drop": ["--drop_lines=drop"], r"^\s*$": [r"--drop_lines=^\s*$"]}


def cleaned_in_memory(text: str, pattern: str, whitespace: bool) -> str:
    if pattern:
        text = "\n".join(line for line in text.split("\n") if not re.search(pattern, line))
    if whitespace:
        text = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
        text = re.sub("\n\n\n+", "\n\n", text)
    return text


def split_in_memory(texts: dict[int, str]) -> list[list[str]]:
    """The documents of each split, given by their numbers; one text is split as train.py does."""
    val = {number for number in texts if is_validation(number, 0.2, 1337)}
    if len(texts) == 1 and not val:
        (text,) = texts.values()
        return [[text[: len(text) * 9 // 10]], [text[len(text) * 9 // 10 :]]]
    val = val or {max(texts, default=0)}
    return [[texts[n] for n in texts if (n in val) == is_val] for is_val in (False, True)]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from(LINES), max_size=6).map("\n".join), min_size=1, max_size=9),
    st.sampled_from(["jsonl", "separator", "text"]),
    st.sampled_from([1, 3, 12, 1000]),
    st.sampled_from([2, 4, 10]),  # token ids have two bytes
    st.sampled_from(["char", "bpe"]),
    st.sampled_from(sorted(FLAGS)),
    st.booleans(),
    st.booleans(),
)
def test_a_data_set_read_in_pieces_is_that_of_the_full_texts(
    workplace, monkeypatch, documents, form, chunk_size, read_size, kind, pattern, whitespace, dedup
):
    dedup = dedup and chunk_size == 1000  # long documents are never duplicates
    if form == "jsonl":
        path, flags = write_jsonl(workplace / "a.jsonl", documents), []
    else:
        path, flags = workplace / "a.txt", ["--separator=<|>"] * (form == "separator")
        path.write_text(("<|>" if flags else "\n").join(documents), encoding="utf-8")
        documents = [text.strip("\n") for text in documents] if flags else [path.read_text("utf-8")]
    texts = dict(enumerate(text for text in documents if text.strip()))
    texts = {n: cleaned_in_memory(text, pattern, whitespace) for n, text in texts.items()}
    firsts = {text: n for n, text in reversed(texts.items())}
    kept = {n: t for n, t in texts.items() if t.strip() and (not dedup or firsts[t] == n)}
    splits = split_in_memory(kept)
    assume(all(splits) and all(splits[0]))
    monkeypatch.setattr(cleaning, "CHUNK_SIZE", chunk_size)
    monkeypatch.setattr(text_module, "READ_SIZE", read_size)
    monkeypatch.setattr(sources, "BATCH_SIZE", 200)
    flags += FLAGS[pattern] + ["--whitespace"] * whitespace + ["--dedup"] * dedup
    manifest = make(path.name, *flags, f"--tokenizer={kind}", "--val_share=0.2", "--overwrite")
    tokenizer = make_tokenizer(kind, 300, splits, (END_OF_TEXT,))
    found, corpus = folder.open_dataset(Path("data/set"))
    assert found.to_dict() == tokenizer.to_dict()
    both = corpus.train_ids, corpus.val_ids
    for name, ids, split in zip(("train", "val"), both, splits, strict=True):
        # the last tenth of the only document does not begin with a separator
        n_documents = len(split) if name == "train" or len(kept) > 1 else 0
        start = [tokenizer.specials[END_OF_TEXT]] * bool(n_documents)
        expected = [i for text in split for i in (*start, *tokenizer.encode(text).tolist())]
        counts = {"documents": n_documents, "tokens": len(expected)}
        counts |= {"characters": len("".join(split)), "bytes": len("".join(split).encode())}
        assert ids[:].tolist() == expected and manifest["splits"][name] == counts


def test_several_processes_write_the_same_data_set_as_one(workplace, monkeypatch):
    one = make_of(STORIES * 3, "--dedup")
    monkeypatch.setattr(dataset, "MIN_PARALLEL", 0)
    monkeypatch.setattr(sources, "BATCH_SIZE", 500)
    two = make("stories.jsonl", "--dedup", "--overwrite", "--workers=2")
    assert two["sha256"] == one["sha256"]
    assert two["removed"]["duplicates"] == one["removed"]["duplicates"]
    assert two["removed"]["duplicates"]["count"] == 120


def test_the_vocabulary_of_a_large_corpus_is_learned_from_a_sample(workplace, monkeypatch):
    write_jsonl(workplace / "stories.jsonl", [f"{i} " + "word " * 20 for i in range(400)])
    monkeypatch.setattr(dataset, "SAMPLE_SIZE", 10_000)
    reader = SourceReader(DatasetConfig(("stories.jsonl",)), CleanConfig())
    n_read = sum(map(len, reader.batches("", 10_000 / reader.n_bytes)))
    assert 20 < n_read < 120  # a fifth of 400 would be 80
    make("stories.jsonl")
    assert len(all_texts()) == 400


def test_cleaning_removes_and_counts_in_the_order_of_the_steps(workplace, capsys):
    kept = "Call me Ishmael. Some years ago."
    stories = [
        f"Title: Moby Dick\n\n\n\n{kept}  \nPage 12\n",
        f"{kept}\n",
        "too short",
        "far too long " * 20,
        " \n\n",
        "Another that is kept, and as long.",
        "secret 1234 is dropped\nThis remains of the document.",
    ]
    manifest = make_of(
        stories, "--metadata", "--drop_lines=secret \\d+", "--whitespace", "--dedup",
        "--min_chars=20", "--max_chars=100", "--tokenizer=char",
    )  # fmt: skip
    others = {"Another that is kept, and as long.", "This remains of the document."}
    assert set(all_texts()) == {kept} | others and len(all_texts()) == 3
    counts = {step: what["count"] for step, what in manifest["removed"].items()}
    assert counts.pop("whitespace") > 0
    assert counts == {"metadata": 3, "empty": 1, "length": 2, "duplicates": 1}
    assert manifest["removed"]["metadata"]["examples"] == ["'Title: Moby Dick'", "'Page 12'"]
    said = capsys.readouterr().out
    assert "removed: 3 lines, e.g. 'Title: Moby Dick' and 'Page 12'" in said
    assert "removed: 1 duplicate documents, e.g. 'Call me Ishmael." in said


def test_removed_whitespace_is_counted():
    removed = new_stats()
    chunk = Chunk("\na  \n\n\n\n  b c\t\n", True, True, "train")
    assert clean(chunk, CleanConfig(whitespace=True), removed) == "a\n\n  b c"
    # the newline before a, two spaces after it, two of four newlines, the tab, the last newline
    assert removed["whitespace"].count == 1 + 2 + 2 + 1 + 1
    assert removed["whitespace"].examples == ["'a'"]  # the first line that was changed


@pytest.mark.parametrize(
    ("source", "name"),
    [("my book.v2.txt", "my_book.v2"), ("d\u00e9j\u00e0-vu.txt", "d\u00e9j\u00e0-vu")],
)
def test_the_name_of_a_data_set_is_that_of_its_source(source: str, name: str):
    assert DatasetConfig(sources=(source,)).name == name


def test_the_limits_of_the_length_of_a_document_may_be_equal():
    assert CleanConfig(min_chars=5, max_chars=5).problems() == []
    assert CleanConfig(min_chars=5, max_chars=0).problems() == []  # 0: no limit
    for max_chars in (1, 4):
        assert CleanConfig(min_chars=5, max_chars=max_chars).problems()


METADATA = """Title: Moby Dick; Or, The Whale | AUTHOR: Herman Melville | Language: English
Source: https://example.org/a | Copyright (c) 1998 by X | Copyright, 1911, by X | ISBN: 0-14
Release date: July 1, 2001 [eBook #2701] | *** START OF THE BOOK | Produced by Ann Smith | Page 7"""
PROSE = """Copyright law is old. | Author: what a name! | Author: What a name! | Page 7 was torn
Source: it is said so. | Title: a word for a name | Produced by heat, it rose. | an author: Ann"""


def test_metadata_is_dropped_and_prose_is_kept():
    lines = [line.strip() for text in (METADATA, PROSE) for line in re.split(r"\||\n", text)]
    removed = new_stats()
    chunk = Chunk("\n".join(lines), True, True, "train")
    kept = clean(chunk, CleanConfig(metadata=True), removed).split("\n")
    assert kept == lines[-8:] and removed["metadata"].count == len(lines) - 8 == 11


def test_the_default_removes_nothing():
    text = "Title: x \n\n\n\n y\t\n"
    removed = new_stats()
    assert clean(Chunk(text, True, True, "train"), CleanConfig(), removed) == text
    assert all(stats == RemovalStats() for stats in removed.values())


def write_invalid_files(workplace: Path) -> None:
    (workplace / "empty.txt").write_text("")
    (workplace / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (workplace / "latin.txt").write_bytes(b"\xe9t\xe9 " * 9)
    (workplace / "mixed").mkdir()
    (workplace / "mixed" / "a.txt").write_text("text " * 100)
    (workplace / "mixed" / "b.txt").write_bytes(b"good, then \xff\xfe")
    (workplace / "hollow").mkdir()
    write_jsonl(workplace / "posts.jsonl", field="body")
    (workplace / "loop.txt").symlink_to("loop.txt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["empty.txt"], "no text remains to learn"),
        (["empty.txt", "--tokenizer=char"], "no text remains to learn"),
        (["picture.png"], "is a binary file"),
        (["latin.txt"], r"latin.txt is not UTF-8 text \(byte 0 is 0xe9\)"),
        (["mixed"], r"b.txt is not UTF-8 text \(byte 11 is 0xff\)"),
        (["hollow"], "there is no text in the folder hollow"),
        (["nowhere.txt"], r"there is no nowhere.txt"),
        (["loop.txt"], r"loop.txt"),
        (["posts.jsonl"], "line 1: no text in field 'text' .fields with text: body"),
        (["mixed/a.txt", "--min_chars=9999"], "no text remains to learn"),
        (["mixed/a.txt", "--drop_lines=(", "--min_chars=9", "--max_chars=5"], "regular.*|below"),
        (["mixed/a.txt", "--vocab_size=5"], "vocab_size must be at least 258"),
        (["mixed/a.txt", "--text_field=body"], "--text_field is for .jsonl files, not mixed/a.txt"),
        (["qa.json"], "qa.json contains question/answer records: use it with train.py"),
        (["qa.csv"], "qa.csv contains question/answer records"),
        (["mixed/a.txt", "--max_chars=9999999"], "max_chars must be at most 4194304"),
        ([], "give files, folders, or the name of a data set"),
        *[(["/dev/zero"], "zero is a device or a pipe")] * Path("/dev/zero").exists(),
        (["mixed/a.txt", "--tokenizer=no.pt"], "must be one of char, .* or a checkpoint, not 'no"),
        (["mixed/a.txt", "--tokenizer=empty.txt"], r"empty\.txt is not a checkpoint"),
        (["mixed/a.txt", "--name=" + "x" * 300], "could not be written: "),
    ],
)
def test_invalid_input_is_one_error_and_leaves_nothing(workplace, words, message):
    write_invalid_files(workplace)
    before = sorted((workplace / "data").iterdir())
    with pytest.raises(UserError, match=message):
        prepare.main(["--name=set", *words])
    assert sorted((workplace / "data").iterdir()) == before


def test_invalid_bytes_are_replaced_if_requested(workplace, capsys):
    write_invalid_files(workplace)
    make("mixed", "--bad_bytes=replace", "--tokenizer=char")
    assert "2 characters are U+FFFD, in place of" in capsys.readouterr().err
    assert "good, then \ufffd\ufffd" in all_texts()
    make("latin.txt", "--encoding=cp1252", "--tokenizer=char", name="latin")
    assert "é" in Path("data/latin/tokenizer.json").read_text(encoding="utf-8")


def test_an_existing_data_set_is_overwritten_only_if_requested(stories):
    before = Path("data/set/manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"data.set exists: add --overwrite"):
        make("stories.jsonl")
    with pytest.raises(UserError, match="no text remains to learn"):
        make("stories.jsonl", "--overwrite", "--min_chars=99999")
    assert Path("data/set/manifest.json").read_bytes() == before
    make("stories.jsonl", "--overwrite", "--dedup")
    assert sorted(os.listdir("data")) == ["input.txt", "set"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_only_a_data_set_is_ever_replaced(workplace, overwrite):
    (workplace / "data" / "letters").mkdir()
    (workplace / "data" / "letters" / "a.txt").write_text("dear " * 100)
    flags = ["--vocab_size=300", *overwrite]
    with pytest.raises(UserError, match=r"data.letters/ was not written by prepare"):
        prepare.main(["data/letters", *flags])
    for source in (".", "data"):  # named after the folder: data/NAME does not exist
        assert prepare.main([source, *flags]) == 0
    assert (workplace / "data" / "data" / "manifest.json").exists()
    assert Path("data/letters/a.txt").exists() and Path("data/input.txt").exists()


def test_a_data_set_cannot_be_its_own_source(stories):
    with pytest.raises(UserError, match="is a source itself"):
        make("data/set/tokenizer.json.txt", "--overwrite")


def test_a_long_file_name_is_shortened_and_an_unwritable_folder_is_an_error(workplace):
    (workplace / ("x" * 250)).write_text("text " * 100)
    assert prepare.main(["x" * 250, "--vocab_size=300"]) == 0
    assert Path("data", "x" * 60, "manifest.json").exists()
    shutil.rmtree("data")
    Path("data").write_text("a file")
    with pytest.raises(UserError, match=r"data.set could not be written: "):
        prepare.main(["x" * 250, "--vocab_size=300", "--name=set"])


def test_files_of_others_are_never_deleted(stories):
    Path("data/set/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains notes\.txt, which prepare\.py did not"):
        make("stories.jsonl", "--overwrite")
    assert Path("data/set/notes.txt").read_text() == "mine"
    Path("data/set/notes.txt").unlink()
    make("stories.jsonl", "--overwrite")


def test_a_data_set_that_an_interrupted_replacement_moved_away_is_found(stories):
    Path("data/.set.part").mkdir()
    Path("data/set").rename("data/.set.part/old")
    folder.open_dataset(load.find_corpus("data/set"))


def test_a_source_that_changes_while_it_is_read_is_an_error(workplace, monkeypatch):
    write_jsonl(workplace / "stories.jsonl")
    learn = dataset.learn_tokenizer

    def learn_and_change(*args):
        tokenizer = learn(*args)
        write_jsonl(workplace / "stories.jsonl", STORIES[1:])
        return tokenizer

    monkeypatch.setattr(dataset, "learn_tokenizer", learn_and_change)
    with pytest.raises(UserError, match="a source changed while it was read: try again"):
        make("stories.jsonl")
    assert os.listdir("data") == ["input.txt"]


def test_validation_documents_in_the_training_split_are_counted(workplace, capsys):
    path = workplace / "stories.jsonl"
    shared = make_of(STORIES[:40] * 2)["shared_documents"]
    splits = texts("train"), texts("val")
    assert shared == sum(text in splits[0] for text in splits[1]) > 0
    message = f"{shared} of {len(splits[1])} validation documents also occur in the training split"
    assert capsys.readouterr().err.count(message) == 1
    for data in (str(path), "data/set"):
        text_module.note.cache_clear()  # as in another process
        load.load_corpus(data, "bpe", 300)
        assert capsys.readouterr().err.count(message) == 1
    assert make("stories.jsonl", "--dedup", "--overwrite")["shared_documents"] == 0
    load.load_corpus(str(write_jsonl(path)), "bpe", 300)
    assert "also occur" not in capsys.readouterr().err
    # the only validation document is moved there at the end
    assert make_of(["a", "a"], "--tokenizer=char", name="two")["shared_documents"] == 1


@pytest.mark.parametrize(("last", "shared"), [("a long one " * 20, 1), ("other " * 20, 0)])
def test_a_long_document_in_both_splits_is_counted(workplace, monkeypatch, last, shared):
    monkeypatch.setattr(cleaning, "CHUNK_SIZE", 50)
    documents = ["a long one " * 20, "a", last]  # the last one is moved
    manifest = make_of(documents, "--tokenizer=char", "--val_share=1e-9")
    assert manifest["shared_documents"] == shared


def test_end_of_text_in_a_text_is_ordinary_text_with_a_hint_or_a_separator(workplace, capsys):
    (workplace / "b.txt").write_text(END_OF_TEXT.join(STORIES))
    hint = f'b.txt contains {END_OF_TEXT}, read as ordinary text: with --separator "{END_OF_TEXT}"'
    make("b.txt")
    assert capsys.readouterr().err.count(hint) == 1
    tokenizer, corpus = folder.open_dataset(Path("data/set"))
    assert (corpus.train_ids == tokenizer.specials[END_OF_TEXT]).sum() == 1
    make("b.txt", f"--separator={END_OF_TEXT}", "--overwrite")
    assert "--separator" not in capsys.readouterr().err and set(all_texts()) == set(STORIES)


SLOW = """
import time, prepare
from system.start import run
from corpus.dataset import DatasetWriter
write = DatasetWriter.write
DatasetWriter.write = lambda *args: (write(*args), time.sleep(1))
run(prepare.main)
"""


def start_long_run(workplace: Path) -> subprocess.Popen:
    """Start prepare.py with two workers, for 20 s, and wait until it writes."""
    (workplace / "long.txt").write_text("all work and no play makes jack a dull boy\n" * 50_000)
    command = [sys.executable, "-c", SLOW, *["long.txt"] * 20]
    command += ["--workers=2", "--name=set", "--tokenizer=char"]
    options = {"cwd": workplace, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    # a shell that runs the tests in the background ignores SIGINT, and processes inherit that
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    deadline = time.monotonic() + 300
    written = workplace / "data" / ".set.part" / "new" / "train.bin"
    while not (written.exists() and written.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert len(children(process.pid)) >= 2
    return process


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_after_a_killed_run_no_processes_remain_and_the_next_run_works(workplace):
    process = start_long_run(workplace)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert not Path("data/set").exists()
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "the workers are still running"
        time.sleep(0.1)
    make_of(STORIES)
    assert sorted(os.listdir("data")) == ["input.txt", "set"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(workplace, number, status):
    process = start_long_run(workplace)
    process.send_signal(number)
    assert process.wait(timeout=300) == status
    assert b"Traceback" not in process.stderr.read()
    assert os.listdir("data") == ["input.txt"]


def test_statistics_equal_those_calculated_by_hand(workplace, capsys):
    # Characters are tokens, and each document starts with a separator: lengths 11, 21, ..., 1001.
    documents = ["a" * (10 * i) for i in range(1, 101)]
    make_of(documents, "--tokenizer=char", "--val_share=1e-9", "--stats")
    said = capsys.readouterr().out
    # the last one is for validation, because one must be: 99 remain
    assert "tokens per document: median 501, 95th percentile 942, longest 991" in said
    assert "--block_size 1024 fits 100% of the documents" in said
    assert "size: 2,479 parameters" in said  # a twentieth of the sum of 10 i + 1, 49,599
    assert prepare.main(["--name=set", "--stats"]) == 0
    assert "95th percentile 942" in capsys.readouterr().out
    for length, window in ((10, 64), (127, 128), (128, 256)):  # with its separator, 11 and so on
        make_of(["b" * length] * 5, "--tokenizer=char", "--stats", "--overwrite")
        assert f"--block_size {window} fits 100%" in capsys.readouterr().out


def test_a_model_trains_on_a_data_set_and_resumes(workplace, capsys):
    make_of(STORIES * 5)
    assert train.main([*TINY_RUN, "--data=data/set", "--doc_mask"]) == 0
    assert "vocabulary 300" in capsys.readouterr().out
    assert train.main(["--resume", "--max_steps=30"]) == 0
    make("stories.jsonl", "--overwrite", vocab_size=290)
    with pytest.raises(UserError, match="another tokenizer"):
        train.main(["--resume", "--max_steps=40"])


def test_a_data_set_can_have_the_tokenizer_of_a_checkpoint(workplace, capsys):
    checkpoint = "checkpoints/best.pt"
    assert train.main([*TINY_RUN, "--tokenizer=bpe", "--vocab_size=300"]) == 0
    make_of(STORIES * 5)
    with pytest.raises(UserError, match=r"another tokenizer .* NAME --tokenizer CHECKPOINT`"):
        evaluate.main([checkpoint, "--data=data/set"])
    make("stories.jsonl", f"--tokenizer={checkpoint}", "--overwrite")
    assert evaluate.main([checkpoint, "--data=data/set"]) == 0
    assert train.main([*TINY_RUN, "--overwrite"]) == 0  # of characters, without documents
    with pytest.raises(UserError, match=r"the tokenizer has no <.endoftext.> token"):
        make("stories.jsonl", f"--tokenizer={checkpoint}", name="other")


def test_characters_that_a_checkpoint_would_read_as_unk_are_an_error(workplace, monkeypatch):
    tokenizer = CharTokenizer.train(["so it goes"], ("<UNK>", END_OF_TEXT))
    monkeypatch.setattr(dataset, "checkpoint_tokenizer", lambda path: tokenizer)
    Path("unk.pt").touch()
    with pytest.raises(UserError, match=r"a source has characters that the model does not .* 'œ'"):
        make_of(["so it goes", "so it gœs"], "--tokenizer=unk.pt")


@pytest.mark.parametrize("flag", ["--tokenizer=char", "--vocab_size=500"])
def test_a_data_set_has_its_own_tokenizer(stories, flag):
    with pytest.raises(UserError, match=r"data.set already has a tokenizer"):
        train.main([*TINY_RUN, "--data=data/set", flag])


def read_all(path: Path) -> tuple[object, ...]:
    tokenizer, corpus = folder.open_dataset(path)
    ids = [corpus.train_ids[:].tolist(), corpus.val_ids[:].tolist(), corpus.train_docs.tolist()]
    sizes = corpus.train_bytes, corpus.val_bytes, corpus.separator
    return tokenizer.to_dict(), corpus.info, ids, sizes


def test_ids_beyond_the_vocabulary_are_an_error(stories):
    Path("data/set/val.bin").write_bytes(np.array([3, 300, 5], "uint16").tobytes())
    folder.write_manifest(Path("data/set"), stories)
    with pytest.raises(UserError, match="id 300 in a vocabulary of 300"):
        folder.open_dataset(Path("data/set"))


def test_a_damaged_data_set_is_an_error_or_harmless(stories, monkeypatch):
    expected = read_all(Path("data/set"))
    files, n_errors = sorted(Path("data/set").iterdir()), 0
    monkeypatch.setattr(fuzz_damage, "OTHER_FILES", files)
    for i in range(300):
        shutil.copytree("data/set", "data/damaged")
        how = fuzz_damage.damage(Path("data/damaged", files[i % len(files)].name), random.Random(i))
        try:
            assert read_all(Path("data/damaged")) == expected, how
        except UserError as error:
            n_errors += 1
            assert "\n" not in str(error) and len(str(error)) < 500, how
        shutil.rmtree("data/damaged")
    assert n_errors > 250


def test_a_device_in_a_data_set_is_an_error(stories):
    Path("data/set/train.bin").unlink()
    Path("data/set/train.bin").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"is damaged \(train\.bin is not a file\)"):
        folder.open_dataset(Path("data/set"))


def test_a_data_set_without_its_checksum_is_an_error(stories):
    del stories["checksum"]
    Path("data/set/manifest.json").write_text(json.dumps(stories))
    with pytest.raises(UserError, match=r"data.set/ is not .*, or is damaged \(.*no 'checksum'"):
        train.main([*TINY_RUN, "--data=data/set"])


def test_a_data_set_with_a_changed_token_id_is_an_error_and_can_be_replaced(stories):
    ids = Path("data/set/train.bin")
    ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
    with pytest.raises(UserError, match="the token ids do not have their hash"):
        folder.open_dataset(Path("data/set"))
    Path("data/set/.verified.json").write_text("{}")  # of an older version
    make("stories.jsonl", "--overwrite")


def test_files_folders_and_named_data_sets_are_found_in_their_order(workplace, monkeypatch):
    for name in ("one.txt", "texts/two.txt", "data/train.txt", "data/valid.txt"):
        (workplace / name).parent.mkdir(exist_ok=True)
        (workplace / name).write_text(name)
    splits = {"train": Path("data/train.txt"), "val": Path("data/valid.txt")}
    monkeypatch.setattr(sources, "fetch", lambda name: splits)
    found = sources.find_sources(["one.txt", "tinystories", "texts"])
    expected = {"one.txt": "", "data/train.txt": "train", "data/valid.txt": "val"}
    expected["texts/two.txt"] = ""
    assert [(str(path), split) for path, split in found] == list(expected.items())
    monkeypatch.setattr(sources, "fetch", lambda name: {"all": Path("one.txt")})
    assert sources.find_sources(["plays"]) == [(Path("one.txt"), "")]


def test_batches_are_mapped_in_order_and_few_are_read_ahead(monkeypatch: pytest.MonkeyPatch):
    read, pool = [], Mock(side_effect=lambda n, **_: ThreadPoolExecutor(n))

    def batches() -> Iterator[list[Any]]:
        for i in range(20):
            read.append(i)
            yield [i]

    monkeypatch.setattr(sources, "ProcessPoolExecutor", pool)
    results = sources.parallel_map(lambda batch: batch[0] ** 2, batches(), 2)
    assert next(results) == 0 and len(read) == 5  # four more than the first keep two busy
    assert list(results) == [i**2 for i in range(1, 20)]
    assert pool.call_args.args == (2,)
    assert pool.call_args.kwargs["initializer"] is sources.init_worker
    assert pool.call_args.kwargs["mp_context"].get_start_method() == "spawn"


def test_one_process_needs_no_pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "ProcessPoolExecutor", None)
    assert list(sources.parallel_map(len, [[], []], 1)) == [0, 0]


@pytest.mark.parametrize(("platform", "expected"), [("win32", 61), ("linux", 96)])
def test_windows_has_at_most_61_processes(monkeypatch: pytest.MonkeyPatch, platform, expected):
    pool = Mock(side_effect=lambda n, **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(sources, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(sources.sys, "platform", platform)
    assert list(sources.parallel_map(len, [[]], 96)) == [0] and pool.call_args.args == (expected,)


def test_a_killed_worker_is_one_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(n))
    with pytest.raises(UserError, match=r"a worker process was killed.*--workers 1"):
        list(sources.parallel_map(Mock(side_effect=BrokenProcessPool), [[], []], 2))


def test_a_worker_ignores_ctrl_c_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch):
    ended, calls, handlers = threading.Event(), Mock(), {}
    calls.exit.side_effect = lambda status: ended.set()
    monkeypatch.setattr(sources.multiprocessing, "parent_process", lambda: calls.parent)
    monkeypatch.setattr(sources.os, "_exit", calls.exit)
    monkeypatch.setattr(sources.signal, "signal", handlers.__setitem__)
    sources.init_worker()
    assert ended.wait(10) and calls.mock_calls == [call.parent.join(), call.exit(1)]
    assert handlers == {signal.SIGINT: signal.SIG_IGN}
