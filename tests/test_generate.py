"""Sampling, on distributions worked by hand and on small models."""

import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import COMPONENTS, TINY_RUN, make_model, to_transformers
from exports import save_model
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

import generate
import train
from config import ARCHS, GPTConfig, SampleConfig
from corpus.bpe import train_bpe
from corpus.records import encode_turn
from generate import sample_logits
from model import GPT, KVCache
from sampling import output
from sampling.beam_search import beam_search
from sampling.checks import sampling_bytes
from sampling.compiled import StaticCache
from sampling.quantize import Int8Linear, lower_precision
from sampling.text import TextWriter, decode_prompt, encode_prompt
from system.command_line import parse_args
from system.settings import UserError
from tokenizer import QA_SPECIALS, BPETokenizer, CharTokenizer
from training.task import sample_from_newline


def shares(probs: list[float], **settings: float) -> list[float]:
    """How often each token is drawn from these probabilities, by 1000 evenly spread numbers."""
    n = 1000
    logits = torch.tensor(probs).log().expand(n, -1)
    drawn = sample_logits(logits, (torch.arange(n) + 0.5) / n, **settings)
    return [(drawn == i).float().mean().item() for i in range(len(probs))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),  # squares, normed
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-46}, [0, 1, 0, 0]),  # 0 in float32
        ({"temperature": 1e300}, [0.25] * 4),  # infinity in float32
        ({"top_p": 1e-300}, [0, 1, 0, 0]),
        ({"temperature": 5e-324, "top_p": 5e-324, "min_p": 1 - 2**-53}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),  # one token reaches it
        ({"top_p": 0.41}, [0, 4 / 7, 3 / 7, 0]),  # the one that crosses is in
        ({"top_p": 0.71}, [0, 4 / 9, 3 / 9, 2 / 9]),
        ({"min_p": 0.6}, [0, 4 / 7, 3 / 7, 0]),  # 0.24 is the threshold
        # top-k first: of 4/7 and 3/7 the first alone reaches 0.5, which of 0.4 it would not
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        # temperature first: 16/30 reaches 0.5 alone
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(settings: dict, expected: list[float]):
    assert shares([0.1, 0.4, 0.3, 0.2], **settings) == pytest.approx(expected, abs=2e-3)


def test_ties_go_to_the_lower_id():
    assert shares([0.25] * 4, top_k=2) == pytest.approx([0.5, 0.5, 0, 0], abs=2e-3)
    for top_p in (0.3, 0.5):  # two are enough for exactly a half
        assert shares([0.25] * 4, top_p=top_p) == pytest.approx([0.5, 0.5, 0, 0], abs=2e-3)
    assert shares([0.2, 0.4, 0.4], temperature=0) == [0, 1, 0]
    assert shares([0.2, 0.4, 0.4], top_k=1) == [0, 1, 0]
    assert shares([0.5, 0.5], min_p=1.0) == pytest.approx([0.5, 0.5], abs=2e-3)


def test_a_temperature_near_0_still_divides():
    for temperature, ratio in ((1e-4, math.e), (1e-5, math.exp(10))):
        expected = [ratio / (1 + ratio), 1 / (1 + ratio)]
        found = shares([1.0, math.exp(-1e-4)], temperature=temperature)
        assert found == pytest.approx(expected, abs=2e-3)


def test_impossible_tokens_are_never_drawn():
    assert shares([0.0, 0.5, 0.0, 0.5]) == pytest.approx([0, 0.5, 0, 0.5], abs=2e-3)
    logits = torch.tensor([[0.0, float("-inf")]])
    assert sample_logits(logits, torch.tensor([1 - 2**-24])).item() == 0


def sampled(model: GPT, prompt: list[int], ends: Sequence[int] = (), **settings: Any) -> list:
    """The ids of each text that `generate` samples."""
    config = SampleConfig(**{"temperature": 1.0, "seed": 1, **settings})
    steps = generate.generate(model, torch.tensor(prompt), config, ends)
    return torch.stack([step.ids for step in steps], dim=1).tolist()


@pytest.mark.parametrize("arch", ARCHS)
def test_generation_is_the_model_fed_its_own_text(arch: str):
    model = make_model(**ARCHS[arch])
    ids, seen = [1, 2, 3], [1, 2, 3]
    for _ in range(30):
        seen = seen if len(seen) <= 12 else seen[-6:]  # then from the last half window
        ids.append(model(torch.tensor([seen]))[0][0, -1].argmax().item())
        seen = [*seen, ids[-1]]
    (generated,) = sampled(model, [1, 2, 3], max_new_tokens=30, temperature=0)  # past the window
    assert generated == ids[3:]


@pytest.mark.parametrize("settings", COMPONENTS)
@pytest.mark.parametrize(
    ("block_size", "n_prompt"), [(12, 1), (12, 5), (12, 12), (12, 13), (12, 40), (1, 1), (2, 3)]
)
def test_cached_generation_matches_uncached(settings: dict, block_size: int, n_prompt: int):
    model = make_model(**settings, block_size=block_size)
    prompt = torch.randint(11, (n_prompt,))
    runs = []
    for cache in (True, False):
        config = SampleConfig(max_new_tokens=20, num_samples=3, cache=cache, seed=1)
        runs.append(list(generate.generate(model, prompt, config)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.allclose(one.logits, other.logits, atol=1e-4)


def test_a_window_or_a_cache_that_is_full_raises():
    model = make_model()
    cache = KVCache(model.config, 1)
    model(torch.zeros(1, 12, dtype=torch.long), cache=cache)
    for n_tokens, full in ((1, cache), (13, None)):
        with pytest.raises(ValueError, match="13 tokens do not fit the window of 12"):
            model(torch.zeros(1, n_tokens, dtype=torch.long), cache=full)


@pytest.mark.parametrize("settings", COMPONENTS)
def test_a_cache_can_be_filled_in_pieces(settings: dict):
    model, idx = make_model(**settings), torch.randint(11, (2, 12))
    for cache in (KVCache(model.config, 2), StaticCache(model.config, 2)):
        for _ in range(2):
            for start, end in ((0, 3), (3, 4), (4, 9), (9, 12)):
                logits = model(idx[:, start:end], cache=cache)[0]
                assert torch.allclose(logits[:, -1], model(idx[:, :end])[0][:, -1], atol=1e-4)
            cache.clear()


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("pos", ["rope", "learned", "sinusoidal"])
def test_lower_precision_changes_the_logits_a_little(precision: str, pos: str):
    settings = {"n_embd": 64, "n_head": 2, "pos": pos, "token_shift": pos == "rope"}
    model, idx = make_model(**settings), torch.randint(11, (1, 12))
    exact = model(idx)[0]
    lower_precision(model, precision)
    close = model(idx)[0].float()
    assert 0 < (close - exact).abs().max() < 0.05 * exact.abs().max()
    lower = torch.float16 if precision == "float16" else torch.bfloat16
    for name, parameter in model.named_parameters():  # the norms of queries and keys stay exact
        of_heads = "q_norm" in name or "k_norm" in name
        assert parameter.dtype == (torch.float32 if of_heads else lower)
    cache = KVCache(model.config, 1)
    cached = [model(idx[:, t : t + 1], cache=cache)[0].float() for t in range(12)]
    assert (torch.cat(cached, dim=1) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("n_in", range(1, 71))
def test_int8_layers_of_every_width_equal_their_weights_in_float32(n_in: int):
    torch.manual_seed(n_in)
    for n_out in (1, 7, 16, 70 - n_in or 1, n_in):
        low = Int8Linear(nn.Linear(n_in, n_out))
        weight = low.weight[:, :n_in].float() * low.scale.float()[:, None]
        for shape in ((1, 1, n_in), (9, 1, n_in), (2, 3, n_in), (2, 20, n_in)):
            x = torch.randn(shape).bfloat16()
            expected = x.float() @ weight.T + low.bias
            assert torch.allclose(low(x).float(), expected, atol=0.02, rtol=0.01)


def test_int8_weights_are_within_half_a_step_of_the_weights():
    torch.manual_seed(0)
    linear = nn.Linear(32, 7)
    low = Int8Linear(linear)
    assert low.weight.dtype == torch.int8
    steps = low.scale.float()[:, None]
    assert ((low.weight * steps - linear.weight).abs() <= steps / 2 + 1e-7).all()
    assert torch.allclose(steps[:, 0], linear.weight.abs().amax(dim=1) / 126, rtol=0.01)


def assert_compiled_sampling_equals_eager(model: GPT, **settings: Any) -> None:
    """Over three windows of 12 tokens."""
    settings = {"max_new_tokens": 25, "seed": 1, **settings}
    runs = []
    for compiled in (True, False):
        config = SampleConfig(**settings, compile=compiled)
        runs.append(list(generate.generate(model, torch.tensor([1, 2, 3]), config)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.allclose(one.logits, other.logits, atol=1e-4)


def test_compiling_that_does_not_work_is_an_error_before_sampling(trained, monkeypatch, capsys):
    error = RuntimeError("no C++ compiler\nand a long trace")
    monkeypatch.setattr(torch, "compile", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"does not work here \(no C\+\+ compiler\): leave it out"):
        generate.main(["--compile"])
    assert capsys.readouterr().out == ""


def test_compiled_sampling_equals_eager():
    model = make_model(token_shift=True, n_layer=1)  # compiling takes longer for each layer
    assert_compiled_sampling_equals_eager(model, num_samples=2, repetition_penalty=1.2, top_k=5)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"top_p": 0.8, "min_p": 0.01}, {"pos": "learned"}, {"n_kv_head": 1}],
)
def test_sampling_is_compiled_once_as_one_graph(settings: dict, monkeypatch):
    torch.compiler.reset()
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, fullgraph, options: compile_function(f, backend=counter, fullgraph=fullgraph),
    )
    names = SampleConfig.__dataclass_fields__
    model = make_model(**{k: v for k, v in settings.items() if k not in names})
    sampling = {k: v for k, v in settings.items() if k in names}
    assert_compiled_sampling_equals_eager(model, **sampling)
    assert counter.frame_count == 1
    longer = generate.SampleConfig(max_new_tokens=7, seed=1, compile=True, **sampling)
    list(generate.generate(model, torch.tensor([3, 1, 4]), longer))  # as in a chat
    assert counter.frame_count == 1


# --- decoding


def hf_distribution(logits: torch.Tensor, settings: dict) -> torch.Tensor:
    """The distribution that transformers samples from, (B, V)."""
    hf = pytest.importorskip("transformers")
    makers = {  # in the order in which transformers applies them
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    for name, maker in makers.items():
        if name in settings:
            logits = maker(settings[name])(None, logits)
    return logits.softmax(dim=-1)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 99},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_p": 0.8},
        {"temperature": 0.4, "min_p": 0.1},
        {"top_k": 8, "top_p": 0.5},
        {"top_p": 0.7, "min_p": 0.3},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.15},
    ],
)
def test_the_distribution_is_that_of_transformers(settings: dict):
    torch.manual_seed(0)
    logits = 2 * torch.randn(200, 20)
    probs, ids = generate.adjust_logits(logits, **settings)
    ours = torch.zeros(200, 20).scatter(1, ids, probs)
    assert torch.allclose(ours, hf_distribution(logits, settings), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.01, 0.5, 1.3, 10.0, 100.0])
def test_repetition_is_penalized_as_in_transformers(penalty: float):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits, text = torch.randn(50, 20), torch.randint(20, (50, 12))
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone())
    seen = torch.zeros(50, 20, dtype=torch.bool).scatter(1, text, True)
    assert torch.equal(generate.penalize_repetition(logits, seen, penalty), expected)


def test_the_penalty_applies_to_the_tokens_in_the_window():
    model, prompt = make_model(), torch.tensor([1, 2, 3])
    config = SampleConfig(max_new_tokens=30, repetition_penalty=1.7, temperature=1.0, seed=1)
    steps = list(generate.generate(model, prompt, config))
    text, begin = [1, 2, 3], 0
    for step in steps:
        if len(text) - begin > 12:  # as in the docstring: the last half window
            begin = len(text) - 6
        logits = model(torch.tensor([text[begin:]]))[0][0, -1]
        expected = logits.clone()
        for token in set(text[begin:]):
            expected[token] *= 1.7 if logits[token] < 0 else 1 / 1.7
        assert torch.allclose(step.logits[0], expected, atol=1e-4)
        assert torch.allclose(step.model_logits[0], logits, atol=1e-4)
        text.append(step.ids.item())


def test_each_text_of_a_batch_ends_on_its_own():
    model, settings = make_model(), {"max_new_tokens": 60, "num_samples": 4, "seed": 1337}
    free, ended = (sampled(model, [1], ends, **settings) for ends in ([], [7]))
    for one, other in zip(free, ended, strict=True):
        n = one.index(7) + 1
        assert other[:n] == one[:n] and set(other[n:]) <= {-1}
    assert len(ended[0]) == max(row.index(7) + 1 for row in free) < 60


def mean_log_prob(model: GPT, prompt: list[int], ids: Sequence[int]) -> float:
    """The mean log-probability of the tokens that continue a prompt."""
    logits = model(torch.tensor([[*prompt, *ids]]))[0][0].log_softmax(dim=-1)
    at = len(prompt) - 1
    return sum(logits[at + i, token].item() for i, token in enumerate(ids)) / len(ids)


@pytest.mark.parametrize("ends", [[], [2], [0, 3]])
def test_beams_with_more_beams_than_texts_are_all_texts_once(ends: list[int]):
    model = make_model(vocab_size=4)
    found = beam_search(model, torch.tensor([1, 2]), 500, 3, ends)
    texts = {
        ids[: next((i + 1 for i, t in enumerate(ids) if t in ends), 3)]
        for ids in itertools.product(range(4), repeat=3)
    }
    assert sorted(tuple(ids) for _, ids in found) == sorted(texts)
    assert [score for score, _ in found] == sorted((s for s, _ in found), reverse=True)
    for score, ids in found:
        assert score == pytest.approx(mean_log_prob(model, [1, 2], ids), abs=1e-4)


@pytest.mark.parametrize("ends", [[], [7], [3, 7]])
@pytest.mark.parametrize("seed", range(3))
def test_beams_are_those_of_transformers(seed: int, ends: list[int]):
    hf = pytest.importorskip("transformers")
    model = make_model(seed, **ARCHS["gpt2"], block_size=32)
    theirs, prompt = to_transformers(model, "gpt2"), torch.tensor([[1, 2]])
    for beams, n_new in itertools.product((2, 3, 5), (1, 2, 9)):
        config = hf.GenerationConfig(
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=n_new,
            eos_token_id=ends or None,
            pad_token_id=0,
            early_stopping=True,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = theirs.generate(prompt, config, attention_mask=torch.ones_like(prompt))
        ours = beam_search(model, prompt[0], beams, n_new, ends)
        scores = found.sequences_scores.tolist()
        assert [score for score, _ in ours] == pytest.approx(scores, abs=1e-4)
        for (_, ids), padded in zip(ours, found.sequences[:, 2:].tolist(), strict=True):
            assert ids == padded[: len(ids)] and (len(ids) == n_new or ids[-1] in ends)


@pytest.mark.parametrize("settings", COMPONENTS)
def test_beams_with_a_cache_have_the_scores_of_their_texts(settings: dict):
    model = make_model(**settings)
    for score, ids in beam_search(model, torch.tensor([1, 2]), 3, 6):
        assert score == pytest.approx(mean_log_prob(model, [1, 2], ids), abs=1e-4)


def test_a_beam_of_one_is_greedy():
    model = make_model()
    (greedy,) = sampled(model, [1, 2], temperature=0, max_new_tokens=30)  # past the window
    assert beam_search(model, torch.tensor([1, 2]), 1, 30)[0][1] == greedy


# --- text


WORDS = CharTokenizer.train(["abcd \n"], ["<|endoftext|>"])


def written(ids: list[int], *stops: str, tokenizer=WORDS) -> str:
    writer = TextWriter(tokenizer, stops)
    return "".join(writer.add(i) for i in ids) + writer.finish()


def before_stop(text: str, stops: list[str]) -> str:
    """The text up to the stop strings that are complete first, the one that began first of them."""
    complete = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)]
    if not complete:
        return text
    seen = text[: complete[0]]
    return text[: min(seen.find(s) for s in stops if s in seen)]


@example("dabc", ["c", "bc"])
@given(st.text(alphabet="abcd ", max_size=30), st.lists(st.text("abc", min_size=1), max_size=3))
def test_a_text_ends_before_its_first_stop_string(text: str, stops: list[str]):
    ids = [*WORDS.encode(text).tolist(), 0]
    assert written(ids, *stops) == before_stop(text, stops)


def test_nothing_comes_after_the_end_of_a_text():
    ids = [*WORDS.encode("ab").tolist(), 0, *WORDS.encode("cd").tolist()]
    assert written(ids) == "ab" and written([*WORDS.encode("ab").tolist(), -1]) == "ab"


def test_characters_are_written_whole():
    tokenizer = train_bpe(Counter({"a": 1}), 257)  # bytes
    writer = TextWriter(tokenizer)
    assert [writer.add(b) for b in "né".encode()] == ["n", "", "é"]
    assert written([0xC3], tokenizer=tokenizer) == "\ufffd"


def test_bytes_after_a_stop_string_are_not_written():
    ranks = {bytes([b]): b for b in range(256)} | {b".\xe2": 256}
    tokenizer = BPETokenizer(ranks, {}, ".")
    assert written([*b"Hi", 256, 0x80], ".", tokenizer=tokenizer) == "Hi"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("settings", [{}, {"n_embd": 40}, {"token_shift": True, "pos": "learned"}])
def test_a_sample_does_not_depend_on_the_number_of_samples(precision: str, settings: dict):
    """With the numbers of samples where kernels change: 8 rows, and the 4 of float32."""
    model = make_model(**{"n_embd": 32, **settings})
    lower_precision(model, precision)

    for prompt in ([1], [1, 2, 3], [4] * 9):
        texts = sampled(model, prompt, max_new_tokens=20, num_samples=9)
        for n in (1, 3, 4, 7, 8):
            assert sampled(model, prompt, max_new_tokens=20, num_samples=n) == texts[:n]


def test_the_random_numbers_of_a_sample_are_those_of_its_seed_and_number():
    """A uniform model returns its random numbers: token floor(V u)."""
    model = make_model(vocab_size=1000)
    for p in model.parameters():
        p.data.zero_()
    for i, row in enumerate(sampled(model, [0], max_new_tokens=5, num_samples=3, seed=11)):
        numbers = np.random.default_rng((11, i)).random(5, dtype=np.float32)
        assert row == [int(1000 * u) for u in numbers]


def test_weights_that_are_not_numbers_are_an_error():
    model = make_model()
    model.head.weight.data[3] = float("nan")
    for settings in ({}, {"temperature": 0.0}, {"repetition_penalty": 2.0}):
        with pytest.raises(UserError, match="logits are not finite"):
            next(generate.generate(model, torch.tensor([1]), SampleConfig(**settings)))
    with pytest.raises(UserError, match="logits are not finite"):
        beam_search(model, torch.tensor([1]), 2, 3)


def test_unknown_characters_are_dropped_with_a_warning(capsys):
    tokenizer = CharTokenizer.train(["ab\n"])
    assert encode_prompt(tokenizer, "aéb").tolist() == [1, 2]
    assert "'é'" in capsys.readouterr().err
    assert encode_prompt(tokenizer, "é").tolist() == [0]  # a newline
    assert encode_prompt(CharTokenizer.train(["ab"]), "").tolist() == [0]
    assert encode_prompt(CharTokenizer.train(["ab"]), "\n").tolist() == [0]
    assert "'\\n'" not in capsys.readouterr().err
    asked = CharTokenizer.train(["Question: Who?\nAnswer:"], QA_SPECIALS)  # has <UNK>
    prompt = encode_prompt(asked, "Wh\u00e9o?")
    assert decode_prompt(asked, prompt) == "Question: Who?\nAnswer:"
    assert "left out of the prompt: '\u00e9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("specials", "first"),
    [
        (QA_SPECIALS, "<BOS>"),
        (("<|endoftext|>",), "<|endoftext|>"),
        (("<|endoftext|>", *QA_SPECIALS), "<BOS>"),
        ((), "\n"),
    ],
)
def test_an_empty_prompt_is_the_token_that_starts_a_text(specials: tuple[str, ...], first: str):
    tokenizer = CharTokenizer.train(["ab\n"], specials)
    (token,) = encode_prompt(tokenizer, "").tolist()
    assert tokenizer.decode([token]) == first
    shown = decode_prompt(tokenizer, torch.tensor([token]))
    assert shown == ("" if specials else "\n")


def test_a_prompt_longer_than_the_window_is_a_warning(capsys):
    model, tokenizer = make_model(), CharTokenizer.train(["abcdefghij\n"])
    config = SampleConfig(max_new_tokens=5, temperature=0)
    texts = [
        generate.sample_text(model, tokenizer, replace(config, prompt=prompt))[0]
        for prompt in ("abcdefghijab", "jjabcdefghijab", "ghijab")
    ]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == (
        "warning: the prompt has 14 tokens, more than the window of 12: the model sees only the "
        "last 6"
    )
    assert texts[1][14:] == texts[2][6:]  # as it says


@given(st.text(alphabet="aé漢🙂 ", max_size=12), st.lists(st.text("aé🙂", min_size=1), max_size=3))
def test_stop_strings_of_several_bytes_are_found_across_tokens(text: str, stops: list[str]):
    tokenizer = train_bpe(Counter({"a": 1}), 257)  # every byte is a token
    ids = tokenizer.encode(text).tolist()
    assert written(ids, *stops, "", tokenizer=tokenizer) == before_stop(text, stops)


def test_a_stop_string_in_the_prompt_stops_nothing_and_empty_ones_are_none():
    model, tokenizer = make_model(), CharTokenizer.train(["abcdefghij\n"])
    config = SampleConfig("", "abab", max_new_tokens=8, num_samples=3, temperature=1.0, seed=1337)
    free = generate.sample_text(model, tokenizer, config)
    assert all(len(text) == 12 for text in free)
    stop = free[1][6]  # one character: some of the texts have it, at different places
    for stops in (stop, f"|{stop}||", f"{stop}|abab"):
        ended = generate.sample_text(model, tokenizer, replace(config, stop=stops))
        assert ended == ["abab" + text[4:].partition(stop)[0] for text in free]


# --- the command line


def test_the_newest_checkpoint_is_sampled_by_default(trained, capsys):
    flags = ["--prompt=the ", "--seed=5"]
    assert generate.main(["--max_new_tokens=20", *flags]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the ") and len(text) == 4 + 20 + 1
    generate.main(["checkpoints/best.pt", "--max_tokens", "20", *flags])
    assert capsys.readouterr().out == text
    generate.main(["--stream", "--max_tokens=20", *flags])
    assert capsys.readouterr().out == text


def test_an_output_file_says_how_to_make_it_again(trained):
    Path("prompt.txt").write_text("a fox\nand ")
    sets = (
        ["--prompt=it's\nfun", "--no-cache"],
        ["--prompt_file=prompt.txt", "--top_k=3", "--top_p=0.5"],
    )
    for flags in sets:
        generate.main([*flags, "--num_samples=2", "--max_tokens=20", "--output_file=one.txt"])
        first = Path("one.txt").read_text()
        command = re.search(r"^# python generate\.py (.*)$", first, re.M)[1]
        words = shlex.split(command.replace("'$'\\n''", "\n"))
        generate.main(words)  # replaces it
        assert Path("one.txt").read_text() == first
    assert "a fox\nand " in first


@given(
    prompt=st.text(st.characters(codec="utf-8") | st.sampled_from("\\n\n'")),
    stop=st.text("\\n\n|'$"),
    path=st.text("a\\n\n' ", min_size=1),
)
def test_any_text_of_a_header_survives_the_shell(prompt: str, stop: str, path: str):
    config = SampleConfig(prompt=prompt, stop=stop, checkpoint=path, seed=3)
    state = {"corpus": {"name": "x"}, "step": 1}
    _, line, *rest = output.header(config, state).split("\n")
    assert rest == ["", ""]  # the command is one line
    words = shlex.split(line.removeprefix("# python generate.py").replace("'$'\\n''", "\n"))
    assert parse_args(SampleConfig, words, "") == config


# --- backslashes on the command line


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"\nROMEO:", "\nROMEO:"),
        (r"a\n\nb", "a\n\nb"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"C:\dir\t\alpha" + "\\", r"C:\dir\t\alpha" + "\\"),  # no other escapes
        ("a\nb", "a\nb"),
    ],
)
def test_backslash_n_is_a_newline_in_a_prompt_and_in_stop_strings(typed: str, text: str):
    for words in (["--prompt", typed, f"--stop={typed}"], [f"--prompt={typed}", "--stop", typed]):
        config = parse_args(SampleConfig, words, "")
        assert (config.prompt, config.stop) == (text, text)


def test_a_prompt_file_and_settings_in_python_are_taken_literally(workplace):
    tokenizer = CharTokenizer.train(["\\n\nab"])
    save_model("model.pt", make_model(vocab_size=tokenizer.vocab_size), tokenizer)
    Path("prompt.txt").write_text(r"a\nb")
    config = SampleConfig("model.pt", prompt_file="prompt.txt")
    generate.load_for_sampling(config)
    assert config.prompt == r"a\nb"
    assert tokenizer.decode(encode_prompt(tokenizer, r"\n").tolist()) == r"\n"


# --- the line on stderr, and the seed


def test_one_line_names_the_checkpoint_its_loss_and_the_seed_that_was_drawn(trained, capsys):
    generate.main(["--max_tokens=30"])
    text, line = capsys.readouterr()
    val = json.loads(Path("checkpoints/log.jsonl").read_text().splitlines()[-2])["val"]
    expected = rf"checkpoints/best\.pt: step 20, validation loss {val:.4f}; seed (\d+)\n"
    seed = re.fullmatch(expected, line)[1]
    generate.main(["--max_tokens=30", f"--seed={seed}"])
    again, line = capsys.readouterr()
    assert again == text
    assert line == f"checkpoints/best.pt: step 20, validation loss {val:.4f}\n"
    generate.main(["checkpoints", "--max_tokens=30", f"--seed={seed}"])  # the folder of the run
    assert capsys.readouterr().out == text
    assert len({generate.draw_seed() for _ in range(4)}) > 1
    for flags in (["--temperature=0"], ["--beams=2"]):  # no random numbers
        generate.main([*flags, "--max_tokens=3", "--output_file=out.txt"])
        assert capsys.readouterr().err == line
        assert "seed" not in Path("out.txt").read_text()


def test_the_loss_of_a_checkpoint_is_that_of_its_own_step(workplace, capsys):
    log = [{"step": 10, "val": 3.0}, {"step": 20, "val": 2.0}, {"step": 30, "val": 1.0}]
    own = {"step": 20, "corpus": {"name": "text", "sha256": "0"}}
    for contents, line in (
        (own | {"log": log}, "model.pt: step 20, validation loss 2.0000"),
        (own | {"log": log, "step": 25}, "model.pt: step 25"),
        (own, "model.pt: step 20"),
        (
            own | {"step": 0},
            "model.pt: not trained yet (step 0), it writes noise; its run may have a latest.pt",
        ),
        ({}, "model.pt: an imported model"),
    ):
        save_model("model.pt", make_model(), CharTokenizer.train(["abcdefghij\n"]), **contents)
        generate.main(["model.pt", "--max_tokens=3", "--seed=1"])
        assert capsys.readouterr().err == line + "\n"


def test_without_a_seed_each_text_is_another_but_samples_in_training_are_the_same():
    model, tokenizer = make_model(), CharTokenizer.train(["abcdefghij\n"])
    config = SampleConfig(max_new_tokens=40, temperature=1.0)
    assert len({generate.sample_text(model, tokenizer, config)[0] for _ in range(3)}) > 1
    config = SampleConfig(max_new_tokens=40, seed=1337)
    assert sample_from_newline(model, tokenizer, 40) == sample_from_newline(model, tokenizer, 40)
    expected = generate.sample_text(model, tokenizer, config)
    assert [sample_from_newline(model, tokenizer, 40)] == expected


# --- questions


def test_a_prompt_for_a_question_model_is_the_beginning_of_a_record():
    chars = CharTokenizer.train(["Question: Who is it?\nAnswer: me"], QA_SPECIALS)
    pairs = train_bpe(Counter({"a": 1}), 261, QA_SPECIALS)
    for tokenizer in (chars, pairs):
        turn = encode_turn(tokenizer, "Who is it?", "me")
        for text in ("Who is it?", " Who is it?\n"):
            prompt = encode_prompt(tokenizer, text)
            assert prompt.tolist() == turn.ids[~turn.scored].tolist()
        assert decode_prompt(tokenizer, prompt) == "Question: Who is it?\nAnswer:"
        plain = encode_prompt(tokenizer, "Who is it?", qa=False)
        assert plain.tolist() == tokenizer.encode("Who is it?").tolist()
        for blank in ("\n", " \n"):
            assert encode_prompt(tokenizer, blank).tolist() == [tokenizer.specials["<BOS>"]]


def test_a_model_trained_on_questions_answers_the_prompt(workplace, capsys):
    answers = {"Who are you?": "a tiny model", "What is 2 + 2?": "it is 4", "Why?": "who knows"}
    records = [{"question": q, "answer": a} for q, a in answers.items()] * 40
    Path("qa.json").write_text(json.dumps(records))
    sizes = "--n_embd=32 --n_layer=1 --block_size=48 --batch_size=8 --max_steps=100 --lr_max=2e-2"
    train.main([*TINY_RUN, *sizes.split(), "--data=qa.json", "--eval_every=100"])
    assert capsys.readouterr().out.endswith('best.pt --prompt "Who are you?"\n')
    flags = ["checkpoints/latest.pt", "--temperature=0", "--prompt"]
    for question, answer in answers.items():
        generate.main([*flags, question])
        assert capsys.readouterr().out == f"Question: {question}\nAnswer: {answer}\n"
    generate.main([*flags, "Why?", "--num_samples=2", "--max_tokens=50"])
    text = "Question: Why?\nAnswer: who knows"
    assert capsys.readouterr().out == text + generate.SEPARATOR + text + "\n"
    generate.main([*flags, "Question: Why?\\nAnswer:", "--no-qa", "--max_tokens=10"])
    assert capsys.readouterr().out == text + "\n"


def test_a_blank_question_is_an_error_that_says_how_to_ask(workplace, capsys):
    tokenizer = CharTokenizer.train(["abcdefg"], QA_SPECIALS)
    save_model("model.pt", make_model(), tokenizer)
    for prompt in ([], ["--prompt="], ["--prompt= \\n"]):
        with pytest.raises(UserError) as error:
            generate.main(["model.pt", *prompt])
        assert str(error.value) == (
            'model.pt answers questions: ask one with --prompt "Who are you?", or chat with it: '
            "python explore.py chat model.pt"
        )
    assert capsys.readouterr().out == ""
    generate.main(["model.pt", "--no-qa", "--prompt=", "--max_tokens=3"])


@pytest.mark.parametrize(
    ("contents", "asked"),
    [
        ({}, True),
        ({"finetune": {"objective": "qa"}}, True),
        ({"finetune": {"objective": "chat"}}, True),
        ({"finetune": {"objective": "dpo"}}, True),
        ({"finetune": {"objective": "text"}}, False),
        ({"finetune": {"objective": "qa"}, "merged": {"objective": "text"}}, False),
        ({"finetune": {"objective": "text"}, "merged": {}}, True),  # an adapter of any objective
    ],
)
def test_a_question_model_is_asked_questions_until_it_is_trained_on_text(
    workplace, capsys, contents: dict, asked: bool
):
    tokenizer = CharTokenizer.train(["Question: Answer\n"], QA_SPECIALS)
    save_model("model.pt", make_model(vocab_size=tokenizer.vocab_size), tokenizer, **contents)
    generate.main(["model.pt", "--prompt=no", "--max_tokens=3", "--output_file=out.txt"])
    assert ("Question: no\nAnswer:" in Path("out.txt").read_text()) == asked
    assert ("--no-qa" in Path("out.txt").read_text()) != asked


def test_batches_and_beams_are_written_with_their_settings(trained, capsys):
    generate.main(["--num_samples=3", "--max_tokens=10", "--prompt=the"])
    texts = capsys.readouterr().out.split("\n" + "-" * 40 + "\n")
    assert len(texts) == 3 and all(text.startswith("the") for text in texts)
    generate.main(["--beams=2", "--max_tokens=10", "--prompt=the"])
    best, second = capsys.readouterr().out.split("\n" + "-" * 40 + "\n")
    scores = [float(re.search(r"\[(-\d+\.\d+) per token\]", text)[1]) for text in (best, second)]
    assert scores[0] >= scores[1] and best.startswith("the")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beams=2", "--stream"], "stream has no effect with --beams"),
        (["--beams=2", "--temperature=1"], "temperature has no effect with --beams"),
        (["--beams=2", "--num_samples=3", "--seed=1"], "num_samples has no .*seed has no effect"),
        (["--beams=2", "--top_k=3", "--top_p=0.5"], "top_k has no effect.*top_p has no effect"),
        (["--beams=2", "--min_p=0.1", "--no-cache"], "min_p has no effect.*cache has no effect"),
        (["--beams=2", "--repetition_penalty=2"], "repetition_penalty has no effect with --beams"),
        (["--beams=2", "--compile"], "compile has no effect with --beams"),
        (["--compile", "--no-cache"], "--compile needs the cache"),
        (["--num_samples=1000000000"], "--num_samples 1000000000 with --max_new_tokens 500 takes"),
        (["--max_new_tokens=1000000000000"], "with --max_new_tokens 1000000000000 takes about"),
        (["--beams=1000000000"], "--beams 1000000000 with .* GB: use smaller"),
        (["--output_file=checkpoints"], "checkpoints is a folder: give the name of a file"),
        (["--output_file=data/input.txt/out"], "there is no folder data.input.txt"),
        *[(["--output_file=/proc/out.txt"], "out.txt cannot be written")] * Path("/proc").exists(),
        *[(["--output_file=/dev/null"], "null is not a regular file")] * Path("/dev/null").exists(),
        (["--output_file=" + 300 * "a"], "a cannot be written: "),
        (["--output_file=checkpoints/best.pt"], "best.pt is not an earlier output"),
        (["--output_file=./data/input.txt"], "input.txt is not an earlier output"),
        (["--prompt_file=loop", "--output_file=out.txt"], "loop"),
        (["--prompt_file=data"], "data"),
        (["--prompt_file=checkpoints/best.pt"], "checkpoints.best.pt"),
        (["--stream", "--num_samples=2"], "--stream writes to the terminal"),
        (["--min_p=1", "--beams=-1"], "min_p must be below 1.*beams must be at least 0"),
        (["--top_p=1.5", "--num_samples=0"], "num_samples must be at least 1.*top_p must be at mo"),
        (["--temperature=-1", "--top_k=-3"], "temperature must be at least 0.*top_k must be at l"),
        (["--device=quantum", "--beams=2", "--top_k=3"], "quantum.*top_k has no effect with"),
        (["no.pt"], r"no checkpoint no\.pt: train one with `python train\.py`"),
    ],
)
def test_user_errors_are_reported_before_generating(trained, monkeypatch, flags, message):
    monkeypatch.setattr(generate, "sample_text", pytest.fail)
    (trained / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=message):
        generate.main(flags)


def test_texts_that_cannot_be_written_are_printed(trained, monkeypatch, capsys):
    flags = ["--max_tokens=20", "--num_samples=2", "--seed=1"]
    generate.main(flags)
    texts = capsys.readouterr().out

    monkeypatch.setattr(output, "atomic_write", Mock(side_effect=UserError("the disk is full")))
    with pytest.raises(UserError, match="the disk is full"):
        generate.main([*flags, "--output_file=out.txt"])
    assert texts.strip("\n") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "per_text"),
    [
        # 12 ids; 4 random numbers, strings; objects; cache; activations; logits, sorted
        ({}, 8 * 12 + 88 * 4 + 4000 + 8 * 3 * 10 * 5 * 16 + 4 * 12 * 256 + 4 * 7 + 32 * 7),
        ({"cache": False}, 8 * 12 + 88 * 4 + 4000 + 4 * 12 * 256 + 4 * 12 * 7 + 32 * 7),
        ({"beams": 3}, 8 * 12 + 88 * 4 + 4000 + 2 * 8 * 3 * 10 * 5 * 16 + 4 * 12 * 256 + 36 * 7),
    ],
)
def test_the_memory_of_sampling_by_hand(settings: dict, per_text: int):
    sizes = {"vocab_size": 7, "block_size": 16, "n_layer": 3, "n_embd": 20, "n_inner": 18}
    gpt = GPTConfig(**sizes, n_head=10, n_kv_head=5, head_size=10, mlp="gelu")
    width = 6 * 20 + 2 * 18 + 2 * 100
    config = SampleConfig(max_new_tokens=4, num_samples=1, **settings)
    expected = (per_text + 4 * 12 * (width - 256)) * (config.beams or 1)
    assert sampling_bytes(gpt, config, n_prompt=8) == expected
    if not config.beams:
        config.num_samples = 6
        assert sampling_bytes(gpt, config, n_prompt=8) == 6 * expected
