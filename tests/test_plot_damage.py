"""Damaged logs: what can be read is plotted, anything else is one line that says what is wrong."""

import json
import random
from pathlib import Path

import pytest

from system.settings import UserError
from viz.curve import plot_runs
from viz.runs import read_run

SETTINGS = {"vocab_size": 65, "batch_size": 5, "grad_accum": 2, "block_size": 100}
SETTINGS |= {"corpus": {"name": "poems"}, "n_layer": 3, "n_embd": 48}
RECORD = {"train": 2.0, "val": 2.0, "lr": 1e-3, "seconds": 1.0, "grad_norm": 1.0}
STEP = {"step": 2, "loss": 2.0, "lr": 1e-3, "seconds": 1.0, "grad_norm": None}
LINES = [json.dumps(SETTINGS), *(json.dumps({"step": i} | RECORD) for i in range(4))]
LINES[3:3] = [json.dumps(STEP)]


def test_a_log_whose_last_line_is_cut_off_is_read_with_a_note(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text("\n".join(LINES)[:-9])
    run = read_run(tmp_path)
    assert [record["step"] for record in run.log] == [0, 1, 2]
    assert "the last line is cut off" in run.note


def test_damage_is_one_error_line_or_leaves_a_valid_run(tmp_path: Path):
    rng = random.Random(1)
    values = [None, "x", [], {}, True, -1, float("nan"), float("inf"), 1e300, 10**400]
    for trial in range(200):
        lines = list(LINES)
        i = rng.randrange(len(lines))
        entries = json.loads(lines[i])
        entries[rng.choice(list(entries))] = rng.choice(values)
        lines[i] = rng.choice([json.dumps(entries), lines[i][: rng.randrange(40)], "[[", "7"])
        (tmp_path / "log.jsonl").write_text("\n".join(lines))
        try:
            run = read_run(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(record["val"], (int, float)) for record in run.log)
            assert all(isinstance(record["loss"], (int, float)) for record in run.steps)
            if trial % 10 == 0:
                plot_runs([run])


@pytest.mark.parametrize("text", ["", "\n", "null", "\0"])
def test_an_empty_log_is_an_error(tmp_path: Path, text: str):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match="cannot be plotted"):
        read_run(tmp_path)
