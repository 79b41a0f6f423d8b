"""The verdict on curves whose diagnosis is known by construction."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from viz.verdict import RULES, verdict

LN65, LN50257 = 4.174, 10.825


def curve(
    val: list[float],
    train: list[float] | None = None,
    every: int = 100,
    lr: Callable[[float], float] = lambda progress: 1e-3,
) -> list[dict]:
    """Records of evaluations each `every` steps. Without a list, there is no training loss."""
    n = len(val)
    log = [{"step": every * i, "val": v, "lr": lr(i / max(n - 1, 1))} for i, v in enumerate(val)]
    return [r | {"train": t} for r, t in zip(log, train, strict=True)] if train else log


def same(losses: list[float], every: int = 100) -> list[dict]:
    return curve(losses, losses, every)


def falling(n: int, start: float = LN65, end: float = 1.4, half_life: float = 0.15) -> list[float]:
    """n losses from start towards end; the rest of the way halves in that share of the run."""
    return [end + (start - end) * 0.5 ** (i / (n - 1) / half_life) for i in range(n)]


def noisy(losses: list[float], spread: float) -> list[float]:
    noise = np.random.default_rng(5).normal(0, spread, len(losses))
    return [loss + e for loss, e in zip(losses, noise.tolist(), strict=True)]


def cosine(progress: float) -> float:
    return 5e-4 * (1 + math.cos(math.pi * progress))


def case(
    log: list[dict], starts: str, has: str = "", lacks: str = "", **settings: float
) -> tuple[list[dict], str, list[str], list[str], dict]:
    """A run, and what its verdict starts with, contains and lacks; | separates texts."""
    texts = ([text for text in words.split("|") if text] for words in (has, lacks))
    return log, starts, *texts, {"vocab_size": 65, "max_steps": 5000} | settings


SLOW = falling(21, end=1.3, half_life=0.3)
STUCK = [4.2, 3.4, 3.45, 3.3, 3.35, 3.4, 3.3, 3.1, 3.0, 2.93]
FLAT = [4.17, 2.6, 2.1, 1.9, 1.75, 1.63, 1.56, 1.54, 1.535, 1.534, 1.534]
MILD = [4.17, 2.2, 1.8, 1.7, 1.71, 1.72, 1.73]
U_SHAPE = [4.17, 2.2, 1.8, 1.7, 1.75, 1.85, 1.95]
MEMORIZED = [4.17, 2.1, 1.5, 1.2, 0.9, 0.6, 0.4]
EXPLODED = [4.1, 144.0, 90.0, 40.0, 12.0, 6.0, 5.0, 4.4]
DIVERGING = "diverging since step"
SHORT = "too short to judge"
FROM_START = "overfitting from the start"
OVER = "overfitting since step 300, the best checkpoint"
HEALTHY = "healthy: best at step"
STOPPED = "; --patience 2 stopped the run at step"

# name: records, words that start the verdict, that it contains and does not, settings
CASES: dict[str, tuple[list[dict], str, list[str], list[str], dict]] = {
    "healthy": case(same(SLOW), f"{HEALTHY} 2000", "more steps", "text"),
    "stuck, high rate": case(curve(STUCK, lr=cosine), "stuck at 2.93", "lower --lr_max", "healthy"),
    "healthy, slow": case(curve([4.17 - 0.1 * i for i in range(10)], lr=cosine), HEALTHY),
    "one high evaluation": case(
        same([4.17, 2.5, 2.6]), HEALTHY, "--patience 1 stopped", "diverging", patience=1
    ),
    "healthy, noisy": case(same(noisy(SLOW, 0.02)), HEALTHY, lacks="jump"),
    "healthy, gap": case(curve(SLOW, [0.85 * x for x in SLOW]), HEALTHY, "--teacher", "dropout"),
    "student": case(curve(SLOW, [0.85 * x for x in SLOW]), HEALTHY, lacks="--teach", teacher="a"),
    "healthy, GPT-2": case(curve(falling(21, LN50257, 4, 0.3)), HEALTHY, vocab_size=50257),
    "two schedules": case(curve(SLOW, SLOW, lr=lambda p: cosine(2 * p % 1)), HEALTHY, lacks="jump"),
    "ended flat": case(curve(FLAT, lr=cosine), HEALTHY, "decayed: a longer", "plateau|--lr_max"),
    "10 steps at 3.27": case(curve([4.2, 3.9, 3.27], every=5), SHORT, "falling", "healthy"),
    "step 0 only": case(same([4.17]), SHORT, "more steps", "falling"),
    "quick: 2 evaluations in 120 steps": case(
        same([4.2, 2.3], 120), f"{HEALTHY} 120", "more steps", "short"
    ),
    "2 evaluations that are flat": case(same([4.2, 4.18], 120), SHORT, "--eval_every", "falling"),
    "50 steps, the validation loss rises": case(
        curve([5.6, 5.37, 5.41], [5.6, 4.8, 4.1], 25), SHORT, "more steps", "falling"
    ),
    "300 characters": case(
        curve([3.5, 4.85], [3.5, 0.146], 120), FROM_START, "more text", "--lr_max", vocab_size=33
    ),
    "2000 characters": case(curve([3.6, 2.9], [3.6, 0.2], 120), "memorized", "0.20|2.90|more text"),
    "flat": case(curve([4.2, 4.17, 4.17, 4.16]), "not moving from ln(V) = 4.17", "--overfit_batch"),
    "flat, noisy": case(same(noisy([LN65] * 20, 0.03)), "not moving", lacks="diverg"),
    "flat DPO at ln 2": case(
        same([0.693, 0.692, 0.693, 0.692]), "not moving from its first loss, 0.69", lacks="ln(V)"
    ),
    "DPO": case(same([0.693, 0.5, 0.4, 0.33]), HEALTHY),
    "exploding": case(same(EXPLODED), f"{DIVERGING} 0", "lower --lr_max", "raise --lr_max|higher"),
    "exploding, validation only": case(curve(EXPLODED[:4]), DIVERGING, "lower --lr_max"),
    "exploding after 20 steps": case(same(EXPLODED[:3], 10), DIVERGING),
    "1e30": case(same([4.2, 3.0, 1e30]), f"{DIVERGING} 100"),
    "diverged": case(
        curve([4.17, 2.1, 2.6, 4.0], [4.17, 2.0, 2.5, 3.9]), f"{DIVERGING} 100", "--lr_max"
    ),
    "drifting up, both by 7%": case(
        curve([4.17, 2.0, 2.06, 2.12, 2.14], [4.17, 1.9, 1.96, 2.02, 2.04]),
        f"{DIVERGING} 100",
        lacks="overfit",
    ),
    "last evaluation jumps": case(same([4.17, 2, 1.8, 1.71, 1.72, 9]), DIVERGING),
    "recovered": case(
        same([4.17, 2.5, 2.0, 6.0, 1.9, 1.7, 1.55, 1.45]), HEALTHY, "jumped to 6 at step 300"
    ),
    "jumped, then stuck": case(
        same([4.17, 30, 3.4] + [3.3] * 8), "plateaued", "lower", "larger model|higher"
    ),
    "overfitted": case(
        curve(U_SHAPE, MEMORIZED), OVER, "more text|--weight_decay 1,|--patience 3", "dropout"
    ),
    "overfitted, mild": case(
        curve(MILD, MEMORIZED), OVER, "a smaller model", "weight_decay", weight_decay=1.0
    ),
    "overfitted, strong": case(
        curve([4.17, 2.2, 1.8, 1.7, 2.5, 4, 6], [*MEMORIZED[:5], 0.2, 0.02]), OVER, lacks="diverg"
    ),
    "overfitted, late": case(
        curve([*falling(15), 1.5, 1.55], falling(17, end=1.0)), "overfitting since step 1400"
    ),
    "overfitted, noisy": case(
        curve(noisy([2 + abs(i - 8) / 10 for i in range(25)], 0.02), falling(25, end=0.5)),
        "overfitting since step",
        lacks="jump",
    ),
    "fine-tuning that only got worse": case(
        curve([1.5, 1.6, 1.7, 1.9], [1.4, 1, 0.7, 0.4]), FROM_START, "lower --lr_max", "--patience"
    ),
    "validation only, rising": case(curve(U_SHAPE), OVER, "no training loss to tell"),
    "plateaued, early": case(
        curve([4.17, 2.1, 2.0, *[2.0] * 12], [4.17, 2.0, *[1.9] * 13]),
        "plateaued since about step 200",
        "larger model",
        "higher|raise",
    ),
    "plateaued, noisy": case(
        curve(noisy([4.17, 2.5, *[2.0] * 20], 0.03), noisy([4.17, 2.4, *[1.9] * 20], 0.03)),
        "plateaued since about step",
        lacks="overfit|jump",
    ),
    "stuck at token frequencies": case(
        same([4.17, 3.4, *[3.32] * 8]), "plateaued", "token frequencies|lower first"
    ),
    "patience, overfitted": case(
        curve(U_SHAPE[:6], MEMORIZED[:6]), OVER, f"{STOPPED} 500", "--patience 3", patience=2
    ),
    "patience, plateaued": case(
        curve([4.17, 2.1, 2.0, 1.995, 1.995, 1.996]), "plateaued", f"{STOPPED} 500", patience=2
    ),
    "patience, short": case(
        curve([4.17, 3.0, 2.8, 2.81, 2.82], [4.17, 3.0, 2.8, 2.7, 2.6], 10),
        SHORT,
        f"raise --patience|{STOPPED}",
        patience=2,
    ),
    "patience that did not stop the run": case(
        curve(U_SHAPE, MEMORIZED), OVER, lacks="--patience", patience=5, max_steps=600
    ),
    "tiny losses": case(
        same([4.17, 0.5, 0.002, 0.0021, 0.0023]), "solved", "0.0023|repeated", "diverg|overfit"
    ),
    "exact answers": case(
        [r | {"exact": r["step"] / 40} for r in same([4.17, 0.06], 40)],
        "solved",
        "validation loss 0.06, 100% of the answers are exact|trained on",
        "repeated",
        hold_out=False,
    ),
    "memorized on purpose": case(
        same([4.17, 0.06]), "healthy:", "trained on", "larger model|more steps", hold_out=False
    ),
    "half of answers": case([r | {"exact": r["step"] / 160} for r in same([4.17, 0.6], 80)], SHORT),
    "zero, then one high evaluation": case(curve([4.17, 0, 0, 0, 0, 0.5]), "plateaued"),
    "zero": case(same([4.17, 0.5, 0.0, 0.0]), "solved"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_right(name: str):
    log, starts, words, absent, settings = CASES[name]
    said = verdict(log, settings)
    assert said.startswith(starts)
    assert [word for word in words if word not in said] == [], said
    assert [word for word in absent if word in said] == [], said


def test_every_rule_decides_a_case():
    assert len({start.split()[0] for _, start, *_ in CASES.values()}) == len(RULES)


def test_any_finite_log_has_a_verdict_without_dropout_or_higher_rates():
    rng = np.random.default_rng(3)
    for _ in range(300):
        n = int(rng.integers(1, 12))
        val, train = 10 ** rng.uniform(-6, rng.choice([1, 30]), (2, n))
        log = curve(val.tolist(), train.tolist() if rng.random() < 0.7 else None)
        said = verdict(log, {"vocab_size": int(rng.choice([2, 65, 50257]))})
        assert "\n" not in said and "dropout" not in said and "higher --lr" not in said
        assert "nan" not in said and "inf" not in said
