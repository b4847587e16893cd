"""Claims of EVA (Paischer et al. 2024, arXiv:2410.07170): starts that explain the inputs."""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.instances import SHAPE
from lorajax.initializers import eva, orthogonal

EPS = float(np.finfo(np.float64).eps)
SOURCE = "EVA: Paischer et al. 2024 (arXiv:2410.07170); theory §7"


def _inputs(run: Run, samples: int = 512):
    m = SHAPE[0]
    mix = jax.random.normal(run.key(70), (m, m)) * jnp.exp(-0.08 * jnp.arange(float(m)))[None]
    return jax.random.normal(run.key(71), (samples, m)) @ mix.T


@claim(
    "eva2024.explained_variance",
    source=SOURCE,
    standing="recalled",
    tolerance="rounding: eps times the dimension",
    control=Control("A lies along the directions 2 … r + 1", {"skip": 1}),
)
def explained_variance(run: Run, skip: int = 0) -> Evidence:
    """EVA's A explains as much of the inputs' variance as r directions can, and with it maximizes
    the expected square of B's first gradient, E‖Aᵀx δᵀ‖², over all orthonormal A.
    """
    x = _inputs(run)
    moment = x.T @ x / x.shape[0]
    ranks = (1, 2, 4, 8, 16)
    # The start of a rank is the first columns of that of a larger one.
    start = np.asarray(eva(moment, ranks[-1] + skip, outputs=SHAPE[1]).a)[:, skip:]
    other = np.asarray(orthogonal(run.key(73), SHAPE, ranks[-1], 1.0).a)
    # Errors at the outputs that know nothing of the inputs: the first gradient is the mean of
    # Aᵀx δᵀ, and what is compared is the mean square of its terms.
    errors = np.asarray(jax.random.normal(run.key(72), (x.shape[0], SHAPE[1])))
    x, moment = np.asarray(x), np.asarray(moment)
    eigenvalues = np.linalg.eigvalsh(moment)[::-1]

    def explained(a: np.ndarray) -> list[float]:
        return [float(np.trace(a[:, :r].T @ moment @ a[:, :r]) / np.trace(moment)) for r in ranks]

    def signal(a: np.ndarray) -> np.ndarray:
        squares = [np.sum((x @ a[:, :r]) ** 2, axis=1) for r in ranks]
        return np.array([np.mean(np.sum(errors**2, axis=1) * each) for each in squares])

    found, signals = explained(start), signal(start)
    other_share, other_signal = explained(other), signal(other)
    law = np.cumsum(eigenvalues)[np.array(ranks) - 1] / eigenvalues.sum()

    def draw(ax):
        ax.plot(ranks, found, "o", label="EVA")
        ax.plot(ranks, law, "--", color="black", label="top r eigenvalues")
        ax.plot(ranks, other_share, "x-", label="blind orthonormal A")
        ax.set(xlabel="rank r", ylabel="explained share of the inputs' variance")
        ax.legend()

    return Evidence(
        measured={
            "explained": found,
            "signal": signals.tolist(),
            "blind_signal": other_signal.tolist(),
        },
        predicted={"explained": law.tolist()},
        error=float(np.abs(np.array(found) - law).max()),
        tolerance=EPS * SHAPE[0],
        assumptions=(
            Assumption(
                "blind starts explain less, and their gradients are weaker",
                bool(np.all(np.array(other_share) <= law) and np.all(other_signal < signals)),
            ),
        ),
        draw=draw,
        caption="Inputs with a decaying spectrum; Ky Fan's maximum is reached at every rank.",
    )
