"""The rank rule and what replaces its unknown constant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import ranks
from lorajax.claims.base import (
    Control,
    Evidence,
    Run,
    claim,
    most_by_chance,
    standard_errors,
)
from lorajax.claims.instances import SHAPE

SOURCE = "OpenReview gg2Wb2HPOI; theory §3"


def _halves(key: Array, x: Array, residual: Array) -> tuple[Array, Array, Array]:
    """Mean gradients of both halves of the data, and of the randomly signed losses of all of it."""
    samples = len(x)
    half = samples // 2
    first = x[:half].T @ residual[:half] / half
    second = x[half:].T @ residual[half:] / (samples - half)
    # Signs ±1 independent of the halves: the second way to the noise alone, from all samples.
    signs = jax.random.rademacher(jax.random.fold_in(key, 8), (samples, 1)).astype(x.dtype)
    return first, second, x.T @ (signs * residual) / samples


def _data(keys: Array, samples: int, noise: Array, varying: bool) -> tuple[Array, Array]:
    """Inputs, and the labels' noise: its standard deviation is σ, or where it varies σ x_1²/√3, so
    that it varies by sample with the same mean square and gathers along one input direction."""
    m, n_out = SHAPE
    x = jax.random.normal(keys[0], (samples, m))
    labels = noise * jax.random.normal(keys[3], (samples, n_out))
    return x, labels * x[:, :1] ** 2 / 3**0.5 if varying else labels


def _regression(key: Array, samples: int, noise: Array, varying: bool):
    """Gradients of a linear regression at W0, whose oracle update has rank 5, per half of the data.

    Inputs are whitened exactly.
    """
    m, n_out = SHAPE
    keys = jax.random.split(key, 4)
    x, labels = _data(keys, samples, noise, varying)
    u = jnp.linalg.qr(jax.random.normal(keys[1], (m, 5)))[0]
    v = jnp.linalg.qr(jax.random.normal(keys[2], (n_out, 5)))[0]
    target = (u * jnp.array([5.0, 4.0, 3.0, 2.5, 2.0])[None, :]) @ v.T
    covariance = x.T @ x / samples
    white = jnp.linalg.cholesky(jnp.linalg.inv(covariance))
    x = x @ white
    return _halves(key, x, -(x @ target + labels))


def _noise_alone(key: Array, samples: int, noise: Array, varying: bool):
    """The same without an oracle update, where inputs need not be white."""
    x, labels = _data(jax.random.split(key, 4), samples, noise, varying)
    return _halves(key, x, -labels)


_regressions, _noises = (
    jax.jit(jax.vmap(each, in_axes=(0, None, None, None)), static_argnums=(1, 3))
    for each in (_regression, _noise_alone)
)

KINDS = {"constant_noise": False, "varying_noise": True}
REPETITIONS = (40, 400)
SAMPLES = 2000
NOISE = 1.0
NULL_DRAWS, NULL_SAMPLES = (400, 4000), 200
"""Draws of noise alone. What is said of them is exact at any number of samples and any inputs."""


def _gradients(run: Run, varying: bool) -> tuple[Array, Array, Array]:
    """Of both halves and of the signed losses, one draw a repetition."""
    keys = jax.random.split(run.key(30), run.pick(*REPETITIONS))
    return run.once(
        ("regressions", varying), lambda: _regressions(keys, SAMPLES, jnp.asarray(NOISE), varying)
    )


def _noise(run: Run, varying: bool) -> tuple[Array, Array, Array]:
    """The same of noise alone."""
    keys = jax.random.split(run.key(32), run.pick(*NULL_DRAWS))
    return run.once(
        ("regressions of noise", varying),
        lambda: _noises(keys, NULL_SAMPLES, jnp.asarray(NOISE), varying),
    )


def _draw_spectra(spectra, floors):
    values = np.asarray(spectra)

    def draw(ax):
        index = np.arange(1, 13)
        ax.semilogy(index, values[:, :12].T, color="C0", alpha=0.3)
        ax.plot([], color="C0", label="σ_i(G0), one line a repetition")
        ax.axhline(float(np.mean(floors)), color="C3", linestyle="--", label="floor")
        ax.set(xlabel="place i", ylabel="singular value of the gradient")
        ax.legend()

    return draw


def _wrong(found) -> float:
    return float(np.mean(np.asarray(found) != 5))


@claim(
    "spectral_dynamics.rank_rule",
    source=SOURCE,
    standing="derived",
    tolerance="1, for the worse of two statements, each in units of its own. No wrong rank: the "
    "margin δ makes a noise singular value pass with probability 1e-6 a repetition (Gaussian "
    "concentration, ‖N‖ ≤ (√m + √n_out + t)σ/√n with probability 1 − e^{−t²/2}). C without margin "
    "over the mean of noise: the standard error, and the finite-size order min(m, n_out)^{−2/3} in "
    "units of the edge's scale",
    control=Control("the rule is told 0.95 of the noise that is there", {"told": 0.95}),
)
def rank_rule(run: Run, told: float = 1.0) -> Evidence:
    """With known noise σ, r̂ = max{r : σ_r(G0)² ≥ C/n} with C = σ²(√m + √n_out)²(1 + δ) finds the
    rank of the oracle update; and C is at the edge: without the margin δ the mean of the noise's
    own top σ² n is C less what the Tracy–Widom law says.
    """
    m, n_out = SHAPE
    first, second, _ = _gradients(run, False)
    values = jnp.linalg.svd((first + second) / 2, compute_uv=False)
    deviation = np.sqrt(2 * np.log(1e6))
    margin = (1 + deviation / (m**0.5 + n_out**0.5)) ** 2 - 1
    constant = ranks.noise_constant(SHAPE, told * NOISE, margin=margin)
    found = np.asarray(ranks.c_over_n(values, SAMPLES, constant))
    # With exactly whitened inputs the noise of a gradient, times √n, is exactly Gaussian.
    alone = NOISE * jax.random.normal(run.key(33), (run.pick(*NULL_DRAWS), m, n_out))
    tops = np.asarray(jnp.linalg.svd(alone, compute_uv=False)[:, 0]) ** 2
    top, bar = float(tops.mean()), float(tops.std(ddof=1)) / len(tops) ** 0.5
    law = float(ranks.noise_constant(SHAPE, told * NOISE)) * ranks.edge_mean(SHAPE)
    # edge_margin is e^{w} − 1 with w the edge's scale over its mean.
    finite = float(np.log1p(ranks.edge_margin(SHAPE, 1.0))) * min(SHAPE) ** (-2 / 3) * top
    allowed = standard_errors(1, len(tops) - 1) * bar + finite
    wrong, few = _wrong(found), (most_by_chance(len(found), 1e-6) + 0.5) / len(found)
    return Evidence(
        measured={
            "mean_rank": float(np.mean(found)),
            "wrong_share": wrong,
            "mean_top_of_noise": top,
            "standard_error": bar,
        },
        predicted={"mean_rank": 5.0, "wrong_share": 0.0, "mean_top_of_noise": law},
        error=max(wrong / few, abs(top - law) / allowed),
        tolerance=1.0,
        draw=_draw_spectra(values, (constant / SAMPLES) ** 0.5),
        caption=f"Linear regression, {m}×{n_out}, r* = 5, n = {SAMPLES}, noise 1. The edge is "
        f"looked at in {len(tops)} gradients of noise alone.",
    )


def _false_passes(run: Run, varying: bool, draws: int = 1000) -> float:
    """How often noise passes beside a signal, as many as chance may have hidden among the draws.

    The mean's sixth singular value is the top of the noise across the 5 signal directions on either
    side; the floor is the top of an independent draw of all of it. With many samples the gradient's
    noise is Gaussian, and where σ goes as x_1² the row of x_1 has E x_1⁶/3 = 5 times the variance.
    What the halves' inputs differ by raises the floor beside a signal: no more than that pass.
    """
    m, n_out = SHAPE
    row = jnp.ones(m).at[0].set(5**0.5 if varying else 1.0)
    keys = jax.random.split(run.key(31), 3)
    noise = row[None, None, :, None] * jax.random.normal(keys[0], (2, draws, m, n_out))
    u = jnp.linalg.qr(jax.random.normal(keys[1], (draws, m, 5)))[0]
    v = jnp.linalg.qr(jax.random.normal(keys[2], (draws, n_out, 5)))[0]
    rest = noise[0] - u @ (jnp.swapaxes(u, 1, 2) @ noise[0])
    rest = rest - (rest @ v) @ jnp.swapaxes(v, 1, 2)
    # The smaller Gram matrices have the same spectra and are quicker to take apart.
    tops = [jnp.linalg.eigvalsh(jnp.swapaxes(x, 1, 2) @ x)[:, -1] for x in (rest, noise[1])]
    passes = int(jnp.sum(tops[0] > tops[1]))
    rate = passes / draws
    return rate + standard_errors(PARTS) * max(rate * (1 - rate), 1 / draws) ** 0.5 / draws**0.5


PARTS = 2 * len(KINDS)
"""Statements that `split_half` and `random_signs` make, two of each kind of noise."""
TWO_PARTS = (
    "1, for the worst of two statements on each kind of noise, in units of what chance does. The "
    "share of wrong ranks: the binomial law at the rate at which Gaussian noise of these shapes "
    "passes the floor beside a signal (Monte Carlo). The rate at which noise alone passes, ½: the "
    "standard error of a rate over the draws"
)


@functools.partial(jax.jit, static_argnames="signs")
def _read(first: Array, second: Array, signed: Array, floor: Array, *, signs: bool):
    """Spectra, floors and ranks by the rules as they ship, from noise of `floor` times its size."""
    mean, half = (first + second) / 2, floor * (first - second) / 2
    if signs:
        read = jax.vmap(ranks.random_signs)(mean, floor * signed)
    else:
        read = jax.vmap(ranks.split_half)(mean + half, mean - half)
    return read.singular_values, read.floor, read.rank


def _noise_floor_evidence(run: Run, floor: float, signs: bool) -> Evidence:
    count, draws = run.pick(*REPETITIONS), run.pick(*NULL_DRAWS)
    measured, errors, shown = {}, [], None
    for name, varying in KINDS.items():
        values, floors, found = _read(*_gradients(run, varying), jnp.asarray(floor), signs=signs)
        alone = _read(*_noise(run, varying), jnp.asarray(floor), signs=signs)[2]
        rate = run.once(("false_passes", varying), lambda v=varying: _false_passes(run, v))
        few = (most_by_chance(count, min(rate, 1.0), PARTS) + 0.5) / count
        passes = float(np.mean(np.asarray(alone) > 0))
        errors += [
            _wrong(found) / few,
            abs(passes - 0.5) / (standard_errors(PARTS) / 2) * draws**0.5,
        ]
        known = ranks.c_over_n(values, SAMPLES, ranks.noise_constant(SHAPE, NOISE))
        measured |= {
            f"mean_rank_{name}": float(np.mean(found)),
            f"wrong_share_{name}": _wrong(found),
            f"most_by_chance_{name}": few,
            f"noise_alone_passes_{name}": passes,
            f"mean_rank_c_over_n_{name}": float(np.mean(np.asarray(known))),
        }
        shown = values, floors
    assert shown is not None
    return Evidence(
        measured=measured,
        predicted={f"mean_rank_{name}": 5.0 for name in KINDS}
        | {f"noise_alone_passes_{name}": 0.5 for name in KINDS},
        error=max(errors),
        tolerance=1.0,
        draw=_draw_spectra(*shown),
        caption="Noise that varies by sample; the floor comes from the data alone.",
    )


@claim(
    "spectral_dynamics.split_half",
    source="theory §3",
    standing="derived",
    tolerance=TWO_PARTS,
    control=Control("the floor is 0.95 of the half-difference's top value", {"floor": 0.95}),
)
def split_half(run: Run, floor: float = 1.0) -> Evidence:
    """With unknown noise, constant or varying by sample, the singular values of the mean gradient
    above the top one of the half-difference are as many as the rank of the oracle update; and the
    half-difference has exactly the mean's noise: where there is nothing else one passes the other
    in half of all cases.
    """
    return _noise_floor_evidence(run, floor, signs=False)


@claim(
    "spectral_dynamics.random_signs",
    source="theory §3",
    standing="derived",
    tolerance=TWO_PARTS,
    control=Control("the floor is 0.95 of the signed gradient's top value", {"floor": 0.95}),
)
def random_signs(run: Run, floor: float = 1.0) -> Evidence:
    """Random signs on the per-sample losses give the floor of split halves from all samples: beside
    a signal the same ranks, and of noise alone half of all cases pass.
    """
    return _noise_floor_evidence(run, floor, signs=True)
