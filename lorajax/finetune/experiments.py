"""A whole fine-tuning run as one pure function, so that a sweep trains many adapters at once.

`sweeps.sweep(run, {"scale": …, "rank": …, "seed": …}, key=key)` then holds the frozen base once,
trains all lanes in one program, spreads them over the devices, and stores and resumes as any sweep.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from scipy.special import stdtrit

from lorajax import adapters, data
from lorajax.adapters.starts import resolve
from lorajax.adapters.surgery import Targets
from lorajax.factors import Factors
from lorajax.finetune import probes
from lorajax.finetune.budgets import budgeted
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


def picked(starts: Sequence[Callable[..., Factors]], index: Any) -> Callable[..., Factors]:
    """One of several starts, chosen inside the program, so that lanes may differ in it.

    Args:
      starts: initializers that return factors; all of them are computed.
      index: which one; may be traced.

    Returns:
      An initializer with the parameters of all of them.
    """
    signatures = [inspect.signature(start) for start in starts]
    parameters = {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for start, signature in zip(starts, signatures, strict=True)
        for name, parameter in signature.parameters.items()
        if name not in getattr(start, "keywords", {})
    }

    def filled(**arguments: Any) -> Factors:
        found = []
        for start, signature in zip(starts, signatures, strict=True):
            each = start(**{k: v for k, v in arguments.items() if k in signature.parameters})
            if not isinstance(each, Factors):
                raise ValueError(
                    "start has an offset; only starts that are factors alone can be picked from."
                )
            found.append(each)
        return jax.tree.map(lambda *x: jnp.stack(x)[index], *found)

    filled.__signature__ = inspect.Signature(list(parameters.values()))  # pyright: ignore[reportFunctionMemberAccess]
    return filled


def _mask(model: Any, ranks: Mapping[str, Any]) -> None:
    """Zeroes each layer's columns of A and rows of B beyond its rank, in the model itself."""
    for path, layer in adapters.layers(model).items():
        each = layer.adapters["default"]
        if not isinstance(each, adapters.LoRA) or each.offset is not None:
            raise ValueError(
                f"the start of {path!r} has an offset; only starts that are factors alone can be "
                "masked."
            )
        columns = jnp.arange(each.rank, dtype=jnp.int32)
        keep = (columns < ranks[path]).astype(each.a.dtype)
        each.a.set_value(each.a[...] * keep[None, :])
        each.b.set_value(each.b[...] * keep[:, None])


def interval(values: Any, level: float = 0.95) -> tuple[float, float]:
    """Mean over repetitions and half the width of its confidence interval.

    Args:
      values: one number a repetition, at least two; for paired runs their differences.
      level: probability that an interval made like this one covers the expectation.

    Returns:
      Mean and half-width, by Student's t: exact where the repetitions are independent and normal.

    Raises:
      ValueError: for fewer than two values or a level outside (0, 1).

    Example:
      >>> from lorajax import finetune
      >>> mean, half = finetune.interval([1.0, 2.0, 3.0, 4.0, 5.0])
      >>> round(mean, 3), round(half, 3)
      (3.0, 1.963)
    """
    numbers = np.asarray(values, np.float64).ravel()
    if numbers.size < 2:
        raise ValueError(f"values hold {numbers.size}; an interval takes at least 2.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie in (0, 1).")
    quantile = float(stdtrit(numbers.size - 1, (1 + level) / 2))
    return float(numbers.mean()), quantile * float(numbers.std(ddof=1)) / numbers.size**0.5


def run_of(
    model: Any,
    train: data.Split,
    recipe: Recipe,
    *,
    targets: Targets | None = "**/attention/*",
    rank: int = 8,
    start: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] = "lora",
    heads: tuple[str, ...] = (),
    gradients: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    test: data.Split | Mapping[str, data.Split] | None = None,
    watch: data.Split | None = None,
    every: int = 1,
    orders: int = 1,
    allocations: Sequence[Mapping[str, int]] = (),
    final_rank: float | None = None,
) -> Callable[..., dict[str, Array]]:
    """Makes the function `run(key, scale, rank, …)` of one fine-tuning run.

    Args:
      model: a model of `lorajax.models`; frozen, in evaluation mode for its statistics.
      train: what to train on; all of it goes to the device.
      recipe: how to train.
      targets: which layers are adapted; None trains the whole model, without adapters and probes.
      rank: the largest rank.
      start: an initializer with a scale, or its name; or several, of which a lane picks one.
      heads: path patterns of what trains in full beside the adapters.
      gradients: for starts that need one, and for the alignment probe; from `adapters.gradients`.
      inputs: for EVA, from `adapters.input_moments`.
      test: what accuracy is measured on at the end, or several such splits by name; None for none.
      watch: what loss and accuracy are measured on at every probe; None for nothing.
      every: steps between probes, a divisor of the recipe's steps; 0 for no probes.
      orders: how many orders of the images there are; lanes of one order see the same batches.
      allocations: ranks of the layers by path, of which a lane picks one; instead of `targets` and
        `rank`, which they determine. A layer that one leaves out has rank 0 in it.
      final_rank: adapters are AdaLoRA's, begin with `rank` and are pruned to this mean rank.

    Returns:
      A pure function of `key` (a PRNG key for the start) and of optional arguments that may all be
      traced: `scale` (of the start), `rank` (how many columns are filled; the largest if not
      given), `rate` (multiplies the recipe's learning rate), and the integers `start`, `order` and
      `allocation`, which pick one of those given here. It returns a dict: `loss` and `accuracy` of
      every step's batch, shape (steps,); the fields of a Probe, shape (steps/every, layers, …), if
      asked for; `watch_loss` and `watch_accuracy`, shape (steps/every,), if something is watched;
      `NAME_loss` and `NAME_accuracy` for each split of `test`, with NAME "test" for a single one.
      AdaLoRA has no Probe, but `ranks`, the number of singular values of each layer at the end.

    Raises:
      ValueError: if `every` does not divide the steps, and whatever `adapters.adapt` raises.
    """
    if every and recipe.steps % every:
        raise ValueError(f"every is {every}; it must divide steps = {recipe.steps}.")
    if orders < 1:
        raise ValueError(f"orders is {orders}; it must be at least 1.")
    index = np.stack([_batches(train, recipe, recipe.seed + i) for i in range(orders)])
    index = index.reshape(orders, -1, every or recipe.steps, recipe.batch_size)
    images, labels = jnp.asarray(train.images[:]), jnp.asarray(train.labels)
    splits = {"test": test} if isinstance(test, data.Split) else dict(test or {})
    held_out = {name: _stacked(split) for name, split in splits.items()}
    watched = None if watch is None else _stacked(watch)
    towards = None if gradients is None else probes.directions(gradients)
    several = not isinstance(start, str) and isinstance(start, Sequence)
    starts: Any = start if several else [start]
    initializers = [resolve(each) for each in starts]
    largest, lanes, table = rank, targets, {}
    if allocations:
        paths = dict.fromkeys(path for each in allocations for path, r in each.items() if r)
        table = {
            path: np.asarray([each.get(path, 0) for each in allocations], np.int32)
            for path in paths
        }
        lanes = {path: int(column.max()) for path, column in table.items()}
    options: dict[str, Any] = {"rank": largest, "gradients": gradients, "inputs": inputs}
    if final_rank is not None:
        options["kind"] = "adalora"
    whole = targets is None and not allocations

    def run(
        key: Any,
        scale: Any = None,
        rank: Any = None,
        rate: Any = None,
        start: Any = None,
        order: Any = None,
        allocation: Any = None,
    ) -> dict[str, Array]:
        begins = [
            each if scale is None else functools.partial(each, scale=scale) for each in initializers
        ]
        begin = begins[0] if start is None else picked(begins, start)
        begin = begin if rank is None else masked(begin, rank)
        if whole:
            adapted, wrt = model, nnx.Param
        else:
            adapted = adapters.adapt(model, lanes, key=key, start=begin, **options)  # pyright: ignore[reportArgumentType]
            wrt = adapters.trainable(adapted, heads=heads)
        if allocation is not None:
            _mask(
                adapted, {path: jnp.asarray(column)[allocation] for path, column in table.items()}
            )
        transformation = recipe.transformation()
        if rate is not None:
            # Behind everything else: the updates of all recipes are linear in the learning rate.
            transformation = optax.chain(
                transformation,
                optax.scale(jnp.asarray(rate, jnp.float32)),  # pyright: ignore[reportArgumentType]
            )
        penalty = None
        if final_rank is not None:
            transformation = budgeted(transformation, adapted, wrt, final_rank, recipe.steps)
            penalty = _orthogonality
        trainer = Trainer(adapted, wrt, recipe, transformation=transformation, penalty=penalty)
        probing = bool(every) and not whole and final_rank is None

        def step(state, index):
            return trainer.advance(state, trainer.frozen, images[index], labels[index])

        def means(state, chunks):
            _, sums = jax.lax.scan(
                lambda _, chunk: (None, trainer.sums(state, trainer.frozen, *chunk)), None, chunks
            )
            return sums.sum(axis=0) / jnp.sum(chunks[2])

        def stretch(state, indices):
            probe = probes.measure(trainer.model(state), towards) if probing else None
            outside = None if watched is None else means(state, watched)
            state, metrics = jax.lax.scan(step, state, indices)
            return state, (metrics, probe, outside)

        batches = jnp.asarray(index)[0 if order is None else order]
        state, (metrics, probe, outside) = jax.lax.scan(stretch, trainer.init(), batches)
        found = {"loss": metrics.loss.reshape(-1), "accuracy": metrics.accuracy.reshape(-1)}
        if probe is not None:
            found |= probe._asdict()
            if towards is None:
                del found["misalignment"]
        if final_rank is not None:
            layers = adapters.layers(trainer.model(state)).values()
            alive = [jnp.sum(each.adapters["default"].e[...] != 0) for each in layers]
            found["ranks"] = jnp.stack(alive).astype(jnp.int32)
        for name, chunks in held_out.items():
            loss, accuracy = means(state, chunks)
            found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if outside is not None:
            found |= {"watch_loss": outside[:, 0], "watch_accuracy": outside[:, 1]}
        return found

    return run


def _orthogonality(model: Any) -> Array:
    # 0.1 is the weight that AdaLoRA's paper gives the penalty (recalled).
    return jnp.float32(0.1) * adapters.orthogonality(model)


def _batches(train: data.Split, recipe: Recipe, seed: int) -> np.ndarray:
    order = data.Order(len(train.labels), recipe.batch_size, seed)
    return np.stack([order(step) for step in range(recipe.steps)]).astype(np.int32)


def _stacked(split: data.Split, chunk: int = 250) -> tuple[Array, Array, Array]:
    """Images, labels and weights in chunks: lanes × images would not fit the memory at once."""
    parts = list(data.batches(split, min(chunk, len(split.labels))))
    images, labels, weights = (jnp.asarray(np.stack(column)) for column in zip(*parts, strict=True))
    return images, labels, weights
