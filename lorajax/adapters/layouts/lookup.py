"""Embed, whose input is an index."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax.adapters.layouts.base import Axes
from lorajax.environment.judging import judged


class Lookup:
    """Embed: rows are the tokens, columns the features."""

    @judged
    def __init__(self, module: nnx.Embed, axes: Axes | None = None):
        if axes is not None:
            raise ValueError("axes are given for an Embed, whose rows and columns are fixed.")
        self.module = module
        shape = module.embedding.shape
        self.stack = tuple(shape[:-2])
        self.kernel_shape = tuple(shape[-2:])
        self.slices: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(number of embeddings, features)."""
        return self.kernel_shape[0], self.kernel_shape[1]

    def matrix(self, kernel: Array) -> Array:
        """The embedding itself."""
        return kernel

    def kernel(self, matrix: Array) -> Array:
        """The embedding itself."""
        return matrix

    def take(self, x: Array, table: Array) -> Array:
        """Rows of a table, with the one row of a table of one for every index, as Flax has it."""
        return jnp.take(table, jnp.zeros_like(x) if self.shape[0] == 1 else x, axis=0)

    def apply(self, x: Array, a: Array, b: Array, out_sharding: Any = None) -> Array:
        """The rows of `a b` at the indices `x`."""
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        return jnp.einsum("...r,rn->...n", self.take(x, a), b, **sharding)

    def attend(self, query: Array, a: Array, b: Array) -> Array:
        """The logits `query (a b)ᵀ`."""
        return jnp.einsum("...n,rn,vr->...v", query, b, a, optimize="optimal")

    def apply_tucker(self, x: Array, core: Array, factors: tuple[Array, ...]) -> Array:
        """The rows of `U₁ core U₂ᵀ` at the indices `x`."""
        return self.take(x, factors[0]) @ (core @ factors[1].T)

    def rows(self, x: Array) -> Array:
        """An Embed's inputs are indices, not vectors."""
        raise ValueError("an Embed's inputs are indices, which have no second moment.")

    def bias(self, y: Array) -> Array | None:
        """An Embed has none."""
        return None

    def columns(self, scale: Array, y: Array) -> Array:
        """A number for each column, (n,), shaped to be multiplied with the output `y`."""
        return scale.reshape([1] * (y.ndim - 1) + [-1])
