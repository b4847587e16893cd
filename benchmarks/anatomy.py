"""What keeps flows from the rate of a GEMM, and what do XLA's flags do for them?

    python -m benchmarks anatomy [--lanes 1800] [--rounds 7] [--json FILE]

One thread, float64, k = 4, r = 8, 200 times, under each setting of XLA's flags in a process of its
own: the time of a point (a lane at one time); what XLA's analysis counts for it (loops over memory,
bytes that they read and write, operations; rotations once); and what one loop takes for an entry by
what it computes. Loops that compute next to nothing say what the bytes alone would take.

Of two frozen layers, whose flows are integrated: the time of a step of eight lanes, and that of its
parts by themselves, each repeated without the others.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.machine import Watch, report
from lorajax.environment import flags

SHAPE, RANK, SPECTRUM, TIMES, SPAN = (64, 64), 8, (4.0, 3.0, 2.0, 1.0), 200, 20.0
SETTINGS = {
    "XLA's own": "",
    "512 bits": flags.WIDE,
    "no fusion emitters": "--xla_cpu_use_fusion_emitters=false",
    "no fusion emitters, 512 bits": f"--xla_cpu_use_fusion_emitters=false {flags.WIDE}",
    "little optimization": "--xla_backend_optimization_level=1",
}
SIZES = 64, 100
"""Of two frozen layers."""
FEW = 64, 8
"""Lanes and times of what XLA's analysis is asked about: one block, so that no loop hides it."""


def seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    """Of some runs, after one that compiles."""
    import jax

    jax.block_until_ready(run())
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - begin)
    return found


def measure(lanes: int, rounds: int) -> dict[str, Any]:
    """Nanoseconds of a point and of an entry, and XLA's counts a point."""
    import jax
    import jax.numpy as jnp

    import lorajax
    from lorajax import initializers
    from lorajax.exact import lanes as exact

    jax.config.update("jax_enable_x64", True)
    problem = lorajax.MatrixFactorization.from_spectrum(jax.random.key(0), SHAPE, SPECTRUM)
    keys, scales = jax.random.split(jax.random.key(1), lanes), jnp.logspace(0, -3, lanes)
    a = jax.vmap(lambda key, scale: initializers.orthogonal(key, SHAPE, RANK, scale).a)(
        keys, scales
    )
    s = jnp.broadcast_to(problem.singular_values, (lanes, len(SPECTRUM)))
    along = jnp.einsum("mk,lmr->lkr", problem.u, a)
    form = jax.jit(exact.one_sided)(s, jnp.sum(a**2, axis=(1, 2)) / RANK, along)
    times = jnp.linspace(0.0, SPAN, TIMES)
    flow = jax.jit(exact.singular_values)
    spent = [x / (lanes * TIMES) for x in seconds(lambda: flow(form, times), rounds)]

    part = jax.tree.map(lambda x: x[..., : FEW[0]], form)
    compiled = flow.lower(part, times[: FEW[1]]).compile()
    cost: Any = compiled.cost_analysis()
    loops = {
        "product": lambda x: x * 0.999,
        "exp": lambda x: jnp.exp(-x),
        "expm1": lambda x: jnp.expm1(-x),
        "square root": jnp.sqrt,
        "quotient": lambda x: 1 / x,
    }
    # Again and again over what stays in a core's own cache, as the blocks of lanes and times do.
    x, again, passes = jnp.abs(jax.random.normal(jax.random.key(2), (16_384,))), 64, {}
    for name, function in loops.items():
        run = jax.jit(lambda x, f=function: jax.lax.fori_loop(0, again, lambda _, y: f(y), x))
        spent_here = statistics.median(seconds(lambda run=run: run(x), rounds))
        passes[name] = 1e9 * spent_here / (again * x.size)
    count = part.level.shape[0] * FEW[1]
    return {
        "jax": jax.__version__,
        "point": 1e9 * statistics.median(spent),
        "spread": [1e9 * min(spent), 1e9 * max(spent)],
        "loops": len(re.findall(r" fusion\(", compiled.as_text() or "")),
        "bytes": cost["bytes accessed"] / count,
        "operations": cost["flops"] / count,
        "transcendentals": cost["transcendentals"] / count,
        "passes": passes,
        # A product reads and writes eight bytes an entry.
        "bytes alone": cost["bytes accessed"] / count / 16 * passes["product"],
    }


def steps(size: int, rounds: int) -> dict[str, float]:
    """Microseconds of a step of two layers, rank 4, eight lanes at once, and of parts of it."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lorajax import initializers
    from lorajax.flows import lanes
    from lorajax.flows.two_layer import Rows, freeze, slope_of
    from lorajax.problems import TwoLayer, TwoLayerFactors

    jax.config.update("jax_enable_x64", True)
    rng, (n, r, count) = np.random.default_rng(0), (size, 4, 8)
    w1, w2 = (rng.standard_normal((n, n)) / n**0.5 for _ in range(2))
    u, _, vt = np.linalg.svd(w2 @ w1)
    problem = TwoLayer(*map(jnp.asarray, (w1, w2, 5 * np.outer(u[:, 0], vt[0]))))
    one, two = (
        jax.vmap(lambda key: initializers.small(key, (n, n), r, 1e-3))(
            jax.random.split(jax.random.key(i), count)
        )
        for i in range(2)
    )
    start, times = TwoLayerFactors(one, two), jnp.linspace(0.0, 10.0, 2)
    frozen, again = freeze(problem), 200
    state = Rows(*(jnp.ones((count, r, n)) * 1e-3 for _ in range(4)))
    tableau: Any = diffrax.Dopri8.tableau
    rows = [np.asarray(row) for row in tableau.a_lower]

    def repeated(function: Callable[[Any], Any], x: Any) -> float:
        run = jax.jit(lambda x: jax.lax.fori_loop(0, again, lambda _, y: function(y), x))
        return 1e6 * statistics.median(seconds(lambda: run(x), rounds)) / again

    def moved(x: Any, by: Any) -> Any:
        return jax.tree.map(lambda x, y: x + 1e-9 * y, x, by)

    def sums(slopes: list[Any]) -> list[Any]:
        # As a step has them, each with the slopes before it; what it sums up is the next slope.
        found = [slopes[0]]
        for row in rows:
            used = [(w, k) for w, k in zip(row, found, strict=False) if w]
            found.append(
                jax.tree.map(
                    lambda y, *xs, used=used: (
                        y + 1e-9 * sum(w * x for (w, _), x in zip(used, xs, strict=True))
                    ),
                    slopes[len(found)],
                    *[k for _, k in used],
                )
            )
        return found

    flow = jax.jit(lambda start: lanes.full_ode(problem, start, times, rtol=1e-9, bucket=count))
    taken = int(jnp.max(flow(start).steps))
    wide = jnp.ones((2 * count * r, n))
    product = repeated(lambda x: x @ frozen.w1, wide)
    # Products with W1 and its transpose, the thin shift, and the Gram matrices of a lane.
    operations = count * (4 * n**2 * r + 16 * n * r + 2 * 23 * n * r**2)
    large = jnp.ones((2000, 2000))
    square = jax.jit(lambda x: x @ x)
    rate = 2 * 2000**3 / min(seconds(lambda: square(large), rounds))
    return {
        "step": 1e6 * statistics.median(seconds(lambda: flow(start), rounds)) / taken,
        "slopes": len(rows) * repeated(lambda x: moved(x, slope_of(frozen, x)), state),
        "sums": repeated(sums, [state] * (len(rows) + 1)),
        "operations alone": 1e6 * len(rows) * operations / rate,
        "rate of the product": 2 * wide.size * n / (1e-6 * product) / rate,
        "stages": len(rows),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures under each setting in turn and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lanes", type=int, default=1800)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        layers = {size: steps(size, args.rounds) for size in SIZES}
        print(json.dumps(measure(args.lanes, args.rounds) | {"two layers": layers}))
        return 0
    command = [sys.executable, "-m", "benchmarks", "anatomy", "--child"]
    command += ["--lanes", str(args.lanes), "--rounds", str(args.rounds)]
    found, others = {}, []
    for name, given in SETTINGS.items():
        watch = Watch()
        # One processor, so that the time is that of one thread.
        done = subprocess.run(
            ["taskset", "-c", "0", *command] if sys.platform == "linux" else command,
            capture_output=True,
            text=True,
            env=os.environ | {"XLA_FLAGS": given},
        )
        others.append(watch.others())
        if done.returncode and "Unknown flag" in done.stderr:
            print(f"{name}: this jaxlib does not know {given}")
            continue
        if done.returncode:
            raise SystemExit(done.stderr)
        found[name] = each = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:28} {each['point']:6.1f} ns a point ({each['spread'][0]:.1f} to "
            f"{each['spread'][1]:.1f}); {each['loops']} loops, {each['bytes']:.0f} bytes, which "
            f"alone would take {each['bytes alone']:.0f} ns, {each['operations']:.0f} operations, "
            f"{each['transcendentals']:.0f} transcendental",
            flush=True,
        )
        for size, part in each["two layers"].items():
            print(
                f"{'':28} two layers of {size}: {part['step']:.0f} µs a step; its slopes "
                f"{part['slopes']:.0f}, its sums of slopes {part['sums']:.0f}; its operations at "
                f"the rate of a large product {part['operations alone']:.0f}, one with W1 has "
                f"{part['rate of the product']:.0%} of that rate",
                flush=True,
            )
    table = {"settings": found, "others": others, "lanes": args.lanes, "times": TIMES}
    report(args.json, table, others)
    return 0


if __name__ == "__main__":
    sys.exit(main())
