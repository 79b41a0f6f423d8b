"""The numbers in each figure against independent computations, and damaged logs."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import COMPONENTS, TINY_RUN, make_model
from matplotlib import font_manager

import plots
import train
from config import ARCHS
from corpus.bpe import count_pieces, train_bpe
from model import rotate
from plots import read_run
from system.settings import UserError
from tokenizer import CharTokenizer
from viz import internals
from viz.curve import Run, plot_runs
from viz.fonts import drawable

TOKENIZER = CharTokenizer.train(["\n abcdefghi"])  # 11 characters, make_model's vocab_size
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


# --- runs


@pytest.mark.parametrize(
    ("x", "at"), [("step", [0, 100, 200]), ("tokens", [0, 0.1, 0.2]), ("time", [0, 0.5, 1.0])]
)
def test_several_runs_share_their_axes_and_have_a_verdict_each(x, at):
    """100 steps of 5 x 2 windows of 100 tokens are 100,000 tokens."""
    falls, rises = log([4.2, 2, 1.5], [4.2, 2.1, 1.8]), log([4.2, 2, 1], [4.2, 2.2, 2.5])
    figure = plot_runs([Run("a", SETTINGS, falls), Run("b", SETTINGS, rises)], x)
    losses, rates, norms = figure.axes
    solid = [line for line in losses.lines if line.get_linestyle() == "-"]
    dashed = [line for line in losses.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in solid] == [pytest.approx(at)] * 2
    assert [list(line.get_ydata()) for line in solid] == [[4.2, 2.1, 1.8], [4.2, 2.2, 2.5]]
    assert [list(line.get_ydata()) for line in dashed] == [[4.2, 2, 1.5], [4.2, 2, 1]]
    assert len({line.get_color() for line in solid}) == 2
    assert len(rates.lines) == len(norms.lines) == 2
    names = [text.get_text() for text in losses.get_legend().get_texts()]
    assert names == ["a: 1.8000 at step 200", "b: 2.2000 at step 100"]
    words = losses.get_title(loc="left")
    assert "a: healthy: best at step 200" in words
    assert "b: overfitting since step 100" in words


@pytest.mark.parametrize("info", [{"questions": 9}, {}])
def test_tokens_of_padded_records_are_not_counted(workplace, monkeypatch, info: dict):
    records = [r | {"tokens_per_second": 9.0 if info else None} for r in log([4.2, 2], [4.2, 2])]
    run = Run("a", SETTINGS | {"corpus": {"name": "qa"} | info}, records)
    monkeypatch.setattr(plots, "read_run", lambda path: run)
    with pytest.raises(UserError, match="a: its records have padding; use --x step or --x time"):
        plots.main(["a", "--x=tokens"])


def steps(losses: list[float]) -> list[dict]:
    """Records of training steps 20, 40, ..., with a learning rate that rises until step 60."""
    return [
        {"step": 20 * i, "loss": loss, "lr": 1e-3 * min(i, 3), "seconds": 6.0 * i, "grad_norm": 2.0}
        for i, loss in enumerate(losses, 1)
    ]


def test_the_curve_shows_training_steps_and_the_learning_rate_at_each_of_them():
    trained = steps([4.1, 3.5, 3.0, 2.6, 2.3, 2.1, 2.0, 1.9, 1.8, 1.7])
    run = Run("a", SETTINGS, log([4.2, 2.0, 1.5], [4.2, 2.2, 1.8]), steps=trained)
    losses, rates, norms = plot_runs([run], "time").axes
    thin, *_ = losses.lines
    assert list(thin.get_xdata()) == pytest.approx([0.1 * i for i in range(1, 11)])  # minutes
    assert list(thin.get_ydata()) == [step["loss"] for step in trained]
    (rate,) = rates.lines
    by_time = {round(t, 6): lr for t, lr in zip(rate.get_xdata(), rate.get_ydata(), strict=True)}
    assert max(by_time.values()) == by_time[0.3] == 3e-3 and by_time[0.1] == 1e-3
    assert len(norms.lines[0].get_xdata()) == 13  # with three evaluations


def test_no_straight_line_leads_from_an_evaluation_above_the_plot():
    """With two evaluations, it would look as if the loss fell by equal amounts all the time."""
    run = Run("a", SETTINGS, log([4.2, 1.5], [4.2, 1.8]), steps=steps([4.1, 2.5, 2.0, 1.7, 1.6]))
    validation = "validation loss, best: 1.8000 at step 100"

    def drawn(run: Run) -> dict[str, list]:
        lines = plot_runs([run]).axes[0].lines
        return {str(line.get_label()): list(line.get_ydata()) for line in lines}

    assert drawn(run)[validation] == [1.8]
    assert drawn(run)["training loss at evaluations"] == [1.5]
    run.steps = []  # of an older version: there is no other line
    assert drawn(run)[validation] == [4.2, 1.8]
    run.steps, run.log = steps([1e6] * 5), log([1e6, 1e6], [1e6, 1e6])
    assert 1e6 in drawn(run)["validation loss, best: 1000000.0000 at step 0"]


def test_the_range_of_the_curve_is_that_of_the_losses_after_the_first_tenth():
    run = Run("a", SETTINGS, log([4.2, 2.0, 1.5], [4.2, 2.2, 1.8]), steps=steps([4.1, 3.0, 2.5]))
    low, high = plot_runs([run]).axes[0].get_ylim()
    # 4.1 is of step 20, the last of the first tenth; 5 percent of 1.5 to 3.0 on both sides
    assert (low, high) == pytest.approx((1.5 - 0.075, 3.0 + 0.075))
    diverged = log([4.2, 2.0, 1e6], [4.2, 2.0, 1e6])
    assert 4.2 < plot_runs([Run("a", SETTINGS, diverged)]).axes[0].get_ylim()[1] < 6
    memorized = log([4.2, 0.1, 0.1], [4.2, 5.0, 7.0])  # the last point is always in the picture
    assert 7.0 < plot_runs([Run("a", SETTINGS, memorized)]).axes[0].get_ylim()[1] < 8


def test_the_loss_of_a_uniform_guess_is_a_line_if_it_is_in_the_range():
    def labels(losses: list[float]) -> str:
        axes = plot_runs([Run("a", SETTINGS, log(losses, losses))]).axes[0]
        return " ".join(text.get_text() for text in axes.get_legend().get_texts())

    assert "uniform guess: 4.17" in labels([4.2, 4.3, 4.0])  # ln 65
    assert "uniform" not in labels([4.2, 2.0, 1.5])
    both = [Run("a", SETTINGS | {"vocab_size": n}, log([4.2, 5, 2], [4.2, 5, 2])) for n in (65, 20)]
    dotted = [line for line in plot_runs(both).axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in dotted] == [math.log(20), math.log(65)]


def test_many_training_steps_are_thinned_out():
    trained = [{"step": i, "loss": 2.0, "lr": 1e-3, "seconds": 1.0 * i} for i in range(1, 9002)]
    run = Run("a", SETTINGS, log([4.2, 2.0], [4.2, 2.0]), steps=trained)
    assert len(plot_runs([run]).axes[0].lines[0].get_xdata()) == 9001 // 5 + 1


def test_a_run_is_read_from_its_folder_and_from_its_checkpoint(workplace):
    train.main([*TINY_RUN, "--tag=a"])
    folder, checkpoint = (read_run(workplace / "checkpoints" / "a" / n) for n in ("", "latest.pt"))
    lines = (workplace / "checkpoints" / "a" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[1:-1]]
    assert folder.log == checkpoint.log == [record for record in records if "val" in record]
    assert folder.steps == [record for record in records if "val" not in record]
    assert [record["step"] for record in folder.steps] == [10, 20] and not checkpoint.steps
    assert {"final": folder.final} == json.loads(lines[-1]) and not checkpoint.final
    assert plots.main(["--picture=attention", "--text=the dog", "--output_file=maps.svg"]) == 0
    assert (workplace / "maps.svg").read_bytes().startswith(b"<?xml")
    assert plots.main(["--inside=the dog", "--output_file=inside.svg"]) == 0
    for picture in plots.PICTURES:
        assert plots.main(["checkpoints/a/best.pt", f"--picture={picture}", "--text=the"]) == 0
        assert (workplace / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_slow_packages_are_imported_only_where_they_are_used():
    code = "import sys, prepare; assert 'torch' not in sys.modules; "  # it takes seconds
    code += "import plots, train; assert 'matplotlib' not in sys.modules"  # half a second
    subprocess.run([sys.executable, "-c", code], cwd=Path(plots.__file__).parent, check=True)


# --- models


def test_attention_maps_are_the_softmax_of_the_selected_heads():
    model, ids = make_model(), torch.tensor([1, 4, 2, 9])
    figure = internals.plot_attention(model, TOKENIZER, ids, layers=[1], heads=[0, 1])
    grid = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in grid] == ["layer 1, head 0", "layer 1, head 1"]
    attn = model.blocks[1].attn
    seen: list[tuple] = []
    attn.qkv.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(ids[None])
    (x,) = seen[0]  # (1, T, C)
    angle = torch.arange(4)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)  # (T, D/2)
    q, k, _ = (t.view(1, 4, 2, 8).transpose(1, 2) for t in attn.qkv(x).split(16, dim=-1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    q, k = (rotate(t, angle.cos(), angle.sin()) for t in (q, k))
    scores = (q @ k.transpose(-2, -1) / 8**0.5).exp().tril()
    wanted = (scores / scores.sum(dim=-1, keepdim=True)).detach().numpy()[0]
    for head, axes in enumerate(grid):
        np.testing.assert_allclose(axes.images[0].get_array(), wanted[head], atol=1e-5)
    ticks = [text.get_text() for text in grid[0].get_xticklabels()]
    assert ticks == ["␣", "c", "a", "h"]


@pytest.mark.parametrize("config", COMPONENTS, ids=str)
def test_the_lens_is_the_prediction_of_a_model_without_the_later_blocks(config):
    model, ids = make_model(**config), torch.tensor([1, 4, 2, 9, 4])
    lens = internals.logit_lens(model, ids)
    probability, entropy = internals.surprise(model, ids)
    logits = model(ids[None])[0][0, :-1]
    predicted = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(probability, predicted.log_prob(ids[1:]).exp(), atol=1e-5)
    assert torch.allclose(entropy, predicted.entropy(), atol=1e-4)
    while model.blocks:
        expected = model(ids[None])[0][0].softmax(dim=-1)
        assert torch.allclose(lens[len(model.blocks) - 1], expected, atol=1e-5)
        del model.blocks[-1]


def test_a_picture_shows_how_each_token_is_predicted():
    model, ids = make_model(), torch.tensor([1, 4, 2, 9])
    figure = internals.plot_inside(model, TOKENIZER, ids, layers=[1], heads=[0, 1])
    top, middle, _, attention = figure.axes
    maps: list[torch.Tensor] = []
    probs = model(ids[None], maps=maps)[0][0, :-1].softmax(dim=-1).detach().numpy()
    np.testing.assert_allclose(top.images[0].get_array()[1], probs.max(axis=1), atol=1e-5)
    guesses = internals.token_labels(TOKENIZER, torch.from_numpy(probs.argmax(axis=1)))
    assert [text.get_text() for text in top.texts[3:]] == guesses
    heights = [bar.get_height() for bar in middle.patches]
    np.testing.assert_allclose(heights, -np.log(probs[range(3), ids[1:]]), atol=1e-4)
    wanted = maps[1][0].mean(dim=0).detach().numpy()
    np.testing.assert_allclose(attention.images[0].get_array(), wanted, atol=1e-5)


def test_position_encodings_match_their_formulas():
    model = make_model(**ARCHS["gpt2"], block_size=12, n_embd=16)
    figure = internals.plot_positions(model)
    by_title = {axes.get_title(): axes for axes in figure.axes}
    # sin and cos of t / 10000^(2i/16)
    table = by_title["sinusoidal encoding"].images[0].get_array()
    assert table[5, 0] == pytest.approx(math.sin(5), abs=1e-6)
    assert table[5, 3] == pytest.approx(math.cos(5 / 10000 ** (2 / 16)), abs=1e-6)
    a, b = model.pos.table.weight.detach().numpy()[[2, 7]]
    cosine = by_title["similarity of learned positions"].images[0].get_array()[2, 7]
    assert cosine == pytest.approx(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), abs=1e-5)
    lines = {line.get_label(): line for line in by_title["RoPE: two equal vectors"].lines}
    # the same vector at positions 0 and 7; each of its channel pairs has length 1
    angle = 7 / 10000 ** (np.arange(0, 8, 2) / 8)
    x = torch.cat([torch.ones(4), torch.zeros(4)])
    turned = rotate(x[None], *(torch.tensor(f(angle)).float() for f in (np.cos, np.sin)))
    similarity = lines["all channel pairs"].get_ydata()[7]
    assert similarity == pytest.approx(float(turned @ x) / 4, abs=1e-5)
    titles = {axes.get_title() for axes in internals.plot_positions(make_model()).axes}
    assert "similarity of sinusoidal positions" in titles
    assert "similarity of learned positions" not in titles


def test_embeddings_are_plotted_at_their_principal_components():
    vectors = torch.randn(50, 8) * torch.tensor([5.0, 3, 1, 1, 1, 1, 1, 1])
    points, shares = internals.principal_components(vectors)
    values, directions = np.linalg.eigh(np.cov(vectors.numpy().T))  # ascending
    wanted = (vectors - vectors.mean(dim=0)).numpy() @ directions[:, :-3:-1]
    np.testing.assert_allclose(points.abs().numpy(), np.abs(wanted), atol=1e-3)
    np.testing.assert_allclose(shares.numpy(), values[:-3:-1] / values.sum(), rtol=1e-3)
    figure = internals.plot_embeddings(make_model(), TOKENIZER)
    assert [text.get_text() for text in figure.axes[0].texts] == ["↵", "␣", *"abcdefghi"]
    assert len(figure.axes[0].get_legend().get_texts()) == len(internals.TOKEN_GROUPS)
    digits = internals.plot_embeddings(make_model(), CharTokenizer.train(["0123456789\n"]))
    assert digits.axes[0].get_legend() is None


def test_labels_are_of_characters_that_fonts_have(monkeypatch, capsys):
    """DejaVu Serif also has a bold A, and the order of the fonts is not known."""
    fonts = [f for f in font_manager.fontManager.ttflist if f.name in "DejaVu Sans, STIXGeneral"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    run = Run("日", SETTINGS | {"corpus": {"name": "日"}}, log([4.2, 2], [4.2, 2]))
    with matplotlib.rc_context():
        assert drawable(["a"]) == ["a"] and not capsys.readouterr().err
        assert drawable(["a日\U0001d400"]) == ["a\\u65e5\U0001d400"]
        assert matplotlib.rcParams["font.family"] == ["sans-serif", "DejaVu Sans", "STIXGeneral"]
        axes = plot_runs([run]).axes[0]
    assert axes.get_title(loc="left").startswith("\\u65e5, 3 layers")
    assert capsys.readouterr().err.count("without an installed font") == 1


def test_only_printable_tokens_are_plotted():
    tokenizer = train_bpe(count_pieces(["the then they " * 9]), 260)
    model = make_model(vocab_size=tokenizer.vocab_size)
    texts = [text.get_text() for text in internals.plot_embeddings(model, tokenizer).axes[0].texts]
    assert {"↵", "␣", "A", "th"} <= set(texts) and not any("\ufffd" in text for text in texts)


def test_bars_are_the_softmax_at_each_temperature():
    model, ids = make_model(), torch.tensor([3, 1, 4])
    logits = model(ids[None])[0][0, -1].detach().double().numpy()
    figure = internals.plot_temperatures(model, TOKENIZER, ids, [0.0, 0.5, 2.0])
    for axes, temperature in zip(figure.axes[1:], (0.5, 2.0), strict=True):
        probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        heights = [bar.get_height() for bar in axes.patches]
        np.testing.assert_allclose(heights, sorted(probs, reverse=True), rtol=1e-4)
        entropy = -(probs * np.log(probs)).sum()
        assert f"temperature {temperature:g}: entropy {entropy:.2f}" in axes.texts[0].get_text()
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1.0] + [0.0] * 10
    ticks = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert ticks[0] == internals.token_labels(TOKENIZER, torch.tensor([logits.argmax()]))[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere is not the folder of a run"),
        (["--output_file=a.jpg"], "in .png or .svg"),
        (["--output_file=photo.png"], "photo.png is not an earlier output"),
        (["--output_file=no/a.png"], "there is no folder no"),
        (["--picture=positions"], r"positions\.png is a folder"),
        (["a", "b", "--picture=positions"], "takes one checkpoint, not 2"),
        (["--picture=attention", "--heads=first"], "must be lists of numbers: .*'first'"),
        (["--layers=-1"], "must be finite and at least 0"),
        (["--temperatures=inf", "--output_file=a.jpg"], r"\.svg.*must be finite and at least 0"),
    ],
)
def test_invalid_settings_are_reported_together(workplace, flags, message):
    Path("positions.png").mkdir()
    Path("photo.png").write_text("a photo")
    with pytest.raises(UserError, match=message):
        plots.main(flags)


def test_what_does_not_fit_the_model_is_reported(trained):
    with pytest.raises(UserError, match="--layers must be from 0 to 0: the model has 1"):
        plots.main(["--picture=attention", "--text=the", "--layers=0,7"])
    with pytest.raises(UserError, match="--heads must be from 0 to 1: the model has 2"):
        plots.main(["--picture=attention", "--text=the", "--heads=2"])
    with pytest.raises(UserError, match="160 tokens, but the window is 16"):
        plots.main(["--picture=temperatures", "--text=" + 40 * "the "])
    with pytest.raises(UserError, match="needs two tokens"):
        plots.main(["--inside=t"])


# --- damaged logs: what can be read is plotted, anything else is one line that says what is wrong

LINES = [json.dumps(SETTINGS), *map(json.dumps, log([2.0] * 4, [2.0] * 4))]
LINES.insert(3, json.dumps(steps([2.0])[0]))


def test_a_log_whose_last_line_is_cut_off_is_read(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text("\n".join(LINES)[:-9])
    run = read_run(tmp_path)
    assert [record["step"] for record in run.log] == [0, 100, 200]
    assert plot_runs([Run("a", SETTINGS, run.log[:1])]).axes  # one evaluation is enough


def test_damage_is_one_error_line_or_leaves_a_valid_run(tmp_path: Path):
    rng = random.Random(1)
    values = [None, "x", [], {}, True, -1, float("nan"), float("inf"), 1e300, 10**400]
    for trial in range(200):
        lines = list(LINES)
        i = rng.randrange(len(lines))
        entries = json.loads(lines[i])
        entries[rng.choice(list(entries))] = rng.choice(values)
        lines[i] = rng.choice([json.dumps(entries), lines[i][: rng.randrange(40)], "[[", "7"])
        (tmp_path / "log.jsonl").write_text("\n".join(lines))
        try:
            run = read_run(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(record["val"], (int, float)) for record in run.log)
            assert all(isinstance(record["loss"], (int, float)) for record in run.steps)
            if trial % 10 == 0:
                plot_runs([run])


@pytest.mark.parametrize("text", ["", "\n", "null", "\0", '{"n_layer": 1}\n'])
def test_a_log_without_evaluations_is_an_error(tmp_path: Path, text: str):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match="cannot be plotted"):
        read_run(tmp_path)
