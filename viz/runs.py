"""Reading the logs of runs, which may be damaged, for plots.py."""

import json
from pathlib import Path
from typing import Any

from system.settings import UserError
from utils import read_checkpoint
from viz.curve import MAX_NUMBER, Run, is_number, is_training_step

MAX_RUNS = 20  # in one picture: more verdicts and names than that do not fit


def read_run(path: Path) -> Run:
    """Read a run from its folder, its log.jsonl or one of its checkpoints. The last line of a log
    may be cut off. A checkpoint does not contain the training steps. Raises UserError if there is
    no valid log or no evaluation in it."""
    note, steps, final = "", [], {}
    if path.suffix == ".pt":
        state = read_checkpoint(path)
        parts = [state[key] for key in ("gpt_config", "train_config")]
        if not all(isinstance(part, dict) for part in parts) or not isinstance(state["log"], list):
            raise UserError(f"{path} cannot be plotted: its settings or log are damaged")
        settings = parts[0] | parts[1] | {"corpus": state["corpus"]}
        log = state["log"]
    else:
        file = path if path.suffix == ".jsonl" else path / "log.jsonl"
        (settings, *lines), note = read_log(file)
        if lines and isinstance(lines[-1], dict) and "final" in lines[-1]:
            final = lines.pop()["final"]
        steps = [line for line in lines if is_training_step(line)]
        log = [line for line in lines if not is_training_step(line)]
    if not log:
        raise UserError(f"{path} cannot be plotted: the run has not been evaluated yet")
    if problems := settings_problems(settings) + evaluation_problems(log) + step_problems(steps):
        raise UserError(f"{path} cannot be plotted: {'; '.join(problems[:3])}")
    return Run(str(path), settings, log, note, steps, final)


def read_log(file: Path) -> tuple[list[Any], str]:
    """The lines of a log.jsonl, and a note if the last one was cut off."""
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
    return values, note


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


def evaluation_problems(log: list[Any]) -> list[str]:
    """The evaluations whose numbers cannot be drawn. Only the training loss may be missing; step 0
    has no gradient norm, and that of float16 may be infinite."""
    log = [{"train": 0, **record} if isinstance(record, dict) else record for record in log]
    return record_problems("evaluation", log, ("step", "train", "val", "lr", "seconds"))


def step_problems(steps: list[Any]) -> list[str]:
    """The training steps whose numbers cannot be drawn."""
    return record_problems("training step", steps, ("step", "loss", "lr", "seconds"))


def record_problems(what: str, records: list[Any], needed: tuple[str, ...]) -> list[str]:
    """The records that lack one of the needed numbers, or whose steps do not increase."""
    found, last = [], -1
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict):
            found.append(f"{what} {i} is not a record")
            continue
        norm = record.get("grad_norm")
        names = [name for name in needed if not is_number(record.get(name))]
        names += ["grad_norm"] * (norm is not None and not isinstance(norm, (int, float)))
        found += [f"{n} of {what} {i} is {record.get(n)!r:.40}, no finite number" for n in names]
        if not names and (type(record["step"]) is not int or record["step"] <= last):
            found.append(f"step of {what} {i} is {record['step']}, after {last}")
        last = record["step"] if not names else last
    return found
