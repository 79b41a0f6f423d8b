"""The files of a run, its status lines, and what other tools receive."""

import itertools
import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import TINY_RUN

import train
from config import GPTConfig, TrainConfig
from system.settings import UserError
from train import Trainer
from training import distributed, run_log, setup
from training.run_log import RunLog, status_line
from training.task import Pretraining

HEADER = {"corpus": {"name": "a text"}} | asdict(GPTConfig()) | asdict(TrainConfig())
TIMINGS = ("tokens_per_second", "ms_per_step", "seconds")
# The learning rate does not depend on max_steps, so a longer run is the shorter one continued.
CONSTANT_RATE = ["--lr_max=1e-2", "--lr_min=1e-2", "--warmup_steps=2"]


def make_log(**settings: object) -> RunLog:
    return RunLog(TrainConfig(**{"max_steps": 1000, **settings}), HEADER)


def log_validation_losses(log: RunLog, losses: list[float]) -> list[bool]:
    """Log an evaluation for each loss. Returns which of them were the best so far."""
    step = len(log.records)
    return [
        log.evaluation(step + i, {"train": val, "val": val}, 1e-3, "a sample")
        for i, val in enumerate(losses)
    ]


def read_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def read_records(run: Path, without: tuple[str, ...] = ()) -> list[dict]:
    """The evaluations and training steps of log.jsonl, without empty values."""
    return [
        {name: value for name, value in line.items() if value is not None and name not in without}
        for line in read_lines(run)
        if "step" in line
    ]


def read_evaluations(run: Path) -> list[dict]:
    """The evaluations of log.jsonl, without empty values."""
    return [record for record in read_records(run) if "val" in record]


def checkpoint(log: RunLog, step: int = 1000) -> dict:
    """What a checkpoint after this step has of a log."""
    return log.state() | {"step": step}


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_the_status_line_does_not_depend_on_the_order_of_the_metrics():
    known = {"step": 10, "val": 1.23456, "lr": 0.001, "grad_norm": 0.5, "seconds": 7.0}
    other = {"margin": 0.5, "ms_per_step": 2.0, "lr": 0.001, "bpb": 2.0, "ppl": None}
    for record, expected in (
        (known, "step 10 | val 1.2346 | lr 1.00e-03 | grad 0.50"),
        (other, "bpb 2.0000 | margin 0.500 | lr 1.00e-03 | 2.0 ms/step"),
    ):
        for names in itertools.permutations(record):
            assert status_line({name: record[name] for name in names}) == expected
    in_order = {"old": 3.14159, "margin": 0.5, "val": 1.0}  # of the unknown ones
    assert status_line(in_order) == "val 1.0000 | old 3.142 | margin 0.500"


def test_further_terms_of_the_loss_reach_the_log_and_the_status_line(workplace, capsys):
    calls = itertools.count(1)

    class TwoTerms(Pretraining):
        def loss(self, model, x, y):
            return super().loss(model, x, y) | {"calls": torch.tensor(float(next(calls)))}

    flags = [*TINY_RUN, "--grad_accum=2", "--max_steps=10"]
    assert train.main(flags, task_type=TwoTerms) == 0
    records = read_evaluations(Path("checkpoints"))
    # before the first step there is no loss; the micro-batches of step 5 are calls 9 and 10
    assert [record.get("calls") for record in records] == [None, 9.5, 19.5]
    assert not any("loss" in record for record in records)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert "calls" not in lines[0]
    assert "| calls 9.500 | lr" in lines[1] and "| calls 19.500 | lr" in lines[2]


def test_step_times_exclude_the_first_step_evaluations_and_checkpoints(workplace, monkeypatch):
    now = 0.0

    def slow(name: str, seconds: float) -> None:
        method = getattr(Trainer, name)

        def wrapper(trainer: Trainer, *args: object, **options: object) -> object:
            nonlocal now
            compiling = name == "train_step" and trainer.step == 0
            now += 60.0 if compiling else seconds
            return method(trainer, *args, **options)

        monkeypatch.setattr(Trainer, name, wrapper)

    slow("train_step", 0.25)
    slow("evaluate", 3.0)
    slow("save", 7.0)
    monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: now))
    train.main([*TINY_RUN, "--grad_accum=2"])
    first, *records = read_evaluations(Path("checkpoints"))
    assert "ms_per_step" not in first
    for record in records:  # steps have 2 micro-batches of 4 windows of 16 tokens
        assert record["ms_per_step"] == pytest.approx(250)
        assert record["tokens_per_second"] == pytest.approx(4 * 128)
    assert records[0]["seconds"] == 3 + 7 + 60 + 4 * 0.25 + 3


@pytest.mark.parametrize(("cpu_share", "says"), [(0.9, 0), (0.4, 1)])
def test_a_busy_cpu_is_said_once_with_the_times(workplace, monkeypatch, capsys, cpu_share, says):
    """In steps of 500 ms the thread that trains computes for 450 or 200 ms."""
    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now, thread_time=lambda: now * cpu_share)
    monkeypatch.setattr(run_log, "time", clock)
    monkeypatch.setattr(distributed, "time", clock)
    log = make_log(log_every=1)
    log.begin(SimpleNamespace(step=0, device=torch.device("cpu")))
    for step in range(1, 31):
        now += 0.5
        log.training_step(step, {"loss": torch.tensor(1.0)}, 1e-3)
    line = "other programs use the CPU: a step takes 500 ms, about 200 ms alone"
    assert capsys.readouterr().out.count(line) == says


def test_patience_counts_the_evaluations_without_improvement(workplace):
    """Also those from before a resume. An equal loss is no improvement."""
    log, patient = make_log(patience=2), make_log()
    losses = [3.0, 2.5, 2.6, 2.4, 2.4, 2.5, 2.45, 2.3]
    improved = [True, True, False, True, False, False, False, True]
    stops = [False, False, False, False, False, True, True, False]
    for loss, is_best, stop in zip(losses, improved, stops, strict=True):
        assert log_validation_losses(log, [loss]) == [is_best]
        assert log.out_of_patience() == stop, loss
        log = RunLog(log.config, HEADER, state=checkpoint(log))
        assert log.out_of_patience() == stop, loss
    assert log.best()["step"] == 7
    log_validation_losses(patient, [1.0, *[2.0] * 20])
    assert not patient.out_of_patience()


def test_a_resumed_run_has_the_samples_and_the_log_of_an_uninterrupted_one(workplace):
    flags = [*TINY_RUN, *CONSTANT_RATE, "--sample_tokens=30"]
    assert train.main([*flags, "--tag=whole", "--max_steps=20"]) == 0
    assert train.main([*flags, "--tag=killed", "--max_steps=10"]) == 0
    whole, killed = (Path("checkpoints", tag) for tag in ("whole", "killed"))
    with open(killed / "samples.txt", "a") as file:  # written after the last checkpoint
        file.write("--- step 15\na sample that latest.pt does not know\n\n")
    with open(killed / "log.jsonl", "a") as file:
        file.write('{"step": 15, "val": 0.0}\n')
    assert train.main(["--resume", "--tag=killed", "--device=cpu", "--max_steps=20"]) == 0
    assert (killed / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert (whole / "samples.txt").read_text().count("--- step") == 5
    assert read_records(killed, TIMINGS) == read_records(whole, TIMINGS)


@pytest.mark.parametrize("name", ["samples.txt", "../notes.txt"])
def test_a_resume_only_shortens_files_and_only_those_of_the_run(workplace, name):
    """A checkpoint may be from a stranger, and samples.txt may have been edited."""
    log = make_log()
    log_validation_losses(log, [3.0, 2.0])
    file = log.run_dir / name
    file.write_text("a short text")
    size = 1000 if name == "samples.txt" else 0
    RunLog(log.config, HEADER, state=checkpoint(log) | {"files": {name: size}})
    assert file.read_text() == "a short text"


@pytest.mark.parametrize("more", [[], ["--max_steps=20"]])
def test_resuming_a_finished_run_leaves_one_final_line(workplace, more):
    train.main([*TINY_RUN, *CONSTANT_RATE, "--max_steps=10"])
    assert train.main(["--resume", "--device=cpu", *more]) == 0
    header, *records, final = read_lines(Path("checkpoints"))
    assert header["corpus"]["name"] == "input.txt"
    steps = [0, 5, 10, 15, 20] if more else [0, 5, 10]
    evaluations = [record for record in records if "val" in record]
    assert [record["step"] for record in evaluations] == steps  # each once
    trained = [record["step"] for record in records if "val" not in record]
    assert trained == ([10, 20] if more else [10])
    best = min(evaluations, key=lambda record: record["val"])
    assert final.keys() == {"final"} and final["final"]["step"] == best["step"]
    assert json.loads(Path("checkpoints/loss_log.json").read_text()) == evaluations


def test_a_new_run_deletes_the_files_of_the_old_one_and_no_others(workplace, monkeypatch):
    assert train.main([*TINY_RUN, "--save_every=10"]) == 0
    run = Path("checkpoints")
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events").write_text("of TensorBoard")
    written = {"log.jsonl", "loss_log.json", "loss_curve.png", "samples.txt", "latest.pt"}
    written |= {"lock", "best.pt", "ckpt_00010.pt", "ckpt_00020.pt", "tensorboard/events"}
    assert files_in(run) == written
    own = {"notes.txt", "samples_notes.txt", "my_best.pt", "log.jsonl.txt", "figures/a.png"}
    own |= {"other_run/latest.pt", "tensorboard/latest.pt"}  # a run may have this name
    for name in own:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(f"my own {name}")
    (run / "latest.pt").write_text("damaged")

    # before the new run writes anything
    monkeypatch.setattr(Trainer, "train", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main([*TINY_RUN, "--overwrite"])
    assert files_in(run) == own | {"lock"}
    assert all((run / name).read_text() == f"my own {name}" for name in own)


def test_only_rank_0_writes_and_all_ranks_decide_alike(workplace, monkeypatch):
    decisions, files = [], []
    for rank in (0, 1):
        monkeypatch.setattr(run_log, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(run_log, "PLOT_INTERVAL", -1.0)  # plot at every evaluation
        log = make_log(patience=2)
        best = log_validation_losses(log, [3.0, 2.0, 2.5, 2.5])
        log.training_step(10, {"loss": torch.tensor(2.0)}, 0.5)
        decisions.append((best, log.best()["step"], log.out_of_patience()))
        log.stopped(3)
        log.finish({"val": 2.0})
        run = Path("checkpoints")
        files.append(files_in(run) if run.exists() else None)
        shutil.rmtree(run, ignore_errors=True)
    assert decisions[0] == decisions[1] == ([True, True, False, False], 1, True)
    assert files == [{"log.jsonl", "loss_log.json", "loss_curve.png", "samples.txt"}, None]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_an_error_before_anything_is_written(workplace, monkeypatch, name):
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        train.main([*TINY_RUN, f"--{name}"])
    assert not (workplace / "checkpoints").exists()
    monkeypatch.setattr(setup, "find_spec", {name: "installed"}.get)
    assert setup.check_run(GPTConfig(), TrainConfig(device="cpu", **{name: True})) == []


# --- numbers by hand, with a clock that the test sets


class Clock:
    """time.perf_counter() of a run log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: float = 1000.0):
        self.now = now
        monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def steps(self, log: RunLog, first: int, last: int, seconds: float) -> None:
        """Training steps, each of which takes so many seconds."""
        for step in range(first, last + 1):
            self.now += seconds
            terms = {"loss": 10.0 + step, "grad_norm": 20.0 + step, "margin": 30.0 + step}
            metrics = {name: torch.tensor(value) for name, value in terms.items()}
            log.training_step(step, metrics, lr=step / 8)


def test_the_record_of_an_evaluation_by_hand(workplace, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(run_log, "PLOT_INTERVAL", math.inf)
    log = RunLog(TrainConfig(max_steps=25, eval_every=5), HEADER, tokens_per_step=64)
    clock.now += 3
    log.evaluation(0, {"val": 4.0}, 0.0, "")
    clock.steps(log, 1, 1, seconds=60.0)  # it compiles
    clock.steps(log, 2, 5, seconds=0.5)
    clock.now += 7  # evaluates
    log.evaluation(5, {"val": 3.0, "ppl": 20.0}, 0.25, "")
    log.restart_clock(5)
    clock.steps(log, 6, 9, seconds=0.25)
    log.evaluation(9, {"val": 2.0}, 0.125, "")  # metrics are read at steps 5 and 10, not at 9
    speed = {"tokens_per_second": 128.0, "ms_per_step": 500.0}
    terms = {"margin": 35.0, "grad_norm": 25.0}
    assert log.records[:2] == [
        {"step": 0, "val": 4.0, "lr": 0.0, "grad_norm": None, "tokens_per_second": None}
        | {"ms_per_step": None, "seconds": 3.0},
        {"step": 5, "val": 3.0, "ppl": 20.0, **terms, "lr": 0.25, **speed, "seconds": 72.0},
    ]
    assert log.records[2]["margin"] == 35.0 and log.records[2]["ms_per_step"] is None
    assert read_evaluations(log.run_dir) == [
        {name: value for name, value in record.items() if value is not None}
        for record in log.records
    ]
    assert read_lines(log.run_dir)[0] == HEADER


def test_a_resumed_log_continues_the_seconds_and_times_only_its_own_steps(workplace, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(run_log, "PLOT_INTERVAL", math.inf)
    config = TrainConfig(max_steps=40, eval_every=10)
    log = RunLog(config, HEADER, 64)
    for step, seconds in ((0, 5.0), (10, 6.0)):
        clock.now += seconds
        log.evaluation(step, {"val": 4.0}, 0.0, "")
    state, clock = checkpoint(log), Clock(monkeypatch, now=5.0)
    resumed = RunLog(config, HEADER, 64, state)
    assert resumed.records == log.records
    clock.steps(resumed, 11, 11, seconds=30.0)
    clock.steps(resumed, 12, 20, seconds=2.0)
    resumed.evaluation(20, {"val": 3.0}, 0.0, "")
    record = resumed.records[-1]
    assert (record["ms_per_step"], record["tokens_per_second"]) == (2000.0, 32.0)
    assert record["seconds"] == 11 + 30 + 9 * 2.0


def test_training_steps_are_logged_in_between_and_after_a_resume_as_before(workplace, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(run_log, "PLOT_INTERVAL", math.inf)
    log = RunLog(TrainConfig(max_steps=100, eval_every=10, log_every=4), HEADER)
    log.evaluation(0, {"val": 4.0}, 0.0, "")
    clock.steps(log, 1, 10, seconds=0.5)
    log.evaluation(10, {"val": 3.0}, 0.25, "")
    before = checkpoint(log, 10)
    clock.steps(log, 11, 16, seconds=0.5)  # lost: the checkpoint is of step 10
    step_4 = {"step": 4, "loss": 14.0, "grad_norm": 24.0, "margin": 34.0, "lr": 0.5, "seconds": 2.0}
    assert [(r["step"], "val" in r) for r in read_records(log.run_dir)] == [
        *((0, True), (4, False), (8, False), (10, True), (12, False), (16, False)),
    ]
    file = log.run_dir / "log.jsonl"
    with open(file, "a") as damaged:  # the last line is of a process killed while it wrote
        damaged.write('{"step": 12, "loss": "x"}\n[7]\n\0\0\n' + "[" * 10_000 + '\n{"step": 13, "')
    resumed = RunLog(log.config, HEADER | {"max_steps": 100}, state=before)
    header, *records = read_lines(log.run_dir)
    assert header == HEADER | {"max_steps": 100}
    assert [r["step"] for r in records] == [0, 4, 8, 10] and records[1] == step_4
    clock.steps(resumed, 11, 12, seconds=0.5)
    assert [r["step"] for r in read_records(log.run_dir)] == [0, 4, 8, 10, 12]
    file.unlink()  # the evaluations are in the checkpoint
    RunLog(log.config, HEADER, state=before)
    assert [r["step"] for r in read_records(log.run_dir)] == [0, 10]


@pytest.mark.parametrize(
    ("losses", "max_steps", "stopped"),
    [
        ([3.0, 2.0, 2.5, 2.5], 9, True),
        ([3.0, 2.0, 2.5], 9, False),
        ([3.0, 2.0, 2.5, 2.5], 3, False),  # it ends at max_steps
    ],
)
def test_a_run_that_patience_ends_says_so(workplace, capsys, losses, max_steps, stopped):
    settings = {"patience": 2, "max_steps": max_steps}
    log = RunLog(TrainConfig(**settings), HEADER | settings)
    log_validation_losses(log, losses)
    capsys.readouterr()
    log.finish({"val": 2.0})
    assert ("; --patience 2 stopped the run at step 3" in capsys.readouterr().out) == stopped


def test_the_progress_bar_counts_from_the_resumed_step_and_shows_the_loss(workplace, monkeypatch):
    bars = mock.Mock()
    monkeypatch.setattr(run_log, "tqdm", bars)
    clock = Clock(monkeypatch)
    log = RunLog(TrainConfig(max_steps=100, eval_every=50), HEADER)
    clock.steps(log, 7, 7, 1.0)  # without a bar
    log.begin(SimpleNamespace(step=8, device=torch.device("cpu")))
    clock.steps(log, 9, 11, 1.0)
    settings = {"total": 100, "initial": 8, "unit": "step", "leave": False, "disable": None}
    show, update = mock.call().set_postfix_str("loss 20.0000", refresh=False), mock.call().update()
    assert bars.mock_calls == [mock.call(**settings), update, show, update, update]


def test_metrics_are_read_every_ten_steps_and_before_evaluations(workplace, monkeypatch):
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (read.append(step), tolist(t))[1])
    log = make_log(eval_every=7, max_steps=24)
    assert [step for step in range(1, 25) if log.is_evaluation_step(step)] == [7, 14, 21, 24]
    for step in range(3, 25):
        metrics = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}
        log.training_step(step, metrics, lr=0.0)
    assert read == [3, 7, 10, 14, 20, 21, 24]
    assert log.metrics == {"loss": 1.0, "grad_norm": 2.0}


def test_the_curve_is_redrawn_every_few_seconds_but_not_at_the_last_step(workplace, monkeypatch):
    clock, plots = Clock(monkeypatch), []
    monkeypatch.setattr(run_log, "plot_runs", lambda runs: None)
    monkeypatch.setattr(run_log, "save_figure", lambda _, file: plots.append((clock.now, file)))
    log = make_log(max_steps=9)
    for step, wait in enumerate([5.0, 0.5, 3.0, 2.0, 3.5, 0, 0, 0, 0, 100.0]):
        clock.now += wait
        log.evaluation(step, {"val": 1.0}, 0.0, "")
    assert plots == [(now, Path("checkpoints/loss_curve.png")) for now in (1005.5, 1014.0)]

    def draw_slowly(figure: object, file: Path) -> None:
        plots.append(clock.now)
        clock.now += 2.0

    monkeypatch.setattr(run_log, "save_figure", draw_slowly)
    clock.now = 1000.0
    log = make_log()
    plots.clear()
    for step in range(100):
        clock.now += 1.0
        log.evaluation(step, {"val": 1.0}, 0.0, "")
    assert plots == [1006.0, 1049.0, 1092.0]  # 40 seconds after the end of the last one


@pytest.mark.parametrize(
    ("step", "sample", "title", "printed"),
    [
        (3, "one\n\ntwo\nthree\n\nfour\nfive é", "at step 3", ["one", "two", "three", "four"]),
        (
            0,
            "word " * 8 + "word\n" + "x" * 60,
            "before training",
            ["word word word word word", "word word word word", "x" * 25, "x" * 25],
        ),
    ],
)
def test_samples_are_written_whole_and_printed_by_their_first_lines(
    workplace, monkeypatch, capsys, step, sample, title, printed
):
    monkeypatch.setenv("COLUMNS", "30")
    log = make_log()
    log.write_sample(step, sample)
    log.write_sample(4, "")
    text = (log.run_dir / "samples.txt").read_text(encoding="utf-8")
    assert text == f"--- step {step}{'' if step else ', before training'}\n{sample}\n\n"
    lines = [f"  sample {title}:", *(f"    {line}" for line in printed)]
    assert capsys.readouterr().out.splitlines() == lines


def test_the_end_of_a_run_is_reported(workplace, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    verdict = lambda records, settings: f"{settings['vocab_size']} is fine"  # noqa: E731
    monkeypatch.setattr(run_log, "verdict", verdict)
    log = RunLog(TrainConfig(max_steps=9, tag="a"), HEADER)
    for step, loss in enumerate([3.0, 1.5, 2.0]):
        clock.now += 10
        log.evaluation(step, {"train": 0.5, "val": loss}, 0.0, "")
    capsys.readouterr()
    log.finish({"val": 1.25, "ppl": 3.5, "bpb": 0.75, "margin": 2.0})
    run = Path("checkpoints/a")
    assert capsys.readouterr().out.splitlines() == [
        "done in 30 s: best at step 1; over the whole validation split: "
        "val 1.2500 | ppl 3.50 | bpb 0.7500 | margin 2.000",
        "verdict: 50257 is fine",
        f"files: {run}/; next: python generate.py {run / 'best.pt'}",
    ]
    final = {"step": 1, "val": 1.25, "ppl": 3.5, "bpb": 0.75, "margin": 2.0}
    final["verdict"] = "50257 is fine"
    assert json.loads((run / "loss_log.json").read_text()) == log.records
    assert read_lines(run) == [HEADER, *log.records, {"final": final}]
    assert (run / "loss_curve.png").exists()
    log.stopped(17)
    words = f"17; --resume continues from here; next: python generate.py {run / 'best.pt'}\n"
    assert capsys.readouterr().out == f"stopped and saved at step {words}"
    log.records[:] = log.records[:1]  # stopped before the first evaluation of a trained model
    log.stopped(17)
    assert capsys.readouterr().out.endswith(f"python generate.py {run / 'latest.pt'}\n")


def test_a_checkpoint_has_the_size_of_its_samples_and_may_lack_files(workplace):
    log = RunLog(TrainConfig(out_dir="a/b", tag="c"), HEADER)
    log.write_sample(0, "é")
    size = len(b"--- step 0, before training\n\xc3\xa9\n\n")
    assert log.state()["files"] == {"samples.txt": size}
    (log.run_dir / "samples.txt").unlink()
    RunLog(log.config, HEADER, state=checkpoint(log) | {"files": {"samples.txt": 14}})
    RunLog(log.config, HEADER, state={"step": 0, "log": []})  # of a run without any such file


def test_wandb_receives_the_records_without_their_empty_values(workplace, monkeypatch):
    init = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    log = RunLog(TrainConfig(wandb=True, tag="a"), HEADER)
    log.evaluation(3, {"val": 2.0}, 0.5, "")
    sent = {"step": 3, "val": 2.0, "lr": 0.5, "seconds": log.records[0]["seconds"]}
    settings = {"project": "tinyllm", "name": "a", "dir": log.run_dir, "config": HEADER}
    assert init.mock_calls == [mock.call(**settings, reinit=True), mock.call().log(sent, step=3)]
    init.reset_mock()
    RunLog(TrainConfig(wandb=True), HEADER, state=checkpoint(log))
    settings |= {"name": None, "dir": Path("checkpoints")}
    assert init.mock_calls == [mock.call(**settings, reinit=True), mock.call().log(sent, step=3)]


def test_tensorboard_is_written_again_from_the_first_record(workplace, monkeypatch):
    writer, call = mock.Mock(), mock.call()
    module = SimpleNamespace(SummaryWriter=writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    folder = Path("checkpoints/tensorboard")
    folder.mkdir(parents=True)
    (folder / "events").touch()
    record = {"step": 4, "val": 2.0, "ppl": None, "seconds": 1.0}
    RunLog(TrainConfig(tensorboard=True), {"a": 1, "b": "x"}, state={"step": 4, "log": [record]})
    assert not (folder / "events").exists()
    assert writer.mock_calls == [
        mock.call(folder),
        call.add_text("settings", "    a: 1\n    b: x"),
        *(call.add_scalar(*words) for words in (("step", 4, 4), ("val", 2.0, 4))),
        call.add_scalar("seconds", 1.0, 4),
        call.flush(),
    ]
