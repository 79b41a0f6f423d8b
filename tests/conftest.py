"""What the tests share: a small text, small models, a place to train in."""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from matplotlib.figure import Figure

import train
from config import ARCHS, GPTConfig
from corpus.text import note
from exporting.hf_model import config_to_hf, weights_to_hf
from model import GPT, MLPS, NORMS, POSITIONS
from training import run_log, setup

# While mutmut records which functions a test calls, child processes must run the plain code: they
# cannot record, and would not find mutmut's settings. Later they run the same mutant.
if os.environ.get("MUTANT_UNDER_TEST") == "stats":
    del os.environ["MUTANT_UNDER_TEST"]

# One thread in each of pytest's processes and in those that tests start: two processes with two
# threads each wait for each other, and take three times as long on two cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
SLOW_IMPORTS = ["torch._dynamo", "torch.distributed.fsdp", "matplotlib.figure"]
multiprocessing.set_forkserver_preload(SLOW_IMPORTS)

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps until some other day".split()


# Every run has the same examples, and no limit of time, which depends on the machine.
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers that a test draws without a seed of its own are the same in every run."""
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests, visibly, on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def new_notes() -> None:
    """Each test sees the notes that a new process prints."""
    note.cache_clear()


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


def to_transformers(model: GPT, arch: str) -> Any:
    """The model of Hugging Face's transformers with the weights of ours."""
    hf = pytest.importorskip("transformers")
    settings = config_to_hf(model.config, arch, {})
    config_class = {"gpt2": hf.GPT2Config, "llama": hf.LlamaConfig, "qwen3": hf.Qwen3Config}[arch]
    theirs = getattr(hf, settings["architectures"][0])(config_class(**settings)).eval()
    theirs.load_state_dict(weights_to_hf(model.state_dict(), model.config, arch), strict=False)
    return theirs


# One setting of every component at a time, and every architecture: from the mappings, so that new
# components are tested too.
COMPONENTS = [
    *({"norm": name} for name in NORMS),
    *({"mlp": name} for name in MLPS),
    *({"pos": name} for name in POSITIONS),
    *ARCHS.values(),
    {"post_norm": True},
    {"token_shift": True},
    {"token_shift": True, "pos": "none"},
    {"n_head": 4, "n_kv_head": 2},
    {"n_head": 4, "n_kv_head": 1, "pos": "learned"},
    {"head_size": 6},
    {"tie_weights": False, "bias": True, "qk_norm": False},
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a small text at data/input.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text(make_text(), encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def quick_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer than tiny runs is left out, except where it is tested: the loss curve, and
    timing float32 and bfloat16 to select one, which is float32 then."""
    if request.module.__name__ != "test_run_log":
        monkeypatch.setattr(run_log, "plot_runs", lambda runs: Figure(figsize=(1, 1)))
    if request.module.__name__ != "test_machine":
        monkeypatch.setattr(setup, "matmul_seconds", lambda dtype: 1.0)


def stop_after(steps: int) -> type[train.StopSignal]:
    """A StopSignal that receives SIGTERM during the last of these steps."""

    class Stop(train.StopSignal):
        checks = 0

        def requested(self) -> bool:
            self.checks += 1
            self.number = signal.SIGTERM if self.checks > steps else 0
            return self.checks > steps

    return Stop


# A run that takes a second or two.
TINY_RUN = (
    "--device=cpu --no-compile --precision=float32 --n_layer=1 --n_head=2 --n_embd=16 "
    "--block_size=16 --batch_size=4 --max_steps=20 --eval_every=5 --eval_windows=4 "
    "--sample_tokens=10"
).split()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data").mkdir()
        Path("data/input.txt").write_text(make_text(), encoding="utf-8")
        assert train.main(TINY_RUN) == 0
    return folder / "checkpoints"


@pytest.fixture
def trained(workplace: Path, tiny_run: Path) -> Path:
    shutil.copytree(tiny_run, "checkpoints")
    return workplace
