"""Statistics and records of the studies; the studies of mistakes and of optimizers."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experiments import TINY, parse_tiny_study, results, run_twice, table
from torch import nn

import train
from config import GPTConfig
from experiments import comparison, mistakes, optimizers, study, timing
from model import GPT
from viz.curve import BLUE, ORANGE, new_figure

MODEL = {"n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 8}
X = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5]])
Y = torch.tensor([[1, 4, 1, 5, 2, 6, 5, 3]])


def tiny_trainer(mistake: str = mistakes.BASE, **flags: Any) -> train.Trainer:
    with mistakes.MISTAKES[mistake].context():
        return parse_tiny_study().make_trainer(TINY | MODEL | {"warmup_steps": 0} | flags)


def test_differences_without_variance_of_one_seed_and_of_diverged_runs():
    assert comparison.p_value([0.0, 0.0, 0.0]) == 1 and comparison.p_value([0.5, 0.5, 0.5]) == 0
    assert math.isnan(comparison.margin([1.0]))
    assert math.isnan(comparison.margin([1.0, math.inf]))
    rows = comparison.add_differences([{}, {}], [[1.0], [1.5]])
    assert rows[1]["difference"] == 0.5 and rows[1]["p"] == "" and math.isnan(rows[1]["to"])


def test_p_values_are_corrected_by_holm():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 is raised to the one before
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.6, 0.7]) == [1.0, 1.0]
    assert comparison.holm([]) == []


def test_differences_are_paired_by_seed():
    base = [1.0, 2.0, 3.0]  # chance is large, and common to both
    named = [{"name": name} for name in "abc"]
    rows = comparison.add_differences(named, [base, [1.1, 2.1, 3.11], [3.0, 1.0, 2.0]])
    assert list(rows[0].values()) == ["a", "", "", "", ""]
    # differences 0.1, 0.1, 0.11: standard error 0.01 / 3; t = 31, 2 degrees of freedom
    half = 4.30265 * 0.01 / 3
    assert rows[1]["difference"] == pytest.approx(0.31 / 3)
    assert rows[1]["95% from"] == pytest.approx(0.31 / 3 - half, abs=1e-6)
    assert rows[1]["to"] == pytest.approx(0.31 / 3 + half, abs=1e-6)
    assert rows[1]["p"] == pytest.approx(2 * (1 - 31 / math.sqrt(2 + 31**2)))  # two comparisons
    assert rows[2]["p"] == 1  # the mean difference is 0
    values = [[1.0, 1.0], [2.0, 2.5], [5.0, 5.0], [4.0, 4.5]]
    rows = comparison.add_differences([{}, {}, {}, {}], values, bases=[0, 0, 2, 2])
    assert [row["difference"] for row in rows] == ["", 1.25, "", -0.75]


def test_differences_are_plotted_with_their_significance():
    losses = {"base": [1.0, 2.0, 3.0], "worse": [1.1, 2.1, 3.11], "other": [3.0, 1.0, 2.0]}
    losses["lost"] = [1.0, 2.0, math.inf]
    rows = comparison.add_differences([{}, {}, {}, {}], losses.values())
    axes = new_figure(4, 4).subplots()
    comparison.plot_differences(axes, rows, losses, "Title")
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_color() for line in dots] == [ORANGE, BLUE]
    assert dots[1].get_xdata() == pytest.approx([2.0, -1.0, -1.0])
    assert [line.get_ydata()[0] for line in dots] == [1, 2]  # the base, 0, is not drawn
    assert [text.get_text() for text in axes.texts] == [" diverged"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(losses)


def test_results_are_accompanied_by_a_record(workplace: Path):
    some = parse_tiny_study("--data=data/input.txt", "--out_dir=somewhere")
    some.with_seeds("a", TINY)
    some.write_results({"Numbers": [{"n": 1}]}, new_figure(2, 2))
    record = json.loads(Path("checkpoints/studies/results/some.json").read_text())
    assert record["command"] == "python -m experiments.some --seeds 3 --data input.txt"
    (made,) = record["made by"]
    text = Path("data/input.txt").read_bytes()
    sha256 = hashlib.sha256(text).hexdigest()
    assert made["corpus"] == {"name": "input.txt", "bytes": len(text), "sha256": sha256}
    assert made["runs"] == 3 and made["precision"] == "float32"
    assert re.match(rf"cpu, {torch.get_num_threads()} threads?, ", made["machine"])
    assert torch.__version__ in made["versions"]
    summary = Path("checkpoints/studies/results/some.md").read_text()
    assert made["commit"] in summary and made["corpus"]["sha256"][:12] in summary


def test_the_record_of_a_run_is_kept_with_it(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    some = parse_tiny_study()
    monkeypatch.setattr(timing, "git_commit", lambda: "old")
    some.make_run("a", TINY)
    monkeypatch.setattr(timing, "git_commit", lambda: "new")
    for name in "ab":
        some.make_run(name, TINY)
    assert [record["commit"] for record in some.records] == ["old", "old", "new"]
    some.write_results({"Numbers": [{"n": 1}]}, new_figure(2, 2))
    summary = Path("checkpoints/studies/results/some.md").read_text()
    assert "* runs: 2; commit old; " in summary and "* runs: 1; commit new; " in summary


def test_the_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    commit = timing.git_commit.__wrapped__  # without its cache
    assert commit() == "unknown"  # no repository
    for name in ("code.py", "notes.md"):
        (tmp_path / name).write_text("1")
    timing.git("init", "-q")
    timing.git("add", ".")
    timing.git("-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "first")
    head = timing.git("log", "--format=%H")
    (tmp_path / "notes.md").write_text("2")  # such as results
    assert commit() == head and len(head) == 40
    (tmp_path / "code.py").write_text("2")
    assert commit() == f"{head} with changes"


def tiny_gpt(cls: type[GPT] = GPT) -> GPT:
    torch.manual_seed(0)
    model = cls(GPTConfig(vocab_size=7, qk_norm=False, **MODEL)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)  # large, so that attention is not uniform
    return model


def test_without_a_causal_mask_later_tokens_change_earlier_logits():
    model, other = tiny_gpt(), X.clone()
    other[0, -1] = 0
    assert torch.equal(model(X)[0][:, :-1], model(other)[0][:, :-1])
    with mistakes.MISTAKES["no causal mask"].context():
        assert not torch.allclose(model(X)[0][:, :-1], model(other)[0][:, :-1], atol=1e-3)
    assert torch.equal(model(X)[0][:, :-1], model(other)[0][:, :-1])  # it is over


def test_targets_that_are_not_shifted_are_the_inputs():
    with mistakes.MISTAKES["targets not shifted"].context():
        model = tiny_gpt(study.GPT)
    logits, loss = model(X, Y)
    expected = -logits.log_softmax(-1)[0, torch.arange(8), X[0]].mean()
    assert loss is not None and torch.allclose(loss, expected)
    assert study.GPT is GPT


def test_without_zero_grad_gradients_add_up(workplace: Path):
    trainer = tiny_trainer("no zero_grad", overfit_batch=True, lr_max=1e-9, grad_clip=0.0)
    norms = [trainer.train_step()["grad_norm"].item() for _ in range(3)]  # of the same gradient
    assert norms == pytest.approx([norms[0], 2 * norms[0], 3 * norms[0]], rel=1e-4)


@pytest.mark.parametrize("name", [mistakes.BASE, "clipping after the step"])
def test_clipping_after_the_step_does_not_limit_it(name: str, workplace: Path):
    trainer = tiny_trainer(name, optimizer="sgd", lr_max=1.0, grad_clip=1e-3, weight_decay=0.0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    norm = trainer.train_step()["grad_norm"].item()
    pairs = list(zip(trainer.model.parameters(), before, strict=True))
    moved = math.sqrt(sum((p - old).square().sum().item() for p, old in pairs))
    assert norm > 0.01
    assert moved == pytest.approx(1e-3 if name == mistakes.BASE else norm, rel=1e-3)
    clipped = math.sqrt(sum(p.grad.square().sum().item() for p, _ in pairs if p.grad is not None))
    assert clipped == pytest.approx(1e-3, rel=1e-3)  # in both cases: it is only too late
    assert trainer.config.grad_clip == 1e-3


def test_without_residual_connections_the_input_of_a_block_is_lost():
    with mistakes.MISTAKES["no residual connections"].context():
        block = tiny_gpt().blocks[0]
    x = torch.randn(1, 8, 16)
    context = mistakes.AttentionContext()
    for kind, expected in ((block, torch.zeros_like(x)), (tiny_gpt().blocks[0], x)):
        nn.init.zeros_(kind.attn.proj.weight)
        nn.init.zeros_(kind.mlp.proj.weight)
        assert torch.equal(kind(x, context), expected)


def test_unscaled_scores_are_plain_products():
    q, k, v = torch.randn(3, 1, 2, 4, 16).unbind()
    mask = torch.ones(4, 4).tril() == 0
    expected = (q @ k.mT).masked_fill(mask, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(mistakes.attend_unscaled(q, k, v), expected)
    model, correct = tiny_gpt(), tiny_gpt()(X)[0]
    with mistakes.MISTAKES["scores not scaled"].context():
        assert not torch.allclose(model(X)[0], correct, atol=1e-3)


@pytest.mark.parametrize("name", [mistakes.BASE, "dropout in evaluation"])
def test_with_dropout_two_evaluations_differ(name: str, workplace: Path):
    trainer = tiny_trainer(name, dropout=0.5)
    losses = {trainer.evaluate()["val"] for _ in range(2)}
    assert len(losses) == (1 if name == mistakes.BASE else 2)
    assert trainer.model.training


def test_training_on_validation_data_and_on_shuffled_tokens(workplace: Path):
    names = (mistakes.BASE, "training on validation data", "shuffled tokens")
    correct, both, shuffled = (tiny_trainer(name).task for name in names)
    train_ids, val_ids = correct.train_ids.tolist(), correct.corpus.val_ids.tolist()
    assert both.train_ids.tolist() == [*train_ids, *val_ids]
    assert both.corpus.val_ids.tolist() == val_ids
    for before, after in ((train_ids, shuffled.train_ids), (val_ids, shuffled.corpus.val_ids)):
        assert before != after.tolist() and sorted(before) == sorted(after)


def test_the_honest_loss_is_that_of_the_last_token():
    model, text = tiny_gpt(), torch.arange(60).remainder(7).numpy()
    loss = mistakes.last_token_loss(model, text, torch.device("cpu"))
    losses = []
    for start in range(0, 60 - 8, 8):  # seven windows, each with its next token
        ids = torch.tensor(text[start : start + 9])
        losses.append(-model(ids[None, :-1])[0][0, -1].log_softmax(-1)[ids[-1]].item())
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_mistakes(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    some = (mistakes.BASE, "no causal mask", "targets not shifted", "high learning rate")
    chosen = {name: mistakes.MISTAKES[name] for name in some}
    chosen["high learning rate"] = mistakes.Mistake("", {"lr_max": 1e9, "arch": "gpt2"})
    rows = run_twice(mistakes, monkeypatch, MISTAKES=chosen)
    runs = results("mistakes")
    assert [row["mistake"] for row in rows] == list(some)
    finals = [runs[f"no-causal-mask-{seed}"]["log"][-1] for seed in (1, 2)]
    for column, split in (("training loss", "train"), ("validation loss", "val")):
        mean = (finals[0][split] + finals[1][split]) / 2
        assert float(rows[1][column]) == pytest.approx(mean)
    assert rows[3]["difference"] == "diverged"
    honest = table("mistakes_honest")
    assert float(honest[0]["honest loss"]) > 1 and honest[3]["honest loss"] == "inf"
    signs = table("mistakes_signs")
    assert signs[0]["verdict"].startswith("too short to judge")  # of 6 steps
    assert signs[3]["verdict"].startswith("stopped")
    folder = Path("checkpoints/studies/mistakes/correct-1/samples.txt")
    assert folder.read_text().rsplit("---", 1)[1].split("\n")[1][:5] in signs[0]["sample"]


def test_optimizers(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    some = (optimizers.BASE, "SGD")
    constants = {"GRID": 1, "EXTENSIONS": 0, "THRESHOLDS": (0.0, 1.0), "CLIPPED": some}
    constants["FLAGS"] = {name: optimizers.FLAGS[name] for name in some}
    rows = run_twice(optimizers, monkeypatch, **constants)
    tuning = table("optimizers_tuning")
    assert len(tuning) == 2 * 3
    for row, name in zip(rows, some, strict=True):
        losses = {r["learning rate"]: float(r["validation loss"]) for r in tuning
                  if r["optimizer"] == name}  # fmt: skip
        assert row["learning rate"] == min(losses, key=losses.__getitem__)
    runs = results("optimizers")
    assert len(runs) == 6 + 2 * 2 + 2 * 2  # tuning, with each seed, without clipping
    clipping = table("optimizers_clipping")
    assert [row["threshold"] for row in clipping] == ["none", "1", "none", "1"]
    assert clipping[0]["clipped steps"] == "0%"
    assert clipping[1]["validation loss"] == rows[0]["validation loss"]


def test_the_grid_is_extended_until_the_best_rate_is_inside(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def parabola(study: Any, name: str, flags: Any) -> dict[str, float]:
        tried.append(flags["lr_max"])
        assert flags["seed"] == 0
        return {"val": (math.log10(flags["lr_max"]) + 0.5) ** 2}  # the best rate is 0.32

    monkeypatch.setattr(study.Study, "make_run", parabola)
    some = parse_tiny_study()
    losses = optimizers.tune(some, "AdamW")
    assert tried == [0.00032, 0.001, 0.0032, 0.01, 0.032, 0.1, 0.32, 1.0]
    assert optimizers.best_rate(losses) == 0.32 and some.n_runs == 3


def test_plain_sgd_has_no_momentum(workplace: Path):
    for name, momentum in (("SGD", 0.0), ("SGD with momentum", 0.9)):
        with optimizers.options_of(name):
            trainer = parse_tiny_study().make_trainer(TINY | {"optimizer": "sgd"})
        assert {g["momentum"] for g in trainer.optimizers["sgd"].param_groups} == {momentum}
