"""The time limit of --minutes: shorten the schedule of a run that is slower than planned."""

import math
from typing import Any

from tqdm import tqdm

from config import TrainConfig
from training.plan import final_seconds

AVERAGED = 0.1  # the share of the steps over which their time is averaged
SLACK = 0.02  # of the time that is left, so that not every slow step changes the schedule


def end_schedule_at(config: TrainConfig, step: int, max_steps: int) -> None:
    """Let a linear schedule end at max_steps: from this step on, the learning rate decreases faster
    (or slower) from the value that it has.

    >>> config = TrainConfig(lr_max=1.0, warmup_steps=0, max_steps=100, schedule="linear")
    >>> end_schedule_at(config, 50, 75)  # from 0.5 to 0 in 25 steps, as if from 1.5 in 75
    >>> config.max_steps, config.lr_scale
    (75, 1.5)
    """
    warmup = config.warmup_steps or 0
    config.lr_scale *= (config.max_steps - step) / (config.max_steps - warmup)
    config.lr_scale *= (max_steps - warmup) / (max_steps - step)
    config.max_steps = max_steps


class Deadline:
    def __init__(self, trainer: Any, log: Any):
        self.config, self.log = trainer.config, log
        self.config.planned_steps = self.config.planned_steps or self.config.max_steps
        self.announced = self.config.max_steps
        self.end = 60 * self.config.minutes  # in seconds of the run
        self.final = final_seconds(trainer)
        self.step, self.now = trainer.step, log.seconds()
        self.step_seconds, self.n_steps = 0.0, -1  # the first step may include compilation
        self.fastest = math.inf
        self.evaluation, self.n_evaluations = 0.0, 0  # the mean: the first imports matplotlib

    def adjust(self, step: int) -> None:
        """Shorten the schedule if the run would end too late; lengthen it again, up to the planned
        steps, if it was slow only for a while. Called before each step."""
        self.measure(step)
        config = self.config
        if self.n_steps < 10 or step < (config.warmup_steps or 0):
            return
        n_evaluations = math.ceil(config.max_steps / config.eval_every) - step // config.eval_every
        self.fastest = min(self.fastest, self.step_seconds)
        left = self.end - self.now - n_evaluations * self.evaluation
        left -= self.final * self.step_seconds / self.fastest  # slows down like the steps
        steps, possible = config.max_steps - step, int((1 - SLACK) * left / self.step_seconds)
        possible = max(1, min(possible, config.planned_steps - step))
        late = steps * self.step_seconds > left and possible < steps
        if late or possible > 1.1 * steps:
            end_schedule_at(config, step, step + possible)
            self.announce()

    def measure(self, step: int) -> None:
        """Average the times of steps and evaluations since the last call."""
        n_steps, took = step - self.step, self.log.seconds() - self.now
        self.step, self.now = step, self.now + took
        separate = self.config.eval_every > 1  # otherwise steps include evaluations
        if separate and self.log.is_evaluation_step(step) and (n_steps or not step):
            self.n_evaluations += 1
            took -= n_steps * self.step_seconds
            self.evaluation += (took - self.evaluation) / self.n_evaluations
        elif n_steps:
            self.n_steps += 1
            horizon = min(max(1, self.n_steps), max(10, AVERAGED * self.config.max_steps))
            self.step_seconds += (took - self.step_seconds) / horizon if self.n_steps else 0.0

    def announce(self) -> None:
        """Show the new end of the schedule: in the progress bar, and in a line if it moved far."""
        steps = self.log.header["max_steps"] = self.config.max_steps  # the verdict reads the header
        if self.log.bar is not None:
            self.log.bar.total = steps
        if not 0.9 < steps / self.announced < 1.1:
            tqdm.write(
                f"  steps now take {1000 * self.step_seconds:.1f} ms: to end in "
                f"{self.config.minutes:g} minutes, the schedule has {steps:,} instead of "
                f"{self.announced:,} steps"
            )
            self.announced = steps
