"""What the families of vision share: how images are scaled, and what files say about that."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from lorajax.environment.judging import at_least, judged
from lorajax.models.family import Untold
from lorajax.models.files import Source

# Per-channel statistics that nearly all ImageNet checkpoints expect (recalled; torchvision, DeiT).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Those of OpenAI's CLIP (recalled; transformers' OPENAI_CLIP_MEAN and OPENAI_CLIP_STD).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SIDE = ("config.json", "preprocessor_config.json")
"""The JSON files beside a vision checkpoint that are read."""

# What transformers' processors do to an image that `statistics` or the caller's own pipeline does.
_STEPS = ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize")
_ODD = ("rescale_offset", "offset", "include_top")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless fields, numbers or tuples of them, are at least 1."""
    for name in names:
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")


def check_statistics(config: Any) -> None:
    """Raises ValueError unless a configuration's mean and std have one entry, or one a channel."""
    for name in ("mean", "std"):
        values = getattr(config, name)
        if len(values) not in (1, config.channels):
            raise ValueError(
                f"{name} is {values}; it must have 1 entry or {config.channels}, one a channel."
            )
    if not all(value > 0 for value in config.std):
        raise ValueError(f"std is {config.std}; every entry must be positive.")


@judged(channels=at_least(1))
def normalize(
    images: Num[Array | np.ndarray, "b h w _"],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels: int = 3,
    dtype: Any = jnp.float32,
) -> Float[Array, "b h w {channels}"]:
    """Scales bytes to what a model was trained on: `(x/255 − mean)/std`.

    Args:
      images: bytes, shape (batch, height, width, 1, 3 or channels); gray ones are repeated, of
        colored ones a model of one channel sees the brightness, as Pillow rounds it.
      mean: per channel, or one number for all, in units of [0, 1].
      std: likewise.
      channels: that the model takes.
      dtype: of the result.

    Returns:
      Shape (batch, height, width, channels).

    Raises:
      ValueError: if the images have another number of channels, or are not bytes.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images have dtype {images.dtype}; normalize takes bytes, uint8.")
    if channels == 1 and images.shape[-1] == 3:
        images = brightness(images)
    if images.shape[-1] not in (1, channels):
        raise ValueError(
            f"images have {images.shape[-1]} channels; the model takes {channels} (or 1, repeated)."
        )
    # One multiplication and one addition a pixel instead of two divisions.
    center, spread = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    scale = jnp.broadcast_to(1 / (255 * spread), (1, 1, 1, channels))
    shift = jnp.broadcast_to(-center / spread, (1, 1, 1, channels))
    return (jnp.asarray(images, jnp.float32) * scale + shift).astype(dtype)


def brightness(images: Num[Array | np.ndarray, "b h w 3"]) -> Num[Array, "b h w 1"]:
    """Colored bytes in gray: 0.299 R + 0.587 G + 0.114 B (ITU-R 601-2), as Pillow rounds it.

    Args:
      images: uint8, red, green and blue.

    Returns:
      uint8, one channel.
    """
    wide = jnp.asarray(images, jnp.int32)
    # In 16 binary places, the last of which rounds.
    weights = (19595, 38470, 7471)
    total = sum((wide[..., i] * weight for i, weight in enumerate(weights)), jnp.int32(1 << 15))
    return (total >> 16).astype(jnp.uint8)[..., None]


def pair(size: Any, name: str = "a size") -> tuple[int, int]:
    """(height, width) from a side, a pair, or an object with those keys.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    whole = all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"{name} is {size!r}; it must be an integer or two.")
    return int(sides[0]), int(sides[1])


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's changes of fields, in which one side stands for a square image_size."""
    if given.get("image_size") is None:
        return {key: value for key, value in given.items() if key != "image_size"}
    return {**given, "image_size": pair(given["image_size"], "image_size")}


def statistics(
    source: Source, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.5,)
) -> dict[str, Any]:
    """The fields `mean` and `std` as a checkpoint's side files state them.

    Args:
      source: whose `preprocessor_config.json` (transformers) or `config.json` (timm) is asked.
      mean: what the format's checkpoints expect where neither says anything.
      std: likewise.

    Returns:
      Tuples in units of [0, 1], in which rescaling is included: (f x − m)/s of transformers, with
      rescale_factor f, is (x/255 − m/(255 f))/(s/(255 f)). `Untold` where the file leaves them out.

    Raises:
      ValueError: for steps that (x/255 − mean)/std cannot express, named.
    """
    processor = source.json("preprocessor_config.json")
    if not processor:
        config = source.json("config.json")
        details = config.get("pretrained_cfg") or config
        found = {"mean": details.get("mean"), "std": details.get("std")}
        default = {"mean": mean, "std": std}
        return {k: default[k] if v is None else _numbers(k, v) for k, v in found.items()}
    odd = [key for key in processor if key.startswith("do_") and key not in _STEPS]
    for key in (*odd, *_ODD):
        if processor.get(key):
            raise ValueError(f"its preprocessor_config.json has {key}, which there is no place for")
    factor = 1 / 255
    if not processor.get("do_rescale", True):
        factor = 1.0
    elif processor.get("rescale_factor") is not None:
        (factor,) = _numbers("rescale_factor", processor["rescale_factor"])
    if not factor > 0:
        raise ValueError(f"its rescale_factor is {factor}; it must be positive")
    if not processor.get("do_normalize", True):
        return {"mean": (0.0,), "std": (1 / (255 * factor),)}
    kind = str(processor.get("image_processor_type", processor.get("feature_extractor_type", "")))
    fields: dict[str, Any] = {}
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        # A ViT's processor has defaults for what is left out, and refuses null as others do.
        if processor.get(key, (0.5,) if kind.startswith("ViT") else None) is None:
            fields[name] = Untold(f"its preprocessor_config.json normalizes without {key}")
        else:
            values = _numbers(key, processor.get(key, (0.5,)))
            fields[name] = tuple(value / (255 * factor) for value in values)
    return fields


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    given, values = values, tuple(values) if isinstance(values, list | tuple) else (values,)
    if not values or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"its {name} is {given!r}; it must be a number or a list of numbers")
    # One number stands for all channels, so that a configuration survives being written and read.
    return tuple(float(value) for value in (values[:1] if len(set(values)) == 1 else values))


def processed_size(source: Source) -> tuple[int, int] | None:
    """(height, width) of the images that transformers' processor makes; None if it varies."""
    processor = source.json("preprocessor_config.json")
    crops = processor.get("do_center_crop") and "crop_size" in processor
    size = processor.get("crop_size" if crops else "size")
    fixed = isinstance(size, int | list) or (isinstance(size, Mapping) and "height" in size)
    return pair(size) if fixed and (crops or processor.get("do_resize", True)) else None


def processor_of(config: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The `preprocessor_config.json` of transformers that states a configuration's scaling."""

    def spread(values: tuple[float, ...]) -> list[float]:
        return list(values) * (config.channels if len(values) == 1 else 1)

    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spread(config.mean),
        "image_std": spread(config.std),
    }


def timm_arguments(
    source: Source, free: Collection[str], plain: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What timm's `config.json` says of a model: its architecture and its arguments.

    Args:
      source: the checkpoint.
      free: arguments that change nothing, or that tensors show, or that the caller reads.
      plain: the only value of each other argument that the model here has a place for.

    Returns:
      The name of the architecture, empty if none is stated, and the arguments that are not null.

    Raises:
      ValueError: for an argument that there is no place for, named.
    """
    config = source.json("config.json")
    arguments = config.get("model_args") or {}
    stated = {key: config[key] for key in ("global_pool", "num_classes") if key in config}
    if not isinstance(arguments, dict):
        raise ValueError(f"its model_args are {arguments!r}; they must be an object")
    found = {k: v for k, v in (stated | arguments).items() if v is not None}
    for key, value in found.items():
        if key not in free and not (key in plain and value == plain[key]):
            raise ValueError(
                f"its configuration states {key} = {value!r}, which this model has no place for"
            )
    return str(config.get("architecture") or ""), found
