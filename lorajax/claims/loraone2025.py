"""Claims of LoRA-One (Zhang et al. 2025, arXiv:2502.01235): the one-step gradient as a start.

Linear regression, y = xS, x ~ N(0, I), labels without noise: what the theory needs is the gradient
at the pretrained weight, G0 = −Σ̂S with Σ̂ the covariance of the sample.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim, standard_errors
from lorajax.factors import Factors
from lorajax.flows import descend
from lorajax.initializers import lora, lora_one
from lorajax.problems import MatrixFactorization, ProductLoss

SOURCE = "LoRA-One: Zhang et al. 2025 (arXiv:2502.01235); theory §7"
EPS = float(np.finfo(np.float64).eps)
DIMENSION, OUTPUTS = 20, 16
SPECTRUM = (4.0, 2.0, 1.0)


def _regression_loss(update: Array, covariance: Array, target: Array) -> Array:
    gap = update - target
    return 0.5 * jnp.sum(gap * (covariance @ gap))


@claim(
    "loraone2025.subspace",
    source=SOURCE,
    standing="stated",
    tolerance="rounding: eps for each step, times the root of the number of entries",
    control=Control("B starts at a twentieth of A instead of 0", {"b_scale": 0.05}),
)
def subspace(run: Run, b_scale: float = 0.0) -> Evidence:
    """From B = 0 the rows of B stay within the right singular space of the gradient at the start,
    exactly, also for sampled inputs that are not whitened.
    """
    problem = MatrixFactorization.from_spectrum(run.key(60), (DIMENSION, OUTPUTS), SPECTRUM)
    x = jax.random.normal(run.key(61), (4 * DIMENSION, DIMENSION))
    loss = ProductLoss(_regression_loss, problem.shape, (x.T @ x / x.shape[0], problem.target))
    start = lora(run.key(62), problem.shape, 6, 1.0)
    shape = start.b.shape
    start = start._replace(b=b_scale * jax.random.normal(run.key(63), shape) / shape[1] ** 0.5)
    gradient = np.asarray(loss.full_gradient(Factors(start.a, jnp.zeros(shape))))
    steps, every = 400, 4
    path = run.once(
        ("loraone", b_scale), lambda: descend(loss, start, optax.sgd(0.05), steps, every=every)
    )
    _, values, frame = np.linalg.svd(gradient)
    right, rest = frame[: len(SPECTRUM)], float(values[len(SPECTRUM)] / values[0])
    b = np.asarray(path.core.b)[1:]
    outside = np.linalg.norm(b - (b @ right.T) @ right, axis=(1, 2))
    share = outside / np.linalg.norm(b, axis=(1, 2))
    losses = np.asarray(path.losses / path.losses[0])

    def draw(ax):
        count = every * np.arange(1, len(share) + 1)
        ax.semilogy(count, np.maximum(share, 1e-18), label="share of B outside the gradient's")
        ax.semilogy(count, losses[1:], "--", color="black", label="loss / initial loss")
        ax.set(xlabel="step", ylabel="share of the whole")
        ax.legend()

    return Evidence(
        measured={"largest_share_outside": float(share.max()), "final_loss": float(losses[-1])},
        predicted={"largest_share_outside": 0.0},
        error=float(share.max()),
        tolerance=EPS * steps * b[0].size ** 0.5,
        assumptions=(
            Assumption(
                "labels without noise: the gradient has the oracle's rank",
                rest <= EPS * DIMENSION,
                f"σ_{len(SPECTRUM) + 1}/σ_1 = {rest:.1e}",
            ),
        ),
        draw=draw,
        caption=f"Rank 6 for an oracle of rank {len(SPECTRUM)}: no superfluous direction ever "
        "enters B.",
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _errors(key: Array, problem: MatrixFactorization, samples: int, draws: int) -> Array:
    """Relative errors of LoRA-One's start over data sets, and Frobenius against spectral bound."""

    def one(each: Array) -> Array:
        x = jax.random.normal(each, (samples, DIMENSION))
        gradient = -(x.T @ (x @ problem.target)) / samples
        gap = lora_one(gradient, len(SPECTRUM)).product - problem.target
        return jnp.linalg.norm(gap) / jnp.linalg.norm(problem.singular_values)

    return jax.vmap(one)(jax.random.split(key, draws))


@claim(
    "loraone2025.one_step",
    source=SOURCE,
    standing="derived",
    tolerance="standard errors of a root mean square over data sets, relative, as many as chance "
    "exceeds at either number of samples in 1 of 1000 cases (`claims.SAMPLING_RISK`)",
    control=Control("√((d + 1)/n) becomes 1.05 times it", {"constant": 1.05}),
)
def one_step(run: Run, constant: float = 1.0) -> Evidence:
    """LoRA-One's start A0B0, the best rank-r step of size 1 along the negative gradient, is within
    ε‖S‖ of the oracle update S, with ε = √((d + 1)/n) in root mean square over data sets.
    """
    problem = MatrixFactorization.from_spectrum(run.key(60), (DIMENSION, OUTPUTS), SPECTRUM)
    counts, draws = (100, 400), run.pick(1600, 16000)
    found, bars, law = [], [], []
    for index, samples in enumerate(counts):
        errors = np.asarray(
            run.once(
                ("one_step", samples),
                lambda samples=samples, index=index: _errors(
                    run.key(64 + index), problem, samples, draws
                ),
            )
        )
        mean = float(np.mean(errors**2))
        found.append(mean**0.5)
        # The root halves a relative error.
        bars.append(float(np.std(errors**2)) / draws**0.5 / mean / 2)
        law.append(laws.one_step_error(DIMENSION, samples, constant=constant))
    relative = np.abs(np.array(found) / np.array(law) - 1)
    worst = int(np.argmax(relative / np.array(bars)))

    def draw(ax):
        ax.errorbar(
            counts, found, np.array(bars) * found, fmt="o", label="simulated, ± 1 standard error"
        )
        ax.loglog(counts, law, "--", label="√((d + 1)/n)" + ("" if constant == 1 else ", altered"))
        ax.set(xlabel="samples n", ylabel="‖A0B0 − S‖ / ‖S‖")
        ax.legend()

    return Evidence(
        measured={"relative_error": found},
        predicted={"relative_error": law},
        error=float(relative[worst]),
        tolerance=standard_errors(len(counts), draws - 1) * bars[worst],
        draw=draw,
        caption=f"Before any training the start is that close; d = {DIMENSION}, {draws} data sets.",
    )
