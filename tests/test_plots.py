"""The verdict in words, on curves made to have one; pictures by the numbers that stand in them."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_model

import pictures
import plots
import train
from config import ARCHS, UserError
from model import rotate
from plots import Run, draw_runs, read_run, save_figure, verdict
from tokenizer import BPETokenizer, CharTokenizer, count_pieces

TOKENIZER = CharTokenizer.train(["\n abcdefghi"])  # as many as make_model knows
SETTINGS = {"vocab_size": 65, "batch_size": 5, "grad_accum": 2, "block_size": 100}
SETTINGS |= {"corpus": {"name": "poems"}, "n_layer": 3, "n_embd": 48}


def log(train: list[float], val: list[float]) -> list[dict]:
    """Records of evaluations at steps 0, 100, 200, ..., half a minute each."""
    pairs = enumerate(zip(train, val, strict=True))
    return [
        {"step": 100 * i, "train": t, "val": v, "lr": 1e-3, "seconds": 30.0 * i}
        | {"grad_norm": None if i == 0 else 1.0}
        for i, (t, v) in pairs
    ]


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ([4.17, 2.5, 2.0, 1.7], [4.17, 2.5, 2.1, 1.8], "healthy: best at step 300; more steps"),
        (
            [4.17, 2.2, 1.7, 1.3],
            [4.17, 2.3, 1.9, 1.7],
            "healthy: best at step 300; validation lies",
        ),
        ([4.17, 2.2, 1.7, 1.2], [4.17, 2.2, 1.8, 2.0], "overfitting since step 200, the best"),
        ([4.17, 2.0, 1.9, 1.9, 1.9], [4.17, 2.1, 2.0, 2.0, 2.0], "plateaued since about step 200"),
        ([4.17, 2.0, 2.5, 3.9], [4.17, 2.1, 2.6, 4.0], "diverging since step 100: lower --lr_max"),
        ([4.2, 4.17, 4.17, 4.16], [4.2, 4.17, 4.17, 4.17], "not moving from ln(V) = 4.17"),
        ([4.17, 3.0], [4.17, 3.0], "too short to judge"),
    ],
)
def test_verdict(train: list[float], val: list[float], words: str):
    assert words in verdict(log(train, val), vocab_size=65)
    assert math.log(65) == pytest.approx(4.174, abs=1e-3)


# --- runs


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_curve_is_drawn_from_the_first_record_on(tmp_path, suffix):
    records = log([4.17, 2.0, 1.5], [4.2, 2.1, 1.8])
    for n in (1, 3):
        path = tmp_path / f"curve.{suffix}"
        save_figure(draw_runs([Run("a", SETTINGS, records[:n])]), path)
        assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


@pytest.mark.parametrize(
    ("x", "at"),
    [("step", [0, 100, 200]), ("tokens", [0, 0.1, 0.2]), ("time", [0, 0.5, 1.0])],
)
def test_runs_lie_over_each_other_with_their_verdicts(x, at):
    """100 steps of 5 x 2 windows of 100 tokens are 100,000 tokens."""
    falls, rises = log([4.2, 2, 1.5], [4.2, 2.1, 1.8]), log([4.2, 2, 1], [4.2, 2.2, 2.5])
    figure = draw_runs([Run("a", SETTINGS, falls), Run("b", SETTINGS, rises)], x)
    losses, rates, norms = figure.axes
    lines = {
        style: [line for line in losses.lines if line.get_linestyle() == style]
        for style in ("-", "--")
    }
    assert [list(line.get_xdata()) for line in lines["-"]] == [pytest.approx(at)] * 2
    assert [list(line.get_ydata()) for line in lines["-"]] == [[4.2, 2.1, 1.8], [4.2, 2.2, 2.5]]
    assert [list(line.get_ydata()) for line in lines["--"]] == [[4.2, 2, 1.5], [4.2, 2, 1]]
    assert len({line.get_color() for line in lines["-"]}) == 2
    assert len(rates.lines) == len(norms.lines) == 2
    names = [text.get_text() for text in losses.get_legend().get_texts()]
    assert names == ["a: 1.8000 at step 200", "b: 2.2000 at step 100"]
    words = losses.get_title(loc="left")
    assert "a: healthy: best at step 200" in words
    assert "b: overfitting since step 100" in words


def test_a_run_is_read_from_its_folder_and_from_its_checkpoint(workplace):
    train.main([*TINY_RUN, "--tag=a"])
    folder, checkpoint = (read_run(workplace / "checkpoints" / "a" / n) for n in ("", "latest.pt"))
    lines = (workplace / "checkpoints" / "a" / "log.jsonl").read_text().splitlines()
    assert folder.log == checkpoint.log == [json.loads(line) for line in lines[1:-1]]
    assert folder.tokens_a_step == checkpoint.tokens_a_step == 4 * 16
    assert plots.main(["--picture=attention", "--text=the dog", "--output_file=maps.svg"]) == 0
    assert (workplace / "maps.svg").read_bytes().startswith(b"<?xml")
    for picture in plots.PICTURES:
        assert plots.main(["checkpoints/a/best.pt", f"--picture={picture}", "--text=the"]) == 0
        assert (workplace / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


# --- models


def test_attention_maps_are_those_of_the_heads_asked_for():
    model, ids = make_model(), torch.tensor([1, 4, 2, 9])
    figure = pictures.draw_attention(model, TOKENIZER, ids, layers=[1], heads=[0, 1])
    grid = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in grid] == ["layer 1, head 0", "layer 1, head 1"]
    seen: list[torch.Tensor] = []  # what goes into the second layer's queries and keys
    model.blocks[1].attn.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(ids[None])
    x, (cos, sin), *_ = seen[0]
    attn = model.blocks[1].attn
    q, k, _ = (part.view(1, 4, 2, 8).transpose(1, 2) for part in attn.qkv(x).split(16, dim=-1))
    q, k = rotate(attn.q_norm(q), cos, sin), rotate(attn.k_norm(k), cos, sin)
    scores = (q @ k.transpose(-2, -1) / 8**0.5).exp().tril()
    wanted = (scores / scores.sum(dim=-1, keepdim=True)).detach().numpy()[0]
    for head, axes in enumerate(grid):
        np.testing.assert_allclose(axes.images[0].get_array(), wanted[head], atol=1e-5)
    ticks = [text.get_text() for text in grid[0].get_xticklabels()]
    assert ticks == ["␣", "c", "a", "h"]


def test_positions_are_told_apart_by_distance():
    model = make_model(**ARCHS["gpt2"], block_size=12, n_embd=16)
    figure = pictures.draw_positions(model)
    by_title = {axes.get_title(): axes for axes in figure.axes}
    table = (
        by_title["sinusoidal positions"].images[0].get_array()
    )  # sin and cos of t / 10000^(2i/16)
    assert table[5, 0] == pytest.approx(math.sin(5), abs=1e-6)
    assert table[5, 3] == pytest.approx(math.cos(5 / 10000 ** (2 / 16)), abs=1e-6)
    a, b = model.pos.table.weight.detach().numpy()[[2, 7]]
    cosine = by_title["learned: cosine of two positions"].images[0].get_array()[2, 7]
    assert cosine == pytest.approx(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), abs=1e-5)
    lines = {
        line.get_label(): line for line in by_title["RoPE: product of two equal vectors"].lines
    }
    # two equal vectors whose pairs of channels are all of length 1, one turned seven steps on
    angle = 7 / 10000 ** (np.arange(0, 8, 2) / 8)
    x = torch.cat([torch.ones(4), torch.zeros(4)])
    turned = rotate(x[None], *(torch.tensor(f(angle)).float() for f in (np.cos, np.sin)))
    assert lines["all pairs"].get_ydata()[7] == pytest.approx(float(turned @ x) / 4, abs=1e-5)
    assert "learned" not in {
        axes.get_title() for axes in pictures.draw_positions(make_model()).axes
    }


def test_embeddings_lie_along_their_principal_components():
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) @ torch.diag(
        torch.tensor([5.0, 3.0, 1, 1, 1, 1, 1, 1])
    )
    points, shares = pictures.principal_components(vectors)
    values, directions = np.linalg.eigh(np.cov(vectors.numpy().T))  # ascending
    wanted = (vectors - vectors.mean(dim=0)).numpy() @ directions[:, :-3:-1]
    np.testing.assert_allclose(points.abs().numpy(), np.abs(wanted), atol=1e-3)
    np.testing.assert_allclose(shares.numpy(), values[:-3:-1] / values.sum(), rtol=1e-3)
    figure = pictures.draw_embeddings(make_model(), TOKENIZER)
    assert [text.get_text() for text in figure.axes[0].texts] == ["↵", "␣", *"abcdefghi"]


def test_only_tokens_that_are_text_are_shown():
    tokenizer = BPETokenizer.train(count_pieces(["the then they " * 9]), 260)
    model = make_model(vocab_size=tokenizer.vocab_size)
    texts = [text.get_text() for text in pictures.draw_embeddings(model, tokenizer).axes[0].texts]
    assert {"↵", "␣", "A", "th"} <= set(texts) and not any("\ufffd" in text for text in texts)


def test_bars_are_the_softmax_at_each_temperature():
    model, ids = make_model(), torch.tensor([3, 1, 4])
    logits = model(ids[None])[0][0, -1].detach().double().numpy()
    figure = pictures.draw_temperatures(model, TOKENIZER, ids, [0.0, 0.5, 2.0])
    for axes, temperature in zip(figure.axes[1:], (0.5, 2.0), strict=True):
        probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        heights = [bar.get_height() for bar in axes.patches]
        np.testing.assert_allclose(heights, sorted(probs, reverse=True), rtol=1e-4)
        entropy = -(probs * np.log(probs)).sum()
        assert f"temperature {temperature:g}: entropy {entropy:.2f}" in axes.texts[0].get_text()
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1.0] + [0.0] * 10
    ticks = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert ticks[0] == pictures.labels(TOKENIZER, torch.tensor([logits.argmax()]))[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere is not the folder of a run"),
        (["--output_file=a.jpg", "--picture=cube"], "must end in .png or .svg.*|picture must be"),
        (["a", "b", "--picture=positions"], "is of one checkpoint, not 2"),
        (
            ["--picture=attention", "--text=the", "--layers=0,7"],
            "layers must be from 0 to 0, of the model's 1",
        ),
        (["--picture=attention", "--heads=first"], "heads must be numbers such as 0,1"),
        (
            ["--picture=temperatures", "--text=" + 40 * "the "],
            "160 tokens, and the window takes 16",
        ),
    ],
)
def test_mistakes_are_one_line(workplace, flags, message):
    train.main([*TINY_RUN, "--max_steps=1"])
    with pytest.raises(UserError, match=message):
        plots.main(flags)
