"""RefLoRA and LoRA-RITE for problems; Riemannian LoRA is `scaled_gradient`.

As flows: `gradient_flow(..., metric="riemannian")` and `"reflora"`, and the closed form of RefLoRA,
`reflora_flow`. LoRA-RITE keeps moments, so that it is a descent alone.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, judged
from lorajax.exact import balanced_core, reduce
from lorajax.factors import Factors, is_factors
from lorajax.factors.descents import rebalanced
from lorajax.factors.transformations import Pairs, reflora_of, rite_of
from lorajax.flows.gradient import check_product, gradient_flow
from lorajax.flows.path import CONVERGED, Path, finite_status
from lorajax.problems import MatrixFactorization, check_flow


def _take(tree: Any) -> dict[str, Factors]:
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors)
    found = {jax.tree_util.keystr(path): node for path, node in nodes if isinstance(node, Factors)}
    if not found:
        raise ValueError("the start holds no pair of Factors; this descent acts on pairs alone.")
    return found


def _put(tree: Any, pairs: dict[str, Factors]) -> Any:
    def one(path: Any, node: Any) -> Any:
        return pairs.get(jax.tree_util.keystr(path), node)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_factors)


PAIRS = Pairs(_take, _put)
"""Pairs of factors as nodes of a tree."""


@judged(learning_rate=POSITIVE)
def reflora_descent(
    learning_rate: optax.ScalarOrSchedule, warmup: int = 0
) -> optax.GradientTransformation:
    """RefLoRA: plain descent as it would go from the balanced factorization of the same product.

    Args:
      learning_rate: step size.
      warmup: plain steps before; a pair whose product is 0 takes plain steps anyhow.

    Returns:
      A gradient transformation over Factors (or any tree of them) that needs `params`.

    Raises:
      ValueError: for a rate that is not positive, a negative warm-up, or (at init) a tree without
        Factors.

    Source: Zhang et al. 2025 (arXiv:2505.18877), by its published code; theory section 9. Its flow
    is `gradient_flow(..., metric="reflora")`, in closed form `reflora_flow`; for models:
    `adapters.reflora`.
    """
    return optax.chain(reflora_of(PAIRS, warmup), optax.scale_by_learning_rate(learning_rate))


@judged(learning_rate=POSITIVE)
def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    decays: tuple[float, float] = (0.9, 0.999),
    *,
    eps: float | int = 1e-6,
    clip: float | int = 1.0,
    skip: float | int = 1.0,
    escape: bool = False,
) -> optax.GradientTransformation:
    """LoRA-RITE: Adam whose path of A B does not depend on how A B is factored.

    Args:
      learning_rate: step size.
      decays: of first and second moments.
      eps: added to the root of the second moments, in the gradient's unit.
      clip: bound on the norm of all unmagnified gradients together; 0 for none.
      skip: root mean square beyond which an unmagnified gradient counts as 0; 0 for no bound.
      escape: whether what second moments lose by turning is added to them, as in the paper; the
        published code leaves it out unless asked.

    Returns:
      A gradient transformation over Factors (or any tree of them) that needs `params`.

    Raises:
      ValueError: for a number out of its range, or (at init) a tree without Factors.

    A's step has the size of the rate over B's least singular value, and B's likewise: from two
    factors far below the root of the rate their product swamps the step (measured: from factors of
    1e-3 the first step multiplied a loss by 33), so start at B = 0.

    Source: Yen et al. 2024 (arXiv:2410.20625), by its published code, whose defaults these are;
    theory section 9. For models: `adapters.lora_rite`.
    """
    inner = rite_of(PAIRS, decays, eps, clip, skip, escape)
    return optax.chain(inner, optax.scale_by_learning_rate(learning_rate))


@eqx.filter_jit
def _closed(problem: Any, core: Factors, times: Array) -> Factors:
    return balanced_core(problem, rebalanced(core), times, jnp.zeros((), core.a.dtype)).core


class _Flow(eqx.Module):
    """RefLoRA's flow in frames: calling it gives the factors, as derivatives of a Path need."""

    times: Array
    at: tuple[float, ...] = eqx.field(static=True)
    warmup: float = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)

    def __call__(self, problem: Any, start: Factors) -> Factors:
        if not self.warmup:
            return _closed(problem, start, self.times)
        return self.after_warmup(problem, start)[0]

    def after_warmup(self, problem: Any, start: Factors) -> tuple[Factors, Path]:
        """The factors, and the plain flow that comes first."""
        # The plain flow is run at all times, so that another warm-up compiles nothing anew.
        times = np.asarray(self.at, start.a.dtype)
        every = np.union1d(times, times.dtype.type(self.warmup))
        plain = gradient_flow(problem, start, every, rtol=self.rtol, interpolate=False)
        places, end = np.searchsorted(every, times), int(np.searchsorted(every, self.warmup))
        after = jnp.asarray(np.maximum(times - self.warmup, 0))
        later = _closed(problem, jax.tree.map(lambda x: x[end], plain.core), after)
        early = jnp.asarray(times < self.warmup)[:, None, None]
        found = jax.tree.map(lambda x, y: jnp.where(early, x[places], y), plain.core, later)
        return found, plain


@judged(rtol=POSITIVE)
def reflora_flow(
    problem: MatrixFactorization,
    factors: Factors,
    times: Float[Array, " t"] | np.ndarray,
    *,
    warmup: float | int = 0.0,
    rtol: float | None = None,
) -> Path:
    """RefLoRA's flow in closed form: `balanced_flow` of the rebalanced start.

    Args:
      problem: matrix factorization, any target.
      factors: any start; its product must not be 0 unless there is a warm-up.
      times: when to save, shape (t,), increasing, from 0 on; concrete.
      warmup: time of plain gradient flow before, in the unit of `times`; concrete.
      rtol: relative tolerance of the warm-up's solver.

    Returns:
      A Path whose products are exact after the warm-up, up to what it was solved to; the factors
      are balanced there, and RefLoRA's own up to an r×r matrix between them.

    Raises:
      ValueError: before any tracing, for a bad start, times, warm-up or rtol, or a product of 0
        without a warm-up: RefLoRA's matrix S is not defined there, and nothing moves. A start that
        is traced ends with NaN and the status "non-finite" there.

    Example:
      >>> import jax, jax.numpy as jnp, lorajax
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(64, 48), singular_values=(4.0, 2.0)
      ... )
      >>> start = lorajax.initializers.lora(jax.random.key(1), problem.shape, 2, scale=0.1)
      >>> path = lorajax.flows.reflora_flow(problem, start, jnp.linspace(0.0, 9.0, 5), warmup=0.1)
      >>> bool(path.losses[-1] < 1e-10)
      True

    Source: theory section 9 (derived): the flow of A B depends on A B alone,
    `Ṁ = −(MMᵀ)^½ G − G (MᵀM)^½`, which is that of a balanced pair.
    """
    check_flow(problem, factors, times)
    if not 0 <= warmup < float("inf"):
        raise ValueError(f"warmup is {warmup}; it must be at least 0 and finite.")
    lost = jnp.asarray(False)
    if not warmup:
        lost = check_product(factors, "give a warmup")
    dtype = factors.a.dtype
    times = np.asarray(times, dtype)
    core_problem, core, frames = reduce(problem, factors)
    run = _Flow(jnp.asarray(times), tuple(times.tolist()), float(warmup), rtol)
    if not warmup:
        found = jax.tree.map(lambda x: jnp.where(lost, jnp.nan, x), run(core_problem, core))
        status, steps = finite_status(found), jnp.asarray(len(times), jnp.int32)
    else:
        found, plain = run.after_warmup(core_problem, core)
        status = jnp.where(plain.status == CONVERGED, finite_status(found), plain.status)
        steps = plain.steps
    return Path(run.times, found, core_problem, frames, status, steps, start=core, rerun=run)
