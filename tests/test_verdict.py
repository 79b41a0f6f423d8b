"""The verdict on curves whose diagnosis is known by construction."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from viz.verdict import RULES, verdict, zigzag

LN65, LN2000, LN50257 = 4.174, 7.601, 10.825


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


def falling(n: int, start: float = LN65, end: float = 1.4, half_life: float = 0.15) -> list[float]:
    """n losses from start towards end; the rest of the way halves in that share of the run."""
    return [end + (start - end) * 0.5 ** (i / (n - 1) / half_life) for i in range(n)]


def noisy(losses: list[float], spread: float) -> list[float]:
    """With normal noise."""
    noise = np.random.default_rng(5).normal(0, spread, len(losses))
    return [loss + e for loss, e in zip(losses, noise.tolist(), strict=True)]


def cosine(progress: float) -> float:
    """A learning rate that decays to 0."""
    return 5e-4 * (1 + math.cos(math.pi * progress))


SLOW = falling(21, end=1.3, half_life=0.3)
U_SHAPE = [4.17, 2.2, 1.8, 1.7, 1.75, 1.85, 1.95]
MEMORIZED = [4.17, 2.1, 1.5, 1.2, 0.9, 0.6, 0.4]
EXPLODED = [4.1, 144.0, 90.0, 40.0, 12.0, 6.0, 5.0, 4.4]
BOUNCED = [4.17, 2.5, 2.0, 6.0, 1.9, 1.7, 1.55, 1.45]
PAT = {"patience": 2, "max_steps": 5000}
DIVERGING = "diverging since step"
SHORT = "too short to judge"
OVER = "overfitting since step 300, the best checkpoint"
HEALTHY = "healthy: best at step"
STOPPED = "; --patience 2 stopped the run at step"

# name: records, settings, words that start the verdict, words that it contains and does not
CASES: dict[str, tuple[list[dict], dict, str, tuple[str, ...], tuple[str, ...]]] = {
    "healthy": (curve(SLOW, SLOW), {}, f"{HEALTHY} 2000", ("more steps",), ("text",)),
    "stuck at a high rate": (
        curve([4.2, 3.4, 3.45, 3.3, 3.35, 3.4, 3.3, 3.1, 3.0, 2.93], lr=cosine),
        {},
        "stuck at 2.93",
        ("lower --lr_max",),
        ("healthy",),
    ),
    "healthy, slow": (curve([4.17 - 0.1 * i for i in range(10)], lr=cosine), {}, HEALTHY, (), ()),
    "one high evaluation": (
        curve([4.17, 2.5, 2.6], [4.17, 2.5, 2.6]),
        {"patience": 1, "max_steps": 5000},
        HEALTHY,
        ("--patience 1 stopped",),
        ("diverging",),
    ),
    "healthy, few": (curve([4.17, 2.5, 2.1, 1.8]), {}, HEALTHY, (), ("plateau",)),
    "healthy, noisy": (curve(noisy(SLOW, 0.02), noisy(SLOW, 0.02)), {}, HEALTHY, (), ("jump",)),
    "healthy, gap": (
        curve(SLOW, [0.85 * x for x in SLOW]),
        {},
        HEALTHY,
        ("more text",),
        ("dropout",),
    ),
    "healthy, BPE 2000": (
        curve(falling(9, LN2000, 3.5, 0.3)),
        {"vocab_size": 2000},
        HEALTHY,
        (),
        (),
    ),
    "healthy, GPT-2": (
        curve(falling(21, LN50257, 4, 0.3)),
        {"vocab_size": 50257},
        HEALTHY,
        (),
        (),
    ),
    "healthy, resumed with a second schedule": (
        curve(SLOW, SLOW, lr=lambda p: cosine(2 * p % 1)),
        {},
        HEALTHY,
        (),
        ("jump",),
    ),
    "a schedule that ended flat": (
        curve([4.17, 2.6, 2.1, 1.9, 1.75, 1.63, 1.56, 1.54, 1.535, 1.534, 1.534], lr=cosine),
        {},
        HEALTHY,
        ("learning rate has decayed", "--max_steps"),
        ("plateau", "--lr_max"),
    ),
    "10 steps at 3.27": (curve([4.2, 3.9, 3.27], every=5), {}, SHORT, ("falling",), ("healthy",)),
    "12 steps that rise": (
        curve([4.17, 4.2, 4.25], [4.17, 4.1, 4.0], 6),
        {},
        SHORT,
        (),
        ("overfit",),
    ),
    "20 steps that are flat": (curve([4.17, 4.0, 4.0, 4.0, 4.0], every=5), {}, SHORT, (), ()),
    "step 0 only": (curve([4.17], [4.17]), {}, SHORT, ("more steps",), ("falling",)),
    "quick: 2 evaluations in 120 steps": (
        curve([4.2, 2.3], [4.2, 2.3], 120),
        {},
        f"{SHORT} (still falling, from 4.20 to 2.30)",
        ("--eval_every",),
        (),
    ),
    "flat": (
        curve([4.2, 4.17, 4.17, 4.16]),
        {},
        "not moving from ln(V) = 4.17",
        ("--overfit_batch",),
        (),
    ),
    "flat, noisy": (
        curve(noisy([LN65] * 20, 0.03), noisy([LN65] * 20, 0.03)),
        {},
        "not moving",
        (),
        ("diverg",),
    ),
    "flat, GPT-2": (
        curve([10.9, 10.8, 10.75, 10.7]),
        {"vocab_size": 50257},
        "not moving from ln(V) = 10.82",
        (),
        (),
    ),
    "flat DPO at ln 2": (
        curve([0.693, 0.692, 0.693, 0.692], [0.693] * 4),
        {},
        "not moving from its first loss, 0.69",
        (),
        ("ln(V)",),
    ),
    "DPO": (curve([0.693, 0.5, 0.4, 0.33], [0.693, 0.5, 0.4, 0.33]), {}, HEALTHY, (), ()),
    "exploding": (
        curve(EXPLODED, EXPLODED),
        {},
        f"{DIVERGING} 0",
        ("lower --lr_max",),
        ("raise --lr_max", "higher"),
    ),
    "exploding, validation only": (curve(EXPLODED[:4]), {}, DIVERGING, ("lower --lr_max",), ()),
    "exploding after 20 steps": (curve(EXPLODED[:3], EXPLODED[:3], 10), {}, DIVERGING, (), ()),
    "1e30": (curve([4.2, 3.0, 1e30], [4.2, 3.0, 1e30]), {}, f"{DIVERGING} 100", (), ()),
    "diverged": (
        curve([4.17, 2.1, 2.6, 4.0], [4.17, 2.0, 2.5, 3.9]),
        {},
        f"{DIVERGING} 100",
        ("--lr_max",),
        (),
    ),
    "drifting up, both by 7%": (
        curve([4.17, 2.0, 2.06, 2.12, 2.14], [4.17, 1.9, 1.96, 2.02, 2.04]),
        {},
        f"{DIVERGING} 100",
        (),
        ("overfit",),
    ),
    "last evaluation jumps": (
        curve([4.17, 2, 1.8, 1.71, 1.72, 9], [4.17, 2, 1.8, 1.71, 1.72, 9]),
        {},
        DIVERGING,
        (),
        (),
    ),
    "recovered": (curve(BOUNCED, BOUNCED), {}, HEALTHY, ("jumped to 6 at step 300",), ()),
    "jumped, then stuck": (
        curve([4.17, 30, 3.4] + [3.3] * 8, [4.17, 30, 3.4] + [3.3] * 8),
        {},
        "plateaued",
        ("lower",),
        ("larger model", "higher"),
    ),
    "overfitted": (
        curve(U_SHAPE, MEMORIZED),
        {},
        OVER,
        ("more text", "--weight_decay 1,", "--patience 3"),
        ("dropout",),
    ),
    "overfitted, mild": (
        curve([4.17, 2.2, 1.8, 1.7, 1.71, 1.72, 1.73], MEMORIZED),
        {"weight_decay": 1.0},
        OVER,
        ("a smaller model",),
        ("weight_decay",),
    ),
    "overfitted, strong": (
        curve([4.17, 2.2, 1.8, 1.7, 2.5, 4.0, 6.0], [*MEMORIZED[:5], 0.2, 0.02]),
        {},
        OVER,
        (),
        ("diverg",),
    ),
    "overfitted, early": (
        curve([4.17, 2.5, 2.6, 2.8, 3.0, 3.3], MEMORIZED[:6]),
        {},
        "overfitting since step 100",
        (),
        (),
    ),
    "overfitted, late": (
        curve([*falling(15), 1.5, 1.55], falling(17, end=1.0)),
        {},
        "overfitting since step 1400",
        (),
        (),
    ),
    "overfitted, noisy": (
        curve(noisy([2 + abs(i - 8) / 10 for i in range(25)], 0.02), falling(25, end=0.5)),
        {},
        "overfitting since step",
        (),
        ("jump",),
    ),
    "fine-tuning that only got worse": (
        curve([1.5, 1.6, 1.7, 1.9], [1.4, 1.0, 0.7, 0.4]),
        {},
        "overfitting from the start",
        ("lower --lr_max",),
        ("--patience",),
    ),
    "validation only, rising": (curve(U_SHAPE), {}, OVER, ("no training loss to tell",), ()),
    "plateaued, early": (
        curve([4.17, 2.1, 2.0, *[2.0] * 12], [4.17, 2.0, *[1.9] * 13]),
        {},
        "plateaued since about step 200",
        ("larger model",),
        ("higher", "raise"),
    ),
    "plateaued, late": (
        curve([*falling(10, end=1.5, half_life=0.1), *[1.5] * 12]),
        {},
        "plateaued since about step",
        (),
        (),
    ),
    "plateaued, noisy": (
        curve(noisy([4.17, 2.5, *[2.0] * 20], 0.03), noisy([4.17, 2.4, *[1.9] * 20], 0.03)),
        {},
        "plateaued since about step",
        (),
        ("overfit", "jump"),
    ),
    "stuck at token frequencies": (
        curve([4.17, 3.4, *[3.32] * 8], [4.17, 3.4, *[3.32] * 8]),
        {},
        "plateaued",
        ("token frequencies", "lower first"),
        (),
    ),
    "patience, overfitted": (
        curve(U_SHAPE[:6], MEMORIZED[:6]),
        PAT,
        OVER,
        (STOPPED + " 500",),
        ("--patience 3",),
    ),
    "patience, plateaued": (
        curve([4.17, 2.1, 2.0, 1.995, 1.995, 1.996]),
        PAT,
        "plateaued",
        (STOPPED + " 500",),
        (),
    ),
    "patience, short": (
        curve([4.17, 3.0, 2.8, 2.81, 2.82], [4.17, 3.0, 2.8, 2.7, 2.6], 10),
        PAT,
        SHORT,
        ("raise --patience", STOPPED),
        (),
    ),
    "patience that did not stop the run": (
        curve(U_SHAPE, MEMORIZED),
        {"patience": 5, "max_steps": 600},
        OVER,
        (),
        ("--patience",),
    ),
    "tiny losses": (
        curve([4.17, 0.5, 0.002, 0.0021, 0.0023], [4.17, 0.5, 0.002, 0.0021, 0.0023]),
        {},
        "solved",
        ("almost 0",),
        ("diverg", "overfit"),
    ),
    "zero": (curve([4.17, 0.5, 0.0, 0.0], [4.17, 0.5, 0.0, 0.0]), {}, "solved", (), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_right(name: str):
    log, settings, starts, words, absent = CASES[name]
    said = verdict(log, {"vocab_size": 65} | settings)
    assert said.startswith(starts)
    assert [word for word in words if word not in said] == [], said
    assert [word for word in absent if word in said] == [], said


def test_every_rule_decides_a_case():
    assert len(CASES) >= 30
    assert len({start.split()[0] for _, _, start, _, _ in CASES.values()}) == len(RULES)


def test_any_finite_log_has_a_verdict_without_dropout_or_higher_rates():
    rng = np.random.default_rng(3)
    for _ in range(300):
        n = int(rng.integers(1, 12))
        val, train = 10 ** rng.uniform(-6, rng.choice([1, 30]), (2, n))
        log = curve(val.tolist(), train.tolist() if rng.random() < 0.7 else None)
        said = verdict(log, {"vocab_size": int(rng.choice([2, 65, 50257]))})
        assert "\n" not in said and "dropout" not in said and "higher --lr" not in said
        assert "nan" not in said and "inf" not in said


def test_noise_is_the_zigzag_of_a_curve():
    assert zigzag([5, 4, 3, 2, 3, 4]) == 0  # turns once
    assert zigzag([5, 4, 5, 4, 5]) == 1
    assert zigzag([1]) == zigzag([]) == 0
