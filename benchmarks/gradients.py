"""What does a gradient through a flow cost, in runs of the flow?

    python -m benchmarks gradients [--rounds 9] [--sizes 64 512] [--layers 16 64] [--json FILE]

The losses at some times, summed, differentiated by the whole start: backward through the closed
form (its own derivative) and through the solver's steps (diffrax's checkpointed adjoint), and
forward along one direction. They take turns. Beside the time stand the bytes that the program needs
beyond what it is given and gives (XLA's own account), and how far the gradient is from that of the
adjoint at a hundredth of the tolerance, along directions that keep AᵀA a multiple of the identity,
where the closed form has the flow's derivative.
"""

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import lorajax
from benchmarks.machine import Watch, report
from benchmarks.reduction import seconds
from lorajax import Factors, environment
from lorajax.problems import TwoLayer, TwoLayerFactors

TIMES = np.linspace(0.0, 20.0, 17)
RTOL = 1e-8
RANK = 8
CLOSED, SOLVER = "closed form", "solver"
CHECKPOINTED = "checkpointed adjoint"
REFERENCE = "the same at a hundredth of the tolerance"
Total = Callable[[Any], Any]
"""The summed losses as a function of the start."""


class Case(NamedTuple):
    """A start, and the ways to run its flow.

    Attributes:
      start: factors.
      flows: that can be run, and differentiated forward.
      backward: that can be differentiated backward, and the flow that each goes back through.
    """

    start: Any
    flows: dict[str, Total]
    backward: dict[str, tuple[str, Total]]


def _case(problem: Any, start: Any, closed: bool) -> Case:
    def integrated(adjoint: Any, rtol: float = RTOL) -> Total:
        run = functools.partial(lorajax.gradient_flow, rtol=rtol, adjoint=adjoint)
        return lambda x: jnp.sum(run(problem, x, TIMES).losses)

    adjoint = diffrax.RecursiveCheckpointAdjoint()
    flows = {SOLVER: integrated(None)}
    backward = {
        CHECKPOINTED: (SOLVER, integrated(adjoint)),
        REFERENCE: (SOLVER, integrated(adjoint, RTOL / 100)),
    }
    if closed:
        flows[CLOSED] = lambda x: jnp.sum(lorajax.balanced_flow(problem, x, TIMES).losses)
        backward[CLOSED] = (CLOSED, flows[CLOSED])
    return Case(start, flows, backward)


def reducible(size: int) -> Case:
    """A flow of n×n matrices that has a closed form."""
    key = jax.random.key(size)
    problem = lorajax.MatrixFactorization.from_spectrum(key, (size, size), (4.0, 3.0, 2.0, 1.0))
    start = lorajax.initializers.orthogonal(key, problem.shape, RANK, scale=1e-2)
    return _case(problem, start, closed=True)


def two_layer(size: int) -> Case:
    """A flow of two layers, which has none."""
    problem = TwoLayer.pretrained(jax.random.key(size), size, "top")
    keys = jax.random.split(jax.random.key(1))
    pairs = [lorajax.initializers.small(k, (size, size), RANK, scale=1e-2) for k in keys]
    return _case(problem, TwoLayerFactors(*pairs), closed=False)


def compiled(function: Callable[..., Any], *given: Any) -> tuple[Callable[[], Any], int]:
    """A program with these arguments, and the bytes that it takes beside them and its results."""
    program = jax.jit(function).lower(*given).compile()
    analysis = program.memory_analysis()
    assert analysis is not None, "XLA tells the memory of programs on CPU and GPU"
    return lambda: program(*given), int(analysis.temp_size_in_bytes)


def kept(start: Factors, gradient: Factors) -> Factors:
    """The part of a gradient along changes that keep A's columns orthogonal and of one length."""
    even = jnp.linalg.solve(start.a.T @ start.a, start.a.T @ gradient.a)
    even = (even + even.T) / 2
    stretch = even - jnp.trace(even) / start.rank * jnp.eye(start.rank)
    return gradient._replace(a=gradient.a - start.a @ stretch)


def off(found: Any, wanted: Any) -> float:
    """The largest difference of two gradients over the largest value."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    most = max(float(jnp.max(jnp.abs(y))) for _, y in pairs)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / most


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row for each flow, alone and forward along a direction, and for each way back."""
    start, along = case.start, jax.tree.map(jnp.ones_like, case.start)
    programs = {}
    for name, total in case.flows.items():
        forward = functools.partial(_along, total)
        programs[name, "flow"] = (name, *compiled(total, start))
        programs[name, "forward"] = (name, *compiled(forward, start, along))
    for name, (flow, total) in case.backward.items():
        programs[name, "backward"] = (flow, *compiled(jax.grad(total), start))
    found = {which: jax.block_until_ready(run()) for which, (_, run, _) in programs.items()}
    spent: dict[tuple[str, str], list[float]] = {which: [] for which in programs}
    for _ in range(rounds):
        for which, (_, run, _) in programs.items():
            spent[which].append(seconds(run))
    rows = []
    for (name, task), (flow, _, beside) in programs.items():
        times = spent[name, task]
        ratios = [x / y for x, y in zip(times, spent[flow, "flow"], strict=True)]
        row = {
            "engine": name,
            "task": task,
            "seconds": statistics.median(times),
            "spread": [min(times), max(times)],
            "flows": statistics.median(ratios),
            "bytes": beside,
        }
        if task == "backward":
            pair = found[name, task], found[REFERENCE, task]
            if CLOSED in case.flows:
                pair = [kept(start, gradient) for gradient in pair]
            row["off"] = off(*pair)
        rows.append(row)
    return rows


def _along(total: Total, start: Any, direction: Any) -> Any:
    return jax.jvp(total, (start,), (direction,))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradients", description=__doc__)
    parser.add_argument("--sizes", nargs="*", type=int, default=[64, 512])
    parser.add_argument("--layers", nargs="*", type=int, default=[16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="write the table")
    args = parser.parse_args(argv)
    environment.guard()
    jax.config.update("jax_enable_x64", True)
    watch, table = Watch(), []
    for name, sizes, make in (
        ("one update", args.sizes, reducible),
        ("two layers", args.layers, two_layer),
    ):
        for size in sizes:
            for row in measure(make(size), args.rounds):
                table.append({"case": name, "size": size, **row})
                least, most = row["spread"]
                print(
                    f"{name} of {size}: {row['engine']}, {row['task']}: "
                    f"{1e3 * row['seconds']:.2f} ms ({1e3 * least:.2f} to {1e3 * most:.2f}), "
                    f"{row['flows']:.1f} flows, {row['bytes'] / 1e6:.2f} MB"
                    + (f", off by {row['off']:.1e}" if "off" in row else ""),
                    flush=True,
                )
    report(args.json, {"rtol": RTOL, "rank": RANK, "rows": table}, [watch.others()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
