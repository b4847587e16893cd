"""What all laws take, and how a law of all modes of a factorization gets its name."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import Factors
from lorajax.problems import MatrixFactorization

Real = float | Float[Array, "..."] | Float[np.ndarray, "..."]
"""A number or an array of floats, as laws take them."""
ModeLaw = Callable[[MatrixFactorization, Factors, Array], Array]
"""From a problem, a start and times (t,) to the singular values (t, modes)."""
_Law = TypeVar("_Law", bound=Callable[..., Array])

MODE_LAWS: dict[str, ModeLaw] = {}
"""Laws that predict all modes of a matrix-factorization flow, by name; `mode_law` adds to them."""


def broadcast(*arguments: Real) -> list[Array]:
    """Arrays of one shape: explicit, so that laws also run where rank promotion raises."""
    # A list in older releases of jax, a tuple in newer ones.
    return list(jnp.broadcast_arrays(*(jnp.asarray(x) for x in arguments)))


@judged
def mode_law(name: str) -> Callable[[_Law], _Law]:
    """Names a law `law(problem, factors, times) -> (t, modes)`, so that comparisons offer it.

    Args:
      name: by which `lorajax.compare` and the command find it; new.

    Returns:
      A decorator that enters the law in `MODE_LAWS` and leaves it as it is.

    Raises:
      ValueError: for a name that is taken.
    """

    def register(law: _Law) -> _Law:
        if name in MODE_LAWS:
            raise ValueError(f"name is {name!r}, which {MODE_LAWS[name]} has; choose another.")
        MODE_LAWS[name] = law
        return law

    return register
