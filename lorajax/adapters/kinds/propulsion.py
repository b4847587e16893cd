"""Propulsion: outputs scaled by a power of a learned vector."""

import dataclasses
from typing import Any

from jaxtyping import Array

from lorajax.adapters.kinds.ia3 import IA3, IA3Spec
from lorajax.adapters.starts import Site
from lorajax.environment.judging import POSITIVE, at_least, judged


class Propulsion(IA3):
    """Propulsion: outputs `(1 + s d)^k ⊙ y`, or inputs.

    Args:
      change: d, as for `IA3`; 0 leaves the layer as it is.
      power: k, which multiplies the first step of a scale by as much.
      options: as for `IA3`.

    Source: Propulsion, theory section 9 (recalled); the default power is this toolkit's.
    """

    peft = None

    def __init__(self, change: Array, *, power: int = 4, **options: Any):
        self.power = int(power)
        super().__init__(change, **options)

    @property
    def kind(self) -> str:
        """The method's name."""
        return "Propulsion"

    def gain(self) -> Array:
        """What is added to a scale of 1."""
        return (1 + self.scaling * self.change[...]) ** self.power - 1


@judged(alpha=POSITIVE, power=at_least(1))
@dataclasses.dataclass(frozen=True, kw_only=True)
class PropulsionSpec(IA3Spec):
    """Propulsion: outputs scaled by the k-th power of a learned vector.

    Attributes:
      power: k, at least 1; 1 is (IA)³.
    """

    name = "propulsion"

    power: int = 4

    def build(self, site: Site) -> Propulsion:
        """The Propulsion adapter of one layer."""
        options = self.common(site) | {"start": "zero", "inputs": self.side == "inputs"}
        return Propulsion(self.zeros(site), power=self.power, **options)
