"""Gradients whitened by the second moments of what their layers see.

Of `y = (W + Δ)ᵀ x + ξ` with `C = E[x xᵀ]` the gradient at Δ = 0 is −C Δ plus noise of covariance C:
what stands out of it is as much the inputs as the update. `C^{−½} G` is −C^{½} Δ plus noise that is
the same in all directions, and Σ_{i>r} σ_i² of it is twice the excess risk that rank r leaves.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorajax.adapters import paths
from lorajax.adapters.gradients import Estimate, Gradient
from lorajax.adapters.moments import input_moments
from lorajax.adapters.surgery import Targets
from lorajax.environment.judging import judged


@judged
def whitened(gradient: Gradient, moment: Float[Array, "m m"]) -> Gradient:
    """`C^{−½} G`, of a gradient in full or sketched.

    Args:
      gradient: of a kernel of m rows, without stack or slices.
      moment: C, the second moment of the layer's inputs, as `input_moments` has it.

    Returns:
      A Gradient, float32. Directions in which C is 0 to rounding are left out: no input has them.

    Raises:
      ValueError: if the gradient has other rows than C, or leading axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorajax import adapters
      >>> gradient = adapters.Gradient(None, jnp.ones((2, 3), "float32"), jnp.zeros((), "float32"))
      >>> adapters.whitened(gradient, jnp.diag(jnp.array([4.0, 1.0], "float32"))).matrix[:, 0]
      Array([0.5, 1. ], dtype=float32)

    Source: Lin 2026, theory section 9 (report read).
    """
    basis, core, error = gradient
    rows = core if basis is None else basis
    if rows.ndim != 2 or rows.shape[0] != moment.shape[0]:
        raise ValueError(
            f"gradient has shape {(*rows.shape[:-1], core.shape[-1])}; it must be a matrix of as "
            f"many rows as moment has, {moment.shape[0]}."
        )
    values, vectors = jnp.linalg.eigh(moment.astype(rows.dtype))
    floor = len(values) * float(jnp.finfo(values.dtype).eps) * jnp.max(values)
    keep = values > floor
    roots = jnp.where(keep, jnp.where(keep, values, 1) ** -0.5, 0)
    rows = (vectors * roots[None, :]) @ (vectors.T @ rows)
    if basis is None:
        return Gradient(None, rows, error)
    basis, turned = jnp.linalg.qr(rows)
    return Gradient(basis, turned @ core, error * jnp.max(roots))


def moment_groups(estimates: Mapping[str, Estimate], memory: int) -> list[list[str]]:
    """Layers whose moments fit a memory together, so that each group takes one pass over the data.

    Args:
      estimates: of the layers, by path.
      memory: bytes of the moments of a group; a group has one layer at least.

    Returns:
      Paths, group by group, in the order of the layers.
    """
    groups: list[list[str]] = []
    taken = 0
    for path, each in estimates.items():
        rows = each.mean.core if each.mean.basis is None else each.mean.basis
        size = 4 * rows.shape[-2] ** 2
        if not groups or taken + size > memory:
            groups.append([])
            taken = 0
        groups[-1].append(path)
        taken += size
    return groups


def whitened_estimates(
    model: nnx.Module,
    forward: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    targets: Targets,
    estimates: Mapping[str, Estimate],
    groups: list[list[str]],
    where: Callable[[Any], Array] | None = None,
) -> Iterator[tuple[str, Estimate]]:
    """Estimates whitened by their layers' inputs, one group of moments in memory at a time.

    Args:
      model: an NNX module. Not changed.
      forward: runs the model on a batch.
      batches: gone through once for each group.
      targets: as for `adapt`; only the option `axes` is read.
      estimates: of the layers, by path.
      groups: of `moment_groups`.
      where: as for `input_moments`.

    Yields:
      The path and its Estimate.

    Raises:
      ValueError: as `input_moments`.
    """
    entries = {path: entry for path, entry, _ in paths.select(model, targets, paths.find(model))}
    for group in groups:
        named = {paths.escape(path): entries[path] for path in group}
        moments = input_moments(model, batches, named, forward=forward, where=where)
        for path in group:
            mean, noise = estimates[path]
            rest = None if noise is None else whitened(noise, moments[path])
            yield path, Estimate(whitened(mean, moments[path]), rest)
