"""Batches, windows, devices, checkpoints."""

import errno
import math
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model

import utils
from config import TrainConfig, UserError
from model import GPT
from tokenizer import CharTokenizer


def make_state(model: GPT) -> dict:
    """A checkpoint's contents, as the trainer makes them."""
    empty = {"train_config": {}, "optimizers": [], "scaler": {}, "log": []}
    return empty | {
        "gpt_config": vars(model.config),
        "tokenizer": CharTokenizer.train(["abcdefghijk"]).to_dict(),
        "corpus": {"name": "test"},
        "model": model.state_dict(),
        "step": 7,
    }


# --- batches


def test_targets_are_the_inputs_one_later():
    x, y = utils.windows(np.array([5, 6, 7, 8, 9]), np.array([0, 2]), block_size=2)
    assert x.tolist() == [[5, 6], [7, 8]] and y.tolist() == [[6, 7], [8, 9]]
    assert x.dtype == y.dtype == torch.int64


def test_past_the_end_nothing_is_scored():
    x, y = utils.windows(np.array([5, 6, 7]), np.array([1]), block_size=4)
    assert x.tolist() == [[6, 7, 0, 0]] and y.tolist() == [[7, -100, -100, -100]]


def test_a_batch_is_a_function_of_seed_and_number():
    ids = np.arange(1000)
    first = utils.get_batch(ids, 8, 4, seed=1, number=2)[0]
    assert torch.equal(first, utils.get_batch(ids, 8, 4, seed=1, number=2)[0])
    for other in ((9, 2), (1, 9)):
        assert not torch.equal(first, utils.get_batch(ids, 8, 4, *other)[0])


def test_two_batches_hold_the_windows_of_one_twice_as_large():
    ids = np.arange(1000)
    halves = [utils.get_batch(ids, 8, 4, 1, number)[0] for number in (6, 7)]
    assert torch.equal(torch.cat(halves), utils.get_batch(ids, 8, 8, 1, 3)[0])


def test_batches_reach_the_first_and_the_last_window():
    ids = np.arange(10)  # windows of 8 + 1 tokens can begin at 0 and at 1
    starts = {utils.get_batch(ids, 8, 1, 0, number)[0][0, 0].item() for number in range(50)}
    assert starts == {0, 1}


@pytest.mark.parametrize("seed", range(5))
def test_all_of_a_text_is_read_about_equally_often(seed: int):
    n, T, B = 100_000, 50, 10
    counts = np.zeros(n, dtype=int)
    for number in range(2 * n // (T * B)):  # two epochs
        x, _ = utils.get_batch(np.arange(n), T, B, seed, number)
        np.add.at(counts, x.numpy(), 1)
    # Chance would leave e^-2 = 0.135 of the tokens out. The points of the golden ratio are never
    # further apart than 1.9 times their mean distance (three-gap theorem, Sos 1958), 48 here.
    inside = counts[T:-T]
    assert inside.min() >= 1 and inside.max() <= 4
    assert x[:, 0].sort().values.diff().min() > n / B / 2  # a batch's windows are far apart


def test_late_in_a_long_run_the_places_are_still_exact():
    class Stream:  # its tokens are their places
        def __len__(self) -> int:
            return 10**10

        def __getitem__(self, at: np.ndarray) -> np.ndarray:
            return at

    x, _ = utils.get_batch(Stream(), 8, 4, seed=1, number=10**12)
    first = int(np.random.default_rng(1).integers(1 << 64, dtype=np.uint64))
    for i, start in enumerate(x[:, 0].tolist()):
        place = (first + (4 * 10**12 + i) * 0x9E3779B97F4A7C15) % 2**64  # whole numbers of any size
        assert abs(start - place * (10**10 - 8) // 2**64) <= 1


def test_even_windows_cover_a_split_once():
    ids = np.arange(100, 150)
    x, y = utils.windows(ids, utils.even_starts(len(ids), 8), 8)
    assert y[y != -100].tolist() == list(range(101, 150))
    assert x[y != -100].tolist() == list(range(100, 149))


def test_some_even_windows_span_the_split():
    starts = utils.even_starts(1000, 8, n_windows=5)
    assert starts[0] == 0 and starts[-1] == 1000 - 9 and len(starts) == 5


def test_no_window_runs_over_the_end_of_a_longer_document():
    docs = np.array([0, 40, 43, 45])  # of 40, 3, 2 and 55 tokens
    starts = utils.fit_documents(np.arange(100), docs, 100, block_size=8).tolist()
    assert starts[:33] == list(range(33))  # windows inside the first document
    assert starts[33:40] == [0, 32, 0, 32, 0, 32, 0]  # at its beginning or its end
    assert starts[40:45] == [40, 40, 40, 43, 43]
    assert starts[45:93] == list(range(45, 93)) and set(starts[93:]) == {45, 92}


@pytest.mark.parametrize("lengths", [[300] * 5, [100] * 40, [1000, 10], [5, 600, 3, 3]])
def test_every_token_of_every_document_is_learned(lengths: list[int]):
    docs, n = np.cumsum([0, *lengths[:-1]]), sum(lengths)
    starts = utils.fit_documents(np.arange(n), docs, n, block_size=256)
    _, y = utils.windows(np.arange(n), starts, 256)
    counts = np.bincount(y[y >= 0].numpy(), minlength=n)
    assert (counts[1:] > 0).all()
    if len(set(lengths)) == 1:  # equal documents are seen about equally often
        inside = [counts[d + 1 : d + n // len(docs)].mean() for d in docs]
        assert min(inside[1:]) > 0.5 * max(inside)


def test_batches_of_documents_begin_where_they_should():
    ids, docs = np.arange(100), np.array([0, 50, 53])
    x, _ = utils.get_batch(ids, 8, 200, seed=1, number=2, docs=docs)
    first = set(x[:, 0].tolist())
    assert {0, 42, 50, 53, 92} <= first and not first & {*range(43, 50), 51, 52, *range(93, 100)}


def test_bits_per_byte_of_a_coin_flip_for_each_byte_is_one():
    assert utils.bits_per_byte(math.log(2), 1.0) == pytest.approx(1)
    assert utils.bits_per_byte(math.log(2), 4.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"good \xff bad", r"not UTF-8 text \(byte 5 is 0xff\)"),
        (b"\x00\x01\x80", r"binary file \(byte 0 is 0\)"),
        (b"\xff\xfea\x00", "is UTF-16 text"),
        (b"\xef\xbb\xbf good \xff", r"not UTF-8 text \(byte 9 is 0xff\)"),
    ],
)
def test_a_useless_file_is_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=message):
        utils.read_text(tmp_path / "text")


def test_text_is_read_with_plain_line_ends_and_without_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert utils.read_text(tmp_path / "text") == "a\nb\n"


def test_a_corpus_shorter_than_a_window_is_refused():
    corpus = utils.Corpus(np.zeros(45), np.zeros(5), {}, 45, 5)
    with pytest.raises(UserError, match="45 tokens to train and 5 to validate on, and a window"):
        utils.check_length(corpus, 8)


# --- machine


@pytest.mark.parametrize("name", ["cuda:99", "quantum", "meta"])
def test_a_missing_device_is_an_error(name: str):
    with pytest.raises(UserError, match=name):
        utils.pick_device(name)


def test_auto_takes_the_fastest_device_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert utils.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert utils.pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert utils.pick_device("auto").type == "cuda"


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, "float32"), (0.1, "bfloat16")])
def test_precision_on_a_cpu_is_what_is_faster_here(monkeypatch, seconds: float, expected: str):
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(utils, "matmul_seconds", times.get)
    assert utils.pick_precision("auto", torch.device("cpu"))[0] == expected
    assert utils.pick_precision("float16", torch.device("cpu"))[0] == "float16"


def test_without_a_compiler_nothing_is_compiled(monkeypatch, capsys):
    def fail(function: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail)
    assert utils.pick_compile(None, torch.device("cpu")) is False
    assert capsys.readouterr().out == "not compiling: no C++ compiler\n"
    assert utils.pick_compile(True, torch.device("cpu")) is True
    assert utils.pick_compile(None, torch.device("mps")) is False


def test_memory_estimate_counts_weights_by_hand():
    model = make_model()
    run = TrainConfig(batch_size=2, precision="float32")
    estimate = utils.memory_estimate(model.config, 1000, run)
    assert [estimate[k] for k in ("weights", "gradients", "optimizer")] == [4000, 4000, 8000]
    # 2 blocks x (20 x 16 + 5 x 64) numbers, and 11 logits twice and their gradient, for 24 tokens
    assert estimate["activations"] == 24 * (2 * (320 + 320) * 4 + 11 * 12)
    run.optimizer, run.grad_checkpoint = "muon", True
    estimate = utils.memory_estimate(model.config, 1000, run, slices=2)
    assert [estimate[k] for k in ("weights", "gradients", "optimizer")] == [2000, 2000, 2000]
    assert estimate["activations"] == 24 * (2 * 16 * 4 + (320 + 320) * 4 + 11 * 12)


def test_windows_of_a_tensor_are_those_of_the_array():
    ids = np.random.default_rng(0).integers(60000, size=100).astype(np.uint16)
    for pair in zip(
        utils.windows(ids, np.array([0, 50, 97]), 8),
        utils.windows(torch.from_numpy(ids.astype(np.int32)), np.array([0, 50, 97]), 8),
        strict=True,
    ):
        assert torch.equal(*pair) and pair[1].dtype == torch.int64


# --- checkpoints


def test_a_checkpoint_comes_back_whole(tmp_path: Path):
    model = make_model()
    utils.save_checkpoint(tmp_path / "a.pt", make_state(model))
    copy, tokenizer, state = utils.load_checkpoint(tmp_path / "a.pt", torch.device("cpu"))
    idx = torch.randint(11, (2, 12))
    assert torch.equal(copy(idx)[0], model(idx)[0])
    assert tokenizer.decode([0, 10]) == "ak" and state["step"] == 7 and not copy.training


class Evil:
    """Runs code when it is unpickled, if it is let."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_would_run_code_is_refused(workplace: Path):
    torch.save(make_state(make_model()) | {"log": Evil()}, "evil.pt")
    Path("evil.pickle").write_bytes(pickle.dumps(Evil()))
    for name, reason in (("evil.pt", "it holds code"), ("evil.pickle", "")):
        with pytest.raises(UserError, match=f"refused: {reason}"):
            utils.read_checkpoint(Path(name))
    assert not Path("executed").exists()


def test_damaged_and_foreign_files_are_refused(workplace: Path):
    utils.save_checkpoint(Path("good.pt"), make_state(make_model()))
    whole = Path("good.pt").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        Path("cut.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="refused"):
            utils.read_checkpoint(Path("cut.pt"))
    Path("text.pt").write_text("not a checkpoint")
    with zipfile.ZipFile("zip.pt", "w") as file:
        file.writestr("a", "b")
    torch.save({"model": {}}, "foreign.pt")
    torch.save([1, 2], "list.pt")
    for name in ("text.pt", "zip.pt", "foreign.pt", "list.pt"):
        with pytest.raises(UserError, match="refused"):
            utils.read_checkpoint(Path(name))
    with pytest.raises(UserError, match=r"no checkpoint missing\.pt"):
        utils.read_checkpoint(Path("missing.pt"))


@pytest.mark.parametrize(
    "change",
    [
        {"gpt_config": {"vocab_size": 12}},
        {"gpt_config": {"vocab_size": 11, "n_embd": -1}},
        {"gpt_config": {"n_layer": "many"}},
        {"gpt_config": 5},
        {"model": {"a": 1}},
        {"tokenizer": {"kind": "other"}},
        {"tokenizer": []},
    ],
)
def test_parts_that_do_not_fit_are_refused(workplace: Path, change: dict):
    utils.save_checkpoint(Path("bad.pt"), make_state(make_model()) | change)
    with pytest.raises(UserError, match="do not fit together"):
        utils.load_checkpoint(Path("bad.pt"), torch.device("cpu"))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch):
    path = tmp_path / "latest.pt"
    utils.save_checkpoint(path, make_state(make_model()))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*is whole"):
        utils.save_checkpoint(path, make_state(make_model(seed=1)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["latest.pt"]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), utils.atomic_write(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_the_newest_run_is_found(tmp_path: Path):
    with pytest.raises(UserError, match="no checkpoint in"):
        utils.newest_checkpoint(tmp_path)
    for age, name in enumerate(("b/best.pt", "latest.pt", "b/latest.pt", "a/latest.pt")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (1000 + age, 1000 + age))
    assert utils.newest_checkpoint(tmp_path) == tmp_path / "a/latest.pt"
    os.utime(tmp_path / "b/latest.pt", (2000, 2000))
    assert utils.newest_checkpoint(tmp_path) == tmp_path / "b/best.pt"
