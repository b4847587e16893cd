"""Lanes a second: flows of one problem from many starts, here and by torch on the same card.

Matrix factorization, 64×64, k = 4, r = 8, singular values at 200 times, from starts of scales 1 to
1e-8, as in `python -m benchmarks sweeps`, whose problem, starts, clock and reference these are.
"""

import time
from typing import Any

from benchmarks.card.runs import Report

TOLERANCES = {"float64": 1e-8, "float32": 1e-5}
"""Relative tolerance of the peers' steps; of our own in float32, too."""


def _sizes(tiny: bool) -> tuple[int, int, tuple[int, ...], int]:
    """Sides, times, numbers of lanes, and how many of the lanes are held against a reference."""
    return (12, 20, (9,), 3) if tiny else (64, 200, (180, 1800, 18000), 3)


class _Case:
    """The problem, its starts, and what the lanes are held against."""

    def __init__(self, tiny: bool) -> None:
        import jax
        import numpy as np

        from benchmarks import sweeps
        from lorajax.problems import MatrixFactorization

        self.side, count, self.counts, self.checked = _sizes(tiny)
        self.times = np.linspace(0.0, sweeps.UNTIL, count)
        shape = (self.side, self.side)
        self.problem = MatrixFactorization.from_spectrum(jax.random.key(0), shape, sweeps.SPECTRUM)
        self.largest = sweeps.SPECTRUM[0]

    def starts(self, count: int) -> tuple[Any, Any, list[int], Any]:
        """Scales, factors, which lanes are checked, and their singular values."""
        import numpy as np

        from benchmarks import sweeps

        scales, factors = sweeps.make_starts((self.side, self.side), sweeps.RANK, count)
        checked = [i * (count - 1) // (self.checked - 1) for i in range(self.checked)]
        truth = np.stack(
            [
                sweeps.reference(self.problem, sweeps.lane(factors, i), scales[i], self.times)
                for i in checked
            ]
        )
        return scales, factors, checked, truth

    def error(self, values: Any, checked: list[int], truth: Any) -> float:
        """The largest error of the checked lanes over the largest singular value."""
        import numpy as np

        found = np.asarray(values)[np.array(checked)][..., : truth.shape[-1]]
        return float(np.abs(found - truth).max()) / self.largest


def ours(report: Report, tiny: bool) -> None:
    """Lanes a second of the closed form and of the reduced ODE, in float64 and in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import sweeps
    from lorajax.cli.output import prepare_jax
    from lorajax.flows import lanes

    prepare_jax(brief=tiny)
    case = _Case(tiny)
    for count in case.counts:
        _, factors, checked, truth = case.starts(count)
        for dtype, rtol in (("float64", 3e-10), ("float32", 1e-5)):
            problem, start = jax.tree.map(
                lambda x, dtype=dtype: jnp.asarray(x, dtype), (case.problem, factors)
            )
            t = jnp.asarray(case.times, dtype)
            runs: dict[str, Any] = {
                "closed form": lambda p, f, t=t: lanes.closed_form(p, f, t, one_sided=True)
            }
            if count <= 1800 and not (tiny and dtype == "float32"):
                # One bucket: a card is filled by lanes side by side, not by one after another.
                runs["reduced ODE"] = lambda p, f, t=t, rtol=rtol, count=count: lanes.reduced_ode(
                    p, f, t, one_sided=True, rtol=rtol, bucket=count
                )
            for engine, run in runs.items():
                compiled = jax.jit(lambda p, f, run=run: run(p, f).observed["singular_values"])
                seconds, values = sweeps.clock(
                    lambda compiled=compiled, p=problem, f=start: compiled(p, f), 1 if tiny else 3
                )
                report.row(
                    engine=engine,
                    dtype=dtype,
                    lanes=count,
                    lanes_per_second=count / float(np.median(seconds)),
                    spread=[count / max(seconds), count / min(seconds)],
                    max_error=case.error(values, checked, truth),
                )
                if report.left < 10:
                    return


def torch_lanes(report: Report, tiny: bool) -> None:
    """The same by torchdiffeq's Dopri8, or by a batched Dopri5 in plain torch where it is missing.

    Each integrates all lanes as one state, in Gram form, with one step size for all of them.
    """
    import numpy as np
    import torch

    from lorajax.cli.output import prepare_jax

    prepare_jax(brief=tiny)
    case = _Case(tiny)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine, solve = _solver()
    report.add(engine=engine, torch=torch.__version__, device=str(where))
    for count in case.counts[:2]:
        _, factors, checked, truth = case.starts(count)
        for dtype, rtol in TOLERANCES.items():
            kind = getattr(torch, dtype)
            target, a, b = (
                torch.as_tensor(np.array(x), dtype=kind, device=where)
                for x in (case.problem.target, factors.a, factors.b)
            )
            times = torch.as_tensor(case.times, dtype=kind, device=where)
            # The smallest start is 1e-8; float32 cannot resolve it beside the others.
            atol = rtol * (1e-8 if dtype == "float64" else 1e-4)
            seconds: list[float] = []
            values: Any = None
            # The first run also loads kernels.
            for _ in range(1 if tiny else 3):
                begin = time.perf_counter()
                values = _integrate(solve, target, a, b, times, rtol, atol).cpu().numpy()
                seconds.append(time.perf_counter() - begin)
                if report.left < 2 * seconds[-1] + 5:
                    break
            kept = seconds[1:] or seconds
            report.row(
                engine=engine,
                dtype=dtype,
                lanes=count,
                lanes_per_second=count / float(np.median(kept)),
                spread=[count / max(kept), count / min(kept)],
                max_error=case.error(np.moveaxis(values, 0, 1), checked, truth),
                rtol=rtol,
            )
            if report.left < 10:
                return


def _solver() -> tuple[str, Any]:
    try:
        import torchdiffeq
    except ImportError:
        return "Dopri5 in plain torch (torchdiffeq is missing)", dopri5

    def solve(field: Any, start: Any, times: Any, rtol: float, atol: float) -> Any:
        return torchdiffeq.odeint(field, start, times, rtol=rtol, atol=atol, method="dopri8")

    return "torchdiffeq Dopri8", solve


def _integrate(solve: Any, target: Any, a: Any, b: Any, times: Any, rtol: float, atol: float):
    """Singular values (times, lanes, rank) of the flow of all lanes."""
    import torch

    def field(t: Any, y: Any) -> Any:
        a, b = y
        bt, at = b.mT, a.mT
        return target @ bt - a @ (b @ bt), at @ target - (at @ a) @ b

    with torch.no_grad():
        a, b = solve(field, (a, b), times, rtol, atol)
        r_a = torch.linalg.qr(a, mode="r")[1]
        r_b = torch.linalg.qr(b.mT, mode="r")[1]
        return torch.linalg.svdvals(r_a @ r_b.mT)


# Dormand and Prince's pair of orders 5 and 4: the stages' weights, and those of the two results.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)


def dopri5(field: Any, start: Any, times: Any, rtol: float, atol: float) -> Any:
    """An adaptive Dopri5 on tuples of tensors that ends a step at each of the times.

    Args:
      field: of time and state.
      start: tensors, lanes on the first axis.
      times: increasing; the state at the first is the start.
      rtol: of the root mean square of all entries of a tensor.
      atol: likewise.

    Returns:
      For each tensor of the state its values at the times, on a new first axis.

    Source: Dormand and Prince 1980, recalled; step sizes by the usual rule with exponent 1/5.
    """
    import torch

    def moved(y: Any, slopes: list[Any], weights: tuple[float, ...], h: float) -> Any:
        return tuple(
            x + h * sum(w * k[i] for w, k in zip(weights, slopes, strict=True) if w)
            for i, x in enumerate(y)
        )

    t, path, y = float(times[0]), [start], start
    h, slope = (float(times[-1]) - t) / 1000, field(times[0], start)
    for until in map(float, times[1:]):
        while t < until:
            step = min(h, until - t)
            slopes = [slope]
            for weights in _STAGES:
                trial = moved(y, slopes, weights, step)
                slopes.append(field(t, trial))
            zero = tuple(torch.zeros_like(x) for x in y)
            off = moved(zero, slopes, _ERROR, step)
            sizes = [
                (e / (atol + rtol * torch.maximum(x.abs(), z.abs()))).square().mean()
                for e, x, z in zip(off, y, trial, strict=True)
            ]
            size = float(torch.stack(sizes).mean().sqrt())
            if size <= 1:
                # A step that is cut short by a time says little about how long the next may be.
                t = until if step >= until - t else t + step
                y, slope = trial, slopes[-1]
            grown = step * min(5.0, max(0.2, 0.9 * max(size, 1e-10) ** -0.2))
            h = max(h, grown) if size <= 1 and step < h else grown
        path.append(y)
    return tuple(torch.stack(x) for x in zip(*path, strict=True))
