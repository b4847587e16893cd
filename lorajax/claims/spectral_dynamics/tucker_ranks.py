"""Tucker-LoRA's rank rule: the ranks of the modes from the noise of an unfolded gradient.

The paper states the rule for matrices; that it carries over to unfoldings is derived (theory §3).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import ranks
from lorajax.claims.base import Control, Evidence, Run, claim, most_by_chance, standard_errors
from lorajax.claims.spectral_dynamics.tucker import SOURCE
from lorajax.factors import unfold
from lorajax.initializers import tucker

RANK_SIDE, RANK_TRUE = 14, (2, 3, 4)
REPETITIONS, NULL_DRAWS = (40, 400), (400, 4000)
SAMPLES = 2000
PARTS = 2 * len(RANK_TRUE)
"""Statements that `tucker_ranks` makes, two of each mode."""


@functools.partial(jax.jit, static_argnums=1)
def _null_passes(key: Array, count: int) -> Array:
    """Which of `count` draws of pure noise pass the raised floor of a mode.

    As for matrices: the top of what noise has across the signal's directions (those of the mode
    with the fewest, which leaves most), against the top of an independent draw of the whole.
    """
    n, rest, k = RANK_SIDE, RANK_SIDE**2, min(RANK_TRUE)
    draws = jax.random.normal(key, (2, count, n, rest))
    across = (jnp.arange(n) < n - k)[:, None] & (jnp.arange(rest) < rest - k)[None, :]
    draws = draws.at[1].multiply(across.astype(draws.dtype)[None])
    # The smaller Gram matrices have the same spectra and are quicker to take apart.
    tops = jnp.linalg.eigvalsh(draws @ jnp.swapaxes(draws, 2, 3))[..., -1]
    margin = ranks.edge_margin((n, rest), ranks.UNFOLDED_WIDTH)
    return tops[1] > (1 + margin) * tops[0]


@functools.partial(jax.jit, static_argnums=1)
def _estimates(
    key: Array, count: int, floor: Array, strength: Array
) -> tuple[ranks.RankEstimate, ...]:
    """Rank estimates of every mode from `count` draws, the halves' difference times `floor`."""
    keys = jax.random.split(key, 3)
    shape = (RANK_SIDE,) * 3
    core = jax.random.normal(keys[0], RANK_TRUE)
    # Scaled so that the weakest direction of any unfolding has weight 2, above the noise.
    weakest = [jnp.linalg.eigvalsh(x @ x.T)[0] for x in (unfold(core, mode) for mode in range(3))]
    core = 2.0 * core / jnp.sqrt(jnp.min(jnp.stack(weakest)))
    signal = strength * tucker(keys[1], shape, RANK_TRUE)._replace(core=core).product
    # With exactly whitened inputs the noise of a gradient is exactly Gaussian, entry by entry.
    noise = (2 / SAMPLES) ** 0.5 * jax.random.normal(keys[2], (2, count, *shape))
    first, second = noise - signal[None, None]
    mean, half = (first + second) / 2, floor * (first - second) / 2
    return jax.vmap(ranks.split_half_modes)(mean + half, mean - half)


@claim(
    "spectral_dynamics.tucker_ranks",
    source=SOURCE,
    standing="derived",
    tolerance="1, for the worst of two statements on each mode, in units of what chance does. The "
    "share of wrong ranks: the binomial law at the rate at which Gaussian noise of these shapes "
    "passes the floor beside a signal (Monte Carlo). The rate at which noise alone passes the "
    "floor less its margin, ½: the standard error of a rate over the draws",
    control=Control("the floor is 0.95 of what the halves say", {"floor": 0.95}),
)
def tucker_ranks(run: Run, floor: float = 1.0) -> Evidence:
    """The rank of each mode is the number of singular values of the gradient's unfolding above the
    noise, which the half-difference of two halves of the data tells, unfolded alike: of noise alone
    half of all draws pass its top, and next to none the floor that is raised by the margin.
    """
    count, draws = run.pick(*REPETITIONS), run.pick(*NULL_DRAWS)
    level = jnp.asarray(floor)
    found = run.once(
        ("tucker_ranks", floor),
        lambda: _estimates(run.key(55), count, level, jnp.asarray(1.0)),
    )
    alone = run.once(
        ("tucker_noise", floor),
        lambda: _estimates(run.key(57), draws, level, jnp.asarray(0.0)),
    )
    estimates = np.stack([np.asarray(each.rank) for each in found], axis=1)
    wrong = np.mean(estimates != np.array(RANK_TRUE), axis=0)
    margin = ranks.edge_margin((RANK_SIDE, RANK_SIDE**2), ranks.UNFOLDED_WIDTH)
    passes = [
        float(np.mean(np.asarray(each.singular_values[:, 0] * (1 + margin) ** 0.5 >= each.floor)))
        for each in alone
    ]
    null = np.asarray(run.once("tucker_null", lambda: _null_passes(run.key(56), 2000)))
    rate = float(null.mean())
    # As many as chance may have hidden among the draws.
    most = rate + standard_errors(PARTS) * max(rate * (1 - rate) / null.size, null.size**-2) ** 0.5
    few = (most_by_chance(count, most, PARTS) + 0.5) / count
    allowed = standard_errors(PARTS) * 0.5 / draws**0.5

    def draw(ax):
        for mode, each in enumerate(found):
            values = np.asarray(each.singular_values)[:, :10]
            index = np.arange(1, values.shape[1] + 1) + 0.2 * (mode - 1)
            ax.semilogy(index, values.T, ".", color=f"C{mode}", alpha=0.4)
            ax.axhline(float(np.mean(each.floor)), linestyle="--", color=f"C{mode}")
            ax.plot([], [], ".", color=f"C{mode}", label=f"mode {mode + 1}, r* = {RANK_TRUE[mode]}")
        ax.set(xlabel="place i", ylabel="σ_i of the unfolded gradient")
        ax.legend()

    return Evidence(
        measured={f"mean_rank_mode_{i + 1}": float(x) for i, x in enumerate(estimates.mean(0))}
        | {"wrong_share": wrong.tolist(), "null_rate": rate, "noise_alone_passes": passes},
        predicted={f"mean_rank_mode_{i + 1}": float(x) for i, x in enumerate(RANK_TRUE)}
        | {"noise_alone_passes": [0.5] * len(passes)},
        error=max(float(wrong.max()) / few, max(abs(x - 0.5) for x in passes) / allowed),
        tolerance=1.0,
        draw=draw,
        caption=f"Unfolded gradients of a tensor regression, n = {SAMPLES}, noise 1; "
        "dashed: the floors from the half-difference.",
    )
