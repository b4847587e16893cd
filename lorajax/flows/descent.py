"""Discrete descent by any optax transformation, and LoRA's own descents in that form."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, at_least, judged
from lorajax.exact import reduce
from lorajax.factors import Factors, check_positive, column_rates, is_adapter, is_traced
from lorajax.factors.descents import polar, riemannian
from lorajax.flows.path import Path, drift_of, finite_status
from lorajax.problems import MatrixFactorization, Problem, check_start


def _over_adapters(fn, updates: Any, *rest: Any) -> Any:
    """Maps `fn` over every pair of factors (and every lone matrix) of a tree."""
    return jax.tree.map(fn, updates, *rest, is_leaf=is_adapter)


@judged(learning_rate=POSITIVE, ratio=POSITIVE)
def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    ratio: float,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """LoRA+: the step of B is `ratio` times that of A.

    Args:
      learning_rate: step size of A.
      ratio: ρ > 0, the step of B over that of A.
      inner: what precedes the step, e.g. `optax.scale_by_adam()`; plain descent if None.

    Returns:
      A gradient transformation over Factors (or any tree of them).

    Raises:
      ValueError: if the ratio is not positive.

    Source: Hayou et al. 2024 (arXiv:2402.12354), recalled; under gradient flow `ρ AᵀA − BBᵀ` is
    conserved (theory section 1, derived).
    """
    check_positive(ratio=ratio)

    def scale(updates, params=None):
        del params
        return _over_adapters(
            lambda u: Factors(u.a, ratio * u.b) if isinstance(u, Factors) else u, updates
        )

    return optax.chain(
        optax.identity() if inner is None else inner,
        optax.stateless(scale),
        optax.scale_by_learning_rate(learning_rate),
    )


@judged(learning_rate=POSITIVE, eta=POSITIVE)
def allora(
    learning_rate: optax.ScalarOrSchedule, eta: float | int = 1.0
) -> optax.GradientTransformation:
    """ALLoRA: each column of B learns at a rate that falls with the size of its update.

    Args:
      learning_rate: step size.
      eta: η > 0; a column whose update is zero learns η times as fast as plain descent.

    Returns:
      A gradient transformation that needs `params` and divides column j of B's gradient by
      `√(‖(A B)_j‖ + 1/η²)`. A row of PEFT's update is a column here.

    Raises:
      ValueError: if η is not positive.

    Source: Huang, Balestriero 2024 (arXiv:2410.09692), recalled, in the form of theory section 7.
    For models, behind the same formula: `adapters.allora`.
    """
    check_positive(eta=eta)

    def one(update: Any, value: Any) -> Any:
        if not isinstance(update, Factors):
            return update
        return Factors(update.a, update.b * column_rates(value, eta)[None, :])

    return optax.chain(
        optax.stateless(lambda u, p: _over_adapters(one, u, p)),
        optax.scale_by_learning_rate(learning_rate),
    )


@judged(learning_rate=POSITIVE, damping=NOT_NEGATIVE)
def scaled_gradient(
    learning_rate: optax.ScalarOrSchedule, damping: float | int = 0.0
) -> optax.GradientTransformation:
    """ScaledGD, Riemannian descent: each gradient is preconditioned by the other factor's Gram.

    `∂A (BBᵀ + εI)⁺` and `(AᵀA + εI)⁺ ∂B` for a pair of factors, `∂X (XᵀX + εI)⁺` for a lone
    symmetric factor. The pseudo-inverse (not the inverse) makes the step defined where a factor is
    0 or rank-deficient.

    Args:
      learning_rate: step size; 1 is Gauss–Newton-like for a pair, ½ for a symmetric factor.
      damping: ε ≥ 0, in the square of the factors' unit.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: for a negative damping.

    Source: Tong, Ma, Chi 2021 (arXiv:2005.08898), recalled; convergence in theory section 2.5.
    Riemannian LoRA: Zhang, Pilanci 2024 (arXiv:2402.02347). Its flow is
    `gradient_flow(..., metric="riemannian")`; for models: `adapters.riemannian`.
    """
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must be at least 0 and finite.")

    def precondition(update: Any, value: Any) -> Any:
        if isinstance(update, Factors):
            return riemannian(update, value, damping=damping)
        gram = value.T @ value + damping * jnp.eye(value.shape[1], dtype=value.dtype)
        return update @ jnp.linalg.pinv(gram, hermitian=True)

    return optax.chain(
        optax.stateless(lambda u, p: _over_adapters(precondition, u, p)),
        optax.scale_by_learning_rate(learning_rate),
    )


@judged(learning_rate=POSITIVE)
def spectral_descent(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Spectral descent (Muon without momentum): every gradient U Σ Vᵀ is replaced by U Vᵀ.

    Args:
      learning_rate: step size, the spectral norm of each step.

    Returns:
      A gradient transformation over matrices. Singular values of the gradient below the rounding of
      its largest one are left out: their directions are noise.

    Source: Jordan et al. 2024 (Muon), recalled; its flow is in theory section 2.5 (derived).
    """
    return optax.chain(
        optax.stateless(lambda u, p: jax.tree.map(polar, u)),
        optax.scale_by_learning_rate(learning_rate),
    )


class _Accelerated(NamedTuple):
    """Where the last plain step ended, and Nesterov's t."""

    last: Any
    momentum: Array


@judged
def accelerated(learning_rate: Any) -> optax.GradientTransformation:
    """Nesterov's accelerated descent, whose momentum restarts whenever it points uphill.

    Its momentum grows by itself, so that flat and steep losses need no setting of their own: near a
    minimum of curvatures between c and β the error falls as e^{−t √(c/β)}, roughly.

    Args:
      learning_rate: step size, a number or a traced scalar; about 1/β.

    Returns:
      A gradient transformation that needs `params`, the points at which it asks for gradients.

    Source: Nesterov 1983; O'Donoghue, Candès 2015 (arXiv:1204.3982) for the restart; recalled.
    """

    def init(params: Any) -> _Accelerated:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return _Accelerated(params, jnp.ones((), dtype))

    def update(updates: Any, state: Any, params: Any = None):
        reached = jax.tree.map(lambda y, g: y - learning_rate * g, params, updates)
        moved = jax.tree.map(jnp.subtract, reached, state.last)
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), updates, moved)
        uphill = jnp.sum(jnp.stack(jax.tree.leaves(products))) > 0
        momentum = (1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2
        ahead = jnp.where(uphill, 0, (state.momentum - 1) / momentum)
        change = jax.tree.map(lambda x, d, y: x + ahead * d - y, reached, moved, params)
        return change, _Accelerated(reached, jnp.where(uphill, 1, momentum))

    return optax.GradientTransformation(init, update)


def _check_counts(steps: int, every: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1.")
    if every < 1 or steps % every:
        raise ValueError(f"every is {every}; it must divide steps = {steps}.")


def _simultaneous(problem, factors, state, update):
    updates, state = update(problem.gradient(factors), state, factors)
    return optax.apply_updates(factors, updates), state


def _searching(problem, factors, state, update):
    gradient = problem.gradient(factors)
    given = {"value": problem.loss(factors), "grad": gradient, "value_fn": problem.loss}
    # optax's L-BFGS adds int32 and int64, which is an error where the caller asked for strictness.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = update(gradient, state, factors, **given)
    return optax.apply_updates(factors, updates), state


def _sequential(problem, factors, rate, _):
    a = factors.a - rate * problem.gradient(factors).a
    b = factors.b - rate * problem.gradient(Factors(a, factors.b)).b
    return Factors(a, b), rate


@eqx.filter_jit
def _run(problem, start, step, state, update, count: int, every: int):
    # `step` and `update` are static by identity: one optimizer, one compilation.
    def outer(carry, _):
        carry = jax.lax.fori_loop(0, every, lambda _, c: step(problem, *c, update), carry)
        return carry, carry[0]

    _, path = jax.lax.scan(outer, (start, state), None, length=count)
    return jax.tree.map(lambda x0, x: jnp.concatenate([x0[None], x]), start, path)


@judged(steps=at_least(1), learning_rate=POSITIVE, every=at_least(1))
def descend(
    problem: Problem,
    factors: Any,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    learning_rate: float | Float[Array, ""] = 1.0,
    every: int = 1,
    reduced: bool = False,
) -> Path:
    """Runs an optax transformation on all factors at once.

    Args:
      problem: anything with `loss` and `gradient`.
      factors: the start.
      optimizer: any optax transformation, with its own step size or a line search of its own
        (`optax.lbfgs()`).
      steps: how many steps to take, at least 1.
      learning_rate: only the unit of `Path.times`, which are steps times this.
      every: the path keeps the start and every so manieth step; it must divide `steps`.
      reduced: whether to run in the frames of `exact.reduce`: right for descents that commute with
        rotations (GD, momentum, LoRA+, ScaledGD, spectral), wrong for Adam and other entrywise
        ones.

    Returns:
      A Path with `1 + steps/every` times. A descent that blows up has status "non-finite".

    Raises:
      ValueError: before any tracing, for a bad start, `steps`, `every` or `learning_rate`.

    Example:
      >>> import jax, optax, lorajax
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(32, 32), singular_values=(2.0, 1.0)
      ... )
      >>> start = lorajax.initializers.nystrom(jax.random.key(1), problem.target, 2)
      >>> path = lorajax.descend(problem, start, lorajax.flows.scaled_gradient(1.0), 1)
      >>> bool(path.losses[-1] < 1e-8 * path.losses[0])
      True
    """
    _check_counts(steps, every)
    check_positive(learning_rate=learning_rate)
    dtype = jnp.result_type(*jax.tree.leaves(factors))
    times = _times(learning_rate, steps, every, dtype)
    check_start(problem, factors, times)
    frames = None
    if reduced:
        if not isinstance(problem, MatrixFactorization):
            raise ValueError(
                f"reduced is True, but a {type(problem).__name__} has no reduction; leave it False."
            )
        problem, factors, frames = reduce(problem, factors)

    state = optimizer.init(factors)
    # A line search is known by the loss that it keeps from one step to the next.
    step = _searching if optax.tree_utils.tree_get_all_with_path(state, "value") else _simultaneous
    core = _run(problem, factors, step, state, optimizer.update, steps // every, every)
    drift = drift_of(core, factors, times)
    status, count = finite_status(core), jnp.asarray(steps, jnp.int32)
    if frames is None:
        return Path(times, core, problem, None, status, count, drift)
    again = _Again(optimizer, steps // every, every)
    return Path(times, core, problem, frames, status, count, drift, factors, again)


class _Again(eqx.Module):
    """Runs a descent once more, from any start."""

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    count: int = eqx.field(static=True)
    every: int = eqx.field(static=True)

    def __call__(self, problem: Problem, start: Any) -> Any:
        state = self.optimizer.init(start)
        update = self.optimizer.update
        return _run(problem, start, _simultaneous, state, update, self.count, self.every)


def _times(learning_rate: Any, steps: int, every: int, dtype: Any) -> Float[Array, " t"]:
    xp: Any = jnp if is_traced(learning_rate) else np
    rate = xp.asarray(learning_rate, dtype)
    return jnp.asarray(rate * xp.arange(0, steps + 1, every).astype(dtype))


@judged(learning_rate=POSITIVE, steps=at_least(1), every=at_least(1))
def sequential_descent(
    problem: Problem,
    factors: Factors,
    learning_rate: float | Float[Array, ""],
    steps: int,
    *,
    every: int = 1,
) -> Path:
    """Gradient descent that updates A first and B with the new A (alternating, Gauss–Seidel order).

    Args:
      problem: a problem of one pair of factors.
      factors: the start.
      learning_rate: step size.
      steps: how many sweeps over both factors.
      every: the path keeps the start and every so manieth sweep; it must divide `steps`.

    Returns:
      A Path; its gradient flow limit is that of simultaneous descent, which it leaves by O(step)
      at fixed time.

    Raises:
      ValueError: before any tracing, for a bad start, `steps`, `every` or `learning_rate`.

    Source: Rushka, Klabjan 2026 (arXiv:2602.10212), stated for the flows; theory section 6.
    """
    _check_counts(steps, every)
    check_positive(learning_rate=learning_rate)
    rate = jnp.asarray(learning_rate, factors.a.dtype)
    times = _times(rate, steps, every, factors.a.dtype)
    check_start(problem, factors, times)

    core = _run(problem, factors, _sequential, rate, None, steps // every, every)
    status, drift = finite_status(core), drift_of(core, factors, times)
    return Path(times, core, problem, None, status, jnp.asarray(steps, jnp.int32), drift)
