"""Pieces that several models share: activations with a lean derivative, pooling, resizing."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Gelu = Literal["erf", "tanh"]

# Per-channel statistics that nearly all ImageNet checkpoints expect (recalled; torchvision, DeiT).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    return x * cdf, (cdf + x * density) * tangent


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
    return half * x * (1 + t), derivative * tangent


def gelu(x: Float[Array, "*shape"], form: Gelu = "erf") -> Float[Array, "*shape"]:
    """The Gaussian error linear unit `x Φ(x)`, exact or in its tanh approximation.

    Args:
      x: any shape, floating point.
      form: "erf" is exact (Hugging Face ViT, timm); "tanh" is the approximation that Google's ViT
        was trained with. The two differ by up to 5e-4.

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
    raise ValueError(f"form is {form!r}; it must be 'erf' or 'tanh'.")


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


def resize_grid(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolates a grid of position embeddings to another number of patches, bicubically.

    Args:
      grid: shape (rows, columns, width).
      size: (rows, columns) wanted.

    Returns:
      Same dtype, shape (*size, width). Keys' cubic with a = −1/2, anti-aliased where it shrinks,
      which is what timm does; Hugging Face's `interpolate_pos_encoding` uses a = −3/4 instead.
    """
    if grid.shape[:2] == tuple(size):
        return grid
    resized = jax.image.resize(
        jnp.asarray(grid, jnp.float32), (*size, grid.shape[2]), "cubic", antialias=True
    )
    return np.asarray(resized).astype(grid.dtype)
