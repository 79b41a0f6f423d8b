"""prepare.py: any text becomes a data set; nothing half-made stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN
from test_corpora import STORIES, write_jsonl

import corpora
import evaluate
import prepare
import train
import utils
from config import UserError
from prepare import STEPS, Part, PrepareConfig, Removed, clean
from tokenizer import END_OF_TEXT

ROOT = Path(__file__).parent.parent


def make(*words: str, vocab_size: int = 300, name: str = "set") -> dict:
    """Run prepare.py, and return the manifest of the set."""
    flags = [f"--name={name}", f"--vocab_size={vocab_size}"]
    assert prepare.main([*words, *flags]) == 0
    return json.loads(Path("data", name, "manifest.json").read_text())


def texts(split: str) -> list[str]:
    """The documents of a split of the set."""
    tokenizer, corpus = corpora.open_dataset(Path("data/set"))
    ids = corpus.train_ids if split == "train" else corpus.val_ids
    return tokenizer.decode(ids.tolist()).split(END_OF_TEXT)[1:]


def all_texts() -> list[str]:
    return texts("train") + texts("val")


# --- from sources to a set


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_every_document_is_whole_in_one_split(workplace, tokenizer):
    write_jsonl(workplace / "stories.jsonl")
    manifest = make("stories.jsonl", f"--tokenizer={tokenizer}")
    assert sorted(all_texts()) == sorted(STORIES)
    splits = manifest["splits"]
    assert [splits[s]["documents"] for s in splits] == [len(texts(s)) for s in splits]
    assert splits["val"]["characters"] == sum(map(len, texts("val"))) > 0
    dtype = np.dtype("uint8" if tokenizer == "char" else "uint16")
    assert manifest["dtype"] == str(dtype)
    for split in ("train", "val"):
        size = os.path.getsize(f"data/set/{split}.bin")
        assert size == splits[split]["tokens"] * dtype.itemsize


def test_train_and_prepare_draw_the_same_documents_for_validation(workplace):
    path = write_jsonl(workplace / "stories.jsonl")
    make("stories.jsonl")
    tokenizer, corpus = corpora.load_corpus(str(path), "bpe", 300)
    prepared, _ = corpora.open_dataset(Path("data/set"))
    assert prepared.to_dict() == tokenizer.to_dict()
    assert tokenizer.decode(corpus.val_ids.tolist()).split(END_OF_TEXT)[1:] == texts("val")


def test_the_manifest_tells_where_the_text_came_from(workplace):
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
    make("letters", "--tokenizer=char", "--val_share=0.01")
    assert all_texts() == ["first", "second", "third"]
    assert "1 binary files left out (photo.jpg)" in capsys.readouterr().out


def test_a_single_text_gives_its_last_tenth_to_validation(workplace):
    text = "All happy families are alike, ün.\n" * 100
    (workplace / "anna.txt").write_text(text, encoding="utf-8")
    manifest = make("anna.txt", "--tokenizer=char")
    val = corpora.open_dataset(Path("data/set"))[0].decode(np.fromfile("data/set/val.bin", "uint8"))
    assert text.endswith(val) and abs(len(val) - 340) <= 1
    assert manifest["splits"]["val"]["bytes"] == len(val.encode())
    assert manifest["splits"]["val"]["characters"] == len(val)
    assert manifest["splits"]["train"]["bytes"] == len(text.encode()) - len(val.encode())


def test_special_text_in_the_corpus_is_no_special_token_unless_asked_for(workplace):
    (workplace / "a.txt").write_text(f"one{END_OF_TEXT}two\n" * 30)
    make("a.txt")
    tokenizer, corpus = corpora.open_dataset(Path("data/set"))
    assert (corpus.train_ids == tokenizer.specials[END_OF_TEXT]).sum() == 1
    make("a.txt", "--separator", END_OF_TEXT, "--overwrite")
    assert set(all_texts()) == {"one", "two\none", "two"}


def test_long_documents_come_in_parts_and_stay_in_one_split(workplace, monkeypatch):
    monkeypatch.setattr(prepare, "PART_SIZE", 50)
    monkeypatch.setattr(prepare, "BATCH_SIZE", 120)
    long = [f"document {i}\n" + f"line of {i}\n" * 40 for i in range(12)]
    write_jsonl(workplace / "long.jsonl", long)
    make("long.jsonl", "--val_share=0.3", "--whitespace", "--min_chars=60", "--dedup")
    assert sorted(all_texts()) == sorted(long) and len(texts("val")) > 0


def test_several_processes_make_the_same_set_as_one(workplace, monkeypatch):
    write_jsonl(workplace / "stories.jsonl", STORIES * 3)
    one = make("stories.jsonl", "--dedup")
    monkeypatch.setattr(prepare, "ONE_PROCESS", 0)
    monkeypatch.setattr(prepare, "BATCH_SIZE", 500)
    two = make("stories.jsonl", "--dedup", "--overwrite", "--workers=2")
    assert two["sha256"] == one["sha256"]
    assert two["removed"]["duplicates"] == one["removed"]["duplicates"]
    assert two["removed"]["duplicates"]["count"] == 120


def test_the_vocabulary_of_a_large_corpus_is_learned_from_a_share(workplace, monkeypatch):
    write_jsonl(workplace / "stories.jsonl", [f"{i} " + "word " * 20 for i in range(400)])
    monkeypatch.setattr(prepare, "SAMPLE_SIZE", 10_000)
    reader = prepare.Reader(PrepareConfig(), [(workplace / "stories.jsonl", "")])
    read = sum(map(len, reader.batches("", 10_000 / reader.total)))
    assert 20 < read < 120  # a fifth of 400 would be 80
    make("stories.jsonl")
    assert len(all_texts()) == 400


# --- cleaning


def test_cleaning_removes_what_it_says_in_its_order(workplace, capsys):
    kept = "Call me Ishmael. Some years ago."
    stories = [
        f"Title: Moby Dick\n\n\n\n{kept}  \nPage 12\n",
        f"{kept}\n",
        "too short",
        "far too long " * 20,
        " \n\n",
        "Another that stays, and is as long.",
        "secret 1234 is dropped\nThis remains of the document.",
    ]
    write_jsonl(workplace / "a.jsonl", stories)
    manifest = make(
        "a.jsonl", "--metadata", "--drop_lines=secret \\d+", "--whitespace", "--dedup",
        "--min_chars=20", "--max_chars=100", "--tokenizer=char",
    )  # fmt: skip
    assert sorted(all_texts()) == sorted(
        [kept, "Another that stays, and is as long.", "This remains of the document."]
    )
    counts = {step: what["count"] for step, what in manifest["removed"].items()}
    assert counts.pop("whitespace") > 0
    assert counts == {"metadata": 3, "empty": 1, "length": 2, "duplicates": 1}
    assert manifest["removed"]["metadata"]["examples"] == ["'Title: Moby Dick'", "'Page 12'"]
    said = capsys.readouterr().out
    assert "removed: 3 lines of metadata, e.g. 'Title: Moby Dick' and 'Page 12'" in said
    assert "removed: 1 documents equal to an earlier one, e.g. 'Call me Ishmael." in said


def test_white_space_is_counted():
    removed = {step: Removed() for step in STEPS}
    part = Part(0, "\na  \n\n\n\n  b c\t\n", True, True, "train")
    assert clean(part, PrepareConfig(whitespace=True), removed) == "a\n\n  b c"
    # the newline before a, two spaces after it, two of four newlines, the tab, the last newline
    assert removed["whitespace"].count == 1 + 2 + 2 + 1 + 1


def test_nothing_is_cleaned_unless_asked_for():
    text = "Title: x \n\n\n\n y\t\n"
    removed = {step: Removed() for step in STEPS}
    assert clean(Part(0, text, True, True, "train"), PrepareConfig(), removed) == text
    assert all(what == Removed() for what in removed.values())


# --- mistakes and accidents


def faults(workplace: Path) -> None:
    (workplace / "empty.txt").write_text("")
    (workplace / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (workplace / "latin.txt").write_bytes("été".encode("latin-1"))
    (workplace / "mixed").mkdir()
    (workplace / "mixed" / "a.txt").write_text("text " * 100)
    (workplace / "mixed" / "b.txt").write_bytes(b"good, then \xff\xfe")
    (workplace / "hollow").mkdir()
    write_jsonl(workplace / "posts.jsonl", field="body")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["empty.txt"], "no text is left"),
        (["empty.txt", "--tokenizer=char"], "no text is left"),
        (["picture.png"], "is a binary file"),
        (["latin.txt"], r"latin.txt is not UTF-8 text \(byte 0 is 0xe9\)"),
        (["mixed"], r"b.txt is not UTF-8 text \(byte 11 is 0xff\)"),
        (["hollow"], "no text file in the folder hollow"),
        (["nowhere.txt"], r"there is no nowhere.txt"),
        (["posts.jsonl"], "line 1: no text in 'text' .there is text in: body"),
        (["mixed/a.txt", "--min_chars=9999"], "no text is left"),
        (["mixed/a.txt", "--drop_lines=(", "--min_chars=9", "--max_chars=5"], "regular.*|below"),
        (["mixed/a.txt", "--vocab_size=5"], "vocab_size must be at least 258"),
        (["qa.json"], "qa.json holds records: give it to train.py"),
        (["mixed/a.txt", "--max_chars=9999999"], "max_chars must be at most 4194304"),
        ([], "give files, folders, or the name of a corpus"),
    ],
)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(workplace, words, message):
    faults(workplace)
    before = sorted((workplace / "data").iterdir())
    with pytest.raises(UserError, match=message):
        prepare.main([*words, "--name=set"])
    assert sorted((workplace / "data").iterdir()) == before


def test_bad_bytes_are_replaced_where_asked_for(workplace):
    faults(workplace)
    make("mixed", "--bad_bytes=replace", "--tokenizer=char")
    assert "good, then \ufffd\ufffd" in all_texts()


def test_a_set_that_exists_is_overwritten_only_where_asked_for(workplace):
    write_jsonl(workplace / "stories.jsonl")
    make("stories.jsonl")
    before = Path("data/set/manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"data/set/ exists: --overwrite it"):
        make("stories.jsonl")
    with pytest.raises(UserError, match="no text is left"):
        make("stories.jsonl", "--overwrite", "--min_chars=99999")
    assert Path("data/set/manifest.json").read_bytes() == before
    make("stories.jsonl", "--overwrite", "--dedup")
    assert sorted(os.listdir("data")) == ["input.txt", "set"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data/letters", "is there, but no data set"),
        (".", None),
        ("data", "name 'data' must|data/data"),
    ],
)
def test_nothing_but_a_data_set_is_ever_replaced(workplace, source, message, overwrite):
    (workplace / "data" / "letters").mkdir()
    (workplace / "data" / "letters" / "a.txt").write_text("dear " * 100)
    if message and "letters" in source:
        with pytest.raises(UserError, match=message):
            prepare.main([source, "--vocab_size=300", *overwrite])
    else:  # named after the folder: nothing is in the way
        assert prepare.main([source, "--vocab_size=300", *overwrite]) == 0
    assert Path("data/letters/a.txt").exists() and Path("data/input.txt").exists()


def test_a_set_is_no_source_of_itself(workplace):
    write_jsonl(workplace / "stories.jsonl")
    make("stories.jsonl")
    with pytest.raises(UserError, match="is a source itself"):
        make("data/set/tokenizer.json.txt", "--overwrite")


def test_a_stop_while_sets_change_places_keeps_the_old_one(workplace, monkeypatch):
    write_jsonl(workplace / "stories.jsonl")
    make("stories.jsonl")
    before = Path("data/set/manifest.json").read_bytes()
    rename = Path.rename

    def stop(path: Path, target: Path) -> None:
        if path.name.endswith(".part"):
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        make("stories.jsonl", "--overwrite", "--dedup")
    assert Path("data/set/manifest.json").read_bytes() == before
    assert sorted(os.listdir("data")) == ["input.txt", "set"]


def test_blank_documents_do_not_change_the_split(workplace):
    path = write_jsonl(workplace / "stories.jsonl", ["", *STORIES[:20], " \n", *STORIES[20:]])
    assert make("stories.jsonl")["removed"]["empty"]["count"] == 2
    tokenizer, corpus = corpora.load_corpus(str(path), "bpe", 300)
    assert tokenizer.decode(corpus.val_ids.tolist()).split(END_OF_TEXT)[1:] == texts("val")


def test_sources_and_flags_come_in_any_order(workplace):
    for name in "ab":
        (workplace / f"{name}.txt").write_text(f"text of {name} " * 50)
    assert prepare.main(["a.txt", "--name", "set", "b.txt", "--vocab_size=300"]) == 0
    assert len(all_texts()) == 2


SLOW = """
import sys, time, config, prepare
write = prepare.Writer.write
prepare.Writer.write = lambda self, part: (write(self, part), time.sleep(1))
config.run(prepare.main)
"""


def start_long_run(workplace: Path) -> subprocess.Popen:
    """A run of prepare.py with two workers that has begun to write and goes on for 20 s."""
    (workplace / "long.txt").write_text("all work and no play makes jack a dull boy\n" * 50_000)
    command = [sys.executable, "-c", SLOW, *["long.txt"] * 20]
    command += ["--workers=2", "--name=set", "--tokenizer=char"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=workplace,
        stderr=subprocess.PIPE,
        env=environment,
        # a shell that runs the tests in the background has Ctrl-C ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    written = workplace / "data" / ".set.part" / "train.bin"
    while not (written.exists() and written.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert len(children(process.pid)) >= 2
    return process


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_killed_run_leaves_no_set_and_no_processes_and_the_next_one_works(workplace):
    process = start_long_run(workplace)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("data/set").exists()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.1)
    write_jsonl(workplace / "stories.jsonl")
    make("stories.jsonl")
    assert sorted(os.listdir("data")) == ["input.txt", "set"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(workplace, number, status):
    process = start_long_run(workplace)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert b"Traceback" not in process.stderr.read()
    assert os.listdir("data") == ["input.txt"]


# --- statistics, training


def test_statistics_are_those_counted_by_hand(workplace, capsys):
    # Characters are tokens, and one begins each document: lengths 11, 21, ..., 1001.
    write_jsonl(workplace / "a.jsonl", ["a" * (10 * i) for i in range(1, 101)])
    make("a.jsonl", "--tokenizer=char", "--val_share=1e-9", "--stats")
    said = capsys.readouterr().out
    # the last is to validate on, for there must be one: 99 remain
    assert "tokens in one: median 501, 95th percentile 942, longest 991" in said
    assert "--block_size 1024 takes 100% of the documents whole" in said
    total = sum(10 * i + 1 for i in range(1, 100))
    laptop = 4 * (12 * 128**2) + 2 * 128  # the bulk of its parameters, by GPT-3's 12 L C^2
    shown = float(said.split("laptop")[1].split()[3])
    assert shown == pytest.approx(total / laptop, rel=0.05)
    assert prepare.main(["--name=set", "--stats"]) == 0
    assert "95th percentile 942" in capsys.readouterr().out


def test_a_model_trains_on_a_set_and_resumes(workplace, capsys):
    write_jsonl(workplace / "stories.jsonl", STORIES * 5)
    make("stories.jsonl")
    assert train.main([*TINY_RUN, "--data=data/set", "--doc_mask"]) == 0
    assert "300 kinds" in capsys.readouterr().out
    assert train.main(["--resume", "--max_steps=30"]) == 0
    make("stories.jsonl", "--overwrite", vocab_size=290)
    with pytest.raises(UserError, match="another tokenizer"):
        train.main(["--resume", "--max_steps=40"])


@pytest.mark.parametrize("flag", ["--tokenizer=char", "--vocab_size=500"])
def test_a_set_has_its_tokenizer_already(workplace, flag):
    write_jsonl(workplace / "stories.jsonl")
    make("stories.jsonl")
    with pytest.raises(UserError, match="data/set has its tokenizer already"):
        train.main([*TINY_RUN, "--data=data/set", flag])


@pytest.mark.parametrize("one_document", [False, True])
def test_a_set_of_many_files_reads_like_one(workplace, monkeypatch, one_document: bool):
    write_jsonl(workplace / "stories.jsonl")
    lines = Path("stories.jsonl").read_text().splitlines(keepends=True)
    if one_document:  # whose last tenth is moved to validation
        lines = [json.dumps({"text": "".join(json.loads(line)["text"] for line in lines)})]
    Path("stories.jsonl").write_text("".join(lines))
    whole = make("stories.jsonl", "--tokenizer=char", name="whole")
    monkeypatch.setattr(prepare, "SHARD_SIZE", 100)
    parts = make("stories.jsonl", "--tokenizer=char", name="parts")
    assert parts["splits"] == whole["splits"] and parts["sha256"] == whole["sha256"]
    n_tokens = whole["splits"]["train"]["tokens"]
    names = sorted(path.name for path in Path("data/parts").glob("train*.bin"))
    assert names[:2] == ["train.bin", "train_00001.bin"] and len(names) == -(-n_tokens // 100)
    sizes = [Path("data/parts", name).stat().st_size for name in names]
    assert sizes == [100] * (n_tokens // 100) + ([n_tokens % 100] if n_tokens % 100 else [])
    one, many = (corpora.open_dataset(Path("data", name))[1] for name in ("whole", "parts"))
    for split in ("train_ids", "val_ids"):
        assert (getattr(one, split)[:] == getattr(many, split)[:]).all()
    for batch in zip(
        utils.get_batch(one.train_ids, 32, 50, 1, 2, one.train_docs),
        utils.get_batch(many.train_ids, 32, 50, 1, 2, many.train_docs),
        strict=True,
    ):
        assert torch.equal(*batch)
    assert train.main([*TINY_RUN, "--data=data/parts"]) == 0
    assert evaluate.main(["checkpoints/best.pt", "--split=train"]) == 0


def test_a_damaged_set_is_refused(workplace):
    write_jsonl(workplace / "stories.jsonl")
    make("stories.jsonl")
    with open("data/set/train.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"data/set/ is no data set .*, or damaged"):
        train.main([*TINY_RUN, "--data=data/set"])
    os.remove("data/set/train.bin")
    with pytest.raises(UserError, match=r"data/set/ is no data set .*, or damaged"):
        train.main([*TINY_RUN, "--data=data/set"])
