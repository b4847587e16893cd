"""Rank rules: from the spectrum of a gradient (or of an update) to the rank to train with.

* `estimates`: what the rules are made of, on spectra and on gradients: `c_over_n`, `split_half`,
  `random_signs`, `energy`, `noise_constant`, and `allocate` for many layers at once.
* `rules`: the rules that studies, `adapters.select_ranks` and the command know by name. One is one
  function there, and `rule(…)` takes a name or any function of that form.
* `intruders`: how strong an update may be before it stands on top of a weight's own directions.
"""

from lorajax.ranks.estimates import (
    UNFOLDED_WIDTH,
    RankEstimate,
    above,
    allocate,
    c_over_n,
    edge_margin,
    edge_mean,
    effective_rank,
    energy,
    noise_constant,
    random_signs,
    rounding_floor,
    split_half,
    split_half_modes,
    stable_rank,
)
from lorajax.ranks.finding import FACTS, Rule, rule, rules
from lorajax.ranks.intruders import intruder_overlaps, intruder_threshold, intruder_value

__all__ = [
    "FACTS",
    "UNFOLDED_WIDTH",
    "RankEstimate",
    "Rule",
    "above",
    "allocate",
    "c_over_n",
    "edge_margin",
    "edge_mean",
    "effective_rank",
    "energy",
    "intruder_overlaps",
    "intruder_threshold",
    "intruder_value",
    "noise_constant",
    "random_signs",
    "rounding_floor",
    "rule",
    "rules",
    "split_half",
    "split_half_modes",
    "stable_rank",
]
