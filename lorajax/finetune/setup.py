"""What comes before training: a head that fits, gradients at the start, ranks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from lorajax import adapters, data, models
from lorajax.adapters.surgery import Targets
from lorajax.finetune.training import Recipe, Trainer, fit

HEADS = ("head", "distilled_head")
"""Paths of the classification heads of the models."""


def heads(model: Any) -> tuple[str, ...]:
    """Paths of the heads that a model has."""
    return tuple(name for name in HEADS if getattr(model, name, None) is not None)


def fit_head(
    model: Any,
    train: data.Split,
    *,
    epochs: int = 3,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> Any:
    """A model whose head was fitted to the frozen features.

    The gradient that starts and ranks are read off passes through the head: behind a head of
    another task, or a random one, it says little about the task at hand.

    Args:
      model: a model of `lorajax.models`. It is not changed.
      train: what to train on.
      epochs: times through the data.
      batch_size: images a step.
      learning_rate: of Adam, falling to zero by a cosine.
      seed: of the order of samples.

    Returns:
      A new model in evaluation mode, with arrays of its own for the head and the old ones else.
    """
    names = heads(model)

    def is_head(path: tuple[Any, ...], value: Any) -> bool:
        kind = type(value) if isinstance(value, nnx.Variable) else getattr(value, "type", object)
        return str(path[0]) in names and issubclass(kind, nnx.Param)

    frozen = nnx.clone(model)
    frozen.eval()
    batch_size = min(batch_size, len(train.labels))
    recipe = Recipe(
        steps=max(1, epochs * (len(train.labels) // batch_size)),
        batch_size=batch_size,
        optimizer="adam",
        learning_rate=learning_rate,
        seed=seed,
    )
    trainer = Trainer(frozen, is_head, recipe)
    return trainer.model(fit(trainer, train))


def adapt(model: Any, targets: Targets, *, key: Any, **options: Any) -> Any:
    """`adapters.adapt`, compiled as one program.

    Layer by layer, every new shape of factors compiles a handful of small programs, which for a ViT
    of 25 kinds of layers takes longer than its training on a small set.

    Args:
      model: as there.
      targets: as there.
      key: as there.
      **options: as there; `gradients` and `inputs` are passed to the program as arguments.

    Returns:
      The adapted model, which shares the base's arrays.

    Raises:
      ValueError: as there; and for a layer whose factors both come out zero.
    """
    graph, state = nnx.split(model)
    given = {name: options.pop(name, None) for name in ("gradients", "inputs")}
    made = []
    # It runs once: optimizing it takes longer than running it unoptimized.
    quickly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    @functools.partial(jax.jit, compiler_options=quickly)
    def program(state, key, given):
        adapted = adapters.adapt(
            nnx.merge(graph, state, copy=True), targets, key=key, **given, **options
        )
        adapted_graph, adapted_state = nnx.split(adapted)
        leaves, tree = jax.tree.flatten(adapted_state)
        # What came in goes on as it is, outside the program, which would copy it.
        old = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(state))}
        places = [old.get(id(leaf)) for leaf in leaves]
        factors = {
            path: [jnp.any(x != 0) for x in each.factors]
            for path, layer in adapters.layers(adapted).items()
            for each in layer.adapters.values()
            if isinstance(each, adapters.LoRA)
        }
        moving = [jnp.stack(pair).any() for pair in factors.values()]
        made.append((adapted_graph, tree, places, tuple(factors)))
        return [leaf for leaf, place in zip(leaves, places, strict=True) if place is None], moving

    fresh, moving = program(state, key, given)
    fresh = iter(fresh)
    adapted_graph, tree, places, low_rank = made[-1]
    for path, moves in zip(low_rank, moving, strict=True):
        if not bool(moves):
            raise ValueError(
                f"the start of {path!r} leaves both factors zero, a point that no training "
                "leaves; use another start."
            )
    old = jax.tree.leaves(state)
    leaves = [next(fresh) if place is None else old[place] for place in places]
    return nnx.merge(adapted_graph, jax.tree.unflatten(tree, leaves))


def loss_of(config: Any) -> Callable[[Any, Any], Float[Array, " batch"]]:
    """The per-sample cross-entropy `loss(model, (images, labels))` that `adapters` asks for.

    Args:
      config: the model's, for normalization and image size.

    Returns:
      A function of a model and a batch of bytes and labels.
    """
    size = getattr(config, "image_size", None)

    def loss(model: Any, batch: Any) -> Float[Array, " batch"]:
        images, labels = batch
        images = data.resize(images, size) if size else images
        dtype = model.dtype or jnp.float32
        x = models.normalize(images, config.mean, config.std, channels=config.channels, dtype=dtype)
        logits = model(x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    return loss


def batches_of(
    train: data.Split, samples: int = 2048, batch_size: int = 128, seed: int = 0
) -> list[tuple[Array, Array]]:
    """A random part of a split in equal batches, an even number of them so that halves are equal.

    Args:
      train: what to draw from.
      samples: how many at most.
      batch_size: at most; smaller for small splits.
      seed: of the draw.

    Returns:
      (images, labels) on the device, at least two batches.

    Raises:
      ValueError: for a split of fewer than two images.
    """
    available = min(samples, len(train.labels))
    if available < 2:
        raise ValueError(f"train has {len(train.labels)} images; two halves need at least 2.")
    batch_size = min(batch_size, available // 2)
    count = available // batch_size // 2 * 2
    order = data.Order(len(train.labels), len(train.labels), seed)(0)[: count * batch_size]
    return [
        (jnp.asarray(train.images[part]), jnp.asarray(train.labels[part]))
        for part in np.split(order, count)
    ]


def moments_of(
    model: Any,
    train: data.Split,
    *,
    targets: Targets = "**",
    samples: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, Float[Array, "m m"]]:
    """`adapters.input_moments` for a classifier and its data; arguments as for `select_ranks`."""
    config = model.config
    size = getattr(config, "image_size", None)

    def forward(model: Any, batch: Any) -> Any:
        images = data.resize(batch[0], size) if size else batch[0]
        dtype = model.dtype or jnp.float32
        return model(
            models.normalize(images, config.mean, config.std, channels=config.channels, dtype=dtype)
        )

    batches = batches_of(train, samples, batch_size, seed)
    return adapters.input_moments(model, batches, targets, forward=forward)


def select_ranks(
    model: Any,
    train: data.Split,
    *,
    targets: Targets = "**",
    rule: str = "split_half",
    samples: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
    **options: Any,
) -> adapters.Selection:
    """`adapters.select_ranks` for a classifier and its data.

    Args:
      model: a model of `lorajax.models`, its head fitted (see `fit_head`).
      train: what to estimate gradients on.
      targets: layers to look at.
      rule: as there.
      samples: images that gradients are averaged over, at most.
      batch_size: images at a time.
      seed: of the draw and of sketches.
      **options: `constant`, `noise`, `fraction`, `budget`, `max_rank`, `memory`, `width`.

    Returns:
      A Selection: print it for the table.
    """
    return adapters.select_ranks(
        model,
        loss_of(model.config),
        batches_of(train, samples, batch_size, seed),
        rule,  # pyright: ignore[reportArgumentType]
        targets,
        key=jax.random.key(seed),
        **options,
    )


def gradients_of(
    model: Any,
    train: data.Split,
    *,
    targets: Targets = "**",
    samples: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
    **options: Any,
) -> dict[str, adapters.Gradient]:
    """`adapters.gradients` for a classifier and its data; arguments as for `select_ranks`."""
    return adapters.gradients(
        model,
        loss_of(model.config),
        batches_of(train, samples, batch_size, seed),
        targets,
        key=jax.random.key(seed),
        **options,
    )
