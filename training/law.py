"""The scaling law that predicts the loss of a run from its size, its steps and its text."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """What the law knows about a run."""

    n_params: float  # without embeddings
    steps: float
    epochs: float  # how often each token of the text is read
    window: float  # in bytes
    dropout: float = 0.0
    weight_decay: float = 0.1


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
        times has a cost, which is higher for models that are large for it. Dropout and weight decay
        reduce this cost (Kim et al. 2025), and slow down learning. (Muennighoff et al. 2023 let
        repeated tokens count less, so that the loss cannot rise. For these small texts it does.)
        """
        overfit = self.overfit * (run.n_params / unique) ** self.overfit_power * run.epochs
        strength = self.dropout_power * run.dropout + self.decay_power * run.weight_decay
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
