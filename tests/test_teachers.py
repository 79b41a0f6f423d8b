"""Learning from teachers: the loss against its formula, and runs of train.py --teacher."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_model, make_text, stop_after
from test_train import assert_same_run

import train
import utils
from config import TrainConfig
from corpus.corpus import Corpus
from system.files import save_checkpoint
from system.settings import UserError
from tokenizer import QA_SPECIALS, CharTokenizer
from training.task import Pretraining
from training.teachers import Teachers, distillation_loss

CPU = torch.device("cpu")
WORDS = [*TINY_RUN, "--max_steps=12", "--tag=student", "--dropout=0.1"]


def read(name: str) -> dict:
    return utils.read_checkpoint(Path("checkpoints", name))


@pytest.mark.parametrize("n_teachers", [1, 3])
def test_the_loss_equals_hintons_formula_with_the_mean_of_the_teachers(n_teachers):
    rng = np.random.default_rng(0)
    student, *teachers = rng.normal(size=(1 + n_teachers, 2, 3, 5))  # (B, T, V) each
    T, share, soft = 3.0, 0.25, []
    for at in np.ndindex(2, 3):
        ps = [np.exp(t[at] / T) / np.exp(t[at] / T).sum() for t in teachers]
        p, q = np.mean(ps, axis=0), np.exp(student[at] / T) / np.exp(student[at] / T).sum()
        soft.append((p * np.log(p / q)).sum())
    y = torch.zeros(2, 3, dtype=torch.long)
    for n_past_end in (0, 2):  # targets of -100, past the end of the text, do not count
        y[1, 3 - n_past_end :] = -100
        logits = [torch.tensor(t) for t in (student, *teachers)]
        found = distillation_loss(logits[0], logits[1:], y, torch.tensor(2.0), T, share)
        mean = np.mean(soft[: 6 - n_past_end])
        assert found.item() == pytest.approx(share * T**2 * mean + (1 - share) * 2.0, rel=1e-6)


def test_teachers_are_not_trained_have_no_dropout_and_may_have_unused_rows():
    text = make_text()
    tokenizer = CharTokenizer.train([text])
    ids, size = tokenizer.encode(text), tokenizer.vocab_size
    corpus = Corpus(ids, ids, {"name": "a", "bytes": len(text)}, len(text), len(text))
    config = TrainConfig(teacher_temperature=2.0, teacher_share=0.25)
    sizes = [{"vocab_size": size}, {"vocab_size": size + 3}]
    models = [make_model(i, dropout=0.5, **own) for i, own in enumerate(sizes)]
    before = [{n: p.clone() for n, p in model.state_dict().items()} for model in models]
    pretraining = Pretraining(corpus, tokenizer, 12, config, CPU)
    task = Teachers(models, tokenizer, ["0", "1"]).task(pretraining)
    student = make_model(5, vocab_size=size).train()
    (x, y), _ = task.get_batch(0, 0)
    loss = task.loss(student, x, y)["loss"]
    loss.backward()
    logits, hard = student(x, y)
    p = torch.stack([(model(x)[0][..., :size] / 2).softmax(-1) for model in models]).mean(0)
    q = (logits / 2).softmax(-1)
    soft = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss, 0.25 * 4 * soft + 0.75 * hard, rtol=1e-5, atol=0)
    assert student.tok.weight.grad is not None
    for model, weights in zip(models, before, strict=True):
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def test_a_student_that_was_stopped_equals_one_that_was_not(trained: Path, monkeypatch):
    shutil.copy("checkpoints/best.pt", "a.pt")
    shutil.copy("checkpoints/latest.pt", "b.pt")
    assert train.main([*WORDS, "--teacher=a.pt,b.pt"]) == 0
    whole = read("student/latest.pt")
    assert len(whole["teachers"]) == 2 and whole["gpt_config"]["dropout"] == 0.1
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", stop_after(7))
        assert train.main([*WORDS, "--teacher=a.pt,b.pt", "--overwrite"]) == 143
    Path("a.pt").rename("moved.pt")
    resume = ["--resume", "--tag=student", "--device=cpu"]
    assert train.main([*resume, "--teacher=moved.pt,b.pt"]) == 0
    resumed = read("student/latest.pt")
    resumed["train_config"]["teacher"] = "a.pt,b.pt"
    assert_same_run(resumed, whole)
    assert train.main([*WORDS, "--tag=alone"]) == 0
    assert any(
        not torch.equal(weight, whole["model"][name])
        for name, weight in read("alone/latest.pt")["model"].items()
    )
    for teacher, message in (("", "teacher is 'moved"), ("b.pt", "has changed since")):
        with pytest.raises(UserError, match=message):
            train.main([*resume, f"--teacher={teacher}", "--max_steps=20"])
    with pytest.raises(UserError, match="teacher is '' in the run"):
        train.main(["--resume", "--tag=alone", "--device=cpu", "--teacher=b.pt", "--max_steps=20"])


def test_a_student_has_the_text_and_the_tokenizer_of_its_teacher(workplace: Path):
    Path("stories.txt").write_text("|".join(make_text(20 + i) for i in range(12)))
    words = [*TINY_RUN, "--data=stories.txt", "--separator=|", "--tokenizer=bpe"]
    assert train.main([*words, "--vocab_size=260", "--tag=a,b"]) == 0
    assert train.main([*WORDS, "--teacher=checkpoints/a,b"]) == 0
    old, new = read("a,b/best.pt"), read("student/best.pt")
    assert new["corpus"] == old["corpus"] and new["tokenizer"] == old["tokenizer"]
    assert new["train_config"]["tokenizer"] == "bpe"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher=none.pt"], "no checkpoint none.pt"),
        (["--teacher=checkpoints/best.pt,other.pt"], "other.pt and .*best.pt have different tok"),
        (["--teacher=checkpoints/best.pt", "--block_size=17"], "16 tokens, is shorter"),
        (["--teacher=checkpoints/best.pt", "--tag=", "--overwrite"], "contains .*best.pt"),
        (["--teacher=checkpoints/best.pt", "--overfit_batch"], "leave out --teacher"),
        (["--teacher_share=0.9"], "--teacher_temperature need --teacher"),
        (["--teacher=checkpoints/best.pt", "--tokenizer=bpe"], "already has a tokenizer"),
        (["--teacher=checkpoints/best.pt", "--data=new.txt"], "not among .* 28 characters: 'é'"),
        (["--teacher=asked.pt", "--data=new.txt"], "asked.pt answers questions, and new.txt is a"),
        (["--teacher=imported.pt"], "give --data: .* imported teacher .* is unknown"),
        (["--teacher=checkpoints/best.pt", "--teacher_share=1.5"], "teacher_share must be at most"),
    ],
)
def test_teachers_that_do_not_fit_are_an_error(trained: Path, words, message):
    Path("new.txt").write_text(make_text() + "é")
    state = read("best.pt")
    chars = {"chars": ["\x00", *state["tokenizer"]["chars"][1:]]}
    save_checkpoint(Path("other.pt"), state | {"tokenizer": state["tokenizer"] | chars})
    asked = {"chars": state["tokenizer"]["chars"][4:], "specials": list(QA_SPECIALS)}
    save_checkpoint(Path("asked.pt"), state | {"tokenizer": state["tokenizer"] | asked})
    save_checkpoint(Path("imported.pt"), state | {"corpus": state["corpus"] | {"sha256": ""}})
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=message):
        train.main([*WORDS, *words])
    assert sorted(Path().rglob("*")) == before
