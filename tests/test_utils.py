"""Batches, windows, devices, checkpoints."""

import errno
import math
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import make_model
from exports import save_model

import model
import utils
from corpus.bpe import train_bpe
from system.device import device_problems, pick_device
from system.files import atomic_write, save_checkpoint
from system.settings import UserError
from tokenizer import CharTokenizer
from utils import autocast, newest_checkpoint

TOKENIZER = CharTokenizer.train(["abcdefghijk"])


def test_windows_of_a_tensor_equal_those_of_the_array():
    ids = np.random.default_rng(0).integers(60000, size=100).astype(np.uint16)
    for pair in zip(
        utils.windows(ids, np.array([0, 50, 97]), 8),
        utils.windows(torch.from_numpy(ids.astype(np.int32)), np.array([0, 50, 97]), 8),
        strict=True,
    ):
        assert torch.equal(*pair) and pair[1].dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_all_parts_of_a_text_are_read_about_equally_often(seed: int):
    n, T, B = 100_000, 50, 10
    counts = np.zeros(n, dtype=int)
    for number in range(2 * n // (T * B)):  # two epochs
        x, _ = utils.get_batch(np.arange(n), T, B, seed, number)
        np.add.at(counts, x.numpy(), 1)
    # Random windows would leave out e^-2 = 0.135 of the tokens. The golden ratio's points are never
    # further apart than 1.9 times their mean distance (three-gap theorem, Sos 1958), 48 here.
    inside = counts[T:-T]
    assert inside.min() >= 1 and inside.max() <= 4
    assert x[:, 0].sort().values.diff().min() > n / B / 2  # a batch's windows are far apart


@pytest.mark.parametrize("lengths", [[300] * 5, [2000, 1000], [1000, 10], [5, 600, 3, 3]])
def test_all_tokens_of_long_documents_are_trained_equally_often(lengths: list[int]):
    docs, n, size = np.cumsum([0, *lengths[:-1]]), sum(lengths), 64
    _, y = utils.get_batch(np.arange(n), size, n, seed=1, number=0, docs=docs)
    counts = np.bincount(y[y != -100], minlength=n)
    assert (counts[1:] > 0).all()
    inside = counts[size : n - size]  # the ends of a stream are in fewer windows
    assert 0.7 * size < inside.min() and inside.max() < 1.3 * size


def test_windows_in_short_documents_begin_at_their_starts():
    docs = np.array([0, 40, 43, 51, 53])  # of 40, 3, 8, 2 and 47 tokens
    x, _ = utils.get_batch(np.arange(100), 8, 1000, seed=1, number=0, docs=docs)
    starts = set(x[:, 0].tolist())
    assert {40, 43, 51} <= starts and not starts & {41, 42, *range(44, 51), 52}
    assert starts > set(range(40)) | set(range(53, 92))  # anywhere in long documents


def test_short_documents_at_the_end_of_a_stream_are_read_as_often_as_others():
    docs = np.arange(0, 40, 4)  # ten documents of 4 tokens
    x, y = utils.get_batch(np.arange(40), 8, 1000, seed=1, number=0, docs=docs)
    starts, counts = np.unique(x[:, 0], return_counts=True)
    assert starts.tolist() == docs.tolist() and abs(counts - 100).max() <= 2
    last = x[:, 0] == 36
    assert y[last][0].tolist() == [37, 38, 39, -100, -100, -100, -100, -100]


def test_documents_shorter_together_than_a_window_are_each_read():
    x, y = utils.get_batch(np.arange(7), 8, 70, seed=1, number=0, docs=np.array([0, 3]))
    assert abs((x[:, 0] == 0).sum() - 30) <= 2 and set(x[:, 0].tolist()) == {0, 3}  # 3/7 of 70
    first = x[:, 0] == 0
    assert x[first][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]  # 0 is past the end
    assert y[first][0].tolist() == [1, 2, 3, 4, 5, 6, -100, -100]


def test_a_mixed_seed_depends_on_every_number_and_their_order():
    combinations = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    assert len({utils.mix_seed(*numbers) for numbers in combinations}) == 27
    # NumPy guarantees the output of SeedSequence; a saved run must find its batches again.
    expected = np.random.SeedSequence((1337, 2, 3)).generate_state(2, np.uint64)
    assert utils.mix_seed(1337, 2, 3) == expected[0]


def test_auto_selects_the_fastest_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    ones = Mock(side_effect=[RuntimeError("no memory"), 1, 1])
    monkeypatch.setattr(torch, "ones", ones)
    assert pick_device("auto").type == "cpu"
    assert pick_device("auto").type == "mps" and ones.call_args == call(1, device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


def test_a_checkpoint_restores_model_and_tokenizer(tmp_path: Path):
    model = make_model()
    save_model(tmp_path / "a.pt", model, TOKENIZER, step=7)
    copy, tokenizer, state = utils.load_checkpoint(tmp_path / "a.pt", torch.device("cpu"))
    idx = torch.randint(11, (2, 12))
    assert torch.equal(copy(idx)[0], model(idx)[0])
    assert tokenizer.decode([0, 10]) == "ak" and state["step"] == 7 and not copy.training


class Evil:
    """Runs code when it is unpickled without restrictions."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_would_run_code_is_rejected(workplace: Path):
    torch.save(save_model("evil.pt", make_model(), TOKENIZER) | {"log": Evil()}, "evil.pt")
    Path("evil.pickle").write_bytes(pickle.dumps(Evil()))
    for name, reason in (("evil.pt", "it contains code"), ("evil.pickle", "is not a checkpoint")):
        with pytest.raises(UserError, match=reason):
            utils.read_checkpoint(Path(name))
    assert not Path("executed").exists()


def test_damaged_and_foreign_files_are_one_error_and_no_warning(workplace: Path, recwarn):
    save_model("good.pt", make_model(), TOKENIZER)
    content = Path("good.pt").read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        Path("cut.pt").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut\.pt is not a checkpoint, or it is incomplete"):
            utils.read_checkpoint(Path("cut.pt"))
    Path("text.pt").write_text("not a checkpoint")
    with zipfile.ZipFile("zip.pt", "w") as file:
        file.writestr("a", "b")
    torch.save({"model": {}}, "foreign.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"a": 1}, "old.pt", _use_new_zipfile_serialization=False)
    damaged, foreign = "invalid checkpoint", "is not a checkpoint of this program"
    incomplete = "is not a checkpoint, or it is incomplete"
    reasons = {"text": incomplete, "zip": damaged, "foreign": foreign, "list": foreign}
    reasons["old"] = incomplete
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            utils.read_checkpoint(Path(f"{name}.pt"))
    with pytest.raises(UserError, match=r"no checkpoint missing\.pt"):
        utils.read_checkpoint(Path("missing.pt"))
    assert not list(recwarn)


SIZES = ("n_layer", "n_embd", "block_size", "n_inner", "vocab_size")


@pytest.mark.parametrize(
    "change",
    [
        {"gpt_config": {"vocab_size": 12}},
        {"gpt_config": {"vocab_size": 11, "n_embd": -1}},
        {"gpt_config": {"n_layer": "many"}},
        {"gpt_config": 5},
        {"model": {"a": 1}},
        {"model": {n: t * math.nan for n, t in make_model().state_dict().items()}},
        *({"gpt_config": vars(make_model(pos="learned").config) | {n: 10**9}} for n in SIZES),
        {"tokenizer": {"kind": "other"}},
        {"tokenizer": []},
        {"tokenizer": CharTokenizer.train(["abcdefghij"]).to_dict()},  # 10 tokens, not 11
        {"tokenizer": train_bpe(Counter({"a": 1}), 257).to_dict()},
    ],
)
def test_contents_that_do_not_match_are_rejected(workplace: Path, change: dict):
    state = save_model("good.pt", make_model(), TOKENIZER)
    save_checkpoint(Path("bad.pt"), state | change)
    with pytest.raises(UserError, match=r"invalid checkpoint bad\.pt: its contents do not match"):
        utils.load_checkpoint(Path("bad.pt"), torch.device("cpu"))


def test_a_component_without_an_entry_is_not_reported_as_a_damaged_file(workplace, monkeypatch):
    save_model("good.pt", make_model(), TOKENIZER)
    with monkeypatch.context() as patch, pytest.raises(NameError, match="CharTokenizer"):
        patch.delattr(utils.tokenizers, "CharTokenizer")
        utils.load_checkpoint(Path("good.pt"))
    monkeypatch.delitem(model.NORMS, "rmsnorm")  # a bug: a choice of --norm that no table has
    with pytest.raises(KeyError, match="rmsnorm"):
        utils.load_checkpoint(Path("good.pt"))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch, function: str):
    path = tmp_path / "latest.pt"
    save_model(path, make_model(), TOKENIZER)
    before = path.read_bytes()
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, function, Mock(side_effect=error))
    with pytest.raises(UserError, match=r"No space left on device.*previous file is unchanged"):
        save_model(path, make_model(seed=1), TOKENIZER)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["latest.pt"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_the_best_checkpoint_of_the_newest_run_is_found(tmp_path: Path):
    def touch(name: str, age: int) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))

    with pytest.raises(UserError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)
    names = ("a/best.pt", "a/latest.pt", "best.pt", "b/ckpt_5.pt", "c/best.txt")
    for age, name in enumerate(names, start=1000):
        touch(name, age)
    assert newest_checkpoint(tmp_path) == tmp_path / "best.pt"
    touch("a/latest.pt", 2000)
    assert newest_checkpoint(tmp_path) == tmp_path / "a/best.pt"
    (tmp_path / "a/best.pt").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "a/latest.pt"


def reference_starts(n_ids: int, T: int, B: int, seed: int, number: int) -> list[int]:
    """Where the windows of a batch begin, in Python's integers: the i-th window of a run begins at
    the fractional part of offset + i / golden ratio, times the number of possible starts."""
    offset = int(np.random.default_rng(seed).integers(1 << 64, dtype=np.uint64))
    numbers = range(number * B, number * B + B)
    fractions = [(offset + i * 0x9E3779B97F4A7C15) % 2**64 for i in numbers]
    return [(fraction >> 11) * (n_ids - T) // 2**53 for fraction in fractions]


@pytest.mark.parametrize(
    ("T", "B", "seed", "number"), [(8, 4, 0, 0), (8, 4, 7, 3), (1, 1, 2, 9), (99, 5, 1, 100)]
)
def test_windows_begin_a_golden_ratio_apart(T: int, B: int, seed: int, number: int):
    x, y = utils.get_batch(np.arange(100), T, B, seed, number)
    assert x.shape == y.shape == (B, T)
    assert x[:, 0].tolist() == reference_starts(100, T, B, seed, number)
    assert torch.equal(y, x + 1)  # always inside the stream


def test_window_positions_are_exact_late_in_a_long_run():
    class Stream:  # its tokens are their own positions
        def __len__(self) -> int:
            return 10**10

        def __getitem__(self, index: np.ndarray) -> np.ndarray:
            return index

    x, _ = utils.get_batch(Stream(), 8, 4, seed=1, number=10**12)
    expected = reference_starts(10**10, 8, 4, seed=1, number=10**12)
    assert x[:, 0].tolist() == pytest.approx(expected, abs=1)


def test_golden_ratio():
    assert pytest.approx((1 + math.sqrt(5)) / 2, rel=1e-15) == 2**64 / 0x9E3779B97F4A7C15


@pytest.mark.parametrize(
    ("n_ids", "T", "n", "starts"),
    [
        (101, 10, 4, [0, 30, 60, 90]),
        (101, 10, 9, [0, 11, 22, 33, 45, 56, 67, 78, 90]),  # 90 / 8 = 11.25
        (101, 10, 10, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),  # as many as there are
        (102, 10, 11, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),  # one target in the last
        (102, 10, None, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (101, 10, None, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),  # 100 has no target
        (2, 10, None, [0]),
        (11, 10, 1, [0]),
    ],
)
def test_even_starts_by_hand(n_ids: int, T: int, n: int | None, starts: list[int]):
    found = utils.even_starts(n_ids, T, n)
    assert found.tolist() == starts and found.dtype == np.int64


@pytest.mark.parametrize(
    ("name", "n_gpus", "works"),
    [
        ("cpu", 0, True),
        ("cuda", 0, False),
        ("cuda", 1, True),
        ("cuda:0", 1, True),
        ("cuda:1", 1, False),
        ("cuda:1", 2, True),
        ("cuda:2", 2, False),
        ("mps", 2, False),
        ("meta", 2, False),
        ("quantum", 2, False),
    ],
)
def test_a_gpu_exists_if_its_number_is_below_their_count(monkeypatch, name, n_gpus, works):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if works:
        assert pick_device(name) == torch.device(name) and device_problems(name) == []
    elif name == "quantum":
        with pytest.raises(UserError, match="unknown device 'quantum'"):
            pick_device(name)
    else:
        have = "cuda, cpu" if n_gpus else "cpu"
        (problem,) = device_problems(name)
        assert problem == f"no device {name!r} on this machine (it has {have}): use --device auto"


def test_a_product_has_the_precision_that_is_asked_for():
    a = torch.ones(2, 2)
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, dtype in types.items():
        with autocast(torch.device("cpu"), name):
            assert (a @ a).dtype == dtype
    with autocast(torch.device("cpu"), "bfloat16"):
        with autocast(torch.device("cpu"), "float32"):  # also inside another one
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_an_incomplete_checkpoint_is_rejected(tmp_path: Path):
    state = save_model(tmp_path / "a.pt", make_model(), TOKENIZER)
    for key in sorted(state):
        save_checkpoint(tmp_path / "a.pt", {k: v for k, v in state.items() if k != key})
        with pytest.raises(UserError, match=rf"a\.pt is not a checkpoint .*: no '{key}'"):
            utils.read_checkpoint(tmp_path / "a.pt")
    save_checkpoint(tmp_path / "b.pt", state | {"more": 1})
    assert utils.read_checkpoint(tmp_path / "b.pt")["more"] == 1


def test_a_written_file_is_on_disk_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"0123456789")
    assert calls == [10, "replace"]  # all bytes
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"0123456789"
