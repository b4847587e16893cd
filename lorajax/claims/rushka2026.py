"""Claims of Rushka, Klabjan 2026 (arXiv:2602.10212): the rank–accuracy trade-off.

All ranks of a problem run as lanes of one program: a rank r start of width n has zeros in the
columns of A and the rows of B beyond r, which no gradient ever fills.

Changed after a result was seen: `low_rank_loss` judged losses at a fixed time and was refuted at 1
of 50 further seeds, where a blind start still learned its last mode. It follows them to rest now.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.instances import (
    RTOL,
    factorization,
    lora_start,
    order_in_step,
    tight_flow,
)
from lorajax.factors import Factors
from lorajax.flows import Path, descend, sequential_descent
from lorajax.initializers import lora, orthogonal
from lorajax.problems import MatrixFactorization, Problem, TraceSquared

SOURCE = "Rushka, Klabjan 2026 (arXiv:2602.10212); theory §6"
SIZE = 12
SAVES = 81


@claim(
    "rushka2026.sequential",
    source=SOURCE,
    standing="reconstructed",
    tolerance="order of the next term: step · s_1 at the coarsest step of the fit",
    control=Control("the exponent 1 becomes 1.05", {"exponent": 1.05}),
)
def sequential(run: Run, exponent: float = 1.0) -> Evidence:
    """Updating A and B in turn has the same gradient flow as updating both at once: at fixed time
    the two descents differ in proportion to the step.
    """
    problem, start = factorization(run), lora_start(run, 0.05, index=40)

    def gap(step: float, count: int) -> float:
        both = descend(problem, start, optax.sgd(step), count, learning_rate=step, every=count)
        turns = sequential_descent(problem, start, step, count, every=count)
        return float(jnp.linalg.norm(both.factors.product[-1] - turns.factors.product[-1]))

    return order_in_step(
        run,
        "sequential",
        gap,
        exponent,
        quantity="‖difference of AB‖",
        caption="The gap between sequential and simultaneous descent closes with the step.",
    )


@eqx.filter_jit
def _flows(problem: Problem, starts: Factors, times: Array, weight_decay: Array) -> Path:
    """A flow for each lane of starts."""

    def lane(start: Factors) -> Path:
        return tight_flow(problem, start, times, weight_decay=weight_decay, reduced=False)

    return jax.vmap(lane)(starts)


def _worst_error(path: Path) -> float:
    """`solver_error` of the lane that took most steps."""
    return 2.0 * RTOL * int(np.max(np.asarray(path.steps)))


def _every_rank(a: Array, columns: int) -> Factors:
    """Starts of rank 1 … n with the first columns of A, B = 0."""
    n = a.shape[1]
    mask = jnp.tril(jnp.ones((n, n), a.dtype))[:, None, :]
    return Factors(mask * a[None], jnp.zeros((n, n, columns), a.dtype))


class _Traces(NamedTuple):
    problem: TraceSquared
    starts: Factors
    path: Path
    tolerance: float


def _traces(run: Run, weight_decay: float = 0.0) -> _Traces:
    """The trace-squared loss at every rank, orthonormal lanes before Gaussian ones."""
    weight = jax.random.normal(run.key(41), (SIZE, SIZE)) / SIZE**0.5 + 0.3 * jnp.eye(SIZE)
    problem = TraceSquared.from_weight(weight)
    kinds = [
        _every_rank(make(run.key(42), (SIZE, SIZE), SIZE, 0.5).a, SIZE)
        for make in (orthogonal, lora)
    ]
    starts = jax.tree.map(lambda *x: jnp.concatenate(x), *kinds)
    # The trace decays at least at the rate 2 |tr W0|: nothing of it is left at the end.
    times = jnp.linspace(0.0, 25.0 / abs(float(problem.trace)), SAVES)
    path = run.once(
        ("trace_squared", weight_decay),
        lambda: _flows(problem, starts, times, jnp.asarray(weight_decay)),
    )
    return _Traces(problem, starts, path, _worst_error(path))


def _assumptions(found: _Traces) -> tuple[Assumption, ...]:
    trace = float(found.problem.trace)
    return (
        Assumption("tr W0 is not 0", abs(trace) > 0.1, f"tr W0 = {trace:.3g}"),
        Assumption("every lane was integrated to its end", not np.any(found.path.status)),
    )


RANKS = np.arange(1, SIZE + 1)


@claim(
    "rushka2026.trace_squared_loss",
    source=SOURCE,
    standing="stated",
    tolerance="½ (2 · steps · rtol · tr W0)²: the trace, a sum of products, is off by the solver "
    "error",
    control=Control("weight decay 0.05, which the closed form leaves out", {"weight_decay": 0.05}),
)
def trace_squared_loss(run: Run, weight_decay: float = 0.0) -> Evidence:
    """The trace-squared loss ½(tr W)² ends at zero at every rank 1 … n."""
    found = _traces(run, weight_decay)
    losses = np.asarray(jax.vmap(jax.vmap(found.problem.loss))(found.path.core))
    final = losses[:, -1].reshape(2, SIZE)
    times = np.asarray(found.path.times[0])

    def draw(ax):
        for rank in (1, 3, SIZE):
            ax.semilogy(times, np.maximum(losses[rank - 1], 1e-30), label=f"r = {rank}")
        ax.set(xlabel="time [1/(unit of the trace)]", ylabel="½ (tr W)²")
        ax.legend()

    return Evidence(
        measured={"final_orthonormal": final[0].tolist(), "final_gaussian": final[1].tolist()},
        predicted={"final_orthonormal": [0.0] * SIZE, "final_gaussian": [0.0] * SIZE},
        error=float(final.max()),
        tolerance=0.5 * (found.tolerance * float(found.problem.trace)) ** 2,
        assumptions=_assumptions(found),
        draw=draw,
        caption=f"n = {SIZE}, orthonormal starts; the loss reaches zero at every rank, the sooner "
        "the larger.",
    )


@claim(
    "rushka2026.trace_squared_error",
    source=SOURCE,
    standing="reconstructed",
    tolerance="solver error of the product, 2 · steps · rtol, times its size relative to the full "
    "update's, at most √n",
    control=Control("n becomes 1.05 n in the law", {"size": 1.05}),
)
def trace_squared_error(run: Run, size: float = 1.0) -> Evidence:
    """On the trace-squared loss LoRA ends at relative distance √(n/r − 1) from full fine-tuning for
    orthonormal A0 and √(n‖A0ᵀA0‖²/‖A0‖⁴ − 1) for any A0 (B0 = 0): of the order r^{−1/2}.
    """
    found = _traces(run)
    full = np.asarray(found.problem.full_update())
    ends = np.asarray(jax.tree.map(lambda x: x[:, -1], found.path.core).product)
    measured = np.linalg.norm(ends - full, axis=(1, 2)) / np.linalg.norm(full)
    law = functools.partial(laws.trace_squared_error, size=size)
    predicted = np.concatenate(
        [
            laws.orthonormal_error(SIZE, RANKS, size=size),
            np.asarray(jax.vmap(law)(found.starts.a[SIZE:])),
        ]
    )
    gaussian = np.sqrt((SIZE + 1) / RANKS)

    def draw(ax):
        for i, kind in enumerate(("orthonormal", "Gaussian")):
            lanes = slice(i * SIZE, (i + 1) * SIZE)
            ax.plot(RANKS, measured[lanes], "o", color=f"C{i}", label=f"{kind}, simulated")
            ax.plot(RANKS, predicted[lanes], "--", color=f"C{i}", label=f"{kind}, law")
        ax.plot(RANKS, gaussian, ":", color="black", label="√((n + 1)/r)")
        ax.set(xlabel="rank r", ylabel="‖AB − ΔW‖ / ‖ΔW‖")
        ax.legend()

    return Evidence(
        measured={
            "orthonormal": measured[:SIZE].tolist(),
            "gaussian": measured[SIZE:].tolist(),
        },
        predicted={
            "orthonormal": predicted[:SIZE].tolist(),
            "gaussian": predicted[SIZE:].tolist(),
        },
        error=float(np.abs(measured - predicted).max()),
        tolerance=found.tolerance * SIZE**0.5,
        assumptions=_assumptions(found),
        draw=draw,
        caption=f"Where LoRA ends on the trace-squared loss, n = {SIZE}: at zero loss, but away "
        "from the full update ΔW = −(tr W0/n) I. Dotted: the mean law for Gaussian starts.",
    )


@claim(
    "rushka2026.trace_squared_trajectory",
    source=SOURCE,
    standing="reconstructed",
    tolerance="solver error, 2 · steps · rtol, relative to the factors' size",
    control=Control("‖A0‖²/2 becomes 1.05 ‖A0‖²/2 in the equation", {"drag": 1.05}),
)
def trace_squared_trajectory(run: Run, drag: float = 1.0) -> Evidence:
    """On the trace-squared loss the factors stay A = cosh θ A0, B = −sinh θ A0ᵀ (B0 = 0), with
    θ̇ = tr W0 − (‖A0‖²/2) sinh 2θ, at every rank and time.
    """
    found = _traces(run)
    times = found.path.times[0]
    flow = functools.partial(laws.trace_squared_flow, drag=drag)
    law = jax.vmap(flow, (None, 0, None))(found.problem, found.starts, times)
    a, b = (np.asarray(x) for x in law)
    core = jax.tree.map(np.asarray, found.path.core)
    gap = np.sqrt(np.sum((core.a - a) ** 2, (2, 3)) + np.sum((core.b - b) ** 2, (2, 3)))
    size = np.sqrt(np.sum(core.a**2, (2, 3)) + np.sum(core.b**2, (2, 3)))
    error = (gap / size.max(axis=1, keepdims=True)).max(axis=1)
    sinh = np.linalg.norm(core.b, axis=(2, 3)) / np.linalg.norm(core.a[:, :1], axis=(2, 3))
    law_sinh = np.linalg.norm(b, axis=(2, 3)) / np.linalg.norm(a[:, :1], axis=(2, 3))

    def draw(ax):
        for i, rank in enumerate((1, 3, SIZE)):
            ax.plot(times, np.arcsinh(sinh[rank - 1]), color=f"C{i}", label=f"r = {rank}")
            ax.plot(times, np.arcsinh(law_sinh[rank - 1]), ":", color="black")
        ax.plot([], [], ":", color="black", label="closed form")
        ax.set(xlabel="time [1/(unit of the trace)]", ylabel="|θ|")
        ax.legend()

    return Evidence(
        measured={"sup_error": error.tolist()},
        predicted={"sup_error": [0.0] * (2 * SIZE)},
        error=float(error.max()),
        tolerance=found.tolerance,
        assumptions=_assumptions(found),
        draw=draw,
        caption="The angle θ over time for orthonormal starts; its equation is a Riccati equation "
        "in tanh θ and has a closed form.",
    )


LOW_RANK_SHAPE = (12, 10)
LOW_RANK_SPECTRUM = (4.0, 3.0, 2.0, 1.5, 1.0, 0.5)
AMPLITUDE = 0.5


class _LowRank(NamedTuple):
    problem: MatrixFactorization
    path: Path
    tolerance: float


def _low_rank(run: Run) -> _LowRank:
    """Low-rank approximation at every rank, lanes with A0 = a U_r before blind orthonormal ones."""
    problem = MatrixFactorization.from_spectrum(run.key(43), LOW_RANK_SHAPE, LOW_RANK_SPECTRUM)
    width = problem.rank
    blind = orthogonal(run.key(44), LOW_RANK_SHAPE, width, AMPLITUDE).a
    kinds = [_every_rank(a, LOW_RANK_SHAPE[1]) for a in (AMPLITUDE * problem.u, blind)]
    starts = jax.tree.map(lambda *x: jnp.concatenate(x), *kinds)
    times = jnp.linspace(0.0, 30.0, 4 * SAVES)
    path = run.once("low_rank", lambda: _flows(problem, starts, times, jnp.zeros(())))
    return _LowRank(problem, path, _worst_error(path))


def _to_rest(found: _LowRank) -> _LowRank:
    """Goes on from the lanes' last points until no loss falls any more, 1024 times as long at most.

    What a blind start has along the last mode may be next to nothing, and then it comes late.
    """
    problem, path, tolerance = found
    horizon = float(path.times[0, -1])
    for _ in range(5):
        horizon *= 4
        ends = jax.tree.map(lambda x: x[:, -1], path.core)
        times = jnp.linspace(0.0, horizon, 4 * SAVES)
        path = _flows(problem, ends, times, jnp.zeros(()))
        tolerance += _worst_error(path)
        losses = np.asarray(jax.vmap(jax.vmap(problem.loss))(path.core))
        if (losses[:, 0] - losses[:, -1]).max() <= tolerance * problem.oracle_loss(0):
            break
    return _LowRank(problem, path, tolerance)


@claim(
    "rushka2026.low_rank_loss",
    source=SOURCE,
    standing="stated",
    tolerance="solver error of the product, 2 · steps · rtol, relative to ½‖S‖²",
    control=Control("the sum begins one singular value later", {"shift": 1}),
)
def low_rank_loss(run: Run, shift: int = 0) -> Evidence:
    """Low-rank approximation ends at the best approximation of its rank, with the loss
    ½ Σ_{i>r} s_i²; from A0 along the top singular vectors and from a blind A0 alike (B0 = 0).
    """
    found = run.once("low_rank_rest", lambda: _to_rest(_low_rank(run)))
    problem, width = found.problem, found.problem.rank
    ranks = np.arange(1, width + 1)
    losses = np.asarray(jax.vmap(jax.vmap(problem.loss))(found.path.core))
    final = losses[:, -1].reshape(2, width)
    law = np.array([float(problem.oracle_loss(int(rank) + shift)) for rank in ranks])
    whole = float(problem.oracle_loss(0))

    def draw(ax):
        ax.plot(ranks, final[0], "o", label="start along U_r")
        ax.plot(ranks, final[1], "x", label="blind start")
        ax.plot(ranks, law, "--", color="black", label="½ Σ s_i² beyond r")
        ax.set(xlabel="rank r", ylabel="final loss")
        ax.legend()

    return Evidence(
        measured={"spectral": final[0].tolist(), "blind": final[1].tolist()},
        predicted={"spectral": law.tolist(), "blind": law.tolist()},
        error=float(np.abs(final - law).max() / whole),
        tolerance=found.tolerance,
        assumptions=(
            Assumption("distinct s_i", len(set(LOW_RANK_SPECTRUM)) == width),
            Assumption("every lane was integrated to its end", not np.any(found.path.status)),
        ),
        draw=draw,
        caption="Final loss over the rank: zero from the target's rank on.",
    )


@claim(
    "rushka2026.low_rank_modes",
    source=SOURCE,
    standing="reconstructed",
    tolerance="solver error, 2 · steps · rtol, in units of s_1",
    control=Control("a² becomes 1.05 a² in the law", {"square": 1.05}),
)
def low_rank_modes(run: Run, square: float = 1.0) -> Evidence:
    """From A0 = a U_r, B0 = 0 low-rank approximation learns each of the top r modes by the closed
    form of one mode, at every rank, and the others never.
    """
    found = _low_rank(run)
    problem, width = found.problem, found.problem.rank
    lanes = jax.tree.map(lambda x: x[:width], found.path.core)
    along = np.asarray(problem.u).T @ np.asarray(lanes.product) @ np.asarray(problem.v)
    times, s = found.path.times[0], problem.singular_values
    law = laws.lora_mode(times[:, None], s[None], AMPLITUDE, square=square)
    expected = np.asarray(law)[None, :, :, None] * np.eye(width)
    learned = np.arange(width)[None, :] <= np.arange(width)[:, None]
    expected = expected * learned[:, None, :, None]
    error = np.abs(along - expected).max(axis=(1, 2, 3)) / float(s[0])

    def draw(ax):
        for i in range(3):
            ax.plot(times, along[2, :, i, i], color=f"C{i}", label=f"s = {float(s[i]):g}")
            ax.plot(times, expected[2, :, i, i], ":", color="black")
        ax.plot(times, along[2, :, 3, 3], color="C3", label=f"s = {float(s[3]):g}")
        ax.plot([], [], ":", color="black", label="closed form")
        ax.set(xlabel="time [1/s]", ylabel="u_iᵀ A B v_i", xlim=(0, 5))
        ax.legend()

    return Evidence(
        measured={"sup_error": error.tolist()},
        predicted={"sup_error": [0.0] * width},
        error=float(error.max()),
        tolerance=found.tolerance,
        assumptions=(
            Assumption("every lane was integrated to its end", not np.any(found.path.status)),
        ),
        draw=draw,
        caption="Rank 3: three modes rise by the closed form, the fourth never does.",
    )
