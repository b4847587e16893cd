"""Llama (Touvron et al. 2023, arXiv:2302.13971, arXiv:2307.09288) in Flax NNX."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from lorajax.environment.judging import judged
from lorajax.models import layers
from lorajax.models.family import Model

Mask = Bool[Array, "b t"] | Integer[Array, "b t"]

ROPES = ("default", "linear", "llama3")
"""How the frequencies of the rotary positions may be scaled."""


@judged
@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes a Llama's function, apart from its weights.

    Attributes:
      vocabulary: number of tokens.
      width: features of a token.
      depth: number of blocks.
      heads: attention heads, a multiple of `groups`.
      groups: heads of keys and values; 0 means as many as `heads`.
      head_width: features of a head, even; 0 means width / heads.
      mlp_width: hidden features of the MLP.
      context: tokens of the longest sequence in training; longer ones are not refused.
      theta: base of the rotary frequencies, theta^(−2i / head_width).
      rope: how they are scaled: not at all ("default"), all divided by `factor` ("linear"), or
        the slow ones alone ("llama3").
      factor: of the scaling.
      low: turns within `original` tokens below which a frequency is divided by `factor` ("llama3").
      high: turns above which it stays as it is; in between the two are mixed.
      original: tokens of the longest sequence before the scaling ("llama3").
      epsilon: of the norms.
      tied: whether the logits come from the table of embeddings.
      attention_bias: whether the layers of the attention have biases.
      mlp_bias: whether those of the MLP have.
      start: token that a text starts with; −1 for none.
      ends: tokens that end a text.
      padding: token that fills sequences up; −1 for none.
    """

    vocabulary: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    groups: int = 0
    head_width: int = 0
    mlp_width: int = 11008
    context: int = 2048
    theta: float = 10000.0
    rope: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192
    epsilon: float = 1e-6
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    start: int = 1
    ends: tuple[int, ...] = (2,)
    padding: int = -1

    def __post_init__(self):
        object.__setattr__(self, "groups", self.groups or self.heads)
        for name in ("vocabulary", "width", "depth", "heads", "groups", "mlp_width", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("theta", "factor", "low", "epsilon", "original"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")
        if self.heads % self.groups:
            raise ValueError(
                f"heads is {self.heads}; it must be a multiple of groups = {self.groups}."
            )
        if not self.head_width:
            if self.width % self.heads:
                raise ValueError(
                    f"width is {self.width}; it must be a multiple of heads = {self.heads}, unless "
                    "head_width is given."
                )
            object.__setattr__(self, "head_width", self.width // self.heads)
        if self.head_width < 2 or self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}; it must be even and positive.")
        if self.rope not in ROPES:
            raise ValueError(f"rope is {self.rope!r}; it must be one of {', '.join(ROPES)}.")
        if self.rope == "llama3" and not self.low < self.high:
            raise ValueError(f"high is {self.high}; it must exceed low = {self.low}.")


class Cache(NamedTuple):
    """Keys and values of the tokens that a model has read.

    Attributes:
      keys: for each block, shape (batch, room, groups, head_width).
      values: likewise.
      seen: which places hold a token that may be attended to.
      length: number of places that are taken, the same for every row.
    """

    keys: tuple[Float[Array, "b room groups f"], ...]
    values: tuple[Float[Array, "b room groups f"], ...]
    seen: Bool[Array, "b room"]
    length: Int[Array, ""]


@functools.cache
def frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians that one position turns each pair of features by, float32, shape (head_width / 2,).

    Angles at position 10⁵ hang on every bit of these, so each step rounds as in transformers.

    Source: Su et al. 2021 (arXiv:2104.09864), recalled; the scaling as in transformers' code.
    """
    powers = np.arange(0, config.head_width, 2).astype(np.float32) / np.float32(config.head_width)
    # Correctly rounded, which float32's own power is not everywhere.
    power = (np.float64(np.float32(config.theta)) ** powers.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / power
    if config.rope == "default":
        return plain
    scaled = plain / np.float32(config.factor)
    if config.rope == "linear":
        return scaled
    wavelengths = np.float32(2 * np.pi) / plain
    slow, fast = config.original / config.low, config.original / config.high
    share = np.float32(config.original) / wavelengths - np.float32(config.low)
    share = share / np.float32(config.high - config.low)
    mixed = (np.float32(1) - share) * plain / np.float32(config.factor) + share * plain
    found = np.where(wavelengths > np.float32(slow), scaled, plain)
    between = (wavelengths <= np.float32(slow)) & (wavelengths >= np.float32(fast))
    return np.where(between, mixed, found).astype(np.float32)


@judged
def places(
    tokens: Integer[Array, "b t"],
    mask: Mask | None = None,
    segments: Integer[Array, "b t"] | None = None,
) -> Int[Array, "#b t"]:
    """The position of each token: how many the same text has before it.

    Args:
      tokens: of which only the shape counts.
      mask: without `segments`, masked tokens are not counted, so that padding on the left shifts
        nothing.
      segments: which text of a packed row a token belongs to; each starts from 0 again.
    """
    order = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if segments is not None:
        fresh = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        return order - jax.lax.cummax(jnp.where(fresh, order, 0), axis=1)
    if mask is None:
        return order
    counted = jnp.cumsum(mask.astype(jnp.int32), axis=1, dtype=jnp.int32)
    return jnp.maximum(counted - 1, 0)


def rotate(
    x: Float[Array, "b t n f"], cosine: Float[Array, "#b t h"], sine: Float[Array, "#b t h"]
) -> Float[Array, "b t n f"]:
    """Turns feature i with feature i + f/2, the order of Hugging Face's files, by an angle."""
    cosine, sine = cosine.astype(x.dtype)[:, :, None], sine.astype(x.dtype)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


class RMSNorm(nnx.Module):
    """Divides each token by its root mean square, in float32 at least, and scales its features."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Of the input's dtype, to which it is rounded before the scale, as in transformers."""
        dtype = self.dtype or x.dtype
        wide = x.astype(layers.at_least_float32(x.dtype))
        square = jnp.square(wide).mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(square + jnp.asarray(self.epsilon, wide.dtype))
        return wide.astype(dtype) * self.scale[...].astype(dtype)[None, None]


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; each layer is a plain `nnx.Linear`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        made = {"use_bias": config.attention_bias, "rngs": rngs, **dtypes}
        inner, shared = config.heads * config.head_width, config.groups * config.head_width
        self.query = nnx.Linear(config.width, inner, **made)
        self.key = nnx.Linear(config.width, shared, **made)
        self.value = nnx.Linear(config.width, shared, **made)
        self.out = nnx.Linear(inner, config.width, **made)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "#b t k"],
        turn: tuple[Array, Array],
        past: tuple[Array, Array] | None,
        length: Array | None,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array]]:
        """What each token sees, and the keys and values of all there are, those of `past` first."""
        batch, time, _ = x.shape

        def split(y: Array) -> Array:
            return y.reshape(batch, time, -1, self.config.head_width)

        query, key = rotate(split(self.query(x)), *turn), rotate(split(self.key(x)), *turn)
        value = split(self.value(x))
        if past is not None and length is not None:
            zero = jnp.zeros((), length.dtype)
            place = (zero, length, zero, zero)
            key = jax.lax.dynamic_update_slice(past[0], key.astype(past[0].dtype), place)
            value = jax.lax.dynamic_update_slice(past[1], value.astype(past[1].dtype), place)
        return self.out(layers.attention(query, key, value, mask)), (key, value)


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        self.norm1 = RMSNorm(config.width, config.epsilon, rngs=rngs, **dtypes)
        self.attention = Attention(config, rngs=rngs, **dtypes)
        self.norm2 = RMSNorm(config.width, config.epsilon, rngs=rngs, **dtypes)
        self.mlp = layers.GatedMLP(
            config.width, config.mlp_width, bias=config.mlp_bias, rngs=rngs, **dtypes
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "#b t k"],
        turn: tuple[Array, Array],
        past: tuple[Array, Array] | None = None,
        length: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array]]:
        """Adds attention, then the MLP, to the stream of tokens; with all keys and values."""
        mixed, kept = self.attention(self.norm1(x), mask, turn, past, length)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), kept


class Llama(Model):
    """A causal language model: Llama 2 and 3, SmolLM, and what else has their form.

    Args:
      config: its shape.
      rngs: for the initial weights.
      dtype: of the computation; that of the weights if None.
      param_dtype: of the weights.

    Attributes:
      remat: whether the backward pass computes each block again and keeps only its input; False
        at first.

    Layers that an adapter may replace, by path: `blocks.I.attention.{query, key, value, out}`,
    `blocks.I.mlp.{gate, up, down}`, `head` where it is not tied.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from lorajax.models import Llama, LlamaConfig
      >>> config = LlamaConfig(vocabulary=50, width=16, depth=1, heads=4, groups=2, mlp_width=24)
      >>> model = Llama(config, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((5, 7), jnp.int32)).shape
      (5, 7, 50)
    """

    @judged
    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(config, rngs=rngs, **dtypes)
        self.remat = False
        normal = nnx.initializers.normal(0.02)
        self.embeddings = nnx.Embed(
            config.vocabulary, config.width, embedding_init=normal, rngs=rngs, **dtypes
        )
        self.blocks = nnx.List([Block(config, rngs=rngs, **dtypes) for _ in range(config.depth)])
        self.norm = RMSNorm(config.width, config.epsilon, rngs=rngs, **dtypes)
        self.head = (
            None
            if config.tied
            else nnx.Linear(config.width, config.vocabulary, use_bias=False, rngs=rngs, **dtypes)
        )

    @property
    def takes(self) -> str:
        """`tokens`: each row asks for its next tokens."""
        return "tokens"

    @property
    def heads(self) -> tuple[str, ...]:
        """No paths: the layer that gives the logits is pretrained like the others."""
        return ()

    def cache(self, rows: int, room: int) -> Cache:
        """An empty cache.

        Args:
          rows: of a batch.
          room: tokens that it can hold in each row.
        """
        config, dtype = self.config, self.dtype or self.embeddings.embedding[...].dtype
        empty = jnp.zeros((rows, room, config.groups, config.head_width), dtype)
        return Cache(
            (empty,) * config.depth,
            (empty,) * config.depth,
            jnp.zeros((rows, room), bool),
            jnp.zeros((), jnp.int32),
        )

    def __call__(
        self,
        tokens: Integer[Array, "b t"],
        mask: Mask | None = None,
        positions: Integer[Array, "#b t"] | None = None,
        cache: Cache | None = None,
        segments: Integer[Array, "b t"] | None = None,
    ) -> Any:
        """Logits of the token that follows each one.

        Args:
          tokens: of the vocabulary.
          mask: true or 1 where a token may be seen; all may if None.
          positions: of the tokens; as `places` counts them if None, after those of the cache.
          cache: of the tokens before these, with room for these.
          segments: which text of a packed row each token belongs to; it sees no other. Without a
            cache.

        Returns:
          Shape (b, t, vocabulary); what stands at masked tokens means nothing. With a cache, a pair
          of these and the cache with the tokens added.

        Raises:
          ValueError: for segments together with a cache.
        """
        if cache is not None and segments is not None:
            raise ValueError("segments and cache are both given; a cache holds one text a row.")
        order = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if positions is None:
            positions = places(tokens, mask, segments)
            if cache is not None:
                positions = positions + cache.seen.sum(axis=1, keepdims=True, dtype=jnp.int32)
        if cache is None:
            visible = (order[:, None] >= order[None, :])[None]
            visible = visible if mask is None else visible & mask.astype(bool)[:, None, :]
            if segments is not None:
                visible = visible & (segments[:, :, None] == segments[:, None, :])
        else:
            shown = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
            zero = jnp.zeros((), cache.length.dtype)
            seen = jax.lax.dynamic_update_slice(cache.seen, shown, (zero, cache.length))
            room = jnp.arange(seen.shape[1], dtype=jnp.int32)
            before = room[None, :] <= cache.length + order[:, None]
            visible = seen[:, None, :] & before[None]
        angles = positions.astype(jnp.float32)[:, :, None] * frequencies(self.config)[None, None]
        turn = (jnp.cos(angles), jnp.sin(angles))
        x = self.embeddings(tokens)
        if cache is None:
            for block in self.blocks:
                run = layers.again(block) if self.remat else block
                x, _ = run(x, visible, turn)
            return self._logits(x)
        kept = []
        for block, key, value in zip(self.blocks, cache.keys, cache.values, strict=True):
            x, both = block(x, visible, turn, (key, value), cache.length)
            kept.append(both)
        keys, values = zip(*kept, strict=True)
        length = cache.length + jnp.asarray(tokens.shape[1], cache.length.dtype)
        return self._logits(x), Cache(keys, values, seen, length)

    def _logits(self, x: Array) -> Array:
        x = self.norm(x)
        return self.embeddings.attend(x) if self.head is None else self.head(x)
