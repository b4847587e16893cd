"""What a small trial says about a larger rank: the learning rate that carries over."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lorajax import laws
from lorajax.environment.judging import POSITIVE, at_least, judged


class Transfer(NamedTuple):
    """What `transfer` returns; print it for a sentence.

    Attributes:
      trial: rank of the trial, with a scaling of 1.
      rank: the median of the chosen ranks.
      alpha: numerator of a scaling alpha/r for which the trial's rate is right at every rank.
      rsalpha: that of rsLoRA's scaling alpha/√r which agrees with the trial's at its rank.
      rates: factors of the trial's rate at the median rank, by scaling: "alpha/r", "alpha/√r", "1".
      learning_rate: the trial's, and with alpha/r that of the training; None where none was given.
    """

    trial: int
    rank: float
    alpha: float
    rsalpha: float
    rates: dict[str, float]
    learning_rate: float | None

    def __str__(self) -> str:
        rate = "the rate" if self.learning_rate is None else f"the rate {self.learning_rate:g}"
        return (
            f"Adam: {rate} of a trial at rank {self.trial} is right for all these ranks with alpha "
            f"{self.alpha:g} (scaling alpha/r); at rank {self.rank:g}, their median, multiply it "
            f"by {self.rates['alpha/√r']:.2g} with rsLoRA's alpha {self.rsalpha:.3g}, by "
            f"{self.rates['1']:.2g} with a scaling of 1."
        )


@judged(trial=at_least(1), learning_rate=POSITIVE)
def transfer(
    ranks: Mapping[str, int], trial: int = 4, learning_rate: float | int | None = None
) -> Transfer:
    """Scaling and learning rate of Adam for chosen ranks, from a trial of a small rank.

    Args:
      ranks: of the layers, as `Selection.ranks` has them; at least one.
      trial: the rank that the trial had in every layer, with a scaling of 1 (the default).
      learning_rate: that the trial found best.

    Returns:
      A Transfer. Layers of different ranks have one rate of an optimizer, and only a scaling of
      alpha/r makes one rate right for all of them.

    Raises:
      ValueError: where no layer has a rank.

    Example:
      >>> from lorajax import finetune
      >>> found = finetune.transfer({"query": 8, "value": 16}, trial=4, learning_rate=1e-3)
      >>> found.alpha, found.rank, round(found.rates["1"], 2)
      (4.0, 12.0, 0.58)

    Source: `laws.carried_rate` (μA, arXiv:2602.06204, recalled; claim `mua2026.carried_rate`), for
    A of variance 1/n and B = 0, the same number of steps, and one rate for both factors.
    """
    if not ranks or min(ranks.values()) < 1:
        raise ValueError("ranks holds no layer with a rank of at least 1; give Selection.ranks.")
    median = float(np.median(list(ranks.values())))
    named = {"alpha/r": 1.0, "alpha/√r": 0.5, "1": 0.0}
    factors = {
        name: float(laws.carried_rate(1.0, median / trial, gamma)) for name, gamma in named.items()
    }
    rate = None if learning_rate is None else float(learning_rate)
    return Transfer(trial, median, float(trial), trial**0.5, factors, rate)
