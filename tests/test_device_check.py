"""A GPU that does not compute what the CPU does is found. The CPU with errors stands in for it."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPONENTS, TINY_RUN
from torch import Tensor

import train
from config import GPTConfig, TrainConfig
from model import KVCache
from system.settings import UserError
from training import device_check, setup
from training.device_check import compute, difference
from utils import read_checkpoint

CPU = torch.device("cpu")
GPT = GPTConfig(block_size=32, n_layer=6, n_embd=64, n_head=2, n_inner=256)
attention, append, cross_entropy = F.scaled_dot_product_attention, KVCache.append, F.cross_entropy
fused = torch.backends.cuda.flash_sdp_enabled


# What is wrong on the GPU, and the reason that the check gives.
ATTENTION = (F, "scaled_dot_product_attention", lambda q, k, v, mask, **_: attention(q, k, v, mask))
NAN_LOSS = (F, "cross_entropy", lambda *args, **named: torch.nan * cross_entropy(*args, **named))
LATER_KEYS = (KVCache, "append", lambda *args: (append(*args)[0].roll(1, 2), *append(*args)[1:]))
NAN_KEYS = (KVCache, "append", lambda *args: (append(*args)[0] * torch.nan, *append(*args)[1:]))


def larger_gradients(*args: Any, **named: Any) -> Tensor:
    return (loss := cross_entropy(*args, **named)) * 1.02 - loss.detach() * 0.02


def wrong_if_fused(*args: Any, is_causal: bool) -> Tensor:
    return attention(*args, is_causal=is_causal and not fused())


class Stub:
    kind, n_computed, error = "mps", 0, None
    seconds: ClassVar = {"cpu": 0.2, "mps": 0.01, "cuda": 0.01}

    def compute(self, gpt: GPTConfig, batch_size: int, device: Any, precision: str) -> Any:
        self.n_computed += 1
        with pytest.MonkeyPatch.context() as patch:
            if self.error and device != CPU:
                patch.setattr(*self.error)
            return compute(gpt, batch_size, CPU, precision)[0], self.seconds[device.type]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    stub = Stub()
    monkeypatch.setattr(device_check, "compute", stub.compute)
    pick = lambda name: torch.device(stub.kind if name == "auto" else name)  # noqa: E731
    monkeypatch.setattr(setup, "pick_device", pick)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(device_check, "CACHE_DIR", str(tmp_path / "cache"))
    yield stub
    device_check.use_fused_attention(True)


def checked(device: str = "auto", gpt: GPTConfig = GPT, **settings: Any) -> str:
    settings = {"batch_size": 4, "precision": "float32"} | settings
    return setup.on_checked_device(gpt, TrainConfig(device=device, **settings))[1].device


@pytest.mark.parametrize("kind", ["mps", "cuda"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ATTENTION, "wrong loss, by "),
        ((F, "cross_entropy", larger_gradients), "wrong gradient of tok.weight, by 2.0%"),
        (NAN_LOSS, "wrong loss, by nan%"),
        ((F, "cross_entropy", Mock(side_effect=RuntimeError("no memory\nmore"))), "no memory"),
        (LATER_KEYS, "wrong tokens with the KV cache, by "),
        (NAN_KEYS, "wrong tokens with the KV cache, by nan%"),
    ],
)
def test_a_wrong_gpu_is_not_used(stub, capsys, kind, error, reason):
    stub.kind, stub.error = kind, error
    assert checked() == "cpu" and fused()  # the CPU too has fused kernels
    assert capsys.readouterr().out.startswith(f"device check: the CPU instead of {kind}: {reason}")
    with pytest.raises(UserError, match=rf"{kind} cannot be used \({reason}.*\): use --device cpu"):
        checked(kind)


def test_plain_attention_is_used_if_that_mends_it(stub, capsys):
    stub.kind, stub.error = "cuda", (*ATTENTION[:2], wrong_if_fused)
    for _ in range(2):  # the second time it is remembered
        device_check.use_fused_attention(True)
        assert checked() == "auto" and not fused() and stub.n_computed == 3
        found = "cuda computes what the CPU does with plain attention, else wrong loss, by "
        assert capsys.readouterr().out.startswith(f"device check: {found}")


@pytest.mark.parametrize("settings", COMPONENTS, ids=str)
def test_rounding_is_no_error_and_seeing_the_future_is(monkeypatch, settings):
    gpt = GPTConfig(**asdict(GPT) | {"vocab_size": 64, "tie_weights": False} | settings)
    exact, _ = compute(gpt, 2, CPU, "float32")
    for precision in ("bfloat16", "float16"):
        assert difference(compute(gpt, 2, CPU, precision)[0], exact, precision) == ""
    monkeypatch.setattr(*ATTENTION)
    assert difference(compute(gpt, 2, CPU, "float32")[0], exact, "bfloat16")


def test_a_faster_cpu_is_used_unless_the_gpu_is_requested(stub):
    """For a model with three times the layers, MPS starts three times as many kernels; the time on
    a CPU is proportional to the weights."""
    stub.seconds = {"cpu": 0.01, "mps": 0.1}
    assert checked() == "cpu" and checked("mps") == "mps"
    assert checked(gpt=replace(GPT, n_embd=1024, n_inner=4096)) == "auto"


def test_a_check_is_remembered_unless_its_file_is_damaged_or_cannot_be_written(stub, tmp_path):
    def n_computed(**changes: Any) -> int:
        before = stub.n_computed
        assert checked(**changes) == "auto"
        return stub.n_computed - before

    assert (n_computed(), n_computed(), n_computed(seed=2)) == (2, 0, 0)
    assert n_computed(gpt=replace(GPT, head_size=16)) == n_computed(batch_size=3) == 2
    file = tmp_path / "cache/tinyllm/devices.json"
    for content in ("{", "[3]", "5", file.read_text().replace("0.01", '"a"'), "{}"):
        file.write_text(content)
        assert (n_computed(), n_computed()) == (2, 0)
    file.unlink()
    file.mkdir()
    assert (n_computed(), n_computed()) == (2, 2)


def test_a_run_on_a_wrong_gpu_uses_the_cpu_and_resumes_on_it(stub, workplace, monkeypatch, capsys):
    stub.error = ATTENTION
    monkeypatch.setattr(setup, "device_problems", lambda name: [])
    words = [word for word in TINY_RUN if word != "--device=cpu"]
    monkeypatch.setattr(train, "init_process_group", torch.device)
    assert train.main([*words, "--max_steps=1"]) == 0
    assert "preset laptop" in capsys.readouterr().out
    assert read_checkpoint(Path("checkpoints/latest.pt"))["train_config"]["device"] == "cpu"
    assert train.main(["--resume", "--max_steps=2"]) == 0
    assert "device check" not in capsys.readouterr().out
