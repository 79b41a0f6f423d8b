"""Plan a run that takes a given time.

    python train.py --minutes 5    the best model that five minutes on this machine give
    python train.py --plan         what 1, 5, 20, 60 and 240 minutes would give

1. Measure: a pilot run of the smallest model shows how difficult the text is, and a few steps of
   each size how fast this machine is.
2. Predict: a scaling law gives the loss of each size after the steps that fit.
3. Choose the size, the number of steps, dropout and weight decay with the lowest predicted loss,
   and whether to divide the time between two models, of which the second learns from the first.
4. While training, shorten the schedule if the run is too slow (deadline.py).
"""

import itertools
import math
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import GPTConfig, TrainConfig, train_settings
from system.device import pick_device
from system.settings import UserError, all_problems, raise_problems
from training.distributed import BUSY, CpuClock, is_torchrun
from utils import autocast, count_params, even_starts, read_checkpoint

Flags = dict[str, Any]  # given on the command line, by name
MakeTrainer = Callable[[GPTConfig, TrainConfig], Any]  # makes a Trainer of train.py

RECIPE = "fast"  # the preset whose runs the law was fitted to
# layers, channels, window, batch size. Longer windows are too slow for the small models.
SIZES = (
    (2, 64, 64, 24),
    (2, 128, 64, 24),
    (4, 128, 256, 9),
    (4, 192, 256, 9),
    (6, 256, 256, 9),
    (6, 384, 256, 9),
)
PLANNED = ("max_steps", "preset", "optimizer", "schedule", "compile", "overfit_batch", "dry_run")
CHOICES = {"dropout": (0.0, 0.2), "weight_decay": (0.1, 1.0)}  # the values to choose from
FIRST_SHARE = 0.42  # of the time, for the first of two models: the second takes 1.4 times as long
TAUGHT = 0.25  # the second overfits less, by exp(-TAUGHT) (experiments/records.md)
DROPOUT_TIME = 1.25  # of a step on a CPU, relative to one without dropout
BUDGETS = (1, 5, 20, 60, 240)  # minutes, of --plan
PILOT_SHARE, PILOT_SECONDS = 0.08, 15.0  # of the time, and at most
PILOT_STEPS = 150  # at least: the law was fitted to pilots of 150 and 600 steps
PILOT_WINDOWS = 1024  # to measure its loss
PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a run, where steps are timed
MIN_STEPS = 50  # of a run
EVAL_SHARE = 0.05  # of the time
MARGIN = 0.03  # of the time, for what takes longer than measured
DISK_SPEED = 2e8  # bytes per second, for checkpoints
END_SECONDS = 2.0  # for the plot at the end, with the import of matplotlib


@dataclass(frozen=True)
class Run:
    """What the law knows about a run."""

    n_params: float  # without embeddings
    steps: float
    epochs: float  # how often each token of the text is read
    window: float  # in bytes
    dropout: float = 0.0
    weight_decay: float = 0.1
    taught: bool = False  # learns from an earlier run with these settings


@dataclass(frozen=True)
class Law:
    """The constants of the scaling law, fitted by experiments/planner.py."""

    size: float
    size_power: float
    steps: float
    steps_power: float
    window: float
    overfit: float
    overfit_power: float
    dropout_cost: float
    dropout_power: float
    decay_cost: float
    decay_power: float

    def __call__(self, run: Run, unique: float) -> float:
        """The loss of a run up to a constant, as a multiple of the pilot's, on a text with this
        number of training tokens.

        More parameters and steps are better, with diminishing returns (Hoffmann et al. 2022), and
        so is a longer window. (Steps predict the loss better than tokens.) Reading the text several
        times has a cost, higher for models that are large for it. Dropout, weight decay (Kim et al.
        2025) and a teacher reduce it; the first two slow down learning. (Muennighoff et al. 2023
        let repeated tokens count less, so that the loss cannot rise. For small texts it does.)
        """
        overfit = self.overfit * (run.n_params / unique) ** self.overfit_power * run.epochs
        strength = self.dropout_power * run.dropout + self.decay_power * run.weight_decay
        strength += TAUGHT * run.taught
        return (
            self.size * (run.n_params / 1e6) ** -self.size_power
            + self.steps * (run.steps / 1000) ** -self.steps_power
            + self.window * 100 / run.window
            + overfit * math.exp(-strength)
            + self.dropout_cost * run.dropout
            + self.decay_cost * run.weight_decay
        )


LAW = Law(0.1916, 0.1515, 0.2016, 0.311, 0.04538, 0.01163, 0.3694, 0.3313, 5.346, 0.01793, 0.4707)


@dataclass(frozen=True)
class Pilot:
    """A short run of the smallest model. Its loss shows how difficult the text is."""

    run: Run
    unique: float  # tokens of the training split
    loss: float  # of the validation split, in nats per token

    def predict(self, run: Run, law: Law = LAW) -> float:
        """The validation loss at the end of another run on this text. On a text on which the
        pilot's loss is twice as high, so are the differences between runs."""
        change = law(run, self.unique) - law(self.run, self.unique)
        return max(0.0, self.loss * (1 + change))  # below 0 only for a text without information


def plan_flags(flags: Flags) -> Flags:
    """The flags of the smallest size, for now. Raises UserError for flags that a plan chooses."""
    if chosen := ", ".join(f"--{name}" for name in PLANNED if name in flags):
        raise UserError(f"--minutes and --plan choose {chosen}: leave it out")
    if is_torchrun():
        raise UserError("--minutes and --plan are for one process: start them without torchrun")
    return size_flags(SIZES[0], flags)


def size_flags(size: tuple[int, ...], fixed: Flags) -> Flags:
    """The flags of a size, with the user's. A wider model has a lower best learning rate."""
    flags: Flags = dict(zip(("n_layer", "n_embd", "block_size", "batch_size"), size, strict=True))
    flags |= {"preset": RECIPE, "dropout": 0.0, "compile": False} | fixed
    flags = {"grow_windows": flags["block_size"] > SIZES[0][2]} | flags
    return {"lr_max": round(6e-3 * math.sqrt(128 / max(1, flags["n_embd"])), 5)} | flags


def settings(flags: Flags) -> tuple[GPTConfig, TrainConfig]:
    """The settings of a run with these flags. Raises UserError if they are not valid."""
    gpt, config = train_settings(flags, "cpu")
    raise_problems(all_problems(gpt) + all_problems(config))
    return gpt, config


def block_params(gpt: GPTConfig) -> int:
    """The size N of the law: without embeddings, which mostly depend on the vocabulary."""
    return gpt.n_layer * count_params(gpt)[1]


def step_tokens(gpt: GPTConfig, config: TrainConfig) -> int:
    return config.batch_size * config.grad_accum * gpt.block_size


def seconds_per_step(trainer: Any) -> float:
    """The mean time of a training step, from the faster of two at each place: the first allocates
    memory. If windows grow, late steps take up to 14% longer. Reading the loss waits for a GPU."""
    seconds = []
    for place in PLACES:
        trainer.step = int(place * trainer.config.max_steps)
        times = timeit.repeat(lambda: trainer.train_step()["loss"].item(), number=1, repeat=2)
        seconds.append(min(times))
    return statistics.mean(seconds)


def seconds_per_window(trainer: Any) -> float:
    """The time that an evaluation takes per window, from the faster of two batches."""
    n_windows = trainer.config.batch_size
    return min(timeit.repeat(lambda: evaluate(trainer, n_windows), number=1, repeat=2)) / n_windows


def evaluate(trainer: Any, n_windows: int) -> float:
    """The validation loss over evenly spaced windows."""
    with trainer.eval_mode(), autocast(trainer.device, trainer.config.precision):
        return trainer.task.mean_loss(trainer.model, trainer.task.corpus.val_ids, n_windows)


def final_seconds(trainer: Any) -> float:
    """The time that a run takes after its last step, for the whole validation split."""
    n_windows = len(even_starts(len(trainer.task.corpus.val_ids), trainer.model.config.block_size))
    return n_windows * seconds_per_window(trainer) + END_SECONDS


def run_pilot(make_trainer: MakeTrainer, flags: Flags, seconds: float) -> tuple[Pilot, float]:
    """Train the pilot for some time. Flags that fix a size, the learning rate, dropout or
    growing windows do not apply to it. Also returns the seconds that a sample takes per layer."""
    window = min(SIZES[0][2], flags.get("block_size", SIZES[0][2]))  # the text may be short
    gpt, config = settings(flags | size_flags(SIZES[0], {"block_size": window}))
    steps = max(PILOT_STEPS, int(seconds / seconds_per_step(make_trainer(gpt, config))))
    trainer = make_trainer(gpt, replace(config, max_steps=steps, warmup_steps=None))
    for _ in range(steps):
        trainer.train_step()
    loss, start = evaluate(trainer, PILOT_WINDOWS), time.perf_counter()
    if config.sample_tokens:
        with trainer.eval_mode():
            trainer.task.sample(trainer.model)
    sample = (time.perf_counter() - start) / gpt.n_layer
    n_unique = len(trainer.task.corpus.train_ids)
    epochs = steps * step_tokens(gpt, config) / n_unique
    n_bytes = window * trainer.task.corpus.bytes_per_token
    run = Run(block_params(gpt), steps, epochs, n_bytes, weight_decay=config.weight_decay)
    return Pilot(run, n_unique, loss), sample


def measure_sizes(
    make_trainer: MakeTrainer, flags: Flags, limit: float, sample: float
) -> "list[Candidate]":
    """Time all sizes, except those for which MIN_STEPS would take a quarter of the limit, or the
    text or a teacher's window is too short. A flag that fixes a part of the size applies to all."""
    found: list[Candidate] = []
    for size in SIZES:
        try:
            gpt, config = settings(size_flags(size, flags))
        except UserError:  # the learning rate of a large size may be below --lr_min
            continue
        if found:  # estimate from the size before
            last = found[-1]
            if (last.gpt, last.config) == (gpt, config):
                continue
            ratio = block_params(gpt) / last.n_params
            ratio *= step_tokens(gpt, config) / step_tokens(last.gpt, last.config)
            if MIN_STEPS * last.step * ratio > limit / 4:
                break
        trainer = make_trainer(gpt, config)
        corpus = trainer.task.corpus
        windows = [model.config.block_size for model in getattr(trainer.task, "teachers", ())]
        short = corpus.train_docs is None and len(corpus.train_ids) <= gpt.block_size
        if short or min(windows, default=gpt.block_size) < gpt.block_size:
            break
        evaluation = 2 * config.eval_windows * seconds_per_window(trainer) + sample * gpt.n_layer
        evaluation += 2 * 12 * count_params(gpt)[0] / DISK_SPEED  # best.pt and latest.pt
        step, final = seconds_per_step(trainer), final_seconds(trainer)
        window = gpt.block_size * corpus.bytes_per_token
        found.append(Candidate(gpt, config, block_params(gpt), window, step, evaluation, final))
    return found


def least_steps(flags: Flags) -> int:
    """The steps of the shortest run: enough for a prediction, and two times the warmup."""
    return max(MIN_STEPS, 2 * (flags.get("warmup_steps") or 0))


@dataclass(frozen=True)
class Candidate:
    """A size and what it costs on this machine, in seconds; with a loss, a run of this size."""

    gpt: GPTConfig
    config: TrainConfig
    n_params: int  # without embeddings
    window: float  # in bytes
    step: float
    evaluation: float  # one during training, with its sample and checkpoints
    final: float  # after the last step
    share: float = 1.0  # of the time: below 1, a second run follows
    loss: float = math.inf  # predicted, of the last run

    def seconds(self, steps: int, evaluations: int) -> float:
        """What a run takes. There is one more evaluation before it."""
        return steps * self.step + (evaluations + 1) * self.evaluation + self.final

    def best_run(self, seconds: float, pilot: Pilot, flags: Flags) -> "Candidate":
        """The run, or the first of two, with the lowest predicted loss in this time; without a loss
        if there is too little time. Fewer steps than possible are better if more would overfit."""
        best, least, every = self, least_steps(flags), flags.get("eval_every", math.inf)
        choices = [(flags[name],) if name in flags else CHOICES[name] for name in CHOICES]
        choices.append((1.0,) if flags.get("teacher") else (1.0, FIRST_SHARE))
        for dropout, decay, share in itertools.product(*choices):
            slower = DROPOUT_TIME if dropout > self.gpt.dropout else 1  # unless timed with dropout
            gpt, step = replace(self.gpt, dropout=dropout), self.step * slower
            n = min(10, max(2, int(EVAL_SHARE * share * seconds / self.evaluation)))  # evaluations
            most = int((share * seconds - self.seconds(0, n)) / (step + self.evaluation / every))
            if most < least:
                continue
            for steps in {round(most * (least / most) ** (i / 200)) for i in range(201)}:
                epochs = self.epochs(steps, pilot)
                run = Run(self.n_params, steps, epochs, self.window, dropout, decay, share < 1)
                if (loss := pilot.predict(run)) < best.loss:
                    own: Flags = {"max_steps": steps, "warmup_steps": flags.get("warmup_steps")}
                    own["eval_every"] = flags.get("eval_every", math.ceil(steps / n))
                    config = replace(self.config, weight_decay=decay, **own)
                    best = replace(self, gpt=gpt, config=config, step=step, share=share, loss=loss)
        return best

    def epochs(self, steps: int, pilot: Pilot) -> float:
        return steps * step_tokens(self.gpt, self.config) / pilot.unique

    def line(self, minutes: float, pilot: Pilot, mark: str = "") -> str:
        gpt, steps = self.gpt, self.config.max_steps
        size = f"{gpt.n_layer} x {gpt.n_embd}"
        return (
            f"{mark:1}{minutes:8g}  {size:8}{count_params(gpt)[0]:12,}{1000 * self.step:9.1f}"
            f"{steps:10,}{self.epochs(steps, pilot):8.1f}{gpt.dropout:9g}"
            f"{self.config.weight_decay:14g}{1 + (self.share < 1):8}{self.loss:16.3f}"
        )


HEADER = "  minutes  size      parameters  ms/step     steps  epochs  dropout"
HEADER += "  weight decay  models  predicted loss"


def plan_run(
    flags: Flags, gpt: GPTConfig, config: TrainConfig, make_trainer: MakeTrainer, started: float
) -> tuple[GPTConfig, TrainConfig]:
    """Measure, print the plan, and return the best settings for the time in config.minutes (or for
    the longest of BUDGETS). Raises UserError if the time is too short. started: when the process
    began, by time.perf_counter."""
    budgets = (config.minutes,) if config.minutes else BUDGETS
    limit, startup = 60 * budgets[-1], time.perf_counter() - started
    print("plan: timing this machine, and a short pilot run on this text", flush=True)
    flags = flags | {"precision": config.precision, "vocab_size": gpt.vocab_size}
    cpu_clock = CpuClock()
    pilot, sample = run_pilot(make_trainer, flags, min(PILOT_SECONDS, PILOT_SHARE * limit))
    sizes = measure_sizes(make_trainer, flags, limit, sample)
    measured = time.perf_counter() - started
    slowdown = cpu_clock.slowdown() if pick_device(config.device).type == "cpu" else 0.0
    if slowdown > BUSY:
        print(f"other programs use the CPU: work takes {slowdown:.1f} times as long as alone")
    print(f"the pilot has a loss of {pilot.loss:.3f} after {pilot.run.steps:,} steps\n{HEADER}")
    for minutes in budgets:
        used = measured if config.minutes else min(measured, startup + 6 * minutes)  # a tenth
        seconds = 60 * minutes * (1 - MARGIN) - used
        runs = [size.best_run(seconds, pilot, flags) for size in sizes]
        best = min(runs, key=lambda run: run.loss)
        for run in runs:
            if run.loss < math.inf and (run is best or config.minutes):
                print(run.line(minutes, pilot, "*" * bool(config.minutes and run is best)))
    if best.loss == math.inf:
        needed = (measured + sizes[0].seconds(least_steps(flags), 2)) / (0.9 - MARGIN) / 60
        raise UserError(
            f"{minutes:g} minutes are too short to measure, train and evaluate on "
            f"{config.data}: give at least --minutes {math.ceil(10 * needed) / 10:g}"
        )
    # What did not come from the flags: a teacher, a data set and the machine have their own.
    own = ("data", "separator", "hold_out", "encoding", "skip_bad", "tokenizer", "precision_for")
    config = replace(best.config, **{name: getattr(config, name) for name in own})
    if config.minutes:
        print(f"chosen: {reason(best, runs, seconds)}", flush=True)
        if best.share < 1:
            if (folder := student_dir(config)).exists() and not (config.overwrite or config.plan):
                raise UserError(f"{folder}/ is for a second run: --overwrite it, or give a --tag")
            print(f"then a second model, in {folder}/, learns from this one", flush=True)
            minutes = round((used + best.share * (60 * config.minutes - used)) / 60, 2)
            config = replace(config, minutes=minutes, student_minutes=config.minutes)
    return best.gpt, config


def reason(best: Candidate, runs: list[Candidate], seconds: float) -> str:
    steps, every = best.config.max_steps, best.config.eval_every
    if best.seconds(round(1.05 * steps), math.ceil(steps / every)) < best.share * seconds:
        why = "more steps would overfit this text"
    elif sum(run.loss < math.inf for run in runs) == 1:
        why = "the only size that is fast enough"
    elif best.n_params < max(run.n_params for run in runs):
        why = "larger models would get too few steps"
    else:
        why = "the time is enough for the largest size"
    return f"{best.gpt.n_layer} layers of {best.gpt.n_embd} channels, {steps:,} steps: {why}"


def student_dir(config: TrainConfig) -> Path:
    return Path(config.out_dir, f"{config.tag}_second".strip("_"))


def second_run(
    gpt: GPTConfig, config: TrainConfig, data: Any, resumed: bool
) -> tuple[TrainConfig, Any, dict[str, Any] | None]:
    """The settings, data and checkpoint (if interrupted) of a finished run's student."""
    from training.teachers import load_teachers  # only after a run with a student

    folder, teacher = student_dir(config), Path(config.out_dir, config.tag, "best.pt")
    steps, minutes = config.planned_steps or config.max_steps, config.student_minutes
    schedule: Flags = {"max_steps": steps, "planned_steps": 0, "lr_scale": 1.0}
    config = replace(config, tag=folder.name, teacher=str(teacher), minutes=minutes, **schedule)
    teachers, latest = load_teachers(gpt, config, None), folder / "latest.pt"
    read = latest.exists() and (resumed or not config.overwrite)
    state = read_checkpoint(latest) if read else None
    if state and state.get("teachers") != teachers.sha256:
        if state["train_config"].get("teacher") != str(teacher):
            raise UserError(f"{folder}/ contains another run: move it, then --resume this one")
        state = None  # it learned from an earlier first model
    state = state if resumed else None
    saved = {name: state["train_config"][name] for name in schedule} if state else {}
    config = replace(config, student_minutes=0.0, overwrite=True, **saved)
    return config, data._replace(teachers=teachers), state
