"""explore.py: chats, token probabilities and sweeps, against the model's own logits."""

import ast
import itertools
import math
import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import make_model

import explore
import generate
from config import SampleConfig
from model import GPT
from system.settings import UserError
from tokenizer import QA_SPECIALS, CharTokenizer
from utils import load_checkpoint

TOKENIZER = CharTokenizer.train(["\n abcdefghi"])  # 11 characters, make_model's vocab_size


def question_model(block_size: int = 200) -> tuple[GPT, CharTokenizer]:
    tokenizer = CharTokenizer.train(["System: Question: Answer\nWho? How? Why? No"], QA_SPECIALS)
    return make_model(vocab_size=tokenizer.vocab_size, block_size=block_size), tokenizer


def record_prompts(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> list[torch.Tensor]:
    """Type these lines in the next chat; returns the list that its prompts will be added to."""
    typed = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    prompts: list[torch.Tensor] = []
    original = explore.stream_texts

    def spy(model, tokenizer, config, prompt):
        prompts.append(prompt)
        return original(model, tokenizer, config, prompt)

    monkeypatch.setattr(explore, "stream_texts", spy)
    return prompts


# --- chat


def test_a_chat_keeps_its_context_until_new(trained, monkeypatch):
    prompts = record_prompts(monkeypatch, ["the quick", "brown", "/new", "fox", ""])
    with pytest.raises(UserError, match="--system is for a model that answers questions: leave"):
        explore.main(["chat", "--system=the"])
    assert explore.main(["chat", "--max_tokens=5"]) == 0
    _, tokenizer, _ = load_checkpoint(Path("checkpoints/best.pt"), torch.device("cpu"))
    first, second, third = (tokenizer.decode(prompt.tolist()) for prompt in prompts)
    assert first == "the quick" and third == "fox"
    assert second.startswith("the quick") and second.endswith("brown")
    assert len(second) == len("the quick") + 5 + len("brown")


@pytest.mark.parametrize(
    ("size", "kept"), [(90, [1, 2]), (89, [2]), (63, [2]), (62, []), (33, [])]
)  # three tokens are for the answer: the third prompt has 87, 60 or 33 tokens
def test_a_conversation_with_a_question_model_is_prompted_by_the_template(monkeypatch, size, kept):
    model, tokenizer = question_model(size)
    prompts = record_prompts(monkeypatch, ["Who?é", "Why?", "How?", "/new", "Who?", ""])
    replies = iter([" No", "So ", "\n", "No"])
    monkeypatch.setattr(explore, "stream_texts", lambda *args: [prompts.append(args[3])] and
                        ([piece] for piece in next(replies)))  # fmt: skip
    explore.chat(model, tokenizer, SampleConfig(max_new_tokens=3), " A\né")
    first, turns = "System: A\n", ["Question: Who?\nAnswer: No", "Question: Why?\nAnswer: So"]
    texts = [tokenizer.decode(prompt.tolist()) for prompt in prompts]
    assert texts[0] == texts[3] == f"<BOS>{first}Question: Who?\nAnswer:"
    history = [turns[number - 1] + "<EOS><BOS>" for number in kept]
    assert texts[2] == f"<BOS>{first}{''.join(history)}Question: How?\nAnswer:"


def test_a_reply_with_special_tokens_keeps_the_chat_going(monkeypatch, capsys):
    model, tokenizer = question_model()
    model.head.weight.data.zero_()  # all logits are equal: greedy decoding gives <PAD>
    prompts = record_prompts(monkeypatch, ["Who?", "Who?", ""])
    explore.chat(model, tokenizer, SampleConfig(max_new_tokens=3, temperature=0))
    assert "<PAD><PAD><PAD>" in capsys.readouterr().out and len(prompts) == 2


def test_a_conversation_longer_than_the_window_is_a_warning(monkeypatch, capsys):
    model = make_model()  # a window of 12
    record_prompts(monkeypatch, ["abcdefgh", "ab", ""])
    explore.chat(model, TOKENIZER, SampleConfig(max_new_tokens=4))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "the conversation has 14 tokens, more than the window of 12" in warning


def test_a_chat_ends_with_the_input(trained, monkeypatch):
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    assert explore.main(["chat"]) == 0


# --- token probabilities


def test_probabilities_are_those_under_the_sampling_settings(trained, capsys):
    explore.main(["probs", "--max_tokens=4", "--temperature=0.5", "--prompt=the "])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        shown = [float(p) for p in re.findall(r" (0\.\d{3}|1\.000)", line.split("from")[1])]
        assert len(shown) == 5 and shown == sorted(shown, reverse=True) and sum(shown) <= 1.001
    model, tokenizer, _ = load_checkpoint(Path("checkpoints/best.pt"), torch.device("cpu"))
    logits = model(torch.from_numpy(tokenizer.encode("the "))[None])[0][0, -1]
    probs, ids = (logits / 0.5).softmax(dim=-1).topk(5)
    pairs = zip(ids.tolist(), probs.tolist(), strict=True)
    wanted = "  ".join(f"{tokenizer.decode([i])!r} {p:.3f}" for i, p in pairs)
    assert lines[0].split("from  ")[1] == wanted


def test_the_lens_has_the_prediction_of_each_layer_for_the_sampled_tokens(trained, capsys):
    explore.main(["probs", "--max_tokens=30", "--prompt=the ", "--seed=1", "--lens"])
    steps, table = capsys.readouterr().out.split("\n\n")
    sampled = re.findall(r"^(.*?) +from  ", steps, re.M)
    header, *rows = table.splitlines()
    model, tokenizer, _ = load_checkpoint(Path("checkpoints/best.pt"), torch.device("cpu"))
    size = model.config.block_size
    assert header == "token          after layer 0" and len(rows) == size == 16
    text = "the " + "".join(map(ast.literal_eval, sampled))
    ids = torch.from_numpy(tokenizer.encode(text))[-size - 1 : -1]
    probs, best = model(ids[None])[0][0].softmax(dim=-1).max(dim=-1)
    for at in range(-len(rows), 0):
        assert rows[at] == f"{sampled[at]:14} {tokenizer.decode([int(best[at])])!r} {probs[at]:.3f}"


def test_probabilities_after_a_question_are_those_of_the_answer(monkeypatch, capsys):
    model, tokenizer = question_model()
    state = {"corpus": {"name": "qa.json", "sha256": "0", "questions": 9}, "step": 20, "log": []}
    monkeypatch.setattr(generate, "load_checkpoint", lambda path, device: (model, tokenizer, state))
    flags = ["qa.pt", "--max_tokens=1"]
    explore.main(["probs", *flags, "--prompt=Who?", "--temperature=1", "--seed=1"])
    record = [tokenizer.specials["<BOS>"], *tokenizer.encode("Question: Who?\nAnswer:").tolist()]
    probs = model(torch.tensor([record]))[0][0, -1].softmax(dim=-1)
    text, line = capsys.readouterr()
    assert f"{tokenizer.decode([int(probs.argmax())])!r} {probs.max():.3f}" in text
    assert line == "qa.pt: step 20\n"
    for action in ("probs", "sweep"):
        with pytest.raises(UserError, match=r"qa.pt answers questions: ask one with --prompt"):
            explore.main([action, *flags])
    record_prompts(monkeypatch, [""])
    assert explore.main(["chat", "qa.pt"]) == 0
    assert re.fullmatch(r"qa.pt: step 20; seed \d+\n", capsys.readouterr().err)


# --- sweeps


def test_a_sweep_measures_each_combination(trained, capsys):
    flags = ["--settings=temperature=0,0.8,5 top_k=3,9", "--max_tokens=40", "--num_samples=2"]
    flags += ["--output_file=sweep.txt", "--prompt=# python generate.py\\n"]
    assert explore.main(["sweep", *flags]) == 0
    shown, table = capsys.readouterr().out.split("settings  ")
    title, *rows, where = f"settings {table}".splitlines()
    assert title.split() == ["settings", "entropy", "distinct-1", "distinct-2", "log-probability"]
    assert len(rows) == 6 and where == "samples: sweep.txt"
    measures = {tuple(row.split()[:2]): list(map(float, row.split()[2:])) for row in rows}
    assert measures["temperature=0", "top_k=3"][0] == 0  # greedy leaves no choice
    assert measures["temperature=5", "top_k=3"][0] <= math.log(3) + 1e-3
    assert measures["temperature=5", "top_k=9"][0] > measures["temperature=0.8", "top_k=9"][0]
    assert measures["temperature=5", "top_k=9"][3] < measures["temperature=0", "top_k=9"][3] < 0
    assert shown.count("--- temperature=0.8 top_k=9\n") == 2 and shown.count("\n\n") >= 12
    written = f"{shown}settings  {table.partition('samples:')[0]}"
    first = Path("sweep.txt").read_text()
    assert first.endswith(written)
    Path("sweep.txt").unlink()
    explore.main(shlex.split(re.search(r"^# python explore\.py (.*)$", first, re.M)[1]))
    assert Path("sweep.txt").read_text() == first


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_statistics_are_those_of_the_distributions_that_were_sampled_from(penalty: float):
    model = make_model()
    config = SampleConfig(prompt="abc", max_new_tokens=8, num_samples=3, temperature=0.7, seed=1)
    config.repetition_penalty = penalty
    prompt = torch.from_numpy(TOKENIZER.encode("abc"))
    steps = list(generate.generate(model, prompt, config))
    ids = torch.stack([step.ids for step in steps], dim=1)  # (B, T)
    text = torch.cat([prompt.repeat(3, 1), ids], dim=1)
    logits = model(text[:, :-1])[0][:, len(prompt) - 1 :].detach()  # (B, T, V)
    log_probs = torch.distributions.Categorical(logits=logits).log_prob(ids)  # without the penalty
    penalized = torch.stack([step.logits for step in steps], dim=1) if penalty > 1 else logits
    sampled_from = torch.distributions.Categorical(logits=penalized / 0.7)
    texts, found = explore.sample_with_statistics(model, TOKENIZER, config)
    assert texts == generate.sample_text(model, TOKENIZER, config)
    assert found["entropy"] == pytest.approx(sampled_from.entropy().mean().item(), abs=1e-4)
    assert found["log-probability"] == pytest.approx(log_probs.mean().item(), abs=1e-4)
    pairs = {(a, b) for row in ids.tolist() for a, b in itertools.pairwise(row)}
    assert found["distinct-1"] == len(set(ids.flatten().tolist())) / 24
    assert found["distinct-2"] == len(pairs) / 21


def test_statistics_end_with_the_text_at_a_stop_string():
    model = make_model()
    config = SampleConfig(prompt="abc", max_new_tokens=300, num_samples=3, seed=1, stop="d")
    texts, found = explore.sample_with_statistics(model, TOKENIZER, config)
    assert texts == generate.sample_text(model, TOKENIZER, config)
    samples = [TOKENIZER.encode(text[3:] + "d").tolist() for text in texts if len(text) < 303]
    assert len(samples) == 3  # all of them reach it
    n_tokens = sum(map(len, samples))
    assert found["distinct-1"] == len({token for ids in samples for token in ids}) / n_tokens


# --- the command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "action must be one of chat, probs, sweep, not ''"),
        (["--temperature=-1"], "action must be .*temperature must be at least 0"),
        (["chat", "--num_samples=2", "--output_file=a.txt"], "--num_samples, --output_file"),
        (["chat", "--prompt=the"], "chat does not use --prompt"),
        (["probs", "--system=the"], "probs does not use --system"),
        (["probs", "--beams=2", "--settings=top_k=3"], "probs does not use --settings, --beams"),
        (["sweep", "--beams=2"], "sweep does not use --beams"),
        (["sweep", "--settings=colour=3"], "'colour=3' is not NAME="),
        (["sweep", "--settings=top_k=a"], "--settings: argument --top_k: invalid int value"),
        (["sweep", "--settings=top_k=-1 top_p=0.5,1"], "--settings: top_k must be at least 0"),
        (["sweep", "--output_file=no/a.md"], "there is no folder no"),
        (["sweep", "--settings="], "--settings: '' is not NAME="),
        (["probs", "--temperature=0.2,0.5"], "explore.py sweep --settings"),
        (["sweep", "--temperature=0.7"], "sweep does not use --temperature here: leave it out"),
        (["sweep", "--settings=top_k=1 top_k=2"], "'top_k=2' is not NAME=.* each once"),
        (["probs", "--device=tpu", "--top_p=2"], "top_p must be at most 1.*unknown device 'tpu'"),
    ],
)
def test_user_errors_are_reported_before_a_model_is_loaded(workplace, flags, message):
    with pytest.raises(UserError, match=message):  # otherwise that there is no checkpoint here
        explore.main(flags)
