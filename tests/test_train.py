"""The schedule, the optimizers, the training step, and runs that are stopped, killed, resumed."""

import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from system.start import run as run_script

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_model, make_text, stop_after
from torch import Tensor
from torch.nn import functional as F

import train
import utils
from config import ARCHS, OPTIMIZERS, TrainConfig
from corpus.corpus import Corpus
from plots import read_run
from system.settings import UserError
from tokenizer import CharTokenizer
from train import Trainer, get_lr
from training import setup, task
from training.muon import Muon, orthogonalize
from training.task import Pretraining

CPU = torch.device("cpu")


def make_trainer(model=None, separator: int | None = None, **settings: object) -> Trainer:
    """A trainer of a small model on random tokens."""
    defaults = {"batch_size": 4, "max_steps": 20, "compile": False, "precision": "float32"}
    config = TrainConfig(**{**defaults, **settings})
    ids = np.random.default_rng(0).integers(11, size=500)
    info = {"name": "random", "sha256": ""}
    corpus = Corpus(ids[:450], ids[450:], info, 450, 50, separator=separator)
    model = model or make_model()
    tokenizer = CharTokenizer.train(["abcdefghijk"])
    task = Pretraining(corpus, tokenizer, model.config.block_size, config, CPU)
    return Trainer(model, task, config, CPU)


def final_state(run_dir: str | Path = "checkpoints") -> dict:
    return utils.read_checkpoint(Path(run_dir, "latest.pt"))


def assert_same(one: object, other: object, where: str = "state") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_run(one: dict, other: dict) -> None:
    """Two checkpoints are equal to the last bit, except for timings and the name of their folder:
    weights, all optimizers, scaler, settings, records and the lengths of the files."""
    timings = {"tokens_per_second", "ms_per_step", "seconds"}
    states = []
    for state in (one, other):
        records = [{k: v for k, v in r.items() if k not in timings} for r in state["log"]]
        config = {k: v for k, v in state["train_config"].items() if k not in ("tag", "out_dir")}
        states.append(state | {"log": records, "train_config": config, "seconds": 0.0})
    assert one["optimizers"] and all(optimizer["state"] for optimizer in one["optimizers"])
    assert_same(*states)


# --- schedule and optimizer


def test_learning_rate_at_named_steps():
    config = TrainConfig(lr_max=8e-4, lr_min=2e-4, warmup_steps=100, max_steps=1100)
    for step, expected in {
        0: 0.0,
        25: 2e-4,
        100: 8e-4,
        350: 5e-4 + 3e-4 * math.cos(math.pi / 4),
        600: 5e-4,
        1100: 2e-4,
        5000: 2e-4,
    }.items():
        assert get_lr(step, config) == pytest.approx(expected), step
    assert get_lr(0, TrainConfig(warmup_steps=0, lr_max=1.0)) == 1.0
    config.schedule = "linear"
    for step, expected in {50: 4e-4, 100: 8e-4, 350: 6.5e-4, 850: 3.5e-4, 1100: 2e-4}.items():
        assert get_lr(step, config) == pytest.approx(expected), step


def test_only_matrices_decay():
    model = make_model(**ARCHS["gpt2"])
    optimizers = train.configure_optimizers(model, TrainConfig(weight_decay=0.3))
    decayed, kept = optimizers["adamw"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == kept["betas"] == (0.9, 0.95)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert {names[id(p)] for p in kept["params"]} == expected
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_sgd_moves_by_gradients_that_it_remembers():
    """v <- 0.9 v + g + 0.1 w; w <- w - lr v (torch.optim.SGD); vectors do not decay."""
    settings = {"optimizer": "sgd", "lr_max": 0.5, "warmup_steps": 0, "weight_decay": 0.1}
    trainer = make_trainer(schedule="linear", max_steps=4, grad_clip=0.0, **settings)
    (optimizer,) = trainer.optimizers.values()
    assert type(optimizer) is torch.optim.SGD
    velocity = {name: 0.0 for name, _ in trainer.model.named_parameters()}
    for lr in (0.5, 0.375):  # linear decay over 4 steps
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train_step()
        for name, p in trainer.model.named_parameters():
            decay = 0.1 * before[name] if p.dim() == 2 else 0.0
            velocity[name] = 0.9 * velocity[name] + p.grad + decay
            assert torch.allclose(p, before[name] - lr * velocity[name], atol=1e-6), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("flag", ["--precision=float32", "--precision=float16", "--grow_windows"])
def test_every_optimizer_resumes_bit_for_bit(workplace, optimizer: str, flag: str):
    flags = [*TINY_RUN, f"--optimizer={optimizer}", flag, "--dropout=0.2"]
    assert train.main([*flags, "--save_every=10"]) == 0
    whole = final_state()
    assert whole["log"][-1]["val"] < whole["log"][0]["val"] - 0.1  # it learns
    Path("checkpoints/ckpt_00010.pt").rename("checkpoints/latest.pt")
    assert train.main(["--resume", "--device=cpu"]) == 0
    assert_same_run(final_state(), whole)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_model(**ARCHS["llama"])
    adamw, muon = train.configure_optimizers(model, TrainConfig(optimizer="muon")).values()
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (adamw, muon)
    ]
    layers = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
    assert found[1] == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert found[0] == set(names.values()) - found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_muon_orthogonalizes_a_gradient(shape: tuple[int, int], dtype: torch.dtype):
    """Also gradients that would be 0 in float16."""
    gradients = 2e-8 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(gradients, dtype)
    assert result.dtype == dtype
    for gradient, found in zip(gradients, result.float(), strict=True):
        # Five times Jordan et al.'s polynomial (2024) brings singular values, which begin as the
        # gradient's over its Frobenius norm, near 1. The singular vectors are the gradient's.
        u, sizes, vt = torch.linalg.svd(gradient / gradient.norm(), full_matrices=False)
        assert sizes.min() < 0.3
        for _ in range(5):
            sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
        assert torch.allclose(found, u * sizes @ vt, atol=0.03)


def test_muon_moves_all_rows_of_a_matrix_alike_in_the_first_step():
    settings = {"lr_max": 1e-2, "warmup_steps": 0, "weight_decay": 0.0, "grad_clip": 0.0}
    trainer = make_trainer(optimizer="muon", precision="bfloat16", **settings)
    assert trainer.optimizers["muon"].dtype == torch.bfloat16
    mlp = trainer.model.blocks[0].mlp
    weights = [(w, w.detach().clone()) for w in (mlp.fc.weight, mlp.proj.weight)]
    trainer.train_step()
    for weight, before in weights:  # (128, 16) and (16, 64)
        R, C = weight.shape
        orthogonal = orthogonalize(weight.grad[None], torch.bfloat16)[0].float()
        # NorMuon (Li et al. 2025): rows of equal norm, together as large as before, times
        # 0.2 lr sqrt(max(R, C)) (Liu et al. 2025, eq. 4).
        size = 0.2 * 1e-2 * math.sqrt(max(R, C)) * orthogonal.norm() / math.sqrt(R)
        moved = before - weight.detach()
        assert torch.allclose(moved.norm(dim=1), size.expand(R), rtol=5e-3)
        cosine = F.cosine_similarity(moved, orthogonal, dim=1)
        assert cosine.min() > 0.95  # bfloat16 rounds small rows


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_muon_divides_rows_by_their_mean_size_over_time(momentum: float):
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    muon = Muon([weight], lr=1.0, weight_decay=0.0, momentum=momentum)
    buffer, squares = np.zeros(2), np.zeros(2)
    for gradient in (np.array([1.0, 0.0]), np.array([1.0, 1.0])):  # of the diagonal
        weight.grad, before = torch.diag(torch.tensor(gradient)).float(), weight.detach().clone()
        muon.step()
        buffer = momentum * buffer + (1 - momentum) * gradient
        ahead = momentum * buffer + (1 - momentum) * gradient  # Nesterov's momentum
        sizes = ahead / np.linalg.norm(ahead)
        for _ in range(5):
            sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
        squares = 0.95 * squares + 0.05 * sizes**2 / 2  # means over the rows
    expected = sizes / np.sqrt(squares)
    expected *= 0.2 * math.sqrt(2) * np.linalg.norm(sizes) / np.linalg.norm(expected)
    moved = (before - weight.detach()).diagonal()
    assert moved.tolist() == pytest.approx(expected.tolist(), rel=0.02)


def test_muon_decays_by_the_rate_and_leaves_matrices_without_a_gradient_in_place():
    weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    muon = Muon(weights, lr=0.5, weight_decay=0.2)
    weights[0].grad = torch.zeros(2, 3)
    muon.step()
    assert torch.allclose(weights[0], torch.full((2, 3), 0.9))  # 1 - 0.5 x 0.2
    assert torch.equal(weights[1], torch.ones(2, 3))


# --- the step


def test_a_step_does_its_ten_parts_in_order(monkeypatch):
    trainer = make_trainer(grad_accum=2)
    done: list[str] = []

    def note(name: str, function):
        return lambda *args, **kwargs: (done.append(name), function(*args, **kwargs))[1]

    class Batch:
        def __init__(self, tensor):
            self.to = note("move", lambda device, **_: tensor)

    def get_batch(step: int, micro_step: int):
        batch, n = Pretraining.get_batch(trainer.task, step, micro_step)
        return tuple(Batch(t) for t in batch), n

    adamw = trainer.optimizers["adamw"]
    adamw.zero_grad = note("zero", adamw.zero_grad)
    trainer.task.get_batch = note("batch", get_batch)
    trainer.model.forward = note("forward and loss", trainer.model.forward)
    backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.Tensor, "backward", note("backward", backward))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note("clip", clip))
    monkeypatch.setattr(train, "get_lr", note("rate", get_lr))
    adamw.step = note("step", adamw.step)
    trainer.scaler.update = note("count was still 0", lambda: None if trainer.step == 0 else 1 / 0)
    trainer.train_step()
    once = ["move", "move", "forward and loss", "backward"]
    rates = ["rate"] * len(adamw.param_groups)
    end = ["clip", *rates, "step", "count was still 0"]
    assert done == ["zero", "batch", "batch", *once, *once, *end]
    assert trainer.step == 1


def test_the_gradient_is_clipped_to_its_largest_norm():
    """Also in float16, whose loss is scaled, which the norm does not show."""
    norms, left = [], []
    for precision, limit in (("float32", 0.5), ("float16", 0.5), ("float32", 0.0)):
        trainer = make_trainer(precision=precision, grad_clip=limit, warmup_steps=0)
        norms.append(trainer.train_step()["grad_norm"].item())
        left.append(math.sqrt(sum(p.grad.square().sum() for p in trainer.model.parameters())))
        if precision == "float16":  # it did not overflow
            assert trainer.scaler.get_scale() == 2.0**16  # PyTorch's initial scale
    assert norms[0] > 0.5 and norms == pytest.approx([norms[0]] * 3, rel=1e-2)
    assert left == pytest.approx([0.5, 0.5, norms[0]], rel=1e-3)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_and_other_terms_are_averaged_too():
    """Micro-batches of 2 and 6 tokens with losses 1 and 5: (2 * 1 + 6 * 5) / 8 = 4, not 3."""
    trainer = make_trainer(grad_accum=2)
    weight = trainer.model.head.weight

    class Uneven:
        def get_batch(self, step: int, micro_step: int):
            return (torch.tensor([1.0, 5.0][micro_step]),), torch.tensor([2, 6][micro_step])

        def loss(self, model, value):
            return {"loss": value + 0 * weight.sum(), "square": value**2}

    trainer.task = Uneven()
    metrics = trainer.train_step()
    assert metrics["loss"] == 4.0
    assert metrics["square"] == (2 * 1 + 6 * 25) / 8
    assert metrics["grad_norm"] == 0.0


def mean_window_loss(model, ids: np.ndarray, starts: list[int]) -> float:
    """The mean loss of a model over windows of 12 tokens of a stream, from its logits."""
    losses = []
    for start in starts:
        window = torch.from_numpy(ids[start : start + 13].astype(int))
        losses += F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="none")
    return sum(losses).item() / len(losses)


def test_evaluation_covers_the_split_and_keeps_the_mode():
    trainer = make_trainer(make_model(dropout=0.5))
    ids = trainer.task.corpus.val_ids  # 50 tokens: 4 windows of 12, and 1 target
    loss = mean_window_loss(trainer.model.eval(), ids, [0, 12, 24, 36, 48])
    trainer.model.train()
    metrics = trainer.evaluate(full=True)
    assert metrics["val"] == pytest.approx(loss, rel=1e-5)
    assert metrics["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert "train" not in metrics and trainer.model.training
    trainer.model.eval()
    assert trainer.evaluate().keys() >= {"train", "val", "ppl", "bpb"}
    assert not trainer.model.training


def test_an_evaluation_has_the_precision_of_the_run():
    trainer = make_trainer(precision="bfloat16")
    exact = trainer.task.evaluate(trainer.model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = trainer.task.evaluate(trainer.model)
    assert trainer.evaluate() == rounded != exact


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_the_windows_and_make_equally_many_forward_passes(monkeypatch, world_size):
    trainer = make_trainer(batch_size=1)
    model, ids = trainer.model.eval(), trainer.task.corpus.val_ids  # 5 windows
    expected = trainer.task.mean_loss(model, ids, None)
    passes, sums = Counter(), []
    monkeypatch.setattr(task, "world_size", lambda: world_size)
    monkeypatch.setattr(task, "all_reduce", lambda tensor: sums.append(tensor) or tensor)
    for rank in range(world_size):
        monkeypatch.setattr(task, "rank", lambda rank=rank: rank)
        with model.register_forward_hook(lambda *_, rank=rank: passes.update([rank])):
            trainer.task.mean_loss(model, ids, None)
    total, count = sum(sums).tolist()
    assert total / count == pytest.approx(expected) and count == 49
    assert passes == dict.fromkeys(range(world_size), math.ceil(5 / world_size))


# --- other tasks


class OwnTask:
    """A task with its own batches, loss, metrics and checkpoints."""

    tokens_per_step = None

    class format:
        entries = {"tokenizer": {}, "corpus": {"name": "numbers", "sha256": ""}}  # noqa: RUF012

        @classmethod
        def pack(cls, weights):
            return {"model": {k: v + 1 for k, v in weights.items()}, "kept": 7, **cls.entries}

        @staticmethod
        def unpack(state):
            return {k: v - 1 for k, v in state["model"].items()}

    def __init__(self):
        self.asked: list[tuple[int, int]] = []
        self.models: list[object] = []

    def get_batch(self, step: int, micro_step: int):
        self.asked.append((step, micro_step))
        x, y = torch.arange(8).view(2, 4) % 11, torch.arange(1, 9).view(2, 4) % 11
        return (x, y, torch.tensor([1.0, 0.0])), torch.tensor(1)

    def loss(self, model, x, y, weights):
        self.models.append(model)
        logits, _ = model(x)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        return {"loss": (losses.mean(dim=1) * weights).sum()}

    def evaluate(self, model, full: bool = False):
        train = {} if full else {"train": 1.25}
        return train | {"val": 1.75 if full else 1.5, "margin": 0.0 if model.training else 0.25}

    def sample(self, model):
        return "a sample\n"


def test_a_task_defines_its_batches_loss_metrics_and_checkpoints(tmp_path, capsys):
    settings = {"grad_accum": 2, "max_steps": 2, "eval_every": 2, "lr_max": 1e-9}
    config = TrainConfig(**settings, out_dir=str(tmp_path), compile=False, precision="float32")
    task = OwnTask()
    trainer = Trainer(make_model(), task, config, CPU)
    logits = trainer.model(torch.arange(4)[None])[0][0]
    by_hand = -sum(logits[t].log_softmax(-1)[t + 1] for t in range(4)) / 4  # the first row alone
    assert trainer.train_step()["loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    trainer.step = 0
    status, log = train.run_training(trainer)
    assert status == 0
    assert task.asked == [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(model is trainer.model for model in task.models)
    record = log.records[-1]
    assert (record["train"], record["val"], record["margin"]) == (1.25, 1.5, 0.25)
    assert not {"ppl", "bpb"} & record.keys() and record["tokens_per_second"] is None
    out = capsys.readouterr().out
    assert re.search(r"step 2 \| train 1\.2500 \| val 1\.5000 \|.* margin 0\.250 ", out)
    assert "over the whole validation split: val 1.7500 | margin 0.250" in out
    samples = [f"--- step {step}\na sample\n\n" for step in ("0, before training", 2)]
    assert (tmp_path / "samples.txt").read_text() == "".join(samples)
    state = utils.read_checkpoint(tmp_path / "latest.pt")
    weights = trainer.model.tok.weight.detach().clone()
    assert state["kept"] == 7 and torch.allclose(state["model"]["tok.weight"], weights + 1)
    trainer.restore(state)
    assert torch.allclose(trainer.model.tok.weight, weights, atol=1e-6)


# --- runs


def test_a_run_leaves_its_files(workplace, capsys):
    assert train.main([*TINY_RUN, "--save_every=10", "--tag=a"]) == 0
    run = workplace / "checkpoints" / "a"
    assert {file.name for file in run.iterdir()} == {
        *("latest.pt", "best.pt", "ckpt_00010.pt", "ckpt_00020.pt", "log.jsonl"),
        *("loss_log.json", "loss_curve.png", "samples.txt", "lock"),
    }
    start, *lines, _ = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    records = [line for line in lines if "val" in line]
    trained = [(line["step"], line["lr"]) for line in lines if "val" not in line]
    # after a warmup of 2 of the 20 steps, the rate falls linearly from 6e-3 to 0
    middle = 4e-3 * (1 + math.cos(math.pi * 8 / 18)) / 2  # cosine after 2 warmup steps
    assert trained == [(10, pytest.approx(middle)), (20, 0.0)]
    raw = (workplace / "data" / "input.txt").read_bytes()
    assert start["corpus"]["name"] == "input.txt" and start["corpus"]["bytes"] == len(raw)
    assert final_state(run)["corpus"] == start["corpus"]
    assert [record["step"] for record in records] == [0, 5, 10, 15, 20]
    assert records[0]["val"] == pytest.approx(math.log(start["vocab_size"]), abs=0.2)
    assert all(r["ppl"] == pytest.approx(math.exp(r["val"])) for r in records)
    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.txt").read_text().count("--- step") == 5
    out = capsys.readouterr().out
    (line,) = re.findall(r"step 20 \| .*", out)
    for part in (r"train \d\.\d{4}", r"val \d\.\d{4}", r"lr \d\.\d\de[+-]\d\d", r"\dk tok/s"):
        assert re.search(part, line), part
    assert f"ln({start['vocab_size']}) = {math.log(start['vocab_size']):.4f}" in out
    assert "verdict: " in out


def test_the_time_of_a_run_includes_the_imports_of_its_process(workplace, monkeypatch):
    started: list[float] = []
    monkeypatch.setattr(train, "run_training", lambda *args: (0, started.append(args[2])))
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY_RUN])
    monkeypatch.setattr(time, "process_time", lambda: 1000.0)
    for argv in (TINY_RUN, None):
        assert train.main(argv) == 0
    imported, script = (time.perf_counter() - start for start in started)
    assert imported < 100 and 1000 < script < 1100


def test_one_batch_can_be_overfitted(workplace, capsys):
    flags = [*TINY_RUN, "--overfit_batch", "--n_embd=64", "--block_size=64", "--lr_max=1e-2"]
    assert train.main([*flags, "--max_steps=500"]) == 0
    assert "one batch overfitted" in capsys.readouterr().out
    assert train.main([*flags, "--max_steps=2"]) == 1
    assert not Path("checkpoints").exists()


def test_patience_stops_a_run_that_gets_no_better(workplace, monkeypatch):
    losses = iter([3.0, 3.0, 2.0, 2.0, 2.5, 2.5, 2.6, 2.6, 2.7])  # train and val, each evaluation
    monkeypatch.setattr(Pretraining, "mean_loss", lambda *_: next(losses))
    train.main([*TINY_RUN, "--patience=2"])
    assert final_state()["step"] == 15
    assert utils.read_checkpoint(Path("checkpoints/best.pt"))["step"] == 5


def test_resuming_on_another_text_is_refused(workplace):
    train.main(TINY_RUN)
    Path("data/input.txt").write_text(make_text(401))
    with pytest.raises(UserError, match="has changed since"):
        train.main(["--resume", "--device=cpu"])


def test_a_loss_that_is_no_number_stops_the_run(workplace, monkeypatch):
    train_step = Trainer.train_step

    def break_at_8(self):
        metrics = train_step(self)
        return metrics | ({"loss": metrics["loss"] * math.nan} if self.step == 8 else {})

    monkeypatch.setattr(Trainer, "train_step", break_at_8)
    with pytest.raises(UserError, match=r"diverged at step 8 \(loss nan.*earlier steps are kept"):
        train.main(TINY_RUN)
    assert final_state()["step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in final_state()["model"].values())


def test_losses_are_checked_every_log_every_steps_and_before_evaluations(workplace, monkeypatch):
    """More often would make a GPU wait."""
    checked, check_finite = [], Trainer.check_finite

    def record(trainer: Trainer) -> None:
        if trainer.unchecked:
            checked.append(trainer.step)
        check_finite(trainer)

    monkeypatch.setattr(Trainer, "check_finite", record)
    train.main([*TINY_RUN, "--log_every=4", "--eval_every=10", "--max_steps=20"])
    assert checked == [4, 8, 10, 12, 16, 20]


# --- stopped, killed, resumed

LONGER_RUN = [*TINY_RUN, "--dropout=0.2", "--max_steps=240", "--eval_every=30"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="sends POSIX signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_stopped_run_resumes_bit_for_bit(workplace, name):
    main = partial(train.main, [*LONGER_RUN, "--tag=stopped"])
    process = multiprocessing.get_context("forkserver").Process(target=run_script, args=(main,))
    process.start()
    log = Path("checkpoints/stopped/log.jsonl")
    while not (log.exists() and log.read_text().count('"val":') >= 3):  # at step 60
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, getattr(signal, name))
    process.join(timeout=300)
    assert process.exitcode == {"SIGKILL": -9, "SIGINT": 130}[name]
    assert 30 <= final_state("checkpoints/stopped")["step"] < 240
    assert train.main(["--resume", "--tag=stopped", "--device=cpu"]) == 0
    assert train.main([*LONGER_RUN, "--tag=whole"]) == 0
    assert_same_run(final_state("checkpoints/stopped"), final_state("checkpoints/whole"))
    texts = [Path("checkpoints", tag, "samples.txt").read_text() for tag in ("stopped", "whole")]
    assert texts[0].split("--- step 240")[1] == texts[1].split("--- step 240")[1]


@pytest.mark.parametrize(
    ("chosen_for", "saved", "flags", "expected"),
    [
        ("cuda", "float16", [], ("float32", "cpu")),  # from a T4
        ("cpu", "bfloat16", [], ("bfloat16", "cpu")),  # measured: now it would be float32
        ("", "float16", [], ("float16", "")),  # requested
        ("cuda", "float16", ["--precision=bfloat16"], ("bfloat16", "")),
    ],
)
def test_a_precision_that_was_not_requested_is_chosen_again_on_another_kind_of_device(
    workplace, monkeypatch, capsys, chosen_for, saved, flags, expected
):
    monkeypatch.setattr(setup, "has_bfloat16", lambda device: device.type == "cpu")  # as for a T4
    train.main([*TINY_RUN, "--precision=auto"])
    state = final_state()
    settings = state["train_config"]
    assert (settings["precision"], settings["precision_for"]) == ("float32", "cpu")
    settings |= {"precision": saved, "precision_for": chosen_for, "compile": chosen_for == "cuda"}
    state["scaler"] = torch.amp.GradScaler("cpu", enabled=saved == "float16").state_dict()
    torch.save(state, "checkpoints/latest.pt")
    capsys.readouterr()
    assert train.main(["--resume", "--device=cpu", "--max_steps=21", *flags]) == 0
    settings = final_state()["train_config"]
    assert [settings[n] for n in ("precision", "precision_for", "compile")] == [*expected, False]
    changed = f"; {saved} before)" in capsys.readouterr().out
    assert changed == (expected[0] != saved)


def test_a_run_shortened_to_the_step_where_it_stopped_is_evaluated_there(workplace, monkeypatch):
    flags = [*TINY_RUN, "--max_steps=20", "--eval_every=20"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", stop_after(7))
        assert train.main(flags) == 128 + 15
    assert train.main(["--resume", "--device=cpu", "--max_steps=7"]) == 0
    log = final_state("checkpoints")["log"]
    assert [record["step"] for record in log] == [0, 7] and log[1]["val"] < log[0]["val"]
    assert torch.load("checkpoints/best.pt", weights_only=True)["step"] == 7


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_gpu_run_learns_and_resumes(workplace, precision):
    flags = [*TINY_RUN, "--device=cuda", f"--precision={precision}", "--max_steps=100"]
    assert train.main(flags) == 0
    assert train.main(["--resume", "--max_steps=200"]) == 0
    log = final_state()["log"]
    assert log[-1]["val"] < 0.8 * log[0]["val"]


@pytest.mark.gpu
def test_compiled_training_on_a_gpu(workplace):
    assert train.main([*TINY_RUN, "--device=cuda", "--compile"]) == 0


# --- tokenizers and documents


def test_byte_pairs_are_trained_and_travel_in_the_checkpoint(workplace, capsys):
    assert train.main([*TINY_RUN, "--tokenizer=bpe", "--vocab_size=300"]) == 0
    assert "vocabulary 300" in capsys.readouterr().out
    tokenizer = utils.load_checkpoint(Path("checkpoints/best.pt"), torch.device("cpu"))[1]
    assert tokenizer.decode(tokenizer.encode("the quick 狐").tolist()) == "the quick 狐"
    (record,) = final_state()["log"][-1:]
    text = Path("data/input.txt").read_text()
    val = text[len(text) * 9 // 10 :]
    bits = record["val"] / math.log(2) * len(tokenizer.encode(val)) / len(val.encode())
    assert record["bpb"] == pytest.approx(bits)


def test_a_text_with_fewer_pairs_than_asked_for_resumes_with_the_same_flags(workplace):
    flags = ["--tokenizer=bpe", "--vocab_size=5000"]
    assert train.main([*TINY_RUN, *flags]) == 0
    assert final_state()["gpt_config"]["vocab_size"] < 5000
    assert train.main(["--resume", "--max_steps=25", *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size=300"], "vocab_size is for --tokenizer bpe"),
        (["--tokenizer=bpe", "--vocab_size=99"], "at least 257, not 99"),
        (["--doc_mask"], r"is one document \(or chats\): --doc_mask is for several"),
        (["--device=cuda:99", "--n_head=3", "--lr_min=1"], "divisible.*lr_min 1 is above.*cuda:99"),
    ],
)
def test_all_mistakes_are_found_first(workplace, flags, message):
    with pytest.raises(UserError, match=message):
        train.main([*TINY_RUN, *flags])
    assert not Path("checkpoints").exists()


def test_a_document_mask_reaches_the_model():
    trainer = make_trainer(doc_mask=True, separator=3)
    x = torch.tensor([[3, 1, 2, 3, 5], [1, 3, 3, 4, 0]])
    numbers = [[1, 1, 1, 2, 2], [0, 1, 2, 2, 2]]
    assert trainer.task.document_numbers(x).tolist() == numbers
    seen = []
    trainer.model.register_forward_pre_hook(lambda model, args: seen.append(args[2]))
    trainer.train_step()
    trainer.evaluate()
    assert seen[0].max() > 1 and len(seen) > 2 and None not in seen


# --- what the log, the checkpoints and the random numbers refer to


def test_each_metric_is_of_its_own_split():
    """Four evenly spaced windows of 12 + 1 tokens in 450 training and 50 validation tokens: they
    begin at 0, 437/3, 2 * 437/3, 437, and 0, 37/3, 2 * 37/3, 37."""
    trainer = make_trainer(eval_windows=4)
    corpus, model = trainer.task.corpus, trainer.model.eval()
    metrics = trainer.evaluate()
    train_loss = mean_window_loss(model, corpus.train_ids, [0, 145, 291, 437])
    val_loss = mean_window_loss(model, corpus.val_ids, [0, 12, 24, 37])
    assert metrics["train"] == pytest.approx(train_loss, rel=1e-5)
    assert metrics["val"] == pytest.approx(val_loss, rel=1e-5)
    assert abs(train_loss - val_loss) > 1e-3
    assert metrics["bpb"] == pytest.approx(val_loss / math.log(2))  # a byte per token


def test_the_final_metrics_are_of_the_best_weights_and_training_keeps_the_last(tmp_path):
    trainer = make_trainer(out_dir=str(tmp_path), max_steps=4, eval_every=2, warmup_steps=0)
    losses = iter([3.0, 3.0, 2.0, 2.0, 4.0, 4.0])  # train and val of steps 0, 2 and 4
    mean_loss = trainer.task.mean_loss
    weights, modes = [], []

    def scripted(model, ids, n_windows):
        weights.append(model.tok.weight.detach().clone())
        modes.append(model.training)
        return next(losses) if n_windows else mean_loss(model, ids, n_windows)

    trainer.task.mean_loss = scripted
    status, log = train.run_training(trainer)
    assert status == 0 and log.best()["step"] == 2 and not any(modes)
    _, _, at_step_2, _, at_step_4, _, final = weights
    assert torch.equal(final, at_step_2) and not torch.equal(final, at_step_4)
    assert torch.equal(trainer.model.tok.weight, at_step_4)
    assert torch.equal(utils.read_checkpoint(tmp_path / "best.pt")["model"]["tok.weight"], final)
    final_record = read_run(tmp_path).final
    assert final_record["step"] == 2 and final_record["val"] not in (2.0, 4.0)


def dropout_seeds(n_steps: int, first: int = 0, **settings: object) -> list[int]:
    """The seeds of dropout in the micro-steps of a run."""
    trainer = make_trainer(make_model(dropout=0.5), grad_accum=2, **settings)
    trainer.step, seeds = first, []
    loss = trainer.task.loss

    def note(*args):
        seeds.append(torch.initial_seed())
        assert torch.get_rng_state().equal(torch.Generator().manual_seed(seeds[-1]).get_state())
        return loss(*args)

    trainer.task.loss = note
    for _ in range(n_steps):
        trainer.train_step()
    return seeds


def test_dropout_is_a_function_of_seed_step_and_micro_step():
    seeds = dropout_seeds(3)
    assert len(set(seeds)) == 6 and seeds == dropout_seeds(3)
    assert seeds[4:] == dropout_seeds(1, first=2)  # as after a resume
    assert not set(seeds) & set(dropout_seeds(3, seed=1338))


def test_weight_decay_shrinks_the_matrices_of_muon_and_of_adamw():
    """Both shrink the weights by lr times weight_decay (Loshchilov and Hutter 2019, Liu et al.
    2025); the rest of the update does not depend on it, so two runs differ by that alone."""
    moved = {}
    for decay in (0.0, 0.5):
        settings = {"optimizer": "muon", "lr_max": 1e-2, "warmup_steps": 0}
        trainer = make_trainer(weight_decay=decay, **settings)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train_step()
        moved[decay] = {n: p.detach() - before[n] for n, p in trainer.model.named_parameters()}
    for name, weight in before.items():
        shrunk = -1e-2 * 0.5 * weight if weight.dim() == 2 else torch.zeros_like(weight)
        assert torch.allclose(moved[0.5][name] - moved[0.0][name], shrunk, atol=1e-6), name


def test_a_step_does_not_add_to_the_gradient_of_the_step_before():
    trainer = make_trainer(lr_max=1e-9, grad_clip=0.0)
    first = trainer.train_step()["grad_norm"]
    trainer.step = 0  # the same batch again
    assert trainer.train_step()["grad_norm"].item() == pytest.approx(first.item(), rel=1e-4)


def test_overfitting_repeats_the_first_batch():
    trainer = make_trainer(overfit_batch=True, grad_accum=2)
    asked = []
    get_batch = trainer.task.get_batch
    trainer.task.get_batch = lambda step, m: (asked.append((step, m)), get_batch(step, m))[1]
    for _ in range(2):
        trainer.train_step()
    assert asked == [(0, 0), (0, 1)] * 2 and trainer.step == 2


def test_batches_of_a_step_follow_those_of_the_step_before():
    """The micro-batches of all steps are the batches 0, 1, 2, ... of the run."""
    trainer = make_trainer(grad_accum=3, batch_size=2, seed=7)
    ids = trainer.task.corpus.train_ids
    for step in range(2):
        for micro_step in range(3):
            (x, y), n = trainer.task.get_batch(step, micro_step)
            number = 3 * step + micro_step
            expected = utils.get_batch(ids, 12, 2, seed=7, number=number)
            assert torch.equal(x, expected[0]) and torch.equal(y, expected[1]) and n == 24


def test_finite_checks_name_the_first_bad_step_once():
    trainer = make_trainer()
    bad = {"loss": torch.tensor(math.inf), "grad_norm": torch.tensor(1.0)}
    good = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}
    trainer.unchecked = [(3, good), (4, bad), (5, bad)]
    with pytest.raises(UserError, match=r"diverged at step 4 \(loss inf, grad_norm 1.0\)"):
        trainer.check_finite()
    trainer.unchecked = [(6, good)]
    trainer.check_finite()
    assert trainer.unchecked == []
    trainer.unchecked = [(7, good | {"grad_norm": torch.tensor(math.nan)})]
    with pytest.raises(UserError, match="step 7"):
        trainer.check_finite()
    half = make_trainer(precision="float16")  # skips steps whose gradient overflows
    half.unchecked = [(7, good | {"grad_norm": torch.tensor(math.inf)})]
    half.check_finite()
    half.unchecked = [(8, bad)]
    with pytest.raises(UserError, match=r"step 8 \(loss inf\)"):
        half.check_finite()


def test_an_infinite_validation_loss_stops_the_run():
    trainer = make_trainer()
    for name in ("train", "val"):
        trainer.task.evaluate = lambda *_, name=name: {"train": 1.0, "val": 1.0, name: math.inf}
        with pytest.raises(UserError, match=rf"diverged at step 0 \(.*{name} inf"):
            trainer.evaluate()
    trainer.task.evaluate = lambda *_: {"val": 1.0, "margin": math.nan}  # only losses are checked
    assert trainer.evaluate()["val"] == 1.0


def test_checkpoints_are_kept_every_so_many_steps_and_belong_to_their_step(workplace):
    flags = [*TINY_RUN, "--save_every=4", "--eval_every=3", "--max_steps=9"]
    assert train.main(flags) == 0
    kept = sorted(Path("checkpoints").glob("ckpt_*.pt"))
    assert [file.name for file in kept] == ["ckpt_00004.pt", "ckpt_00008.pt"]
    states = [utils.read_checkpoint(file) for file in kept]
    assert [state["step"] for state in states] == [4, 8]
    assert [[r["step"] for r in state["log"]] for state in states] == [[0, 3], [0, 3, 6]]
    steps = {s["step"].item() for s in states[1]["optimizers"][0]["state"].values()}
    assert steps == {8}


def test_windows_grow_from_a_quarter_to_the_whole_and_batches_keep_their_tokens():
    trainer = make_trainer(make_model(block_size=8), grow_windows=True, max_steps=20, batch_size=2)
    shapes = [tuple(trainer.task.get_batch(step, 0)[0][0].shape) for step in (0, 9, 10, 15, 16, 19)]
    assert shapes == [(8, 2), (8, 2), (4, 4), (4, 4), (2, 8), (2, 8)]  # at 50% and at 80%
    assert [int(trainer.task.get_batch(step, 0)[1]) for step in (0, 10, 19)] == [16, 16, 16]
    trainer.task.train_ids = np.arange(500)  # tokens are their positions
    # With one seed, windows of steps 4 and 16 would be the same: those of sequences 32 and 33.
    early, late = (trainer.task.get_batch(step, 0)[0][0][:, 0] for step in (4, 16))
    assert (early[:2] - late).abs().min() > 20
    shortest = make_trainer(make_model(block_size=1), grow_windows=True, max_steps=20)
    assert shortest.task.get_batch(0, 0)[0][0].shape == (4, 1)  # nothing to divide
