"""Two processes on a CPU, as torchrun starts them, against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import parallel
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [
    "--data=data/input.txt", "--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=16",
    "--batch_size=4", "--max_steps=20", "--eval_every=10", "--eval_windows=9", "--save_every=10",
    "--sample_tokens=5", "--dropout=0.1", "--precision=float32", "--no-compile", "--device=cpu",
    "--optimizer=adamw", "--lr_max=1e-3",
]  # fmt: skip

# train.py that notes each step's loss, and fails, or lasts, as it is told
DRIVER = """
import json, os, sys, time
import config, train
losses, rank = [], int(os.environ.get("RANK", 0))
train_step = train.Trainer.train_step

def noted(self):
    if self.step == 12 and rank == 1 and "fail" in os.environ.get("DRIVER", ""):
        raise config.UserError("a fault of process 1")
    if self.step == 12 and rank == 1 and "die" in os.environ.get("DRIVER", ""):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(3)
    if "last" in os.environ.get("DRIVER", ""):
        time.sleep(0.2)
    out = train_step(self)
    losses.append(out[0].item())
    return out

train.Trainer.train_step = noted
def main():
    status = train.main(sys.argv[1:])
    if rank == 0:
        json.dump(losses, open("losses.json", "w"))
    return status
config.run(main)
"""


def start_two(workplace: Path, *flags: str, does: str = "", **options: str) -> subprocess.Popen:
    """Two processes of train.py under torchrun."""
    (workplace / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DRIVER": does, "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restart finds dead addresses
    return subprocess.Popen(
        [*command, "driver.py", *SETTINGS, *flags],
        cwd=workplace, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_two(workplace: Path, *flags: str, **options: str) -> list[float]:
    """Each step's loss in two processes."""
    process = start_two(workplace, *flags, **options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads((workplace / "losses.json").read_text())


@pytest.fixture
def run_one(monkeypatch):
    """A function that runs train.py in this process, and returns each step's loss."""
    losses: list[float] = []
    train_step = train.Trainer.train_step

    def noted(self):
        out = train_step(self)
        losses.append(out[0].item())
        return out

    def run(*flags: str) -> list[float]:
        losses.clear()
        assert train.main([*SETTINGS, *flags]) == 0
        return list(losses)

    monkeypatch.setattr(train.Trainer, "train_step", noted)
    return run


def go_back(tag: str) -> None:
    """Make step 10 the run's last."""
    shutil.copy(f"checkpoints/{tag}/ckpt_00010.pt", f"checkpoints/{tag}/latest.pt")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_equal_one_that_accumulates(workplace, run_one, how):
    one = run_one("--tag=one", "--grad_accum=4")
    two = run_two(workplace, "--tag=two", "--grad_accum=2", f"--parallel={how}")
    assert len(two) == 20 and two == pytest.approx(one, abs=1e-5)
    logs = [
        utils.read_checkpoint(Path(f"checkpoints/{t}/latest.pt"))["log"] for t in ("one", "two")
    ]
    for name in ("train", "val", "grad_norm"):
        values = [[record[name] for record in log if record[name]] for log in logs]
        assert values[0] == pytest.approx(values[1], abs=1e-5), name
    # saved by two, resumed by one; and the other way round
    for tag in ("one", "two"):
        go_back(tag)
    assert run_one("--tag=two", "--resume") == pytest.approx(one[10:], abs=1e-5)
    resumed = run_two(workplace, "--tag=one", "--resume", f"--parallel={how}")
    assert resumed == pytest.approx(one[10:], abs=1e-5)


def test_muon_sees_whole_matrices_of_a_sliced_model(workplace, run_one):
    one = run_one("--tag=one", "--grad_accum=2", "--optimizer=muon", "--max_steps=6")
    two = run_two(workplace, "--tag=two", "--parallel=fsdp", "--optimizer=muon", "--max_steps=6")
    assert two == pytest.approx(one, abs=2e-3)  # Muon multiplies in bfloat16


def test_a_failing_process_ends_the_job_with_its_own_error(workplace):
    process = start_two(workplace, does="fail")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("error in process 1: a fault of process 1") == 1


def test_sigterm_saves_once_and_ends_all(workplace):
    process = start_two(workplace, "--max_steps=1000", "--eval_every=1000", does="last")
    deadline = time.monotonic() + 60
    while not Path("checkpoints/latest.pt").exists():  # of step 0
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert out.count("stopped and saved at step") == 1, errors
    assert utils.read_checkpoint(Path("checkpoints/latest.pt"))["step"] > 0


def test_a_job_that_lost_a_process_goes_on_from_its_checkpoint(workplace, run_one):
    one = run_one("--tag=one", "--grad_accum=2")
    two = run_two(workplace, "--tag=two", does="die", max_restarts="1")
    assert two == pytest.approx(one[10:], abs=1e-5)


def test_the_batches_of_a_step_are_shared_or_refused(monkeypatch):
    monkeypatch.setattr(parallel, "start", lambda device: device)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    config, device = train.TrainConfig(grad_accum=3), torch.device("cpu")
    train.join_processes(config, device, whole_step=False)
    assert config.grad_accum == 6  # three in each
    train.join_processes(config, device, whole_step=True)
    assert config.grad_accum == 6
    config.grad_accum = 3
    with pytest.raises(train.UserError, match="2 processes cannot share the run's 3 batches"):
        train.join_processes(config, device, whole_step=True)


def test_slices_need_several_processes(workplace):
    with pytest.raises(train.UserError, match="torchrun"):
        train.main([*SETTINGS, "--parallel=fsdp"])


def test_recomputed_activations_change_no_gradient():
    torch.manual_seed(0)
    config = train.GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_embd=16, n_head=2)
    model, x = train.GPT(config), torch.randint(11, (2, 8))
    gradients = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(x, x)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
