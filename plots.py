"""Pictures of runs and of models.

    python plots.py                                      the newest run: losses, rate, gradient norm
    python plots.py checkpoints/a checkpoints/b --x time --output_file both.svg
    python plots.py --picture attention --text "To be, or not to be" --layers 0,3
    python plots.py --picture positions
    python plots.py --picture embeddings checkpoints/best.pt
    python plots.py --picture temperatures --text "ROMEO:" --temperatures 0.5,1,1.5

The ending of --output_file, .png or .svg, says which it will be. The pictures of runs and the
verdict in words are in this file, those of models in pictures.py.
"""

import io
import itertools
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError, from_dict, limit_problems, parse_flags, raise_problems, run, setting
from utils import atomic_write, newest_checkpoint, read_checkpoint

if TYPE_CHECKING:  # matplotlib is slow to import, so that is done only where a picture is drawn
    from matplotlib.figure import Figure

# Okabe and Ito's colours (2008), which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", BLACK, "#999999")
X_LABELS = {"step": "step", "tokens": "million tokens seen", "time": "minutes"}
PICTURES = ("runs", "attention", "positions", "embeddings", "temperatures")


@dataclass
class PlotConfig:
    """What is drawn."""

    inputs: tuple[str, ...] = setting(
        (), "folders of runs, or a checkpoint; default: the newest run"
    )
    picture: str = setting("runs", "", choices=PICTURES)
    output_file: str = setting("", "the file, .png or .svg; default: PICTURE.png")
    x: str = setting("step", "of runs", choices=tuple(X_LABELS))
    text: str = setting("To be, or not to be", "for attention and temperatures")
    layers: str = setting("", "for attention, such as 0,3; default: all")
    heads: str = setting("", "for attention, such as 0,1; default: all")
    temperatures: str = setting("0.5,0.8,1,1.5", "one panel each")

    def problems(self) -> list[str]:
        """What is wrong with these settings, a sentence each."""
        found = limit_problems(self)
        path = Path(self.output_file or "x.png")
        if path.suffix not in (".png", ".svg"):
            found.append(f"--output_file {path} must end in .png or .svg")
        if not path.parent.is_dir():
            found.append(f"there is no folder {path.parent} for --output_file")
        if self.picture != "runs" and len(self.inputs) > 1:
            found.append(f"--picture {self.picture} is of one checkpoint, not {len(self.inputs)}")
        return found


@dataclass
class Run:
    """The log of a run."""

    name: str
    settings: dict[str, Any]  # of the model and the run, its corpus, its number of parameters
    log: list[dict[str, Any]]  # a record an evaluation

    @property
    def tokens_a_step(self) -> int:
        """How many tokens an optimizer step takes in."""
        return math.prod(self.settings[k] for k in ("batch_size", "grad_accum", "block_size"))


def read_run(path: Path) -> Run:
    """The run whose folder, log.jsonl or checkpoint this is. Raises UserError where it is none."""
    if path.suffix == ".pt":
        state = read_checkpoint(path)
        settings = state["gpt_config"] | state["train_config"] | {"corpus": state["corpus"]}
        return Run(str(path), settings, state["log"])
    file = path if path.suffix == ".jsonl" else path / "log.jsonl"
    try:
        settings, *log = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        log = [record for record in log if "step" in record]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not the folder of a run: {error}") from None
    if not log:
        raise UserError(f"{path} has nothing to draw yet: its run was not evaluated")
    return Run(str(path), settings, log)


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


def draw_runs(runs: list[Run], x: str = "step") -> "Figure":
    """Losses, learning rates and gradient norms of some runs over their steps, the tokens they saw
    or their time, with the best step of each marked and the verdict above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.5), layout="constrained")
    losses, rates, norms = figure.subplots(3, 1, sharex=True, height_ratios=[3.5, 1, 1])
    one = len(runs) == 1
    verdicts = []
    for run_, color in zip(runs, itertools.cycle(COLORS)):
        log, best = run_.log, min(run_.log, key=lambda record: record["val"])
        units = {"step": 1, "tokens": run_.tokens_a_step / 1e6, "time": 1 / 60}
        xs = [record["seconds" if x == "time" else "step"] * units[x] for record in log]
        style = {"color": ORANGE if one else color, "label": "training" if one else None}
        losses.plot(xs, [r["train"] for r in log], linestyle="--", **style)
        label = "validation, best" if one else run_.name
        label += f": {best['val']:.4f} at step {best['step']}"
        losses.plot(xs, [r["val"] for r in log], color=color, marker=".", label=label)
        losses.plot(xs[log.index(best)], best["val"], "*", color=color, markersize=12)
        rates.plot(xs, [r["lr"] for r in log], color=color)
        norms.plot(xs, [r["grad_norm"] or math.nan for r in log], color=color)
        words = verdict(log, run_.settings["vocab_size"])
        verdicts.append(textwrap.fill(words if one else f"{run_.name}: {words}", 102))
    if one:
        of = runs[0].settings
        title = f"{of['corpus']['name']}, {of['n_layer']} layers of {of['n_embd']} channels"
        verdicts.insert(0, title)
    losses.set_title("\n".join(verdicts), loc="left", fontsize=10)
    losses.set_ylabel("loss (nats a token)" + ("" if one else ", training dashed"))
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norms.set(ylabel="gradient norm", xlabel=X_LABELS[x])
    losses.legend()
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a picture, as the ending of its name says."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=100)
    with atomic_write(path) as file:
        file.write(picture.getvalue())


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, PlotConfig)
    config = from_dict(PlotConfig, flags)
    raise_problems(problems + config.problems())
    paths = [Path(name) for name in config.inputs]
    if config.picture == "runs":
        paths = paths or [newest_checkpoint(Path("checkpoints")).parent]
        figure = draw_runs([read_run(path) for path in paths], config.x)
    else:
        import pictures  # which is not needed to draw runs

        path = paths[0] if paths else newest_checkpoint(Path("checkpoints"))
        figure = pictures.draw(path, config)
    path = Path(config.output_file or f"{config.picture}.png")
    save_figure(figure, path)
    print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    run(main)
