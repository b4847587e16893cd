"""Quadratic losses of 3×3 updates, LoRA's runs on them, and where these rest.

The losses are `½⟨X − S, H(X − S)⟩`, with curvature β along all directions but those said here, in
random orthonormal frames u, v. That of pairs and corners is in [α, β] in every direction, so that
strong convexity and smoothness hold everywhere and not only near the minimum.

*Pairs*: S = u₂v₂ᵀ has rank 1, and the curvature couples u₁v₁ᵀ and u₂v₂ᵀ by H₁₂. Then `σ u₁v₁ᵀ` with
σ = (H₁₂ − w)/H₁₁ is stationary at rank 1, and of second order without being global where
`w < H₂₂ − H₁₂σ ≤ w + βσ`, for w = 0 where H₁₂ ≥ α (derived here). The *tight* ones have
H₁₂ = 1.015 α, next to that limit, where the bounds of their gradient and distance are attained up
to 1.5 %; the *wide* ones the largest H₁₂ there is, (β − α)/2.

*Corners*: a spurious point of rank 2 with r* = 1, next to the fewest σ₂/σ₁ there can be (derived
here). X = u₁v₁ᵀ + x u₂v₂ᵀ and X* = t u₃v₃ᵀ are both stationary where H(X − X*) has −w(1 − c)
along u₁v₁ᵀ and u₂v₂ᵀ and −e along u₃v₃ᵀ: the gradient at X* is −w(c, c, 1) there, so that X* is
global for |c| ≤ 1, and at X −w(1, 1, 1 + e/w), so that X is not, while its Hessian in the factors
has 2βx − 2e ≥ 0 along u₃v₂ᵀ + u₂v₃ᵀ. Strong convexity along X − X* takes et ≥ α(1 + x² + t²), which
with e ≤ βx and the best t is x ≥ (2α/β)√(1 + x²). The curvature α + k qqᵀ that does all of it has
its other eigenvalue up to β, which leaves x above 2α/β by about α/β.

*Ridges*: a spurious point of rank 1 = r* next to 2α = β, which pairs never come near: they need
β ≥ 3α (derived here). The theorem asks for strong convexity of matrices of rank r alone, no farther
from X* than D. So H may be nearly flat along u₁v₁ᵀ, on which X = x u₁v₁ᵀ lies: all that is asked
of it is ⟨X − X*, H(X − X*)⟩ ≥ α(x² + 1) for X* = u₂v₂ᵀ, and that is the gradient's βx along u₂v₂ᵀ,
the most that second order allows. At x = 1 it is β ≥ 2α and no more, next to which x stands here.
Below that limit x must be smaller than the gradient over β, and X is a saddle.
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lorajax import optima
from lorajax.claims import ntk
from lorajax.claims.base import Assumption, Run
from lorajax.factors import Factors
from lorajax.problems import Decayed, Linearized

SOURCE = "Kim, Kim, Ryu 2025 (arXiv:2502.09376); theory §5"
SIZE, MOST_RANK, DECAY, STEPS = 3, 2, 0.005, 2500
AT_REST = 1e-6
"""Norm of the gradient in the factors over w, below which a run rests."""


class Kind(NamedTuple):
    """One row of lanes: an instance, a rank and a kind of start.

    Attributes:
      beta: β, with α = 1.
      form: H₁₂ of a pair, or another form.
      rank: of LoRA.
      start: "zero" (LoRA's default, B = 0, with entries of A of 1e-3), "small" (the same with 0.1),
        "large" (both factors of order one) or "near" (next to the spurious point).
    """

    beta: float
    form: float | Literal["corner", "ridge"]
    rank: int
    start: str


ALPHA, SPECIAL, GENERIC, STEEP, STEEPEST = 1.0, 1.9, 6.0, 20.0, 60.0
BELOW, BEYOND = 1.95, 2.03
"""β of the ridges on both sides of 2α."""
TIGHT = 1.015 * ALPHA
KINDS = (
    *(Kind(SPECIAL, (SPECIAL - 1) / 2, r, s) for r in (1, 2) for s in ("zero", "large")),
    *(Kind(GENERIC, (GENERIC - 1) / 2, r, s) for r in (1, 2) for s in ("zero", "large")),
    Kind(GENERIC, (GENERIC - 1) / 2, 1, "small"),
    Kind(GENERIC, TIGHT, 1, "near"),
    Kind(STEEP, TIGHT, 1, "near"),
    # More of r = r*, so that rates of it can be compared, and a steeper one of r > r*.
    *(Kind(GENERIC, (GENERIC - 1) / 2, 1, s) for s in 9 * ("zero", "large")),
    Kind(STEEP, (STEEP - 1) / 2, 2, "large"),
    *(Kind(beta, "corner", 2, "near") for beta in (GENERIC, STEEP, STEEPEST)),
    *(Kind(BELOW, "ridge", 1, start) for start in ("zero", "large", "near")),
    Kind(BEYOND, "ridge", 1, "near"),
)


class Ends(NamedTuple):
    """Ends of all runs, leading axes (kind, repetition).

    Attributes:
      rest: where the runs rest.
      gradient: ∇f(X) there, without the decay.
      structure: of that gradient.
      curvature: smallest eigenvalue of the Hessian in the factors of the run's rank.
      distance: ‖X − X*‖_F² to the certified global minimizer.
      best: singular values of X*, in decreasing order.
    """

    rest: ntk.Rest
    gradient: Any
    structure: optima.Structure
    curvature: Any
    distance: Any
    best: Any


def curvature_of(beta: float, coupling: float) -> np.ndarray:
    """[[H₁₁, H₁₂], [H₁₂, H₂₂]] with eigenvalues 1 and β and H₁₁ ≥ H₂₂."""
    root = np.sqrt(max(((beta - 1) / 2) ** 2 - coupling**2, 0))
    mean = (1 + beta) / 2
    return np.array([[mean + root, coupling], [coupling, mean - root]])


class Spurious(NamedTuple):
    """An instance in its own frame, which is diagonal.

    Attributes:
      curvature: of the first directions u_i v_iᵀ.
      target: the entries of S there.
      values: singular values of the spurious point, of its rank.
    """

    curvature: np.ndarray
    target: np.ndarray
    values: np.ndarray


def _pair(beta: float, coupling: float) -> Spurious:
    h = curvature_of(beta, coupling)
    return Spurious(h, np.array([0.0, 1.0]), np.array([(coupling - DECAY) / h[0, 0]]))


SHY, OFF = 0.01, 0.5
"""Of a corner: 1 − e/(βx), which leaves the Hessian positive, and c; of a ridge the same."""


def _corner(beta: float) -> Spurious:
    """The corner of the least x, to a ten-thousandth of it."""
    for x in 2 * ALPHA / beta * np.arange(1.0, 4.0, 1e-4):
        push = (1 - SHY) * beta * x
        point = np.array([1.0, x, -np.hypot(1, x)])
        wanted = np.array([-DECAY * (1 - OFF), -DECAY * (1 - OFF), -push])
        rest = wanted - ALPHA * point  # (H − α)(X − X*) = k q (q·(X − X*)) with q along it
        k = 1 / (rest @ point)
        if 0 < k * (rest @ rest) <= beta - ALPHA:
            h = ALPHA * np.eye(3) + k * np.outer(rest, rest)
            at_x = np.array([1.0, x, 0.0])
            target = at_x + np.linalg.solve(h, DECAY * np.array([1, 1, 1 + push / DECAY]))
            return Spurious(h, target, at_x[:2])
    raise ValueError(f"beta is {beta}; it must be above 2√2, or there is no corner.")


FLAT = 0.01
"""Curvature along a ridge: enough for runs to come to rest, and no more than SHY leaves of β."""


def _ridge(beta: float) -> Spurious:
    push = (1 - SHY) * beta
    x = min(1.0, np.sqrt(push - DECAY - ALPHA))
    coupling = FLAT * x + DECAY * (1 - OFF)  # H(X − X*) is −w(1 − c) along X, −push along X*
    h = np.array([[FLAT, coupling], [coupling, coupling * x + push]])
    target = np.array([x, 0.0]) + np.linalg.solve(h, np.array([DECAY, DECAY + push]))
    return Spurious(h, target, np.array([x]))


def restricted_curvature(beta: float) -> tuple[float, float]:
    """Of a ridge: the least ⟨X − X*, H(X − X*)⟩/‖X − X*‖² of matrices X of rank 1 that are no
    farther from X* than its spurious point, on a grid, and the largest eigenvalue of H.

    With entries x₁, x₂ along u₁v₁ᵀ and u₂v₂ᵀ, rank 1 needs others of 2|x₁x₂| in sum of squares.
    These have the curvature β, so that more of them make the ratio larger.
    """
    own = _ridge(beta)
    radius = float(np.hypot(own.values[0], 1))
    # An even number, so that X* itself, where the ratio is 0/0, is no point of the grid.
    line = np.linspace(-radius, radius, 1000)
    along = np.append(line, own.values[0])
    y1, y2 = np.meshgrid(along, np.append(line, -1.0))
    others = 2 * np.abs(y1 * (y2 + 1))
    squares = y1**2 + y2**2 + others
    (flat, coupling), (_, steep) = own.curvature
    form = flat * y1**2 + 2 * coupling * y1 * y2 + steep * y2**2 + beta * others
    least = (form / squares)[squares <= radius**2 * (1 + 1e-12)].min()
    return float(least), float(max(beta, np.linalg.eigvalsh(own.curvature)[-1]))


def _built(kind: Kind) -> Spurious:
    if kind.form == "corner":
        return _corner(kind.beta)
    return _ridge(kind.beta) if kind.form == "ridge" else _pair(kind.beta, float(kind.form))


def _instance(kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Features (9, 1, 3, 3) and targets (9, 1) in random frames, and a start."""
    u, v = (np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0] for _ in range(2))
    own = _built(kind)
    h = kind.beta * np.eye(SIZE**2)
    diagonal = np.arange(len(own.target)) * (SIZE + 1)
    h[np.ix_(diagonal, diagonal)] = own.curvature
    values, vectors = np.linalg.eigh(h)
    rows = (np.sqrt(SIZE**2 * values)[:, None] * vectors.T).reshape(-1, SIZE, SIZE)
    features = u @ rows @ v.T
    k = len(own.target)
    target = u[:, :k] * own.target @ v[:, :k].T
    targets = np.sum(features * target, axis=(1, 2))
    return features[:, None], targets[:, None], *_start(kind, own, u, v, rng)


def _start(
    kind: Kind, own: Spurious, u: np.ndarray, v: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    a, b = rng.standard_normal((SIZE, MOST_RANK)), rng.standard_normal((MOST_RANK, SIZE))
    if kind.start in ("zero", "small"):
        return (1e-3 if kind.start == "zero" else 0.1) * a, 0 * b
    if kind.start == "large":
        return a, b
    rank = len(own.values)
    roots = np.sqrt(own.values)
    first = np.eye(MOST_RANK)[:rank]
    # A hundredth of the way to anything else: within the narrow basin of a tight instance.
    away = 1e-2 * roots[-1]
    return (
        (u[:, :rank] * roots) @ first + away * a,
        first.T @ (roots[:, None] * v[:, :rank].T) + away * b,
    )


@eqx.filter_jit
def _runs(features, targets, starts, ranks) -> Ends:
    def one(features, targets, start, rank) -> Ends:
        problem = Linearized.from_features(features, targets)
        start = ntk.masked_factors(start, rank)
        rest = ntk.come_to_rest(problem, DECAY, start, STEPS, step=0.4)
        gradient = problem.full_gradient(rest.factors)
        best = optima.minimize(problem, DECAY, tolerance=1e-12).update
        # Rank 1 lives in the first direction alone; the second would add eigenvalues w − ‖G‖ of a
        # rank that the run does not have.
        hessian = optima.lowest_curvature(Decayed(problem, jnp.asarray(DECAY)), rest.factors)
        first = Factors(rest.factors.a[:, :1], rest.factors.b[:1])
        alone = optima.lowest_curvature(Decayed(problem, jnp.asarray(DECAY)), first)
        return Ends(
            rest,
            gradient,
            optima.structure(gradient, rest.factors, DECAY),
            jnp.where(rank == 1, alone, hessian),
            jnp.sum((rest.factors.product - best) ** 2),
            jnp.linalg.svd(best, compute_uv=False),
        )

    over_repetitions = jax.vmap(one, (0, 0, 0, None))
    return jax.vmap(over_repetitions)(features, targets, starts, ranks)


def ends(run: Run) -> Ends:
    """All runs, simulated once; numpy arrays."""

    def simulate() -> Ends:
        rng = np.random.default_rng([run.seed, 2502])
        lanes = []
        for kind in KINDS:
            for _ in range(run.pick(12, 60)):
                lanes.append(_instance(kind, rng))
        arrays = [np.stack(x) for x in zip(*lanes, strict=True)]
        features, targets, a, b = (
            jnp.asarray(x.reshape(len(KINDS), -1, *x.shape[1:])) for x in arrays
        )
        ranks = jnp.asarray([kind.rank for kind in KINDS])
        return jax.tree.map(np.asarray, _runs(features, targets, Factors(a, b), ranks))

    return run.once("kim2025", simulate)


@jax.jit
def leakage(gradients, factors, decay):
    """max(‖LᵀT‖, ‖T R‖) of all runs, T for a decay of its own."""
    split = jax.vmap(jax.vmap(lambda g, f: optima.structure(g, f, decay).leakage))
    return split(gradients, factors)


def rows(*, beta: float | None = None, start: str | None = None, rank: int | None = None):
    """Which kinds have these properties."""
    return np.array(
        [
            (beta is None or k.beta == beta)
            and (start is None or k.start == start)
            and (rank is None or k.rank == rank)
            for k in KINDS
        ]
    )


def at_rest(ends: Ends) -> np.ndarray:
    """Which runs rest."""
    return np.asarray(ends.rest.residual) < AT_REST


def local(ends: Ends) -> np.ndarray:
    """Which runs rest at points of second order: no negative curvature beyond what rest leaves."""
    # A step along the gradient's residual changes the Hessian by at most β times the factors' size.
    return (ends.curvature > -1e-6) & at_rest(ends)


def spurious(ends: Ends) -> np.ndarray:
    """Which runs end above the global minimum."""
    return np.asarray(ends.rest.gap > ntk.CERTIFIED)


def rested(ends: Ends) -> Assumption:
    """Statements are of points of rest: runs that are still on their way say nothing."""
    share = float(at_rest(ends).mean())
    return Assumption("nine runs in ten rest", share >= 0.9, f"{share:.3f} of them")


def some(ends: Ends) -> Assumption:
    """That there is something to look at."""
    count = int((spurious(ends) & local(ends)).sum())
    return Assumption("some points of second order are not global", count > 0, f"{count} runs")


def last(ends: Ends) -> np.ndarray:
    """σ_r of every run, r the rank of its kind."""
    values = np.asarray(ends.structure.singular_values)
    return np.stack([s[:, kind.rank - 1] for s, kind in zip(values, KINDS, strict=True)])


def betas() -> np.ndarray:
    """β of every kind, (kinds, 1)."""
    return np.array([k.beta for k in KINDS])[:, None]
