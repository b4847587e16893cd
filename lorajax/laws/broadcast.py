"""What all laws take: numbers or arrays that broadcast."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Real = float | Float[Array, "..."] | Float[np.ndarray, "..."]


def broadcast(*arguments: Real) -> list[Array]:
    """Arrays of one shape: explicit, so that laws also run where rank promotion raises."""
    # A list in older releases of jax, a tuple in newer ones.
    return list(jnp.broadcast_arrays(*(jnp.asarray(x) for x in arguments)))
