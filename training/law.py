"""The scaling law that predicts the loss of a run from its size, its tokens and its text."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """The constants of the scaling law, fitted by experiments/planner.py."""

    size: float
    size_power: float
    tokens: float
    tokens_power: float
    window: float
    overfit: float
    overfit_power: float
    dropout_cost: float
    dropout_power: float

    def __call__(self, n: float, d: float, u: float, window: float, dropout: float) -> float:
        """The loss of a run with n parameters and d training tokens, up to a constant, as a
        multiple of the pilot's.

        More parameters and tokens are better, with diminishing returns (Hoffmann et al. 2022), and
        so is a longer window, in bytes of text. Reading the u tokens of the training split d / u
        times has a cost, which is higher for models that are large for the text; dropout reduces
        it, and slows down learning. (Muennighoff et al. 2023 let repeated tokens count less, so
        that the loss cannot rise. For these small texts it does.)
        """
        overfit = self.overfit * (n / u) ** self.overfit_power * d / u
        return (
            self.size * (n / 1e6) ** -self.size_power
            + self.tokens * (d / 1e6) ** -self.tokens_power
            + self.window * 100 / window
            + overfit * math.exp(-self.dropout_power * dropout)
            + self.dropout_cost * dropout
        )


LAW = Law(0.03876, 0.4233, 0.1692, 0.4003, 0.0201, 0.009419, 0.3485, 0.3168, 5.563)


@dataclass(frozen=True)
class Pilot:
    """A short run of the smallest model. Its loss shows how difficult the text is."""

    n_params: float
    n_tokens: float
    window: float  # in bytes
    n_unique: float  # tokens of the training split
    loss: float  # of the validation split, in nats per token

    def predict(
        self, n_params: float, n_tokens: float, window: float, dropout: float, law: Law = LAW
    ) -> float:
        """The validation loss at the end of another run on this text. On a text on which the
        pilot's loss is twice as high, so are the differences between runs."""
        change = law(n_params, n_tokens, self.n_unique, window, dropout)
        change -= law(self.n_params, self.n_tokens, self.n_unique, self.window, 0.0)
        return max(0.0, self.loss * (1 + change))  # below 0 only for a text without information
