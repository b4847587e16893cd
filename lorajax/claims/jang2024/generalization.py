"""How far the solution's loss on new data lies above that on its own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lorajax import optima
from lorajax.claims import ntk
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim, standard_errors
from lorajax.problems import Linearized

SIDE, LENGTHS = 3, (1e3, 1e4, 1e5)


@eqx.filter_jit
def _gaps(features, targets, samples) -> tuple[Any, Any]:
    """Generalization gap per nuclear norm of lanes, and whether they converged."""

    def one(features, targets, samples):
        problem = Linearized.from_features(features, targets)
        weights = jnp.full_like(problem.sample_weights, 1) / samples
        problem = eqx.tree_at(lambda p: p.sample_weights, problem, weights)
        found = optima.minimize(problem, ntk.decay_of(problem, 0.5), tolerance=1e-12)
        x, zero = found.update, problem.zero()
        fitted = problem.loss(zero) - problem.loss(x)
        # On new data ½E(⟨G, X⟩ − y)² exceeds its value at 0 by ½‖X‖².
        nuclear = jnp.sum(jnp.linalg.svd(x, compute_uv=False))
        return (jnp.sum(x**2) / 2 + fitted) / nuclear, found.converged

    return jax.vmap(one)(features, targets, samples)


@claim(
    "jang2024.generalization_rate",
    source="Rademacher bound ∝ ‖δ*‖_* √K G R/√N of Jang, Lee, Ryu 2024 (arXiv:2402.11867)",
    standing="recalled",
    tolerance="order of the next term, mn/N at the smallest N, over the range of ln N, plus as "
    "many standard errors over repetitions as chance exceeds in 1 of 1000 cases "
    "(`claims.SAMPLING_RISK`); one repetition is one draw at every N",
    control=Control("the exponent −½ becomes −0.525", {"exponent": -0.525}),
)
def generalization_rate(run: Run, exponent: float = -0.5) -> Evidence:
    """On targets that are noise, where the Rademacher bound is attained, the solution's
    generalization gap per unit of ‖δ*‖_* falls as N^{−1/2} (decay half of ‖∇L̂(0)‖₂)."""
    repetitions = run.pick(300, 2000)

    def simulate():
        # N Gaussian rows act through their triangular factor alone (Bartlett's decomposition), so
        # that mn + 1 rows stand for any N of them, exactly.
        rng, rows = np.random.default_rng([run.seed, 7]), SIDE**2 + 1
        lanes = (len(LENGTHS), repetitions)
        # One draw for all N but for the diagonal, which is nearly √N: slopes then differ little
        # from repetition to repetition.
        r = np.triu(rng.standard_normal((repetitions, rows, rows)), 1)
        r = np.repeat(r[None], len(LENGTHS), axis=0)
        freedom = np.array(LENGTHS)[:, None, None] - np.arange(rows)
        i = np.arange(rows)
        r[..., i, i] = np.sqrt(rng.chisquare(np.broadcast_to(freedom, (*lanes, rows))))
        r = r.reshape(-1, rows, rows)
        features = r[:, :, :-1].reshape(-1, rows, 1, SIDE, SIDE)
        samples = np.repeat(LENGTHS, repetitions)
        lanes_of = [jnp.asarray(x) for x in (features, r[:, :, -1:], samples)]
        gap, converged = _gaps(lanes_of[0], lanes_of[1], lanes_of[2])
        return np.asarray(gap).reshape(lanes), bool(np.all(converged))

    gaps, converged = run.once("jang2024 generalization", simulate)
    x, logs = np.log(np.array(LENGTHS)), np.log(gaps)
    slopes = np.polyfit(x, logs, 1)[0]
    slope, sampling = float(slopes.mean()), float(slopes.std(ddof=1)) / repetitions**0.5

    def draw(ax):
        ax.errorbar(
            LENGTHS, gaps.mean(axis=1), gaps.std(axis=1), fmt="o", label="simulated, ± 1 sd"
        )
        line = gaps.mean() * (np.array(LENGTHS) / np.exp(x.mean())) ** exponent
        line *= np.exp(logs.mean()) / np.exp(np.log(line).mean())
        ax.plot(LENGTHS, line, "k--", label=f"N^{exponent:g}")
        ax.set(xscale="log", yscale="log", xlabel="samples N", ylabel="generalization gap / ‖δ*‖_*")
        ax.legend()

    return Evidence(
        measured={
            "exponent": slope,
            "standard_error": sampling,
            "gaps": gaps.mean(axis=1).tolist(),
        },
        predicted={"exponent": exponent},
        error=abs(slope - exponent),
        tolerance=SIDE**2 / LENGTHS[0] / float(x[-1] - x[0])
        + standard_errors(1, repetitions - 1) * sampling,
        assumptions=(Assumption("all solutions are certified", converged),),
        draw=draw,
        caption=f"{SIDE}×{SIDE} updates on Gaussian features, targets of pure noise.",
    )
