"""Looks into a trained model, for plots.py: where it attends, how it tells positions apart, which
tokens it holds for alike, what a temperature does.

python plots.py --picture attention --text "To be, or not to be" --layers 0,3
python plots.py --picture positions
python plots.py --picture embeddings
python plots.py --picture temperatures --text "ROMEO:" --temperatures 0.5,1,1.5
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from config import UserError
from generate import adjust_logits, encode_prompt
from model import GPT, LearnedPositions, rotation_angles
from plots import BLACK, BLUE, GREEN, ORANGE, PlotConfig
from tokenizer import Tokenizer
from utils import load_checkpoint

MAP = "cividis"  # dark to light alike for all eyes (Nunez, Anderton and Renslow 2018)
SPACES = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"})  # shown as signs


def draw(path: Path, config: PlotConfig) -> Figure:
    """The picture of a checkpoint that the settings ask for."""
    temperatures = numbers(config.temperatures, "temperatures", float) or [1.0]
    layers, heads = (numbers(getattr(config, name), name, int) for name in ("layers", "heads"))
    model, tokenizer, _ = load_checkpoint(path, torch.device("cpu"))
    if config.picture == "positions":
        return draw_positions(model)
    if config.picture == "embeddings":
        return draw_embeddings(model, tokenizer)
    ids = encode_prompt(tokenizer, config.text)
    if len(ids) > model.config.block_size:
        raise UserError(
            f"--text has {len(ids)} tokens, and the window takes {model.config.block_size}"
        )
    if config.picture == "temperatures":
        return draw_temperatures(model, tokenizer, ids, temperatures)
    layers, heads = layers or range(model.config.n_layer), heads or range(model.config.n_head)
    sizes = {"layers": (layers, model.config.n_layer), "heads": (heads, model.config.n_head)}
    for name, (chosen, n) in sizes.items():
        if max(chosen) >= n:
            raise UserError(f"--{name} must be from 0 to {n - 1}, of the model's {n}")
    return draw_attention(model, tokenizer, ids, layers, heads)


def numbers(text: str, name: str, kind: type) -> list:
    """The numbers of a flag such as 0,3. Raises UserError where they are none."""
    try:
        found = [kind(word) for word in text.split(",") if word]
    except ValueError:
        found = [-1]
    if any(not 0 <= number < math.inf for number in found):
        raise UserError(f"--{name} must be numbers such as 0,1, not {text!r}")
    return found


def labels(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """The tokens as they are shown, spaces and line ends as signs."""
    return [tokenizer.decode([i]).translate(SPACES) for i in ids.tolist()]


@torch.no_grad()
def draw_attention(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, layers: Sequence[int], heads: Sequence[int]
) -> Figure:
    """A map a head, a row of maps a layer: how much each token of a text (T,), down, takes from
    each, across. Rows sum to 1; nobody looks ahead."""
    maps: list[Tensor] = []
    model(ids[None], maps=maps)
    texts = labels(tokenizer, ids) if len(ids) <= 32 else []  # more would not be readable
    side = max(2.6, 0.16 * len(texts))  # inches
    size = (1 + side * len(heads), 0.6 + side * len(layers))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    for layer, row in zip(layers, grid, strict=True):
        for head, axes in zip(heads, row, strict=True):
            image = axes.imshow(maps[layer][0, head].numpy(), cmap=MAP, vmin=0, vmax=1)  # (T, T)
            axes.set_title(f"layer {layer}, head {head}", fontsize=10)
            for set_ticks in (axes.set_xticks, axes.set_yticks):
                set_ticks(range(len(texts)), texts, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=grid, label="share of attention", shrink=0.6)
    figure.supxlabel("looked at", fontsize=10)
    figure.supylabel("looking", fontsize=10)
    return figure


@torch.no_grad()
def draw_positions(model: GPT) -> Figure:
    """How the encodings of positions, at the size of a model, tell them apart: sinusoidal ones,
    RoPE's turns, and those that the model has learned, if it has."""
    config = model.config
    T = config.block_size
    figure = Figure(figsize=(8, 7), layout="constrained")
    (above, above_right), (below, below_right) = figure.subplots(2, 2)

    angle = rotation_angles(T, config.n_embd)[:, : config.n_embd // 2]  # (T, C/2)
    sinusoidal = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (T, C)
    draw_map(above, sinusoidal, "sinusoidal positions")
    above.set(xlabel="channel", ylabel="position")
    draw_alike(above_right, sinusoidal, "sinusoidal")

    angle = rotation_angles(T, config.head_size, config.rope_theta)  # (T, D/2)
    last = angle.size(1) - 1
    some = (last // 4, last // 2, last)
    for pair, color, style in zip(some, (ORANGE, GREEN, BLUE), (":", "--", "-."), strict=True):
        turned = angle[:, pair].cos().numpy()
        below.plot(turned, color=color, linestyle=style, label=f"pair {pair} of channels")
    below.plot(angle.cos().mean(dim=1).numpy(), color=BLACK, label="all pairs")
    below.set_title("RoPE: product of two equal vectors", fontsize=10)
    below.set(xlabel="distance", ylabel="share that is left")
    below.grid(alpha=0.3)
    below.legend(fontsize=8, loc="lower left", framealpha=1)

    if isinstance(model.pos, LearnedPositions):
        draw_alike(below_right, model.pos.table.weight, "learned")
    else:
        below_right.set_axis_off()
        below_right.text(0.1, 0.5, "this model learned no positions\n(--pos learned would)")
    return figure


def draw_alike(axes: Axes, table: Tensor, name: str) -> None:
    """How alike each two positions are whose vectors are table (T, C)."""
    vectors = F.normalize(table, dim=1)
    draw_map(axes, vectors @ vectors.T, f"{name}: cosine of two positions")  # (T, T)
    axes.set(xlabel="position", ylabel="position")


def draw_map(axes: Axes, numbers: Tensor, title: str) -> None:
    """Numbers from -1 to 1, (rows, columns), as colours."""
    image = axes.imshow(
        numbers.numpy(), aspect="auto", interpolation="nearest", cmap=MAP, vmin=-1, vmax=1
    )
    axes.figure.colorbar(image, ax=axes)
    axes.set_title(title, fontsize=10)


@torch.no_grad()
def draw_embeddings(model: GPT, tokenizer: Tokenizer, most: int = 150) -> Figure:
    """The vectors of the tokens in the two directions in which they differ most (principal
    components, Pearson 1901), of the first `most` tokens that can be shown."""
    texts = labels(tokenizer, torch.arange(model.config.vocab_size))
    shown = [i for i, text in enumerate(texts) if text.isprintable() and "\ufffd" not in text]
    shown = shown[:most]
    points, shares = principal_components(F.normalize(model.tok.weight[shown]))
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "vowels": (ORANGE, lambda text: text.islower() and text.strip("\u2423")[:1] in "aeiou"),
        "other small letters": (BLUE, str.islower),
        "capitals": (GREEN, lambda text: text[:1].isupper()),
        "others": (BLACK, lambda text: True),
    }
    axes.scatter(*points.T.numpy(), alpha=0)  # for the limits of the axes
    for i, (x, y) in zip(shown, points.tolist(), strict=True):
        color = next(color for color, holds in kinds.values() if holds(texts[i]))
        place = {"ha": "center", "va": "center", "color": color}
        axes.text(x, y, texts[i], **place, fontsize=12, parse_math=False)
    for name, (color, _) in kinds.items():
        axes.plot([], [], "s", color=color, label=name)
    axes.legend()
    axes.set(xlabel=f"first component, {shares[0]:.0%} of the variance")
    axes.set(ylabel=f"second component, {shares[1]:.0%} of the variance")
    axes.set_title("token embeddings", fontsize=10)
    return figure


def principal_components(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (N, C) in the two directions of their largest variance, (N, 2), and the shares of the
    whole variance that these have, (2,)."""
    centred = vectors - vectors.mean(dim=0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T, (sizes**2 / (sizes**2).sum())[:2]


@torch.no_grad()
def draw_temperatures(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, temperatures: Sequence[float], most: int = 20
) -> Figure:
    """The distribution of the token after a text (T,), its likeliest tokens at several
    temperatures, with the entropy that these have."""
    logits = model(ids[None])[0][:, -1]  # (1, V)
    figure = Figure(figsize=(8, 1.2 + 1.5 * len(temperatures)), layout="constrained")
    rows = figure.subplots(len(temperatures), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    tokens = adjust_logits(logits)[1][0, :most]
    for temperature, axes in zip(temperatures, rows, strict=True):
        probs, _ = adjust_logits(logits, temperature)  # (1, V), sorted; (1, 1) at temperature 0
        entropy = -torch.xlogy(probs, probs).sum()
        heights = F.pad(probs[0], (0, most))[: len(tokens)]
        axes.bar(range(len(tokens)), heights.tolist(), color=BLUE)
        text = f"temperature {temperature:g}: entropy {entropy:.2f} nats"
        axes.text(0.99, 0.85, text, ha="right", va="top", transform=axes.transAxes)
        axes.grid(alpha=0.3, axis="y")
    rows[-1].set_xticks(range(len(tokens)), labels(tokenizer, tokens), parse_math=False)
    rows[-1].set_xlabel("next token, likeliest first")
    rows[0].set_title(f"after {tokenizer.decode(ids.tolist())!r}", fontsize=10, parse_math=False)
    figure.supylabel("probability", fontsize=10)
    return figure
