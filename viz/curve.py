"""The curve of a run: losses, learning rate and gradient norm, with a verdict in words."""

import contextlib
import itertools
import json
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from system.files import atomic_write
from viz.verdict import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (2008), which color-blind people can tell apart.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", BLACK, "#999999")
X_LABELS = {"step": "step", "tokens": "training tokens (millions)", "time": "time (minutes)"}
TITLE_CHARS = 98  # that fit in one line above the plot

MAX_NUMBER = 1e100  # of a log; matplotlib's axes overflow before floats do
MAX_POINTS = 2000  # of a line; more cannot be told apart
START = 0.1  # of the steps: their losses, near ln V, do not set the range of the plot

Record = dict[str, Any]  # a line of a log: metrics by name


@dataclass
class Run:
    name: str
    settings: dict[str, Any]  # of the model and the run; "corpus" describes the data
    log: list[Record]  # of evaluations: step, train, val, lr, grad_norm, seconds
    steps: list[Record] = field(default_factory=list)  # step, loss, lr, grad_norm, seconds
    final: Record = field(default_factory=dict)  # of a finished run: its best step, val, verdict


def read_records(file: Path) -> list[Record]:
    """The lines of a log.jsonl that can be read. The last one may have been cut off."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            found += [json.loads(line)]
    return [line for line in found if isinstance(line, dict)]


def training_steps(records: list[Record]) -> list[Record]:
    """The training steps among the records of a log, as far as they can be drawn."""
    steps, numbers = (r for r in records if "val" not in r), ("step", "loss", "lr", "seconds")
    return [step for step in steps if all(is_number(step.get(name)) for name in numbers)]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a log can be drawn."""
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and abs(value) <= MAX_NUMBER


def best_record(log: list[Record]) -> Record:
    return min(log, key=lambda record: record["val"])


# --- figures


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; the size is in inches."""
    from matplotlib.figure import Figure  # slow to import, and most commands never plot

    return Figure(figsize=(width, height), layout="constrained")


def plot_runs(runs: list[Run], x: str = "step") -> "Figure":
    """Losses, learning rates and gradient norms of one or several runs, against the keys of
    X_LABELS. The best step of each run is marked; the verdicts are the title."""
    title = runs_title(runs)
    if not title.isascii():
        from viz.fonts import drawable  # only for names in other scripts

        title = drawable([title])[0]
    figure = new_figure(8, 7.5)
    losses, rates, norms = figure.subplots(3, 1, sharex=True, height_ratios=[3.5, 1, 1])
    low, high = loss_range(runs)
    for run, color in zip(runs, itertools.cycle(COLORS)):
        plot_losses(losses, run, x, color, high, only_run=len(runs) == 1)
        records = sorted(run.steps + run.log, key=lambda record: record["step"])
        rates.plot(*points(run, records, "lr", x), color=color)
        norms.plot(*points(run, records, "grad_norm", x), color=color, linewidth=0.8)
    margin = 0.05 * (high - low) or 0.05
    losses.set_ylim(low - margin, high + margin)
    for guess in sorted({math.log(run.settings["vocab_size"]) for run in runs}):
        if low < guess < high:
            label = f"uniform guess: {guess:.2f}"
            losses.axhline(guess, color="gray", linestyle=":", label=label)
    # A name may contain $, which starts a formula otherwise.
    losses.set_title(title, loc="left", fontsize=10, parse_math=False)
    losses.set_ylabel("loss (nats)" if len(runs) == 1 else "loss (nats); training: thin, dashed")
    for text in losses.legend().get_texts():
        text.set_parse_math(False)
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norms.set(ylabel="gradient norm", xlabel=X_LABELS[x])
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    return figure


def points(run: Run, records: list[Record], name: str, x: str) -> tuple[list[float], list[float]]:
    """A metric of these records, at most MAX_POINTS: where they are on the horizontal axis (the
    steps, the million tokens trained on until then, or the minutes), and its values."""
    records = records[:: math.ceil(len(records) / MAX_POINTS) or 1]
    per_step = math.prod(run.settings[name] for name in ("batch_size", "grad_accum", "block_size"))
    scale = {"step": 1.0, "tokens": per_step / 1e6, "time": 1 / 60}[x]
    xs = [record["seconds" if x == "time" else "step"] * scale for record in records]
    values = [record.get(name) for record in records]
    return xs, [v if is_number(v) else math.nan for v in values]  # a gap: step 0 has no grad_norm


def plot_losses(axes: "Axes", run: Run, x: str, color: str, highest: float, only_run: bool) -> None:
    """The training loss of single steps (thin) and of the evaluations (dashed), the validation
    loss, and a star at its best step. The legend names the runs, or the losses of one run."""
    best, log = best_record(run.log), run.log
    if run.steps:  # no straight lines from the first evaluations, which are above the plot
        log = list(itertools.dropwhile(lambda record: record["val"] > highest, log)) or log
    name, labels = run.name, ["", ""]
    if only_run:
        name = "validation loss, best"
        labels = ["training loss of one batch", "training loss at evaluations"]
    train_color = ORANGE if only_run else color
    if run.steps:
        thin: dict[str, Any] = {"color": train_color, "linewidth": 0.7, "alpha": 0.5}
        axes.plot(*points(run, run.steps, "loss", x), label=labels[0], **thin)
    axes.plot(*points(run, log, "train", x), "--.", color=train_color, label=labels[1])
    label = f"{name}: {best['val']:.4f} at step {best['step']}"
    axes.plot(*points(run, log, "val", x), color=color, marker="o", markersize=4, label=label)
    axes.plot(*points(run, [best], "val", x), "*", color=color, markersize=12)


def loss_range(runs: list[Run]) -> tuple[float, float]:
    """The lowest and the highest loss after the START of the runs, the highest not far above that
    of a uniform guess or the last one."""
    shown: list[float] = []
    for run in runs:
        records = run.log + run.steps
        start = START * max(record["step"] for record in records)
        late = [record for record in records if record["step"] > start] or records
        numbers = [record.get(name) for record in late for name in ("val", "train", "loss")]
        shown += [number for number in numbers if is_number(number)]
    guess = max(math.log(run.settings["vocab_size"]) for run in runs)
    limit = 1.2 * max(guess, *(run.log[0]["val"] for run in runs))
    lasts = [run.log[-1]["val"] for run in runs]
    limit = max(limit, *(last for last in lasts if last < 3 * limit), 0)
    return min(shown), min(max(shown), max(limit, min(shown)))


def runs_title(runs: list[Run]) -> str:
    """The verdict of each run; above that of a single run, its corpus and model."""
    verdicts = [verdict(run.log, run.settings) for run in runs]
    if len(runs) == 1:
        info = runs[0].settings
        first = f"{info['corpus']['name']}, {info['n_layer']} layers, {info['n_embd']} channels"
        return f"{first}\n{textwrap.fill(verdicts[0], TITLE_CHARS)}"
    lines = (f"{run.name}: {words}" for run, words in zip(runs, verdicts, strict=True))
    return "\n".join(textwrap.fill(line, TITLE_CHARS) for line in lines)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG or SVG, according to the extension. Raises UserError if that fails."""
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=100)
