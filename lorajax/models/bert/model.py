"""BERT (Devlin et al. 2018, arXiv:1810.04805) and RoBERTa (arXiv:1907.11692) in Flax NNX."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from lorajax.environment.judging import SHARE, at_least, judged
from lorajax.models import layers
from lorajax.models.family import Model

Mask = Bool[Array, "b t"] | Integer[Array, "b t"]

CHOICES = {
    "style": ("bert", "roberta"),
    "head": ("classes", "words", "none"),
    "pool": ("cls", "first", "mean"),
    "gelu": ("erf", "tanh"),
}
"""What some fields of a configuration may be."""


@judged(classes=at_least(1), dropout=SHARE)
@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Everything that fixes an encoder's function, apart from its weights.

    Attributes:
      vocabulary: number of tokens.
      width: features of a token, a multiple of `heads`.
      depth: number of blocks.
      heads: attention heads.
      mlp_width: hidden features of the MLP; 0 means 4 × width.
      context: rows of the table of positions.
      types: rows of the table of token types.
      style: "bert" numbers positions from 0; "roberta" numbers the tokens that are no padding from
        `padding` + 1, so that it takes `context` − `padding` − 1 of them.
      padding: token that fills sequences up.
      head: what a call returns: logits of `classes`, logits of masked "words", or the pooled vector
        itself ("none").
      classes: outputs of the classification head; 1 for a regression.
      pool: what the head reads: the first token through BERT's pooler ("cls"), the first token
        ("first", followed by a layer of the head itself), or the mean of the unmasked tokens
        ("mean").
      tied: whether the logits of words come from the table of embeddings.
      gelu: "erf" (exact) or "tanh".
      epsilon: of the layer norms.
      dropout: rate after embedding, attention and MLP and before the head, in training mode.
    """

    vocabulary: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 0
    context: int = 512
    types: int = 2
    style: str = "bert"
    padding: int = 0
    head: str = "classes"
    classes: int = 2
    pool: str = "cls"
    tied: bool = True
    gelu: str = "erf"
    epsilon: float = 1e-12
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocabulary", "width", "depth", "heads", "context", "types", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}."
                )
        if self.width % self.heads:
            raise ValueError(
                f"width is {self.width}; it must be a multiple of heads = {self.heads}."
            )
        if not 0 <= self.padding < self.vocabulary:
            raise ValueError(
                f"padding is {self.padding}; it must be a token below {self.vocabulary}."
            )
        if self.longest < 1:
            raise ValueError(f"context is {self.context}; it has no position for a token.")
        if not self.mlp_width:
            object.__setattr__(self, "mlp_width", 4 * self.width)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the table of positions has room for."""
        return self.context - (self.padding + 1 if self.style == "roberta" else 0)


class Embeddings(nnx.Module):
    """Tokens as vectors: the sum of what token, position and type they are, normalized."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        made = {"embedding_init": nnx.initializers.normal(0.02), "rngs": rngs, **dtypes}
        self.words = nnx.Embed(config.vocabulary, config.width, **made)
        self.positions = nnx.Embed(config.context, config.width, **made)
        self.types = nnx.Embed(config.types, config.width, **made)
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs, **dtypes)

    def __call__(
        self, tokens: Integer[Array, "b t"], types: Integer[Array, "b t"] | None
    ) -> Float[Array, "b t d"]:
        """The first block's input; every token is of type 0 if `types` is None."""
        types = jnp.zeros_like(tokens) if types is None else types
        # The order of the sum is that of transformers, which rounding notices in half precision.
        x = self.words(tokens) + self.types(types) + self.positions(self.places(tokens))
        return self.norm(x)

    def places(self, tokens: Integer[Array, "b t"]) -> Int[Array, "#b t"]:
        """Rows of the table of positions."""
        if self.config.style == "bert":
            return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        filled = (tokens != self.config.padding).astype(jnp.int32)
        return jnp.cumsum(filled, axis=1, dtype=jnp.int32) * filled + self.config.padding


class Attention(nnx.Module):
    """Multi-head self-attention; each of the four layers is a plain `nnx.Linear`."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.heads = heads
        self.query = nnx.Linear(width, width, rngs=rngs, **dtypes)
        self.key = nnx.Linear(width, width, rngs=rngs, **dtypes)
        self.value = nnx.Linear(width, width, rngs=rngs, **dtypes)
        self.out = nnx.Linear(width, width, rngs=rngs, **dtypes)

    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b 1 t"] | None, first: int | None
    ) -> Float[Array, "b first d"]:
        """What the `first` tokens see of the unmasked ones, or all if None."""
        batch, _, width = x.shape

        def split(y: Array) -> Array:
            return y.reshape(batch, -1, self.heads, width // self.heads)

        query, key, value = self.query(x[:, :first]), self.key(x), self.value(x)
        return self.out(layers.attention(split(query), split(key), split(value), mask))


class Block(nnx.Module):
    """A post-norm transformer block."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        norm = {"epsilon": config.epsilon, "rngs": rngs, **dtypes}
        self.attention = Attention(config.width, config.heads, rngs=rngs, **dtypes)
        self.norm1 = layers.LayerNorm(config.width, **norm)
        self.mlp = layers.MLP(config.width, config.mlp_width, config.gelu, rngs=rngs, **dtypes)
        self.norm2 = layers.LayerNorm(config.width, **norm)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b 1 t"] | None = None,
        first: int | None = None,
    ) -> Float[Array, "b first d"]:
        """Adds attention, then the MLP, each normalized; of the `first` tokens, or all if None."""
        drop = self.dropout or (lambda y: y)
        x = self.norm1(x[:, :first] + drop(self.attention(x, mask, first)))
        return self.norm2(x + drop(self.mlp(x)))


class Classifier(nnx.Module):
    """RoBERTa's head: a layer with tanh before the logits."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        self.dense = nnx.Linear(config.width, config.width, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.out = nnx.Linear(config.width, config.classes, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b classes"]:
        """Logits of a pooled vector."""
        x = jnp.tanh(self.dense(x))
        return self.out(x if self.dropout is None else self.dropout(x))


class Predictions(nnx.Module):
    """The head that guesses masked words."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        dtypes = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        # RoBERTa's head has the exact one, whatever its blocks have.
        self.gelu = config.gelu if config.style == "bert" else "erf"
        self.dense = nnx.Linear(config.width, config.width, **dtypes)
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, **dtypes)
        self.decoder = (
            None
            if config.tied
            else nnx.Linear(config.width, config.vocabulary, use_bias=False, **dtypes)
        )
        self.bias = nnx.Param(jnp.zeros(config.vocabulary, param_dtype))

    def __call__(self, x: Float[Array, "b t d"], words: nnx.Embed) -> Float[Array, "b t words"]:
        """Logits of every word at each token; by the table of embeddings where they are tied."""
        x = self.norm(layers.gelu(self.dense(x), self.gelu))
        logits = words.attend(x) if self.decoder is None else self.decoder(x)
        return logits + self.bias[...].astype(logits.dtype)[None, None]


class Bert(Model):
    """An encoder of text: BERT or RoBERTa.

    Args:
      config: its shape.
      rngs: for the initial weights, and for dropout if there is any.
      dtype: of the computation; that of the weights if None.
      param_dtype: of the weights.

    Attributes:
      remat: whether the backward pass computes each block again and keeps only its input; False
        at first.

    Layers that an adapter may replace, by path: `blocks.I.attention.{query, key, value, out}`,
    `blocks.I.mlp.{up, down}`, `pooler`, `head` (`head.dense` and `head.out` where pool is "first"),
    `predictions.dense`.

    Where the head reads the first token, a call takes only that one through the last block; what
    records the inputs of that block's layers sees it alone, unless it runs `encode`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from lorajax.models import Bert, BertConfig
      >>> config = BertConfig(vocabulary=100, width=32, depth=2, heads=2, classes=3)
      >>> model = Bert(config, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((5, 7), jnp.int32)).shape
      (5, 3)
    """

    @judged
    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(config, rngs=rngs, **dtypes)
        self.remat = False
        self.embeddings = Embeddings(config, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.blocks = nnx.List([Block(config, rngs=rngs, **dtypes) for _ in range(config.depth)])
        self.pooler = (
            nnx.Linear(config.width, config.width, rngs=rngs, **dtypes)
            if config.pool == "cls"
            else None
        )
        if config.head != "classes":
            self.head = None
        elif config.pool == "first":
            self.head = Classifier(config, rngs=rngs, **dtypes)
        else:
            self.head = nnx.Linear(config.width, config.classes, rngs=rngs, **dtypes)
        words = config.head == "words"
        self.predictions = Predictions(config, rngs=rngs, **dtypes) if words else None

    @property
    def takes(self) -> str:
        """`texts` with a classification head, and what it answers instead without one."""
        return {"classes": "texts", "words": "masked words"}.get(self.config.head, "vectors")

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the heads: the classification head if there is one."""
        return ("head",) if self.config.head == "classes" else ()

    def encode(
        self,
        tokens: Integer[Array, "b t"],
        mask: Mask | None = None,
        types: Integer[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Every token after the last block.

        Args:
          tokens: of the vocabulary.
          mask: true or 1 where a token may be seen; all may if None.
          types: of the tokens, from 0, for example which of two sentences one belongs to; 0 if
            None.

        Returns:
          Shape (batch, tokens, width); masked tokens have values that mean nothing.

        Raises:
          ValueError: if there are more tokens than positions.
        """
        return self._encode(tokens, mask, types, None)

    def _encode(
        self, tokens: Array, mask: Array | None, types: Array | None, first: int | None
    ) -> Array:
        """The `first` tokens after the last block, or all if None."""
        if tokens.shape[1] > self.config.longest:
            raise ValueError(
                f"tokens have shape {tokens.shape}; this model has positions for "
                f"{self.config.longest} tokens."
            )
        seen = None if mask is None else mask.astype(bool)[:, None, :]
        x = self.embeddings(tokens, types)
        x = self.dropout(x) if self.dropout is not None else x
        for i, block in enumerate(self.blocks):
            last = first if i == self.config.depth - 1 else None
            x = layers.again(block)(x, seen, last) if self.remat else block(x, seen, last)
        return x

    def pooled(
        self,
        tokens: Integer[Array, "b t"],
        mask: Mask | None = None,
        types: Integer[Array, "b t"] | None = None,
    ) -> Float[Array, "b d"]:
        """One vector a sequence, as `config.pool` says; zeros for the mean of no token at all.

        Args:
          tokens: as for `encode`, and so are the others.
          mask: where a token may be seen, and counts for the mean.
          types: of the tokens.
        """
        if self.config.pool == "mean":
            x = self.encode(tokens, mask, types)
            if mask is None:
                return x.mean(axis=1)
            wide = layers.at_least_float32(x.dtype)
            weights = mask.astype(bool).astype(wide)[:, :, None]
            total = (x.astype(wide) * weights).sum(axis=1)
            return (total / jnp.maximum(weights.sum(axis=1), 1)).astype(x.dtype)
        x = self._encode(tokens, mask, types, 1)[:, 0]
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    def __call__(
        self,
        tokens: Integer[Array, "b t"],
        mask: Mask | None = None,
        types: Integer[Array, "b t"] | None = None,
    ) -> Float[Array, "b *outputs"]:
        """Logits of the classes (b, classes) or of masked words (b, t, vocabulary).

        Args:
          tokens: as for `encode`, and so are the others.
          mask: where a token may be seen.
          types: of the tokens.

        Returns:
          What `config.head` says; the pooled vector (b, width) where there is none.
        """
        if self.predictions is not None:
            return self.predictions(self.encode(tokens, mask, types), self.embeddings.words)
        x = self.pooled(tokens, mask, types)
        x = self.dropout(x) if self.dropout is not None else x
        return x if self.head is None else self.head(x)
