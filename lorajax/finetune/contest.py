"""Ranks by rule, by EVA, by AdaLoRA and the same everywhere, at equal budgets of parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax import data, initializers, ranks, sweeps
from lorajax.adapters.surgery import Targets
from lorajax.finetune.experiments import Run, run_of
from lorajax.finetune.recipes import Recipe
from lorajax.finetune.setup import moments_of, select_ranks
from lorajax.initializers import PRNGKey
from lorajax.tasks import Task

METHODS = ("rule", "fixed", "EVA", "AdaLoRA", "starved")
FORWARD = 1 / 3
"""Share of a gradient's operations that a forward pass alone takes; the backward pass has two."""


class Contestant(NamedTuple):
    """What one way to choose ranks came to.

    Attributes:
      accuracy: on the test set, one number a seed.
      held_out: mean accuracy on the held-out samples, by the rate that was tried.
      rate: multiple of the recipe's learning rate with the best of them.
      ranks: of the layers by path; for AdaLoRA the mean over seeds at the end of training.
      parameters: of adapters with these ranks.
      trained: of the adapters while they train; more than that for AdaLoRA, which prunes.
      passes: samples that a gradient was computed for, before and during training.
    """

    accuracy: Float[np.ndarray, " seeds"]
    held_out: dict[float, float]
    rate: float
    ranks: dict[str, float]
    parameters: float
    trained: int
    passes: float


def contest(
    model: Any,
    task: Task,
    train: data.Table,
    held_out: data.Table,
    test: data.Table,
    recipe: Recipe,
    *,
    key: PRNGKey,
    uniform: int = 3,
    seeds: int = 5,
    rates: Sequence[float] = (0.3, 1.0, 3.0),
    methods: Sequence[str] = METHODS[:4],
    targets: Targets = "blocks/**",
    heads: tuple[str, ...] = ("head",),
    samples: int = 2048,
) -> dict[str, Contestant]:
    """Trains adapters of one budget whose ranks come from different places.

    The budget is what the same rank `uniform` in every layer costs. "rule" are the singular values
    of the gradient above the noise of two halves, by energy for each parameter; "EVA" the variance
    of each layer's inputs that is explained for each parameter, with EVA's start; "AdaLoRA" begins
    with half again as many directions and prunes them as it trains; "starved" is the rule with a
    tenth of the budget, a negative control. All but EVA start from `orthogonal`, AdaLoRA from
    `balanced` frames, as it has to. Each takes the learning rate that serves it best on the
    held-out samples, and all train the heads in full.

    Args:
      model: a pretrained model with a fitted head, in evaluation mode.
      task: what a batch means to it.
      train: what to train on.
      held_out: what learning rates are chosen on.
      test: what is reported.
      recipe: how to train, at the learning rate 1; AdaLoRA takes Adam instead of LoRA+.
      key: of the starts.
      uniform: the rank that sets the budget.
      seeds: starts and orders of the samples.
      rates: multiples of the recipe's learning rate to choose from.
      methods: names among METHODS.
      targets: layers to adapt.
      heads: path patterns of what trains in full.
      samples: that gradients and input moments are averaged over.

    Returns:
      A Contestant by method.

    Raises:
      ValueError: for an unknown method, or as `run_of`.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"methods name {unknown[0]!r}; known are {', '.join(METHODS)}.")
    field = _field(model, task, train, uniform, methods, targets, samples)
    make = functools.partial(
        run_of,
        model,
        task,
        train,
        heads=heads,
        test={"held_out": held_out, "test": test},
        every=0,
        orders=seeds,
    )
    axes = {"rate": np.asarray(rates, np.float32), "order": range(seeds)}
    found: dict[str, Contestant] = {}
    if plain := [name for name in methods if name != "AdaLoRA"]:
        found |= _with_lora(field, plain, make, recipe, axes, key, samples)
    if "AdaLoRA" in methods:
        found["AdaLoRA"] = _with_adalora(field, uniform, make, recipe, axes, key)
    return {name: found[name] for name in methods}


class _Field(NamedTuple):
    """What the contestants share: costs of a rank, the budget, and the ranks of each of them."""

    costs: dict[str, int]
    budget: int
    chosen: dict[str, dict[str, int]]
    moments: dict[str, Array] | None


def _field(
    model: Any,
    task: Task,
    train: data.Table,
    uniform: int,
    methods: Sequence[str],
    targets: Targets,
    samples: int,
) -> _Field:
    whole = select_ranks(model, task, train, targets=targets, samples=samples)
    costs = {each.path: each.cost for each in whole.layers}
    budget = uniform * sum(costs.values())
    spectra = {each.path: each.singular_values[: each.rank] for each in whole.layers}
    chosen: dict[str, dict[str, int]] = {
        "rule": ranks.allocate(spectra, costs, budget),
        "fixed": dict.fromkeys(costs, uniform),
        "starved": ranks.allocate(spectra, costs, budget // 10),
    }
    moments = None
    if "EVA" in methods:
        moments = moments_of(model, task, train, targets=targets, samples=samples)
        smallest = {each.path: min(each.shape) for each in whole.layers}
        explained = {path: _explained(moments[path])[: smallest[path]] for path in costs}
        chosen["EVA"] = ranks.allocate(explained, costs, budget)
    return _Field(costs, budget, chosen, moments)


def _with_lora(
    field: _Field,
    names: Sequence[str],
    make: Callable[..., Run],
    recipe: Recipe,
    axes: Mapping[str, Any],
    key: PRNGKey,
    samples: int,
) -> dict[str, Contestant]:
    """The contestants whose ranks are fixed, as lanes of one program."""
    run = make(
        recipe,
        start=("orthogonal", "eva") if field.moments else "orthogonal",
        inputs=field.moments,
        allocations=[field.chosen[name] for name in names],
    )
    lanes: dict[str, Any] = {"allocation": range(len(names))}
    if field.moments:
        lanes["start"] = [int(name == "EVA") for name in names]
    swept = sweeps.sweep(run, {"method": lanes, **axes}, key=key, fold=("order",))
    found = {}
    for i, name in enumerate(names):
        chosen = field.chosen[name]
        parameters = sum(r * field.costs[path] for path, r in chosen.items())
        before = samples * {"fixed": 0.0, "EVA": FORWARD}.get(name, 1.0)
        passes = recipe.steps * recipe.batch_size + before
        found[name] = _contestant(swept.isel(method=i), chosen, parameters, parameters, passes)
    return found


def _with_adalora(
    field: _Field,
    uniform: int,
    make: Callable[..., Run],
    recipe: Recipe,
    axes: Mapping[str, Any],
    key: PRNGKey,
) -> Contestant:
    costs, initial = field.costs, math.ceil(1.5 * uniform)
    run = make(
        dataclasses.replace(recipe, optimizer="adam"),
        start=functools.partial(initializers.balanced, scale=1.0),
        allocations=[dict.fromkeys(costs, initial)],
        # A direction costs one more number here, its singular value.
        final_rank=field.budget / (sum(costs.values()) + len(costs)),
    )
    swept = sweeps.sweep(run, axes, key=key, fold=("order",))
    # The order in which the run reports them is the model's, and so is that of the selection.
    alive = swept["ranks"].isel(rate=_best(swept)).values.mean(axis=0)
    left = dict(zip(costs, alive.tolist(), strict=True))
    parameters = sum(r * (costs[path] + 1) for path, r in left.items())
    trained = initial * (sum(costs.values()) + len(costs))
    return _contestant(swept, left, parameters, trained, float(recipe.steps * recipe.batch_size))


@jax.jit
def _explained(moment: Float[Array, "m m"]) -> Float[Array, " m"]:
    """Square roots of the shares of a layer's input variance, in decreasing order."""
    values = jnp.maximum(jnp.linalg.eigvalsh(moment)[::-1], 0)
    return jnp.sqrt(values / jnp.sum(values))


def _best(swept: Any) -> int:
    """Index of the rate with the highest mean accuracy on the held-out samples."""
    return int(swept["held_out_accuracy"].values.mean(axis=1).argmax())


def _contestant(swept, chosen, parameters, trained, passes) -> Contestant:
    best = _best(swept)
    means, rates = swept["held_out_accuracy"].values.mean(axis=1), swept["rate"].values
    return Contestant(
        accuracy=np.asarray(swept["test_accuracy"].values[best], np.float64),
        held_out=dict(zip(map(float, rates), means.tolist(), strict=True)),
        rate=float(rates[best]),
        ranks={path: float(r) for path, r in chosen.items()},
        parameters=float(parameters),
        trained=int(trained),
        passes=float(passes),
    )
