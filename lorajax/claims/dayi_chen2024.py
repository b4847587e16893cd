"""Claims of Dayi, Chen 2024 (arXiv:2411.15385): low-rank fine-tuning beyond kernels.

A two-layer ReLU network whose first layer W gets a rank-one update c ûᵀ with known c; the teacher's
is c uᵀ. û moves on the unit sphere across the span of W, on the population loss
½ E(f_û(x) − f_u(x))², x standard Gaussian. The form of the equation is recalled; its coefficient
for the ReLU is derived here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import laws
from lorajax.claims.base import Control, Evidence, Run, claim, standard_errors

SOURCE = "Dayi, Chen 2024 (arXiv:2411.15385); theory §7"
WIDTH, DIMENSION = 4, 24
OVERLAPS = np.linspace(-0.8, 0.8, 9)
CHUNKS = 64


def _network(x: Array, frozen: Array, adapter: Array, outputs: Array, directions: Array) -> Array:
    """f(x) = Σ a_i relu(⟨w_i + c_i û, x⟩), a batch of rows x."""
    weights = frozen + jnp.multiply.outer(directions, adapter)
    return jnp.maximum(x @ weights.T, 0) @ outputs


@jax.jit
def _measure(key: Array, x: Array, overlaps: Array, parts) -> tuple[Array, Array]:
    """Velocities of the overlap and of û across the plane of u and û, for each chunk of data.

    Both are projections of the network's own gradient, by automatic differentiation.
    """
    frozen, outputs, directions = parts
    # Orthonormal and across W, which fills the first coordinates.
    frame = jnp.linalg.qr(jax.random.normal(key, (DIMENSION - WIDTH, 3)))[0]
    teacher, other, across = jnp.pad(frame, ((WIDTH, 0), (0, 0))).T

    def loss(adapter: Array, batch: Array) -> Array:
        gap = _network(batch, frozen, adapter, outputs, directions) - _network(
            batch, frozen, teacher, outputs, directions
        )
        return 0.5 * jnp.mean(gap**2)

    def velocity(overlap: Array, batch: Array) -> Array:
        adapter = overlap * teacher + jnp.sqrt(1 - overlap**2) * other
        flow = -jax.grad(loss)(adapter, batch)
        flow = flow - jnp.sum(flow * adapter) * adapter
        return jnp.stack([flow @ teacher, flow @ across])

    found = jax.vmap(lambda batch: jax.vmap(lambda m: velocity(m, batch))(overlaps))(x)
    return found[..., 0], found[..., 1]


@claim(
    "dayi_chen2024.overlap",
    source=SOURCE,
    standing="recalled",
    tolerance="standard errors of a mean over 64 chunks of the data, as many as chance exceeds at "
    "any of the nine overlaps, along or across, in 1 of 1000 cases (`claims.SAMPLING_RISK`)",
    control=Control("h(m) becomes 1.05 h(m)", {"constant": 1.05}),
)
def overlap(run: Run, constant: float = 1.0) -> Evidence:
    """In rank-one fine-tuning of a two-layer network the overlap m = ⟨u, û⟩ with the teacher's
    direction obeys ṁ = h(m)(1 − m²), and nothing else of û matters.
    """
    keys = jax.random.split(run.key(90), 3)
    frozen = jnp.pad(
        jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5,
        ((0, 0), (0, DIMENSION - WIDTH)),
    )
    outputs = jnp.array([1.0, 0.5, -0.5, 1.0])
    directions = jnp.array([1.0, -0.7, 0.8, 0.6])
    count = run.pick(4096, 65536)

    def simulate():
        x = jax.random.normal(keys[1], (CHUNKS, count, DIMENSION))
        return _measure(keys[2], x, jnp.asarray(OVERLAPS), (frozen, outputs, directions))

    along, across = (np.asarray(part) for part in run.once("overlap", simulate))
    mean, bar = along.mean(0), along.std(0, ddof=1) / CHUNKS**0.5
    drift, drift_bar = across.mean(0), across.std(0, ddof=1) / CHUNKS**0.5

    def velocity(overlaps: np.ndarray) -> np.ndarray:
        parts = frozen, outputs, directions
        found = laws.relu_overlap_velocity(jnp.asarray(overlaps), *parts, constant=constant)
        return np.asarray(found)

    law = velocity(OVERLAPS)
    size = float(np.abs(mean).max())

    def draw(ax):
        fine = np.linspace(-1, 1, 201)
        ax.plot(fine, velocity(fine), "--", color="black", label="h(m)(1 − m²)")
        ax.errorbar(OVERLAPS, mean, many * bar, fmt="o", label="gradient of the network")
        ax.errorbar(OVERLAPS, drift, many * drift_bar, fmt="x", label="out of the plane of u and û")
        ax.set(xlabel="overlap m", ylabel="velocity of the overlap")
        ax.set_title(f"bars: {many:.1f} standard errors")
        ax.legend()

    gaps, bars = np.append(np.abs(mean - law), np.abs(drift)), np.append(bar, drift_bar)
    many = standard_errors(len(gaps), CHUNKS - 1)
    worst = int(np.argmax(gaps / bars))
    return Evidence(
        measured={"velocity": mean.tolist(), "out_of_plane": drift.tolist()},
        predicted={"velocity": law.tolist(), "out_of_plane": [0.0] * len(OVERLAPS)},
        error=float(gaps[worst]) / size,
        tolerance=many * float(bars[worst]) / size,
        draw=draw,
        caption=f"{CHUNKS * count} fresh inputs of dimension {DIMENSION}; bars: "
        f"{many:.1f} standard errors.",
    )
