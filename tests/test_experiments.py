"""The studies at a tiny size: their tables match their runs, and finished runs are not repeated."""

import csv
import hashlib
import importlib
import itertools
import json
import math
import re
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY_RUN

import train
from config import ARCH_FIELDS, ARCHS, GPTConfig, TrainConfig, train_settings
from experiments import (
    ablation,
    bench,
    compare,
    comparison,
    lr_context,
    scaling,
    sizes,
    speedrun,
    study,
    swaps,
    teachers,
    timing,
    tokenization,
)
from system.command_line import parse_args
from system.settings import UserError
from train import Trainer
from training.resume import weights_sha256
from utils import load_checkpoint, read_checkpoint
from viz.curve import new_figure

EXPERIMENTS = Path(study.__file__).parent
CHOICES = {f.name: f.metadata["choices"] for f in fields(GPTConfig) if "choices" in f.metadata}
COMMANDS = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if "def main(" in path.read_text())
CAUCHY = 12.7062  # the 97.5% quantile of t with one degree of freedom, tan(0.475 pi): two seeds
TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "batch_size": 4, "max_steps": 6}
TINY |= {"eval_every": 3, "eval_windows": 4, "compile": False, "precision": "float32"}


def parse_tiny_study(*words: str) -> study.Study:
    return study.parse_study("some", ["--device=cpu", *words], "")


def run_twice(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str, **constants: Any) -> Any:
    """Run a tiny study with two seeds and these constants, then again with training forbidden.
    Returns the rows of its first table."""
    for name, value in ({"SHARED": module.SHARED | TINY} | constants).items():
        monkeypatch.setattr(module, name, value)
    words = ("--seeds=2", "--device=cpu", *words)
    progress: list[str] = []
    with monkeypatch.context() as patch:
        line = study.Study.progress
        patch.setattr(study.Study, "progress", lambda s: progress.append(line(s)) or line(s))
        assert module.main(list(words)) == 0
    n_runs = len(list(Path("checkpoints/studies").glob("*/*/study.json")))
    assert len(progress) == n_runs
    assert progress[0] == f"run 1 of {n_runs}"  # nothing to estimate from
    slug = module.__name__.removeprefix("experiments.")
    name = Path("checkpoints/studies/results", slug)
    rows = table(slug)
    assert name.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "train_one", lambda *args: pytest.fail("trained again"))
        assert module.main(list(words)) == 0
    assert table(slug) == rows
    text = name.with_suffix(".md").read_text()
    assert f"`python -m {module.__name__} --seeds 2" in text and "; cpu, " in text
    return rows


def results(name: str) -> list[dict[str, Any]]:
    """The results of a study's runs, by folder name."""
    folder = Path("checkpoints/studies", name)
    return {f.parent.name: json.loads(f.read_text()) for f in folder.glob("*/study.json")}


def table(name: str) -> list[dict[str, str]]:
    text = Path(f"checkpoints/studies/results/{name}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how_to_run_it(name: str, capsys: pytest.CaptureFixture):
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert f"python -m experiments.{name}" in text and "--version" in text


def test_the_commands_in_the_documentation_exist():
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    text += "".join(path.read_text(encoding="utf-8") for path in EXPERIMENTS.glob("*.py"))
    commands = set(re.findall(r"python -m experiments\.(\w+)", text))
    assert commands == set(COMMANDS)
    assert "python experiments/" not in text


def test_the_swaps_cover_every_component():
    base = ARCHS["gpt2"]
    for name in ARCH_FIELDS:
        others = set(CHOICES.get(name, (False, True))) - {base[name]}
        assert {swap[name] for swap in swaps.SWAPS.values() if set(swap) == {name}} == others


def test_swaps(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    some = ("GPT-2's architecture", "learned positions to RoPE", "post-norm")
    rows = run_twice(swaps, monkeypatch, SWAPS={name: swaps.SWAPS[name] for name in some})
    runs = results("swaps")
    assert len(runs) == 2 * len(rows) == 2 * len(swaps.SWAPS)
    base, rope = ([runs[f"{slug}-{seed}"] for seed in (1, 2)] for slug in (
        "GPT-2-s-architecture", "learned-positions-to-RoPE"))  # fmt: skip
    assert rows[1]["variant"] == "learned positions to RoPE"
    assert float(rows[1]["validation loss"]) == pytest.approx((rope[0]["val"] + rope[1]["val"]) / 2)
    half = CAUCHY * abs(rope[0]["val"] - rope[1]["val"]) / 2
    assert float(rows[1]["95% margin"]) == pytest.approx(half)
    deltas = [b["val"] - a["val"] for a, b in zip(base, rope, strict=True)]
    assert float(rows[1]["difference"]) == pytest.approx(sum(deltas) / 2)
    times = [run["ms_per_step"] for run in rope]
    assert float(rows[1]["ms per step"]) == pytest.approx(sum(times) / 2, abs=0.051)
    assert int(rows[0]["parameters"]) - int(rows[1]["parameters"]) == 16 * 16  # the positions
    assert [run["flags"]["seed"] for run in base] == [1, 2] and base[0]["flags"]["arch"] == "gpt2"


def test_teachers(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    rows = run_twice(teachers, monkeypatch, GENERATIONS=2, LONGER={"max_steps": 9})
    assert [(row["model"], row["steps"]) for row in rows] == [
        ("one longer run", "9"), ("generation 1", "6"), ("generation 2", "6")]  # fmt: skip
    runs = results("teachers")
    for seed in (1, 2):
        first, second = (runs[f"{n}-{seed}"]["flags"] for n in (1, 2))
        assert second["teacher"] == f"{first['out_dir']}/best.pt"
        assert (second["seed"], "teacher" in first) == (seed, False)
        sha256 = weights_sha256(read_checkpoint(Path(second["teacher"]))["model"])
        assert read_checkpoint(Path(second["out_dir"], "best.pt"))["teachers"] == [sha256]


def test_ablation(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    some = {name: ablation.VARIANTS[name] for name in ("fast", "no token shift")}
    rows = run_twice(ablation, monkeypatch, VARIANTS=some)
    flags = [run["flags"] for run in results("ablation").values()]
    assert len(rows) == 2 and {f["preset"] for f in flags} == {"fast"}
    assert sorted(str(f.get("token_shift")) for f in flags) == ["False", "False", "None", "None"]


def test_every_variant_of_the_ablation_differs_from_the_preset():
    fast = train_settings({"preset": "fast"}, "cpu")
    for name, change in ablation.VARIANTS.items():
        variant = train_settings({"preset": "fast"} | change, "cpu")
        assert (variant == fast) == (name == "fast"), name


def test_sizes(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    small = {name: {"n_layer": 1, "n_embd": n} for name, n in (("a", 8), ("b", 16), ("c", 24))}
    rows = run_twice(sizes, monkeypatch, EVALUATIONS=2, SIZES=small)
    assert [row["size"] for row in rows] == [*"abcabc"]
    assert [row["steps"] for row in rows[:3]] == ["6"] * 3
    shares = {run["flags"]["share"] for run in results("sizes").values()}
    assert shares == {0.1, 1 / 3, 1.0}


def test_lr_context(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    rows = run_twice(lr_context, monkeypatch, WINDOWS=(8, 16), RATES=(1e-3, 1e-2))
    found = [(row["window"], row["peak rate"]) for row in rows]
    assert found == [("8", "0.001"), ("8", "0.01"), ("16", "0.001"), ("16", "0.01")]
    runs = results("lr_context")
    one, four = runs["accumulate1-1"], runs["accumulate4-1"]  # the same windows per step
    assert (one["flags"]["batch_size"], four["flags"]["batch_size"]) == (4, 1)
    tokens = {run["flags"]["batch_size"] * run["flags"]["block_size"] for run in runs.values()}
    assert tokens == {64, 16, 32}


def test_a_folder_with_a_run_of_other_settings_is_refused(workplace: Path):
    some = parse_tiny_study()
    some.make_run("a", TINY)
    with pytest.raises(UserError, match="other settings"):
        some.make_run("a", TINY | {"lr_max": 0.5})


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_run_is_resumed(error, workplace, monkeypatch, capsys):
    complete, interrupted = (parse_tiny_study(f"--out_dir={name}") for name in "ab")
    expected = complete.make_run("a", TINY)
    with monkeypatch.context() as patch:
        train_step = Trainer.train_step

        def fail_or_press_ctrl_c(trainer: Any) -> Any:
            if trainer.step == 4:
                signal.raise_signal(signal.SIGINT) if error is KeyboardInterrupt else 1 / 0
            return train_step(trainer)

        patch.setattr(Trainer, "train_step", fail_or_press_ctrl_c)
        with pytest.raises(error):
            interrupted.make_run("a", TINY)
    stopped = "stopped; the same command resumes it" in capsys.readouterr().out
    assert stopped == (error is KeyboardInterrupt)
    result = interrupted.make_run("a", TINY)
    assert result["val"] == expected["val"]
    assert [record["step"] for record in result["log"]] == [0, 3, 6]


def test_finished_runs_of_a_resumed_study_count(workplace: Path, capsys: pytest.CaptureFixture):
    parse_tiny_study("--seeds=2").with_seeds("a", TINY)
    resumed = parse_tiny_study("--seeds=2")
    resumed.n_runs = 4
    capsys.readouterr()
    for name in "ab":
        resumed.with_seeds(name, TINY)
    *_, last = capsys.readouterr().out.splitlines()
    assert re.match(r"some, run 4 of 4, about 0:00:\d\d left: b-2", last)
    log = resumed.make_run("a-1", TINY | {"seed": 1})["log"]
    assert resumed.seconds[0] == log[-1]["seconds"] > 0  # of the earlier command
    resumed.n_runs, resumed.seconds = 48, [30.0, 90.0]
    assert resumed.progress() == "run 3 of 48, about 0:46:00 left"  # 46 runs of a minute


def test_published_results_are_replaced_only_on_request(workplace: Path):
    published = Path("experiments/results/some.csv")
    published.parent.mkdir(parents=True)
    published.write_text("published")
    for flag, expected in (("--seeds=3", "published"), ("--results=experiments/results", "n\n1\n")):
        parse_tiny_study(flag).write_results({"Numbers": [{"n": 1}]}, new_figure(2, 2))
        assert published.read_text() == expected
    assert Path("checkpoints/studies/results/some.csv").read_text() == "n\n1\n"


def test_a_diverged_run_is_a_result(workplace: Path):
    some = parse_tiny_study()
    flags = TINY | {"lr_max": 1e9, "warmup_steps": 0, "arch": "gpt2"}
    result = some.make_run("a", flags)
    assert math.isinf(result["val"]) and math.isinf(result["bpb"])
    assert [record["step"] for record in result["log"]] == [0]
    assert some.make_run("a", flags) == result


def test_the_time_of_the_steps_excludes_evaluations():
    log = [
        {"step": 0, "ms_per_step": None, "seconds": 7.0},
        {"step": 1, "ms_per_step": None, "seconds": 9.0},  # the first step alone is not timed
        {"step": 11, "ms_per_step": 100.0, "seconds": 50.0},
        {"step": 21, "ms_per_step": 210.0, "seconds": 70.0},
    ]
    times = study.step_times(log)
    assert times == pytest.approx({"seconds": 1.0 + 2.1, "ms_per_step": 3100 / 21})


def test_tables_as_markdown_and_csv():
    rows = [{"name": "a", "loss": 1.23456, "n": 1234567}, {"name": "b", "loss": math.nan, "n": 2}]
    names, _, *lines = study.to_markdown(rows).splitlines()
    assert names == "| name | loss | n |"
    assert lines == ["| a | 1.2346 | 1,234,567 |", "| b | - | 2 |"]
    assert study.to_csv(rows).splitlines() == ["name,loss,n", "a,1.23456,1234567", "b,nan,2"]
    row = {"difference": 0.5, "95% from": -0.25, "to": 1.25, "p": 3e-6}
    assert study.to_markdown([row]).splitlines()[2] == "| +0.5000 | -0.2500 | +1.2500 | 3e-06 |"


# Hoffmann et al. (2022), equation 10: L(N, D) = E + A / N^alpha + B / D^beta. The best size for a
# budget is G (C / 6)^(beta / (alpha + beta)), equation 4.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
G = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))


def hoffmann_loss(n: float, budget: float) -> float:
    """The loss of a model with n weights, trained with this budget, by that law."""
    return E + A / n**ALPHA + B / (budget / (6 * n)) ** BETA


def test_a_known_law_is_recovered_from_its_profiles():
    budgets = [1e19, 2e19, 4e19, 8e19]
    best = {c: G * (c / 6) ** (BETA / (ALPHA + BETA)) for c in (*budgets, 1.6e20)}
    shifts = (0.45, 0.6, 1.1, 1.5, 2.2)  # sizes around the best one, which is not among them
    losses = {
        c: {round(x * best[c]): [hoffmann_loss(x * best[c], c)] for x in shifts} for c in budgets
    }
    found = scaling.best_sizes(losses, comparison.mean)
    for budget in budgets:
        assert found[budget].weights == pytest.approx(best[budget], rel=0.05)
        assert found[budget].loss == pytest.approx(hoffmann_loss(best[budget], budget), abs=2e-3)
        assert found[budget].minimum == "within the sizes"
    laws = scaling.fit_laws(found)
    assert laws["weights"][1] == pytest.approx(BETA / (ALPHA + BETA), abs=0.005)  # 0.452
    assert laws["tokens"][1] == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.005)  # 0.548
    error = hoffmann_loss(best[1.6e20], 1.6e20) - scaling.evaluate_law(laws["loss"], 1.6e20)
    assert 0 < error < 0.02  # the prediction is too low: the power law of the best losses has no E


def test_parabola_minimum():
    def losses(weights: list[int], curvature: float) -> list[float]:
        return [3 + curvature * math.log(n / 50_000) ** 2 for n in weights]

    for weights in ([10_000, 40_000, 90_000], [20_000, 30_000, 100_000, 400_000]):
        n, loss, found = scaling.parabola_minimum(weights, losses(weights, 0.2))
        assert (n, loss) == pytest.approx((50_000, 3.0)) and found == "within the sizes"
    small = [5_000, 10_000, 20_000]
    n, loss, found = scaling.parabola_minimum(small, losses(small, 0.2))
    assert (n, loss) == pytest.approx((20_000, losses(small, 0.2)[-1])) and "beyond" in found
    n, loss, found = scaling.parabola_minimum(small, losses(small, -0.2))
    assert (n, loss) == (5_000, losses(small, -0.2)[0]) and "no minimum" in found


@pytest.mark.parametrize("tie_weights", [False, True])
def test_matrix_weights_of_gpt2(workplace: Path, monkeypatch: Any, tie_weights: bool):
    """12 L C^2 in the blocks and V C in the output layer, without tables and gains."""
    flags = {"n_layer": 3, "n_head": 2, "mlp": "gelu", "pos": "learned", "tie_weights": tie_weights}
    some = parse_tiny_study()
    monkeypatch.setattr(scaling, "SHARED", flags)
    n = scaling.weights_of_width(some, 32)
    assert n == 12 * 3 * 32**2 + some.corpus({})[0].vocab_size * 32


def test_scaling(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    flags = {key: value for key, value in TINY.items() if key not in ("max_steps", "eval_every")}
    constants = {"WIDTHS": {4e6: (8, 12, 16), 8e6: (8, 12, 16)}, "SHARED": flags | {"lr_max": 1e-2}}
    run_twice(scaling, monkeypatch, "--data=data/input.txt", **constants)
    runs = results("scaling")
    *rows, check_run = table("scaling_runs")
    assert len(runs) == 2 * (len(rows) + 1) == 14
    for row in (*rows, check_run):
        budget = 1e12 * float(row["TFLOP"])
        pair = [runs[f"{budget:.1e}-{row['channels']}-{seed}"] for seed in (1, 2)]
        losses = [one["val"] for one in pair]
        assert float(row["validation loss"]) == pytest.approx(sum(losses) / 2)
        assert float(row["95% margin"]) == pytest.approx(CAUCHY * (max(losses) - min(losses)) / 2)
        flops_per_step = 6 * int(row["weights"]) * 4 * 16  # batch_size x block_size tokens
        assert abs(int(row["steps"]) * flops_per_step - budget) <= flops_per_step / 2
        assert {one["flags"]["max_steps"] for one in pair} == {int(row["steps"])}
    (check,) = table("scaling_check")
    assert float(check["measured loss"]) == float(check_run["validation loss"])
    assert check["trained size"] == check_run["weights"]
    best = [float(row["validation loss"]) for row in table("scaling")]
    # the line through log a and log b, extrapolated by one more step: b (b / a)
    assert float(check["predicted loss"]) == pytest.approx(best[1] ** 2 / best[0])


def test_tokenization(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    times = iter((0.1, 0.2, 0.25))  # per step; a second measurement would fail
    constants = {
        "BPE_VOCAB_SIZES": (260, 300),
        "SECONDS": 1.0,
        "seconds_per_step": lambda trainer: next(times),
        "from_tiktoken": Mock(side_effect=UserError("no network")),
    }
    rows = run_twice(tokenization, monkeypatch, "--data=data/input.txt", **constants)
    assert "without GPT-2's tokenizer: no network" in capsys.readouterr().out
    assert [row["steps"] for row in rows] == ["10", "5", "4"]
    runs = results("tokenization")
    names = ("char-1s", "bpe-260-1s", "bpe-300-1s")
    for row, name in zip(rows, names, strict=True):
        pair = [runs[f"{name}-{seed}"] for seed in (1, 2)]
        assert [one["flags"]["max_steps"] for one in pair] == [int(row["steps"])] * 2
        assert float(row["loss per token"]) == pytest.approx((pair[0]["val"] + pair[1]["val"]) / 2)
        bits = float(row["loss per token"]) / math.log(2) / float(row["bytes per token"])
        assert float(row["bits per byte"]) == pytest.approx(bits, rel=0.01)
        half = CAUCHY * abs(pair[0]["bpb"] - pair[1]["bpb"]) / 2
        assert float(row["95% margin"]) == pytest.approx(half)
    assert float(rows[0]["bytes per token"]) == 1  # the text is ASCII
    assert [row["vocabulary"] for row in rows[1:]] == ["260", "300"]


def test_tokenization_refuses_a_prepared_data_set(workplace: Path):
    Path("data/manifest.json").touch()
    with pytest.raises(UserError, match="already has a tokenizer"):
        tokenization.main(["--device=cpu", "--data=data"])


def test_the_tokenizer_benchmark_prints_a_row_for_each(workplace, capsys):
    words = ["tokenizers", "--data=data/input.txt", "--vocab_size=300", "--repeats=1"]
    assert bench.main(words) == 0
    names = ("data/input.txt", "ours, train", "ours, encode", "tiktoken, encode")
    lines = [line for line in capsys.readouterr().out.splitlines() if "MB" in line]
    assert all(f"| {name} |" in line for line, name in zip(lines, names, strict=False))


def time_script(script: str, folder: Path) -> list[speedrun.Timed]:
    return speedrun.time_losses([sys.executable, "-c", script], str(folder), {})


def test_losses_are_timed_when_they_are_printed(tmp_path: Path):
    lines = ["step 1: val loss 3.5", "step 2 | val 2.5 | interval 9", "validation loss 1.25"]
    script = f"import time\nfor line in {lines}:\n    print(line)\n    time.sleep(0.3)"
    losses = time_script(script, tmp_path)
    assert [loss for _, loss in losses] == [3.5, 2.5, 1.25]
    assert losses[2].seconds > losses[0].seconds + 0.4
    with pytest.raises(UserError, match="ZeroDivisionError"):
        time_script("print('val 2.5')\n1 / 0", tmp_path)


def test_functions_are_timed_in_turns():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.median_seconds(functions, repeats=3)
    assert "".join(calls) == "ababab"
    assert set(times) == {"a", "b"} and min(times.values()) >= 0


def test_the_speedrun_trains_every_recipe_with_every_seed_in_turns(monkeypatch, tmp_path, capsys):
    commands: list[str] = []

    def time_losses(command: list[str], *args: Any) -> list[speedrun.Timed]:
        commands.append(" ".join(command[1:]))
        return [speedrun.Timed(0.5, 2.5), speedrun.Timed(len(commands), 1.5)]

    monkeypatch.setattr(speedrun, "time_losses", time_losses)
    monkeypatch.setattr(speedrun, "half_losses", lambda folder, record: {"first_half": 1.25})
    text, folder = tmp_path / "text.txt", tmp_path / "logs"
    text.write_text("some text")
    flags = ["--recipes=quick,fast", "--seeds=1,2", f"--data={text}", f"--results={folder}"]
    assert speedrun.main(flags) == 0
    runs = [(recipe, seed) for seed in ("1", "2") for recipe in ("quick", "fast")]
    for command, (recipe, seed) in zip(commands, runs, strict=True):
        assert command.startswith(f"train.py --preset {recipe} --data {text} ")
        assert command.endswith(f"--seed {seed}")
    assert "| fast | 2.0, 4.0 | 4.0 | 1.33 | 1.2500, 1.2500 | 1.2500 |" in capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "speedrun.jsonl").read_text().splitlines()]
    assert [(record["recipe"], record["seed"]) for record in records] == runs
    assert (records[1]["seconds"], records[1]["first_half"]) == (2, 1.25)
    assert "losses" not in records[1]  # over the whole validation split
    assert records[1]["corpus"]["sha256"] == hashlib.sha256(b"some text").hexdigest()


def test_a_recipe_is_scored_on_the_first_half_and_a_record_once_on_the_second(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny = "--n_layer 1 --n_embd 16 --n_head 2 --block_size 64 --max_steps 2 --sample_tokens 0"
    monkeypatch.setitem(speedrun.RECIPES, "quick", f"{tiny} --no-compile --precision float32")
    text = "some text" * 100 + "met" * 17 + "too" * 16 + "s"  # 900, and halves of 50 and 50
    Path("text.txt").write_text(text)
    expected = []

    def time_losses(command: list[str], *_: Any) -> list[speedrun.Timed]:
        assert train.main(command[2:]) == 0
        run_dir = command[command.index("--out_dir") + 1]
        model, tokenizer, _ = load_checkpoint(Path(run_dir, "latest.pt"))
        for half in (text[900:950], text[950:]):
            ids = torch.from_numpy(tokenizer.encode(half)).long()[None]
            expected.append(model(ids[:, :-1], ids[:, 1:])[1].item())
        return [speedrun.Timed(1.0, 9.0)]

    monkeypatch.setattr(speedrun, "time_losses", time_losses)
    flags = ["--recipes=quick", "--seeds=1", "--results=logs", "--data=text.txt"]
    assert speedrun.main(flags) == 0 and speedrun.main([*flags, "--record"]) == 0
    with pytest.raises(UserError, match="second half was evaluated for quick before"):
        speedrun.main([*flags, "--record"])
    runs = [json.loads(line) for line in Path("logs/speedrun.jsonl").read_text().splitlines()]
    names = (("first_half",), ("first_half", "second_half"))
    for run, found, losses in zip(runs, names, (expected[:1], expected[2:]), strict=True):
        assert [run[name] for name in found] == pytest.approx(losses, rel=1e-5)
    assert "second_half" not in runs[0]


def test_a_study_sees_the_first_half_of_the_validation_split_only(workplace: Path):
    text = Path("data/input.txt").read_text()
    task = parse_tiny_study("--data=data/input.txt").make_trainer(TINY).task
    val = text[len(text) * 9 // 10 :]
    assert task.tokenizer.decode(task.corpus.val_ids.tolist()) == val[: len(val) // 2]
    assert task.corpus.bytes_per_token == 1


@pytest.mark.parametrize(
    ("main", "flag", "problem"),
    [
        (speedrun.main, "--recipes=quick,slow", "no recipe 'slow': choose from quick"),
        (speedrun.main, "--seeds=1,x", "seeds must be numbers"),
        (speedrun.main, "--nanogpt=missing", "missing is not a checkout of nanoGPT"),
        (bench.main, "gpu --nanogpt=missing", "missing is not a checkout of nanoGPT"),
        (compare.main, "", "give --change, --revision, or both"),
        (compare.main, "--revision=no-such-revision", "git cannot check out 'no-such-revision'"),
    ],
)
def test_benchmarks_name_what_is_wrong(main: Any, flag: str, problem: str):
    with pytest.raises(UserError, match=problem):
        main(flag.split())


def test_the_answer_about_a_change_follows_from_the_paired_t_test():
    # differences -0.1, -0.1, -0.09: mean -0.0967, deviation 0.00577, t quantile 4.303, t -29
    found = compare.answer([(2.0, 1.9), (2.1, 2.0), (2.2, 2.11)])
    expected = "real: the change lowers the loss from 2.1000 to 2.0033, by -0.0967 with a margin "
    assert found == expected + "of 0.0143 (95%), p = 0.0012; 3 pairs"
    assert compare.answer([(2.0, 2.1), (2.0, 1.95)]).startswith("not clear whether")
    assert "goes from 2.0000 to 2.0000, by +0.0000; 2" in compare.answer([(2.0, 2.0)] * 2)
    assert "0 without and 1 with the change" in compare.answer([(2.0, 2.0), (2.0, math.inf)])


def test_a_change_is_trained_in_pairs_until_the_time_is_over(workplace, monkeypatch, capsys):
    losses: dict[tuple, float] = {}
    real, now = compare.train_loss, itertools.count(step=20.0)

    def train_loss(code: Path, flags: list[str], seed: int) -> float:
        if not losses:  # one real run
            assert real(code, [*TINY_RUN, "--data=data/input.txt"], seed) < math.log(28)
        losses[tuple(flags), seed] = 3.0 - len(flags) - 0.1 * seed
        return losses[tuple(flags), seed]

    monkeypatch.setattr(compare, "train_loss", train_loss)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(now))
    words = ["--flags=--preset quick", "--change=--lr_max 1", "--minutes=1", "--seeds=9"]
    assert compare.main(words) == 0
    flags = [("--preset", "quick"), ("--preset", "quick", "--lr_max", "1")]
    assert list(losses) == [(words, seed) for seed in (1, 2) for words in flags]
    out = capsys.readouterr().out
    assert "2 of 9 pairs fit in 1 minutes" in out and "real: the change lowers" in out


@pytest.mark.parametrize("name", speedrun.RECIPES)
def test_the_recipes_of_the_speedrun_are_valid(name: str):
    classes, words = (GPTConfig, TrainConfig), speedrun.RECIPES[name].split()
    _, config = parse_args(classes, words, "", lambda flags: train_settings(flags, "cpu"))
    assert config.preset in (name, "fast")
