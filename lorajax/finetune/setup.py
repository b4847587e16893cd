"""What comes before training: a head that fits, gradients at the start, ranks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lorajax import adapters, data, ranks
from lorajax.adapters.surgery import Targets
from lorajax.environment.judging import POSITIVE, SEED, at_least, judged
from lorajax.finetune.recipes import Recipe
from lorajax.finetune.training import Trainer, fit
from lorajax.tasks import Task, per_sample, standing


@judged(epochs=at_least(1), batch_size=at_least(1), learning_rate=POSITIVE, seed=SEED)
def fit_head(
    model: Any,
    task: Task,
    train: data.Table,
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
      model: an NNX module with `heads`, paths of what is fitted. It is not changed.
      task: what a batch means to it; a few epochs need neither augmentation nor smoothing.
      train: what to train on.
      epochs: times through the data.
      batch_size: samples a step.
      learning_rate: of Adam, falling to zero by a cosine.
      seed: of the order of samples.

    Returns:
      A new model in evaluation mode, with arrays of its own for the head and the old ones else.
    """
    names = model.heads

    def is_head(path: tuple[Any, ...], value: Any) -> bool:
        kind = type(value) if isinstance(value, nnx.Variable) else getattr(value, "type", object)
        return str(path[0]) in names and issubclass(kind, nnx.Param)

    frozen = nnx.clone(model)
    frozen.eval()
    batch_size = min(batch_size, len(train))
    recipe = Recipe(
        steps=max(1, epochs * (len(train) // batch_size)),
        batch_size=batch_size,
        optimizer="adam",
        learning_rate=learning_rate,
        seed=seed,
    )
    trainer = Trainer(frozen, is_head, task, recipe)
    return trainer.model(fit(trainer, train))


@judged
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


def batches_of(
    train: data.Table, samples: int = 2048, batch_size: int = 128, seed: int = 0
) -> list[dict[str, Array]]:
    """A random part of a table in equal batches, an even number of them so that halves are equal.

    Args:
      train: what to draw from.
      samples: how many at most.
      batch_size: at most; smaller for small tables.
      seed: of the draw.

    Returns:
      Batches on the device, at least two.

    Raises:
      ValueError: for a table of fewer than two samples.
    """
    available = min(samples, len(train))
    if available < 2:
        raise ValueError(f"train has {len(train)} samples; two halves need at least 2.")
    batch_size = min(batch_size, available // 2)
    count = available // batch_size // 2 * 2
    order = data.Order(len(train), len(train), seed)(0)[: count * batch_size]
    return [
        {name: jnp.asarray(column) for name, column in train[part].items()}
        for part in np.split(order, count)
    ]


@judged(samples=at_least(1), batch_size=at_least(1), seed=SEED)
def moments_of(
    model: Any,
    task: Task,
    train: data.Table,
    *,
    targets: Targets = "**",
    samples: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, Float[Array, "m m"]]:
    """`adapters.input_moments` for a task and its data, over what stands in its samples.

    Args:
      model: as for `select_ranks`, and so are the others.
      task: what a batch means to the model.
      train: what to draw from.
      targets: layers to look at.
      samples: that moments are averaged over, at most.
      batch_size: samples at a time.
      seed: of the draw.

    Returns:
      Matrices by path.
    """

    def forward(model: Any, batch: Any) -> Any:
        return task.scores(model, task.prepare(batch))

    batches = batches_of(train, samples, batch_size, seed)
    where = standing(task)
    return adapters.input_moments(model, batches, targets, forward=forward, where=where)


@judged(samples=at_least(1), batch_size=at_least(1), seed=SEED)
def select_ranks(
    model: Any,
    task: Task,
    train: data.Table,
    *,
    targets: Targets = "**",
    rule: str | Callable[..., Any] | ranks.Rule = "split_half",
    samples: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
    **options: Any,
) -> adapters.Selection:
    """`adapters.select_ranks` for a task and its data.

    Args:
      model: an NNX module, its head fitted (see `fit_head`).
      task: what a batch means to the model; its reported loss is what is looked at.
      train: what to estimate gradients on.
      targets: layers to look at.
      rule: as there.
      samples: that gradients are averaged over, at most.
      batch_size: samples at a time.
      seed: of the draw and of sketches.
      **options: `budget`, `max_rank`, `memory`, `width`, and options of the rule.

    Returns:
      A Selection: print it for the table.
    """
    return adapters.select_ranks(
        model,
        per_sample(task),
        batches_of(train, samples, batch_size, seed),
        rule,
        targets,
        key=jax.random.key(seed),
        where=standing(task),
        **options,
    )


@judged(samples=at_least(1), batch_size=at_least(1), seed=SEED)
def gradients_of(
    model: Any,
    task: Task,
    train: data.Table,
    *,
    targets: Targets = "**",
    samples: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
    **options: Any,
) -> dict[str, adapters.Gradient]:
    """`adapters.gradients` for a task and its data.

    Args:
      model: as for `select_ranks`, and so are the others.
      task: what a batch means to the model.
      train: what to estimate gradients on.
      targets: layers to look at.
      samples: that gradients are averaged over, at most.
      batch_size: samples at a time.
      seed: of the draw and of sketches.
      **options: `memory`, `width`.

    Returns:
      Gradients by path.
    """
    return adapters.gradients(
        model,
        per_sample(task),
        batches_of(train, samples, batch_size, seed),
        targets,
        key=jax.random.key(seed),
        **options,
    )
