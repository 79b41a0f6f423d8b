"""What the tests share: a small text, small models, a place to train in."""

from pathlib import Path

import pytest
import torch

from config import GPTConfig
from model import GPT

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps until some other day".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests, visibly, on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def make_text(n_lines: int = 400) -> str:
    """A text in which there is something to learn: words in an order that mostly repeats."""
    lines = (
        " ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(1 + i % 9)) for i in range(n_lines)
    )
    return "\n".join(lines) + "\n"


def make_model(seed: int = 0, **settings: object) -> GPT:
    """A small model in eval mode, with weights large enough that every part of it matters."""
    defaults = {"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**defaults, **settings})).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a small text at data/input.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text(make_text(), encoding="utf-8")
    return tmp_path


# A run that takes a second or two.
TINY_RUN = (
    "--device=cpu --no-compile --precision=float32 --n_layer=1 --n_head=2 --n_embd=16 "
    "--block_size=16 --batch_size=4 --max_steps=20 --eval_every=5 --eval_windows=4 "
    "--sample_tokens=10"
).split()
