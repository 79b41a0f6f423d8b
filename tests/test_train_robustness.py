"""Runs that are killed, disturbed, or resumed from damaged files or with other settings."""

import math
import os
import random
import shutil
import signal
import sys
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_RUN, make_model
from fuzz_damage import BYTES, n_rejected
from test_train import make_trainer

import train
import utils
from config import GPTConfig, TrainConfig
from system.files import locked, save_checkpoint
from system.settings import UserError, kind_of
from train import Trainer
from training.distributed import StopSignal
from training.setup import check_run, resolve_train

SAVED = Path("checkpoints/latest.pt")
RESUME = ["--resume", "--device=cpu", "--max_steps=30"]


class Killed(BaseException):
    """The process ends here."""


def test_the_second_run_in_a_folder_is_told_who_holds_it(trained: Path):
    with locked(Path("checkpoints"), "a training run"):
        before = SAVED.read_bytes()
        message = f"in use by a training run, process {os.getpid()}"
        for flags in (RESUME, [*TINY_RUN, "--overwrite"]):
            with pytest.raises(UserError, match=message):
                train.main(flags)
        assert SAVED.read_bytes() == before


def test_a_run_that_another_process_has_changed_meanwhile_is_not_continued(trained, monkeypatch):
    state = utils.read_checkpoint(SAVED)

    def change(*args: object) -> None:  # after this process has read its checkpoint
        save_checkpoint(SAVED, state | {"step": 25})

    monkeypatch.setattr(train, "print_summary", change)
    with pytest.raises(UserError, match="another process has changed the run"):
        train.main(RESUME)


@pytest.mark.parametrize("name", "latest.pt best.pt ckpt_00010.pt adapter.pt samples.txt".split())
def test_files_of_another_run_are_not_deleted_silently(workplace: Path, name: str):
    Path("checkpoints").mkdir()
    Path("checkpoints", name).write_text("mine")
    with pytest.raises(UserError, match=rf"already contains a run \({name}\): --resume"):
        train.main(TINY_RUN)
    assert Path("checkpoints", name).read_text() == "mine"


def test_a_checkpoint_that_is_due_is_written_before_the_one_to_resume_from(workplace, monkeypatch):
    copy_file = train.copy_file

    def copy_or_die(source: Path, target: Path) -> None:
        if target.name == "latest.pt" and utils.read_checkpoint(source)["step"] == 10:
            raise Killed
        copy_file(source, target)

    monkeypatch.setattr(train, "copy_file", copy_or_die)
    with pytest.raises(Killed):
        train.main([*TINY_RUN, "--save_every=10"])
    assert utils.read_checkpoint(Path("checkpoints/ckpt_00010.pt"))["step"] == 10
    assert utils.read_checkpoint(SAVED)["step"] == 5


@pytest.mark.parametrize("flags", [RESUME, [*TINY_RUN, "--overwrite"]])
def test_what_a_killed_process_was_writing_is_deleted(trained: Path, flags: list[str]):
    for name in ("best.pt.part", "log.jsonl.part", "ckpt_00010.pt.part"):
        Path("checkpoints", name).write_text("incomplete")
    Path("checkpoints/photo.png.part").write_text("mine")
    assert train.main(flags) == 0
    assert [file.name for file in Path("checkpoints").glob("*.part")] == ["photo.png.part"]


def test_a_run_folder_that_disappears_is_one_error(workplace: Path, monkeypatch):
    train_step = Trainer.train_step

    def delete(self: Trainer) -> dict:
        if self.step == 7:
            shutil.rmtree("checkpoints")
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", delete)
    with pytest.raises((UserError, FileNotFoundError), match="checkpoints"):
        train.main(TINY_RUN)


@pytest.mark.parametrize("folder", ["data/input.txt", "data/input.txt/runs", "x" * 300])
def test_an_impossible_folder_is_found_before_anything_else(workplace: Path, folder: str):
    with pytest.raises(UserError, match=f"cannot write to the folder {folder}: "):
        train.main([*TINY_RUN, f"--out_dir={folder}"])


def test_a_signal_during_output_is_not_lost(monkeypatch, capfd):
    class Busy:
        """A standard output in the middle of a write, which cannot be entered a second time."""

        def write(self, text: str) -> None:
            raise RuntimeError("reentrant call")

        flush = write

    with StopSignal() as stop:
        monkeypatch.setattr(sys, "stdout", Busy())
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.undo()
        assert stop.requested() and stop.number == signal.SIGTERM
    assert "stopping after this step" in capfd.readouterr().err


def test_a_second_signal_ends_the_process_but_not_a_notebook(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    for loaded, expected in ((False, signal.SIG_DFL), (True, before)):
        if loaded:
            monkeypatch.setitem(sys.modules, "ipykernel", sys)
        with StopSignal() as stop:
            stop.handle(signal.SIGINT, None)
            assert signal.getsignal(signal.SIGINT) == expected
    assert signal.getsignal(signal.SIGINT) == before


def test_a_flipped_bit_is_detected_or_without_effect(trained: Path):
    original, good = SAVED.read_bytes(), utils.read_checkpoint(SAVED)
    rng, n_rejected = random.Random(0), 0
    for _ in range(150):
        damaged = BYTES["flip"](original, rng.randrange(len(original)), rng)
        Path("damaged.pt").write_bytes(damaged)
        try:
            state = utils.read_checkpoint(Path("damaged.pt"))
        except UserError:
            n_rejected += 1
            continue
        assert all(torch.equal(state["model"][name], t) for name, t in good["model"].items())
        assert state["log"] == good["log"] and state["tokenizer"] == good["tokenizer"]
    assert n_rejected > 50  # the others are in the padding between records


def test_a_run_is_not_resumed_from_unexpected_contents(trained: Path):
    state = utils.read_checkpoint(SAVED)
    rest = {"model": dict(list(state.pop("model").items())[:-1])}  # so that it never trains
    assert n_rejected(state, 40, 0, lambda: train.main(RESUME), SAVED, rest) == 40


FIXED = set("separator encoding skip_bad hold_out preset arch tokenizer bpe_vocab_size".split())
FIXED |= {"seed", "optimizer", "weight_decay", "minutes", "plan"}
FIXED |= {"teacher", "teacher_share", "teacher_temperature"}
FIXED |= {f.name for f in fields(GPTConfig)} - {"dropout"}
PLACES = {"out_dir", "tag", "resume", "overwrite", "overfit_batch", "device", "data", "vocab_size"}


def other_value(field: Field, value: Any) -> Any:
    if choices := field.metadata.get("choices"):
        return next(choice for choice in choices if choice and choice != value)
    if kind_of(field) is str:
        return value + "a"
    return {bool: not value, int: (value or 0) + 32, float: (value or 0) + 0.5}[kind_of(field)]


def test_resuming_honors_or_rejects_every_setting(trained: Path):
    state = utils.read_checkpoint(SAVED)
    saved = state["gpt_config"] | state["train_config"]
    for field in (*fields(GPTConfig), *fields(TrainConfig)):
        name = field.name
        if name in PLACES:
            continue
        value = other_value(field, saved[name])
        if name in FIXED:
            with pytest.raises(UserError, match=f"--{name} is .* in the run to resume"):
                resolve_train({"resume": True, name: value})
            continue
        gpt_config, config, _, _ = resolve_train({"resume": True, name: value})
        resolved = asdict(gpt_config) | asdict(config)
        assert resolved[name] == value
        assert {k for k in saved if resolved[k] != saved[k]} <= {name, "out_dir", "resume"}


def test_a_run_in_another_folder_is_resumed_from_there(trained: Path):
    shutil.copytree("checkpoints", "elsewhere/a")
    _, config, state, _ = resolve_train({"resume": True, "out_dir": "elsewhere", "tag": "a"})
    assert (config.out_dir, config.tag) == ("elsewhere", "a") and state
    (Path("elsewhere/a") / "latest.pt").unlink()
    with pytest.raises(UserError, match=r"there is no checkpoint elsewhere.a.latest\.pt"):
        resolve_train({"resume": True, "out_dir": "elsewhere", "tag": "a"})


def test_a_run_cannot_be_resumed_to_an_earlier_step(trained: Path):
    with pytest.raises(UserError, match="max_steps 10 is below 20, where the run resumes"):
        train.main(["--resume", "--device=cpu", "--max_steps=10"])


def test_an_extended_run_warns_that_its_rate_rises_again(trained: Path, capsys):
    assert train.main(RESUME) == 0
    log = utils.read_checkpoint(SAVED)["log"]
    assert [record["step"] for record in log] == [0, 5, 10, 15, 20, 25, 30]
    # cosine at 18 of 28 steps after 2 steps of warmup, instead of the end of the cosine
    rate = 4e-3 * (1 + math.cos(math.pi * 18 / 28)) / 2
    line = f"warning: the learning rate at step 20 is now {rate:g} instead of 0\n"
    assert line in capsys.readouterr().out


def test_a_rate_that_rises_by_more_than_half_is_a_warning(capsys):
    saved = asdict(TrainConfig(lr_max=1.0, warmup_steps=0))
    for rate, warns in ((1.4, False), (1.6, True)):
        train.warn_if_rate_jumps(0, TrainConfig(lr_max=rate, warmup_steps=0), saved)
        assert ("warning" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("saved", [True, False])
def test_a_restarted_process_resumes_or_starts_over(trained: Path, monkeypatch, saved: bool):
    if not saved:
        SAVED.unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    _, config, state, _ = resolve_train({})
    assert (config.resume, config.overwrite, state is not None) == (saved, not saved, saved)
    assert check_run(GPTConfig(), config) == []


HUGE = "n_layer=1000000000 n_embd=1000000 n_inner=10000000000 block_size=100000000000"
HUGE += " batch_size=100000000 grad_accum=1000000000"


@pytest.mark.parametrize("flag", HUGE.split())
def test_sizes_that_cannot_fit_are_rejected_before_the_model_is_made(workplace: Path, flag: str):
    with pytest.raises(UserError, match=r"GB: use a lower|too short|too large"):
        train.main([*TINY_RUN, f"--{flag}"])
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "tok.weight"])
def test_an_overflow_anywhere_skips_the_step_of_all_optimizers(bad: float, name: str, monkeypatch):
    model = make_model(norm="layernorm")
    parameters = dict(model.named_parameters())
    assert name in parameters, sorted(parameters)
    trainer = make_trainer(model, optimizer="muon", precision="float16", max_steps=10)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    scale = trainer.scaler.get_scale()
    handle = parameters[name].register_hook(lambda grad: grad * bad)
    trainer.train_step()
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())
    assert trainer.scaler.get_scale() == scale / 2
    handle.remove()
    trainer.train_step()
    assert not torch.equal(parameters[name], before[name])
    assert all(p.isfinite().all() for p in parameters.values())


def test_a_run_whose_float16_gradients_always_overflow_stops():
    trainer = make_trainer(precision="float16", max_steps=100)
    trainer.model.tok.weight.register_hook(lambda grad: grad * math.nan)
    for _ in range(30):  # the scale is 2^16, then half in each step
        trainer.train_step()
    trainer.check_finite()
    trainer.train_step()
    message = r"at step 31 .float16 loss scale 3.05.*--precision float32"
    with pytest.raises(UserError, match=message):
        trainer.check_finite()
