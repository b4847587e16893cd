"""A whole fine-tuning run as one pure function, so that a sweep trains many adapters at once.

`sweeps.sweep(run, {"scale": …, "rank": …, "seed": …}, key=key)` then holds the frozen base once,
trains all lanes in one program, spreads them over the devices, and stores and resumes as any sweep.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import adapters, data
from lorajax.adapters.starts import resolve
from lorajax.adapters.surgery import Targets
from lorajax.factors import Factors
from lorajax.finetune import probes
from lorajax.finetune.training import Recipe, Trainer


def masked(start: Callable[..., Factors], rank: Any) -> Callable[..., Factors]:
    """A start of which only the first `rank` columns are kept, the others being zero.

    Args:
      start: an initializer that returns factors.
      rank: how many columns of A and rows of B are filled; may be traced.

    Returns:
      An initializer with the same parameters. A column of A and the row of B that meets it are a
      fixed point of every gradient method when both are zero, so the adapter trains as one of that
      rank (derived; theory section 1).
    """

    def filled(**arguments: Any) -> Factors:
        found = start(**arguments)
        if not isinstance(found, Factors):
            raise ValueError(
                "start has an offset; only starts that are factors alone can be masked."
            )
        a, b = found
        columns = jnp.arange(a.shape[-1], dtype=jnp.int32)
        keep = (columns < jnp.asarray(rank, jnp.int32)).astype(a.dtype)
        return Factors(a * keep[None, :], b * keep[:, None])

    # Initializers are called with what their signature names.
    filled.__signature__ = inspect.signature(start)  # pyright: ignore[reportFunctionMemberAccess]
    return filled


def run_of(
    model: Any,
    train: data.Split,
    recipe: Recipe,
    *,
    targets: Targets = "**/attention/*",
    rank: int = 8,
    start: str | Callable[..., Any] = "lora",
    heads: tuple[str, ...] = (),
    gradients: Mapping[str, Any] | None = None,
    test: data.Split | None = None,
    every: int = 1,
) -> Callable[..., dict[str, Array]]:
    """Makes the function `run(key, scale, rank)` of one fine-tuning run.

    Args:
      model: a model of `lorajax.models`; frozen, in evaluation mode for its statistics.
      train: what to train on; all of it goes to the device.
      recipe: how to train. All lanes see the same images in the same order.
      targets: which layers are adapted.
      rank: the largest rank.
      start: an initializer with a scale, or its name.
      heads: path patterns of what trains in full beside the adapters.
      gradients: for starts that need one, and for the alignment probe; from `adapters.gradients`.
      test: what accuracy is measured on at the end; None for no test.
      every: steps between probes, a divisor of the recipe's steps.

    Returns:
      A pure function of `key` (a PRNG key for the start), `scale` (of the start) and `rank` (how
      many columns are filled; the largest if not given). It returns a dict: `loss` and `accuracy`
      of every step's batch, shape (steps,); the fields of a Probe, shape (steps/every, layers, …);
      `test_loss` and `test_accuracy` if there is a test.

    Raises:
      ValueError: if `every` does not divide the steps, and whatever `adapters.adapt` raises.
    """
    if recipe.steps % every:
        raise ValueError(f"every is {every}; it must divide steps = {recipe.steps}.")
    order = data.Order(len(train.labels), recipe.batch_size, recipe.seed)
    index = np.stack([order(step) for step in range(recipe.steps)]).astype(np.int32)
    index = index.reshape(-1, every, recipe.batch_size)
    images, labels = jnp.asarray(train.images[:]), jnp.asarray(train.labels)
    held_out = None if test is None else (jnp.asarray(test.images[:]), jnp.asarray(test.labels))
    towards = None if gradients is None else probes.directions(gradients)
    initializer = resolve(start)
    largest = rank

    def run(key: Any, scale: Any = None, rank: Any = None) -> dict[str, Array]:
        begin = initializer if scale is None else functools.partial(initializer, scale=scale)
        begin = begin if rank is None else masked(begin, rank)
        adapted = adapters.adapt(
            model, targets, key=key, rank=largest, start=begin, gradients=gradients
        )
        trainer = Trainer(adapted, adapters.trainable(adapted, heads=heads), recipe)

        def step(state, index):
            return trainer.advance(state, trainer.frozen, images[index], labels[index])

        def stretch(state, indices):
            probe = probes.measure(trainer.model(state), towards)
            state, metrics = jax.lax.scan(step, state, indices)
            return state, (metrics, probe)

        state, (metrics, probe) = jax.lax.scan(stretch, trainer.init(), index)
        found = {
            "loss": metrics.loss.reshape(-1),
            "accuracy": metrics.accuracy.reshape(-1),
            **probe._asdict(),
        }
        if towards is None:
            del found["misalignment"]
        if held_out is not None:
            weights = jnp.ones(held_out[1].shape, jnp.float32) / held_out[1].size
            sums = trainer.sums(state, trainer.frozen, *held_out, weights)
            found |= {"test_loss": sums[0], "test_accuracy": sums[1]}
        return found

    return run
