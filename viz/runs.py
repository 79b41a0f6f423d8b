"""Plots of training runs: losses, learning rate and gradient norm, with a verdict in words."""

import io
import itertools
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError
from utils import atomic_write, read_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (2008), which color-blind people can tell apart.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", BLACK, "#999999")
X_LABELS = {"step": "step", "tokens": "training tokens (millions)", "time": "time (minutes)"}
TITLE_CHARS = 102  # that fit in one line above the plot

# Thresholds of the verdict.
MIN_EVALUATIONS = 3  # two points do not show a trend
UNTRAINED = 0.97  # of ln(V), the loss of a uniform guess: above it, nothing was learned
DIVERGED = 1.1  # times the lowest training loss: more than the noise between evaluations
OVERFITTED = 1.01  # times the lowest validation loss
PLATEAU = 0.01  # a healthy run lowers its validation loss by at least 1% in its second half
LARGE_GAP = 0.1  # between validation and training loss, relative to the validation loss


@dataclass
class Run:
    """The log of a run."""

    name: str
    settings: dict[str, Any]  # of the model and the run; "corpus" describes the data
    log: list[dict[str, Any]]  # a record per evaluation: step, train, val, lr, grad_norm, seconds

    @property
    def tokens_per_step(self) -> int:
        """Training tokens per optimizer step."""
        return math.prod(self.settings[k] for k in ("batch_size", "grad_accum", "block_size"))


def read_run(path: Path) -> Run:
    """Read a run from its folder, its log.jsonl or one of its checkpoints. Raises UserError if
    there is no log or no evaluation in it."""
    if path.suffix == ".pt":
        state = read_checkpoint(path)
        settings = state["gpt_config"] | state["train_config"] | {"corpus": state["corpus"]}
        if not state["log"]:
            raise UserError(f"{path} cannot be plotted: it contains no evaluations")
        return Run(str(path), settings, state["log"])
    file = path if path.suffix == ".jsonl" else path / "log.jsonl"
    try:
        settings, *log = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        log = [record for record in log if "step" in record]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not the folder of a run: {error}") from None
    if not log:
        raise UserError(f"{path} cannot be plotted: the run has not been evaluated yet")
    return Run(str(path), settings, log)


def best_record(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation with the lowest validation loss."""
    return min(log, key=lambda record: record["val"])


def verdict(log: list[dict[str, Any]], vocab_size: int) -> str:
    """What the evaluations of a run show, and what to try next, in one sentence.

    `log` has a record per evaluation, with step, train and val (losses in nats per token). The
    rules are tried in this order: too short, not moving from ln(V), diverging, overfitting,
    plateaued, healthy.
    """
    best, last = best_record(log), log[-1]
    uniform = math.log(vocab_size)
    if len(log) < MIN_EVALUATIONS:
        return "too short to judge: train for more steps, or lower --eval_every"
    if best["val"] > UNTRAINED * uniform:
        return (
            f"not moving from ln(V) = {uniform:.2f}: raise --lr_max, or check with "
            "--overfit_batch that the model can learn at all"
        )
    if last["train"] > DIVERGED * min(record["train"] for record in log):
        return f"diverging since step {best['step']}: lower --lr_max or raise --warmup_steps"
    if last["val"] > OVERFITTED * best["val"]:
        return (
            f"overfitting since step {best['step']}, the best checkpoint: use more text, more "
            "--dropout, a smaller model, or fewer steps (--patience 3)"
        )
    middle = log[len(log) // 2]
    if middle["val"] - best["val"] < PLATEAU * middle["val"]:
        return (
            f"plateaued since about step {middle['step']}: try a larger model or a higher --lr_max"
        )
    advice = "more steps or a larger model may improve it further"
    if last["val"] - last["train"] > LARGE_GAP * last["val"]:
        advice = "validation loss is well above training loss: try more text or --dropout"
    return f"healthy: best at step {best['step']}; {advice}"


# --- figures


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; the size is in inches."""
    from matplotlib.figure import Figure  # slow to import, and most commands never plot

    return Figure(figsize=(width, height), layout="constrained")


def plot_runs(runs: list[Run], x: str = "step") -> "Figure":
    """Losses, learning rates and gradient norms of one or several runs, against the keys of
    X_LABELS. The best step of each run is marked; the verdicts are the title."""
    figure = new_figure(8, 7.5)
    losses, rates, norms = figure.subplots(3, 1, sharex=True, height_ratios=[3.5, 1, 1])
    for run, color in zip(runs, itertools.cycle(COLORS)):
        xs = x_values(run, x)
        plot_losses(losses, run, xs, color, only_run=len(runs) == 1)
        rates.plot(xs, [record["lr"] for record in run.log], color=color)
        # Step 0 has no gradient norm; NaN leaves a gap.
        norms.plot(xs, [record["grad_norm"] or math.nan for record in run.log], color=color)
    dashed = "" if len(runs) == 1 else ", training dashed"
    losses.set_title(runs_title(runs), loc="left", fontsize=10)
    losses.set_ylabel(f"loss (nats per token){dashed}")
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norms.set(ylabel="gradient norm", xlabel=X_LABELS[x])
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    return figure


def x_values(run: Run, x: str) -> list[float]:
    """The steps of the evaluations, the million tokens trained on until then, or the minutes."""
    if x == "time":
        return [record["seconds"] / 60 for record in run.log]
    scale = run.tokens_per_step / 1e6 if x == "tokens" else 1
    return [record["step"] * scale for record in run.log]


def plot_losses(axes: "Axes", run: Run, xs: list[float], color: str, only_run: bool) -> None:
    """Training loss (dashed) and validation loss, with a star at the best step. The legend names
    the losses of a run plotted alone, otherwise the runs."""
    best = best_record(run.log)
    training_label = "training loss" if only_run else None
    training_color = ORANGE if only_run else color
    training = [record["train"] for record in run.log]
    axes.plot(xs, training, linestyle="--", color=training_color, label=training_label)
    name = "validation loss, best" if only_run else run.name
    label = f"{name}: {best['val']:.4f} at step {best['step']}"
    axes.plot(xs, [record["val"] for record in run.log], color=color, marker=".", label=label)
    axes.plot(xs[run.log.index(best)], best["val"], "*", color=color, markersize=12)


def runs_title(runs: list[Run]) -> str:
    """The verdict of each run; above that of a single run, its corpus and model."""
    verdicts = [verdict(run.log, run.settings["vocab_size"]) for run in runs]
    if len(runs) == 1:
        info = runs[0].settings
        first = f"{info['corpus']['name']}, {info['n_layer']} layers, {info['n_embd']} channels"
        return f"{first}\n{textwrap.fill(verdicts[0], TITLE_CHARS)}"
    lines = (f"{run.name}: {words}" for run, words in zip(runs, verdicts, strict=True))
    return "\n".join(textwrap.fill(line, TITLE_CHARS) for line in lines)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG or SVG, according to the extension. Raises UserError if that fails."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=100)
    with atomic_write(path) as file:
        file.write(picture.getvalue())
