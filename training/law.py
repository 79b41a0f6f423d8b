"""The scaling law that predicts the loss of a run from its size, its tokens and its text."""

import math
from dataclasses import dataclass


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

    def __call__(
        self, n: float, steps: float, epochs: float, u: float, window: float, dropout: float
    ) -> float:
        """The loss of a run with n parameters, up to a constant, as a multiple of the pilot's.

        More parameters and steps are better, with diminishing returns (Hoffmann et al. 2022), and
        so is a longer window, in bytes of text. (Steps predict the loss better than tokens: of the
        batches of SIZES, twice as large ones hardly differ.) Reading the u tokens of the training
        split several times has a cost, which is higher for models that are large for the text;
        dropout reduces it, and slows down learning. (Muennighoff et al. 2023 let repeated tokens
        count less, so that the loss cannot rise. For these small texts it does.)
        """
        overfit = self.overfit * (n / u) ** self.overfit_power * epochs
        return (
            self.size * (n / 1e6) ** -self.size_power
            + self.steps * (steps / 1000) ** -self.steps_power
            + self.window * 100 / window
            + overfit * math.exp(-self.dropout_power * dropout)
            + self.dropout_cost * dropout
        )


LAW = Law(0.1822, 0.1529, 0.2118, 0.3046, 0.04879, 0.0114, 0.3344, 0.376, 6.512)


@dataclass(frozen=True)
class Pilot:
    """A short run of the smallest model. Its loss shows how difficult the text is."""

    n_params: float
    steps: float
    epochs: float
    window: float  # in bytes
    n_unique: float  # tokens of the training split
    loss: float  # of the validation split, in nats per token

    def predict(
        self,
        n_params: float,
        steps: float,
        epochs: float,
        window: float,
        dropout: float,
        law: Law = LAW,
    ) -> float:
        """The validation loss at the end of another run on this text. On a text on which the
        pilot's loss is twice as high, so are the differences between runs."""
        u = self.n_unique
        change = law(n_params, steps, epochs, u, window, dropout)
        change -= law(self.n_params, self.steps, self.epochs, u, self.window, 0.0)
        return max(0.0, self.loss * (1 + change))  # below 0 only for a text without information
