"""Attention of the vision transformer, and its turning of queries and keys."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lorajax.models import layers


class Attention(nnx.Module):
    """Multi-head self-attention with separate query, key and value layers.

    Each is a plain `nnx.Linear` of shape (width, width), so that an adapter may take its place.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.heads = heads
        self.query = nnx.Linear(width, width, rngs=rngs, **dtypes)
        self.key = nnx.Linear(width, width, rngs=rngs, **dtypes)
        self.value = nnx.Linear(width, width, rngs=rngs, **dtypes)
        self.out = nnx.Linear(width, width, rngs=rngs, **dtypes)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        first: int | None = None,
        asking: Float[Array, "b q d"] | None = None,
        angles: np.ndarray | None = None,
    ) -> Float[Array, "b first d"]:
        """Attends over the tokens of each image.

        Args:
          x: the tokens that are seen.
          first: how many of them see, all if None.
          asking: tokens that see in their place.
          angles: (patches, features), that the last tokens' keys are turned by, and where all see
            their queries.

        Returns:
          What each of those sees.
        """
        batch, _, width = x.shape
        features = width // self.heads

        # With tokens and features as the last two axes both products are plain batched GEMMs; in
        # the order (batch, token, head, feature) XLA's CPU backend transposes around each of them.
        def split(y: Array) -> Array:
            return y.reshape(batch, -1, self.heads, features).transpose(0, 2, 1, 3)

        asking = x[:, :first] if asking is None else asking
        query = split(self.query(asking)) * jnp.asarray(features**-0.5, x.dtype)
        key, value = split(self.key(x)), split(self.value(x))
        if angles is not None:
            key = _turned(key, angles)
            query = query if first is not None else _turned(query, angles)
        scores = jnp.einsum("bhqf,bhkf->bhqk", query, key)
        # Half precision loses the small weights of long rows.
        weights = layers.softmax(scores.astype(layers.at_least_float32(scores.dtype)))
        mixed = jnp.einsum("bhqk,bhkf->bhqf", weights.astype(value.dtype), value)
        return self.out(mixed.transpose(0, 2, 1, 3).reshape(batch, -1, width))


def _turned(x: Float[Array, "b h t f"], angles: np.ndarray) -> Float[Array, "b h t f"]:
    """The last tokens' pairs of features, half a head apart, turned by angles."""
    cos, sin = (jnp.asarray(f(angles), x.dtype)[None, None] for f in (np.cos, np.sin))
    count, half = angles.shape[0], angles.shape[1] // 2
    front, x = x[:, :, :-count], x[:, :, -count:]
    x = x * cos + jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin
    return jnp.concatenate([front, x], axis=2)
