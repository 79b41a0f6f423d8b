"""The verdict on a training run: what its losses show, in one sentence."""

import itertools
import math
import statistics
from typing import Any

# Thresholds of the verdict. "Of ln V" is relative to ln(vocab_size), the loss of a uniform guess.
MIN_EVALUATIONS = 3  # two points do not show a trend, unless they are far apart
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
STRONG_DECAY = 1.0  # weight decay for texts that are read often (Kim et al. 2025)
LARGE_GAP = 0.1  # between validation and training loss, relative to the validation loss
MEMORIZED, FAR = 2.0, 0.2  # validation loss: times the training loss, and above it by this of ln V
TRAINED_ON = "measured on what it was trained on (--no-hold_out)"


def verdict(log: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """What the evaluations of a run show, and what to try next, in one sentence: that of the first
    of the RULES that applies.

    `log` has a record per evaluation: step, val (a loss in nats per token), and if known train and
    lr. Of `settings`, vocab_size is needed; max_steps and patience tell why the run ended,
    weight_decay what was tried. Dropout is not recommended: it made all models of
    experiments/sizes.py worse, on little text too.
    """
    curve = Curve(log, settings)
    return next(words for rule in RULES if (words := rule(curve))) + notes(curve)


class Curve:
    """The features of a run's evaluations that the rules of the verdict use."""

    def __init__(self, log: list[dict[str, Any]], settings: dict[str, Any]):
        self.steps = [record["step"] for record in log]
        self.val = [record["val"] for record in log]
        # Losses of the training split, if all evaluations have one.
        train = [record["train"] for record in log if record.get("train") is not None]
        self.train = train if len(train) == len(log) else None
        self.fitted = self.train or self.val
        self.uniform = math.log(settings["vocab_size"])
        self.exact = log[-1].get("exact")  # share of exact answers, if the data are questions
        self.held_out = settings.get("hold_out", True)
        self.pretrained = self.val[0] < PRETRAINED * self.uniform
        self.no_student = self.pretrained or bool(settings.get("teacher"))  # do not advise one
        self.level = min(self.val)  # the lowest loss, at evaluation `best`
        self.best = self.val.index(self.level)
        rates = [record.get("lr") or 0.0 for record in log]
        self.decayed = rates[-1] < DECAYED * max(rates)
        self.active = [i for i, rate in enumerate(rates) if rate >= DECAYED * max(rates)]
        self.weight_decay = settings.get("weight_decay", 0.0)
        self.patience = settings.get("patience") or 0
        early = self.steps[-1] < settings.get("max_steps", math.inf)
        self.out_of_patience = early and 0 < self.patience <= len(log) - 1 - self.best

    def rises(self, losses: list[float], end: float, factor: float, share: float) -> bool:
        """Whether a loss at the end is clearly above the lowest one before: by more than noise."""
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
    """The last loss or the median of the last three from the lowest one on, whichever is lower: a
    single high evaluation is no trend."""
    since = losses[losses.index(min(losses)) :]
    return min(losses[-1], statistics.median(since[-3:]))


def tail_fall(curve: Curve) -> float:
    """How far the validation loss falls in the second half of the active evaluations, by the median
    slope of all pairs (Theil and Sen), relative to its level there."""
    tail = curve.active[-max(MIN_EVALUATIONS, len(curve.active) // 2) :]
    points = [(curve.steps[i], curve.val[i]) for i in tail]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(points, 2) if t > s]
    span = points[-1][0] - points[0][0]
    level = statistics.median(loss for _, loss in points) or 1.0  # 0: nothing is left to fall
    return -statistics.median(slopes or [0]) * span / level


# --- the rules: the words of the verdict, or None if the rule does not apply


def diverging(curve: Curve) -> str | None:
    """The training loss ends 10% above its lowest, or both losses 3% above theirs; without a
    training loss, the validation loss jumps above that of a guess."""
    fitted = curve.fitted
    if curve.train is None:
        rose = fitted[-1] > DIVERGED * max(curve.uniform, fitted[0])
    else:
        both = (curve.train, curve.val)
        drifted = all(curve.rises(v, end_level(v), DRIFTED, VISIBLE) for v in both)
        rose = drifted or curve.rises(fitted, fitted[-1], DIVERGED, JUMP)
    since = curve.steps[fitted.index(min(fitted))]
    words = f"diverging since step {since}: lower --lr_max or raise --warmup_steps"
    return words if rose and len(curve.steps) > 1 else None


def too_short(curve: Curve) -> str | None:
    """Fewer than 100 steps, or fewer than 3 evaluations and no clear change."""
    fall = curve.val[0] - curve.val[-1]
    shown = len(curve.steps) >= MIN_EVALUATIONS or abs(fall) > JUMP * curve.uniform
    enough = curve.steps[-1] >= MIN_STEPS
    if enough and shown:
        return None
    if curve.out_of_patience:
        return "too short to judge: raise --patience"
    more = "train for more steps" + ", or lower --eval_every" * enough
    falling = fall > JUMP * curve.uniform and curve.val[-1] == curve.level
    state = f" (still falling, from {curve.val[0]:.2f} to {curve.val[-1]:.2f})" if falling else ""
    return f"too short to judge{state}: {more}"


def solved(curve: Curve) -> str | None:
    """All answers are exact, or the validation loss ends below 1% of ln V."""
    if curve.val[-1] > SOLVED * curve.uniform and curve.exact != 1:
        return None
    answers = "" if curve.exact is None else f", {curve.exact:.0%} of the answers are exact"
    advice = "check that the validation text is not repeated in the training text"
    advice = advice if curve.held_out else TRAINED_ON
    return f"solved: validation loss {curve.val[-1]:.2g}{answers}; {advice}"


def overfitting(curve: Curve) -> str | None:
    """The validation loss ends 1% above its lowest, and the training loss falls."""
    rose = curve.rises(curve.val, end_level(curve.val), OVERFITTED, VISIBLE)
    if not rose or (curve.train and curve.train[-1] > curve.train[curve.best]):
        return None
    since = f"since step {curve.steps[curve.best]}, the best checkpoint"
    strong = curve.pretrained or curve.weight_decay >= STRONG_DECAY
    decay = "" if strong else f" --weight_decay {STRONG_DECAY:g},"
    advice = f"use more text,{decay} a smaller model, or fewer steps"
    if curve.best == 0:
        lower = " or a lower --lr_max" * curve.pretrained
        since, advice = "from the start", f"use more text{lower}"
    elif not curve.patience:
        advice += " (--patience 3)"
    if curve.train is None:
        advice += "; or the learning rate is too high: there is no training loss to tell"
    return f"overfitting {since}: {advice}"


def memorized(curve: Curve) -> str | None:
    """The validation loss is twice the training loss, and 20% of ln V above it."""
    val, train = curve.val[-1], curve.train[-1] if curve.train else curve.val[-1]
    if val < MEMORIZED * train or val - train < FAR * curve.uniform:
        return None
    losses = f"the training loss is {train:.2f}, the validation loss {val:.2f}"
    return f"memorized: {losses}: use more text or a smaller model"


def not_moving(curve: Curve) -> str | None:
    """The best loss is above 97% of ln V, or 99% of a trained model's first loss."""
    if curve.pretrained and curve.level * OVERFITTED > curve.val[0]:
        return f"not moving from its first loss, {curve.val[0]:.2f}: try another --lr_max"
    if curve.level < UNTRAINED * curve.uniform:
        return None
    where = f"not moving from ln(V) = {curve.uniform:.2f}"
    if curve.spike():
        return f"{where}: lower --lr_max"
    return f"{where}: try another --lr_max, and check with --overfit_batch that it can learn"


def stuck(curve: Curve) -> str | None:
    """The best loss is above 70% of ln V, the rate has decayed, and it did not fall before that."""
    high = curve.level > STUCK * curve.uniform and curve.decayed and not curve.pretrained
    if not high or tail_fall(curve) > 3 * PLATEAU:
        return None
    return f"stuck at {curve.level:.2f}, little better than token frequencies: try a lower --lr_max"


def plateaued(curve: Curve) -> str | None:
    """The loss falls by less than 1% in the second half of the steps before the rate decays."""
    if len(curve.active) <= MIN_EVALUATIONS or tail_fall(curve) >= PLATEAU:
        return None
    near = max((1 + PLATEAU) * curve.level, curve.level + NOISE * zigzag(curve.val))
    since = next(step for step, loss in zip(curve.steps, curve.val, strict=True) if loss <= near)
    if curve.level > STUCK * curve.uniform and not curve.pretrained:
        advice = "little better than token frequencies: try another --lr_max, lower first"
    elif curve.spike():
        advice = "lower --lr_max, which made the loss jump"
    else:
        advice = "try a larger model or another --lr_max"
    return f"plateaued since about step {since}: {advice}"


def healthy(curve: Curve) -> str:
    advice = "more steps or a larger model may improve it further"
    gap = curve.val[-1] - curve.train[-1] if curve.train else 0
    if not curve.held_out:
        advice = TRAINED_ON
    elif gap > LARGE_GAP * curve.val[-1]:
        advice = "validation loss is well above training loss: more text would help most"
        advice += ", then a student of this model (--teacher)" * (not curve.no_student)
    elif curve.decayed:
        advice = "the learning rate has decayed: a longer run may improve it"
    return f"healthy: best at step {curve.steps[curve.best]}; {advice}"


RULES = diverging, solved, too_short, overfitting, memorized, not_moving, stuck, plateaued, healthy


def notes(curve: Curve) -> str:
    """A jump of the loss that is over, and what stopped the run."""
    words, at = "", curve.spike()
    if at and not diverging(curve):
        loss = curve.fitted[at]
        words += f"; the loss jumped to {loss:.4g} at step {curve.steps[at]} and came back"
    if curve.out_of_patience:
        words += f"; --patience {curve.patience} stopped the run at step {curve.steps[-1]}"
    return words
