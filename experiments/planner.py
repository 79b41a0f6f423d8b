"""Collect the runs."""

import sys
from pathlib import Path
from typing import Any

from experiments.study import Study, make_run, parse_study

PRESET = "laptop"
SIZES = {
    "2x64": (2, 64, 64, 24),
    "2x128": (2, 128, 64, 24),
    "4x128": (4, 128, 192, 12),
    "4x192": (4, 192, 192, 12),
    "6x256": (6, 256, 256, 12),
    "6x384": (6, 384, 256, 12),
}
BPE = {"tokenizer": "bpe", "bpe_vocab_size": 2000}
TEXTS: dict[str, tuple[dict[str, Any], float]] = {
    "shakespeare": ({}, 1.0),
    "third": ({}, 0.3),
    "tenth": ({}, 0.1),
    "plays": ({"data": "plays"}, 1.0),
    "shakespeare-bpe": (BPE, 1.0),
    "plays-bpe": (BPE | {"data": "plays"}, 1.0),
    "short": ({"data": "checkpoints/studies/planner/short.txt"}, 1.0),
}
RUNS = """
shakespeare 2x64 150 600 2400
tenth 2x64 600
plays 2x64 150 600
shakespeare-bpe 2x64 150 600
plays-bpe 2x64 150 600
short 2x64 150 600
shakespeare 2x128 100 400 1600
tenth 2x128 400 1600
plays 2x128 400
shakespeare-bpe 2x128 400
plays-bpe 2x128 400
shakespeare 4x128 100 400 1000
tenth 4x128 150 500
plays 4x128 400
shakespeare-bpe 4x128 200 600
plays-bpe 4x128 400
short 4x128 300
shakespeare 4x192 100 400
tenth 4x192 300
plays 4x192 200
plays-bpe 4x192 200
shakespeare-bpe 4x192 200
third 2x128 1600
third 4x128 700
shakespeare 6x256 60 150
tenth 6x256 100
plays-bpe 6x256 100
short 2x128 1000
short 4x192 150
shakespeare 2x64 8000
tenth 2x64 3000
plays 2x64 2400
plays 2x128 1600
shakespeare-bpe 2x64 2400
shakespeare-bpe 2x128 1200
plays-bpe 2x128 1200
plays-bpe 2x64 2400
shakespeare 2x128 4000
shakespeare 6x384 60
plays 4x128 1000
plays-bpe 4x128 900
short 2x64 2400
plays 6x256 150
shakespeare-bpe 4x192 400
"""


def flags_of(text: str, size: str, steps: int) -> tuple[dict[str, Any], float]:
    n_layer, n_embd, block_size, batch_size = SIZES[size]
    flags, share = TEXTS[text]
    flags = flags | {"preset": PRESET, "n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 64}
    flags |= {"block_size": block_size, "batch_size": batch_size, "max_steps": steps}
    flags |= {"lr_max": round(6e-3 * (128 / n_embd) ** 0.5, 5), "compile": False}
    return flags | {"eval_every": max(1, steps // 5), "seed": 1}, share


def main(argv: list[str] | None = None) -> int:
    study: Study = parse_study("planner", argv, __doc__)
    runs = [line.split() for line in RUNS.strip().splitlines()]
    runs = [(t, s, int(n)) for t, s, *steps in runs for n in steps]
    study.n_runs = len(runs)
    short = Path(TEXTS["short"][0]["data"])
    if not short.exists():
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_bytes(Path("data/input.txt").read_bytes()[:100_000])
    for text, size, steps in runs:
        flags, share = flags_of(text, size, steps)
        name = f"{text}-{size}-{steps}"
        make_run(study, name, flags, share)
        for file in (study.folder / name).glob("*.pt"):
            file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
