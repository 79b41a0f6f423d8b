"""Plot training runs and what a model has learned.

    python plots.py                                      the newest run: losses, learning rate, ...
    python plots.py checkpoints/a checkpoints/b --x time --output_file both.svg
    python plots.py checkpoints/best.pt --inside "To be, or not"
    python plots.py --picture attention --text "To be, or not to be" --layers 0,3
    python plots.py --picture positions
    python plots.py --picture embeddings checkpoints/best.pt
    python plots.py --picture temperatures --text "ROMEO:" --temperatures 0.5,1,1.5

The extension of --output_file, .png or .svg, selects the format.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from system.start import run

from system.command_line import parse_args
from system.files import file_problems
from system.settings import UserError, first_line, setting
from utils import newest_checkpoint, read_checkpoint
from viz import curve
from viz.curve import Record, Run, is_number
from viz.internals import plot_internals

MAX_RUNS = 20  # in one picture: more verdicts and names than that do not fit
SIZES = ("vocab_size", "batch_size", "grad_accum", "block_size", "n_layer", "n_embd")
PICTURES = ("runs", "inside", "attention", "positions", "embeddings", "temperatures")


@dataclass
class PlotConfig:
    inputs: tuple[str, ...] = setting(
        (), "folders of runs, or one checkpoint; default: the newest run", positional=True
    )
    picture: str = setting("runs", "what to plot", choices=PICTURES)
    output_file: str = setting("", "file to write, .png or .svg; default: PICTURE.png")
    x: str = setting("step", "horizontal axis of runs", choices=tuple(curve.X_LABELS))
    text: str = setting("To be, or not to be", "input of inside, attention and temperatures")
    inside: str = setting("", "short for --picture inside --text TEXT")
    layers: str = setting("", "layers of attention, for example 0,3; default: all")
    heads: str = setting("", "heads of attention, for example 0,1; default: all")
    temperatures: str = setting("0.5,0.8,1,1.5", "temperatures, one panel each")

    def __post_init__(self) -> None:
        if self.inside:
            self.picture, self.text = "inside", self.inside

    @property
    def output(self) -> Path:
        return Path(self.output_file or f"{self.picture}.png")

    def problems(self) -> list[str]:
        found: list[str] = []
        path = self.output
        if path.suffix not in (".png", ".svg"):
            found.append(f"--output_file {path} must end in .png or .svg")
        found += file_problems(path, mark=b"atplotlib")  # as PNG and SVG files say
        if len(self.inputs) > MAX_RUNS:
            found.append(f"at most {MAX_RUNS} runs fit in a picture, not {len(self.inputs)}")
        if self.picture != "runs" and len(self.inputs) > 1:
            found.append(f"--picture {self.picture} takes one checkpoint, not {len(self.inputs)}")
        try:
            self.numbers()
        except ValueError as error:
            found.append(f"--layers, --heads and --temperatures must be lists of numbers: {error}")
        return found

    def numbers(self) -> dict[str, list[Any]]:
        """The layers, heads and temperatures. Raises ValueError if they are not such lists."""
        kinds = {"layers": int, "heads": int, "temperatures": float}
        lists = {
            name: [kind(word) for word in getattr(self, name).split(",") if word]
            for name, kind in kinds.items()
        }
        if not all(0 <= number < math.inf for numbers in lists.values() for number in numbers):
            raise ValueError("they must be finite and at least 0")
        return lists


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
            lines = curve.read_records(file)
        except OSError as error:
            raise UserError(f"{file.parent} is not the folder of a run: {error}") from None
    try:
        settings, *records = lines
        final = records.pop()["final"] if records and "final" in records[-1] else {}
        log, steps = [r for r in records if "val" in r], curve.training_steps(records)
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
    what: str, record: Record, names: Iterable[str], low: float = -curve.MAX_NUMBER
) -> None:
    """Raise an error unless these values of a record can be drawn and are at least `low`."""
    for name in names:
        if not is_number(record[name]) or record[name] < low:
            raise ValueError(f"{name} of {what} is {record[name]!r:.40}")


def main(argv: list[str] | None = None) -> int:
    config = parse_args(PlotConfig, argv, __doc__)
    paths = [Path(name) for name in config.inputs]
    if config.picture == "runs":
        paths = paths or [newest_checkpoint(Path("checkpoints")).parent]
        runs = [read_run(path) for path in paths]
        for run in runs if config.x == "tokens" else []:
            counted = any(record.get("tokens_per_second") for record in run.log)
            if "questions" in run.settings["corpus"] or not counted:
                raise UserError(f"{run.name}: its records have padding; use --x step or --x time")
        figure = curve.plot_runs(runs, config.x)
    else:
        path = paths[0] if paths else newest_checkpoint(Path("checkpoints"))
        figure = plot_internals(path, config.picture, config.text, **config.numbers())
    curve.save_figure(figure, config.output)
    print(f"picture: {config.output}")
    return 0


if __name__ == "__main__":
    run(main)
