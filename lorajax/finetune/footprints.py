"""What a training step takes, before anything is allocated: parameters, bytes, operations."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lorajax import adapters
from lorajax.adapters import paths
from lorajax.adapters.selection import shapes
from lorajax.environment.judging import at_least, judged
from lorajax.finetune import sharding, traces
from lorajax.finetune.recipes import Recipe
from lorajax.finetune.runs import targets_of
from lorajax.finetune.training import Trainer
from lorajax.tasks import Task


class Footprint(NamedTuple):
    """What one step takes; bytes are those of each device.

    Attributes:
      base: parameters that are frozen.
      adapters: parameters of the adapters.
      beside: parameters that train in full.
      weights: bytes of what is frozen.
      trained: bytes of what trains.
      optimizer: bytes of the optimizer's state.
      activations: bytes of what a step holds for a while at most: activations that the backward
        pass reads, gradients, and what it is at; see `traces.peak`.
      recomputed: the same where each block is computed again (`model.remat`); None for a model that
        cannot.
      flops: operations of a step's products, on all devices, without recomputation.
      samples: of a step.
      devices: how many.
      layout: of `sharding.LAYOUTS`.
    """

    base: int
    adapters: int
    beside: int
    weights: int
    trained: int
    optimizer: int
    activations: int
    recomputed: int | None
    flops: int
    samples: int
    devices: int
    layout: str

    @property
    def held(self) -> int:
        """Bytes of a device that the whole training holds."""
        return self.weights + self.trained + self.optimizer

    @property
    def total(self) -> int:
        """Bytes of a device at the most, without recomputation."""
        return self.held + self.activations


@judged
def footprint(
    model: Any,
    wrt: Any,
    task: Task,
    recipe: Recipe,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    *,
    devices: int = 1,
    layout: str = "data",
) -> Footprint:
    """What a step of a `Trainer` takes, by its trace alone.

    Args:
      model: an NNX module, adapted or not; shapes do (`models.abstract`, `abstract_lora`). It is
        not changed.
      wrt: NNX filter of what trains.
      task: what a batch means.
      recipe: how to train.
      batch: shapes of a batch's columns, for example of `tasks.expected`.
      devices: that the batch is split among.
      layout: of `sharding.LAYOUTS`.

    Returns:
      The Footprint. Parameters and bytes of weights and optimizer are exact; activations are within
      about a tenth of what XLA says of its own program, `trainer.lower(state, batch).compile()
      .memory_analysis()`, and those with recomputation within a fifth.

    Raises:
      ValueError: as `Trainer`, and for a batch that the devices do not divide.
    """
    sharding.check_layout(layout)
    sharding.check_batch(recipe.batch_size, recipe.accumulate, devices)
    trainer = Trainer(model, wrt, task, recipe)
    state = jax.eval_shape(trainer.init)

    def bytes_of(tree: Any) -> int:
        return sum(
            sharding.share(x.shape, devices, layout) * _itemsize(x) for x in jax.tree.leaves(tree)
        )

    def program(model: Any) -> Any:
        trainer = Trainer(model, wrt, task, recipe)
        part = {
            name: jax.ShapeDtypeStruct((x.shape[0] // devices, *x.shape[1:]), x.dtype)
            for name, x in batch.items()
        }
        return jax.make_jaxpr(trainer.advance)(state, trainer.frozen, part).jaxpr

    # With weights that are split, whole ones of a layer are there while it computes.
    gathered = 0
    if layout == "full" and devices > 1:
        sizes = [x.size * _itemsize(x) for x in jax.tree.leaves(trainer.frozen)]
        gathered = 2 * max(sizes, default=0)
    recomputed = None
    if hasattr(model, "remat"):
        recomputed = traces.peak(program(_again(model, True))) + gathered
        one = program(_again(model, False))
    else:
        one = program(model)
    low_rank = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    trains = trainer.parameters
    return Footprint(
        base=sum(x.size for x in jax.tree.leaves(trainer.frozen)),
        adapters=low_rank,
        beside=trains - low_rank,
        weights=bytes_of((trainer.frozen, state.rest)),
        trained=bytes_of(state.params),
        optimizer=bytes_of(state.optimizer),
        activations=traces.peak(one) + gathered,
        recomputed=recomputed,
        flops=devices * traces.flops(one),
        samples=recipe.batch_size,
        devices=devices,
        layout=layout,
    )


def _again(model: Any, remat: bool) -> Any:
    """The model with its blocks computed again in the backward pass, or not."""
    other = nnx.merge(*nnx.split(model))
    other.remat = remat
    return other


def _itemsize(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    return leaf.dtype.itemsize


@judged(rank=at_least(1), budget=at_least(0))
def abstract_lora(
    model: Any,
    *,
    rank: int | None = None,
    budget: int | None = None,
    targets: Any = None,
    also: Any = None,
) -> tuple[Any, Any, int]:
    """A model of shapes alone with LoRA adapters of one rank, as `prepare` would adapt it.

    Args:
      model: of `models.abstract`.
      rank: of every adapter, or less in layers that are smaller; None for the largest that the
        budget allows.
      budget: of parameters of the adapters; needed without a rank.
      targets: layers to adapt; all but what trains in full if None.
      also: path patterns of what trains in full beside the heads; `model.beside` if None.

    Returns:
      The adapted model, the filter of what trains, and the rank.

    Raises:
      ValueError: as `targets_of`; without rank and budget; for a budget that no rank fits.
    """
    chosen, heads = targets_of(model, targets, also, rank)
    sizes = shapes(model, chosen)
    if rank is None:
        if budget is None:
            raise ValueError("rank and budget are both None; one of them must be given.")
        one = sum(slices * sum(shape) for shape, slices in sizes.values())
        rank = budget // max(one, 1)
        if rank < 1:
            raise ValueError(
                f"budget is {budget:,} parameters; adapters of rank 1 have {one:,} of them."
            )
    ranks = {paths.escape(path): min(rank, *shape) for path, (shape, _) in sizes.items()}
    adapted = nnx.eval_shape(
        lambda model: adapters.adapt(model, ranks, key=jax.random.key(0)), model
    )
    return adapted, adapters.trainable(adapted, heads=heads), rank
