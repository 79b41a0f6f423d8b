"""Plots of training runs: losses, learning rate and gradient norm, with a verdict in words."""

import io
import itertools
import json
import math
import statistics
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

MAX_RUNS = 20  # in one picture: more verdicts and names than that do not fit
MAX_NUMBER = 1e100  # of a log; matplotlib's axes overflow before floats do

# Thresholds of the verdict. "Of ln V" is relative to ln(vocab_size), the loss of a uniform guess.
MIN_EVALUATIONS = 3  # two points do not show a trend
MIN_STEPS = 100  # the default warmup, and about the memory of AdamW's averages
UNTRAINED = 0.97  # of ln V: above it, nothing was learned
PRETRAINED = 0.9  # of ln V: a run that starts below it continues from a trained model
STUCK = 0.7  # of ln V: about the entropy of token frequencies, which any rate learns
SOLVED = 0.01  # of ln V: nothing is left to gain
VISIBLE = 0.002  # of ln V: differences below it do not matter to a reader of samples
NOISE = 5  # times the zigzag: 3 standard deviations, as the lowest of 20 is 2 below the mean
DIVERGED, JUMP = 1.1, 0.02  # times the lowest training loss, and by this much of ln V
OVERFITTED = 1.01  # times the lowest validation loss
DRIFTED = 1.03  # times the lowest loss, of both splits
PLATEAU = 0.01  # a healthy run lowers its validation loss by at least 1% in its second half
DECAYED = 0.25  # of the peak learning rate: below it, the schedule flattens the curve
LARGE_GAP = 0.1  # between validation and training loss, relative to the validation loss


@dataclass
class Run:
    """The log of a run."""

    name: str
    settings: dict[str, Any]  # of the model and the run; "corpus" describes the data
    log: list[dict[str, Any]]  # a record per evaluation: step, train, val, lr, grad_norm, seconds
    note: str = ""  # what is missing of it

    @property
    def tokens_per_step(self) -> int:
        """Training tokens per optimizer step."""
        return math.prod(self.settings[k] for k in ("batch_size", "grad_accum", "block_size"))


def read_run(path: Path) -> Run:
    """Read a run from its folder, its log.jsonl or one of its checkpoints. The last line of a log
    may be cut off. Raises UserError if there is no valid log or no evaluation in it."""
    note = ""
    if path.suffix == ".pt":
        state = read_checkpoint(path)
        parts = [state[key] for key in ("gpt_config", "train_config")]
        if not all(isinstance(part, dict) for part in parts) or not isinstance(state["log"], list):
            raise UserError(f"{path} cannot be plotted: its settings or log are damaged")
        settings = parts[0] | parts[1] | {"corpus": state["corpus"]}
        log = state["log"]
    else:
        settings, log, note = read_log(path if path.suffix == ".jsonl" else path / "log.jsonl")
    if not log:
        raise UserError(f"{path} cannot be plotted: the run has not been evaluated yet")
    if problems := settings_problems(settings) + record_problems(log):
        raise UserError(f"{path} cannot be plotted: {'; '.join(problems[:3])}")
    return Run(str(path), settings, log, note)


def read_log(file: Path) -> tuple[Any, list[Any], str]:
    """The settings and evaluations of a log.jsonl, and a note if its last line was cut off."""
    if file.parent.suffix == ".json" and file.parent.is_file():
        raise UserError(f"{file.parent} has no settings: plot {file.parent.parent}/log.jsonl")
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.split("\n") if line]
        values, note = list(map(json.loads, lines[:-1])), ""
        try:
            values += map(json.loads, lines[-1:])
        except ValueError:
            note = f"{file}: the last line is cut off and left out"
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file.parent} is not the folder of a run: {error}") from None
    if not values:
        raise UserError(f"{file} cannot be plotted: it is empty or damaged")
    final = isinstance(values[-1], dict) and "final" in values[-1]
    return values[0], values[1 : len(values) - final], note


def is_number(value: Any) -> bool:
    """Whether a value from a log can be drawn."""
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and abs(value) <= MAX_NUMBER


def settings_problems(settings: Any) -> list[str]:
    """The settings that are needed and are not positive integers, or the corpus without a name."""
    if not isinstance(settings, dict):
        return ["its first line must contain the settings"]
    names = ("batch_size", "grad_accum", "block_size", "n_layer", "n_embd", "vocab_size")
    lows = {name: 2 if name == "vocab_size" else 1 for name in names}
    found = [
        f"setting {name} must be an integer of at least {low}, not {settings.get(name)!r:.40}"
        for name, low in lows.items()
        if type(settings.get(name)) is not int or not low <= settings[name] <= MAX_NUMBER
    ]
    found += [
        f"setting {name} must be a number, not {settings[name]!r:.40}"
        for name in ("patience", "max_steps")
        if name in settings and not is_number(settings[name])
    ]
    corpus = settings.get("corpus")
    if not isinstance(corpus, dict) or not isinstance(corpus.get("name"), str):
        found.append("setting corpus has no name")
    return found


def record_problems(log: list[Any]) -> list[str]:
    """The evaluations whose numbers cannot be drawn. Only the training loss may be missing; step 0
    has no gradient norm, and that of float16 may be infinite."""
    found, last = [], -1
    for i, record in enumerate(log, 1):
        if not isinstance(record, dict):
            found.append(f"evaluation {i} is not a record")
            continue
        record = {"train": 0, **record}
        norm = record.get("grad_norm")
        names = [
            n for n in ("step", "train", "val", "lr", "seconds") if not is_number(record.get(n))
        ]
        names += ["grad_norm"] * (norm is not None and not isinstance(norm, (int, float)))
        found += [
            f"{n} of evaluation {i} is {record.get(n)!r:.40}, no finite number" for n in names
        ]
        if not names and (type(record["step"]) is not int or record["step"] <= last):
            found.append(f"step of evaluation {i} is {record['step']}, after {last}")
        last = record["step"] if not names else last
    return found


def best_record(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation with the lowest validation loss."""
    return min(log, key=lambda record: record["val"])


# --- the verdict


def verdict(log: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """What the evaluations of a run show, and what to try next, in one sentence.

    `log` has a record per evaluation: step, val (a loss in nats per token), and if known train and
    lr. Of `settings`, vocab_size is needed; max_steps and patience tell why the run ended. The
    first rule that applies decides:

    diverging     the training loss ends 10% above its lowest; or both losses end 3% above theirs
    too short     fewer than 3 evaluations or 100 steps
    solved        the validation loss ends below 1% of ln V
    overfitting   the validation loss ends 1% above its lowest, the training loss falls
    not moving    the best loss is above 97% of ln V, or 99% of a trained model's first loss
    plateaued     the loss falls by less than 1% in the second half of the steps before the
                  learning rate decays to a quarter of its peak
    healthy       otherwise

    A rise counts if it exceeds 0.2% of ln V (2% for diverging) and 5 times the median
    zigzag between evaluations, the noise. Dropout is not recommended: it made all models of
    experiments/sizes.py worse, on little text too.
    """
    curve = Curve(log, settings)
    return next(words for rule in RULES if (words := rule(curve))) + notes(curve)


class Curve:
    """The features of a run's evaluations that the rules of the verdict use."""

    def __init__(self, log: list[dict[str, Any]], settings: dict[str, Any]):
        self.log, self.settings = log, settings
        self.steps = [record["step"] for record in log]
        self.val = [record["val"] for record in log]
        # Losses of the training split, if all evaluations have one.
        train = [record["train"] for record in log if record.get("train") is not None]
        self.train = train if len(train) == len(log) else None
        self.fitted = self.train or self.val
        self.uniform = math.log(settings["vocab_size"])
        self.pretrained = self.val[0] < PRETRAINED * self.uniform
        self.best = self.val.index(min(self.val))
        rates = [record.get("lr") or 0.0 for record in log]
        self.decayed = rates[-1] < DECAYED * max(rates)
        self.active = [i for i, rate in enumerate(rates) if rate >= DECAYED * max(rates)]
        evaluations = len(log) - 1 - self.best  # since the best
        self.patience = settings.get("patience") or 0
        self.out_of_patience = 0 < self.patience <= evaluations
        self.out_of_patience &= self.steps[-1] < settings.get("max_steps", math.inf)

    def rises(self, losses: list[float], end: float, factor: float, share: float) -> bool:
        """Whether a loss at the end is clearly above the lowest one before."""
        lowest = min(losses)
        limit = max((factor - 1) * lowest, share * self.uniform, NOISE * zigzag(losses))
        return end - lowest > limit

    def spike(self) -> int | None:
        """The evaluation with the highest loss, if it jumped up from those before."""
        at = max(range(1, len(self.val)), key=self.fitted.__getitem__, default=0)
        rose = at and self.rises(self.fitted[:at], self.fitted[at], DIVERGED, JUMP)
        return at if rose else None


def zigzag(losses: list[float]) -> float:
    """The noise of a curve: where it turns, the median of the smaller of the two steps, about 0.6
    standard deviations. 0 for curves that turn at most twice, or at less than half of the points
    (white noise turns at two thirds).

    >>> zigzag([5, 4, 3, 2, 3]), zigzag([5, 4, 5, 4, 5])
    (0, 1)
    """
    moves = [after - before for before, after in itertools.pairwise(losses)]
    pairs = list(itertools.pairwise(moves))
    turns = [min(abs(a), abs(b)) for a, b in pairs if (a < 0) != (b < 0)]
    return statistics.median(turns) if len(turns) > max(2, len(pairs) / 2) else 0


def end_level(losses: list[float]) -> float:
    """The last loss or the median of the last three since the lowest one, whichever is lower: a
    single high evaluation is no trend."""
    since = losses[losses.index(min(losses)) :]
    return min(losses[-1], statistics.median(since[1:][-3:] or since))


def tail_fall(curve: Curve) -> float:
    """How far the validation loss falls in the second half of the active evaluations, by the median
    slope of all pairs (Theil and Sen), relative to its level there."""
    tail = curve.active[-max(MIN_EVALUATIONS, len(curve.active) // 2) :]
    points = [(curve.steps[i], curve.val[i]) for i in tail]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(points, 2) if t > s]
    span = points[-1][0] - points[0][0]
    return -statistics.median(slopes or [0]) * span / statistics.median(y for _, y in points)


def diverging(curve: Curve) -> str | None:
    """The training loss rises; without one, the validation loss jumps above that of a guess."""
    fitted, limit = curve.fitted, max(curve.uniform, curve.fitted[0])
    if curve.train is None:
        rose = fitted[-1] > DIVERGED * limit
    else:
        rose = curve.rises(fitted, fitted[-1], DIVERGED, JUMP) or all(
            curve.rises(losses, end_level(losses), DRIFTED, VISIBLE)
            for losses in (fitted, curve.val)
        )
    since = curve.steps[fitted.index(min(fitted))]
    words = f"diverging since step {since}: lower --lr_max or raise --warmup_steps"
    return words if rose and len(curve.log) > 1 else None


def too_short(curve: Curve) -> str | None:
    """Too few evaluations or steps for a trend."""
    if curve.steps[-1] >= MIN_STEPS and len(curve.log) >= MIN_EVALUATIONS:
        return None
    if curve.out_of_patience:
        return "too short to judge: raise --patience"
    more = "train for more steps"
    if curve.steps[-1] >= MIN_STEPS:
        more += ", or lower --eval_every"
    fell = curve.val[0] - curve.val[-1] > JUMP * curve.uniform
    state = f" (still falling, from {curve.val[0]:.2f} to {curve.val[-1]:.2f})" if fell else ""
    return f"too short to judge{state}: {more}"


def solved(curve: Curve) -> str | None:
    """The validation text is predicted almost perfectly."""
    if curve.val[-1] > SOLVED * curve.uniform:
        return None
    return (
        f"solved: the validation loss of {curve.val[-1]:.2g} is almost 0; check that the "
        "validation text is not repeated in the training text"
    )


def overfitting(curve: Curve) -> str | None:
    """The validation loss rises from its best step on, and the training loss falls."""
    rose = curve.rises(curve.val, end_level(curve.val), OVERFITTED, VISIBLE)
    if not rose or (curve.train and curve.train[-1] > curve.train[curve.best]):
        return None
    since = f"since step {curve.steps[curve.best]}, the best checkpoint"
    advice = "use more text, a smaller model, or fewer steps"
    if curve.best == 0:
        since, advice = "from the start", "use more text or a lower --lr_max"
    elif not curve.patience:
        advice += " (--patience 3)"
    if curve.train is None:
        advice += "; or the learning rate is too high: there is no training loss to tell"
    return f"overfitting {since}: {advice}"


def not_moving(curve: Curve) -> str | None:
    """Nothing was learned beyond the first evaluation or a uniform guess."""
    best = curve.val[curve.best]
    if curve.pretrained and best * OVERFITTED > curve.val[0]:
        return f"not moving from its first loss, {curve.val[0]:.2f}: try another --lr_max"
    if best < UNTRAINED * curve.uniform:
        return None
    where = f"not moving from ln(V) = {curve.uniform:.2f}"
    if curve.spike():
        return f"{where}: lower --lr_max"
    return f"{where}: try another --lr_max, and check with --overfit_batch that it can learn"


def plateaued(curve: Curve) -> str | None:
    """The curve was flat before the learning rate had decayed."""
    if len(curve.active) <= MIN_EVALUATIONS or tail_fall(curve) >= PLATEAU:
        return None
    level = curve.val[curve.best]
    near = max((1 + PLATEAU) * level, level + NOISE * zigzag(curve.val))
    since = next(step for step, loss in zip(curve.steps, curve.val, strict=True) if loss <= near)
    if level > STUCK * curve.uniform and not curve.pretrained:
        advice = "little better than token frequencies: try another --lr_max, lower first"
    elif curve.spike():
        advice = "lower --lr_max, which made the loss jump"
    else:
        advice = "try a larger model or another --lr_max"
    return f"plateaued since about step {since}: {advice}"


def healthy(curve: Curve) -> str:
    """No rule found a problem."""
    advice = "more steps or a larger model may improve it further"
    gap = curve.val[-1] - curve.train[-1] if curve.train else 0
    if gap > LARGE_GAP * curve.val[-1]:
        advice = "validation loss is well above training loss: more text would help most"
    elif curve.decayed:
        advice = "the learning rate has decayed: a new run with more --max_steps may improve it"
    return f"healthy: best at step {curve.steps[curve.best]}; {advice}"


RULES = (diverging, too_short, solved, overfitting, not_moving, plateaued, healthy)


def notes(curve: Curve) -> str:
    """A jump of the loss that is over, and what stopped the run."""
    words, at = "", curve.spike()
    if at and not diverging(curve):
        loss = curve.fitted[at]
        words += f"; the loss jumped to {loss:.4g} at step {curve.steps[at]} and came back"
    if curve.out_of_patience:
        words += f"; --patience {curve.patience} stopped the run at step {curve.steps[-1]}"
    return words


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
        norms.plot(xs, [drawable(record.get("grad_norm")) for record in run.log], color=color)
    dashed = "" if len(runs) == 1 else ", training dashed"
    # A name may contain $, which starts a formula otherwise.
    losses.set_title(runs_title(runs), loc="left", fontsize=10, parse_math=False)
    losses.set_ylabel(f"loss (nats per token){dashed}")
    for label in losses.legend().get_texts():
        label.set_parse_math(False)
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norms.set(ylabel="gradient norm", xlabel=X_LABELS[x])
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    return figure


def drawable(value: Any) -> float:
    """A number, or NaN, which leaves a gap: step 0 has no gradient norm."""
    return value if is_number(value) else math.nan


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
    training = [drawable(record.get("train")) for record in run.log]
    axes.plot(xs, training, linestyle="--", color=training_color, label=training_label)
    name = "validation loss, best" if only_run else run.name
    label = f"{name}: {best['val']:.4f} at step {best['step']}"
    axes.plot(xs, [record["val"] for record in run.log], color=color, marker=".", label=label)
    axes.plot(xs[run.log.index(best)], best["val"], "*", color=color, markersize=12)


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
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=100)
    with atomic_write(path) as file:
        file.write(picture.getvalue())
