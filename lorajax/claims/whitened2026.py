"""Claims on the whitened rank rule (Lin 2026, report read; theory §9)."""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import laws, ranks
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim, standard_errors

SOURCE = "whitened rank rule: Lin 2026 (report read); theory §9"
EPS = float(np.finfo(np.float64).eps)
SHAPE, SAMPLES, FEW = (30, 20), 1000, 100
STRENGTHS = np.geomspace(0.1, 10.0, SHAPE[0])
"""Standard deviations of the inputs along the principal axes of their covariance."""


def _numbers(run: Run, index: int) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(run.key(index))))


def _frame(numbers: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(numbers.normal(size=(size, size)))[0]


@claim(
    "whitened2026.excess_risk",
    source=SOURCE,
    standing="stated",
    tolerance="what alternating least squares has left after its last sweep, the next one's gain "
    "over 1 − (σ_{r+1}/σ_r)⁴, and rounding: eps · κ(C)",
    control=Control("the factor ½ becomes 0.525", {"constant": 0.525}),
)
def excess_risk(run: Run, constant: float = 0.5) -> Evidence:
    """The best rank-r update of a linear model has the excess risk ½ Σ_{i>r} σ_i(C^{½} Δ)² for
    inputs of covariance C; the best rank-r approximation of Δ itself has a larger one."""
    numbers = _numbers(run, 130)
    axes, (m, n) = _frame(numbers, SHAPE[0]), SHAPE
    root = (axes * STRENGTHS) @ axes.T
    # Every mode of the whitened update stands out of the next by as much.
    values = 2.0 ** -np.arange(8.0)
    left, right = _frame(numbers, m)[:, :8], _frame(numbers, n)[:8]
    delta = np.linalg.solve(root, (left * values) @ right)
    picks = np.arange(1, 8)
    found, plain, gains = [], [], []
    u, s, vt = np.linalg.svd(delta)
    for rank in picks:
        b, last = numbers.normal(size=(rank, n)), np.inf
        for _ in range(60):
            a = np.linalg.lstsq(b.T, delta.T, rcond=None)[0].T
            b = np.linalg.lstsq(root @ a, root @ delta, rcond=None)[0]
            risk, before = 0.5 * np.sum((root @ (delta - a @ b)) ** 2), last
            last = risk
        found.append(last)
        gains.append(max(before - last, 0.0))
        cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
        plain.append(float(0.5 * np.sum((root @ (delta - cut)) ** 2)))
    whole = jnp.asarray(values)
    law = np.array([float(laws.whitened_risk(whole, int(r), constant=constant)) for r in picks])
    found, scale = np.array(found), 0.5 * np.sum(values**2)
    error = float(np.abs(found - law).max() / scale)

    def draw(ax):
        ax.semilogy(picks, found, "o", label="best of its rank, by descent")
        ax.semilogy(picks, law, "k_", markersize=14, label="law")
        ax.semilogy(picks, plain, "x", label="best approximation of Δ")
        ax.set(xlabel="rank", ylabel="excess risk")
        ax.legend()

    ratio = STRENGTHS[-1] / STRENGTHS[0]
    return Evidence(
        measured={"risks": found.tolist(), "of_plain": plain},
        predicted={"risks": law.tolist()},
        error=error,
        tolerance=float(max(gains) / (1 - 0.5**4) / scale + EPS * ratio**2),
        draw=draw,
        caption=f"{m}×{n}, inputs' standard deviations from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g}.",
    )


def _whitened_spectra(run: Run) -> dict[str, np.ndarray]:
    """Spectra of gradients and of half-differences, whitened and not, over draws of data."""
    numbers, (m, n) = _numbers(run, 131), SHAPE
    draws, samples = run.pick(12, 200), SAMPLES
    axes = _frame(numbers, m)
    found: dict[str, list[np.ndarray]] = {}
    for name, strengths in (("anisotropic", STRENGTHS), ("white", np.ones(m))):
        root = (axes * strengths) @ axes.T
        # Along a weak, a middling and a strong axis of the inputs.
        left, right = axes[:, [m // 8, m // 2, 7 * m // 8]], _frame(numbers, n)[:3]
        delta = np.linalg.solve(root, left @ right)
        for _ in range(10 * draws):
            # The law is exact for any number of samples.
            x = numbers.normal(size=(FEW, m)) @ root
            values, vectors = np.linalg.eigh(x.T @ x / FEW)
            pure = x.T @ numbers.normal(size=(FEW, n)) / FEW
            found.setdefault(f"{name} noise", []).append(
                (vectors * values**-0.5) @ vectors.T @ pure
            )
        for _ in range(draws):
            x = numbers.normal(size=(samples, m)) @ root
            noise = numbers.normal(size=(samples, n))
            signs = np.repeat([1.0, -1.0], samples // 2)[:, None]
            cov = x.T @ x / samples
            values, vectors = np.linalg.eigh(cov)
            inverse = (vectors * values**-0.5) @ vectors.T
            y = x @ delta + noise
            mean, rest = (x.T @ z / samples for z in (y, signs * y))
            for kind, turn in (("plain", np.eye(m)), ("whitened", inverse)):
                found.setdefault(f"{name} {kind}", []).append(turn @ mean)
                found.setdefault(f"{name} {kind} half", []).append(turn @ rest)
    return {name: np.linalg.svd(np.stack(each), compute_uv=False) for name, each in found.items()}


@claim(
    "whitened2026.rank_rule",
    source=SOURCE + "; the noise is derived here",
    standing="derived",
    tolerance="standard errors of a mean over data, as many as chance exceeds in any of two means "
    "in 1 of 1000 cases (`claims.SAMPLING_RISK`); the mean is exact",
    control=Control("the noise's factor 1 becomes 1.05", {"constant": 1.05}),
)
def rank_rule(run: Run, constant: float = 1.0) -> Evidence:
    """Whitened, the noise of a gradient is σ² m n_out/n in the mean square whatever the inputs'
    covariance, so that the split-half floor finds the rank of C^{½} Δ where the plain gradient's
    does not; for white inputs both find the same."""
    spectra = run.once("whitened_spectra", lambda: _whitened_spectra(run))
    names = ("anisotropic", "white")
    squares = np.stack([np.sum(spectra[f"{name} noise"] ** 2, axis=1) for name in names])
    law = float(laws.whitened_noise(SHAPE, 1.0, FEW, constant=constant))
    draws = squares.shape[1]
    bars = squares.std(axis=1, ddof=1) / draws**0.5
    off = np.abs(squares.mean(axis=1) - law) / bars
    worst = int(np.argmax(off))
    counts = {}
    for name in names:
        for kind in ("plain", "whitened"):
            rule = ranks.rule("whitened" if kind == "whitened" else "split_half")
            found = rule(
                jnp.asarray(spectra[f"{name} {kind}"]),
                shape=SHAPE,
                samples=SAMPLES,
                floor=jnp.asarray(spectra[f"{name} {kind} half"][:, 0]),
            )
            counts[f"{name}_{kind}"] = float(np.asarray(found.rank).mean())

    def draw(ax):
        ax.semilogy(spectra["anisotropic plain"][0], "o", label="plain")
        ax.semilogy(spectra["anisotropic whitened"][0], "s", label="whitened")
        for i, kind in enumerate(("plain", "whitened")):
            ax.axhline(spectra[f"anisotropic {kind} half"][0, 0], color=f"C{i}", linestyle=":")
        ax.set(xlabel="index", ylabel="singular value of the gradient", title="dotted: floors")
        ax.legend()

    return Evidence(
        measured={"noise": squares.mean(axis=1).tolist()} | counts,
        predicted={"noise": [law, law]},
        error=float(off[worst]),
        tolerance=standard_errors(len(names), draws - 1),
        assumptions=(
            Assumption(
                "whitened, three directions are found in both cases; plain, for white inputs",
                bool(
                    abs(counts["anisotropic_whitened"] - 3) < 0.1
                    and abs(counts["white_whitened"] - 3) < 0.1
                    and abs(counts["white_plain"] - 3) < 0.1
                    and abs(counts["anisotropic_plain"] - 3) > 0.5
                ),
                f"mean ranks {counts}",
            ),
        ),
        draw=draw,
        caption=f"{SHAPE[0]}×{SHAPE[1]}, {SAMPLES} samples, three directions of size 1.",
    )
