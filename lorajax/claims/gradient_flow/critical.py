"""Critical points of the quadratic loss (theory §1)."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim

EPS = float(np.finfo(np.float64).eps)
SHAPE, VALUES, RANK = (6, 5), np.array([4.0, 3.0, 2.0, 1.0]), 2


@claim(
    "gradient_flow.critical_points",
    source="theory §1; Baldi, Hornik 1989",
    standing="derived",
    tolerance="rounding of an eigenvalue of the Hessian: eps times its size and its largest entry",
    control=Control("the curvature's factor 1 becomes 1.05", {"constant": 1.05}),
)
def critical_points(run: Run, constant: float = 1.0) -> Evidence:
    """Where AB is a part of S with rank r the gradient is 0, and the lowest curvature is the
    least singular value kept less the largest left out: only the top-r part is a minimum."""
    numbers = np.random.default_rng(np.asarray(jax.random.key_data(run.key(140))))
    (m, n), k = SHAPE, len(VALUES)
    u = np.linalg.qr(numbers.normal(size=(m, m)))[0][:, :k]
    v = np.linalg.qr(numbers.normal(size=(n, n)))[0][:, :k]
    target = (u * VALUES) @ v.T
    subsets = list(itertools.combinations(range(k), RANK))

    def loss(flat: Any) -> Any:
        a, b = flat[: m * RANK].reshape(m, RANK), flat[m * RANK :].reshape(RANK, n)
        return 0.5 * jnp.sum((target - a @ b) ** 2)

    def simulate() -> tuple[np.ndarray, np.ndarray]:
        points = []
        for subset in subsets:
            root = np.sqrt(VALUES[list(subset)])
            a, b = u[:, subset] * root, (v[:, subset] * root).T
            points.append(np.concatenate([a.ravel(), b.ravel()]))
        both = jax.jit(jax.vmap(lambda x: (jax.grad(loss)(x), jax.hessian(loss)(x))))
        slopes, bends = (np.asarray(each) for each in both(jnp.asarray(np.stack(points))))
        return np.abs(slopes).max(axis=1), np.linalg.eigvalsh(bends)[:, 0]

    slopes, lowest = run.once("critical_points", simulate)
    values = jnp.asarray(VALUES)
    law = np.array(
        [
            float(
                laws.saddle_curvature(
                    values, jnp.asarray(np.isin(np.arange(k), subset)), constant=constant
                )
            )
            for subset in subsets
        ]
    )
    allowed = EPS * (m + n) * RANK * VALUES[0]

    def draw(ax):
        places = np.arange(len(subsets))
        ax.plot(places, lowest, "o", label="Hessian")
        ax.plot(places, law, "k_", markersize=16, label="law")
        names = ["+".join(f"{VALUES[i]:g}" for i in subset) for subset in subsets]
        ax.set(xticks=places, xticklabels=names, xlabel="modes kept", ylabel="lowest curvature")
        ax.legend()

    return Evidence(
        measured={"lowest_curvatures": lowest.tolist()},
        predicted={"lowest_curvatures": law.tolist()},
        error=float(np.abs(lowest - law).max()),
        tolerance=allowed,
        assumptions=(
            Assumption(
                "the gradient is 0 at every one of them",
                bool(slopes.max() <= allowed),
                f"largest entry {slopes.max():.1e}",
            ),
        ),
        draw=draw,
        caption="Balanced factors of rank 2 of a target with singular values 4, 3, 2, 1.",
    )
