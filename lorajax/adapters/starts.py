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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import initializers
from lorajax.factors import Factors, any_nonzero, check_factors, is_traced
from lorajax.initializers import PRNGKey, Start, TuckerFactors, name_of, resolve


class Site(NamedTuple):
    """What an initializer may look at in one layer. Arrays lead with the layer's stack and lanes.

    Attributes:
      path: the layer's path.
      key: a PRNG key that depends on the path, so that no layer's start depends on the targets.
      shape: (m, n).
      lead: sizes of stack and lanes; every slice is filled on its own.
      rank: r.
      scaling: s.
      dtype: dtype of the factors.
      weight: (*lead, m, n), in the dtype of the factors.
      gradient: (*lead, m, n), or None where none was given.
      inputs: (m, m), or None where none was given.
    """

    path: str
    key: PRNGKey
    shape: tuple[int, int]
    lead: tuple[int, ...]
    rank: int
    scaling: float
    dtype: Any
    weight: Array
    gradient: Array | None = None
    inputs: Array | None = None


_GRADIENTS = "gradients=adapters.gradients(model, loss, batches), with this layer among its targets"
_SUPPLIED = {
    **dict.fromkeys(("gradient", "matrix", "target", "tensor"), _GRADIENTS),
    "inputs": "inputs=adapters.input_moments(model, batches), with this layer among its targets",
}


def fill(start: str | Callable[..., Any], site: Site) -> Start:
    """The factors and the offset of one layer.

    Args:
      start: as for `resolve`.
      site: the layer.

    Returns:
      A Start with factors (*lead, m, r), (*lead, r, n) and an offset, whose factors have rank 0
      where the initializer has none.

    Raises:
      ValueError: if the initializer needs what the site lacks, or its factors do not fit the layer
        or are both zero.
    """
    initializer = resolve(start)
    count = int(np.prod(site.lead, dtype=int))
    keys = jax.random.split(site.key, count) if count > 1 else [site.key]

    def slices(array: Array | None) -> Sequence[Array | None]:
        if array is None:
            return [None] * count
        return list(array.astype(site.dtype).reshape((count, *site.shape)))

    weights, gradients = slices(site.weight), slices(site.gradient)
    inputs = None if site.inputs is None else site.inputs.astype(site.dtype)
    filled = []
    for key, weight, gradient in zip(keys, weights, gradients, strict=True):
        descent = None if gradient is None else -gradient
        values = {
            "key": key,
            "shape": site.shape,
            "rank": site.rank,
            "dtype": site.dtype,
            "scaling": site.scaling,
            "outputs": site.shape[1],
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
        result = jax.tree.map(lambda x: x.astype(site.dtype), result)
        check_factors(result.factors, site.shape, f"the factors of {site.path!r}")
        filled.append(result)
    return jax.tree.map(lambda *x: jnp.stack(x).reshape(site.lead + x[0].shape), *filled)


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
