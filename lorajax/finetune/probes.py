"""The theory's quantities in a real model: spectra, norms, alignment and imbalance of adapters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax import adapters, spectra
from lorajax.environment.judging import judged
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


@judged
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


@judged
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
    matrices = {
        path: each if hasattr(each, "ndim") else each.matrix for path, each in gradients.items()
    }
    groups: dict[tuple[int, ...], list[str]] = {}
    for path, matrix in matrices.items():
        groups.setdefault(matrix.shape, []).append(path)
    found = {}
    for members in groups.values():
        aims = _top_directions([matrices[path] for path in members])
        found |= dict(zip(members, aims, strict=True))
    return {path: found[path] for path in matrices}


@jax.jit
def _top_directions(gradients: list[Array]) -> list[Array]:
    return list(jax.vmap(spectra.top_direction)(-jnp.stack(gradients)))


@judged
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
    groups: dict[tuple[int, ...], list[str]] = {}
    for path, each in found.items():
        offset = each.offset
        key = (*each.factors.shape, 0 if offset is None else offset.rank)
        groups.setdefault(key, []).append(path)
    rows: dict[str, Probe] = {}
    # Layers of one shape go through one batched decomposition: 25 of them compile in the time of
    # three. Zero columns change no quantity here, so ranks are brought to the largest one.
    for (m, n, _), members in groups.items():
        factors, updates = [], []
        for path in members:
            each = found[path]
            filled = _padded(each.factors, rank)
            factors.append(filled)
            if (offset := each.offset) is not None:
                minus = _padded(Factors(offset.a, -offset.b), rank)
                filled = Factors(
                    jnp.concatenate([filled.a, minus.a], axis=1),
                    jnp.concatenate([filled.b, minus.b], axis=0),
                )
            updates.append(Factors(filled.a * jnp.float32(each.scaling), filled.b))
        several = jax.tree.map(lambda *x: jnp.stack(x), *factors)
        nowhere = jnp.full((m + n,), jnp.nan, jnp.float32)
        aims = jnp.stack([(towards or {}).get(path, nowhere) for path in members])
        values = spectra.singular_values(jax.tree.map(lambda *x: jnp.stack(x), *updates))
        batch = Probe(
            singular_values=jnp.pad(values, ((0, 0), (0, max(0, rank - values.shape[1]))))[
                :, :rank
            ],
            norm=spectra.factor_norm(several),
            imbalance=jnp.sqrt(jnp.sum(spectra.imbalance(several) ** 2, axis=(1, 2))),
            misalignment=jax.vmap(spectra.top_misalignment)(several, aims.astype(jnp.float32)),
        )
        for i, path in enumerate(members):
            rows[path] = jax.tree.map(lambda x, i=i: x[i], batch)
    return jax.tree.map(lambda *x: jnp.stack(x), *(rows[path] for path in found))


def _padded(factors: Factors, rank: int) -> Factors:
    """The factors in float32 with zero columns and rows up to a rank."""
    missing = rank - factors.rank
    return Factors(
        jnp.pad(factors.a.astype(jnp.float32), ((0, 0), (0, missing))),
        jnp.pad(factors.b.astype(jnp.float32), ((0, missing), (0, 0))),
    )
