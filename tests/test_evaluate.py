"""evaluate.py: models evaluated on full splits, side by side."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_model, make_text

import evaluate
import train
from corpus.corpus import Corpus
from evaluate import EvaluateConfig
from model import GPT
from plots import read_run
from system.settings import UserError


def random_corpus(n_val: int, **settings: object) -> Corpus:
    """A corpus of random tokens, n_val of them for validation."""
    ids = np.random.default_rng(0).integers(11, size=300 + n_val)
    return Corpus(ids[:300], ids[300:], {"name": "random"}, 300, n_val, **settings)


def evaluate_val(model: GPT, corpus: Corpus, batch_size: int = 16, **settings: object) -> dict:
    config = EvaluateConfig(precision="float32", batch_size=batch_size)
    return evaluate.evaluate_split(model, corpus, config, **{"doc_mask": False} | settings)


def check_contexts(model: GPT, corpus: Corpus, first: Callable[[int], int], **settings) -> None:
    """The result is that of each token t but the first, predicted from tokens first(t) to t - 1."""
    ids, losses, right = corpus.val_ids, [], 0
    for t in range(1, len(ids)):
        probs = model(torch.from_numpy(ids[first(t) : t])[None])[0][0, -1].softmax(dim=-1)
        losses.append(-probs[ids[t]].log().item())
        right += int(probs.argmax() == ids[t])
    row = evaluate_val(model, corpus, **settings)
    assert row["tokens"] == len(losses) == len(ids) - 1
    assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert row["top1"] == right / len(losses)


@pytest.mark.parametrize("stride", [None, 12, 5, 1])
@pytest.mark.parametrize("n_ids", [2, 5, 12, 13, 14, 19, 25, 41])
def test_every_token_of_a_split_is_predicted_from_its_window(n_ids: int, stride: int | None):
    """Windows have 12 tokens and a target; with a stride of 5, they begin at 0, 5, 10, ..."""
    first = [0] * 13 + [5] * 5 + [10] * 5 + [15] * 5 + [20] * 5 + [25] * 5 + [30] * 5
    if stride != 5:
        first = [max(0, t - 12) if stride == 1 else (t - 1) // 12 * 12 for t in range(41)]
    model, corpus = make_model(pos="learned"), random_corpus(n_ids)
    check_contexts(model, corpus, first.__getitem__, stride=stride, batch_size=3)


def test_with_a_stride_and_a_document_mask_the_context_begins_at_the_separator():
    # the positions of rope are relative: a shorter context has the logits of a masked one
    model, corpus = make_model(pos="rope"), random_corpus(40, separator=3)

    def first(t: int) -> int:
        separators = [i for i in range(max(0, t - 12), t) if corpus.val_ids[i] == 3]
        return max([max(0, t - 12), *separators])

    assert sum(first(t) > t - 12 for t in range(12, 40)) > 10  # the mask matters
    check_contexts(model, corpus, first, doc_mask=True, stride=1)


def test_the_stride_adds_two_columns_and_must_fit_every_window(workplace, capsys, monkeypatch):
    for tag, size in (("a", 16), ("b", 8)):
        assert train.main([*TINY_RUN, f"--tag={tag}", f"--block_size={size}"]) == 0
    paths = ["checkpoints/a/best.pt", "checkpoints/b/best.pt"]
    capsys.readouterr()
    tables = []
    for flags in ([], ["--stride=8"]):
        assert evaluate.main([*paths, *flags]) == 0
        tables.append(capsys.readouterr().out.splitlines())
    assert tables[1][0].endswith("  loss, stride 8  bpb, stride 8")
    rows = [[line.split() for line in table[1:]] for table in tables]
    for usual, row in zip(*rows, strict=True):
        assert row[:-2] == usual
        # one byte per character
        assert float(row[-1]) == pytest.approx(float(row[-2]) / math.log(2), abs=2e-4)
    assert rows[1][1][-2] == rows[1][1][5]  # the window of b is 8 tokens
    assert rows[1][0][-2] != rows[1][0][5]

    monkeypatch.setattr(evaluate, "load_corpus", lambda *_, **__: pytest.fail("a late error"))
    for order in (paths, paths[::-1]):
        with pytest.raises(UserError, match=r"at most 8, the window of checkpoints.b.best\.pt"):
            evaluate.main([*order, "--stride=9"])


def test_the_table_has_a_row_for_each_checkpoint(workplace, capsys):
    for tag, tokenizer in (("a", "char"), ("b", "bpe")):
        size = ["--vocab_size=300"] * (tokenizer == "bpe")
        assert train.main([*TINY_RUN, f"--tag={tag}", f"--tokenizer={tokenizer}", *size]) == 0
    final = [read_run(Path("checkpoints", t)).final for t in "ab"]
    capsys.readouterr()
    assert evaluate.main(["checkpoints/a/best.pt", "checkpoints/b/best.pt"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    names = "checkpoint parameters split tokens loss ppl bpb top-1"
    assert title.split() == names.split() and len(rows) == 2
    for row, expected in zip(rows, final, strict=True):
        name, _, _, split, tokens, loss, ppl, bpb, _ = row.split()
        assert name.endswith("best.pt") and split == "val"
        assert int(tokens.replace(",", "")) > 200
        assert float(loss) == pytest.approx(expected["val"], abs=2e-3)
        assert float(ppl) == pytest.approx(math.exp(expected["val"]), abs=0.2)
        assert float(bpb) == pytest.approx(expected["bpb"], abs=3e-3)


def test_another_text_is_evaluated_with_the_models_tokenizer(trained, capsys):
    (trained / "other.txt").write_text(make_text(99))
    assert evaluate.main(["--data=other.txt", "--split=train"]) == 0
    assert "train" in capsys.readouterr().out
    (trained / "qa.json").write_text(json.dumps([{"question": "a", "answer": "b"}] * 5))
    with pytest.raises(UserError, match="has no <BOS> token"):
        evaluate.main(["--data=qa.json"])


def test_user_errors_are_reported(workplace):
    with pytest.raises(UserError, match="there is no checkpoint"):
        evaluate.main([])
    with pytest.raises(UserError, match=r"stride must be at least 1.*; batch_size must be"):
        evaluate.main(["--stride=0", "--batch_size=0"])
    assert train.main(TINY_RUN) == 0
    with pytest.raises(UserError, match=r"there is no checkpoint nowhere\.pt"):
        evaluate.main(["checkpoints/best.pt", "nowhere.pt"])
    for flag in ("--separator=fox", "--encoding=cp1252"):  # would read the old text differently
        with pytest.raises(UserError, match="--separator and --encoding are for --data"):
            evaluate.main([flag])
    with open("data/input.txt", "a") as file:
        file.write("more")
    with pytest.raises(UserError, match=r"best\.pt: shakespeare is not what the .* --data"):
        evaluate.main([])


def test_rows_are_printed_before_an_error_and_unknown_characters_have_no_bpb(workplace, capsys):
    (workplace / "qa.json").write_text(json.dumps([{"question": "the", "answer": "fox"}] * 20))
    assert train.main([*TINY_RUN, "--data=qa.json", "--tag=qa"]) == 0
    assert train.main([*TINY_RUN, "--tag=text"]) == 0
    (workplace / "other.txt").write_text("日本語 " * 300, encoding="utf-8")
    capsys.readouterr()
    paths = ["checkpoints/qa/best.pt", "checkpoints/text/best.pt"]
    with pytest.raises(UserError, match=r"characters.*: '日', '本', '語'"):
        evaluate.main([*paths, "--data=other.txt", "--stride=4"])
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("checkpoints/qa") and row.split().count("nan") == 2


@pytest.mark.parametrize(
    ("text", "split", "n_tokens"),
    [("a", "val", 1), ("a", "train", 0), ("ab", "train", 1), (19 * "a", "val", 2)],
)
def test_a_short_text_is_evaluated_or_one_error(trained, text, split, n_tokens):
    Path("short.txt").write_text(text)
    flags = ["--data=short.txt", f"--split={split}", "--stride=5"]
    if n_tokens >= 2:
        assert evaluate.main(flags) == 0
        return
    with pytest.raises(UserError, match=f"the {split} split has {n_tokens} tokens: use a longer"):
        evaluate.main(flags)


def test_devices_without_float64_are_enough(monkeypatch):
    error = TypeError("MPS does not support float64")
    monkeypatch.setattr(torch.Tensor, "double", Mock(side_effect=error))
    assert evaluate_val(make_model(), random_corpus(101))["loss"] > 0


def test_checkpoints_without_a_known_corpus_need_data(trained, capsys, monkeypatch):
    state = torch.load("checkpoints/best.pt", weights_only=True)
    del state["train_config"]["data"]
    torch.save(state, "checkpoints/best.pt")
    with pytest.raises(UserError, match=r"best\.pt: the checkpoint does not name its corpus; ch"):
        evaluate.main([])
    exploded = {"tokens": 9, "loss": 1e9, "top1": 0.0}
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *args: exploded)
    assert evaluate.main(["--data=data/input.txt"]) == 0
    assert " inf " in capsys.readouterr().out


def test_losses_that_differ_from_those_of_the_training_are_explained(workplace, capsys):
    Path("qa.json").write_text(json.dumps([{"question": "the", "answer": "fox"}] * 20))
    assert train.main([*TINY_RUN, "--data=qa.json"]) == 0
    state = torch.load("checkpoints/best.pt", weights_only=True)
    torch.save(state | {"finetune": {"objective": "qa"}}, "checkpoints/best.pt")
    assert evaluate.main([]) == 0
    assert "best.pt was trained on answers only; this loss includes" in capsys.readouterr().out
    torch.save(state | {"finetune": {"objective": "dpo"}}, "checkpoints/best.pt")
    with pytest.raises(UserError, match="trained on pairs of answers: choose a text with --data"):
        evaluate.main([])


def test_an_ensemble_predicts_the_mean_probability():
    models, ids = [make_model(seed) for seed in (1, 2)], torch.arange(12)[None] % 11
    mixed, loss = evaluate.Ensemble(models)(ids, ids, None)
    probs = sum(model(ids)[0].softmax(dim=-1) for model in models) / 2
    assert torch.allclose(mixed.exp(), probs, atol=1e-6)
    assert loss.item() == pytest.approx(-probs[0, range(12), ids[0]].log().mean().item())


def test_an_ensemble_is_evaluated_if_its_models_are_alike(workplace, capsys):
    for tag, flag in (("a", "--seed=1"), ("b", "--seed=2"), ("c", "--block_size=8")):
        train.main([*TINY_RUN, f"--tag={tag}", flag, "--max_steps=1"])
    train.main([*TINY_RUN, "--tag=d", "--no-hold_out", "--max_steps=1"])
    a, b, c, d = (f"checkpoints/{tag}/best.pt" for tag in "abcd")
    for paths, message in (([a], "two or more"), ([a, c], "block_size"), ([a, d], "hold_out")):
        with pytest.raises(UserError, match=message):
            evaluate.main([*paths, "--ensemble"])
    capsys.readouterr()
    assert evaluate.main([a, b, "--ensemble", "--precision=float32"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows[2][:3] == ["all", "2", "together"]
    assert float(rows[2][3]) == pytest.approx(2 * float(rows[0][1]), abs=0.011)  # parameters
    assert float(rows[2][7]) < (float(rows[0][5]) + float(rows[1][5])) / 2  # by Jensen's inequality
