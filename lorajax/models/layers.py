"""Pieces that several models share: activations with a lean derivative, pooling, resizing."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float


def kept(*arrays: Array) -> Any:
    """The arrays themselves, which XLA then holds until they are read for the last time.

    What a backward pass reads is computed in the forward pass. XLA may fuse the last step of that
    into the readers instead, and hold what it starts from: two arrays for one.
    """
    return jax.lax.optimization_barrier(arrays)


# A frozen layer needs only gelu'(x) for the backward pass. JAX's own rule keeps several
# intermediates of the size of the MLP's hidden layer alive until then; this one keeps a single one.
@jax.custom_jvp
def _gelu_erf(x: Array) -> Array:
    half = jnp.asarray(0.5, x.dtype)
    return half * x * (1 + jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype)))


@_gelu_erf.defjvp
def _gelu_erf_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    half = jnp.asarray(0.5, x.dtype)
    cdf = half * (1 + jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype)))
    density = jnp.asarray((2 * np.pi) ** -0.5, x.dtype) * jnp.exp(-half * x * x)
    y, slope = kept(x * cdf, cdf + x * density)
    return y, slope * tangent


@jax.custom_jvp
def _gelu_tanh(x: Array) -> Array:
    half, slope = jnp.asarray(0.5, x.dtype), jnp.asarray((2 / np.pi) ** 0.5, x.dtype)
    return half * x * (1 + jnp.tanh(slope * (x + jnp.asarray(0.044715, x.dtype) * x * x * x)))


@_gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    half, slope = jnp.asarray(0.5, x.dtype), jnp.asarray((2 / np.pi) ** 0.5, x.dtype)
    cubic = jnp.asarray(0.044715, x.dtype) * x * x
    t = jnp.tanh(slope * x * (1 + cubic))
    derivative = half * (1 + t) + half * x * (1 - t * t) * slope * (1 + 3 * cubic)
    y, derivative = kept(half * x * (1 + t), derivative)
    return y, derivative * tangent


@jax.custom_jvp
def _gelu_quick(x: Array) -> Array:
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


@_gelu_quick.defjvp
def _gelu_quick_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    slope = jnp.asarray(1.702, x.dtype)
    gate = jax.nn.sigmoid(slope * x)
    y, derivative = kept(x * gate, gate * (1 + slope * x * (1 - gate)))
    return y, derivative * tangent


@jax.custom_jvp
def softmax(x: Float[Array, "*batch k"]) -> Float[Array, "*batch k"]:
    """`jax.nn.softmax` over the last axis, whose derivative keeps the result alone."""
    return jax.nn.softmax(x)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    (y,) = kept(softmax(x))
    return y, y * (t - (y * t).sum(axis=-1, keepdims=True))


@jax.custom_jvp
def gated(gate: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`silu(gate) x`, whose derivative keeps two arrays: its factors by gate and by x."""
    return jax.nn.silu(gate) * x


@gated.defjvp
def _gated_jvp(primals, tangents):
    (gate, x), (t, u) = primals, tangents
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    y, by_gate, by_x = kept(silu * x, (share + silu * (1 - share)) * x, silu)
    return y, by_gate * t + by_x * u


def gelu(x: Float[Array, "*shape"], form: str = "erf") -> Float[Array, "*shape"]:
    """The Gaussian error linear unit `x Φ(x)`, exact or in one of its approximations.

    Args:
      x: any shape, floating point.
      form: "erf" is exact (Hugging Face ViT, timm); "tanh" is the approximation that Google's ViT
        was trained with, which differs by up to 5e-4; "quick" is x σ(1.702 x), that of OpenAI's
        CLIP, which differs by up to 0.02.

    Returns:
      Same shape and dtype. Forward and reverse mode keep one array of x's size.

    Raises:
      ValueError: for another form.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415), recalled.
    """
    if form == "erf":
        return _gelu_erf(x)
    if form == "tanh":
        return _gelu_tanh(x)
    if form == "quick":
        return _gelu_quick(x)
    raise ValueError(f"form is {form!r}; it must be 'erf', 'tanh' or 'quick'.")


def again(layer: nnx.Module) -> Callable[..., Any]:
    """A layer whose backward pass computes it again, so that only its inputs are kept until then.

    Args:
      layer: whose arguments are arrays and trees of them, or numbers that select at trace time.

    Returns:
      A function of the layer's own arguments.
    """

    def run(*given: Any) -> Any:
        # Numbers stay out of the arguments, which would become arrays.
        traced = [None if isinstance(each, int) else each for each in given]

        def inside(layer: nnx.Module, *traced: Any) -> Any:
            pairs = zip(traced, given, strict=True)
            return layer(*(each if array is None else array for array, each in pairs))

        return nnx.remat(inside)(layer, *traced)

    return run


def attention(
    query: Float[Array, "b q heads f"],
    key: Float[Array, "b k groups f"],
    value: Float[Array, "b k groups f"],
    mask: Bool[Array, "#b #q k"] | None = None,
) -> Float[Array, "b q heads*f"]:
    """What each query sees: values, weighted by the softmax of scaled products with their keys.

    Args:
      query: floating point, a multiple of as many heads as there are groups; consecutive heads
        share a group's keys and values.
      key: of the same dtype.
      value: likewise.
      mask: true where a query may see a key; every key if None. A query that may see none sees all
        alike, so that no row is a NaN.

    Returns:
      The heads' results side by side, of the values' dtype; weights are taken in float32 at least.

    Source: Ainslie et al. 2023 (arXiv:2305.13245) for groups, recalled.
    """
    batch, length, heads, features = query.shape
    groups = key.shape[2]
    # Axes in the order of the batched products, around which XLA's CPU backend else transposes.
    query = (query * jnp.asarray(features**-0.5, query.dtype)).transpose(0, 2, 1, 3)
    query = query.reshape(batch, groups, -1, length, features)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgnqf,bgkf->bgnqk", query, key)
    # Half precision loses the small weights of long rows.
    scores = scores.astype(at_least_float32(scores.dtype))
    if mask is not None:
        # Finite: a row of minus infinities has no softmax.
        lowest = jnp.asarray(jnp.finfo(scores.dtype).min / 2, scores.dtype)
        scores = jnp.where(mask[:, None, None], scores, lowest)
    weights = softmax(scores).astype(value.dtype)
    mixed = jnp.einsum("bgnqk,bgkf->bgnqf", weights, value)
    mixed = mixed.reshape(batch, heads, length, features).transpose(0, 2, 1, 3)
    return mixed.reshape(batch, length, heads * features)


def at_least_float32(dtype: Any) -> Any:
    """The dtype to compute sums and exponentials in: float32 for anything narrower."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: Float[Array, "*batch d"], epsilon: float) -> Float[Array, "*batch d"]:
    """Subtracts the mean of the last axis and divides by its standard deviation.

    Args:
      x: any shape, floating point.
      epsilon: added to the variance.

    Returns:
      Same shape and dtype. Differentiation keeps the result and one number a row.
    """
    return _standardize(x, epsilon)[0]


def _standardize(x: Array, epsilon: float) -> tuple[Array, Array]:
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(variance + jnp.asarray(epsilon, x.dtype))
    return centered * scale, scale


@standardize.defjvp
def _standardize_jvp(epsilon, primals, tangents):
    (x,), (t,) = primals, tangents
    y, scale = _standardize(x, epsilon)
    along = (y * t).mean(axis=-1, keepdims=True)
    return y, scale * (t - t.mean(axis=-1, keepdims=True) - y * along)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, with a leaner derivative, in float32 at least.

    A frozen norm that is differentiated by JAX's own rules keeps several arrays of its input's
    size; this one keeps one.
    """

    def __call__(
        self, x: Float[Array, "*batch d"], *, mask: Any = None
    ) -> Float[Array, "*batch d"]:
        """Standardizes each token, then scales and shifts it.

        Raises:
          ValueError: for a mask, which tokens of fixed number have no use for.
        """
        if mask is not None:
            raise ValueError("mask is given; this layer norm takes None.")
        dtype = self.dtype or x.dtype
        wide = at_least_float32(x.dtype)
        y = standardize(x.astype(wide), self.epsilon)
        shape = (1,) * (x.ndim - 1) + (-1,)
        if self.scale is not None:
            y = y * self.scale[...].astype(wide).reshape(shape)
        if self.bias is not None:
            y = y + self.bias[...].astype(wide).reshape(shape)
        return y.astype(dtype)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` with weights, statistics and arithmetic in float32 at least.

    Args:
      features: channels, the last axis.
      rngs: for the initial weights, which are constants.
      dtype: of the result; that of the input if None.
      param_dtype: of scale and bias, widened to float32 where it is narrower.

    Momentum and epsilon are those of torch, whose momentum of 0.1 is the weight of the new batch
    where Flax's 0.9 is that of the old average.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        wide = at_least_float32(param_dtype)
        super().__init__(
            features, momentum=0.9, epsilon=1e-5, dtype=None, param_dtype=wide, rngs=rngs
        )
        self.result_dtype = dtype

    def __call__(self, x: Float[Array, "b *space c"], **options: Any) -> Float[Array, "b *space c"]:
        """Normalizes each channel, by the batch in training mode, else by running averages."""
        y = super().__call__(x.astype(at_least_float32(x.dtype)), **options)
        return y.astype(self.result_dtype or x.dtype)


@functools.cache
def _bins(inputs: int, outputs: int) -> np.ndarray:
    """Averaging matrix (outputs, inputs) of torch's adaptive average pooling."""
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        start, stop = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def adaptive_average_pool(
    x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b {size[0]} {size[1]} c"]:
    """Averages an image into a fixed grid of bins, whatever its size.

    Args:
      x: images, shape (batch, height, width, channels).
      size: (rows, columns) of the result; may exceed those of the image, bins then repeat pixels.

    Returns:
      Same dtype; bin i covers pixels floor(i·h/rows) … ceil((i+1)·h/rows) − 1, the convention of
      torch's AdaptiveAvgPool2d, in which the VGG checkpoints were trained.
    """
    if x.shape[1:3] == tuple(size):
        return x
    rows = jnp.asarray(_bins(x.shape[1], size[0]), x.dtype)
    columns = jnp.asarray(_bins(x.shape[2], size[1]), x.dtype)
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)


def _cubic(inputs: int, outputs: int, antialias: bool) -> np.ndarray:
    """Matrix (outputs, inputs) of torch's bicubic interpolation along one axis."""
    ratio = inputs / outputs
    # Anti-aliased, torch takes a = −1/2, a kernel as wide as the ratio, and what of it is inside;
    # else a = −3/4, four neighbors, and the border's value for those outside.
    a, stretch = (-0.5, max(ratio, 1.0)) if antialias else (-0.75, 1.0)
    center = (np.arange(outputs)[:, None] + 0.5) * ratio - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    index = np.floor(center).astype(int) + np.arange(-reach, reach + 1)
    x = np.abs(index - center) / stretch
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        weight = np.where((index >= 0) & (index < inputs), weight, 0.0)
        weight = weight / weight.sum(axis=1, keepdims=True)
    matrix = np.zeros((outputs, inputs))
    np.add.at(matrix, (np.arange(outputs)[:, None], np.clip(index, 0, inputs - 1)), weight)
    return matrix


def resize_grid(grid: Any, size: tuple[int, int], *, antialias: bool = True) -> Any:
    """Interpolates a grid of position embeddings to another number of patches, bicubically.

    Args:
      grid: shape (rows, columns, width), of NumPy or JAX.
      size: (rows, columns) wanted.
      antialias: as timm does, with Keys' cubic of a = −1/2, stretched where the grid shrinks; else
        as transformers does, with a = −3/4.

    Returns:
      Same kind and dtype, shape (*size, width), computed in float32.
    """
    if grid.shape[:2] == tuple(size):
        return grid
    numpy: Any = np if isinstance(grid, np.ndarray) else jnp
    rows, columns = (
        numpy.asarray(_cubic(n, m, antialias), np.float32)
        for n, m in zip(grid.shape[:2], size, strict=True)
    )
    wide = numpy.einsum("ih,hwc->iwc", rows, grid.astype(np.float32))
    return numpy.einsum("jw,iwc->ijc", columns, wide).astype(grid.dtype)


class MLP(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, gelu: str, *, rngs: nnx.Rngs, **dtypes: Any):
        self.gelu = gelu
        self.up = nnx.Linear(width, hidden, rngs=rngs, **dtypes)
        self.down = nnx.Linear(hidden, width, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Acts on each token by itself."""
        return self.down(gelu(self.up(x), self.gelu))


class GatedMLP(nnx.Module):
    """Three linear layers: one gates another through a SiLU, the last goes back to the width."""

    def __init__(
        self, width: int, hidden: int, *, bias: bool = True, rngs: nnx.Rngs, **dtypes: Any
    ):
        made = {"use_bias": bias, "rngs": rngs, **dtypes}
        self.gate = nnx.Linear(width, hidden, **made)
        self.up = nnx.Linear(width, hidden, **made)
        self.down = nnx.Linear(hidden, width, **made)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Acts on each token by itself."""
        return self.down(gated(self.gate(x), self.up(x)))
