"""How much does a sweep of flows cost, and how far is it from the machine's limit?

    python -m benchmarks sweeps [--quick] [--json FILE] [--plot FILE [--of FILE]]

Every engine of a case runs on the same starts (scales 1 to 1e-8) and is observed at the same times;
beside its time stands its largest error against a reference of tolerance 1e-12 or better.
`reducible` is matrix factorization, k = 4, r = 8, singular values at 200 times, error relative to
s_1. `two_layer` is two frozen layers with a shift of rank one, losses at 50 times, error relative
to the first loss. Starts are given as full factors; reductions are part of the time. Slow peers run
a sample of lanes.

Our engines run with the loosest tolerance that keeps their error within 1e-8. Peers run with rtol
1e-8, and atol 1e-8 of the start's size, whatever error that gives: tighter ones cost them more.
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import lorajax
from benchmarks.machine import Watch
from lorajax import environment, initializers
from lorajax.exact import lanes as exact_lanes
from lorajax.exact import reduce
from lorajax.factors import Factors
from lorajax.flows import lanes
from lorajax.problems import MatrixFactorization, TwoLayer, TwoLayerFactors

SPECTRUM = (4.0, 3.0, 2.0, 1.0)
RANK, LANES, TIMES, UNTIL = 8, 180, 200, 20.0
TARGET = 1e-8
TOLERANCES = (1e-8, 1e-9, 3e-10, 1e-10)
PEER = 1e-8
SCANS = ("against_lanes", "against_ranks")
"""Marks of rows in which something else than the size changes."""


def clock(run: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Wall seconds of repeated runs after one that compiles, and the last result.

    Runs of milliseconds are repeated for two seconds: a handful could all fall into one moment in
    which the machine does something else.
    """
    result = jax.block_until_ready(run())
    seconds: list[float] = []
    while len(seconds) < repeats or (repeats > 1 and sum(seconds) < 2):
        begin = time.perf_counter()
        result = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return seconds, result


def gemm_rate(size: int = 2000) -> float:
    """Float64 operations a second in a matrix product, the best of several."""
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: a @ a)
    return 2.0 * size**3 / min(clock(lambda: product(a), 7)[0])


class Rows:
    """The table as it grows, printed line by line."""

    def __init__(self, save: Callable[["Rows"], None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.save = save

    def add(self, case: str, size: int, engine: str, count: int, seconds, error: float, **more):
        per_lane = [s / count for s in seconds]
        row = {
            "case": case,
            "size": size,
            "engine": engine,
            "lanes": count,
            "seconds_per_lane": float(np.median(per_lane)),
            "spread": [float(min(per_lane)), float(max(per_lane))],
            "repeats": len(per_lane),
            "max_error": float(error),
            **more,
        }
        self.rows.append(row)
        print(
            f"{case:>10} {size:>5} {engine:<22} {count:>4} lanes "
            f"{row['seconds_per_lane']:.3e} s a lane  error {error:.1e}"
            + "".join(f"  {k} {v:.3g}" for k, v in more.items()),
            flush=True,
        )
        self.save(self)

    def of(self, case: str, size: int, engine: str) -> float | None:
        for row in self.rows:
            if any(row.get(scan) for scan in SCANS):
                continue
            if (row["case"], row["size"], row["engine"]) == (case, size, engine):
                return row["seconds_per_lane"]
        return None


def within_target(run: Callable[[float], tuple[list[float], float]]):
    """Runs with the loosest tolerance whose error is within the target."""
    for rtol in TOLERANCES[:-1]:
        seconds, error = run(rtol)
        if error <= TARGET:
            return seconds, error, rtol
    return *run(TOLERANCES[-1]), TOLERANCES[-1]


def make_starts(shape: tuple[int, int], rank: int, count: int) -> tuple[np.ndarray, Factors]:
    """Orthogonal starts of scales 1 to 1e-8, lanes on the first axis."""
    scales = np.repeat(np.logspace(0, -8, 9), -(-count // 9))[:count]

    def one(key, scale):
        return initializers.orthogonal(key, shape, rank, scale)

    keys = jax.random.split(jax.random.key(1), count)
    return scales, jax.jit(jax.vmap(one))(keys, jnp.asarray(scales))


def lane(factors, i: int):
    return jax.tree.map(lambda x: x[i], factors)


def scipy_loop(field, start: np.ndarray, times: np.ndarray, rtol: float, atol: float, method: str):
    solution = solve_ivp(
        field, (0.0, float(times[-1])), start, method=method, rtol=rtol, atol=atol, t_eval=times
    )
    return solution.y.T


def factor_fields(target: np.ndarray, rank: int):
    """Residual and Gram form of the field in numpy, on flattened factors."""
    (m, n), r = target.shape, rank

    def split(z):
        return z[: m * r].reshape(m, r), z[m * r :].reshape(r, n)

    def residual(t, z):
        a, b = split(z)
        g = target - a @ b
        return np.concatenate([(g @ b.T).ravel(), (a.T @ g).ravel()])

    def gram(t, z):
        a, b = split(z)
        da, db = target @ b.T - a @ (b @ b.T), a.T @ target - (a.T @ a) @ b
        return np.concatenate([da.ravel(), db.ravel()])

    return split, residual, gram


def values_of(split, path: np.ndarray, rank: int) -> np.ndarray:
    found = []
    for z in path:
        a, b = split(z)
        found.append(np.linalg.svd(np.linalg.qr(a)[1] @ np.linalg.qr(b.T)[1].T, compute_uv=False))
    return np.stack(found)[:, :rank]


def reference(problem: MatrixFactorization, factors: Factors, scale: float, times: np.ndarray):
    """Singular values by DOP853 at 1e-13 in the reduced frames, independent of all engines."""
    reduced = reduce(problem, factors)
    target, core = np.asarray(reduced.problem.target), reduced.factors
    split, _, gram = factor_fields(target, core.rank)
    start = np.concatenate([np.asarray(core.a).ravel(), np.asarray(core.b).ravel()])
    path = scipy_loop(gram, start, times, 1e-13, 1e-14 * scale, "DOP853")
    return values_of(split, path, problem.rank)


def closed_form_flops(columns: int, modes: int, sweeps: float) -> float:
    """Useful operations of one lane and time; an exponential, root or division counts as one.

    Scaled columns and their C (both Gram sums over the lower trapezoid, C symmetric), its Cholesky
    factor, the triangular solve, and `sweeps` of one-sided Jacobi with three inner products, 14
    operations for the angle and six a row for a rotation.
    """
    c, k = columns, modes
    scaling = 8 * k + 12 * c + 9 * c * k
    gram = c * (c + 1) / 2 * (4 * k + 6)
    cholesky = c**3 / 3 + c**2
    solve = k * c**2
    rotations = sweeps * c * (c - 1) / 2 * (3 * (2 * k - 1) + 14 + 6 * k)
    return scaling + gram + cholesky + solve + rotations + 4 * c


def on_devices(function, lanes_of, repeats: int) -> tuple[list[float], Any]:
    """Seconds and results of a function of lanes, each device running a share as `sweep` does."""
    devices, run = jax.devices(), jax.jit(function)
    leaves, treedef = jax.tree.flatten(lanes_of)
    shares = zip(*(np.array_split(leaf, len(devices)) for leaf in leaves), strict=True)
    placed = [
        jax.device_put(treedef.unflatten(share), device)
        for share, device in zip(shares, devices, strict=True)
    ]
    seconds, parts = clock(lambda: [run(share) for share in placed], repeats)
    return seconds, jax.tree.map(lambda *x: np.concatenate(x), *parts)


def plain_vmap(problem, factors, times, rtol, scales, observe):
    """What a first attempt looks like: `vmap` over `diffeqsolve` of the residual form."""

    def residual(t, y, _):
        g = problem.target - y.a @ y.b
        return Factors(g @ y.b.T, y.a.T @ g)

    def one(start, atol):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(residual),
            diffrax.Tsit5(),
            0.0,
            times[-1],
            None,
            start,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=100_000,
        )
        return observe(solution.ys)

    return jax.jit(jax.vmap(one))(factors, rtol * scales)


def torch_batched(target, factors: Factors, times, rtol: float, atol: float):
    """Dopri8 of torchdiffeq on all lanes as one state, in Gram form; singular values by torch."""
    import torch
    from torchdiffeq import odeint

    s = torch.as_tensor(np.array(target))

    def field(t, y):
        a, b = y
        bt, at = b.transpose(1, 2), a.transpose(1, 2)
        return s @ bt - a @ (b @ bt), at @ s - (at @ a) @ b

    start = tuple(torch.as_tensor(np.array(x)) for x in factors)
    ts = torch.as_tensor(np.array(times))
    with torch.no_grad():
        path: Any = odeint(field, start, ts, rtol=rtol, atol=atol, method="dopri8")
        a, b = path
        r_a = torch.linalg.qr(a, mode="r")[1]
        r_b = torch.linalg.qr(b.transpose(-1, -2), mode="r")[1]
        values = torch.linalg.svdvals(r_a @ r_b.transpose(-1, -2))
    return np.moveaxis(values.numpy(), 0, 1)


def has_torch() -> bool:
    try:
        import torchdiffeq  # noqa: F401
    except ImportError:
        return False
    return True


def run_closed(problem, factors: Factors, t, repeats: int):
    """Seconds and singular values of the closed form on all devices."""

    def closed(factors):
        found = lanes.closed_form(problem, factors, t, one_sided=True)
        return found.observed["singular_values"]

    return on_devices(closed, factors, repeats)


def run_reduced(problem, factors: Factors, t, rtol: float, repeats: int):
    """Seconds and singular values of the reduced ODE on all devices."""

    def reduced(factors):
        found = lanes.reduced_ode(problem, factors, t, one_sided=True, rtol=rtol)
        return found.observed["singular_values"]

    return on_devices(reduced, factors, repeats)


def counted(problem, scales, factors: Factors, t) -> tuple[float, float]:
    """Jacobi sweeps and useful operations of a lane of the closed form."""
    k, count = problem.rank, scales.shape[0]
    form = exact_lanes.one_sided(
        jnp.broadcast_to(problem.singular_values, (count, k)),
        jnp.asarray(scales**2),
        jnp.einsum("mk,lmr->lkr", problem.u, factors.a),
    )
    sweeps = float(exact_lanes.jacobi_sweeps(form, t))
    size, rank = factors.a.shape[1:]
    flops = t.shape[0] * closed_form_flops(k, k, sweeps) + 2.0 * size * (k + 1) * rank
    return sweeps, flops


def against_reference(problem, factors, scales, times, checked) -> Callable[[Any], float]:
    """The largest error of singular values over s₁, by some lanes."""
    truth = np.stack([reference(problem, lane(factors, i), scales[i], times) for i in checked])

    def error(values: Any) -> float:
        found = np.asarray(values)[np.array(checked)][..., : truth.shape[-1]]
        return float(np.max(np.abs(found - truth))) / SPECTRUM[0]

    return error


def against_lanes(rows: Rows, options: argparse.Namespace, gemm: float) -> None:
    """Our engines on the reducible case for more and more lanes, and what a plain vmap does."""
    size, times = 64, np.linspace(0.0, UNTIL, TIMES)
    problem = MatrixFactorization.from_spectrum(jax.random.key(0), (size, size), SPECTRUM)
    t = jnp.asarray(times)
    for count in options.lanes:
        scales, factors = make_starts((size, size), RANK, count)
        checked = list(range(0, count, -(-count // 9)))
        error = against_reference(problem, factors, scales, times, checked)
        seconds, values = run_closed(problem, factors, t, options.repeats)
        sweeps, flops = counted(problem, scales, factors, t)
        rate = flops / (np.median(seconds) / count)
        rows.add(
            "reducible",
            size,
            "closed_form",
            count,
            seconds,
            error(values),
            jacobi_sweeps=sweeps,
            flops_per_lane=flops,
            flop_rate=rate,
            fraction_of_gemm=rate / gemm,
            against_lanes=True,
        )
        if count <= 1800:
            seconds, values = run_reduced(problem, factors, t, TOLERANCES[2], options.repeats)
            rows.add(
                "reducible",
                size,
                "reduced_ode",
                count,
                seconds,
                error(values),
                rtol=TOLERANCES[2],
                against_lanes=True,
            )
        if count <= 180:
            found = clock(
                lambda problem=problem, factors=factors, scales=scales: plain_vmap(
                    problem,
                    factors,
                    t,
                    jnp.asarray(PEER),
                    jnp.asarray(scales),
                    lorajax.spectra.singular_values,
                ),
                1,
            )
            rows.add(
                "reducible",
                size,
                "plain_vmap",
                count,
                found[0],
                error(found[1]),
                rtol=PEER,
                against_lanes=True,
            )


def against_ranks(rows: Rows, options: argparse.Namespace, gemm: float) -> None:
    """Our engines for adapters and targets of higher and higher rank, at size 64."""
    size, times = 64, np.linspace(0.0, UNTIL, TIMES)
    t = jnp.asarray(times)
    for rank in options.ranks:
        spectrum = np.linspace(4.0, 1.0, rank) if rank > 1 else np.array([4.0])
        key, shape = jax.random.key(0), (size, size)
        problem = MatrixFactorization.from_spectrum(key, shape, tuple(map(float, spectrum)))
        scales, factors = make_starts(shape, rank, LANES)
        checked = [0, LANES // 2, LANES - 1]
        error = against_reference(problem, factors, scales, times, checked)
        seconds, values = run_closed(problem, factors, t, options.repeats)
        sweeps, flops = counted(problem, scales, factors, t)
        rate = flops / (np.median(seconds) / LANES)
        more: dict[str, Any] = {"rank": rank, "against_ranks": True}
        rows.add(
            "reducible",
            size,
            "closed_form",
            LANES,
            seconds,
            error(values),
            jacobi_sweeps=sweeps,
            flops_per_lane=flops,
            flop_rate=rate,
            fraction_of_gemm=rate / gemm,
            **more,
        )
        seconds, values = run_reduced(problem, factors, t, TOLERANCES[2], options.repeats)
        more["rtol"] = TOLERANCES[2]
        rows.add("reducible", size, "reduced_ode", LANES, seconds, error(values), **more)


def reducible(rows: Rows, size: int, options: argparse.Namespace, gemm: float) -> None:
    """All engines on matrix factorization of one size."""
    shape, times = (size, size), np.linspace(0.0, UNTIL, TIMES)
    problem = MatrixFactorization.from_spectrum(jax.random.key(0), shape, SPECTRUM)
    scales, factors = make_starts(shape, RANK, LANES)
    k = problem.rank
    checked = list(range(0, LANES, LANES // 9))[:9]
    truth = {i: reference(problem, lane(factors, i), scales[i], times) for i in checked}

    def error(values, which) -> float:
        compared = [i for i in which if i in truth]
        found = [
            np.max(np.abs(np.asarray(values[which.index(i)])[:, :k] - truth[i])) for i in compared
        ]
        return float(max(found)) / SPECTRUM[0]

    everyone, t = list(range(LANES)), jnp.asarray(times)
    seconds, values = run_closed(problem, factors, t, options.repeats)
    sweeps, flops = counted(problem, scales, factors, t)
    rate = flops / (np.median(seconds) / LANES)
    rows.add(
        "reducible",
        size,
        "closed_form",
        LANES,
        seconds,
        error(values, everyone),
        jacobi_sweeps=sweeps,
        flops_per_lane=flops,
        flop_rate=rate,
        fraction_of_gemm=rate / gemm,
    )

    def reduced(rtol):
        seconds, values = run_reduced(problem, factors, t, rtol, options.repeats)
        return seconds, error(values, everyone)

    seconds, worst, rtol = within_target(reduced)
    rows.add("reducible", size, "reduced_ode", LANES, seconds, worst, rtol=rtol)

    sample = checked[:: 8 // max(1, options.sample - 1)] if options.sample > 1 else [checked[4]]
    # A batched peer costs less a lane the more lanes it has, until its products fill the machine.
    many = max(9, options.many if size < 512 else options.many // 4)
    batch = list(range(0, LANES, -(-LANES // many)))
    together = jax.tree.map(lambda x: x[np.array(batch)], factors)
    if size <= options.largest_full:

        def full(rtol):
            run = jax.jit(
                functools.partial(
                    lanes.full_ode,
                    problem,
                    observe=lambda f: {"v": lorajax.spectra.singular_values(f)},
                )
            )
            seconds, found = clock(lambda: run(together, t, rtol=rtol), 1)
            return seconds, error(found.observed["v"], batch)

        seconds, worst, rtol = within_target(full)
        rows.add("reducible", size, "full_ode", len(batch), seconds, worst, rtol=rtol)

        def plain(rtol):
            atol_scales = jnp.asarray(scales[np.array(batch)])
            seconds, values = clock(
                lambda: plain_vmap(
                    problem,
                    together,
                    t,
                    jnp.asarray(rtol),
                    atol_scales,
                    lorajax.spectra.singular_values,
                ),
                1,
            )
            return seconds, error(values, batch)

        seconds, worst = plain(PEER)
        rows.add("reducible", size, "plain_vmap", len(batch), seconds, worst, rtol=PEER)
        if has_torch() and size <= options.largest_torch:

            def torch_run(rtol):
                begin = time.perf_counter()
                values = torch_batched(problem.target, together, times, rtol, rtol * 1e-8)
                return [time.perf_counter() - begin], error(values, batch)

            seconds, worst = torch_run(PEER)
            rows.add("reducible", size, "torchdiffeq", len(batch), seconds, worst, rtol=PEER)
    if size > options.largest_scipy:
        return
    split, residual, gram = factor_fields(np.asarray(problem.target), RANK)
    for name, field, method in (
        ("scipy_dop853_residual", residual, "DOP853"),
        ("scipy_dop853_gram", gram, "DOP853"),
        ("scipy_lsoda_gram", gram, "LSODA"),
    ):
        # LSODA turns to a dense Jacobian of all 2mr unknowns, which only small sizes can afford.
        if size > (64 if method == "LSODA" else 512) and name != "scipy_dop853_residual":
            continue
        which = sample if size <= 512 else [checked[4]]

        def loop(rtol, field=field, method=method, which=which):
            seconds, values = [], []
            for i in which:
                a, b = lane(factors, i)
                start = np.concatenate([np.asarray(a).ravel(), np.asarray(b).ravel()])
                begin = time.perf_counter()
                path = scipy_loop(field, start, times, rtol, rtol * scales[i], method)
                values.append(values_of(split, path, k))
                seconds.append(time.perf_counter() - begin)
            return [sum(seconds)], error(values, which)

        seconds, worst = loop(PEER)
        rows.add("reducible", size, name, len(which), seconds, worst, rtol=PEER)


def two_layer(rows: Rows, size: int, options: argparse.Namespace, gemm: float) -> None:
    """All engines on two frozen layers of one size, which have no reduction."""
    n, r, until = size, 4, 10.0
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal((n, n)) / n**0.5 for _ in range(2))
    u, _, vt = np.linalg.svd(w2 @ w1)
    shift = 5 * np.outer(u[:, 0], vt[0])
    problem = TwoLayer(*map(jnp.asarray, (w1, w2, shift)))
    aim, times = w2 @ w1 + shift, np.linspace(0.0, until, 50)
    scales = np.repeat(np.logspace(-1, -8, 9), LANES // 9)

    def start(key, scale):
        one, two = jax.random.split(key)
        small = initializers.small
        return TwoLayerFactors(small(one, (n, n), r, scale), small(two, (n, n), r, scale))

    keys = jax.random.split(jax.random.key(1), LANES)
    factors = jax.jit(jax.vmap(start))(keys, jnp.asarray(scales))
    # Largest entries of a lane set its absolute tolerance, the same for all engines.
    sizes = [np.asarray(jnp.max(jnp.abs(x), axis=(1, 2))) for x in jax.tree.leaves(factors)]
    amplitude = np.max(sizes, axis=0)
    sample = [0, LANES // 2, LANES - 1]
    shapes = [(n, r), (r, n), (n, r), (r, n)]

    def split(z):
        return [x.reshape(s) for x, s in zip(np.split(z, 4), shapes, strict=True)]

    def residual(t, z):
        a1, b1, a2, b2 = split(z)
        first, second = w1 + a1 @ b1, w2 + a2 @ b2
        g = aim - second @ first
        g1, g2 = second.T @ g, g @ first.T
        parts = (g1 @ b1.T, a1.T @ g1, g2 @ b2.T, a2.T @ g2)
        return np.concatenate([x.ravel() for x in parts])

    def losses_of(path):
        found = []
        for z in path:
            a1, b1, a2, b2 = split(z)
            found.append(0.5 * np.sum((aim - (w2 + a2 @ b2) @ (w1 + a1 @ b1)) ** 2))
        return np.array(found)

    def flat(i):
        return np.concatenate([np.asarray(x[i]).ravel() for x in jax.tree.leaves(factors)])

    truth = {
        i: losses_of(scipy_loop(residual, flat(i), times, 1e-13, 1e-14 * amplitude[i], "DOP853"))
        for i in sample
    }

    def error(losses, which) -> float:
        found = [
            np.abs(np.asarray(losses[j]) - truth[i]) for j, i in enumerate(which) if i in truth
        ]
        return float(np.max(found)) / float(truth[sample[0]][0])

    t, everyone = jnp.asarray(times), list(range(LANES))

    def ours(rtol):
        def of(factors):
            found = lanes.full_ode(problem, factors, t, rtol=rtol, bucket=options.bucket)
            return found.observed["losses"], found.steps

        seconds, (losses, steps) = on_devices(of, factors, options.repeats)
        taken.append(float(np.mean(steps)))
        return seconds, error(losses, everyone)

    taken: list[float] = []
    seconds, worst, rtol = within_target(ours)
    steps = taken[-1]
    # Products with W1 and its transpose, the thin shift, the r×r Gram matrices; 13 fields a step.
    flops = 13 * steps * (4 * n**2 * r + 16 * n * r + 2 * 23 * n * r**2)
    rate = flops / (np.median(seconds) / LANES)
    rows.add(
        "two_layer",
        size,
        "full_ode",
        LANES,
        seconds,
        worst,
        rtol=rtol,
        steps=steps,
        flop_rate=rate,
        fraction_of_gemm=rate / gemm,
    )

    def scipy_run(rtol):
        begin = time.perf_counter()
        losses = [
            losses_of(scipy_loop(residual, flat(i), times, rtol, rtol * amplitude[i], "DOP853"))
            for i in sample
        ]
        return [time.perf_counter() - begin], error(losses, sample)

    seconds, worst = scipy_run(PEER)
    rows.add("two_layer", size, "scipy_dop853_residual", len(sample), seconds, worst, rtol=PEER)

    many = list(range(0, LANES, LANES // options.many))
    some = jax.tree.map(lambda x: x[np.array(many)], factors)
    picked = [many.index(i) for i in many if i in truth]

    def plain(rtol):
        def field(t, y, _):
            (a1, b1), (a2, b2) = y
            first, second = problem.w1 + a1 @ b1, problem.w2 + a2 @ b2
            g = jnp.asarray(aim) - second @ first
            g1, g2 = second.T @ g, g @ first.T
            return TwoLayerFactors(Factors(g1 @ b1.T, a1.T @ g1), Factors(g2 @ b2.T, a2.T @ g2))

        def one(start, atol):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Tsit5(),
                0.0,
                until,
                None,
                start,
                saveat=diffrax.SaveAt(ts=t),
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
                max_steps=100_000,
            )
            assert isinstance(solution.ys, TwoLayerFactors)
            return jax.vmap(problem.loss)(solution.ys)

        run = jax.jit(jax.vmap(one))
        atol = jnp.asarray(rtol * amplitude[np.array(many)])
        seconds, losses = clock(lambda: run(some, atol), 1)
        return seconds, error([losses[j] for j in picked], [many[j] for j in picked])

    seconds, worst = plain(PEER)
    rows.add("two_layer", size, "plain_vmap", len(many), seconds, worst, rtol=PEER)
    if not has_torch():
        return

    def torch_run(rtol):
        import torch
        from torchdiffeq import odeint

        one, two, y = (torch.as_tensor(np.array(x)) for x in (w1, w2, aim))

        def field(t, state):
            a1, b1, a2, b2 = state
            first, second = one + a1 @ b1, two + a2 @ b2
            g = y - second @ first
            g1, g2 = second.mT @ g, g @ first.mT
            return g1 @ b1.mT, a1.mT @ g1, g2 @ b2.mT, a2.mT @ g2

        begin = time.perf_counter()
        with torch.no_grad():
            state = tuple(torch.as_tensor(np.array(x)) for x in jax.tree.leaves(some))
            ts = torch.as_tensor(times)
            # One tolerance for all lanes is all there is; the smallest start sets it.
            atol = rtol * float(amplitude.min())
            path: Any = odeint(field, state, ts, rtol=rtol, atol=atol, method="dopri8")
            a1, b1, a2, b2 = path
            losses = 0.5 * torch.sum((y - (two + a2 @ b2) @ (one + a1 @ b1)) ** 2, dim=(-2, -1))
        seconds = [time.perf_counter() - begin]
        losses = losses.numpy().T
        return seconds, error([losses[j] for j in picked], [many[j] for j in picked])

    seconds, worst = torch_run(PEER)
    rows.add("two_layer", size, "torchdiffeq", len(many), seconds, worst, rtol=PEER)


def ratios(rows: Rows) -> list[str]:
    lines = []
    for case, size in sorted({(r["case"], r["size"]) for r in rows.rows}):
        for ours in ("closed_form", "reduced_ode", "full_ode"):
            mine = rows.of(case, size, ours)
            for peer in ("scipy_dop853_residual", "plain_vmap", "torchdiffeq"):
                theirs = rows.of(case, size, peer)
                if mine and theirs:
                    lines.append(f"{case} {size}: {ours} is {theirs / mine:,.1f} times {peer}")
    return lines


PANELS = (
    ("reducible", "", "size", "matrix factorization, 180 lanes", "closed_form"),
    ("two_layer", "", "size", "two frozen layers, 180 lanes", "full_ode"),
    ("reducible", "against_lanes", "lanes", "matrix factorization, 64×64", "closed_form"),
    ("reducible", "against_ranks", "rank", "64×64, 180 lanes, k = r", "closed_form"),
)
"""Case, mark of a scan, what is on the axis, title, and the engine whose operations are counted."""


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Cost of a lane against size, lanes and rank, over what its operations would cost in a GEMM.

    Args:
      rows: of the table; slow peers have run a sample of lanes.
      path: of the figure.
    """
    from lorajax.plots import style

    with style():
        _plot(rows, path)


def _plot(rows: list[dict[str, Any]], path: str) -> None:
    from lorajax.plots import figure, save

    shown = []
    for case, scan, axis, title, counted in PANELS:
        marks = {name for name in SCANS if name != scan}
        chosen = [r for r in rows if r["case"] == case and not any(r.get(m) for m in marks)]
        chosen = [r for r in chosen if not scan or r.get(scan)]
        if chosen:
            shown.append((chosen, axis, title, counted))
    fig, panels = figure(-(-len(shown) // 2), min(2, len(shown)), size=(3.4, 3.6))
    for panel in (spaces := np.atleast_1d(panels).flat)[len(shown) :]:
        panel.set_axis_off()
    for panel, (chosen, axis, title, counted) in zip(spaces, shown, strict=False):
        engines = dict.fromkeys(r["engine"] for r in chosen)
        for engine, marker in zip(engines, "os^vDPX*", strict=False):
            points = sorted(
                (r[axis], r["seconds_per_lane"]) for r in chosen if r["engine"] == engine
            )
            panel.loglog(*zip(*points, strict=True), marker=marker, label=engine)
        limit = sorted(
            (r[axis], r["seconds_per_lane"] * r["fraction_of_gemm"])
            for r in chosen
            if r["engine"] == counted
        )
        panel.loglog(*zip(*limit, strict=True), "k--", label="at the rate of a GEMM")
        panel.set(title=title, xlabel=axis, ylabel="time of a lane [s]")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    save(fig, path)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "devices": [str(d) for d in jax.devices()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweeps", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small size of each case")
    parser.add_argument("--json", metavar="FILE", help="write the table")
    parser.add_argument("--plot", metavar="FILE", help="draw cost against size, lanes and rank")
    parser.add_argument("--of", metavar="FILE", help="draw an earlier table and measure nothing")
    parser.add_argument("--sizes", type=int, nargs="*", help="of the reducible case")
    parser.add_argument("--layers", type=int, nargs="*", help="sizes of the two-layer case")
    parser.add_argument("--lanes", type=int, nargs="*", help="numbers of lanes, at size 64")
    parser.add_argument("--ranks", type=int, nargs="*", help="ranks of adapters, at size 64")
    parser.add_argument("--repeats", type=int, default=5, help="of our own engines")
    parser.add_argument("--sample", type=int, default=3, help="lanes of the slow peers")
    parser.add_argument(
        "--many", type=int, default=180, help="lanes of batched peers; a quarter from size 512"
    )
    parser.add_argument(
        "--bucket", type=int, default=8, help="lanes of two layers that step together"
    )
    parser.add_argument("--largest-full", type=int, default=512, help="for unreduced engines")
    parser.add_argument("--largest-torch", type=int, default=512, help="for torchdiffeq")
    parser.add_argument("--largest-scipy", type=int, default=4096, help="for scipy")
    options = parser.parse_args(argv)
    if options.of:
        if not options.plot:
            parser.error("--of is given without --plot, which names the figure to draw")
        with open(options.of) as file:
            plot(json.load(file)["rows"], options.plot)
        return 0
    # As the command does for its users, and a device a core.
    environment.guard()
    environment.wide()
    environment.add_flags(f"--xla_force_host_platform_device_count={os.cpu_count()}")
    jax.config.update("jax_enable_x64", True)
    sizes = (
        options.sizes
        if options.sizes is not None
        else [64]
        if options.quick
        else [64, 128, 256, 512, 1024, 2048, 4096]
    )
    layers = options.layers if options.layers is not None else [16] if options.quick else [64, 100]
    if options.lanes is None:
        options.lanes = [18] if options.quick else [18, 180, 1800, 18000]
    if options.ranks is None:
        options.ranks = [2] if options.quick else [1, 2, 4, 8, 16]
    watch, before, gemm = Watch(), machine(), gemm_rate()
    print(f"float64 product: {gemm / 1e9:.1f} GFLOP/s")

    def save(rows: Rows) -> None:
        after = {"gemm_flop_rate": gemm, "others": watch.others()}
        table = {"machine": before | after, "rows": rows.rows, "ratios": ratios(rows)}
        if options.json:
            with open(options.json, "w") as file:
                json.dump(table, file, indent=1)
                file.write("\n")

    rows = Rows(save)
    for size in sizes:
        reducible(rows, size, options, gemm)
    against_lanes(rows, options, gemm)
    against_ranks(rows, options, gemm)
    for size in layers:
        two_layer(rows, size, options, gemm)
    print("\n".join(ratios(rows)))
    if options.plot:
        plot(rows.rows, options.plot)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
