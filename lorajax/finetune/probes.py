"""The theory's quantities in a real model: spectra, norms, alignment and imbalance of adapters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax import adapters, spectra
from lorajax.factors import Factors


class Probe(NamedTuple):
    """What is looked at in each adapted layer; layers in the order of `paths`.

    Attributes:
      singular_values: of the update `s (A B − A₀B₀)`, in decreasing order, padded with zeros to the
        largest rank.
      norm: `‖[A; Bᵀ]‖₂`, the spectral norm of the stacked factors.
      imbalance: `‖AᵀA − BBᵀ‖_F`, which gradient flow conserves.
      misalignment: `1 − |cos|` between the top left singular vector of `[A; Bᵀ]` and the direction
        given for the layer; NaN without one.
    """

    singular_values: Float[Array, "layers r"]
    norm: Float[Array, " layers"]
    imbalance: Float[Array, " layers"]
    misalignment: Float[Array, " layers"]


def paths(model: Any, name: str = "default") -> tuple[str, ...]:
    """Paths of the layers that `measure` looks at: those with a LoRA of this name."""
    return tuple(_factors(model, name))


def _factors(model: Any, name: str) -> dict[str, adapters.LoRA]:
    found = {
        path: layer.adapters[name]
        for path, layer in adapters.layers(model).items()
        if name in layer.adapters
    }
    # Stacked kernels and lanes have a spectrum for each slice, for which a table has no room.
    return {
        path: each
        for path, each in found.items()
        if isinstance(each, adapters.LoRA) and each.factors.a.ndim == 2
    }


def directions(gradients: Mapping[str, Any]) -> dict[str, Float[Array, " mn"]]:
    """The direction in which each layer's factors first grow, from the gradient at the start.

    Args:
      gradients: from `adapters.gradients`, or matrices by path.

    Returns:
      Unit vectors `[u₁; v₁]/√2` by path, with u₁ and v₁ the top singular vectors of the negative
      gradient: the top eigenvector γ₁ of `[[0, M], [Mᵀ, 0]]`.

    Source: Xu et al. 2025 (arXiv:2503.06982), stated for matrix factorization; that a network's
    negative gradient takes the place of `W2ᵀE` is the same linearization at zero (derived).
    """
    return {
        path: spectra.top_direction(-(each if hasattr(each, "ndim") else each.matrix))
        for path, each in gradients.items()
    }


def measure(
    model: Any, towards: Mapping[str, Float[Array, " mn"]] | None = None, name: str = "default"
) -> Probe:
    """Looks at every adapted layer of a model; pure, fit for `jit` and `vmap`.

    Args:
      model: an adapted model.
      towards: directions by path, from `directions`.
      name: of the adapter.

    Returns:
      A Probe with one row a layer.

    Raises:
      ValueError: if the model has no LoRA of that name.
    """
    found = _factors(model, name)
    if not found:
        raise ValueError(
            f"the model has no LoRA named {name!r} on a single matrix; adapt it first."
        )
    rank = max(each.rank for each in found.values())
    rows = []
    for path, each in found.items():
        factors = Factors(*(x.astype(jnp.float32) for x in each.factors))
        update = factors
        if (offset := each.offset) is not None:
            update = Factors(
                jnp.concatenate([factors.a, offset.a.astype(jnp.float32)], axis=1),
                jnp.concatenate([factors.b, -offset.b.astype(jnp.float32)], axis=0),
            )
        values = jnp.float32(each.scaling) * spectra.singular_values(update)[:rank]
        values = jnp.pad(values, (0, rank - values.shape[0]))
        direction = None if towards is None else towards.get(path)
        off = (
            jnp.full((), jnp.nan, jnp.float32)
            if direction is None
            else spectra.top_misalignment(factors, direction.astype(jnp.float32))
        )
        imbalance = jnp.sqrt(jnp.sum(spectra.imbalance(factors) ** 2))
        rows.append(Probe(values, spectra.factor_norm(factors), imbalance, off))
    return Probe(*(jnp.stack(column) for column in zip(*rows, strict=True)))
