"""What does the size of a problem cost, once it is reduced exactly?

The same flow (target of rank 4, adapter of rank 8, 200 saved times) on n×n matrices, reduction
included, in turn with the 64×64 one so that a drift of the machine hits both: the median and the
spread of the ratios. Up to 512×512 the flow without the reduction runs too, and its largest
difference in a singular value, relative to s_1, is printed beside it.

    python -m benchmarks reduction [--sizes 64 512 4096] [--rounds 15]
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax
import jax.numpy as jnp
import numpy as np

import lorajax

SMALL = 64
FULL_UP_TO = 512


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one run, results included."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def flows(size: int) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """Reduced ODE, closed form and full ODE on size×size; each returns factors in the frames."""
    key = jax.random.key(size)
    problem = lorajax.MatrixFactorization.from_spectrum(key, (size, size), (4.0, 3.0, 2.0, 1.0))
    start = lorajax.initializers.lora(key, problem.shape, 8, scale=1e-2)
    even = lorajax.initializers.orthogonal(key, problem.shape, 8, scale=1e-2)
    times = jnp.linspace(0.0, 20.0, 200)
    return (
        lambda: lorajax.gradient_flow(problem, start, times).core,
        lambda: lorajax.balanced_flow(problem, even, times).core,
        lambda: lorajax.gradient_flow(problem, start, times, reduced=False).core,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks reduction", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    small = flows(SMALL)
    print("size  engine       median ms  ratio to 64×64: median (least … most)")
    for size in args.sizes:
        large = flows(size)
        for name, one, other in zip(("reduced ODE", "closed form"), small, large, strict=False):
            for run in (one, other):
                seconds(run)
            pairs = np.array([(seconds(other), seconds(one)) for _ in range(args.rounds)])
            ratios = pairs[:, 0] / pairs[:, 1]
            print(
                f"{size:<5} {name:<12} {1e3 * np.median(pairs[:, 0]):9.2f}  "
                f"{np.median(ratios):.2f} ({ratios.min():.2f} … {ratios.max():.2f})"
            )
        if size <= FULL_UP_TO:
            seconds(large[2])
            values = [lorajax.spectra.singular_values(run()) for run in (large[0], large[2])]
            error = float(jnp.abs(values[0] - values[1]).max()) / 4.0
            print(
                f"{size:<5} {'full ODE':<12} {1e3 * seconds(large[2]):9.2f}  difference {error:.1e}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
