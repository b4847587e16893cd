"""Rules that read a layer's rank off the spectrum of its gradient before training.

A rule is one frozen dataclass here or in your own code: a `Rule` with a `name`, what noise it
`measures`, and `ranks`. `select_ranks` takes an instance, or a name with the fields.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax import ranks


class Seen(NamedTuple):
    """What a rule may look at in one layer.

    Attributes:
      shape: (m, n) of its kernel, read as a matrix.
      singular_values: of the gradient of the mean loss, in decreasing order.
      noise: largest singular value of the gradient's noise; None where none was asked for.
      samples: number of answers behind the mean.
    """

    shape: tuple[int, int]
    singular_values: Float[Array, "*lead k"]
    noise: Float[Array, "*lead"] | None
    samples: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """How many directions of a gradient count; the base of all rules.

    A subclass sets `name` and the noise that it `measures` ("none", "halves" or "signs", as
    `estimate` has it), adds its constants as fields, and writes `ranks`. Its name is then known.
    """

    name: ClassVar[str] = ""
    measures: ClassVar[str] = "none"

    def ranks(self, seen: Seen) -> tuple[Int[Array, "*lead"], float]:
        """Ranks of a layer, and the floor they were counted above (0 without one).

        Args:
          seen: the layer.

        Returns:
          One rank for each slice of the kernel, and the largest floor.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method ranks.")


def named_rules() -> dict[str, type[Rule]]:
    """Every rule that has been defined, by name."""
    found, waiting = {}, [Rule]
    while waiting:
        each = waiting.pop(0)
        waiting += each.__subclasses__()
        if each.name:
            found[each.name] = each
    return found


def rule_named(given: str | Rule, **options: Any) -> Rule:
    """A rule from its name and constants.

    Args:
      given: a name of `named_rules()`, or a Rule, which is returned as it is.
      **options: fields of the rule of that name.

    Returns:
      The Rule.

    Raises:
      ValueError: for an unknown name, or constants that the rule does not take, lacks, or that are
        out of range.
    """
    if isinstance(given, Rule):
        if options:
            raise ValueError(
                f"rule is a {type(given).__name__}, whose fields are set; give {given.name!r} to "
                f"set {', '.join(options)}."
            )
        return given
    if given not in named_rules():
        raise ValueError(
            f"rule is {given!r}; it must be one of {', '.join(map(repr, named_rules()))}."
        )
    kind = named_rules()[given]
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in fields:
            raise ValueError(f"rule {given!r} takes {', '.join(fields)}, and no {name}.")
    return kind(**options)


def _above(seen: Seen, floors: Array, margin: float | int | None) -> tuple[Array, float]:
    raised = ranks.edge_margin(seen.shape) if margin is None else margin
    floors = floors * (1 + raised) ** 0.5
    return ranks.above(seen.singular_values, floors), float(jnp.max(floors))


@dataclasses.dataclass(frozen=True)
class _Measured(Rule):
    """What stands above the measured noise; needs no constant.

    Attributes:
      margin: δ by which `floor²` is raised, against counting noise as signal; None for
        `ranks.edge_margin` of each layer's shape, which lets about 1 layer in 1000 gain a rank by
        chance.
    """

    margin: float | int | None = None

    def __post_init__(self):
        if self.margin is not None and not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin is {self.margin}; it must be at least 0.")

    def ranks(self, seen: Seen) -> tuple[Int[Array, "*lead"], float]:
        """See `Rule.ranks`."""
        assert seen.noise is not None
        return _above(seen, seen.noise, self.margin)


@dataclasses.dataclass(frozen=True)
class SplitHalf(_Measured):
    """Counts what stands above what two halves of the data disagree by; at no further cost.

    Attributes:
      margin: δ by which `floor²` is raised; `ranks.edge_margin` if None.

    Source: theory section 3 (derived).
    """

    name: ClassVar[str] = "split_half"
    measures: ClassVar[str] = "halves"


@dataclasses.dataclass(frozen=True)
class RandomSigns(_Measured):
    """Counts what stands above the gradient of randomly signed losses; needs one loss a sample.

    Attributes:
      margin: δ by which `floor²` is raised; `ranks.edge_margin` if None.

    Source: theory section 3 (derived).
    """

    name: ClassVar[str] = "random_signs"
    measures: ClassVar[str] = "signs"


@dataclasses.dataclass(frozen=True)
class COverN(Rule):
    """Counts `σ² ≥ C/n`.

    Attributes:
      constant: C.
      noise: standard deviation of the targets' noise, from which a C follows for each layer
        (`ranks.noise_constant`); instead of `constant`.
      margin: δ by which `C/n` is raised; None for none, or `ranks.edge_margin` with `noise`.

    Source: OpenReview gg2Wb2HPOI (stated).
    """

    name: ClassVar[str] = "c_over_n"

    constant: float | int | None = None
    noise: float | int | None = None
    margin: float | int | None = None

    def __post_init__(self):
        if (self.constant is None) == (self.noise is None):
            raise ValueError("rule 'c_over_n' needs either constant or noise, and not both.")
        for name in ("constant", "noise", "margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be at least 0.")

    def ranks(self, seen: Seen) -> tuple[Int[Array, "*lead"], float]:
        """See `Rule.ranks`."""
        c, margin = self.constant, self.margin
        if self.noise is not None:
            c = ranks.noise_constant(seen.shape, self.noise)
        elif margin is None:
            margin = 0.0
        assert c is not None
        values = seen.singular_values
        floors = jnp.full(values.shape[:-1], (c / seen.samples) ** 0.5, values.dtype)
        return _above(seen, floors, margin)


@dataclasses.dataclass(frozen=True)
class Energy(Rule):
    """Counts the least directions that hold a fraction of `Σσ²`.

    Attributes:
      fraction: in (0, 1].
    """

    name: ClassVar[str] = "energy"

    fraction: float | int = 0.9

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it must lie in (0, 1].")

    def ranks(self, seen: Seen) -> tuple[Int[Array, "*lead"], float]:
        """See `Rule.ranks`."""
        return ranks.energy(seen.singular_values, self.fraction), 0.0
