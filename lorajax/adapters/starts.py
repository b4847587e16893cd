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
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax import initializers
from lorajax.adapters.layouts import Layout, kernel_variable
from lorajax.factors import Factors, any_nonzero, check_factors, is_traced
from lorajax.initializers import PRNGKey, Start, TuckerFactors


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


_SUPPLIED = {
    "gradient": "gradients=adapters.gradients(model, loss, batches)",
    "matrix": "gradients=adapters.gradients(model, loss, batches)",
    "target": "gradients=adapters.gradients(model, loss, batches)",
    "inputs": "inputs=adapters.input_moments(model, batches)",
}
_KNOWN = {"key", "shape", "rank", "dtype", "weight", "outputs", "scaling", *_SUPPLIED}


def resolve(start: str | Callable[..., Any]) -> Callable[..., Any]:
    """The initializer of a name, or the callable itself.

    Args:
      start: the name of a function of `lorajax.initializers`, or any callable with parameters among
        those listed above.

    Returns:
      The initializer.

    Raises:
      ValueError: for an unknown name.
    """
    if not isinstance(start, str):
        return start
    known = [
        name for name in initializers.__all__ if inspect.isfunction(getattr(initializers, name))
    ]
    known.remove("resolve_scale")
    if start not in known:
        raise ValueError(
            f"start is {start!r}; a named start must be one of {', '.join(sorted(known))}."
        )
    return getattr(initializers, start)


def name_of(start: str | Callable[..., Any]) -> str:
    """A short name for `describe`: the function's, with the arguments bound to it."""
    if isinstance(start, str):
        return start
    if isinstance(start, functools.partial):
        bound = ", ".join(f"{key}={value!r}" for key, value in start.keywords.items())
        return f"{name_of(start.func)}({bound})"
    return getattr(start, "__name__", type(start).__name__).strip("<>")


def _arguments(initializer: Callable[..., Any], values: dict[str, Any], path: str) -> dict:
    bound = initializer.keywords if isinstance(initializer, functools.partial) else {}
    arguments = {}
    for name, parameter in inspect.signature(initializer).parameters.items():
        if name in bound or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in values:
            if values[name] is None:
                raise ValueError(
                    f"the start of {path!r} needs {name}; give {_SUPPLIED[name]}, with this layer "
                    "among its targets."
                )
            arguments[name] = values[name]
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"the start of {path!r} has a parameter {name!r} that nothing fills; bind it with "
                f"functools.partial, or use one of {', '.join(sorted(_KNOWN))}."
            )
    return arguments


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
        result = initializer(**_arguments(initializer, values, site.path))
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
    initializer = resolve(start)
    bound = initializer.keywords if isinstance(initializer, functools.partial) else {}
    tensor = None if gradient is None else -gradient.astype(dtype)
    values = {"key": key, "shape": shape, "ranks": ranks, "dtype": dtype, "tensor": tensor}
    names = [name for name in inspect.signature(initializer).parameters if name not in bound]
    if "ranks" not in names:
        raise ValueError(
            f"start is {name_of(start)!r}; a Tucker update starts with 'tucker' or 'hosvd'."
        )
    if "tensor" in names and tensor is None:
        raise ValueError(f"the start of {path!r} needs a gradient; give {_SUPPLIED['gradient']}.")
    result = initializer(**{name: values[name] for name in names if name in values})
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
