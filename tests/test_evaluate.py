"""evaluate.py: models evaluated on full splits, side by side."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_model, make_text

import evaluate
import train
from corpus.corpus import Corpus
from evaluate import EvaluateConfig
from model import GPT
from system.settings import UserError
from viz.runs import read_run


def corpus_of(ids: np.ndarray, **settings: object) -> Corpus:
    return Corpus(ids[:300], ids[300:], {"name": "random"}, 300, len(ids) - 300, **settings)


def test_every_token_of_a_split_is_evaluated():
    model, ids = make_model(), np.random.default_rng(0).integers(11, size=401)
    row = evaluate.evaluate_split(model, corpus_of(ids), EvaluateConfig(precision="float32"), False)
    val = torch.from_numpy(ids[300:])
    losses, right = [], 0
    for start in range(0, 100, 12):  # one window after the other
        x, y = val[start : start + 12], val[start + 1 : start + 13]
        probs = model(x[None, : len(y)])[0][0].softmax(dim=-1)
        losses += (-probs[range(len(y)), y].log()).tolist()
        right += int((probs.argmax(dim=-1) == y).sum())
    assert row["tokens"] == 100 == len(losses)
    assert row["loss"] == pytest.approx(sum(losses) / 100, abs=1e-5)
    assert row["top1"] == right / 100


def one_token_at_a_time(model: GPT, ids: np.ndarray, first: Callable[[int], int]) -> list[float]:
    """The loss of each token t but the first, predicted from the tokens first(t) to t - 1 alone."""
    losses = []
    for t in range(1, len(ids)):
        context = torch.from_numpy(ids[first(t) : t])
        probs = model(context[None])[0][0, -1].softmax(dim=-1)
        losses.append(-probs[ids[t]].log().item())
    return losses


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("n_ids", [2, 5, 12, 13, 14, 40])  # windows have 12 tokens and a target
def test_with_stride_1_every_token_has_the_full_context(n_ids: int, batch_size: int):
    model, ids = make_model(pos="learned"), np.random.default_rng(0).integers(11, size=300 + n_ids)
    config = EvaluateConfig(precision="float32", batch_size=batch_size)
    row = evaluate.evaluate_split(model, corpus_of(ids), config, False, stride=1)
    losses = one_token_at_a_time(model, ids[300:], lambda t: max(0, t - 12))
    assert row["tokens"] == len(losses) == n_ids - 1
    assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("n_ids", [12, 13, 17, 18, 19, 41])
def test_with_stride_5_contexts_have_8_to_12_tokens(n_ids: int):
    model, ids = make_model(pos="learned"), np.random.default_rng(0).integers(11, size=300 + n_ids)
    first = [0] * 13 + [5] * 5 + [10] * 5 + [15] * 5 + [20] * 5 + [25] * 5 + [30] * 5
    assert [t - first[t] for t in range(13, 24)] == [8, 9, 10, 11, 12, 8, 9, 10, 11, 12, 8]
    config = EvaluateConfig(precision="float32")
    row = evaluate.evaluate_split(model, corpus_of(ids), config, False, stride=5)
    losses = one_token_at_a_time(model, ids[300:], lambda t: first[t])
    assert row["tokens"] == len(losses) == n_ids - 1
    assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_with_a_stride_and_a_document_mask_the_context_begins_at_the_separator():
    # the positions of rope are relative: a shorter context has the logits of a masked one
    model, ids = make_model(pos="rope"), np.random.default_rng(0).integers(11, size=340)
    config, val = EvaluateConfig(precision="float32"), ids[300:]

    def first(t: int) -> int:
        separators = [i for i in range(max(0, t - 12), t) if val[i] == 3]
        return max([max(0, t - 12), *separators])

    assert sum(first(t) > t - 12 for t in range(12, 40)) > 10  # the mask matters
    row = evaluate.evaluate_split(model, corpus_of(ids, separator=3), config, True, stride=1)
    assert row["tokens"] == 39
    assert row["loss"] == pytest.approx(np.mean(one_token_at_a_time(model, val, first)), abs=1e-5)


@pytest.mark.parametrize("n_ids", [2, 12, 13, 14, 25, 100])
def test_a_stride_of_a_full_window_is_the_usual_loss(n_ids: int):
    model, ids = make_model(), np.random.default_rng(0).integers(11, size=300 + n_ids)
    config, corpus = EvaluateConfig(precision="float32"), corpus_of(ids)
    usual = evaluate.evaluate_split(model, corpus, config, False)
    row = evaluate.evaluate_split(model, corpus, config, False, stride=12)
    for key in ("tokens", "loss", "top1"):
        assert row[key] == usual[key]


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
        assert row[:9] == usual[:9] and len(row) == len(usual) + 2  # all but tok/s
        # one byte per character
        assert float(row[-1]) == pytest.approx(float(row[-2]) / math.log(2), abs=2e-4)
    assert rows[1][1][-2] == rows[1][1][5]  # the window of b is 8 tokens
    assert rows[1][0][-2] != rows[1][0][5]

    monkeypatch.setattr(evaluate, "load_corpus", lambda *_, **__: pytest.fail("a late error"))
    for order in (paths, paths[::-1]):
        with pytest.raises(UserError, match=r"at most 8, the window of checkpoints/b/best\.pt"):
            evaluate.main([*order, "--stride=9"])


def test_a_document_mask_changes_the_loss():
    model, ids = make_model(), np.random.default_rng(0).integers(11, size=401)
    config = EvaluateConfig(precision="float32")
    corpus = corpus_of(ids, separator=3)
    masked, unmasked = (evaluate.evaluate_split(model, corpus, config, m) for m in (True, False))
    assert masked["tokens"] == unmasked["tokens"] == 100
    assert masked["loss"] != pytest.approx(unmasked["loss"])


def test_the_table_has_a_row_for_each_checkpoint(workplace, capsys):
    for tag, tokenizer in (("a", "char"), ("b", "bpe")):
        size = ["--vocab_size=300"] * (tokenizer == "bpe")
        assert train.main([*TINY_RUN, f"--tag={tag}", f"--tokenizer={tokenizer}", *size]) == 0
    final = [read_run(Path("checkpoints", t)).final for t in "ab"]
    capsys.readouterr()
    assert evaluate.main(["checkpoints/a/best.pt", "checkpoints/b/best.pt"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    names = "checkpoint parameters split tokens loss ppl bpb top-1 tok/s"
    assert title.split() == names.split() and len(rows) == 2
    for row, expected in zip(rows, final, strict=True):
        name, _, _, split, tokens, loss, ppl, bpb, _, _ = row.split()
        assert name.endswith("best.pt") and split == "val"
        assert int(tokens.replace(",", "")) > 200
        assert float(loss) == pytest.approx(expected["val"], abs=2e-3)
        assert float(ppl) == pytest.approx(math.exp(expected["val"]), abs=0.2)
        assert float(bpb) == pytest.approx(expected["bpb"], abs=3e-3)


def test_another_text_is_evaluated_with_the_models_tokenizer(workplace, capsys):
    assert train.main(TINY_RUN) == 0
    (workplace / "other.txt").write_text(make_text(99))
    assert evaluate.main(["--data=other.txt", "--split=train"]) == 0
    assert "train" in capsys.readouterr().out
    (workplace / "foreign.txt").write_text("日本語 " * 300)
    with pytest.raises(UserError, match=r"not among the .* characters"):
        evaluate.main(["--data=foreign.txt"])


def test_user_errors_are_reported(workplace):
    with pytest.raises(UserError, match="there is no checkpoint"):
        evaluate.main([])
    with pytest.raises(UserError, match=r"stride must be at least 1.*; batch_size must be"):
        evaluate.main(["--stride=0", "--batch_size=0"])
    assert train.main(TINY_RUN) == 0
    with pytest.raises(UserError, match=r"there is no checkpoint nowhere\.pt"):
        evaluate.main(["checkpoints/best.pt", "nowhere.pt"])
    with open("data/input.txt", "a") as file:
        file.write("more")
    with pytest.raises(UserError, match=r"not what checkpoints/best.pt was trained on"):
        evaluate.main([])


def test_rows_are_printed_before_an_error_and_unknown_characters_have_no_bpb(workplace, capsys):
    records = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(20)]
    (workplace / "qa.json").write_text(json.dumps(records))
    assert train.main([*TINY_RUN, "--data=qa.json", "--tag=qa"]) == 0
    assert train.main([*TINY_RUN, "--tag=text"]) == 0
    (workplace / "other.txt").write_text("日本語 " * 300)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"characters.*: '日', '本', '語'"):
        evaluate.main(
            ["checkpoints/qa/best.pt", "checkpoints/text/best.pt", "--data=other.txt", "--stride=4"]
        )
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("checkpoints/qa") and row.split().count("nan") == 2


@pytest.mark.parametrize("text", ["a", "ab", "the quick brown fox"])
@pytest.mark.parametrize("split", ["val", "train"])
def test_a_short_text_is_evaluated_or_one_error(workplace, capsys, text, split):
    assert train.main(TINY_RUN) == 0
    (workplace / "short.txt").write_text(text)
    n_tokens = len(text) * 9 // 10 if split == "train" else len(text) - len(text) * 9 // 10
    flags = ["--data=short.txt", f"--split={split}", "--stride=5"]
    if n_tokens >= 2:
        assert evaluate.main(flags) == 0
        return
    with pytest.raises(UserError, match=f"the {split} split has {n_tokens} tokens: use a longer"):
        evaluate.main(flags)


def test_devices_without_float64_are_enough(monkeypatch):
    def no_float64(*args: object, **kwargs: object) -> None:
        raise TypeError("MPS does not support float64")

    monkeypatch.setattr(torch.Tensor, "double", no_float64)
    ids = np.random.default_rng(0).integers(11, size=401)
    config = EvaluateConfig(precision="float32")
    assert evaluate.evaluate_split(make_model(), corpus_of(ids), config, False)["loss"] > 0


def test_an_exploded_loss_is_printed(trained, capsys, monkeypatch):
    exploded = {"tokens": 9, "loss": 1e9, "top1": 0.0, "tokens_per_second": 1.0}
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *args: exploded)
    assert evaluate.main([]) == 0
    assert " inf " in capsys.readouterr().out


def test_checkpoints_without_a_known_corpus_need_data(workplace, capsys):
    assert train.main(TINY_RUN) == 0
    state = torch.load("checkpoints/best.pt", weights_only=True)
    del state["train_config"]["data"]
    torch.save(state, "checkpoints/best.pt")
    with pytest.raises(
        UserError, match=r"best\.pt does not name its corpus: choose one with --data"
    ):
        evaluate.main([])
    assert evaluate.main(["--data=data/input.txt"]) == 0


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


def test_questions_need_a_model_of_questions(workplace):
    assert train.main(TINY_RUN) == 0
    (workplace / "qa.json").write_text(json.dumps([{"question": "a", "answer": "b"}] * 5))
    with pytest.raises(UserError, match="has no <BOS> token"):
        evaluate.main(["--data=qa.json"])
