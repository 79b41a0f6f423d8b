"""Reading the logs of runs, which may be damaged, for plots.py."""

from collections.abc import Iterable
from pathlib import Path

from system.errors import first_line
from system.settings import UserError
from utils import read_checkpoint
from viz.curve import MAX_NUMBER, Record, Run, is_number, read_records, training_steps

MAX_RUNS = 20  # in one picture: more verdicts and names than that do not fit
SIZES = ("vocab_size", "batch_size", "grad_accum", "block_size", "n_layer", "n_embd")


def read_run(path: Path) -> Run:
    """Read a run from its folder, its log.jsonl or one of its checkpoints, which do not contain the
    training steps. Raises UserError if there is no valid log or no evaluation in it."""
    if path.suffix == ".pt":
        state = read_checkpoint(path)
        settings = state["gpt_config"] | state["train_config"] | {"corpus": state["corpus"]}
        lines = [settings, *state["log"]]
    else:
        file = path if path.suffix == ".jsonl" else path / "log.jsonl"
        try:
            lines = read_records(file)
        except OSError as error:
            raise UserError(f"{file.parent} is not the folder of a run: {error}") from None
    try:
        settings, *records = lines
        final = records.pop()["final"] if records and "final" in records[-1] else {}
        log, steps = [r for r in records if "val" in r], training_steps(records)
        if not log:
            raise UserError(f"{path} cannot be plotted: the run has not been evaluated yet")
        check_numbers("the settings", settings, SIZES, low=1)
        unused = {"max_steps": 0, "patience": 0, "weight_decay": 0}  # missing in older versions
        check_numbers("the settings", unused | settings, unused)
        if not isinstance(settings["corpus"]["name"], str):
            raise ValueError("its corpus has no name")
        for records in (log, steps):
            numbers = [record["step"] for record in records]
            if numbers != sorted(set(numbers)):
                raise ValueError("its steps do not increase")
        for i, record in enumerate(log, 1):
            record = {"train": 0.0, "exact": 0.0} | record  # only these may be missing
            names = ("step", "train", "val", "lr", "seconds", "exact")
            check_numbers(f"evaluation {i}", record, names)
    except (LookupError, TypeError, ValueError) as error:  # values of any kind
        raise UserError(f"{path} cannot be plotted, it is damaged: {first_line(error)}") from None
    return Run(str(path), settings, log, steps, final)


def check_numbers(
    what: str, record: Record, names: Iterable[str], low: float = -MAX_NUMBER
) -> None:
    """Raise an error unless these values of a record can be drawn and are at least `low`."""
    for name in names:
        if not is_number(record[name]) or record[name] < low:
            raise ValueError(f"{name} of {what} is {record[name]!r:.40}")
