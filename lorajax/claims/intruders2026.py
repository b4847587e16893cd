"""Claims on intruders: when a trained direction stands on top of a weight (arXiv:2607.23711; §9).

The formulas are those of Benaych-Georges, Nadakuditi 2012 (arXiv:1103.2221), recalled.

Changed after a first run: `gaussian` altered the 1 of 1 + θ² in its control, which finite size
hides (the control was confirmed), and now alters θ. A third claim, that the mean of
`ranks.intruder_threshold` over spectra of two sizes extrapolates to c^{1/4} with an order n^{−1/3},
was refuted at seed 0 (0.797 against 0.841; 0.933 and 0.865 at 25 and 200 rows) and withdrawn: that
order was assumed here, not derived. What the threshold of a single spectrum is worth stands in its
docstring, and its limit in the tests.
"""

from typing import Any

import jax
import numpy as np

from lorajax import laws, ranks
from lorajax.claims.base import Control, Evidence, Run, claim, standard_errors

SOURCE = "arXiv:2607.23711 (abstract read); Benaych-Georges, Nadakuditi 2012; theory §9"
RATIO, MULTIPLES = 0.5, (1.5, 2.5)
SIZES = (50, 100)
DECAY = 0.5


def _unit(key: Any, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(jax.random.normal(key, shape))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def _weights(key: Any, n: int, draws: int) -> np.ndarray:
    m = round(n / RATIO)
    return np.asarray(jax.random.normal(key, (draws, n, m))) / m**0.5


def _measured(key: Any, weights: np.ndarray, thetas: list[float]) -> np.ndarray:
    """Top values of `W + θ u vᵀ`, and squared cosines with u, shape (draws, strengths, 2)."""
    draws, n, m = weights.shape
    u, v = (_unit(jax.random.fold_in(key, i), (draws, size)) for i, size in enumerate((n, m)))
    found = []
    for theta in thetas:
        merged = weights + theta * u[:, :, None] * v[:, None, :]
        values, vectors = np.linalg.eigh(merged @ merged.transpose(0, 2, 1))
        cosines = np.sum(vectors[:, :, -1] * u, axis=1)
        found.append(np.stack([np.sqrt(values[:, -1]), cosines**2], axis=1))
    return np.stack(found, axis=1)


@claim(
    "intruders2026.gaussian",
    source=SOURCE,
    standing="recalled",
    tolerance="standard errors of a mean over draws, as many as chance exceeds in any of four "
    "means in 1 of 1000 cases (`claims.SAMPLING_RISK`), and the order 1/n of finite size: the "
    "change of the mean from half the size, with its own standard errors",
    control=Control("θ becomes 1.05 θ in the law", {"constant": 1.05}),
)
def gaussian(run: Run, constant: float = 1.0) -> Evidence:
    """An update θ u vᵀ of a Gaussian weight above the threshold c^{1/4} has its top singular value
    at √((1 + θ²)(c + θ²))/θ and a left vector of squared cosine 1 − c(1 + θ²)/(θ²(θ² + c))."""
    draws = run.pick(300, 4000)
    thetas = [k * float(laws.gaussian_threshold(RATIO)) for k in MULTIPLES]

    def simulate() -> list[np.ndarray]:
        keys = [run.key(90 + i) for i in range(4)]
        return [
            _measured(keys[i + 2], _weights(keys[i], n, draws), thetas) for i, n in enumerate(SIZES)
        ]

    half, full = run.once("gaussian", simulate)
    law = np.stack(
        [
            [float(law(theta, RATIO, constant=constant)) for theta in thetas]
            for law in (laws.gaussian_intruder, laws.gaussian_intruder_overlap)
        ],
        axis=1,
    )
    means = [x.mean(axis=0) for x in (half, full)]
    bars = [x.std(axis=0, ddof=1) / draws**0.5 for x in (half, full)]
    quantile = standard_errors(law.size, draws - 1)
    allowed = np.abs(means[1] - means[0]) + quantile * (bars[1] + np.hypot(*bars))
    share = np.abs(means[1] - law) / allowed
    worst = np.unravel_index(np.argmax(share), share.shape)

    def draw(ax):
        grid = np.linspace(1.0, 3.0, 50) * float(laws.gaussian_threshold(RATIO))
        ax.plot(grid, np.asarray(laws.gaussian_intruder(grid, RATIO)), "--", label="value, law")
        overlap = np.asarray(laws.gaussian_intruder_overlap(grid, RATIO))
        ax.plot(grid, overlap, "--", label="squared overlap, law")
        for i in range(2):
            spread, said = full[..., i].std(axis=0), None if i else "simulated, ± 1 sd"
            ax.errorbar(thetas, means[1][:, i], spread, fmt="o", color=f"C{i}", label=said)
        ax.set(xlabel="strength θ", ylabel="top value, squared overlap")
        ax.legend()

    return Evidence(
        measured={"values": means[1][:, 0].tolist(), "overlaps": means[1][:, 1].tolist()},
        predicted={"values": law[:, 0].tolist(), "overlaps": law[:, 1].tolist()},
        error=float(np.abs(means[1] - law)[worst]),
        tolerance=float(allowed[worst]),
        draw=draw,
        caption=f"{SIZES[1]}×{round(SIZES[1] / RATIO)}, {draws} draws; bars: one draw.",
    )


@claim(
    "intruders2026.spectrum",
    source=SOURCE,
    standing="recalled",
    tolerance="standard errors of a mean over directions, as many as chance exceeds in any of four "
    "means in 1 of 1000 cases, and the order 1/n of finite size: what replacing the "
    "random pair's own quadratic forms by their means leaves, twice their variance",
    control=Control("the exponent 2 of θ becomes 2.1", {"power": 2.1}),
)
def spectrum(run: Run, power: float = 2.0) -> Evidence:
    """For a weight of any spectrum, here one that decays as a power, the top singular value under
    an update θ u vᵀ of random direction is where D_W(z) = 1/θ²: its spectrum alone decides."""
    n, m, draws = 100, 200, run.pick(200, 4000)
    values = np.arange(1, n + 1) ** -DECAY
    thetas = [k * ranks.intruder_threshold(values, (n, m)) for k in MULTIPLES]
    # Rotations of W do nothing that those of u and v do not.
    weight = np.pad(np.diag(values), ((0, 0), (0, m - n)))
    found = run.once(
        "spectrum",
        lambda: _measured(run.key(97), np.broadcast_to(weight, (draws, n, m)), thetas),
    )[..., 0]
    law = np.array([ranks.intruder_value(values, (n, m), t, power=power) for t in thetas])
    mean, variance = found.mean(axis=0), found.var(axis=0, ddof=1)
    quantile = standard_errors(len(thetas), draws - 1)
    # z is a smooth function of the quadratic forms: its mean is off by half their variance times a
    # second derivative, of the order of 1/z.
    allowed = quantile * np.sqrt(variance / draws) + 2 * variance / law
    share = np.abs(mean - law) / allowed
    worst = int(np.argmax(share))

    def draw(ax):
        grid = np.linspace(0.5, 3.0, 40) * thetas[0] / MULTIPLES[0]
        ax.plot(grid, [ranks.intruder_value(values, (n, m), t) for t in grid], "--", label="law")
        ax.errorbar(thetas, mean, np.sqrt(variance), fmt="o", label="simulated, ± 1 sd")
        ax.axvline(thetas[0] / MULTIPLES[0], color="gray", linestyle=":", label="threshold")
        ax.set(xlabel="strength θ", ylabel="top singular value")
        ax.legend()

    return Evidence(
        measured={"values": mean.tolist()},
        predicted={"values": law.tolist()},
        error=float(np.abs(mean - law)[worst]),
        tolerance=float(allowed[worst]),
        draw=draw,
        caption=f"{n}×{m}, singular values i^(−{DECAY:g}), {draws} random directions.",
    )
