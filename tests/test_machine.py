"""Precision, compilation and memory on this machine."""

import numpy as np
import pytest
import torch
from conftest import make_model

from config import TrainConfig
from training import machine
from training.machine import memory_estimate, pick_compile, pick_precision, to_gpu_if_small

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1.0, "float32"), (0.7, "float32"), (0.6, "bfloat16")]
)
def test_a_cpu_uses_bfloat16_if_it_is_one_and_a_half_times_as_fast(
    monkeypatch, seconds: float, expected: str
):
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(machine, "matmul_seconds", times.get)
    assert pick_precision("auto", CPU)[0] == expected
    assert pick_precision("float16", CPU) == ("float16", "as requested")


def test_nothing_is_compiled_if_compiling_does_not_work(monkeypatch, capsys):
    def fail(function: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail)
    assert pick_compile(None, CPU) is False
    assert capsys.readouterr().out == "not compiling: no C++ compiler\n"
    assert pick_compile(True, CPU) is True
    assert pick_compile(None, torch.device("mps")) is False


def test_the_memory_estimate_equals_a_count_by_hand(monkeypatch):
    model = make_model()
    n = model.num_params()
    run = TrainConfig(batch_size=2, precision="float32")
    estimate = memory_estimate(model.config, run)
    assert [estimate[k] for k in ("weights", "gradients", "optimizer")] == [4 * n, 4 * n, 8 * n]
    assert estimate["batches"] == 24 * 2 * 8
    # 2 blocks x (20 x 16 + 5 x 64) numbers, and 11 logits twice and their gradient, for 24 tokens
    assert estimate["activations"] == 24 * (2 * (320 + 320) * 4 + 11 * 12)
    run.optimizer, run.grad_checkpoint = "muon", True
    run.parallel = "fsdp"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    estimate = memory_estimate(model.config, run)
    assert [estimate[k] for k in ("weights", "gradients")] == [2 * n, 2 * n]
    # two averages for the embedding (11 x 16) and the last norm (16), one for the rest
    assert estimate["optimizer"] == 2 * (n + 11 * 16 + 16)
    assert estimate["activations"] == 24 * (2 * 16 * 4 + (320 + 320) * 4 + 11 * 12)


def test_only_small_streams_are_copied_to_another_device(monkeypatch):
    ids = np.arange(100, dtype=np.uint16)
    monkeypatch.setattr(machine, "MAX_GPU_TOKENS", 100)
    copy = to_gpu_if_small(ids, torch.device("meta"))  # has no memory, like a GPU for this purpose
    assert (copy.device.type, copy.dtype, len(copy)) == ("meta", torch.int32, 100)
    assert to_gpu_if_small(ids, CPU) is ids
    monkeypatch.setattr(machine, "MAX_GPU_TOKENS", 99)
    assert to_gpu_if_small(ids, torch.device("meta")) is ids
