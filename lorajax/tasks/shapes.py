"""What a batch of a model's own task looks like, before there is any data."""

from typing import Any

import jax
import jax.numpy as jnp

from lorajax.environment.judging import at_least, judged
from lorajax.tasks.base import Task
from lorajax.tasks.images import Images
from lorajax.tasks.texts import NextToken, Texts, takes


@judged(samples=at_least(1))
def expected(
    model: Any, samples: int, length: int | None = None
) -> tuple[Task, dict[str, jax.ShapeDtypeStruct]]:
    """The task that a model is made for, and the shapes of its batches.

    Args:
      model: of `models`, with or without arrays.
      samples: of a batch.
      length: tokens of a text, for language models; as many as the model takes if None.

    Returns:
      The task, and columns by name.

    Raises:
      ValueError: for a length that the model does not take, or that images have not.
    """
    kind, config = takes(model), model.config
    shape = jax.ShapeDtypeStruct
    if kind == "images":
        if length is not None:
            raise ValueError(f"length is {length}; a {type(model).__name__} takes images.")
        size = getattr(config, "image_size", None) or (224, 224)
        pixels = shape((samples, *size, config.channels), jnp.uint8)
        return Images.of(config), {"images": pixels, "labels": shape((samples,), jnp.int32)}
    longest = getattr(config, "longest", getattr(config, "context", None))
    length = longest if length is None else length
    if length is None or length < 1 or (longest is not None and length > longest):
        raise ValueError(f"length is {length}; the model takes 1 … {longest} tokens.")
    tokens = shape((samples, length), jnp.int32)
    truths = shape((samples, length), jnp.bool_)
    if kind == "tokens":
        columns = {"tokens": tokens, "targets": truths, "positions": tokens, "segments": tokens}
        return NextToken(), columns
    columns = {"tokens": tokens, "mask": truths, "types": tokens}
    return Texts(), columns | {"labels": shape((samples,), jnp.int32)}
