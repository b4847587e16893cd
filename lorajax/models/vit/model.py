"""The vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) and its kin in Flax NNX.

One model with switches: DeiT and DeiT III, DINOv2 with and without registers, DINOv3, and the image
towers of CLIP and SigLIP differ in where tokens stand, what is normed, and what the head reads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lorajax.environment.judging import SHARE, at_least, judged
from lorajax.models import layers, vision
from lorajax.models.family import Model, Rule, Untold, one
from lorajax.models.vit.attention import Attention

SIZES: dict[str, tuple[int, int, int]] = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
}
"""Width, depth and heads of the published sizes."""


_CHOICES = {
    "pool": ("cls", "mean", "cls+mean", "attention"),
    "final_norm": ("pooled", "tokens", "none"),
    "mlp": ("gelu", "swiglu"),
    "gelu": ("erf", "tanh", "quick"),
}


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
      pool: what the head reads: the class token ("cls"), the mean of the patch tokens ("mean"),
        both side by side ("cls+mean", DINOv2), or what a trained query sees of the patch tokens
        ("attention", SigLIP).
      final_norm: whether the last norm acts on what is pooled ("pooled") or on each token before
        ("tokens"), or there is none ("none"); the first two are one for pool "cls".
      class_token: whether there is one in front of the patches.
      distilled: a second token with a head of its own, averaged with the first (DeiT).
      registers: tokens in front of the patches that nothing reads (DINOv2).
      placed: how many of the tokens in front have positions, from the first on; −1 means all.
      table: (rows, columns) of the table of positions where images of another size interpolate it
        in each call, as DINOv2 in transformers does; () where it is that of the image size.
      rope: base of the wavelengths that queries and keys of patches are turned by in place of a
        table of positions (DINOv3); 0 for the table.
      antialias: whether positions are interpolated as timm does it, or else as transformers.
      norm_before: a norm before the first block (CLIP).
      patch_bias: whether the patch embedding has one.
      layer_scale: a trained factor for each feature of what a layer adds (DINOv2, DeiT III).
      mlp: "gelu", two layers, or "swiglu", three.
      gelu: "erf" (exact), "tanh", or "quick" (CLIP).
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
    final_norm: str = "pooled"
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    placed: int = -1
    table: tuple[int, ...] = ()
    rope: float = 0.0
    antialias: bool = True
    norm_before: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    mlp: str = "gelu"
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
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                known = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
                raise ValueError(f"{name} is {value!r}; it must be {known}.")
        if not self.class_token and (self.distilled or "cls" in self.pool):
            read = "distilled" if self.distilled else f"pool = {self.pool!r}"
            raise ValueError(f"class_token is False; {read} reads one.")
        if self.distilled and self.pool != "cls":
            raise ValueError(f"pool is {self.pool!r}; a distilled model reads its tokens, 'cls'.")
        if not 0 <= self.registers <= 1024:
            raise ValueError(f"registers is {self.registers}; it must lie in 0 … 1024.")
        if not -1 <= self.placed <= self.prefix:
            raise ValueError(
                f"placed is {self.placed}; of {self.prefix} tokens in front it must be −1 (all) to "
                f"{self.prefix}."
            )
        if self.table and (len(self.table) != 2 or min(self.table) < 1):
            raise ValueError(f"table is {self.table}; it must be (rows, columns) or ().")
        if self.rope and (self.rope < 0 or self.table or self.width // self.heads % 4):
            raise ValueError(
                f"rope is {self.rope}; it must be 0 or positive, without a table and with heads of "
                "4, 8, … features."
            )
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
        return int(self.class_token) + int(self.distilled) + self.registers

    @property
    def positions(self) -> tuple[int, int, int]:
        """Tokens in front that have positions, and rows and columns of the table."""
        if self.rope:
            return 0, 0, 0
        rows, columns = self.table or self.grid
        return self.prefix if self.placed < 0 else self.placed, rows, columns


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


def _angles(config: ViTConfig) -> np.ndarray | None:
    """Of each patch and feature: rows and columns from −1 to 1 times 2π over wavelengths."""
    if not config.rope:
        return None
    features = config.width // config.heads
    frequencies = 1 / config.rope ** np.arange(0, 1, 4 / features)
    axes = [2 * (np.arange(n) + 0.5) / n - 1 for n in config.grid]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = (2 * np.pi * places * frequencies).reshape(len(places), -1)
    return np.tile(angles, 2)


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        norm = {"epsilon": config.epsilon, "rngs": rngs, **dtypes}
        self.norm1 = layers.LayerNorm(config.width, **norm)
        self.attention = Attention(config.width, config.heads, rngs=rngs, **dtypes)
        self.norm2 = layers.LayerNorm(config.width, **norm)
        sizes = (config.width, config.mlp_width)
        if config.mlp == "swiglu":
            self.mlp = layers.GatedMLP(*sizes, rngs=rngs, **dtypes)
        else:
            self.mlp = layers.MLP(*sizes, config.gelu, rngs=rngs, **dtypes)
        ones = jnp.ones(config.width, dtypes["param_dtype"])
        self.scale1 = nnx.Param(ones) if config.layer_scale else None
        self.scale2 = nnx.Param(ones) if config.layer_scale else None
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(
        self, x: Float[Array, "b t d"], first: int | None = None, angles: np.ndarray | None = None
    ) -> Float[Array, "b first d"]:
        """Adds attention, then the MLP, to the stream of tokens; of the `first`, or all if None."""
        drop = self.dropout or (lambda y: y)
        seen = self.attention(self.norm1(x), first, angles=angles)
        x = x[:, :first] + drop(_scaled(seen, self.scale1))
        return x + drop(_scaled(self.mlp(self.norm2(x)), self.scale2))


def _scaled(x: Array, scale: nnx.Param | None) -> Array:
    return x if scale is None else x * scale[...].astype(x.dtype)[None, None]


class AttentionPool(nnx.Module):
    """What one trained query sees of the tokens, then an MLP (Zhai et al. 2023, SigLIP)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        width, param_dtype = config.width, dtypes["param_dtype"]
        normal = nnx.initializers.truncated_normal(0.02)
        self.probe = nnx.Param(normal(rngs.params(), (1, 1, width), param_dtype))
        self.attention = Attention(width, config.heads, rngs=rngs, **dtypes)
        self.norm = layers.LayerNorm(width, epsilon=config.epsilon, rngs=rngs, **dtypes)
        self.mlp = layers.MLP(width, config.mlp_width, config.gelu, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        """One vector an image."""
        probe = self.probe[...].astype(x.dtype)
        x = self.attention(x, asking=jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[2])))
        return (x + self.mlp(self.norm(x)))[:, 0]


class Embeddings(nnx.Module):
    """Images as tokens: patches through a linear layer, tokens in front of them, positions."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        self.config = config
        made = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        # A convolution whose stride is its window is a linear layer on patches, and faster as one.
        self.patches = nnx.Linear(
            config.patch_size**2 * config.channels,
            config.width,
            use_bias=config.patch_bias,
            **made,
        )
        placed, rows, columns = config.positions
        normal = nnx.initializers.truncated_normal(0.02)
        shape = (1, config.prefix, config.width)
        self.prefix = (
            nnx.Param(normal(rngs.params(), shape, param_dtype)) if config.prefix else None
        )
        shape = (1, placed + rows * columns, config.width)
        table = None if config.rope else nnx.Param(normal(rngs.params(), shape, param_dtype))
        self.positions = table

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """Tokens of images of the configuration's shape."""
        config = self.config
        batch, (rows, columns), side = images.shape[0], config.grid, config.patch_size
        x = images.reshape(batch, rows, side, columns, side, config.channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x = self.patches(x)
        if self.prefix is None:
            return x if self.positions is None else x + self._positions(self.positions, x.dtype)
        prefix = self.prefix[...].astype(x.dtype)
        prefix = jnp.broadcast_to(prefix, (batch, config.prefix, config.width))
        if self.positions is None:
            return jnp.concatenate([prefix, x], axis=1)
        positions, placed = self._positions(self.positions, x.dtype), config.positions[0]
        if placed == config.prefix:
            return jnp.concatenate([prefix, x], axis=1) + positions
        front = prefix[:, :placed] + positions[:, :placed]
        return jnp.concatenate([front, prefix[:, placed:], x + positions[:, placed:]], axis=1)

    def _positions(self, variable: nnx.Param, dtype: Any) -> Array:
        """Those of the image size, interpolated where the table has another."""
        (placed, *table), grid = self.config.positions, self.config.grid
        positions = variable[...].astype(dtype)
        if tuple(table) == grid:
            return positions
        patches = positions[0, placed:].reshape(*table, -1)
        patches = layers.resize_grid(patches, grid, antialias=self.config.antialias)
        patches = patches.reshape(1, grid[0] * grid[1], -1)
        return jnp.concatenate([positions[:, :placed], patches], axis=1)


class ViT(Model):
    """A vision transformer.

    Args:
      config: its shape.
      rngs: for the initial weights, and for dropout if there is any.
      dtype: of the computation; that of the weights and the images if None.
      param_dtype: of the weights.

    Layers that an adapter may replace, by path: `embeddings.patches`, `blocks.I.attention.{query,
    key, value, out}`, `blocks.I.mlp.{up, down}` and `gate` of a SwiGLU, the same of
    `pool.attention` and `pool.mlp` where a query pools, and `head`.

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
        norm = {"epsilon": config.epsilon, "rngs": rngs, **dtypes}
        self.norm_before = layers.LayerNorm(config.width, **norm) if config.norm_before else None
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.blocks = nnx.List([Block(config, rngs=rngs, **dtypes) for _ in range(config.depth)])
        self.norm = None if config.final_norm == "none" else layers.LayerNorm(config.width, **norm)
        pooled = config.pool == "attention"
        self.pool = AttentionPool(config, rngs=rngs, **dtypes) if pooled else None
        read = config.width * (2 if config.pool == "cls+mean" else 1)
        self.head = nnx.Linear(read, config.classes, rngs=rngs, **dtypes)
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
        x = self.norm_before(x) if self.norm_before is not None else x
        x = self.dropout(x) if self.dropout is not None else x
        angles = _angles(config)
        for i, block in enumerate(self.blocks):
            x = block(x, first if i == config.depth - 1 else None, angles)
        return x

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Class logits of normalized images."""
        config, norm = self.config, self.norm or (lambda y: y)
        if config.pool != "cls":
            return self.head(self._pooled(self.tokens(images), norm))
        # Nothing reads the other tokens after the last block, which then costs little more than its
        # keys and values.
        x = norm(self._tokens(images, 2 if config.distilled else 1))
        if self.distilled_head is None:
            return self.head(x[:, 0])
        return (self.head(x[:, 0]) + self.distilled_head(x[:, 1])) / 2

    def _pooled(self, x: Array, norm: Callable[[Array], Array]) -> Array:
        """What the head reads of all tokens."""
        config = self.config
        after = config.final_norm == "pooled"
        x = x if after else norm(x)
        patches = x[:, config.prefix :]
        if self.pool is not None:
            pooled = self.pool(patches)
        else:
            pooled = patches.mean(axis=1)
        if config.pool == "cls+mean":
            pooled = jnp.stack([x[:, 0], pooled], axis=1)
        pooled = norm(pooled) if after else pooled
        return pooled.reshape(pooled.shape[0], -1)
