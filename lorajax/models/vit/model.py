"""The vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) in Flax NNX."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorajax.environment.judging import SHARE, at_least, judged
from lorajax.models import layers, vision
from lorajax.models.family import Model, Rule, Untold, one

SIZES: dict[str, tuple[int, int, int]] = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
}
"""Width, depth and heads of the published sizes."""


@judged(classes=at_least(1), channels=at_least(1), dropout=SHARE)
@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes a ViT's function, apart from its weights.

    Attributes:
      image_size: (height, width) in pixels, multiples of the patch size.
      patch_size: side of a patch in pixels.
      width: features of a token, a multiple of `heads`.
      depth: number of blocks.
      heads: attention heads.
      mlp_width: hidden features of the MLP; 0 means 4 × width.
      classes: outputs of the head.
      channels: of the images.
      pool: what the head reads: the class token ("cls"), or the mean of the patch tokens ("mean").
      distilled: a second token with a head of its own, averaged with the first (DeiT).
      gelu: "erf" (exact) or "tanh".
      epsilon: of the layer norms.
      dropout: rate after embedding, attention and MLP, in training mode.
      mean: per-channel mean of the images in units of [0, 1]; one number stands for all channels.
      std: per-channel standard deviation, likewise.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 0
    classes: int = 1000
    channels: int = 3
    pool: str = "cls"
    distilled: bool = False
    gelu: str = "erf"
    epsilon: float = 1e-6
    dropout: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self):
        vision.check_positive(self, "patch_size", "width", "depth", "heads", "classes", "channels")
        if any(side % self.patch_size or side < 1 for side in self.image_size):
            raise ValueError(
                f"image_size is {self.image_size}; both sides must be positive multiples of "
                f"patch_size = {self.patch_size}."
            )
        if self.width % self.heads:
            raise ValueError(
                f"width is {self.width}; it must be a multiple of heads = {self.heads}."
            )
        if self.pool not in ("cls", "mean"):
            raise ValueError(f"pool is {self.pool!r}; it must be 'cls' or 'mean'.")
        if self.gelu not in ("erf", "tanh"):
            raise ValueError(f"gelu is {self.gelu!r}; it must be 'erf' or 'tanh'.")
        vision.check_statistics(self)
        if not self.mlp_width:
            object.__setattr__(self, "mlp_width", 4 * self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def prefix(self) -> int:
        """Number of tokens in front of the patches."""
        return 2 if self.distilled else 1


def grid_of(
    number: int,
    patch: int,
    stated: tuple[int, int] | None = None,
    known: tuple[int, int] | None = None,
) -> tuple[int, int] | Untold:
    """(height, width) of the images of a checkpoint with positions for `number` patches.

    Args:
      number: of patches.
      patch: side of a patch in pixels.
      stated: the size that its configuration states.
      known: the size of its prepared images, where it has so many patches; else a square is.

    Raises:
      ValueError: if the stated size has another number of patches.
    """

    def patches(size: tuple[int, int]) -> int:
        return size[0] // patch * (size[1] // patch)

    if stated is not None and patches(stated) != number:
        raise ValueError(
            f"its configuration states images of {stated}, its tensors show {number} patches of "
            f"{patch} pixels"
        )
    side = round(max(number, 0) ** 0.5)
    square = (side * patch, side * patch) if side and side**2 == number else None
    fits = known if known is not None and patches(known) == number else None
    why = f"it has positions for {number} patches, which is no square grid"
    return stated or fits or square or Untold(why)


def patches(theirs: str, config: ViTConfig, *, torch: bool = True) -> Rule:
    """The rule of the patch embedding: a convolution in files, a matrix on flat patches here."""
    side, channels, width = config.patch_size, config.channels, config.width
    ours = "embeddings.patches.kernel"
    if torch:
        return one(
            theirs,
            ours,
            lambda x: x.transpose(2, 3, 1, 0).reshape(-1, width),
            lambda x: x.reshape(side, side, channels, width).transpose(3, 2, 0, 1),
        )
    return one(
        theirs,
        ours,
        lambda x: x.reshape(-1, width),
        lambda x: x.reshape(side, side, channels, width),
    )


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
        self, x: Float[Array, "b t d"], first: int | None = None
    ) -> Float[Array, "b first d"]:
        """Attends over the tokens of each image; what the `first` tokens see, or all if None."""
        batch, _, width = x.shape
        features = width // self.heads

        # With tokens and features as the last two axes both products are plain batched GEMMs; in
        # the order (batch, token, head, feature) XLA's CPU backend transposes around each of them.
        def split(y: Array) -> Array:
            return y.reshape(batch, -1, self.heads, features).transpose(0, 2, 1, 3)

        query = split(self.query(x[:, :first])) * jnp.asarray(features**-0.5, x.dtype)
        key, value = split(self.key(x)), split(self.value(x))
        scores = jnp.einsum("bhqf,bhkf->bhqk", query, key)
        # Half precision loses the small weights of long rows.
        weights = jax.nn.softmax(scores.astype(layers.at_least_float32(scores.dtype)))
        mixed = jnp.einsum("bhqk,bhkf->bhqf", weights.astype(value.dtype), value)
        return self.out(mixed.transpose(0, 2, 1, 3).reshape(batch, -1, width))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        norm = {"epsilon": config.epsilon, "rngs": rngs, **dtypes}
        self.norm1 = layers.LayerNorm(config.width, **norm)
        self.attention = Attention(config.width, config.heads, rngs=rngs, **dtypes)
        self.norm2 = layers.LayerNorm(config.width, **norm)
        self.mlp = layers.MLP(config.width, config.mlp_width, config.gelu, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(
        self, x: Float[Array, "b t d"], first: int | None = None
    ) -> Float[Array, "b first d"]:
        """Adds attention, then the MLP, to the stream of tokens; of the `first`, or all if None."""
        drop = self.dropout or (lambda y: y)
        x = x[:, :first] + drop(self.attention(self.norm1(x), first))
        return x + drop(self.mlp(self.norm2(x)))


class Embeddings(nnx.Module):
    """Images as tokens: patches through a linear layer, tokens in front of them, positions."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        self.config = config
        patch_features = config.patch_size**2 * config.channels
        # A convolution whose stride is its window is a linear layer on patches, and faster as one.
        self.patches = nnx.Linear(
            patch_features, config.width, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )
        rows, columns = config.grid
        normal = nnx.initializers.truncated_normal(0.02)
        self.prefix = nnx.Param(
            normal(rngs.params(), (1, config.prefix, config.width), param_dtype)
        )
        self.positions = nnx.Param(
            normal(rngs.params(), (1, config.prefix + rows * columns, config.width), param_dtype)
        )

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """Tokens of images of the configuration's shape."""
        config = self.config
        batch, (rows, columns), side = images.shape[0], config.grid, config.patch_size
        x = images.reshape(batch, rows, side, columns, side, config.channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x = self.patches(x)
        prefix = jnp.broadcast_to(
            self.prefix[...].astype(x.dtype), (batch, config.prefix, config.width)
        )
        return jnp.concatenate([prefix, x], axis=1) + self.positions[...].astype(x.dtype)


class ViT(Model):
    """A vision transformer.

    Args:
      config: its shape.
      rngs: for the initial weights, and for dropout if there is any.
      dtype: of the computation; that of the weights and the images if None.
      param_dtype: of the weights.

    Layers that an adapter may replace, by path: `embeddings.patches`, `blocks.I.attention.{query,
    key, value, out}`, `blocks.I.mlp.{up, down}`, `head`.

    Where the head reads tokens in front (pool "cls"), a call takes only those through the last
    block; what records the inputs of that block's layers sees them alone, unless it runs `tokens`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from lorajax.models import ViT, ViTConfig
      >>> config = ViTConfig((28, 28), patch_size=7, width=32, depth=2, heads=2, classes=10)
      >>> model = ViT(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((5, 28, 28, 3), jnp.float32)).shape
      (5, 10)
    """

    @judged
    def __init__(
        self,
        config: ViTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(config, rngs=rngs, **dtypes)
        self.embeddings = Embeddings(config, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.blocks = nnx.List([Block(config, rngs=rngs, **dtypes) for _ in range(config.depth)])
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs, **dtypes)
        self.head = nnx.Linear(config.width, config.classes, rngs=rngs, **dtypes)
        self.distilled_head = (
            nnx.Linear(config.width, config.classes, rngs=rngs, **dtypes)
            if config.distilled
            else None
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the classification heads: a distilled model has two."""
        return ("head", "distilled_head") if self.config.distilled else ("head",)

    @property
    def beside(self) -> tuple[str, ...]:
        """Paths of what trains in full beside the heads by default: the embeddings."""
        return ("embeddings",)

    def tokens(self, images: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """All tokens after the last block, not yet normalized.

        Args:
          images: normalized images (see `models.normalize`), shape (batch, height, width,
            channels) as in the configuration.

        Returns:
          Shape (batch, prefix + patches, width).

        Raises:
          ValueError: if the images' shape is not the configuration's.
        """
        return self._tokens(images, None)

    def _tokens(self, images: Array, first: int | None) -> Array:
        """The `first` tokens after the last block, or all if None."""
        config = self.config
        if images.shape[1:] != (*config.image_size, config.channels):
            raise ValueError(
                f"images have shape {images.shape}; this ViT takes (batch, "
                f"{config.image_size[0]}, {config.image_size[1]}, {config.channels})."
            )
        x = self.embeddings(images)
        x = self.dropout(x) if self.dropout is not None else x
        for i, block in enumerate(self.blocks):
            x = block(x, first if i == config.depth - 1 else None)
        return x

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Class logits of normalized images."""
        if self.config.pool == "mean":
            x = self.tokens(images)
            # The norm comes after the mean in the checkpoints that pool so (timm's fc_norm).
            return self.head(self.norm(x[:, self.config.prefix :].mean(axis=1)))
        # Nothing reads the other tokens after the last block, which then costs little more than its
        # keys and values.
        x = self.norm(self._tokens(images, self.config.prefix))
        if self.distilled_head is None:
            return self.head(x[:, 0])
        return (self.head(x[:, 0]) + self.distilled_head(x[:, 1])) / 2
