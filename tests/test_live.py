"""Live logs, read back by the tools' own readers."""

import importlib.util
import json
import struct
import time
from collections.abc import Iterator

import pytest
from conftest import TINY_RUN

import train
from config import UserError


def logged(run) -> list[dict]:
    """The records of log.jsonl, without what is not a number yet."""
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if v is not None} for r in records if "step" in r]


def test_tensorboard_has_the_numbers_of_the_log_also_after_a_resume(workplace):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("torch.utils.tensorboard")
    run = workplace / "checkpoints"
    train.main([*TINY_RUN, "--max_steps=10"])  # without: what is logged later begins at step 0
    for flags in (["--max_steps=15", "--tensorboard"], ["--max_steps=20"]):
        train.main(["--resume", "--device=cpu", *flags])
        events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
        records = logged(run)
        assert set(events.Tags()["scalars"]) == set().union(*records)
        for name in events.Tags()["scalars"]:
            wanted = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r]
            assert [(e.step, e.value) for e in events.Scalars(name)] == wanted
    train.main([*TINY_RUN, "--overwrite", "--max_steps=5"])
    assert not (run / "tensorboard").exists()


def test_wandb_has_the_numbers_of_the_log_offline(workplace, monkeypatch):
    wandb = pytest.importorskip("wandb")
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main([*TINY_RUN, "--max_steps=10", "--wandb", "--tag=a"])
    wandb.finish()
    run = workplace / "checkpoints" / "a"
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    for _ in range(100):  # another process writes it, and may still be at it
        records = [messages.Record.FromString(data) for data in leveldb_records(file.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            names = [(i.key or i.nested_key[0], json.loads(i.value_json)) for i in items]
            history.append({k: v for k, v in names if not k.startswith("_")})
    assert history == logged(run)


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, in which Weights & Biases writes, after a head
    of 7 bytes: in blocks of 32 KiB, parts with a checksum (4 bytes), a length (2) and a kind (1:
    whole, 2: first, 3: middle, 4: last). Of a file that is being written, those that are whole."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # a header does not fit: the rest of the block is empty
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):
            yield whole
            whole = b""


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_written(workplace, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        train.main([*TINY_RUN, f"--{name}"])
    assert not (workplace / "checkpoints").exists()
