"""LoRA's own descents as optax transformations, wherever in a tree the pairs of factors are.

`flows` finds pairs as nodes of a tree, `adapters` by their names in a model; what happens to a pair
is the same. None of them scales by a learning rate, and leaves outside the pairs pass unchanged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lorajax.factors import Factors, check_positive
from lorajax.factors.descents import (
    RiteState,
    Unmagnified,
    reflora,
    riemannian,
    rite,
    rite_state,
    unmagnified,
    vanishes,
    widened,
)


class Pairs(NamedTuple):
    """How the pairs of a tree are found.

    Attributes:
      take: from a tree to its pairs by name; raises ValueError where there is none.
      put: from a tree and pairs by name to the tree with these in their places.
    """

    take: Callable[[Any], dict[str, Factors]]
    put: Callable[[Any, dict[str, Factors]], Any]


def _wide(pairs: dict[str, Factors]) -> dict[str, Factors]:
    """Pairs in at least float32, in which decompositions exist."""
    return jax.tree.map(widened, pairs)


def _like(pairs: dict[str, Factors], given: dict[str, Factors]) -> dict[str, Factors]:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), pairs, given)


def _given(what: str, params: Any) -> None:
    if params is None:
        raise ValueError(f"{what} needs the parameters: call update(grads, state, params).")


def _check_not_negative(**scalars: float | int) -> None:
    for name, value in scalars.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be at least 0 and finite.")


def riemannian_of(pairs: Pairs, damping: float | int) -> optax.GradientTransformation:
    """`descents.riemannian` on every pair."""
    _check_not_negative(damping=damping)

    def init(params: Any) -> optax.EmptyState:
        pairs.take(params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _given("riemannian", params)
        gradients, values = pairs.take(updates), _wide(pairs.take(params))
        found = {
            name: riemannian(each, values[name], damping=damping)
            for name, each in _wide(gradients).items()
        }
        return pairs.put(updates, _like(found, gradients)), state

    return optax.GradientTransformation(init, update)


class WarmUp(NamedTuple):
    """Steps taken, int32."""

    count: Int[Array, ""]


def reflora_of(pairs: Pairs, warmup: int) -> optax.GradientTransformation:
    """`descents.reflora` on every pair, after `warmup` plain steps and wherever A B is not 0."""
    _check_not_negative(warmup=warmup)

    def init(params: Any) -> WarmUp:
        pairs.take(params)
        return WarmUp(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _given("reflora", params)
        gradients, values = pairs.take(updates), _wide(pairs.take(params))

        def one(gradient: Factors, value: Factors) -> Factors:
            plain = (state.count < warmup) | vanishes(value)
            turned = reflora(gradient, value)
            return jax.tree.map(
                lambda g, x: jnp.where(plain[..., None, None], g, x), gradient, turned
            )

        found = {name: one(each, values[name]) for name, each in _wide(gradients).items()}
        # Enough to know that the warm-up is over; a count that grew forever would overflow.
        count = jnp.minimum(state.count, warmup) + 1
        return pairs.put(updates, _like(found, gradients)), WarmUp(count)

    return optax.GradientTransformation(init, update)


def rite_of(
    pairs: Pairs,
    decays: tuple[float | int, float | int],
    eps: float | int,
    clip: float | int,
    skip: float | int,
    escape: bool,
) -> optax.GradientTransformation:
    """`descents.rite` on every pair, with the bounds that its published code puts on gradients."""
    check_positive(eps=eps)
    _check_not_negative(clip=clip, skip=skip)
    for name, value in zip(("first decay", "second decay"), decays, strict=True):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must lie in [0, 1).")

    def init(params: Any) -> dict[str, RiteState]:
        return {name: rite_state(each) for name, each in _wide(pairs.take(params)).items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _given("lora_rite", params)
        gradients, values = pairs.take(updates), _wide(pairs.take(params))
        found = {name: unmagnified(each, values[name]) for name, each in _wide(gradients).items()}
        found = _bounded(found, clip, skip)
        steps = {
            name: rite(each, state[name], decays=decays, eps=eps, escape=escape)
            for name, each in found.items()
        }
        directions = {name: step[0] for name, step in steps.items()}
        kept = {name: step[1] for name, step in steps.items()}
        return pairs.put(updates, _like(directions, gradients)), kept

    return optax.GradientTransformation(init, update)


def _bounded(
    found: dict[str, Unmagnified], clip: float | int, skip: float | int
) -> dict[str, Unmagnified]:
    """Leaves out gradients of too large a root mean square, and bounds the norm of the rest."""
    gradients = {name: each.gradients for name, each in found.items()}
    if skip:
        gradients = jax.tree.map(
            lambda x: jnp.where(jnp.mean(x**2, axis=(-2, -1), keepdims=True) > skip**2, 0, x),
            gradients,
        )
    if clip:
        squares = [jnp.sum(x**2) for x in jax.tree.leaves(gradients)]
        total = jnp.sum(jnp.stack(squares))
        norm = jnp.sqrt(jnp.where(total > 0, total, 1))  # whose slope is infinite at 0
        factor = jnp.where((total > 0) & (norm > clip), clip / norm, 1)
        gradients = jax.tree.map(lambda x: x * factor, gradients)
    return {name: each._replace(gradients=gradients[name]) for name, each in found.items()}
