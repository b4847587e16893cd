"""What the engines for many flows share: their results, and buckets of lanes that step together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax.flows import gradient

RTOL = 3e-10
"""Relative tolerance of a step that keeps singular values within 1e-8 of s_1 over whole flows."""


class LanePaths(NamedTuple):
    """Observables of many flows.

    Attributes:
      observed: arrays of shape (lanes, times, …), or pytrees of them, by name.
      status: int32 code of each lane; see `flows.STATUS`.
      steps: int32, steps of each lane; 0 for the closed form, which takes none.
    """

    observed: dict[str, Any]
    status: Int[Array, " lanes"]
    steps: Int[Array, " lanes"]


def amplitudes(factors: Any) -> Float[Array, " lanes"]:
    """The scale that a solver has to resolve, of every lane; see `gradient.amplitude`."""
    return jax.vmap(gradient.amplitude)(factors)


def by_amplitude(run: Callable[..., LanePaths], bucket: int, *trees: Any) -> LanePaths:
    """Runs lanes in buckets of like amplitude: a bucket is done when its slowest lane is.

    The last bucket is filled up, however few its lanes: the program of a bucket is then the same
    for any number of lanes. Where stability limits the steps, their sizes follow rounding errors,
    and programs of other shapes round otherwise: lanes would differ within the tolerance.
    """
    count = jax.tree.leaves(trees[-1])[0].shape[0]
    order = jnp.argsort(amplitudes(trees[-1]))
    buckets = -(-count // bucket)
    index = jnp.concatenate([order, jnp.repeat(order[-1:], buckets * bucket - count)])
    split = jax.tree.map(lambda x: x[index].reshape(buckets, bucket, *x.shape[1:]), trees)
    found = jax.lax.map(lambda part: run(*part), split)
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: x.reshape(buckets * bucket, *x.shape[2:])[:count][back], found)


def absolute(rtol: Float[Array, ""], start: Any) -> Float[Array, " lanes"]:
    """Absolute tolerance of every lane: the relative one times the start's amplitude."""
    amplitude = amplitudes(start)
    return jnp.maximum(rtol * amplitude, jnp.finfo(amplitude.dtype).tiny)


def turn(x: Array) -> Array:
    """Transposes of the matrices on the last two axes."""
    return jnp.swapaxes(x, -1, -2)
