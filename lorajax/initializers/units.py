"""The unit of scale, the start of a flow, and the random frames that the starts are made of."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import Factors, PRNGKey, check_positive

Distribution = Literal["normal", "uniform"]
"""What entries are drawn from, at the same root mean square."""

SCALES: dict[str, float] = {
    # PEFT: kaiming_uniform(a=√5), U(±1/√in), so a column's mean square norm is in · 1/(3 in).
    "peft": 3**-0.5,
    # Flax NNX, Qwix, Keras: he_uniform, U(±√(6/in)), so it is in · 2/in; √6 times PEFT's.
    "flax": 2**0.5,
    # Gaussian with variance 1/in, the start of the LoRA paper's theory.
    "lecun": 1.0,
}
"""Default scales of the libraries in this module's unit (recalled; checked in the tests)."""


class Start(NamedTuple):
    """A start that is made of a weight, with what has to be taken off that weight.

    With W the pretrained weight and s the adapter's scaling, the adapted weight is
    `W - s · offset.product + s · factors.product`, which is W itself at the start. For the problem
    of a flow: `problem.recentered(start.offset)`.

    Attributes:
      factors: the trainable factors.
      offset: the frozen factors that keep the adapted weight at W when the flow begins.
    """

    factors: Factors
    offset: Factors


@judged
def resolve_scale(scale: float | str | Float[Array, ""]) -> float | Float[Array, ""]:
    """Returns `scale` as a number, looking names up in `SCALES`.

    Args:
      scale: a positive number (it may be traced) or the name of a library.

    Returns:
      The root-mean-square norm of a column of A.

    Raises:
      ValueError: for an unknown name, or a number that is not positive and finite.

    Example:
      >>> from lorajax import initializers
      >>> round(initializers.resolve_scale("flax") / initializers.resolve_scale("peft"), 4)
      2.4495
    """
    if isinstance(scale, str):
        if scale not in SCALES:
            raise ValueError(
                f"scale is {scale!r}; a named scale must be one of {', '.join(sorted(SCALES))}."
            )
        return SCALES[scale]
    check_positive(scale=scale)
    return scale


Initializer = Callable[..., Factors | Start]
"""What fills a pair of factors: any of the functions of this room."""


@functools.partial(jax.jit, static_argnames=("shape", "distribution", "dtype", "axis"))
def random_matrix(
    key: PRNGKey, shape: tuple[int, int], norm: float | Array, distribution: str, dtype, axis: int
) -> Array:
    """Independent entries; vectors along `axis` have root-mean-square norm `norm`."""
    std = jnp.asarray(norm, dtype) / jnp.sqrt(jnp.asarray(shape[axis], dtype))
    if distribution == "normal":
        return std * jax.random.normal(key, shape, dtype)
    if distribution == "uniform":
        bound = jnp.sqrt(jnp.asarray(3.0, dtype))
        return std * jax.random.uniform(key, shape, dtype, -bound, bound)
    raise ValueError(f"distribution is {distribution!r}; it must be 'normal' or 'uniform'.")
