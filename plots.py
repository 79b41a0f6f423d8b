"""A run's log as a picture, and in words.

Colours are Okabe and Ito's (2008), which colour-blind people can tell apart.
"""

import io
import math
from pathlib import Path
from typing import Any

from utils import atomic_write

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"


def verdict(log: list[dict[str, Any]], vocab_size: int) -> str:
    """What the evaluations of a run say about it, and what to try next, in one sentence.

    `log` has a record an evaluation, with step, train and val (losses in nats). The verdicts are,
    in this order: not moving from ln(V), diverging, overfitting, plateaued, healthy.
    """
    best = min(log, key=lambda record: record["val"])
    last, baseline = log[-1], math.log(vocab_size)
    if len(log) < 3:
        return "too short to judge: give it more steps, or a smaller --eval_every"
    if best["val"] > 0.97 * baseline:
        return (
            f"not moving from ln(V) = {baseline:.2f}: raise --lr_max, and try --overfit_batch, "
            "which shows whether the pieces fit"
        )
    if last["train"] > 1.1 * min(record["train"] for record in log):
        return f"diverging since step {best['step']}: lower --lr_max, or lengthen --warmup_steps"
    if last["val"] > 1.01 * best["val"]:
        return (
            f"overfitting since step {best['step']}, the best checkpoint: "
            "more text, more --dropout, a smaller model, or fewer steps (--patience 3)"
        )
    before = log[len(log) // 2]  # a healthy run still gains a percent in its second half
    if before["val"] - best["val"] < 0.01 * before["val"]:
        return (
            f"plateaued since about step {before['step']}: a larger model may learn more from "
            "this text, or a higher --lr_max help"
        )
    advice = "more steps or a larger model would go on"
    if last["val"] - last["train"] > 0.1 * last["val"]:
        advice = "validation lies well above training, so more text or --dropout may help"
    return f"healthy: best at step {best['step']}; {advice}"


def draw_curve(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw a run's losses with the best step marked, and below them learning rate and gradient
    norm, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, so only where a picture is drawn

    best = min(log, key=lambda record: record["val"])
    steps = [record["step"] for record in log]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    losses.plot(steps, [r["train"] for r in log], color=BLUE, marker=".", label="train")
    losses.plot(steps, [r["val"] for r in log], color=ORANGE, marker=".", label="validation")
    losses.axvline(best["step"], color=BLACK, linestyle=":", linewidth=1)
    text = f"best: {best['val']:.4f} at step {best['step']}"
    losses.plot(best["step"], best["val"], "*", color=BLACK, markersize=11, label=text)
    losses.set(ylabel="loss (nats a token)", title=title)
    losses.legend()
    losses.grid(alpha=0.3)
    rates.plot(steps, [r["lr"] for r in log], color=GREEN)
    rates.set(xlabel="step")
    rates.set_ylabel("learning rate", color=GREEN)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norms = rates.twinx()
    norms.plot(steps, [r["grad_norm"] or math.nan for r in log], color=BLACK, linestyle="--")
    norms.set_ylabel("gradient norm (dashed)")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    with atomic_write(path) as file:
        file.write(picture.getvalue())
