"""Text from a language model, token by token: greedy or sampled, with a cache of what it read."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Key, UInt32

from lorajax.environment.judging import NOT_NEGATIVE, at_least, judged
from lorajax.models.llama.model import Mask


class Generated(NamedTuple):
    """What a model has written.

    Attributes:
      tokens: new ones, shape (b, limit), the end token with them; behind it there is filling.
      mask: which of them were written, the end token with them.
    """

    tokens: Int[Array, "b limit"]
    mask: Bool[Array, "b limit"]


def filtered(
    logits: Float[Array, "b words"],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int = 0,
    top_p: Float[Array, ""] | float = 1.0,
) -> Float[Array, "b words"]:
    """Logits of the distribution to draw from, −inf where a token may not be drawn.

    Args:
      logits: of the next token.
      temperature: that they are divided by, positive.
      top_k: only so many of the likeliest tokens may be drawn; 0 for all.
      top_p: of these only the likeliest that together reach this probability, the one that reaches
        it with them; 1 for all.

    Returns:
      float32. Tokens as likely as the last one that may be drawn may be drawn too.

    Source: Holtzman et al. 2019 (arXiv:1904.09751) for top_p, recalled; in the order of
    transformers: temperature, top_k, top_p.
    """
    logits = logits.astype(jnp.float32) / jnp.asarray(temperature, jnp.float32)
    words = logits.shape[-1]
    top_k = jnp.asarray(top_k, jnp.int32)
    ordered = -jnp.sort(-logits, axis=-1)
    last = jnp.where(top_k < 1, words, jnp.minimum(top_k, words)) - 1
    least = jax.lax.dynamic_index_in_dim(ordered, last, axis=-1)
    among = ordered >= least
    chances = jax.nn.softmax(jnp.where(among, ordered, -jnp.inf), axis=-1)
    above = jnp.cumsum(chances, axis=-1) - chances
    kept = among & ((above < jnp.asarray(top_p, jnp.float32)) | (jnp.arange(words)[None] == 0))
    least = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


@judged(limit=at_least(1), temperature=NOT_NEGATIVE)
def generate(
    model: Any,
    tokens: Integer[Array, "b t"],
    mask: Mask | None = None,
    *,
    limit: int,
    ends: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    filling: int | None = None,
) -> Generated:
    """Continues texts, token by token, until each has ended.

    Args:
      model: a Llama, or what is called like one: `model(tokens, mask, positions, cache)`, with a
        method `cache(rows, room)`; in evaluation mode.
      tokens: the beginnings; shorter ones are filled up on the left.
      mask: true or 1 at tokens that are no filling; all are real if None. The last one of each row
        is.
      limit: new tokens at most.
      ends: tokens that end a text; `model.config.ends` if None.
      temperature: 0 takes the likeliest token; else logits are divided by it, and a token is drawn.
      top_k: see `filtered`.
      top_p: see `filtered`.
      key: to draw with.
      filling: token behind the end; `model.config.padding` if None, or else 0 where that is −1.

    Returns:
      The new tokens and which of them were written. It is compiled once for each shape of tokens
      and each limit, and stops as soon as every text has ended.

    Raises:
      ValueError: for a limit below 1, a negative temperature, top_p outside (0, 1], a negative
        top_k, or drawing without a key.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 0.")
    if temperature > 0 and key is None:
        raise ValueError(f"key is None; a temperature of {temperature} needs one to draw with.")
    ends = tuple(model.config.ends if ends is None else ends)
    filling = max(model.config.padding, 0) if filling is None else filling
    graph, state = nnx.split(model)
    tokens = jnp.asarray(tokens, jnp.int32)
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}; it must have the tokens', {tokens.shape}.")
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    draw = (
        jnp.asarray(temperature or 1.0, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
    )
    # Greedy decoding has no use for a key, and its program none for the sorting.
    key = key if temperature > 0 else None
    return _generate(graph, state, tokens, mask, limit, ends, filling, draw, key)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _generate(
    graph: Any,
    state: Any,
    tokens: Array,
    mask: Array,
    limit: int,
    ends: tuple[int, ...],
    filling: int,
    draw: tuple[Array, Array, Array],
    key: Array | None,
) -> Generated:
    rows, time = tokens.shape
    model = nnx.merge(graph, state)
    stops = jnp.asarray(ends, jnp.int32)
    empty = jnp.asarray(filling, jnp.int32)

    def choose(logits: Array, step: Array) -> Array:
        if key is None:
            return logits.argmax(axis=-1).astype(jnp.int32)
        now = jax.random.fold_in(key, step)
        return jax.random.categorical(now, filtered(logits, *draw)).astype(jnp.int32)

    def ended(token: Array) -> Array:
        return (token[:, None] == stops[None]).any(axis=1)

    def unfinished(carry: tuple) -> Array:
        step, done = carry[0], carry[2]
        return (step < limit) & ~done.all()

    def write(carry: tuple) -> tuple:
        step, token, done, cache, found = carry
        tokens, written = found
        logits, cache = nnx.merge(graph, state)(token[:, None], None, None, cache)
        token = jnp.where(done, empty, choose(logits[:, -1], step))
        place = (jnp.zeros((), step.dtype), step)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], place)
        written = jax.lax.dynamic_update_slice(written, ~done[:, None], place)
        return step + 1, token, done | ended(token), cache, (tokens, written)

    logits, cache = model(tokens, mask, None, model.cache(rows, time + limit))
    first = choose(logits[:, -1], jnp.zeros((), jnp.int32))
    found = (
        jnp.full((rows, limit), empty).at[:, 0].set(first),
        jnp.zeros((rows, limit), bool).at[:, 0].set(True),
    )
    start = (jnp.ones((), jnp.int32), first, ended(first), cache, found)
    return Generated(*jax.lax.while_loop(unfinished, write, start)[-1])
