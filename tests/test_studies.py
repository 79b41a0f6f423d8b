"""The studies at a tiny size: their tables are their runs', and what is done is not done again."""

import csv
import doctest
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import lr_context
import sampling
import scaling
import sizes
import study
import swaps
import tokenization

from config import GPTConfig, UserError

TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "batch_size": 4, "max_steps": 6}
TINY |= {"eval_every": 3, "eval_windows": 4, "compile": False, "precision": "float32"}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves of the runs, which test_train.py looks at, would take most of the time."""
    monkeypatch.setattr(study.train.Trainer, "draw", lambda trainer: None)


def run_twice(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict[str, str]]:
    """Run a quick study of two seeds, and again with training forbidden. The rows of its table."""
    words = ("--quick", "--seeds=2", "--device=cpu", *words)
    assert module.main(list(words)) == 0
    name = Path("experiments/results", module.__name__ + "_quick")
    table = name.with_suffix(".csv").read_text()
    assert name.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with monkeypatch.context() as patch:
        patch.setattr(study, "train_one", lambda *args: pytest.fail("trained again"))
        assert module.main(list(words)) == 0
    assert name.with_suffix(".csv").read_text().splitlines()[0] == table.splitlines()[0]
    assert (
        f"python experiments/{module.__name__}.py --quick --seeds 2` on cpu"
        in name.with_suffix(".md").read_text()
    )
    return list(csv.DictReader(table.splitlines()))


def results(name: str) -> list[dict[str, Any]]:
    """What the runs of a study wrote, by their folders' names."""
    folder = Path("checkpoints/studies", name)
    return {f.parent.name: json.loads(f.read_text()) for f in folder.glob("*/study.json")}


def table(name: str) -> list[dict[str, str]]:
    """The rows of a table that a study wrote."""
    return list(csv.DictReader(Path(f"experiments/results/{name}.csv").read_text().splitlines()))


def test_swaps(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(swaps, "QUICK", TINY)
    some = ("GPT-2's architecture", "learned positions to RoPE", "norm after the sum")
    monkeypatch.setattr(swaps, "SWAPS", {name: swaps.SWAPS[name] for name in some})
    rows_of_cache = [{"tokens generated": 64, "tokens/s with cache": 9, "tokens/s without": 3}]
    monkeypatch.setattr(swaps, "cache_speed", lambda *args: rows_of_cache)
    rows = run_twice(swaps, monkeypatch)
    runs = results("swaps_quick")
    assert len(runs) == 2 * len(rows) == 2 * len(swaps.SWAPS)
    rope = [runs[f"learned-positions-to-RoPE-{seed}"] for seed in (1, 2)]
    row = next(row for row in rows if "RoPE" in row["swap"])
    assert float(row["validation loss"]) == pytest.approx((rope[0]["val"] + rope[1]["val"]) / 2)
    assert float(row["spread"]) == pytest.approx(abs(rope[0]["val"] - rope[1]["val"]))
    assert int(rows[0]["parameters"]) - int(row["parameters"]) == 16 * 16  # the learned positions
    one, two = (runs[f"GPT-2-s-architecture-{seed}"]["flags"] for seed in (1, 2))
    assert one["arch"] == "gpt2" and (one["seed"], two["seed"]) == (1, 2)


def test_sizes(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sizes, "QUICK", TINY)
    monkeypatch.setattr(sizes, "EVALUATIONS", 2)
    small = {name: {"n_layer": 1, "n_embd": n} for name, n in (("a", 8), ("b", 16), ("c", 24))}
    monkeypatch.setattr(sizes, "SIZES", {True: small})
    rows = run_twice(sizes, monkeypatch)
    assert [row["size"] for row in rows] == [*"abcabc"]
    assert [row["steps"] for row in rows[:3]] == ["6"] * 3
    shares = {run["flags"]["share"] for run in results("sizes_quick").values()}
    assert shares == {0.1, 1 / 3, 1.0}


def test_lr_context(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lr_context, "QUICK", TINY)
    monkeypatch.setattr(lr_context, "WINDOWS", {True: (8, 16)})
    monkeypatch.setattr(lr_context, "RATES", {True: (1e-3, 1e-2)})
    rows = run_twice(lr_context, monkeypatch)
    assert [(row["window"], row["peak rate"]) for row in rows] == [
        ("8", "0.001"),
        ("8", "0.01"),
        ("16", "0.001"),
        ("16", "0.01"),
    ]
    runs = results("lr_context_quick")
    one, four = runs["accumulate1-1"], runs["accumulate4-1"]  # the same step, cut into batches
    assert (one["flags"]["batch_size"], four["flags"]["batch_size"]) == (4, 1)
    assert {run["flags"]["batch_size"] * run["flags"]["block_size"] for run in runs.values()} == {
        64,
        16,
        32,
    }


def test_a_run_of_other_settings_in_the_folder_is_refused(workplace: Path):
    this = study.begin("some", ["--device=cpu"], "")
    study.make_run(this, "a", TINY)
    with pytest.raises(UserError, match="other settings"):
        study.make_run(this, "a", TINY | {"lr_max": 0.5})


def test_a_run_that_was_cut_off_is_taken_up(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    whole, cut = (study.begin("some", ["--device=cpu", f"--out_dir={d}"], "") for d in "ab")
    expected = study.make_run(whole, "a", TINY)["val"]
    with monkeypatch.context() as patch:
        step = study.train.Trainer.train_step

        def die_at_5(trainer: Any) -> Any:
            return step(trainer) if trainer.step < 4 else 1 / 0

        patch.setattr(study.train.Trainer, "train_step", die_at_5)
        with pytest.raises(ZeroDivisionError):
            study.make_run(cut, "a", TINY)
    result = study.make_run(cut, "a", TINY)
    assert result["val"] == expected
    assert [record["step"] for record in result["log"]] == [0, 3, 6]


def test_a_run_that_diverges_is_a_result(workplace: Path):
    this = study.begin("some", ["--device=cpu"], "")
    result = study.make_run(this, "a", TINY | {"lr_max": 1e30, "warmup_steps": 0, "arch": "gpt2"})
    assert math.isinf(result["val"])
    assert study.difference([1.0, 1.1], [result["val"], 1.0]) == "diverged"


def test_a_difference_within_the_spread_is_none():
    base = [1.50, 1.52]  # spread 0.02
    assert study.difference(base, [1.50, 1.49]) == "none"  # 0.015 apart
    assert study.difference(base, [1.53, 1.55]) == "+0.0300"
    assert study.difference(base, [1.40, 1.70]) == "none"  # 0.04 apart, but the other has 0.3
    assert study.difference([1.5], [1.4]) == "-0.1000 (one run)"


def test_tables():
    rows = [{"name": "a", "loss": 1.23456, "n": 1234567}, {"name": "b", "loss": math.nan, "n": 2}]
    assert study.markdown(rows).splitlines() == [
        "| name | loss | n |",
        "| --- | --- | --- |",
        "| a | 1.2346 | 1,234,567 |",
        "| b | - | 2 |",
    ]
    assert study.as_csv(rows).splitlines() == ["name,loss,n", "a,1.23456,1234567", "b,nan,2"]


# --- scaling

# Hoffmann et al. (2022), equation 10: L(N, D) = E + A / N^alpha + B / D^beta, whose best size for a
# budget is G (C / 6)^(beta / (alpha + beta)), equation 4
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
G = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))


def hoffmann_loss(n: float, budget: float) -> float:
    """The loss that their law gives a model of n weights, trained with this budget."""
    return E + A / n**ALPHA + B / (budget / (6 * n)) ** BETA


def test_profiles_of_a_known_law_give_it_back():
    budgets = [1e19, 2e19, 4e19, 8e19]
    best = {c: G * (c / 6) ** (BETA / (ALPHA + BETA)) for c in (*budgets, 1.6e20)}
    shifts = (0.45, 0.6, 1.1, 1.5, 2.2)  # the sizes lie about the best one, which is none of them
    losses = {
        c: {round(x * best[c]): hoffmann_loss(x * best[c], c) for x in shifts} for c in budgets
    }
    found = scaling.best_sizes(losses)
    for budget in budgets:
        assert found[budget].weights == pytest.approx(best[budget], rel=0.05)
        assert found[budget].tokens * found[budget].weights * 6 == pytest.approx(budget)
        assert found[budget].loss == pytest.approx(hoffmann_loss(best[budget], budget), abs=2e-3)
        assert found[budget].where == "among the sizes"
    laws = scaling.power_laws(found)
    assert laws["weights"][1] == pytest.approx(BETA / (ALPHA + BETA), abs=0.005)  # 0.452
    assert laws["tokens"][1] == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.005)  # 0.548
    ahead = hoffmann_loss(best[1.6e20], 1.6e20) - scaling.at(laws["loss"], 1.6e20)
    assert 0 < ahead < 0.02  # too low, for the law of the best losses has no E


def test_parabola_minimum():
    def losses(weights: list[int], bend: float) -> list[float]:
        return [3 + bend * math.log(n / 50_000) ** 2 for n in weights]

    for weights in ([10_000, 40_000, 90_000], [20_000, 30_000, 100_000, 400_000]):
        n, loss, where = scaling.parabola_minimum(weights, losses(weights, 0.2))
        assert (n, loss) == pytest.approx((50_000, 3.0)) and where == "among the sizes"
    small = [5_000, 10_000, 20_000]
    n, loss, where = scaling.parabola_minimum(small, losses(small, 0.2))
    assert (n, loss) == pytest.approx((20_000, losses(small, 0.2)[-1])) and "beyond" in where
    n, loss, where = scaling.parabola_minimum(small, losses(small, -0.2))
    assert (n, loss) == (5_000, losses(small, -0.2)[0]) and "no minimum" in where


def test_a_power_law_is_found():
    x = [1.0, 2.0, 8.0]
    assert scaling.power_law(x, [3 * v**-0.25 for v in x]) == pytest.approx((3, -0.25))


@pytest.mark.parametrize("tie_weights", [False, True])
def test_matrix_weights_of_gpt2(tie_weights: bool):
    """12 L C^2 of the blocks and V C of the output; no tables, biases, gains."""
    sizes = {"vocab_size": 100, "n_layer": 3, "n_embd": 32, "mlp": "gelu", "pos": "learned"}
    config = GPTConfig(**sizes, bias=True, tie_weights=tie_weights)
    assert scaling.matrix_weights(config) == 12 * 3 * 32**2 + 100 * 32


def test_scaling(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    run = {key: value for key, value in TINY.items() if key not in ("max_steps", "eval_every")}
    widths = {4e6: (8, 12, 16), 8e6: (8, 12, 16)}
    size = {"run": run | {"lr_max": 1e-2}, "widths": widths, "check": 1.6e7, "width_step": 4}
    monkeypatch.setattr(scaling, "QUICK", size)
    run_twice(scaling, monkeypatch, "--data=data/input.txt")
    runs = results("scaling_quick")
    *rows, check_run = table("scaling_quick_runs")
    assert len(runs) == 2 * (len(rows) + 1) == 14
    for row in (*rows, check_run):
        budget = 1e12 * float(row["TFLOP"])
        pair = [runs[f"{budget:.1e}-{row['channels']}-{seed}"] for seed in (1, 2)]
        losses = [one["val"] for one in pair]
        assert float(row["validation loss"]) == pytest.approx(sum(losses) / 2)
        assert float(row["spread"]) == pytest.approx(max(losses) - min(losses))
        a_step = 6 * int(row["weights"]) * 4 * 16  # of batch_size x block_size tokens
        assert abs(int(row["steps"]) * a_step - budget) <= a_step / 2
        assert {one["flags"]["max_steps"] for one in pair} == {int(row["steps"])}
    (check,) = table("scaling_quick_check")
    assert float(check["measured loss"]) == float(check_run["validation loss"])
    assert check["trained size"] == check_run["weights"]
    best = [float(row["validation loss"]) for row in table("scaling_quick")]
    # the line through two points in logarithms goes on as far again: b (b / a)
    assert float(check["predicted loss"]) == pytest.approx(best[1] ** 2 / best[0])


# --- tokenization


def test_tokenization(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    size = {"run": TINY, "vocabularies": (260, 300), "seconds": 1.0}
    monkeypatch.setattr(tokenization, "QUICK", size)
    times = iter((0.1, 0.2, 0.25))  # of a step; there is none for a second measurement
    monkeypatch.setattr(tokenization, "step_seconds", lambda *args: next(times))

    def no_network(name: str) -> None:
        raise UserError("no network")

    monkeypatch.setattr(tokenization.tokenizers, "from_tiktoken", no_network)
    rows = run_twice(tokenization, monkeypatch, "--data=data/input.txt")
    assert "without GPT-2's tokenizer: no network" in capsys.readouterr().out
    assert [row["steps"] for row in rows] == ["10", "5", "4"]
    runs = results("tokenization_quick")
    names = ("char-1s", "bpe-260-1s", "bpe-300-1s")
    for row, name in zip(rows, names, strict=True):
        pair = [runs[f"{name}-{seed}"] for seed in (1, 2)]
        assert [one["flags"]["max_steps"] for one in pair] == [int(row["steps"])] * 2
        assert float(row["loss a token"]) == pytest.approx((pair[0]["val"] + pair[1]["val"]) / 2)
        bits = float(row["loss a token"]) / math.log(2) / float(row["bytes a token"])
        assert float(row["bits per byte"]) == pytest.approx(bits, rel=0.01)
        assert float(row["spread"]) == pytest.approx(abs(pair[0]["bpb"] - pair[1]["bpb"]))
    assert float(rows[0]["bytes a token"]) == 1  # the text is ASCII
    assert [row["vocabulary"] for row in rows[1:]] == ["260", "300"]


def test_the_time_of_a_step_is_measured(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    this = study.begin("some", ["--device=cpu", "--data=data/input.txt"], "")
    step = study.train.Trainer.train_step

    def slow_step(trainer: Any) -> Any:
        time.sleep(0.02)
        return step(trainer)

    monkeypatch.setattr(study.train.Trainer, "train_step", slow_step)
    assert 0.02 < tokenization.step_seconds(this, TINY | {"tokenizer": "char"}) < 0.2


def test_a_prepared_data_set_has_its_tokenizer(workplace: Path):
    with pytest.raises(UserError, match="has its tokenizer already"):
        tokenization.main(["--quick", "--device=cpu", "--data=data"])


# --- sampling


def test_sampling(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    size = {"run": TINY | {"save_every": 2}, "samples": {"num_samples": 2, "max_new_tokens": 20}}
    monkeypatch.setattr(sampling, "QUICK", size)
    monkeypatch.setattr(sampling, "KNOBS", {"temperature": (0.5, 1.0), "top_k": (1, 99)})
    rows = run_twice(sampling, monkeypatch)
    assert [(row["knob"], row["value"]) for row in rows] == [
        ("temperature", "0.5"),
        ("temperature", "1"),
        ("top_k", "1"),
        ("top_k", "99"),
    ]
    low, off, first, every = rows
    assert float(low["entropy"]) < float(off["entropy"])
    assert float(first["entropy"]) == float(first["spread of surprise"]) == 0  # always one text
    assert float(off["spread of surprise"]) > 0  # another seed is another text
    assert list(every.values())[2:] == list(off.values())[2:]  # no knob is turned in either
    run = results("sampling_quick")["model"]
    checkpoints = table("sampling_quick_checkpoints")
    assert [row["step"] for row in checkpoints] == ["2", "4", "6"]
    assert float(checkpoints[-1]["validation loss"]) == pytest.approx(run["val"], abs=1e-5)
    (people,) = table("sampling_quick_validation")
    assert float(people["surprise"]) == pytest.approx(run["val"], abs=1e-5)

    shutil.copy("checkpoints/studies/sampling_quick/model/best.pt", "alone.pt")  # one of a user's
    assert sampling.main(["alone.pt", "--quick", "--seeds=2", "--device=cpu"]) == 0
    assert "no ckpt_*.pt beside alone.pt" in capsys.readouterr().out
    assert table("sampling_quick") == rows
    assert table("sampling_quick_checkpoints") == checkpoints[-1:]
    Path("data/input.txt").write_text("something else " * 100, encoding="utf-8")
    with pytest.raises(UserError, match=r"is not what alone\.pt was trained on"):
        sampling.main(["alone.pt", "--quick", "--device=cpu"])


@pytest.mark.parametrize("module", [sampling, study])
def test_docstring_examples(module: Any):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
