"""Plots of a trained model: predictions, attention weights, position encodings, token embeddings,
and the effect of temperature on the next token. `python plots.py --picture ...` draws them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import adjust_logits
from model import GPT, AttentionContext, LearnedPositions, rotation_angles
from sampling.text import encode_prompt, last_trained_on_text
from system.settings import UserError
from tokenizer import Tokenizer
from utils import load_checkpoint
from viz.curve import BLACK, BLUE, GREEN, ORANGE, new_figure
from viz.fonts import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Equally readable for color-blind people (Nunez, Anderton and Renslow 2018).
COLOR_MAP = "cividis"
# Visible characters for whitespace: open box, return arrow, tab arrow.
VISIBLE_SPACES = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"})
MAX_TICK_LABELS = 32  # more tokens than that are not readable along an axis
MAP_INCHES, TOKEN_INCHES = 2.6, 0.16  # smallest side of an attention map; per labeled token
CENTERED: dict[str, Any] = {"ha": "center", "va": "center", "parse_math": False}
MAX_EMBEDDINGS = 150  # tokens in the plot of embeddings
MAX_BARS = 20  # tokens in the plot of temperatures
# Groups of tokens by color; a token is in the first group that contains it.
TOKEN_GROUPS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "vowels": (ORANGE, lambda text: text.islower() and text.strip("\u2423")[:1] in "aeiou"),
    "other lowercase": (BLUE, str.islower),
    "uppercase": (GREEN, lambda text: text[:1].isupper()),
    "other": (BLACK, lambda text: True),
}


def plot_internals(
    path: Path,
    picture: str,
    text: str,
    layers: Sequence[int],
    heads: Sequence[int],
    temperatures: Sequence[float],
) -> "Figure":
    """The figure `picture` of a checkpoint: one of plots.PICTURES except runs.

    Empty `layers` or `heads` select all, empty `temperatures` are 1. Raises UserError if the text
    does not fit in the window, or if the model has no such layer or head.
    """
    model, tokenizer, state = load_checkpoint(path, torch.device("cpu"))
    if picture == "positions":
        return plot_positions(model)
    if picture == "embeddings":
        return plot_embeddings(model, tokenizer)
    config = model.config
    ids = encode_prompt(tokenizer, text, qa=not last_trained_on_text(state))
    if len(ids) > config.block_size:
        raise UserError(f"--text has {len(ids)} tokens, but the window is {config.block_size}")
    if picture == "temperatures":
        return plot_temperatures(model, tokenizer, ids, temperatures or [1.0])
    layers, heads = layers or range(config.n_layer), heads or range(config.n_head)
    for flag, indices, n in (("layers", layers, config.n_layer), ("heads", heads, config.n_head)):
        if max(indices) >= n:
            raise UserError(f"--{flag} must be from 0 to {n - 1}: the model has {n}")
    if picture == "attention":
        return plot_attention(model, tokenizer, ids, layers, heads)
    if len(ids) < 2:
        raise UserError("the text needs two tokens: nothing predicts the first one")
    return plot_inside(model, tokenizer, ids, layers, heads)


def token_labels(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """The text of each token (N,), with whitespace made visible."""
    return [tokenizer.decode([i]).translate(VISIBLE_SPACES) for i in ids.tolist()]


# --- inside: how each token of a text is predicted. The web page shows the same numbers.


@torch.no_grad()
def logit_lens(model: GPT, ids: Tensor) -> Tensor:
    """What each block would predict after each token of a text (T,): probabilities (n_layer, T, V)
    if the norm and the head read the residual stream after that block (nostalgebraist 2020)."""
    x, rotation = model.pos(model.tok(ids[None]), torch.arange(len(ids), device=ids.device))
    context = AttentionContext(rotation)
    streams = [x := block(x, context) for block in model.blocks]  # (1, T, C) each
    return model.head(model.norm(torch.cat(streams))).softmax(dim=-1)


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> Tensor:
    """The attention weights for a text (T,), (n_layer, H, T, T): queries, then keys."""
    maps: list[Tensor] = []  # (1, H, T, T) each
    model(ids[None], maps=maps)
    return torch.cat(maps)


def surprise(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor]:
    """How a model predicted each token of a text (T,) after the first: the probability that it gave
    to the token, and the entropy of its prediction in nats, (T - 1,) both."""
    probs = logit_lens(model, ids)[-1, :-1]  # (T - 1, V)
    return probs.gather(1, ids[1:, None])[:, 0], -torch.xlogy(probs, probs).sum(dim=-1)


def plot_inside(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, layers: Sequence[int], heads: Sequence[int]
) -> "Figure":
    """How a model predicts each token of a text (T,) after the first: the most likely token after
    each block; the surprise, -ln p, and the entropy; per layer, the mean attention weights."""
    values, tokens = logit_lens(model, ids)[:, :-1].max(dim=-1)  # (n_layer, T - 1) both
    probability, entropy = surprise(model, ids)
    n, readable = len(entropy), len(ids) <= MAX_TICK_LABELS
    labels = drawable(token_labels(tokenizer, ids[1:])) if readable else []
    guesses = drawable(token_labels(tokenizer, tokens.flatten())) if readable else []
    figure = new_figure(12, 9)
    grid = figure.add_gridspec(3, len(layers))
    top, middle = (figure.add_subplot(grid[row, :]) for row in (0, 1))
    image = top.imshow(values.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, alpha=0.6)
    figure.colorbar(image, ax=top, label="probability")
    for i, guess in enumerate(guesses):
        top.text(i % n, i // n, guess, **CENTERED)
    top.set(title="most likely token after each layer", ylabel="layer", yticks=range(len(values)))
    middle.bar(range(n), -probability.log().numpy(), color=BLUE, label="surprise, -ln p")
    middle.plot(entropy.numpy(), "o-", color=ORANGE, label="entropy")
    middle.set(xlabel="token of the text", ylabel="nats", xlim=(-0.5, n - 0.5))
    middle.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in (top, middle):
        axes.set_xticks(range(len(labels)), labels, parse_math=False)
    maps = attention_weights(model, ids)[:, heads].mean(dim=1)  # (n_layer, T, T)
    for column, layer in enumerate(layers):
        axes = figure.add_subplot(grid[2, column])
        axes.imshow(maps[layer].numpy(), cmap=COLOR_MAP, vmin=0)
        axes.set(title=f"attention, layer {layer}", xlabel="key", ylabel="query")
    return figure


# --- attention


@torch.no_grad()
def plot_attention(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, layers: Sequence[int], heads: Sequence[int]
) -> "Figure":
    """Attention weights for a text (T,): one map per head, one row of maps per layer. Queries are
    the rows of a map, keys its columns; each row sums to 1."""
    maps = attention_weights(model, ids)
    ticks = drawable(token_labels(tokenizer, ids)) if len(ids) <= MAX_TICK_LABELS else []
    side = max(MAP_INCHES, TOKEN_INCHES * len(ticks))
    figure = new_figure(1 + side * len(heads), 0.6 + side * len(layers))
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    for layer, row in zip(layers, grid, strict=True):
        for head, axes in zip(heads, row, strict=True):
            weights = maps[layer, head].numpy()  # (T, T)
            image = axes.imshow(weights, cmap=COLOR_MAP, vmin=0, vmax=1)
            axes.set_title(f"layer {layer}, head {head}", fontsize=10)
            for set_ticks in (axes.set_xticks, axes.set_yticks):
                set_ticks(range(len(ticks)), ticks, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=grid, label="attention weight", shrink=0.6)
    figure.supxlabel("key", fontsize=10)
    figure.supylabel("query", fontsize=10)
    return figure


# --- positions


@torch.no_grad()
def plot_positions(model: GPT) -> "Figure":
    """Position encodings with the model's sizes: sinusoidal, RoPE, and the learned ones if the
    model has them. Nearby positions are similar, distant ones less so."""
    config = model.config
    figure = new_figure(8, 7)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    angle = rotation_angles(config.block_size, config.n_embd)[:, : config.n_embd // 2]  # (T, C/2)
    sinusoidal = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (T, C)
    plot_matrix(top_left, sinusoidal, "sinusoidal encoding", "value")
    top_left.set(xlabel="channel", ylabel="position")
    plot_similarity(top_right, sinusoidal, "similarity of sinusoidal positions")
    plot_rope(bottom_left, rotation_angles(config.block_size, config.head_size, config.rope_theta))
    if isinstance(model.pos, LearnedPositions):
        plot_similarity(bottom_right, model.pos.table.weight, "similarity of learned positions")
    else:
        bottom_right.set_axis_off()
        words = "this model has no learned positions\n(train with --pos learned)"
        bottom_right.text(0.1, 0.5, words)
    return figure


def plot_rope(axes: "Axes", angle: Tensor) -> None:
    """Cosine similarity of two equal vectors after RoPE, against their distance, for three channel
    pairs and for the vector; `angle` is (T, D/2)."""
    last = angle.size(1) - 1
    styles = ((last // 4, ORANGE, ":"), (last // 2, GREEN, "--"), (last, BLUE, "-."))
    for pair, color, style in styles:
        similarity = angle[:, pair].cos().numpy()
        axes.plot(similarity, color=color, linestyle=style, label=f"channel pair {pair}")
    axes.plot(angle.cos().mean(dim=1).numpy(), color=BLACK, label="all channel pairs")
    axes.set_title("RoPE: two equal vectors", fontsize=10)
    axes.set(xlabel="distance (tokens)", ylabel="cosine similarity")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def plot_similarity(axes: "Axes", table: Tensor, title: str) -> None:
    """Cosine similarity of every two rows of a table (T, C), one row per position."""
    vectors = F.normalize(table, dim=1)
    plot_matrix(axes, vectors @ vectors.T, title, "cosine similarity")  # (T, T)
    axes.set(xlabel="position", ylabel="position")


def plot_matrix(axes: "Axes", values: Tensor, title: str, label: str) -> None:
    """Values from -1 to 1, (rows, columns), as colors; `label` is that of the color bar."""
    image = axes.imshow(
        values.numpy(), aspect="auto", interpolation="nearest", cmap=COLOR_MAP, vmin=-1, vmax=1
    )
    axes.figure.colorbar(image, ax=axes, label=label)
    axes.set_title(title, fontsize=10)


# --- embeddings


@torch.no_grad()
def plot_embeddings(model: GPT, tokenizer: Tokenizer) -> "Figure":
    """The first MAX_EMBEDDINGS printable tokens at the first two principal components (Pearson
    1901) of their normalized embeddings."""
    texts = token_labels(tokenizer, torch.arange(model.config.vocab_size))
    shown = [i for i, text in enumerate(texts) if text.isprintable() and "\ufffd" not in text]
    shown = shown[:MAX_EMBEDDINGS]
    labels = drawable([texts[i] for i in shown])
    groups = [next(g for g, (_, has) in TOKEN_GROUPS.items() if has(texts[i])) for i in shown]
    points, shares = principal_components(F.normalize(model.tok.weight[shown]))
    figure = new_figure(8, 8)
    axes = figure.subplots()
    axes.scatter(*points.T.numpy(), alpha=0)  # sets the limits of the axes, which text does not
    for (x, y), label, group in zip(points.tolist(), labels, groups, strict=True):
        axes.text(x, y, label, color=TOKEN_GROUPS[group][0], fontsize=12, **CENTERED)
    if len(set(groups)) > 1:  # other scripts have no case
        for name, (color, _) in TOKEN_GROUPS.items():
            axes.plot([], [], "s", color=color, label=name)
        axes.legend()
    axes.set(xlabel=f"first principal component ({shares[0]:.0%} of the variance)")
    axes.set(ylabel=f"second principal component ({shares[1]:.0%} of the variance)")
    axes.set_title("token embeddings", fontsize=10)
    return figure


def principal_components(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of vectors (N, C), (N, 2), and their variances' shares."""
    centered = vectors - vectors.mean(dim=0)
    _, sizes, directions = torch.linalg.svd(centered, full_matrices=False)
    return centered @ directions[:2].T, (sizes**2 / (sizes**2).sum())[:2]


# --- temperatures


@torch.no_grad()
def plot_temperatures(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, temperatures: Sequence[float]
) -> "Figure":
    """The probabilities of the MAX_BARS most likely tokens after a text (T,), and the entropy of
    the distribution over all tokens, at each temperature."""
    logits = model(ids[None])[0][:, -1]  # (1, V)
    tokens = adjust_logits(logits)[1][0, :MAX_BARS]
    prompt = repr(tokenizer.decode(ids.tolist()))
    prompt, *labels = drawable([prompt, *token_labels(tokenizer, tokens)])
    figure = new_figure(8, 1.2 + 1.5 * len(temperatures))
    rows = figure.subplots(len(temperatures), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for temperature, axes in zip(temperatures, rows, strict=True):
        probs, _ = adjust_logits(logits, temperature)  # (1, V), sorted; (1, 1) at temperature 0
        entropy = -torch.xlogy(probs, probs).sum()
        heights = F.pad(probs[0], (0, MAX_BARS))[: len(tokens)]
        axes.bar(range(len(tokens)), heights.tolist(), color=BLUE)
        text = f"temperature {temperature:g}: entropy {entropy:.2f} nats"
        axes.text(0.99, 0.85, text, ha="right", va="top", transform=axes.transAxes)
        axes.grid(alpha=0.3, axis="y")
    rows[-1].set_xticks(range(len(tokens)), labels, parse_math=False)
    rows[-1].set_xlabel("next token, most likely first")
    rows[0].set_title(f"next token after {prompt}", fontsize=10, parse_math=False)
    figure.supylabel("probability", fontsize=10)
    return figure
