"""Augmentations on the device: pure functions of a key and a batch of bytes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt8, UInt32

from lorajax.environment.judging import judged

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
Images = UInt8[Array, "b h w c"]
Augmentation = Callable[[PRNGKey, Array], Array]

POLICIES = ("none", "crop", "flip", "crop-flip", "zoom-flip", "resized-crop")
"""The names that `policy` knows."""


def _to_bytes(images: Array) -> Array:
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


@judged
def resize(images: UInt8[Array, "b _ _ c"], size: tuple[int, int]) -> UInt8[Array, "b h w c"]:
    """Scales images to a size, bilinearly, anti-aliased where they shrink.

    Args:
      images: bytes, shape (batch, height, width, channels).
      size: (height, width) wanted.

    Returns:
      Bytes of that size; the input itself where it has it.
    """
    if images.shape[1:3] == tuple(size):
        return images
    shape = (images.shape[0], *size, images.shape[3])
    return _to_bytes(jax.image.resize(images.astype(jnp.float32), shape, "bilinear"))


def flip(key: PRNGKey, images: Images) -> Images:
    """Mirrors each image left to right with probability ½."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def crop(key: PRNGKey, images: Images, padding: int = 4) -> Images:
    """Shifts each image by up to `padding` pixels each way, filling with zeros."""
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def cut(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(cut)(padded, corners)


def resized_crop(
    key: PRNGKey,
    images: UInt8[Array, "b _ _ c"],
    size: tuple[int, int],
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[Array, "b h w c"]:
    """Cuts a random rectangle from each image and scales it to a size.

    Args:
      key: a PRNG key.
      images: bytes, shape (batch, height, width, channels).
      size: (height, width) of the result.
      area: range of the rectangle's share of the image, drawn uniformly.
      ratio: range of width over height, drawn uniformly in its logarithm; sides are cut to the
        image's.

    Returns:
      Bytes of shape (batch, *size, channels), bilinear and anti-aliased.
    """
    batch, height, width, channels = images.shape
    keys = jax.random.split(key, 3)
    share = jax.random.uniform(keys[0], (batch,), jnp.float32, *area)
    logs = jnp.log(jnp.asarray(ratio, jnp.float32))
    aspect = jnp.exp(jax.random.uniform(keys[1], (batch,), jnp.float32, logs[0], logs[1]))
    pixels = share * jnp.float32(height * width)
    sides = jnp.stack([jnp.sqrt(pixels / aspect), jnp.sqrt(pixels * aspect)], axis=-1)
    full = jnp.asarray([[height, width]], jnp.float32)
    sides = jnp.minimum(sides, full)
    corners = jax.random.uniform(keys[2], (batch, 2), jnp.float32) * (full - sides)
    scale = jnp.asarray([size], jnp.float32) / sides

    def cut(image: Array, scale: Array, corner: Array) -> Array:
        return jax.image.scale_and_translate(
            image, (*size, channels), (0, 1), scale, -corner * scale, "linear", antialias=True
        )

    return _to_bytes(jax.vmap(cut)(images.astype(jnp.float32), scale, corners))


@judged
def policy(name: str, size: tuple[int, int] | None) -> Augmentation:
    """The augmentation of a name, as a function of key and images.

    Args:
      name: "none"; "crop" (shift by up to an eighth of the side); "flip"; "crop-flip" (both, usual
        on CIFAR); "resized-crop" (with flips, usual on ImageNet) and "zoom-flip" (the same with a
        third of the image and more, for runs too short to learn from scraps).
      size: (height, width) that the model takes; images are scaled to it. None keeps theirs.

    Returns:
      A pure function, fit for `jit` and `vmap`.

    Raises:
      ValueError: for another name.
    """

    def fitted(images: Array) -> Array:
        return images if size is None else resize(images, size)

    def shifted(key: PRNGKey, images: Array) -> Array:
        images = fitted(images)
        return crop(key, images, max(1, images.shape[1] // 8))

    def resized(least: float, key: PRNGKey, images: Array) -> Array:
        wanted = (images.shape[1], images.shape[2]) if size is None else size
        cut = resized_crop(key, images, wanted, area=(least, 1.0))
        return flip(jax.random.fold_in(key, 1), cut)

    known: dict[str, Augmentation] = {
        "none": lambda key, images: fitted(images),
        "crop": shifted,
        "flip": lambda key, images: flip(key, fitted(images)),
        "crop-flip": lambda key, images: flip(jax.random.fold_in(key, 1), shifted(key, images)),
        "zoom-flip": functools.partial(resized, 1 / 3),
        "resized-crop": functools.partial(resized, 0.08),
    }
    if name not in known:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(POLICIES)}.")
    return known[name]
