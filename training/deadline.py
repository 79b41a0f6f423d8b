"""Keep the time limit of --minutes: shorten the schedule of a run that is slower than planned."""

import math
from typing import Any

from tqdm import tqdm

from config import TrainConfig
from training.plan import final_seconds
from training.run_log import RunLog


def shorten(config: TrainConfig, step: int, max_steps: int) -> None:
    """Let a linear schedule end at max_steps: from this step on, the learning rate decreases faster
    from the value that it has.

    >>> config = TrainConfig(lr_max=1.0, warmup_steps=0, max_steps=100, schedule="linear")
    >>> shorten(config, 50, 75)  # from 0.5 to 0 in 25 steps, as if from 1.5 in 75
    >>> config.max_steps, config.lr_max
    (75, 1.5)
    """
    warmup = config.warmup_steps or 0
    factor = (config.max_steps - step) / (config.max_steps - warmup)
    factor *= (max_steps - warmup) / (max_steps - step)
    config.lr_max = config.lr_min + (config.lr_max - config.lr_min) * factor
    config.max_steps = max_steps


class Deadline:
    """The time limit of a run."""

    def __init__(self, trainer: Any, log: RunLog):
        self.config, self.log = trainer.config, log
        self.end = 60 * self.config.minutes  # in seconds of the run
        self.final = final_seconds(trainer)
        self.step, self.now = trainer.step, log.seconds()
        self.evaluation, self.n_evaluations = 0.0, 0  # seconds, the mean: one imports matplotlib
        self.mean, self.lowest = 0.0, math.inf  # seconds per step, of about the last tenth
        self.announced = self.config.max_steps
        self.n_timed = -1  # steps, without the first, which may include compilation

    def keep(self, step: int) -> None:
        """Time what happened since the last call, and shorten the schedule if the run would end too
        late. Called before each step."""
        config, n_steps, took = self.config, step - self.step, self.log.seconds() - self.now
        self.step, self.now = step, self.now + took
        if self.log.is_evaluation_step(step) and (n_steps or not step):
            self.n_evaluations += 1
            self.evaluation += (took - n_steps * self.mean - self.evaluation) / self.n_evaluations
        elif n_steps:
            self.n_timed += 1
            if self.n_timed:
                share = max(1 / self.n_timed, min(0.1, 10 / config.max_steps))
                self.mean += share * (took - self.mean)
        if self.n_timed < 10 or step < (config.warmup_steps or 0):
            return
        self.lowest = min(self.lowest, self.mean)
        n_evaluations = math.ceil(config.max_steps / config.eval_every) - step // config.eval_every
        left = self.end - self.now - n_evaluations * self.evaluation
        left -= self.final * self.mean / self.lowest  # slows down like the steps
        before, possible = config.max_steps, step + max(1, int(0.98 * left / self.mean))
        if step + left / self.mean < before and possible < before:
            shorten(config, step, possible)
            self.log.header["max_steps"] = possible  # for the verdict
            if self.log.bar is not None:
                self.log.bar.total = possible
            if possible < 0.9 * self.announced:
                tqdm.write(
                    f"  steps now take {1000 * self.mean:.1f} ms: to end in {config.minutes:g} "
                    f"minutes, the schedule is shortened from {self.announced:,} to {possible:,}"
                )
                self.announced = possible
