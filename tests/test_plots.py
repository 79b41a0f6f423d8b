"""The verdict in words, on curves made to have one."""

import math

import pytest

from plots import draw_curve, verdict


def log(train: list[float], val: list[float]) -> list[dict]:
    """Records of evaluations at steps 0, 100, 200, ..."""
    pairs = enumerate(zip(train, val, strict=True))
    return [
        {"step": 100 * i, "train": t, "val": v, "lr": 1e-3, "grad_norm": None if i == 0 else 1.0}
        for i, (t, v) in pairs
    ]


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ([4.17, 2.5, 2.0, 1.7], [4.17, 2.5, 2.1, 1.8], "healthy: best at step 300; more steps"),
        (
            [4.17, 2.2, 1.7, 1.3],
            [4.17, 2.3, 1.9, 1.7],
            "healthy: best at step 300; validation lies",
        ),
        ([4.17, 2.2, 1.7, 1.2], [4.17, 2.2, 1.8, 2.0], "overfitting since step 200, the best"),
        ([4.17, 2.0, 1.9, 1.9, 1.9], [4.17, 2.1, 2.0, 2.0, 2.0], "plateaued since about step 200"),
        ([4.17, 2.0, 2.5, 3.9], [4.17, 2.1, 2.6, 4.0], "diverging since step 100: lower --lr_max"),
        ([4.2, 4.17, 4.17, 4.16], [4.2, 4.17, 4.17, 4.17], "not moving from ln(V) = 4.17"),
        ([4.17, 3.0], [4.17, 3.0], "too short to judge"),
    ],
)
def test_verdict(train: list[float], val: list[float], words: str):
    assert words in verdict(log(train, val), vocab_size=65)
    assert math.log(65) == pytest.approx(4.174, abs=1e-3)


def test_a_curve_is_drawn_from_the_first_record_on(tmp_path):
    records = log([4.17, 2.0, 1.5], [4.2, 2.1, 1.8])
    for n in (1, 3):
        draw_curve(records[:n], tmp_path / "curve.png", "test")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
