"""Images with one class each."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorajax import data, models
from lorajax.environment.judging import NOT_NEGATIVE, SHARE, at_least, judged
from lorajax.tasks.base import Batch, PRNGKey, Scores, classified

SMOOTHING = 0.1
"""Smoothing of the classes that `lorajax finetune` trains with; chosen on held-out images."""


@judged(channels=at_least(1), smoothing=SHARE, mixup=NOT_NEGATIVE)
@dataclasses.dataclass(frozen=True)
class Images:
    """Which class an image is of, from the columns `images` (bytes) and `labels`.

    Attributes:
      mean: per channel, or one number for all, in units of [0, 1], that images are normalized with.
      std: likewise.
      channels: that the model takes; gray images are repeated.
      image_size: (height, width) that images are brought to; None takes them as they come.
      augment: in training, a name of `data.POLICIES`.
      smoothing: of the classes in training, in [0, 1); `SMOOTHING` is what the command takes.
      mixup: α of the Beta(α, α) that the shares of two images in one are drawn from in training
        (Zhang et al. 2018, arXiv:1710.09412, stated); their classes train in the same shares, that
        of the larger one is reported. 0 mixes nothing.
      unit: "images".
      metrics: names of `tasks.METRICS` that its predictions can be judged by.

    Raises:
      ValueError: for an unknown augmentation or a smoothing out of range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    image_size: tuple[int, int] | None = None
    augment: str = "none"
    smoothing: float = 0.0
    mixup: float = 0.0
    unit: str = "images"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews")

    def __post_init__(self):
        if self.augment not in data.POLICIES:
            raise ValueError(
                f"augment is {self.augment!r}; it must be one of {', '.join(data.POLICIES)}."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; it must lie in [0, 1).")
        if not 0 <= self.mixup < float("inf"):
            raise ValueError(f"mixup is {self.mixup}; it must not be negative.")

    @classmethod
    @judged
    def of(
        cls,
        config: Any,
        *,
        augment: str = "none",
        smoothing: float = 0.0,
        mixup: float | int = 0.0,
    ) -> "Images":
        """The task for a vision model.

        Args:
          config: the model's: its `mean`, `std` and `channels`, and its `image_size` if it has one.
          augment: as above.
          smoothing: as above.
          mixup: as above.

        Returns:
          The task.
        """
        size = getattr(config, "image_size", None)
        return cls(config.mean, config.std, config.channels, size, augment, smoothing, mixup)

    def prepare(self, batch: Batch, key: PRNGKey | None = None) -> Batch:
        """Augments where there is a key, brings to size, normalizes, mixes; see `Task.prepare`."""
        images = jnp.asarray(batch["images"])
        if key is not None:
            images = data.policy(self.augment, self.image_size)(key, images)
        elif self.image_size is not None:
            images = data.resize(images, self.image_size)
        pixels = models.normalize(images, self.mean, self.std, channels=self.channels)
        prepared = {"pixels": pixels, "labels": jnp.asarray(batch["labels"])}
        return prepared if key is None or not self.mixup else self._mixed(prepared, key)

    def _mixed(self, batch: Batch, key: PRNGKey) -> Batch:
        """Each image with a part of the one before it in the batch."""
        pixels, labels = batch["pixels"], batch["labels"]
        # A key of its own, so that augmentation draws what it draws without mixing.
        key, alpha = jax.random.fold_in(key, 2), jnp.float32(self.mixup)
        share = jax.random.beta(key, alpha, alpha, labels.shape, jnp.float32)
        share = jnp.maximum(share, 1 - share)
        weight = share[:, None, None, None].astype(pixels.dtype)
        mixed = weight * pixels + (1 - weight) * jnp.roll(pixels, 1, axis=0)
        return {"pixels": mixed, "labels": labels, "others": jnp.roll(labels, 1), "share": share}

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Cross-entropy of each image's class; see `Task.scores`."""
        logits = self._logits(model, batch)
        scores = classified(logits, batch["labels"], self.smoothing)
        if "share" not in batch:
            return scores
        other = classified(logits, batch["others"], self.smoothing).objective
        share = batch["share"]
        return scores._replace(objective=share * scores.objective + (1 - share) * other)

    def predictions(self, model: Any, batch: Batch) -> tuple[Array, Array]:
        """The most likely class of each image of a prepared batch, and the right one."""
        return self._logits(model, batch).argmax(-1).astype(jnp.int32), batch["labels"]

    def asked(self, batch: Batch) -> tuple[Array, Array]:
        """The pixels that the model is called with, and the class of each image."""
        return batch["pixels"], batch["labels"]

    def _logits(self, model: Any, batch: Batch) -> Array:
        return model(batch["pixels"].astype(model.dtype or jnp.float32))
