"""Ranks by rule, by EVA, by AdaLoRA and the same everywhere, at equal budgets of parameters."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax import data, initializers, ranks, sweeps
from lorajax.adapters.surgery import Targets
from lorajax.finetune.experiments import run_of
from lorajax.finetune.setup import moments_of, select_ranks
from lorajax.finetune.training import Recipe
from lorajax.initializers import PRNGKey

METHODS = ("rule", "fixed", "EVA", "AdaLoRA", "starved")
FORWARD = 1 / 3
"""Share of a gradient's operations that a forward pass alone takes; the backward pass has two."""


class Contestant(NamedTuple):
    """What one way to choose ranks came to.

    Attributes:
      accuracy: on the test set, one number a seed.
      held_out: mean accuracy on the held-out images, by the rate that was tried.
      rate: multiple of the recipe's learning rate with the best of them.
      ranks: of the layers by path; for AdaLoRA the mean over seeds at the end of training.
      parameters: of adapters with these ranks.
      trained: of the adapters while they train; more than that for AdaLoRA, which prunes.
      passes: images that a gradient was computed for, before and during training.
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
    train: data.Split,
    held_out: data.Split,
    test: data.Split,
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
    held-out images, and all train the heads in full.

    Args:
      model: a pretrained model with a fitted head, in evaluation mode.
      train: what to train on.
      held_out: what learning rates are chosen on.
      test: what is reported.
      recipe: how to train, at the learning rate 1; AdaLoRA takes Adam instead of LoRA+.
      key: of the starts.
      uniform: the rank that sets the budget.
      seeds: starts and orders of the images.
      rates: multiples of the recipe's learning rate to choose from.
      methods: names among METHODS.
      targets: layers to adapt.
      heads: path patterns of what trains in full.
      samples: images that gradients and input moments are averaged over.

    Returns:
      A Contestant by method.

    Raises:
      ValueError: for an unknown method, or as `run_of`.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"methods name {unknown[0]!r}; known are {', '.join(METHODS)}.")
    whole = select_ranks(model, train, targets=targets, samples=samples)
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
        moments = moments_of(model, train, targets=targets, samples=samples)
        smallest = {each.path: min(each.shape) for each in whole.layers}
        explained = {path: _explained(moments[path])[: smallest[path]] for path in costs}
        chosen["EVA"] = ranks.allocate(explained, costs, budget)
    common: dict[str, Any] = {
        "heads": heads,
        "test": {"held_out": held_out, "test": test},
        "every": 0,
        "orders": seeds,
    }
    found: dict[str, Contestant] = {}
    axes = {"rate": np.asarray(rates, np.float32), "order": range(seeds)}
    images = recipe.steps * recipe.batch_size
    masked = [name for name in methods if name != "AdaLoRA"]
    if masked:
        run = run_of(
            model,
            train,
            recipe,
            start=("orthogonal", "eva") if moments else "orthogonal",
            inputs=moments,
            allocations=[chosen[name] for name in masked],
            **common,
        )
        lanes: dict[str, Any] = {"allocation": range(len(masked))}
        if moments:
            lanes["start"] = [int(name == "EVA") for name in masked]
        swept = sweeps.sweep(run, {"method": lanes, **axes}, key=key, fold=("order",))
        for i, name in enumerate(masked):
            parameters = sum(r * costs[path] for path, r in chosen[name].items())
            before = samples * {"fixed": 0.0, "EVA": FORWARD}.get(name, 1.0)
            found[name] = _contestant(
                swept.isel(method=i), rates, chosen[name], parameters, parameters, images + before
            )
    if "AdaLoRA" in methods:
        initial = math.ceil(1.5 * uniform)
        matrices = len(costs)
        run = run_of(
            model,
            train,
            dataclasses.replace(recipe, optimizer="adam"),
            start=functools.partial(initializers.balanced, scale=1.0),
            allocations=[dict.fromkeys(costs, initial)],
            # A direction costs one more number here, its singular value.
            final_rank=budget / (sum(costs.values()) + matrices),
            **common,
        )
        swept = sweeps.sweep(run, axes, key=key, fold=("order",))
        best = _best(swept)
        # The order in which the run reports them is the model's, and so is that of the selection.
        alive = swept["ranks"].isel(rate=best).values.mean(axis=0)
        left = dict(zip(costs, alive.tolist(), strict=True))
        parameters = sum(r * (costs[path] + 1) for path, r in left.items())
        trained = initial * (sum(costs.values()) + matrices)
        found["AdaLoRA"] = _contestant(swept, rates, left, parameters, trained, float(images))
    return {name: found[name] for name in methods}


@jax.jit
def _explained(moment: Float[Array, "m m"]) -> Float[Array, " m"]:
    """Square roots of the shares of a layer's input variance, in decreasing order."""
    values = jnp.maximum(jnp.linalg.eigvalsh(moment)[::-1], 0)
    return jnp.sqrt(values / jnp.sum(values))


def _best(swept: Any) -> int:
    """Index of the rate with the highest mean accuracy on the held-out images."""
    return int(swept["held_out_accuracy"].values.mean(axis=1).argmax())


def _contestant(swept, rates, chosen, parameters, trained, passes) -> Contestant:
    best = _best(swept)
    means = swept["held_out_accuracy"].values.mean(axis=1)
    return Contestant(
        accuracy=np.asarray(swept["test_accuracy"].values[best], np.float64),
        held_out=dict(zip(map(float, rates), means.tolist(), strict=True)),
        rate=float(rates[best]),
        ranks={path: float(r) for path, r in chosen.items()},
        parameters=float(parameters),
        trained=int(trained),
        passes=float(passes),
    )
