"""Two processes on a CPU, forks or torchrun's, against one; and the weights that they hold."""

import copy
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from conftest import make_model
from test_finetune import answer_losses, make_task, make_task_model, records_in_order
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import finetune
import train
import utils
from config import ARCH_FIELDS, OPTIMIZERS, PRESETS, GPTConfig, TrainConfig, train_settings
from finetuning.records import Records
from plots import read_run
from system.settings import UserError
from training import distributed
from training.distributed import (
    Replica,
    all_reduce,
    broadcast_from_rank0,
    destroy_process_group,
    full_tensor,
    init_process_group,
    is_restart,
    is_torchrun,
    load_optimizer,
    local_rank_zero_first,
    make_replica,
    rank,
    world_size,
)
from training.fsdp import gather
from training.setup import check_run, resolve_train
from utils import autocast

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
IDS = torch.arange(8)[None]
SETTINGS = [
    "--data=data/input.txt", "--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=16",
    "--batch_size=4", "--max_steps=20", "--eval_every=10", "--eval_windows=9", "--save_every=10",
    "--sample_tokens=5", "--dropout=0.1", "--precision=float32", "--no-compile", "--device=cpu",
    "--optimizer=adamw", "--lr_max=1e-3",
]  # fmt: skip

# train.py that records the loss of each step, and that fails, dies or is slow if told so
TRAIN = """
import json, os, sys, time
import train
from system.start import run
from system.settings import UserError
from training.run_log import RunLog
RunLog.plot = lambda self: None  # slower than everything else
losses, rank = [], int(os.environ.get("RANK", 0))
train_step = train.Trainer.train_step
fault = os.environ.get("DRIVER_FAULT")

def record(self):
    if self.step == 12 and rank == 1 and fault == "error":
        raise UserError("a fault of process 1")
    if self.step == 12 and rank == 1 and fault == "death":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(3)
    if fault == "slow":
        open(f"step_{self.step}", "w").close()
        time.sleep(0.2)
    out = train_step(self)
    losses.append(out["loss"].item())
    return out

train.Trainer.train_step = record
def main():
    status = train.main(sys.argv[1:])
    if rank == 0:
        json.dump(losses, open("losses.json", "w"))
    return status
run(main)
"""
CHECK = "import sys, test_distributed; getattr(test_distributed, sys.argv[1])()"
FINETUNE = "import finetune; from system.start import run; run(finetune.main)"


def start_two(folder: Path, script: str, *words: str, fault: str = "", **options: str):
    """Start two processes of a script under torchrun."""
    if sys.platform == "win32":
        pytest.skip("PyTorch for Windows has no libuv, which torchrun needs")
    (folder / "driver.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment |= {"DRIVER_FAULT": fault, "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restart finds dead addresses
    return subprocess.Popen(
        [*command, "driver.py", *words],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_rank(rank: int, port: int, folder: Path, script: str, words: tuple[str, ...]) -> None:
    """Run a script as one of two processes of torchrun."""
    os.chdir(folder)
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = ["driver.py", *words]
    exec(script, {"__name__": "__main__"})


def run_two(folder: Path, script: str, *words: str) -> None:
    """Run a script in two forks of a process that has imported PyTorch: torchrun takes seconds."""
    if sys.platform == "win32":
        pytest.skip("no fork on Windows")
    if "MUTANT_UNDER_TEST" in os.environ:  # forks would import mutmut
        process = start_two(folder, script, *words)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return
    context = multiprocessing.get_context("forkserver")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [(rank, port, folder, script, words) for rank in (0, 1)]
    processes = [context.Process(target=run_rank, args=args, daemon=True) for args in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]


def train_two(folder: Path, *flags: str) -> list[float]:
    run_two(folder, TRAIN, *SETTINGS, *flags)
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture
def train_one(monkeypatch) -> Callable[..., list[float]]:
    """A function that runs train.py in this process and returns the loss of each step."""
    losses: list[float] = []
    train_step = train.Trainer.train_step

    def record(self):
        out = train_step(self)
        losses.append(out["loss"].item())
        return out

    def run(*flags: str) -> list[float]:
        losses.clear()
        assert train.main([*SETTINGS, *flags]) == 0
        return list(losses)

    monkeypatch.setattr(train.Trainer, "train_step", record)
    return run


def set_world_size(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """What torchrun tells one of n processes, without the others."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", str(n))


def rewind(tag: str) -> None:
    """Make step 10 the last one of a run."""
    shutil.copy(f"checkpoints/{tag}/ckpt_00010.pt", f"checkpoints/{tag}/latest.pt")


def assert_equal(state: Any, expected: Any) -> None:
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


# --- runs


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_same_micro_batches(workplace, train_one, parallel):
    one = train_one("--tag=one", "--grad_accum=4")
    two = train_two(workplace, "--tag=two", "--grad_accum=4", f"--parallel={parallel}")
    assert len(two) == 20 and two == pytest.approx(one, abs=1e-5)
    runs = [Path("checkpoints", tag) for tag in ("one", "two")]
    logs = [utils.read_checkpoint(run / "latest.pt")["log"] for run in runs]
    for name in ("train", "val", "grad_norm"):
        values = [[record[name] for record in log if record[name]] for log in logs]
        assert values[0] == pytest.approx(values[1], abs=1e-5), name
    final = [read_run(run).final["val"] for run in runs]
    assert final[0] == pytest.approx(final[1], abs=1e-5)
    # saved by two processes, resumed by one; and the reverse
    for tag in ("one", "two"):
        rewind(tag)
    assert train_one("--tag=two", "--resume") == pytest.approx(one[10:], abs=1e-5)
    resumed = train_two(workplace, "--tag=one", "--resume", f"--parallel={parallel}")
    assert resumed == pytest.approx(one[10:], abs=1e-5)


def test_muon_updates_full_matrices_of_a_sharded_model(workplace, train_one):
    flags = ("--optimizer=muon", "--max_steps=6")
    one = train_one("--tag=one", "--grad_accum=2", *flags)
    two = train_two(workplace, "--tag=two", "--parallel=fsdp", *flags)  # a micro-batch each
    assert two == pytest.approx(one, abs=2e-3)  # Muon multiplies in bfloat16


def test_a_failing_process_ends_the_job_with_one_error_message(workplace):
    process = start_two(workplace, TRAIN, *SETTINGS, fault="error")
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert errors.count("error in process 1: a fault of process 1") == 1


def test_sigterm_saves_once_and_ends_all_processes(workplace):
    words = (TRAIN, *SETTINGS, "--max_steps=1000", "--eval_every=1000")
    process = start_two(workplace, *words, fault="slow")
    deadline = time.monotonic() + 300
    while not Path("step_2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=300)
    assert out.count("stopped and saved at step") == 1, errors
    assert utils.read_checkpoint(Path("checkpoints/latest.pt"))["step"] >= 2


def test_a_restarted_job_resumes_from_its_checkpoint(workplace, train_one):
    one = train_one("--tag=one", "--grad_accum=2")
    process = start_two(workplace, TRAIN, *SETTINGS, fault="death", max_restarts="1")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(Path("losses.json").read_text()) == pytest.approx(one[10:], abs=1e-5)


def test_two_processes_fine_tune_like_one_with_the_same_micro_batches(workplace):
    assert train.main([*SETTINGS, "--max_steps=1", "--block_size=48"]) == 0
    records = [{"question": "fox", "answer": "jumps " * n} for n in (1, 2, 3, 4)]
    Path("qa.json").write_text(json.dumps(records))
    flags = ["checkpoints/best.pt", "--objective=qa", "--data=qa.json", "--lora_rank=2"]
    flags += ["--device=cpu", "--precision=float32", "--batch_size=1", "--max_steps=4"]
    flags += ["--eval_every=4", "--lr_max=1e-2", "--sample_tokens=5"]
    assert finetune.main([*flags, "--tag=one", "--grad_accum=2"]) == 0
    run_two(workplace, FINETUNE, *flags, "--tag=two")
    one, two = (torch.load(f"checkpoints/{tag}/adapter.pt")["tensors"] for tag in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if name.endswith(".B"))


# --- the loss of a step


def save_step_gradients() -> None:
    """In both processes: evaluations, and one step on answers of different lengths (DDP, FSDP)."""
    init_process_group("cpu")
    Records.random_batch = records_in_order
    for parallel in ("ddp", "fsdp"):
        config = TrainConfig(
            batch_size=2, grad_accum=2, grad_clip=0.0, precision="float32", compile=False,
            parallel=parallel,
        )  # fmt: skip
        task = make_task("qa", config)
        model = make_task_model(task.records.tokenizer.vocab_size)
        trainer = train.Trainer(model, task, config, CPU)
        evaluations = {"qa": trainer.evaluate()}
        trainer.task = make_task("dpo", config)
        evaluations["dpo"] = trainer.evaluate()
        trainer.task = task
        metrics = trainer.train_step() | {"evaluations": evaluations}
        metrics |= {name: gather(p.grad) for name, p in model.named_parameters()}
        torch.save(metrics, f"{parallel}_{rank()}.pt")
        del model
    destroy_process_group()


def test_two_processes_average_over_the_tokens_of_both(workplace):
    task = make_task("qa", TrainConfig())
    model = make_task_model(task.records.tokenizer.vocab_size)
    n_tokens = [example.scored.sum() for (example,) in task.records.splits["train"].records]
    assert sum(n_tokens[:2]) != sum(n_tokens[2:])  # of the two processes
    loss = sum(answer_losses(task, model)) / sum(n_tokens)
    loss.backward()
    expected = {name: make_task(name, TrainConfig()).evaluate(model) for name in ("qa", "dpo")}
    run_two(workplace, CHECK, "save_step_gradients")
    for name in ("ddp_0", "ddp_1", "fsdp_0", "fsdp_1"):
        metrics = torch.load(f"{name}.pt")
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for objective, evaluation in metrics["evaluations"].items():
            assert evaluation == pytest.approx(expected[objective], rel=1e-5)
        for parameter, p in model.named_parameters():
            torch.testing.assert_close(metrics[parameter], p.grad, rtol=1e-5, atol=1e-6)


def test_processes_must_share_the_micro_batches_of_a_step_equally(workplace, monkeypatch):
    train.main([*SETTINGS, "--max_steps=1"])
    set_world_size(monkeypatch, 2)
    with pytest.raises(UserError, match="2 processes cannot share 1 micro-batches per step"):
        train.main(["--resume", "--device=cpu"])
    for n, n_problems in ((3, 1), (4, 0)):
        config = TrainConfig(grad_accum=n, device="cpu", tag="new")
        assert len(check_run(GPTConfig(), config)) == n_problems


def test_each_process_has_one_micro_batch_by_default(workplace, monkeypatch):
    flags = {"device": "cpu", "data": "data/input.txt"}
    train.main([*SETTINGS, "--max_steps=1"])
    tuned = {"source": "checkpoints/best.pt", "data": "data/input.txt"}
    for n in (1, 2, 6):
        set_world_size(monkeypatch, n)
        assert resolve_train(flags)[1].grad_accum == n
        assert resolve_train(flags | {"grad_accum": 12})[1].grad_accum == 12
        assert resolve_train(flags | {"resume": True})[1].grad_accum == 1  # the checkpoint's
        assert finetune.resolve_finetune(tuned)[2].grad_accum == n
        assert finetune.resolve_finetune(tuned | {"grad_accum": 12})[2].grad_accum == 12


def test_fsdp_needs_torchrun_and_no_float16(workplace, monkeypatch):
    with pytest.raises(UserError, match=r"--parallel fsdp needs several processes: .*torchrun"):
        train.main([*SETTINGS, "--parallel=fsdp"])
    set_world_size(monkeypatch, 1)
    with pytest.raises(UserError, match="--parallel fsdp has no loss scaling for float16"):
        train.main([*SETTINGS, "--parallel=fsdp", "--precision=float16"])
    assert not Path("checkpoints").exists()


# --- weights


def check_weights(replica: Any, before: dict[str, Tensor], tied: bool) -> None:
    """The weights of a Replica or of Shards are those of its model. before: a copy of them."""
    model, idx = replica.model, torch.arange(8)[None]
    other = make_model(1, tie_weights=tied)
    others = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert_equal(replica.weights(), before)
    for tensor in replica.weights().values():
        tensor.zero_()
    assert_equal(replica.weights(), before)  # a copy was overwritten, not the model
    parameters = list(model.parameters())
    replica.set_weights(others)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.allclose(model(idx)[0], other(idx)[0], atol=1e-5)
    assert_equal(replica.weights(), others)
    assert (model.head.weight is model.tok.weight) == tied
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # one update moves both, if tied
    model(idx, idx)[1].backward()
    optimizer.step()
    found = replica.weights()
    assert not torch.equal(found["tok.weight"], others["tok.weight"])
    assert torch.equal(found["tok.weight"], found["head.weight"]) == tied


def check_sharded_models() -> None:
    """In each of two processes, which take seconds to start: both checks."""
    init_process_group("cpu")
    check_sharded_weights()
    check_bfloat16()
    destroy_process_group()


def test_sharded_models_equal_replicated_ones(workplace):
    run_two(workplace, CHECK, "check_sharded_models")


def check_sharded_weights() -> None:
    for tied in (True, False):
        model = make_model(tie_weights=tied)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        replica = make_replica(model, "fsdp", CPU)
        assert all(p.to_local().numel() < p.numel() for p in model.parameters())
        check_weights(replica, before, tied)


def check_bfloat16() -> None:
    """FSDP's loss and gradients are DDP's, for every preset, in bfloat16."""
    torch.manual_seed(rank())
    x = torch.randint(11, (2, 8))
    small = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
    for preset in PRESETS:
        settings = vars(train_settings({"preset": preset}, "cpu")[0]) | small
        components = {k: settings[k] for k in (*ARCH_FIELDS, *small)}
        results = []
        for parallel in ("ddp", "fsdp"):
            model = make_model(**components)
            net = make_replica(model, parallel, CPU).net
            with autocast(CPU, "bfloat16"):
                loss = net(x, x)[1]
            loss.backward()
            gradients = {n: gather(p.grad) for n, p in model.named_parameters()}
            results.append((loss.detach(), gradients))
        (loss, expected), (found, gradients) = results
        assert torch.equal(found, loss), preset
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, expected[name], atol=1e-6), (preset, name)


# --- one process, in a process group


@pytest.fixture
def process_group(monkeypatch):
    """A group of this process alone: the real collectives, DDP and FSDP, without torchrun."""
    set_world_size(monkeypatch, 1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_weights_are_copied_and_set(process_group, parallel, tied):
    model = make_model(tie_weights=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replica = make_replica(model, parallel, CPU)
    assert (replica.net is model) == (parallel == "fsdp")
    assert all(isinstance(p, DTensor) for p in model.parameters()) == (parallel == "fsdp")
    check_weights(replica, before, tied)
    found = Replica(make_model(tie_weights=tied)).weights()  # tied ones are stored once
    assert (found["tok.weight"].data_ptr() == found["head.weight"].data_ptr()) == tied


def test_the_state_of_a_sharded_optimizer_is_that_of_a_plain_one(process_group):
    states = []
    for parallel in ("ddp", "fsdp"):
        model = make_model()
        replica = make_replica(model, parallel, CPU)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(IDS, IDS)[1].backward()
            optimizer.step()
        states.append(copy.deepcopy(replica.optimizer_state(optimizer)))
    plain, sharded = states
    values = [value for own in sharded["state"].values() for value in own.values()]
    assert {type(value) for value in values} == {Tensor}  # not DTensor
    torch.testing.assert_close(sharded["state"], plain["state"])
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2)
    load_optimizer(fresh, OPTIMIZERS["adamw"], plain)
    replica.shard_state(fresh)
    sparse = copy.deepcopy(plain)
    sparse["state"][0]["exp_avg"] = sparse["state"][0]["exp_avg"].to_sparse()
    with pytest.raises(ValueError, match="the optimizer's exp_avg is sparse"):
        load_optimizer(torch.optim.AdamW(make_model().parameters()), OPTIMIZERS["adamw"], sparse)
    for parameter, own in fresh.state.items():
        assert own["exp_avg"].placements == parameter.placements
        assert not isinstance(own["step"], DTensor)
    assert_equal(gather(fresh.state_dict())["state"], plain["state"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_reduced_unless_skipped(process_group, parallel):
    replica = make_replica(make_model(), parallel, CPU)
    net = replica.net
    assert isinstance(net, DistributedDataParallel) == (parallel == "ddp")
    assert all(isinstance(p, DTensor) for p in net.parameters()) == (parallel == "fsdp")
    gradients = lambda: [p.grad for p in net.parameters()]  # noqa: E731
    with replica.no_sync():
        net(IDS, IDS)[1].backward()
        if parallel == "ddp":
            assert not net.require_backward_grad_sync
        else:
            assert all(gradient is None for gradient in gradients())  # kept unsharded, elsewhere
    assert parallel == "fsdp" or net.require_backward_grad_sync
    net(IDS, IDS)[1].backward()
    single = make_model()
    for _ in range(2):
        single(IDS, IDS)[1].backward()
    for gradient, p in zip(gradients(), single.parameters(), strict=True):
        torch.testing.assert_close(full_tensor(gradient), p.grad)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "5")  # of a tool other than torchrun
    assert (is_torchrun(), is_restart(), rank(), world_size()) == (False, False, 0, 1)
    assert init_process_group("cpu") == CPU
    model = make_model()
    assert make_replica(model, "fsdp", CPU).net is model
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert broadcast_from_rank0(lambda: 7) == 7
    tensor = torch.tensor([3.0])
    assert all_reduce(tensor) is tensor and tensor.item() == 3.0
    destroy_process_group()


def test_the_collectives_use_what_torchrun_says(process_group, monkeypatch):
    """Two processes according to torchrun, but one in the group: a sum is its own number."""
    set_world_size(monkeypatch, 2)
    assert (is_torchrun(), world_size()) == (True, 2)
    assert all_reduce(torch.tensor([3.0])).item() == 3.0
    box: list[object] = []
    assert broadcast_from_rank0(lambda: box.append(1) or "x") == "x" and box == [1]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    broadcast = Mock()
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert broadcast_from_rank0(lambda: 1 / 0) is None  # only rank 0 calls it
    assert broadcast.mock_calls == [call([None], src=0, device=CPU)]


def test_each_process_has_its_own_gpu_and_only_rank_0_prints(monkeypatch, capsys):
    set_world_size(monkeypatch, 2)
    calls = []
    monkeypatch.setattr(distributed, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        gpu = torch.device("cuda", local_rank)
        assert init_process_group("cuda") == gpu
        assert calls == [gpu, "cpu:gloo,cuda:nccl"]
        calls.clear()
    assert init_process_group("cpu") == CPU and calls == ["gloo"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"more processes than the 2 GPUs: lower --nproc_per_node"):
        init_process_group("cuda")
    with pytest.raises(UserError, match="MPS supports one process"):
        init_process_group("mps")
    print("shown")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored after the test
    init_process_group("cpu")
    print("not shown")
    assert capsys.readouterr().out == "shown\n"


@pytest.mark.parametrize(("local_rank", "order"), [("0", "run wait"), ("1", "wait run")])
def test_the_first_process_of_a_machine_runs_before_the_others(monkeypatch, local_rank, order):
    set_world_size(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    done = []
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: done.append("wait"))
    with local_rank_zero_first():
        done.append("run")
    assert " ".join(done) == order
