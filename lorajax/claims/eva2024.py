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
    eigenvalues = np.linalg.eigvalsh(np.asarray(moment))[::-1]
    # Errors at the outputs that know nothing of the inputs: the first gradient is the mean of
    # Aᵀx δᵀ, and what is compared is the mean square of its terms.
    errors = jax.random.normal(run.key(72), (x.shape[0], SHAPE[1]))
    weight = jnp.sum(errors**2, axis=1)
    found, signals, blind = [], [], []
    for rank in ranks:
        start = eva(moment, rank + skip, outputs=SHAPE[1]).a[:, skip:]
        found.append(float(jnp.trace(start.T @ moment @ start)) / float(jnp.trace(moment)))
        signals.append(float(jnp.mean(weight * jnp.sum((x @ start) ** 2, axis=1))))
        other = orthogonal(run.key(73), SHAPE, rank, 1.0).a
        blind.append(
            (
                float(jnp.trace(other.T @ moment @ other)) / float(jnp.trace(moment)),
                float(jnp.mean(weight * jnp.sum((x @ other) ** 2, axis=1))),
            )
        )
    law = np.cumsum(eigenvalues)[np.array(ranks) - 1] / eigenvalues.sum()
    other_share, other_signal = np.array(blind).T

    def draw(ax):
        ax.plot(ranks, found, "o", label="EVA")
        ax.plot(ranks, law, "--", color="black", label="top r eigenvalues")
        ax.plot(ranks, other_share, "x-", label="blind orthonormal A")
        ax.set(xlabel="rank r", ylabel="explained share of the inputs' variance")
        ax.legend()

    return Evidence(
        measured={"explained": found, "signal": signals, "blind_signal": other_signal.tolist()},
        predicted={"explained": law.tolist()},
        error=float(np.abs(np.array(found) - law).max()),
        tolerance=EPS * SHAPE[0],
        assumptions=(
            Assumption(
                "blind starts explain less, and their gradients are weaker",
                bool(np.all(other_share <= law) and np.all(other_signal < signals)),
            ),
        ),
        draw=draw,
        caption="Inputs with a decaying spectrum; Ky Fan's maximum is reached at every rank.",
    )
