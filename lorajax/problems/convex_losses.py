"""Convex losses of a model's outputs, each with its derivative, its conjugate and its curvature."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float


class ConvexLoss(NamedTuple):
    """A loss ℓ(z, y) of outputs z against targets y, both (N, K), convex in z.

    Attributes:
      value: ℓ of every sample, (N,).
      derivative: ∂ℓ/∂z, (N, K).
      conjugate: ℓ*(p) = sup_z ⟨p, z⟩ − ℓ(z, y) of every sample, (N,), for p between 0 and a
        derivative of the loss; that segment lies in its domain.
      curvature: upper bound of the Hessian's largest eigenvalue.
    """

    value: Callable[[Array, Array], Float[Array, " N"]]
    derivative: Callable[[Array, Array], Float[Array, "N K"]]
    conjugate: Callable[[Array, Array], Float[Array, " N"]]
    curvature: float


def _logistic_conjugate(p: Array, y: Array) -> Array:
    share = jnp.clip(-y * p, 0, 1)
    return jnp.sum(xlogy(share, share) + xlogy(1 - share, 1 - share), axis=1)


def _softmax_conjugate(p: Array, y: Array) -> Array:
    share = jnp.clip(p + y, 0, 1)
    return jnp.sum(xlogy(share, share), axis=1)


def _softmax_value(z: Array, y: Array) -> Array:
    return jax.nn.logsumexp(z, axis=1) - jnp.sum(y * z, axis=1)


LOSSES: dict[str, ConvexLoss] = {
    "squared": ConvexLoss(
        lambda z, y: jnp.sum((z - y) ** 2, axis=1) / 2,
        lambda z, y: z - y,
        lambda p, y: jnp.sum(p * (p / 2 + y), axis=1),
        1.0,
    ),
    "logistic": ConvexLoss(
        lambda z, y: jnp.sum(jax.nn.softplus(-y * z), axis=1),
        lambda z, y: -y * jax.nn.sigmoid(-y * z),
        _logistic_conjugate,
        0.25,
    ),
    "softmax": ConvexLoss(
        _softmax_value,
        lambda z, y: jax.nn.softmax(z, axis=1) - y,
        _softmax_conjugate,
        0.5,
    ),
}
"""By name: ½‖z − y‖²; Σ log(1 + e^{−yz}) with y = ±1; log Σ eᶻ − ⟨y, z⟩ with y a distribution."""
