"""Planned runs: measuring, the law, the choice, the deadline. Step times are made up."""

import csv
import math
import time
import timeit
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import stop_after

import finetune
import train
from config import GPTConfig, TrainConfig
from experiments import planner
from system.settings import UserError, from_dict
from training import deadline, plan
from training.deadline import Deadline, end_schedule_at
from training.plan import LAW, Candidate, Law, Pilot, Run

ROOT = Path(__file__).parent.parent
# One of everything, so that each term can be worked out by hand.
SIMPLE = Law(0.1, 1.0, 0.2, 0.5, 0.05, 0.01, 1.0, 0.3, math.log(10), 0.04, math.log(100))
PILOT = Pilot(Run(n_params=1e6, steps=1000, epochs=0.001, window=100), unique=1e9, loss=2.0)
# Of 10,240 tokens per step, with a step of 0.1 s, evaluations of 1 s and 5 s at the end.
CONFIG = TrainConfig(batch_size=40, max_steps=1000, lr_max=0.01, schedule="linear", minutes=2.0)
BIG = Candidate(GPTConfig(), CONFIG, 1_000_000, 256.0, 0.1, 1.0, 5.0)
SMALL = replace(BIG, n_params=100_000, step=0.01)


@pytest.mark.parametrize(
    ("run", "unique", "expected"),
    [
        (Run(1e6, 1000, 1, 100, 0, 0), 1e6, 0.1 + 0.2 + 0.05 + 0.01),
        (Run(2e6, 1000, 0, 100, 0, 0), 1e12, 0.05 + 0.2 + 0.05 + 0.0),  # twice the size
        (Run(1e6, 4000, 0, 100, 0, 0), 1e12, 0.1 + 0.1 + 0.05 + 0.0),  # four times the steps
        (Run(1e6, 1000, 0, 200, 0, 0), 1e12, 0.1 + 0.2 + 0.025 + 0.0),
        (Run(1e6, 4000, 4, 100, 0, 0), 1e6, 0.1 + 0.1 + 0.05 + 0.04),  # four epochs
        (Run(1e6, 4000, 8, 100, 0, 0), 5e5, 0.1 + 0.1 + 0.05 + 0.16),  # eight, of half the text
        # a tenth of the cost of repetitions, and the cost of dropout
        (Run(1e6, 4000, 8, 100, 1, 0), 5e5, 0.1 + 0.1 + 0.05 + 0.016 + 0.3),
        # a hundredth, and the cost of weight decay
        (Run(1e6, 4000, 8, 100, 0, 1), 5e5, 0.1 + 0.1 + 0.05 + 0.0016 + 0.04),
        (Run(1e6, 4000, 8, 100, 0, 0, True), 5e5, 0.1 + 0.1 + 0.05 + 0.16 * 0.778801),  # exp(-1/4)
    ],
)
def test_the_law_by_hand(run: Run, unique: float, expected: float):
    assert SIMPLE(run, unique) == pytest.approx(expected, abs=1e-5)


def test_a_prediction_is_relative_to_the_pilot():
    assert PILOT.predict(PILOT.run, SIMPLE) == 2.0
    longer = replace(PILOT.run, steps=4000)  # 0.2 / sqrt(4) instead of 0.2, so 10% less
    assert PILOT.predict(longer, SIMPLE) == pytest.approx(1.8)
    assert replace(PILOT, loss=4.0).predict(longer, SIMPLE) == pytest.approx(3.6)


def read_runs(path: Path) -> list[dict[str, Any]]:
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    words = ("use", "text", "size")
    return [{k: v if k in words else float(v) for k, v in row.items()} for row in rows]


def test_the_constants_are_those_of_the_published_runs():
    rows = read_runs(ROOT / "experiments/results/planner.csv")
    assert planner.fit(rows) == LAW


def test_a_fit_recovers_the_law_that_made_the_losses(monkeypatch):
    rows = read_runs(ROOT / "experiments/results/planner.csv")
    monkeypatch.setattr(planner, "PRIOR", 1e-5)
    monkeypatch.setattr(planner, "PILOTS", (150,))
    # larger effects of repetitions and weight decay, which matter in a few runs only
    true = replace(SIMPLE, overfit=0.1, decay_cost=0.2, decay_power=1.0)
    for row in rows:
        row["loss"] = row["best"] = 2.0
    for (text, _, _), pilot in planner.pilots(rows).items():
        for row in (row for row in rows if row["text"] == text):
            row["loss"] = row["best"] = pilot.predict(planner.run_of(row), true)
    assert astuple(planner.fit(rows)) == pytest.approx(astuple(true), rel=0.02)


def test_the_study_writes_its_runs_and_their_predictions(fast, monkeypatch, capsys):
    runs = {
        ("shakespeare", 0, 0, 0.1): ((2, 4), ()),
        ("shakespeare", 1, 0, 1.0): ((4,), (6,)),
        ("100 kB", 0, 0, 0.1): ((2, 4), ()),
    }
    monkeypatch.setattr(planner, "RUNS", runs)
    monkeypatch.setattr(planner, "SIZES", plan.SIZES)
    monkeypatch.setattr(planner, "PILOTS", (2, 4))
    assert planner.main(["--device=cpu", "--seeds=2"]) == 0
    results = Path("checkpoints/studies/results")
    rows = read_runs(results / "planner.csv")
    uses = ["fit", "fit", "fit", "check", "fit", "fit"]
    assert [(row["use"], row["seed"]) for row in rows] == [(u, s) for s in (1, 2) for u in uses]
    epochs = [row["steps"] * 4 * 16 / row["unique"] for row in rows]
    assert [row["epochs"] for row in rows] == pytest.approx(epochs, abs=0.005)
    (row,) = csv.DictReader((results / "planner_check.csv").read_text().splitlines())
    law = planner.fit(rows)
    errors = []
    for first, last in ((rows[0], rows[3]), (rows[6], rows[9])):  # seeds 1 and 2
        pilot = Pilot(planner.run_of(first), first["unique"], first["loss"])
        errors += [pilot.predict(planner.run_of(last), law) - last["loss"]]
    assert float(row["measured"]) == pytest.approx((rows[3]["loss"] + rows[9]["loss"]) / 2)
    assert float(row["error from 2 steps"]) == pytest.approx(sum(errors) / 2)
    assert not list(Path("checkpoints/studies/planner").glob("*/*.pt"))
    assert f"LAW = {law}" in capsys.readouterr().out


def test_a_run_fills_the_time():
    run = BIG.best_run(100.0, PILOT, {})
    # Evaluations: 5% of 100 s, 5 of 1 s. 100 - 5 at the end - 6 evaluations, one before the run.
    assert run.config.max_steps == 890 and run.config.eval_every == 178
    assert run.config.warmup_steps == 89 and run.gpt.dropout == 0
    epochs = 890 * 40 * 256 / 1e9
    assert run.loss == pytest.approx(PILOT.predict(Run(1_000_000, 890, epochs, 256.0)))


def test_what_the_user_fixes_is_kept():
    flags = {"eval_every": 10, "warmup_steps": 7, "dropout": 0.3}
    run = BIG.best_run(100.0, PILOT, flags)
    assert (run.config.eval_every, run.config.warmup_steps, run.gpt.dropout) == (10, 7, 0.3)
    assert run.config.max_steps == 395 and run.step == 0.125  # 89 s / (0.125 s + 1 s / 10)
    timed = replace(BIG, gpt=replace(BIG.gpt, dropout=0.3))
    assert timed.best_run(100.0, PILOT, flags).step == 0.1  # its dropout was timed
    run = BIG.best_run(100.0, PILOT, {"warmup_steps": 400})  # as many steps after it as during it
    assert run.config.max_steps == 890 and run.config.warmup_steps == 400
    assert BIG.best_run(100.0, PILOT, {"warmup_steps": 450}).loss == math.inf


def test_with_little_time_the_small_model_is_best_and_with_much_time_the_large_one():
    def best(seconds: float) -> int:
        runs = [size.best_run(seconds, PILOT, {}) for size in (SMALL, BIG)]
        return min(runs, key=lambda run: run.loss).n_params

    assert best(20) == SMALL.n_params and best(100_000) == BIG.n_params
    assert BIG.best_run(11.0, PILOT, {}).loss == math.inf  # less than 50 steps


def test_a_small_text_is_not_read_more_often_than_it_helps():
    little, chosen = replace(PILOT, unique=1e6), {"dropout": 0.0, "weight_decay": 0.1}
    fixed = chosen | {"teacher": "a.pt"}  # so that no second run follows
    run = BIG.best_run(100_000.0, little, fixed)
    most = BIG.best_run(100_000.0, PILOT, fixed).config.max_steps
    assert run.config.max_steps < most / 10
    for factor in (0.7, 1.4):  # both sides of the minimum
        steps = factor * run.config.max_steps
        assert little.predict(Run(1e6, steps, steps * 40 * 256 / 1e6, 256.0)) > run.loss
    for regularized in ({"dropout": 0.2}, {"weight_decay": 1.0}):  # more repetitions help
        longer = BIG.best_run(100_000.0, little, fixed | regularized)
        assert longer.config.max_steps > run.config.max_steps
    pair = BIG.best_run(100_000.0, little, chosen)
    assert run.share == 1 > pair.share and pair.loss < run.loss


def test_a_shortened_schedule_continues_from_its_learning_rate():
    config = replace(CONFIG, lr_min=0.001, warmup_steps=100)
    before = train.get_lr(400, config)
    slope = before - train.get_lr(401, config)
    end_schedule_at(config, 400, 700)  # 300 steps instead of 600
    assert train.get_lr(400, config) == pytest.approx(before)
    assert before - train.get_lr(401, config) == pytest.approx(2 * slope)
    assert train.get_lr(700, config) == 0.001 and config.max_steps == 700


class FakeRun:
    """A run whose steps and evaluations take made-up times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, now: float = 0.0):
        monkeypatch.setattr(deadline, "final_seconds", lambda trainer: 5.0)
        self.config, self.now, self.step = config, now, 0
        log: Any = SimpleNamespace(seconds=lambda: self.now, bar=None, header={})
        log.is_evaluation_step = lambda step: step % config.eval_every == 0
        self.log = log
        self.deadline = Deadline(self, log)
        self.rates: list[float] = []

    def train(self, seconds: Any, evaluation: float = 1.0, end: int = 10**9) -> float:
        """Train until the end, or the step `end`. Returns the time at the end."""
        self.now += evaluation if not self.step else 0.0
        while self.step < min(self.config.max_steps, end):
            self.deadline.adjust(self.step)
            self.rates.append(train.get_lr(self.step, self.config))
            self.now += seconds(self.step)
            self.step += 1
            if self.log.is_evaluation_step(self.step) or self.step == self.config.max_steps:
                self.now += evaluation
        return self.now + 5.0


def make_config(**settings: Any) -> TrainConfig:
    return replace(CONFIG, **{"warmup_steps": 50, "eval_every": 200, **settings})


def test_a_run_that_is_fast_enough_is_not_shortened(monkeypatch):
    config = make_config()  # 1000 steps of 0.1 s, 6 evaluations of 1 s and 5 s fit into 120 s
    assert FakeRun(monkeypatch, config).train(lambda step: 0.1) < 120
    assert (config.max_steps, config.lr_max) == (1000, 0.01)


@pytest.mark.parametrize(
    "seconds",
    [
        lambda step: 0.2,  # from the beginning
        lambda step: 0.1 if step < 500 else 0.3,  # later
        lambda step: 0.08 if step < 800 else 0.5,  # near the end
        lambda step: 10.0 if step == 0 else 0.15,  # with compilation
        lambda step: 0.15 if step % 100 < 50 else 0.1,
    ],
)
def test_a_slow_run_ends_in_time_with_its_schedule_complete(monkeypatch, seconds, capsys):
    config = make_config()
    run = FakeRun(monkeypatch, config)
    total = run.train(seconds)
    assert 95 < total <= 120
    assert config.max_steps < 1000 and run.log.header["max_steps"] == config.max_steps
    assert config.lr_max == 0.01  # fine-tuning begins with it
    assert run.rates[-1] < 0.05 * 0.01  # decayed to almost 0
    steepest = max(a - b for a, b in zip(run.rates[50:], run.rates[51:], strict=False))
    assert steepest < 0.01 / 20  # no jump


def test_a_run_that_evaluates_after_every_step_ends_in_time(monkeypatch):
    assert 95 < FakeRun(monkeypatch, make_config(eval_every=1)).train(lambda step: 0.2, 0.2) <= 120


def test_a_run_that_was_slow_for_a_while_gets_its_steps_back(monkeypatch):
    config = make_config(minutes=4.0)
    run = FakeRun(monkeypatch, config)
    total = run.train(lambda step: 0.5 if step < 120 else 0.1)
    assert run.deadline.announced <= 1000 == config.max_steps and total <= 240
    steepest = max(abs(a - b) for a, b in zip(run.rates[50:], run.rates[51:], strict=False))
    assert steepest < 0.01 / 200


def test_a_resumed_run_gets_the_planned_steps_back(monkeypatch):
    config = make_config(minutes=4.0)
    slow = FakeRun(monkeypatch, config)
    slow.train(lambda step: 0.5, end=120)
    saved = from_dict(TrainConfig, asdict(config))
    assert saved.max_steps < 700 and train.get_lr(120, saved) == train.get_lr(120, config)
    resumed = FakeRun(monkeypatch, saved, slow.now)
    resumed.step, resumed.deadline.step = 120, 120
    assert resumed.train(lambda step: 0.1) <= 240
    assert saved.max_steps == 1000 and resumed.rates[-1] < 0.01 / 500


def test_evaluations_shorten_a_run_too_and_the_last_one_is_as_slow_as_the_steps(monkeypatch):
    slow = FakeRun(monkeypatch, make_config())
    assert 105 < slow.train(lambda step: 0.1, evaluation=6.0) <= 120
    run = FakeRun(monkeypatch, make_config())
    run.train(lambda step: 0.1 if step < 200 else 0.3)
    assert 110 < run.now + 3 * 5.0 <= 120


def test_a_run_out_of_time_does_one_more_step(monkeypatch):
    config = make_config()
    run = FakeRun(monkeypatch, config)
    run.train(lambda step: 0.1, end=300)
    run.now += 500  # the machine slept
    run.deadline.now = run.now  # which no step is blamed for
    run.train(lambda step: 0.1)
    assert run.step == config.max_steps == 301


@pytest.fixture
def fast(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place in which planning takes no time: tiny models with a law of their own."""
    monkeypatch.setattr(plan, "SIZES", ((1, 16, 16, 4), (1, 32, 16, 4)))
    monkeypatch.setattr(plan, "seconds_per_step", lambda trainer: 0.5)
    monkeypatch.setattr(plan, "seconds_per_window", lambda trainer: 0.01)
    monkeypatch.setattr(plan, "MIN_STEPS", 20)
    monkeypatch.setattr(plan, "PILOT_STEPS", 20)
    monkeypatch.setattr(plan, "PILOT_SECONDS", 0.0)
    return workplace


FAST = "--device=cpu --precision=float32 --eval_windows=4 --sample_tokens=0".split()


def test_a_planned_run_equals_one_with_its_settings_as_flags(fast, capsys):
    assert train.main([*FAST, "--minutes=0.5"]) == 0
    text = capsys.readouterr().out
    assert "plan: timing this machine" in text and "done in" in text
    state = torch.load("checkpoints/latest.pt", weights_only=True)
    names = {"n_layer", "n_embd", "block_size", "dropout", "batch_size", "max_steps", "lr_max"}
    names |= {"preset", "eval_every"}
    settings = state["gpt_config"] | state["train_config"]
    assert settings["minutes"] == 0.5 and 20 <= settings["max_steps"] < 60
    flags = [f"--{name}={settings[name]}" for name in sorted(names)]
    assert train.main([*FAST, *flags, "--no-grow_windows", "--tag=b"]) == 0
    ours, theirs = (torch.load(f"checkpoints/{d}latest.pt")["model"] for d in ("", "b/"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_interrupted_run_keeps_its_plan_and_its_time(fast, monkeypatch, capsys):
    assert train.main([*FAST, "--minutes=0.5"]) == 0
    whole = torch.load("checkpoints/latest.pt", weights_only=True)
    gpt = from_dict(GPTConfig, whole["gpt_config"])
    config = from_dict(TrainConfig, whole["train_config"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", stop_after(12))
        patch.setattr(plan, "plan_run", lambda *args: (gpt, replace(config, tag="b")))
        assert train.main([*FAST, "--minutes=0.5", "--tag=b"]) == 128 + 15
    state = torch.load("checkpoints/b/latest.pt", weights_only=True)
    assert state["step"] == 12 and state["seconds"] > 0
    used: list[float] = []
    adjust = Deadline.adjust
    monkeypatch.setattr(
        Deadline, "adjust", lambda self, step: used.append(self.log.seconds()) or adjust(self, step)
    )
    monkeypatch.setattr(plan, "plan_run", lambda *args: pytest.fail("planned again"))
    assert train.main(["--resume", "--device=cpu", "--tag=b"]) == 0
    assert used[0] > state["seconds"]  # the time before the interruption counts
    resumed = torch.load("checkpoints/b/latest.pt", weights_only=True)
    assert resumed["train_config"]["max_steps"] == whole["train_config"]["max_steps"]
    assert all(torch.equal(resumed["model"][k], v) for k, v in whole["model"].items())


def test_a_divided_time_trains_a_second_model(fast, monkeypatch, capsys):
    monkeypatch.setattr(plan, "FIRST_SHARE", math.nextafter(1, 0))  # so that two models are best
    monkeypatch.setattr(plan, "TAUGHT", 99.0)
    minutes = "--minutes=0.504"  # the first model's share is rounded to 0.5
    words, resume = [*FAST, minutes, "--tag=a"], ["--resume", minutes, "--tag=a"]
    other = [*words, "--overwrite", "--seed=2"]  # another first model
    start, states = time.perf_counter(), []
    for stopped_in, command in (("a", words), ("a_second", resume), ("a", other)):
        with monkeypatch.context() as patch:
            patch.setattr(train, "StopSignal", stop_after(12))
            assert train.main(command) == 128 + 15
        assert torch.load(Path("checkpoints", stopped_in, "latest.pt"))["step"] == 12
        assert train.main(resume) == 0
        states.append(torch.load("checkpoints/a_second/latest.pt"))
        states[-1]["passed"] = time.perf_counter() - start
        if command is words:
            Path("checkpoints/a_second").rename("whole")
    assert "then a second model, in checkpoints/a_second/" in capsys.readouterr().out
    whole, resumed, config = *states[:2], states[0]["train_config"]
    assert all(torch.equal(resumed["model"][k], v) for k, v in whole["model"].items())
    assert resumed["seconds"] < resumed["passed"]  # the first run's time counts once
    assert config["teacher"] == str(Path("checkpoints/a/best.pt")) and config["minutes"] == 0.504
    assert states[2]["train_config"]["seed"] == 2
    torch.save(states[2] | {"teachers": [], "train_config": {}}, "checkpoints/a_second/latest.pt")
    with pytest.raises(UserError, match="a_second/ contains another run: move it"):
        train.main(resume)
    Path("checkpoints/a").rename("first")
    assert train.main([*words, "--plan"]) == 0
    with pytest.raises(UserError, match="a_second/ is for a second run"):
        train.main(words)


def test_a_plan_prints_a_line_per_budget_and_writes_nothing(fast, capsys):
    assert train.main([*FAST, "--plan"]) == 0
    rows = capsys.readouterr().out.partition("predicted loss\n")[2].splitlines()
    assert [row.split()[0] for row in rows] == ["1", "5", "20", "60", "240"]
    losses = [float(row.split()[-1]) for row in rows]
    assert losses == sorted(losses, reverse=True) and losses[-1] >= 0
    assert not Path("checkpoints").exists()


PEAKS = [6e-3 * math.sqrt(128 / width) for width in (16, 32)]  # learning rates of the two sizes


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--n_layer=3", "--n_embd=48"], "3 x 48"),  # both sizes became the same
        ([f"--lr_min={sum(PEAKS) / 2}"], "1 x 16"),  # above the learning rate of the other
    ],
)
def test_sizes_are_planned_around_the_flags(fast, capsys, flags, size):
    assert train.main([*FAST, "--plan", "--minutes=1", *flags]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " x " in line]
    assert len(rows) == 1 and size in rows[0]


def test_too_little_time_is_an_error_that_names_the_least(fast):
    with pytest.raises(UserError, match=r"0\.01 minutes are too short.*--minutes (\d[\d.]*)$") as e:
        train.main([*FAST, "--minutes=0.01"])
    least = str(e.value).split()[-1]
    assert train.main([*FAST, "--plan", f"--minutes={least}"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes=1", "--max_steps=5"], "choose --max_steps: leave it out"),
        (["--plan", "--preset=tiny"], "choose --preset: leave it out"),
        (["--minutes=0"], "minutes must be above 0"),
        (["--minutes=1", "--n_embd=30", "--n_head=4"], "not divisible by n_head"),
    ],
)
def test_contradictions_are_errors(fast, flags, message):
    with pytest.raises(UserError, match=message):
        train.main([*FAST, *flags])


def test_several_processes_and_fine_tuning_have_no_plan(fast, monkeypatch):
    with pytest.raises(UserError, match="--minutes"):
        finetune.main(["some.pt", "--data=data/input.txt", "--minutes=1"])
    monkeypatch.setattr(plan, "is_torchrun", lambda: True)
    with pytest.raises(UserError, match="for one process"):
        train.main([*FAST, "--minutes=1"])


def test_a_resumed_run_cannot_get_another_plan(fast, capsys):
    assert train.main([*FAST, "--minutes=0.5"]) == 0
    for flag in ("--minutes=1", "--max_steps=500", "--plan"):
        with pytest.raises(UserError, match="in the run to resume"):
            train.main(["--resume", "--device=cpu", flag])


def test_the_time_of_a_step_is_the_mean_over_the_run_without_the_first_steps(monkeypatch):
    now = [0.0]
    timer = partial(timeit.repeat, timer=lambda: now[0])
    monkeypatch.setattr(plan, "timeit", SimpleNamespace(repeat=timer))
    trainer: Any = SimpleNamespace(config=TrainConfig(max_steps=100), step=0)

    def train_step() -> dict[str, torch.Tensor]:
        # The first step at each of 10, 30, 50, 70 and 90 allocates memory for a second.
        now[0] += {0: 1.0, 1: 0.1 if trainer.step < 50 else 0.2}[trainer.step % 10]
        trainer.step += 1
        return {"loss": torch.tensor(0.0)}

    trainer.train_step = train_step
    assert plan.seconds_per_step(trainer) == pytest.approx((2 * 0.1 + 3 * 0.2) / 5)
