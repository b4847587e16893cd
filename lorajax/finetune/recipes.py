"""How to train: recipes, and those whose numbers were chosen on held-out data."""

import dataclasses
from typing import Any

import jax
import optax

from lorajax.adapters.optimizers import lora_plus, scale_beside
from lorajax.adapters.preconditioned import by_part, lora_rite, reflora, riemannian, spectral
from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, SEED, at_least, judged

OPTIMIZERS = (
    "adamw",
    "adam",
    "sgd",
    "muon",
    "lora-plus",
    "riemannian",
    "reflora",
    "lora-rite",
    "spectral",
)
DECAYING = ("adamw", "muon")
"""The optimizers that take a weight decay."""
SCHEDULES = ("constant", "linear", "cosine")
RATIO = 4.0
"""Learning rate of B over that of A in the tuned LoRA+, and of what trains beside them."""
_MOST = 2**31 - 1  # steps are counted in int32


@judged(
    steps=at_least(1),
    batch_size=at_least(1),
    learning_rate=POSITIVE,
    weight_decay=NOT_NEGATIVE,
    ratio=POSITIVE,
    accumulate=at_least(1),
    window=at_least(0),
    seed=SEED,
)
@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
      steps: in all.
      batch_size: samples a step.
      optimizer: "adamw", "adam", "sgd" (with `momentum`), "muon" (each matrix's momentum made
        nearly orthogonal and as large as Adam's steps are, arXiv:2502.16982; AdamW for the rest),
        or "lora-plus" (Adam with B's learning rate multiplied by `ratio`); "riemannian" and
        "reflora" (their gradients, then Adam; RefLoRA takes plain ones during `warmup`),
        "lora-rite" and "spectral" (of A and B; Adam of the rest).
      learning_rate: at its peak.
      schedule: "constant", or "linear" or "cosine" to zero, after the warm-up.
      warmup: steps in which the learning rate rises linearly from zero.
      weight_decay: decoupled, of matrices only; 0 for optimizers other than `DECAYING`.
      momentum: of "sgd".
      ratio: of "lora-plus".
      beside: learning rate of what trains beside adapters (a head, embeddings) over theirs.
      clip: bound on the norm of the gradient; 0 for none.
      accumulate: parts that a batch is taken through the model in, one after the other, to save
        memory; `batch_size` is a multiple of it. Their gradients of Σ objective are added up and
        divided by Σ count, so that the update is that of the whole batch; only what a forward pass
        changes (batch statistics, dropout) sees the parts.
      window: batches whose samples are sorted by length together (`data.Buckets`), for texts; 0
        shuffles them whatever their length.
      seed: of the order of samples and of augmentations.

    Raises:
      ValueError: for a number out of its range, or a name that is not known.
    """

    steps: int
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.0
    ratio: float = 16.0
    beside: float = 1.0
    clip: float = 0.0
    accumulate: int = 1
    window: int = 0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.steps <= _MOST:
            raise ValueError(f"steps is {self.steps}; it must lie in 1 … {_MOST}.")
        for name in ("batch_size", "learning_rate", "ratio", "beside", "accumulate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")
        for name in ("warmup", "weight_decay", "momentum", "clip", "window", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}; it must divide batch_size = {self.batch_size}."
            )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}; it must be less than steps = {self.steps}.")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        if self.weight_decay and self.optimizer not in DECAYING:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; with optimizer {self.optimizer!r} it must "
                "be 0."
            )

    def rate(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        left = self.steps - self.warmup
        if self.schedule == "constant":
            after: optax.Schedule = optax.constant_schedule(self.learning_rate)
        elif self.schedule == "linear":
            after = optax.linear_schedule(self.learning_rate, 0.0, left)
        else:
            after = optax.cosine_decay_schedule(self.learning_rate, left)
        if not self.warmup:
            return after
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        return optax.join_schedules([rise, after], [self.warmup])

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer as an optax transformation of the trainable state."""
        rate = self.rate()
        if self.optimizer == "adamw":
            core = optax.adamw(rate, weight_decay=self.weight_decay, mask=_matrices)
        elif self.optimizer == "muon":
            # 0.2 is what the paper finds Adam's steps to be large (stated there).
            core = optax.contrib.muon(rate, weight_decay=self.weight_decay, consistent_rms=0.2)
        elif self.optimizer == "adam":
            core = optax.adam(rate)
        elif self.optimizer == "sgd":
            core = optax.sgd(rate, momentum=self.momentum or None)
        elif self.optimizer == "lora-plus":
            core = optax.chain(optax.adam(rate), lora_plus(self.ratio))
        elif self.optimizer in ("riemannian", "reflora"):
            turned = riemannian() if self.optimizer == "riemannian" else reflora(self.warmup)
            core = optax.chain(turned, optax.adam(rate))
        else:
            inner = lora_rite() if self.optimizer == "lora-rite" else spectral()
            pairs = optax.chain(inner, optax.scale_by_learning_rate(rate))
            core = by_part(pairs, optax.adam(rate))
        if self.beside != 1:
            core = optax.chain(core, scale_beside(self.beside))
        return optax.chain(optax.clip_by_global_norm(self.clip), core) if self.clip else core


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def lora(steps: int, **changes: Any) -> Recipe:
    """The recipe for adapters that `lorajax finetune` takes: LoRA+, a twentieth of warm-up, cosine.

    Args:
      steps: in all.
      **changes: fields of a Recipe that are to be others.

    Returns:
      A Recipe. Ratio, learning rate and `beside` were chosen on what was held out of the MNIST
      sample, for the embedded ViT (`sims/pick_defaults.py`); a larger model wants a smaller
      learning rate.

    Raises:
      ValueError: as `Recipe`.

    Example:
      >>> from lorajax.finetune import recipes
      >>> recipes.lora(600).warmup, recipes.lora(600, learning_rate=1e-3).learning_rate
      (30, 0.001)
    """
    optimizer = changes.get("optimizer", "lora-plus")
    tuned: dict[str, Any] = {
        "batch_size": 50,
        "optimizer": optimizer,
        "learning_rate": 7e-3,
        "ratio": RATIO,
        "beside": RATIO if optimizer == "lora-plus" else 1.0,
        "warmup": steps // 20,
    }
    return Recipe(steps, **tuned | changes)


def full(steps: int, **changes: Any) -> Recipe:
    """The recipe that `lorajax finetune --method full` takes: AdamW, warm-up, cosine.

    Args:
      steps: in all.
      **changes: fields of a Recipe that are to be others.

    Returns:
      A Recipe. The learning rate was chosen as that of `lora`.

    Raises:
      ValueError: as `Recipe`.
    """
    tuned: dict[str, Any] = {
        "batch_size": 50,
        "optimizer": "adamw",
        "learning_rate": 8e-3,
        "warmup": steps // 20,
    }
    return Recipe(steps, **tuned | changes)
