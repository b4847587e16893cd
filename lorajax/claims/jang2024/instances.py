"""The runs of LoRA and the certified optima that several claims look at.

Changed after a result was seen: at seed 17203 one run of rank one swung for ever about a minimum
that is too sharp for the step all began with, and left five claims inconclusive; a run that does
not come down from one round to the next now goes on with half the step (`settle`).
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lorajax import optima
from lorajax.claims import ntk
from lorajax.claims.base import Assumption, Run
from lorajax.factors import Factors
from lorajax.problems import Linearized

SOURCE = "Jang, Lee, Ryu 2024 (arXiv:2402.11867); theory §5"
CELLS = (
    *((20, rank) for rank in range(1, ntk.MOST_RANK + 1)),
    (10, 3),
    (10, 5),
    (6, 2),
    (6, 4),
    (3, 3),
)
"""(N, r) of the runs; enough ranks at N = 20 to see where stuck runs begin."""
STEPS = 1600
AT_REST = 1e-11
"""Norm ρ of the gradient in the factors over w, below which a run rests.

The certified gap is of first order in it: for a gradient R in the factors of a point with ‖∇L̂‖₂ ≤ w
it is ½⟨Z, R⟩ ≤ ½ ρ w ‖Z‖, and a norm above w by δ adds δ/w of the dual value. A gap of CERTIFIED is
thus resolved only by a ρ well below it.
"""
LANES, ROUNDS = 24, 40
"""Runs that go on together where they do not rest yet, and how often at most."""
NOISE = 0.02
"""Entries of the perturbation P over w."""


def draws(run: Run, shape: tuple[int, ...], stream: int) -> np.ndarray:
    """Standard normal numbers of a stream of their own, without compiling anything."""
    return np.random.default_rng([run.seed, stream]).standard_normal(shape)


def instances(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Features (I, N, 1, m, n) and targets (I, N, 1) of a few independent problems."""
    count = run.pick(6, 16)
    features = draws(run, (count, ntk.SAMPLES, 1, ntk.SIZE, ntk.SIZE), 1)
    return features, draws(run, (count, ntk.SAMPLES, 1), 2)


class Lane(NamedTuple):
    """What a run starts from; every field may lead with lanes."""

    features: Any
    targets: Any
    perturbation: Any
    start: Factors
    samples: Any


def _rest(lane: Lane, step: Any = ntk.STEP) -> ntk.Rest:
    """The descent of one lane; the perturbation is in units of w."""
    problem = ntk.masked_problem(lane.features, lane.targets, lane.samples)
    w = ntk.decay_of(problem)
    return ntk.come_to_rest(problem, w, lane.start, STEPS, w * lane.perturbation, step=step)


@eqx.filter_jit
def _runs(features, targets, starts, samples, ranks, perturbations) -> ntk.Rest:
    """Ends of all runs: lanes (cell, instance, start)."""

    def one(features, targets, perturbation, start, samples, rank) -> ntk.Rest:
        start = ntk.masked_factors(start, rank)
        return _rest(Lane(features, targets, perturbation, start, samples))

    over_starts = jax.vmap(one, (None, None, None, 0, None, None))
    over_instances = jax.vmap(over_starts, (0, 0, 0, None, None, None))
    return jax.vmap(over_instances, (None, None, None, None, 0, 0))(
        features, targets, perturbations, starts, samples, ranks
    )


_several = eqx.filter_jit(jax.vmap(_rest))


def _take(lanes: Lane, which: np.ndarray) -> Lane:
    return jax.tree.map(lambda x: jnp.asarray(x[which]), lanes)


def settle(lanes: Lane, rest: ntk.Rest) -> ntk.Rest:
    """Goes on with the runs that do not rest yet, LANES at once, until all do or ROUNDS are over.

    A minimum may be too sharp for a step that serves the others: a run whose gradient is no smaller
    after a round than before it goes on with half its step. Where runs rest is the objective's
    alone, whatever the step.

    Args:
      lanes: of all runs, numpy arrays with one leading axis; their starts are not looked at.
      rest: where the runs are, likewise.

    Returns:
      Where they are then. A run that still does not rest shows it in its residual.
    """
    rest = jax.tree.map(np.array, rest)
    steps = np.full(rest.residual.shape, ntk.STEP)
    for _ in range(ROUNDS):
        before = rest.residual.copy()
        going = np.flatnonzero(~(rest.residual < AT_REST))
        for first in range(0, going.size, LANES):
            which = np.resize(going[first : first + LANES], LANES)
            found = _several(_take(lanes._replace(start=rest.factors), which), steps[which])
            for whole, part in zip(jax.tree.leaves(rest), jax.tree.leaves(found), strict=True):
                whole[which] = part
        steps[going] *= np.where(rest.residual[going] < before[going], 1.0, 0.5)
    return rest


def ends_of(run: Run, noise: float = 0.0) -> ntk.Rest:
    """The map of runs with a perturbation of `noise` times w, simulated once; numpy arrays with
    leading axes (cell, instance, start)."""

    def simulate() -> ntk.Rest:
        features, targets = instances(run)
        starts = run.pick(6, 16)
        a = ntk.SCALE * draws(run, (starts, ntk.SIZE, ntk.MOST_RANK), 3)
        b = ntk.SCALE * draws(run, (starts, ntk.MOST_RANK, ntk.SIZE), 4)
        p = draws(run, (len(features), 2 * ntk.SIZE, 2 * ntk.SIZE), 5)
        p = noise * (p + p.transpose(0, 2, 1)) / 2
        samples, ranks = (np.asarray(x) for x in zip(*CELLS, strict=True))
        begin = Factors(jnp.asarray(a), jnp.asarray(b))
        x, y, z, n, r = (jnp.asarray(each) for each in (features, targets, p, samples, ranks))
        shape = (len(CELLS), len(features), starts)
        rest = _runs(x, y, begin, n, r, z)
        rest = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[3:]), rest)
        cell, instance, _ = np.unravel_index(np.arange(math.prod(shape)), shape)
        lanes = Lane(
            features[instance], targets[instance], p[instance], rest.factors, samples[cell]
        )
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), settle(lanes, rest))

    return run.once(("jang2024", noise), simulate)


@eqx.filter_jit
def _optima(features, targets, samples, factor) -> tuple[optima.Optimum, Any]:
    """Certified global optima of lanes, and their L̂(0)."""

    def one(features, targets, samples):
        problem = ntk.masked_problem(features, targets, samples)
        found = optima.minimize(
            problem, factor * ntk.decay_of(problem), tolerance=ntk.CERTIFIED / 10
        )
        return found, problem.loss(problem.zero())

    return jax.vmap(one)(features, targets, samples)


COUNTS = (1, 3, 6, 10, 20)
DEGENERATE = (1, 3)


def solved(run: Run, factor: float = 1.0):
    """Optima of all instances at all COUNTS, and of degenerate ones: their features are g ⊗ I₄."""
    features, targets = instances(run)
    half = draws(run, (*features.shape[:3], ntk.SIZE // 4, ntk.SIZE // 4), 6)
    pairs = np.kron(half, np.eye(4))
    blocks = [(features, targets, n) for n in COUNTS] + [(pairs, targets, n) for n in DEGENERATE]

    def simulate():
        stack = [jnp.asarray(np.concatenate([b[i] for b in blocks])) for i in (0, 1)]
        samples = jnp.asarray(np.repeat([n for *_, n in blocks], len(features)))
        found, scale = _optima(stack[0], stack[1], samples, jnp.asarray(factor))
        rows = [len(features) * i for i in range(len(blocks) + 1)]
        parts = [slice(x, y) for x, y in zip(rows, rows[1:], strict=False)]
        return blocks, parts, found, np.asarray(scale)

    return run.once(("jang2024 optima", factor), simulate)


def at_rest(ends: ntk.Rest) -> np.ndarray:
    """Which runs rest."""
    return np.asarray(ends.residual) < AT_REST


def decided(ends: ntk.Rest) -> Assumption:
    """That every run is certified to be global, which it can be anywhere, or else rests."""
    open_ = ~at_rest(ends) & ~(np.asarray(ends.gap) <= ntk.CERTIFIED)
    worst = float(np.asarray(ends.residual).max())
    return Assumption(
        "all runs are certified or rest",
        not open_.any(),
        f"{int(open_.sum())} are neither; largest residual {worst:.1e} of w",
    )


NORMS = (0.95, 0.98, 0.995, 1.005, 1.02, 1.05)
"""‖∇L̂‖₂/w at the points of `next_to_the_limit`."""


def _next_to_the_limit(rng: np.random.Generator, norm: float) -> tuple[np.ndarray, ...]:
    """Features, targets and a rank-one start next to a local minimum with ‖∇L̂‖₂ = norm · w.

    In the frame of orthonormal u, v the loss is ½⟨X − S, H(X − S)⟩ with S = u₂v₂ᵀ and
    H = [[2, 1], [1, h]] on u₁v₁ᵀ, u₂v₂ᵀ, 2 on u₁v₂ᵀ and u₂v₁ᵀ, 0 elsewhere; w = SHARE as h < 1.
    Rank one rests at σ u₁v₁ᵀ with 2σ = 1 − w, where ∇L̂ = −w u₁v₁ᵀ − (h − σ) u₂v₂ᵀ, which takes
    h = σ + norm · w. It is a local minimum of rank one as h − σ < w + 2σ.
    """
    w, size = ntk.SHARE, ntk.SIZE
    sigma = (1 - w) / 2
    h = np.array([[2.0, 1.0], [1.0, sigma + norm * w]])
    u, v = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    values, vectors = np.linalg.eigh(h)
    corner = np.zeros((4, 2, 2))
    corner[:2, [0, 1], [0, 1]] = np.sqrt(values)[:, None] * vectors.T
    corner[2, 0, 1] = corner[3, 1, 0] = 2**0.5
    # The loss is a mean over the four data.
    features = np.zeros((ntk.SAMPLES, 1, size, size))
    features[:4, 0] = 2 * u[:, :2] @ corner @ v[:, :2].T
    targets = np.sum(features * np.outer(u[:, 1], v[:, 1]), axis=(2, 3))
    first = np.eye(ntk.MOST_RANK)[0]
    a, b = rng.standard_normal(size), rng.standard_normal(size)
    root = sigma**0.5
    return (
        features,
        targets,
        root * np.outer(u[:, 0] + 1e-2 * a, first),
        root * np.outer(first, v[:, 0] + 1e-2 * b),
    )


def next_to_the_limit(run: Run) -> tuple[ntk.Rest, Float[np.ndarray, " lanes"]]:
    """Ends of LANES rank-one runs that rest just below and just above ‖∇L̂‖₂ = w, and the least
    objectives of their problems over L̂(0)."""

    def simulate():
        rng = np.random.default_rng([run.seed, 8])
        found = [_next_to_the_limit(rng, NORMS[i % len(NORMS)]) for i in range(LANES)]
        features, targets, a, b = (np.stack(x) for x in zip(*found, strict=True))
        none, count = np.zeros((LANES, 2 * ntk.SIZE, 2 * ntk.SIZE)), np.full(LANES, 4)
        lanes = Lane(features, targets, none, Factors(jnp.asarray(a), jnp.asarray(b)), count)
        rest = settle(lanes, _several(_take(lanes, np.arange(LANES)), np.full(LANES, ntk.STEP)))
        x, y, n = (jnp.asarray(each) for each in (features, targets, count))
        best, scale = _optima(x, y, n, jnp.asarray(1.0))
        return rest, np.asarray(best.certificate.objective / scale)

    return run.once("jang2024 limit", simulate)


BUILT_RANK, BUILT_STEPS = 38, 400
"""With r = 38 the threshold r(r+1)/2 is 0.951 of r(r+3)/2 data; the share is (r + 1)/(r + 3)."""


def _least_data(rng: np.random.Generator, rank: int) -> tuple[np.ndarray, ...]:
    """Features, targets, a start next to a spurious local minimum on the fewest data there can be.

    A local minimum that is not global has full rank; wI + H(∇L̂) vanishes on Z = [A; Bᵀ] and is
    w − ‖∇L̂‖₂ < 0 on every z qᵀ, z = (a, −b)/√2 of a top pair of ∇L̂. The data must tell Z S + z qᵀ
    from 0 for all symmetric S and all q: r(r+1)/2 + r ≤ KN of them. For otherwise either q ≠ 0, and
    the Hessian is negative there, or Z(I + tS)^½ keeps the objective and all that second order says
    down to a lower rank, where that means global. (Derived here.)

    In orthonormal frames u, v of r + 1 directions, the last called d, that many do:
    u_j v_jᵀ + κ u_d v_dᵀ and (u_i v_jᵀ + u_j v_iᵀ)/√2 see S, u_d v_jᵀ + u_j v_dᵀ see q. With the
    targets 1 + w on the first and 0 on the others Σ u_j v_jᵀ is stationary, at
    ∇L̂ = −w (Σ u_j v_jᵀ + κ r u_d v_dᵀ). With κ r = 2 its norm is 2w, and the Hessian is 2 − w on
    z qᵀ and positive on all else but rotations.
    """
    excess, size = 2.0, rank + 1
    # The decay is SHARE of ‖∇L̂(0)‖₂ = (1 + w) κ r.
    w = ntk.SHARE * excess / (1 - ntk.SHARE * excess)
    u, v = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    count, i = rank * (rank + 3) // 2, np.arange(rank)
    row, column = np.triu_indices(rank, 1)
    seen = np.zeros((count, size, size))
    targets = np.zeros((count, 1))
    seen[i, i, i], seen[i, rank, rank], targets[i] = 1.0, excess / rank, 1 + w
    mixed = rank + np.arange(len(row))
    seen[mixed, row, column] = seen[mixed, column, row] = 0.5**0.5
    last = count - rank + i
    seen[last, rank, i] = seen[last, i, rank] = 1.0
    # The loss is a mean over the data.
    features = count**0.5 * (u @ seen @ v.T)
    a, b = rng.standard_normal((size, rank)), rng.standard_normal((rank, size))
    return (
        features[:, None],
        count**0.5 * targets,
        u[:, :rank] + 1e-2 * a,
        v[:, :rank].T + 1e-2 * b,
    )


@eqx.filter_jit
def _from_built(features, targets, start, perturbation) -> ntk.Rest:
    problem = Linearized.from_features(features, targets)
    w = ntk.decay_of(problem)
    return ntk.come_to_rest(problem, w, start, BUILT_STEPS, w * perturbation, step=0.4)


def least_data(run: Run, noise: float = 0.0) -> tuple[int, ntk.Rest]:
    """How many data a built instance has, and where a run of BUILT_RANK on it rests that starts
    next to its spurious minimum; with a perturbation of `noise` times w."""

    def simulate():
        rng = np.random.default_rng([run.seed, 9])
        features, targets, a, b = _least_data(rng, BUILT_RANK)
        p = rng.standard_normal((2 * (BUILT_RANK + 1),) * 2)
        start = Factors(jnp.asarray(a), jnp.asarray(b))
        p = jnp.asarray(noise * (p + p.T) / 2)
        return len(targets), _from_built(jnp.asarray(features), jnp.asarray(targets), start, p)

    return run.once(("jang2024 built", noise), simulate)
