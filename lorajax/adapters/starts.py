"""Filling a layer from any initializer of the core.

An initializer is called with those of the following that its signature names, so every function of
`lorajax.initializers`, partly applied or not, fills a layer, and so does a function of your own:

| parameter | what it gets |
|---|---|
| `key`, `shape`, `rank`, `dtype` | a key of the layer's own, (m, n), r, dtype of the factors |
| `weight` | the kernel as a matrix (m, n) |
| `gradient` | the loss's gradient with respect to that matrix |
| `matrix`, `target` | its negative, the direction in which the loss falls |
| `inputs` | second moment (m, m) of the layer's inputs |
| `outputs` | n |
| `scaling` | the adapter's scaling s |
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax import initializers
from lorajax.adapters.layouts import Layout, kernel_variable
from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.factors import Factors, any_nonzero, check_factors, is_traced
from lorajax.initializers import PRNGKey, Start, TuckerFactors, name_of, resolve


@judged
@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that is to get an adapter, and what is known of it.

    Attributes:
      path: the layer's path.
      base: the layer itself.
      key: a PRNG key that depends on the path, so that no layer's start depends on the targets.
      estimate: the gradient of the kernel, read as a matrix, or anything with such a `matrix`; None
        where none was given.
      inputs: second moment of the layer's inputs, (m, m), or None where none was given.
    """

    path: str
    base: nnx.Module
    key: PRNGKey
    estimate: Any = None
    inputs: Array | None = None

    @property
    def gradient(self) -> Array | None:
        """The gradient as an array (*stack, *slices, m, n), formed here and now."""
        given = self.estimate
        return given if given is None or isinstance(given, jax.Array) else given.matrix


_GRADIENTS = "gradients=adapters.gradients(model, loss, batches), with this layer among its targets"
_SUPPLIED = {
    **dict.fromkeys(("gradient", "matrix", "target", "tensor"), _GRADIENTS),
    "inputs": "inputs=adapters.input_moments(model, batches), with this layer among its targets",
}


@judged(rank=at_least(1), scaling=POSITIVE)
def fill(
    start: str | Callable[..., Any],
    site: Site,
    view: Layout,
    *,
    rank: int,
    scaling: float,
    dtype: Any,
) -> Start:
    """The factors and the offset of one layer.

    Args:
      start: as for `resolve`.
      site: the layer.
      view: its layout, with the axes that the adapter has.
      rank: r.
      scaling: s.
      dtype: dtype of the factors.

    Returns:
      A Start with factors (*stack, *slices, m, r), (*stack, *slices, r, n) and an offset, whose
      factors have rank 0 where the initializer has none. Every slice is filled on its own.

    Raises:
      ValueError: if the initializer needs what the site lacks, its factors do not fit the layer or
        are both zero, or the site's gradient is that of another layer.
    """
    initializer = resolve(start)
    lead = view.stack + view.slices
    count = math.prod(lead)
    keys = jax.random.split(site.key, count) if count > 1 else [site.key]
    gradient = site.gradient
    if gradient is not None and gradient.shape[-2:] != view.shape:
        raise ValueError(
            f"gradients hold a matrix of shape {gradient.shape} for {site.path!r}, whose kernel "
            f"reads as {view.shape}; estimate them on this model."
        )

    def matrices(array: Array | None) -> Sequence[Array | None]:
        if array is None:
            return [None] * count
        return list(array.astype(dtype).reshape((count, *view.shape)))

    weights = matrices(view.matrix(kernel_variable(site.base)[...]))
    gradients = matrices(gradient)
    inputs = None if site.inputs is None else site.inputs.astype(dtype)
    filled = []
    for key, weight, gradient in zip(keys, weights, gradients, strict=True):
        descent = None if gradient is None else -gradient
        values = {
            "key": key,
            "shape": view.shape,
            "rank": rank,
            "dtype": dtype,
            "scaling": scaling,
            "outputs": view.shape[1],
            "weight": weight,
            "gradient": gradient,
            "matrix": descent,
            "target": descent,
            "inputs": inputs,
        }
        where = f"the start of {site.path!r}"
        result = initializers.call(initializer, values, where=where, remedies=_SUPPLIED)
        if not isinstance(result, (Factors, Start)):
            raise ValueError(
                f"the start of {site.path!r} returned a {type(result).__name__}; it must return "
                "Factors, or a Start of factors and offset."
            )
        if isinstance(result, Factors):
            empty = Factors(result.a[:, :0], result.b[:0])
            result = Start(result, empty)
        result = jax.tree.map(lambda x: x.astype(dtype), result)
        check_factors(result.factors, view.shape, f"the factors of {site.path!r}")
        filled.append(result)
    return jax.tree.map(lambda *x: jnp.stack(x).reshape(lead + x[0].shape), *filled)


@judged
def fill_tucker(
    start: str | Callable[..., Any],
    path: str,
    key: PRNGKey,
    shape: tuple[int, ...],
    ranks: tuple[int, ...],
    dtype: Any,
    gradient: Array | None,
) -> TuckerFactors:
    """Core and factors of one Tucker update.

    Args:
      start: `tucker`, `hosvd`, or a callable with parameters among `key`, `shape`, `ranks`, `dtype`
        and `tensor` (the negative gradient in the kernel's shape).
      path: the layer's path, for error messages.
      key: a PRNG key.
      shape: the tensor's shape.
      ranks: its multilinear ranks.
      dtype: dtype of core and factors.
      gradient: in the tensor's shape, or None.

    Returns:
      The TuckerFactors.

    Raises:
      ValueError: if the start needs what is missing, returns something else, or cannot move.
    """
    tensor = None if gradient is None else -gradient.astype(dtype)
    if "ranks" not in initializers.asks_for(start):
        raise ValueError(
            f"start is {name_of(start)!r}; a Tucker update starts with 'tucker' or 'hosvd'."
        )
    result = initializers.call(
        start,
        {"key": key, "shape": shape, "ranks": ranks, "dtype": dtype, "tensor": tensor},
        where=f"the start of {path!r}",
        remedies=_SUPPLIED,
    )
    if not isinstance(result, TuckerFactors):
        raise ValueError(
            f"the start of {path!r} returned a {type(result).__name__}; it must return "
            "TuckerFactors."
        )
    result = jax.tree.map(lambda x: x.astype(dtype), result)
    zeros = 0
    if not is_traced(result):
        zeros = sum(not any_nonzero(x) for x in jax.tree.leaves(result))
    if zeros > 1:
        raise ValueError(
            f"the Tucker update of {path!r} has {zeros} zero arrays among core and factors, a "
            "critical point that no flow leaves; at most one of them may be zero."
        )
    return result


__all__ = ["Site", "fill", "fill_tucker", "name_of", "resolve"]
