"""Claims on learning rates and multipliers across width and rank (theory §9).

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), LoRA+ (Hayou et al. 2024, arXiv:2402.12354) and μA
(arXiv:2602.06204); all recalled, with constants derived here. Networks are `vᵀ tanh(h)` with
`h = (W + s A B)ᵀ x`, W of variance 1/n and v of entries of order 1/n, so that the gradient of the
hidden layer does not depend on the width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorajax import laws
from lorajax.claims.base import Control, Evidence, Run, claim, standard_errors
from lorajax.claims.instances import RTOL, solver_error
from lorajax.factors import Factors
from lorajax.flows import gradient_flow
from lorajax.problems import ProductLoss
from lorajax.spectra import hitting_times

EPS = float(np.finfo(np.float64).eps)
RSLORA = "rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732), recalled; theory §9"
PLUS = "LoRA+: Hayou et al. 2024 (arXiv:2402.12354), recalled; theory §9"
MUA = "μA (arXiv:2602.06204), recalled; theory §9"
GAMMAS = (0.0, 0.5, 1.0)


def _slope(logs: np.ndarray, values: np.ndarray, bars: np.ndarray) -> tuple[float, float]:
    """The slope of a least-squares line, and its standard error from those of the values."""
    weights = (logs - logs.mean()) / np.sum((logs - logs.mean()) ** 2)
    return float(weights @ values), float(np.sqrt(np.sum((weights * bars) ** 2)))


@claim(
    "rslora2023.first_step",
    source=RSLORA,
    standing="recalled",
    tolerance="standard errors of means over A, as many as chance exceeds in any of the means in 1 "
    "of 1000 cases (`claims.SAMPLING_RISK`); the means are exact at any rank",
    control=Control("the exponent 2 of the multiplier becomes 2.1", {"exponent": 2.1}),
)
def first_step(run: Run, exponent: float = 2.0) -> Evidence:
    """The first gradient step of a network's LoRA lowers the loss by r^{1 − 2γ} times what full
    fine-tuning would take, for a multiplier r^{−γ} and A of variance 1: only 1/√r is stable."""
    n, draws, ranks = 24, run.pick(300, 3000), np.array([4.0, 16.0, 64.0])

    def simulate() -> np.ndarray:
        keys = jax.random.split(run.key(110), 4)
        x = jax.random.normal(keys[0], (16, n))
        w = jax.random.normal(keys[1], (n, n)) / n**0.5
        v = jax.random.normal(keys[2], (n,)) / n
        goal = jax.random.normal(keys[3], (16,))
        at = jax.grad(lambda d: jnp.mean((jnp.tanh(x @ (w + d)) @ v - goal) ** 2))
        g = np.asarray(at(jnp.zeros((n, n))))
        a = np.asarray(jax.random.normal(run.key(111), (draws, n, int(ranks[-1]))))
        # Columns of A are independent, so that the first r of them are an A of rank r.
        along = np.sum((np.swapaxes(a, 1, 2) @ g) ** 2, axis=2) / np.sum(g**2)
        return np.stack([along[:, : int(r)].sum(axis=1) for r in ranks], axis=1)

    share = run.once("first_step_shares", simulate)
    found = np.stack([share * ranks ** (-2 * gamma) for gamma in GAMMAS], axis=1)
    mean, bars = found.mean(axis=0), found.std(axis=0, ddof=1) / draws**0.5
    grid = [np.asarray(laws.gradient_step_gain(ranks, g, exponent=exponent)) for g in GAMMAS]
    law = np.stack(grid)
    off = np.abs(mean - law) / bars

    def draw(ax):
        for i, gamma in enumerate(GAMMAS):
            ax.errorbar(ranks, mean[i], bars[i], fmt=f"C{i}o", label=f"γ = {gamma:g}")
            ax.plot(ranks, law[i], f"C{i}--")
        ax.set(xlabel="rank", ylabel="decrease of the loss, LoRA / full", title="dashed: law")
        ax.set(xscale="log", yscale="log")
        ax.legend()

    slopes = [_slope(np.log(ranks), np.log(m), b / m)[0] for m, b in zip(mean, bars, strict=True)]
    return Evidence(
        measured={"exponents": slopes, "standard_errors_off": float(off.max())},
        predicted={"exponents": [1 - exponent * gamma for gamma in GAMMAS]},
        error=float(off.max()),
        # The three multipliers share their draws, hence the number of ranks.
        tolerance=standard_errors(len(ranks), draws - 1),
        draw=draw,
        caption=f"A network of width {n}; {draws} draws of A.",
    )


def _scaled_loss(update: Any, target: Any, multiplier: Any) -> Any:
    return 0.5 * jnp.sum((target - multiplier * update) ** 2)


@claim(
    "rslora2023.multiplier",
    source=RSLORA + "; the law is derived here",
    standing="derived",
    tolerance="solver error of both flows, 2 · steps · rtol each, the largest of the pairs",
    control=Control("the multiplier's exponent ½ beside A becomes 0.525", {"exponent": 0.525}),
)
def multiplier(run: Run, exponent: float = 0.5) -> Evidence:
    """Gradient flow of s A B is that of √s A, √s B without a multiplier, s times as fast, so that a
    mode first moves at the rate s² |Aᵀu|²: as the rank grows the time to its first hundredth stays
    for s = 1/√r, grows in proportion to r for 1/r, and vanishes for a fixed s."""
    shape, ranks, goal = (64, 8), (4, 16, 64), 0.002
    keys = jax.random.split(run.key(112))
    v = np.asarray(jax.random.normal(keys[0], (shape[1],)))
    v = v / np.linalg.norm(v)
    target = jnp.asarray(goal * np.outer(np.arange(shape[0]) == 0, v))
    # Entries ±1/√n, so that every row of r of them has the length that it has in the mean.
    full = np.asarray(jax.random.rademacher(keys[1], (shape[0], max(ranks)), float)) / 8
    cases = [(float(rank) ** -gamma, rank) for gamma in GAMMAS for rank in ranks]
    # Columns of zeros stay zero: all ranks have one size, so that their flows compile once.
    starts = [jnp.asarray(full * (np.arange(max(ranks)) < rank)) for _, rank in cases]
    lazy = [float(0.01 / (c**2 * rank / shape[0])) for c, rank in cases]
    times = np.linspace(0.0, 100 * np.array(lazy), 101, axis=1)

    def flow(multiplier: float, a: Any, times: Any) -> Any:
        problem = ProductLoss(_scaled_loss, shape, (target, jnp.asarray(multiplier)))
        start = Factors(a, jnp.zeros((max(ranks), shape[1])))
        # Between the ends of its steps the solver interpolates, less exactly.
        return gradient_flow(problem, start, times, rtol=RTOL, interpolate=False)

    def plain() -> list[Any]:
        found = []
        for (c, _), a, t in zip(cases, starts, times, strict=True):
            when, a = laws.multiplied_equivalent(t, a, c, exponent=exponent)
            found.append(flow(1.0, a, when))
        return found

    paths = run.once(
        "multiplied",
        lambda: [flow(c, a, t) for (c, _), a, t in zip(cases, starts, times, strict=True)],
    )
    law = run.once(("plain", exponent), plain)
    modes = []
    for each, factors in ((paths, [c for c, _ in cases]), (law, [1.0] * len(cases))):
        along = np.stack([np.asarray(path.factors.product)[:, 0] @ v for path in each])
        modes.append(np.array(factors)[:, None] * along / goal)
    first = [
        float(hitting_times(jnp.asarray(t), jnp.asarray(mode), 0.01))
        for t, mode in zip(times, modes[0], strict=True)
    ]

    def draw(ax):
        for i, gamma in enumerate(GAMMAS):
            mine = slice(3 * i, 3 * i + 3)
            ax.loglog(ranks, first[mine], f"C{i}o", label=f"s = r^(−{gamma:g})")
            ax.loglog(ranks, lazy[mine], f"C{i}--")
        ax.set(xlabel="rank", ylabel="time to σ = s/100", title="dashed: 0.01/(s² |Aᵀu|²)")
        ax.legend()

    error = float(np.abs(modes[0] - modes[1]).max())
    names = [f"times_to_a_hundredth_{gamma:g}" for gamma in GAMMAS]
    measured, predicted = (
        {name: each[3 * i : 3 * i + 3] for i, name in enumerate(names)} for each in (first, lazy)
    )
    return Evidence(
        measured={"sup_error": error} | measured,
        predicted={"sup_error": 0.0} | predicted,
        error=error,
        tolerance=max(solver_error(*pair) for pair in zip(paths, law, strict=True)),
        draw=draw,
        caption=f"One mode of size {goal:g}; A of signs/√{shape[0]}, B = 0.",
    )


def _samples(key: jax.Array, widths: Any, rank: int, outputs: int) -> tuple[jax.Array, ...]:
    """A sample's x, frozen pre-activations, output weights of order 1/n, and A, for each width.

    What lies beyond a width is zero and stays so: all widths have one size and compile once.
    """
    widths, keys = jnp.asarray(widths, float), jax.random.split(key, 4)
    most = round(float(widths.max()))
    inside = jnp.arange(float(most))[None] < widths[:, None]
    x = jnp.where(inside, jax.random.normal(keys[0], inside.shape), 0)
    h, v = (jax.random.normal(k, (len(widths), outputs)) for k in keys[1:3])
    a = jax.random.normal(keys[3], (*inside.shape, rank)) / widths[:, None, None] ** 0.5
    return x, h, v / widths[:, None], jnp.where(inside[:, :, None], a, 0)


@functools.partial(jax.jit, static_argnames="count")
def _sign_steps(
    samples: tuple[jax.Array, ...], rate_a: Any, rate_b: Any, multiplier: Any, *, count: int
) -> tuple[jax.Array, jax.Array]:
    """Changes of h after 1 … count sign steps towards a larger output, and `s xᵀA(0) B`."""
    x, h, v, a0 = samples

    def output(a: Any, b: Any) -> Any:
        changed = h + multiplier * jnp.einsum("bi,bir,brj->bj", x, a, b)
        return jnp.sum(v * jnp.tanh(changed))

    def step(state: Any, _: Any) -> Any:
        up = jax.grad(output, (0, 1))(*state)
        rates = rate_a, rate_b
        a, b = (y + rate * jnp.sign(g) for y, rate, g in zip(state, rates, up, strict=True))
        changes = [multiplier * jnp.einsum("bi,bir,brj->bj", x, each, b) for each in (a, a0)]
        return (a, b), changes

    start = a0, jnp.zeros((*a0.shape[::2], h.shape[1]))
    _, (changes, through_b) = jax.lax.scan(step, start, None, length=count)
    return changes, through_b


@claim(
    "mua2026.sign_steps",
    source=MUA + "; the law is derived here",
    standing="derived",
    tolerance="rounding of sums over the inputs, the ranks and the steps: eps times their numbers",
    control=Control("the factor 1 of A's part becomes 1.05", {"constant": 1.05}),
)
def sign_steps(run: Run, constant: float = 1.0) -> Evidence:
    """On one sample k steps of sign descent change every output of a network's LoRA layer by
    s η_B k ‖Aᵀx‖₁ + s η_A η_B r ‖x‖₁ k (k − 1), whatever lies above it: B's part does not grow
    with the width, that of A and B together does."""
    widths, rank, outputs, count = (16, 64, 256), 4, 12, 8
    rate_a, rate_b, s = 0.01, 0.02, rank**-0.5
    samples = _samples(run.key(120), widths, rank, outputs)
    changes, _ = run.once(
        "sign_steps", lambda: _sign_steps(samples, rate_a, rate_b, s, count=count)
    )
    k = np.arange(1.0, count + 1)
    x, _, v, a = samples
    inputs, start = jnp.abs(x).sum(1), jnp.abs(jnp.einsum("bi,bir->br", x, a)).sum(1)
    parts = laws.sign_change(
        k[None], rate_a, rate_b, inputs[:, None], start[:, None], rank, s, constant=constant
    )
    law = np.asarray(parts[0] + parts[1])
    towards = np.asarray(changes).transpose(1, 0, 2) * np.sign(np.asarray(v))[:, None]
    found, off = towards.mean(axis=2), float(np.abs(towards / law[:, :, None] - 1).max())

    def draw(ax):
        for i, n in enumerate(widths):
            ax.plot(k, found[i], f"C{i}o", label=f"width {n}")
            ax.plot(k, law[i], f"C{i}--")
        ax.set(xlabel="steps", ylabel="change of an output of the layer", title="dashed: law")
        ax.legend()

    return Evidence(
        measured={f"width_{n}": row.tolist() for n, row in zip(widths, found, strict=True)},
        predicted={f"width_{n}": row.tolist() for n, row in zip(widths, law, strict=True)},
        error=off,
        tolerance=EPS * (max(widths) + rank) * count,
        draw=draw,
        caption=f"vᵀ tanh(h + s Bᵀ Aᵀ x), {outputs} hidden units, rank {rank}.",
    )


@claim(
    "lora_plus2024.balance",
    source=PLUS + "; the constant is derived here",
    standing="recalled",
    tolerance="standard errors of a mean over samples, as many as chance exceeds in any of the "
    "widths in 1 of 1000 cases, and 1/n for E‖Aᵀx‖₁, whose x is not of length √n exactly",
    control=Control("the exponent 1 of the width becomes 1.05", {"exponent": 1.05}),
)
def balance(run: Run, exponent: float = 1.0) -> Evidence:
    """In a network of width n the second sign step changes the outputs η_A n times as much through
    A as through B, whatever the rank and η_B: with one rate for both, feature learning at a large
    width leaves B behind, and η_B/η_A in proportion to n moves both alike."""
    widths, rank, outputs, draws = np.array([16, 64, 256]), 4, 3, run.pick(500, 4000)
    rate_a, rate_b, s = 0.01, 0.5, rank**-1.0

    def simulate() -> np.ndarray:
        samples = _samples(run.key(124), np.repeat(widths, draws), rank, outputs)
        changes, through_b = _sign_steps(samples, rate_a, rate_b, s, count=2)
        # What A's step adds at B's first value: half of what both add, B having doubled.
        sizes = (changes[1] - through_b[1]) / 2, through_b[1] - through_b[0]
        sizes = np.stack([np.abs(np.asarray(each)).mean(axis=1) for each in sizes], axis=1)
        return sizes.reshape(len(widths), draws, 2)

    found = run.once("balance", simulate)
    means = found.mean(axis=1)
    relative = found.std(axis=1, ddof=1) / draws**0.5 / means
    ratio, bars = means[:, 0] / means[:, 1], np.hypot(relative[:, 0], relative[:, 1])
    law = np.asarray(laws.factor_balance(rate_a, widths.astype(float), exponent=exponent))
    allowed = standard_errors(len(widths), draws - 1) * bars + 1 / widths
    off = np.abs(ratio / law - 1)
    worst = int(np.argmax(off / allowed))
    slope, _ = _slope(np.log(widths), np.log(ratio), bars)

    def draw(ax):
        ax.errorbar(widths, ratio, bars * ratio, fmt="o", label="simulated")
        ax.plot(widths, law, "--", label="η_A n")
        ax.set(xlabel="width", ylabel="change through A / through B", xscale="log", yscale="log")
        ax.legend()

    return Evidence(
        measured={"ratios": ratio.tolist(), "exponent": slope},
        predicted={"ratios": law.tolist(), "exponent": exponent},
        error=float(off[worst]),
        tolerance=float(allowed[worst]),
        draw=draw,
        caption=f"Means over {draws} samples, rank {rank}, η_A = {rate_a:g}.",
    )


SAMPLES, OUTPUTS, STEPS, STD, CENTER = 4, 16, 10, 0.01, 0.08


@jax.jit
def _trained(data: tuple[jax.Array, ...], a0: Any, multiplier: Any, rates: Any) -> jax.Array:
    """Loss after STEPS steps of Adam over that before, for every lane and rate."""
    adam = optax.scale_by_adam(eps=1e-30)

    def one(data: Any, a0: Any, multiplier: Any, rate: Any) -> Any:
        x, h, v, goal = data
        before = jnp.tanh(h) @ v

        def loss(pair: Any) -> Any:
            after = jnp.tanh(h + multiplier * ((x @ pair[0]) @ pair[1])) @ v
            return jnp.mean((after - before - goal) ** 2)

        def step(state: Any, _: Any) -> Any:
            pair, kept = state
            moved, kept = adam.update(jax.grad(loss)(pair), kept, pair)
            return (jax.tree.map(lambda y, d: y - rate * d, pair, moved), kept), None

        pair = a0, jnp.zeros((a0.shape[1], OUTPUTS))
        (pair, _), _ = jax.lax.scan(step, (pair, adam.init(pair)), None, length=STEPS)
        return loss(pair) / jnp.mean(goal**2)

    over_rates = jax.vmap(one, (None, None, None, 0))
    return jax.vmap(over_rates)(data, a0, multiplier, rates)


def _halving_rates(key: jax.Array, sizes: np.ndarray, draws: int) -> np.ndarray:
    """Logarithm of the rate at which training halves the loss, (sizes, draws); a row is n, r, γ.

    One draw serves all sizes, so that their differences are those of width and rank.
    """
    (n, r, gamma), keys = sizes.T, jax.random.split(key, 5)
    most, count = (int(n.max()), int(r.max())), len(sizes) * draws
    rows = (np.arange(most[0]) < n[:, None])[:, None, None, :]
    columns = (np.arange(most[1]) < r[:, None])[:, None, None, :]
    x = rows * np.asarray(jax.random.normal(keys[0], (1, draws, SAMPLES, most[0])))
    a0 = np.asarray(jax.random.normal(keys[1], (1, draws, *most))) * columns
    a0 = STD * a0 * rows.swapaxes(2, 3) / n[:, None, None, None] ** 0.5
    h = jax.random.normal(keys[2], (draws, SAMPLES, OUTPUTS))
    v = jax.random.rademacher(keys[3], (draws, OUTPUTS), float) / OUTPUTS
    goal = 0.3 * jax.random.rademacher(keys[4], (draws, SAMPLES), float)
    rest = [np.tile(np.asarray(y), (len(sizes),) + (1,) * (y.ndim - 1)) for y in (h, v, goal)]
    data = tuple(map(jnp.asarray, (x.reshape(count, *x.shape[2:]), *rest)))
    logs = np.log(CENTER * np.asarray(laws.carried_rate(n, r, gamma)))
    logs = np.repeat(logs, draws)[:, None] + np.log(2) * np.array([-0.5, 0.0, 0.5])
    multiplier = jnp.asarray(np.repeat(r**-gamma, draws))
    with jax.numpy_dtype_promotion("standard"):  # optax's own bias correction mixes dtypes
        a0 = jnp.asarray(a0.reshape(count, *most))
        losses = np.log(2 * np.asarray(_trained(data, a0, multiplier, jnp.asarray(np.exp(logs)))))
    # A straight line through the two rates around it, or next to it.
    high = np.where(losses[:, 1] > 0, 2, 1)
    pick = np.arange(count)
    (l0, l1), (x0, x1) = ((y[pick, high - 1], y[pick, high]) for y in (losses, logs))
    return (x0 - l0 * (x1 - x0) / (l1 - l0)).reshape(len(sizes), draws)


@claim(
    "mua2026.carried_rate",
    source=MUA,
    standing="recalled",
    tolerance="standard errors of a mean over draws, as many as chance exceeds in any of four "
    "exponents in 1 of 1000 cases, and finite size: 1/n of the smallest width over the range of "
    "ln n, and what A's start leaves in `laws.sign_change`, a quarter of σ/(η n (k − 1))",
    control=Control("the exponent −½ of the width becomes −0.525", {"width_exponent": -0.525}),
)
def carried_rate(run: Run, width_exponent: float = -0.5, rank_exponent: float = -0.5) -> Evidence:
    """The rate at which ten steps of Adam halve the loss of a network's LoRA goes with its width
    and rank as n^{−½} r^{−(1−γ)/2}, for multipliers r^{−γ}; at 1/r it is one rate for all ranks."""
    draws = run.pick(128, 512)
    groups = [[(n, 8, 0.5) for n in (64, 256, 1024)]]
    groups += [[(64, r, gamma) for r in (4, 16, 64)] for gamma in GAMMAS]
    wide, deep = np.array(groups[0], float), np.array(sum(groups[1:], []), float)

    def simulate() -> np.ndarray:
        parts = [_halving_rates(run.key(126 + i), s, draws) for i, s in enumerate((wide, deep))]
        return np.concatenate(parts).reshape(len(groups), 3, draws)

    found = run.once("halving_rates", simulate)
    sizes = np.concatenate([wide, deep]).reshape(len(groups), 3, 3)
    axes = [0, 1, 1, 1]
    logs = np.stack([np.log(s[:, axis]) for s, axis in zip(sizes, axes, strict=True)])
    span = logs[:, 2] - logs[:, 0]
    slopes = (found[:, 2] - found[:, 0]) / span[:, None]
    mean, bars = slopes.mean(axis=1), slopes.std(axis=1, ddof=1) / draws**0.5
    factors = [
        np.asarray(
            laws.carried_rate(*s.T, width_exponent=width_exponent, rank_exponent=rank_exponent)
        )
        for s in sizes
    ]
    law = np.array([np.log(y[2] / y[0]) for y in factors]) / span
    left = STD / (np.exp(found.mean(axis=2)) * sizes[:, :, 0] * (STEPS - 1)) / 4
    allowed = standard_errors(len(groups), draws - 1) * bars + 1 / 64 / span + left.max(axis=1)
    off = np.abs(mean - law)
    worst = int(np.argmax(off / allowed))

    def draw(ax):
        labels = ["width, γ = 0.5"] + [f"rank, γ = {gamma:g}" for gamma in GAMMAS]
        for i, label in enumerate(labels):
            rates = found[i].mean(axis=1)
            start = np.exp(logs[i] - logs[i, 0])
            ax.loglog(start, np.exp(rates - rates[0]), f"C{i}o", label=label)
            ax.loglog(start, factors[i] / factors[i][0], f"C{i}--")
        ax.set(xlabel="width or rank, over the first", ylabel="rate, over the first")
        ax.set_title("dashed: law")
        ax.legend()

    return Evidence(
        measured={"exponents": mean.tolist()},
        predicted={"exponents": law.tolist()},
        error=float(off[worst]),
        tolerance=float(allowed[worst]),
        draw=draw,
        caption=f"{SAMPLES} samples, {STEPS} steps of Adam, {draws} draws.",
    )
