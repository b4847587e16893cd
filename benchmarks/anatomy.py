"""What keeps a flow in closed form from the rate of a GEMM, and what XLA's flags do for it?

    python -m benchmarks anatomy [--lanes 1800] [--rounds 7] [--json FILE]

One thread, float64, k = 4, r = 8, 200 times, under each setting of XLA's flags in a process of its
own: the time of a point (a lane at one time); what XLA's analysis counts for it (loops over memory,
bytes that they read and write, operations; rotations once); and what one loop takes for an entry by
what it computes. Loops that compute next to nothing say what the bytes alone would take.
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

from benchmarks.machine import Watch, said
from lorajax.environment import flags

SHAPE, RANK, SPECTRUM, TIMES, SPAN = (64, 64), 8, (4.0, 3.0, 2.0, 1.0), 200, 20.0
SETTINGS = {
    "XLA's own": "",
    "512 bits": flags.WIDE,
    "no fusion emitters": "--xla_cpu_use_fusion_emitters=false",
    "no fusion emitters, 512 bits": f"--xla_cpu_use_fusion_emitters=false {flags.WIDE}",
    "little optimization": "--xla_backend_optimization_level=1",
}
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


def main(argv: Sequence[str] | None = None) -> int:
    """Measures under each setting in turn and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lanes", type=int, default=1800)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.lanes, args.rounds)))
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
    if busy := said(others):
        print(busy)
    if args.json:
        table = {"settings": found, "others": others, "lanes": args.lanes, "times": TIMES}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table | ({"busy": busy} if busy else {}), file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
