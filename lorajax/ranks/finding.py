"""From a name or a function to a rank rule that says what it needs."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.ranks import rules as named
from lorajax.ranks.estimates import RankEstimate

FACTS = ("shape", "samples", "halves", "signs", "whitened")
"""What a rule may ask for by keyword besides its own options; see `ranks.rules`."""


class Rule(NamedTuple):
    """A rank rule, its name, and what its signature asks for.

    Attributes:
      name: of the function.
      function: as described in `ranks.rules`.
    """

    name: str
    function: Callable[..., Any]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its keywords, facts and options alike."""
        return tuple(inspect.signature(self.function).parameters)[1:]

    @property
    def noise(self) -> Literal["none", "halves", "signs"]:
        """The measurement of the noise that it needs: "halves", "signs" or "none"."""
        if self.whitens:
            return "halves"
        for kind in ("halves", "signs"):
            if kind in self.parameters:
                return kind
        return "none"

    @property
    def whitens(self) -> bool:
        """Whether it reads the spectrum of the gradient whitened by the layer's inputs."""
        return "whitened" in self.parameters

    @property
    def options(self) -> dict[str, Any]:
        """Its own options and their defaults (`inspect.Parameter.empty` where it has none)."""
        found = inspect.signature(self.function).parameters
        return {name: found[name].default for name in self.parameters if name not in FACTS}

    def check(self, **options: Any) -> None:
        """Judges options before there is a spectrum, by trying them on one of two numbers.

        Args:
          **options: of the rule; None leaves the default.

        Raises:
          ValueError: for an option that the rule lacks, needs and is not given, or finds wrong.
        """
        self._judge(options)
        tried = jnp.array([2.0, 1.0], jnp.float32)
        self(tried, shape=(2, 2), samples=2, floor=jnp.ones((), jnp.float32), **options)

    def _judge(self, options: Mapping[str, Any]) -> None:
        known = self.options
        for name, value in options.items():
            if value is not None and name not in known:
                other = ", ".join(known) or "no option"
                raise ValueError(f"rule {self.name!r} has no {name}; it takes {other}.")
        for name, default in known.items():
            if default is inspect.Parameter.empty and options.get(name) is None:
                raise ValueError(f"rule {self.name!r} needs {name}.")

    def __call__(
        self,
        singular_values: Float[Array, "*batch k"],
        *,
        shape: tuple[int, int],
        samples: int,
        floor: Float[Array, "*batch"] | None = None,
        **options: Any,
    ) -> RankEstimate:
        """Ranks of gradients by their spectra.

        Args:
          singular_values: of the mean gradients, in decreasing order.
          shape: (m, n) of a gradient.
          samples: how many samples are behind each.
          floor: the measurement that `noise` names: a top singular value for each gradient.
          **options: of the rule; None leaves the default.

        Returns:
          A RankEstimate, its floor 0 for a rule that returns counts alone.

        Raises:
          ValueError: for an option that the rule does not have, or needs and is not given.
        """
        self._judge(options)
        if self.noise != "none" and floor is None:
            raise ValueError(f"rule {self.name!r} needs the floor that it asks for, {self.noise}.")
        facts: dict[str, Any] = {"shape": shape, "samples": samples}
        facts |= dict.fromkeys(("halves", "signs", "whitened"), floor)
        given = {name: facts[name] for name in self.parameters if name in facts}
        given |= {name: value for name, value in options.items() if value is not None}
        found = self.function(singular_values, **given)
        if isinstance(found, RankEstimate):
            return found
        zero = jnp.zeros_like(singular_values[..., 0])
        return RankEstimate(jnp.asarray(found, jnp.int32), singular_values, zero)


@judged
def rules() -> tuple[str, ...]:
    """The names of all rules, in the order of `ranks.rules`."""
    return tuple(
        name
        for name, value in vars(named).items()
        if inspect.isfunction(value)
        and value.__module__ == named.__name__
        and not name.startswith("_")
    )


@judged
def rule(which: str | Callable[..., Any] | Rule) -> Rule:
    """A rank rule by its name, or any function of the form that `ranks.rules` describes.

    Args:
      which: one of `rules()`, a function whose first argument is `singular_values`, or a Rule.

    Returns:
      A Rule.

    Raises:
      ValueError: for an unknown name, or a function that does not start with `singular_values`.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorajax import ranks
      >>> def gap(singular_values, *, factor=10.0):
      ...     return jnp.sum(factor * singular_values > singular_values[..., :1], axis=-1)
      >>> found = ranks.rule(gap)
      >>> int(found(jnp.array([3.0, 1.0, 0.1]), shape=(4, 3), samples=100).rank)
      2
      >>> ranks.rule("split_half").noise, found.noise, found.options
      ('halves', 'none', {'factor': 10.0})
    """
    if isinstance(which, Rule):
        return which
    if isinstance(which, str):
        if which not in rules():
            raise ValueError(
                f"rule is {which!r}; it must be one of {', '.join(map(repr, rules()))}."
            )
        return Rule(which, getattr(named, which))
    first = next(iter(inspect.signature(which).parameters), None) if callable(which) else None
    if first != "singular_values":
        raise ValueError(
            f"rule is {which!r}; it must be a name or a function whose first argument is "
            "singular_values."
        )
    return Rule(getattr(which, "__name__", type(which).__name__), which)
