"""Does a sweep of a million lanes stay small, and does a killed one end with the same bytes?

    python -m benchmarks stores [--lanes 1000000] [--kills 20] [--json FILE]

The lanes are closed-form flows, k = 3, r = 4, whose singular values at 50 times are kept; each
draws its own orthonormal start. They run in processes of their own, so that the largest resident
memory is that of one run. What a lane's time goes to is measured a part at a time. The kills are
`kill -9` at random moments of a smaller sweep, each followed by a run that goes on.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.machine import Watch, peak

SHAPE, RANK, SPECTRUM, TIMES = (16, 16), 4, (3.0, 2.0, 1.0), 50


def setting():
    """The problem, its times, and what draws starts; JAX is set as the command sets it."""
    import jax
    import jax.numpy as jnp

    import lorajax
    from lorajax import environment, initializers

    environment.guard()
    environment.wide()
    jax.config.update("jax_enable_x64", True)
    problem = lorajax.MatrixFactorization.from_spectrum(jax.random.key(0), SHAPE, SPECTRUM)

    def starts(key, scale):
        def start(key, scale):
            return initializers.orthogonal(key, problem.shape, RANK, scale)

        return jax.vmap(start)(key, scale)

    return problem, jnp.linspace(0.0, 20.0, TIMES), starts


def parts(chunk: int, rounds: int = 9) -> None:
    """Prints what a lane of a chunk takes, in microseconds: its start, its flow, and both."""
    import jax
    import jax.numpy as jnp

    from benchmarks.reduction import seconds
    from lorajax.flows import lanes as engines

    problem, times, starts = setting()
    keys, scales = jax.random.split(jax.random.key(1), chunk), jnp.logspace(0, -8, chunk)

    def flows(begin):
        return engines.closed_form(problem, begin, times, one_sided=True).observed

    begin = jax.jit(starts)(keys, scales)
    calls = {
        "start": (jax.jit(starts), (keys, scales)),
        "flow": (jax.jit(flows), (begin,)),
        "both": (jax.jit(lambda key, scale: flows(starts(key, scale))), (keys, scales)),
    }
    found = {}
    for name, (call, given) in calls.items():
        jax.block_until_ready(call(*given))
        taken = [seconds(lambda call=call, given=given: call(*given)) for _ in range(rounds)]
        found[name] = 1e6 * statistics.median(taken) / chunk
    print(json.dumps(found))


def child(store: str, lanes: int, chunk: int) -> None:
    """One sweep; prints its seconds without start-up and compilation, and its peak memory."""
    import jax
    import numpy as np

    from lorajax.flows import lanes as engines
    from lorajax.sweeps import sweep

    problem, times, starts = setting()

    def flow(scale, key):
        found = engines.closed_form(problem, starts(key, scale), times, one_sided=True)
        return {**found.observed, "status": found.status}

    begin = [0.0]

    def progress(seen) -> None:
        if seen.done == seen.resumed:
            begin[0] = time.perf_counter()
        print(seen.done, flush=True)

    scales = np.logspace(0, -8, 10)
    found = sweep(
        flow,
        {"scale": scales, "seed": np.arange(lanes // len(scales))},
        key=jax.random.key(1),
        batched=True,
        dims={"singular_values": ("time", "mode")},
        coords={"time": np.asarray(times)},
        store=store,
        chunk=chunk,
        progress=progress,
    )
    seconds = time.perf_counter() - begin[0]
    failed = int((found["status"] != 0).sum())
    print(json.dumps({"lanes": lanes, "seconds": seconds, "peak_bytes": peak(), "failed": failed}))


def start(store: pathlib.Path | None, lanes: int, chunk: int) -> subprocess.Popen:
    """A sweep into a store, or without one the parts of a lane's time."""
    what = ["--child", str(store)] if store else ["--parts"]
    arguments = [*what, "--lanes", str(lanes), "--chunk", str(chunk)]
    command = [sys.executable, "-m", "benchmarks", "stores", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(out.splitlines()[-1])


def contents(store: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def killed(folder: pathlib.Path, kills: int) -> dict:
    """Kills a sweep at random moments, resumes it each time, and compares it with a whole one."""
    lanes, chunk, rng = 20_000, 100, random.Random(0)
    whole = finish(start(folder / "whole", lanes, chunk))
    reached = []
    for _ in range(kills):
        process = start(folder / "killed", lanes, chunk)
        assert process.stdout is not None
        for _ in range(1 + rng.randrange(1 + 2 * (lanes // chunk) // (3 * kills))):
            reached.append(process.stdout.readline().strip())
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
    finish(start(folder / "killed", lanes, chunk))
    same = contents(folder / "killed") == contents(folder / "whole")
    progress = [int(x) for x in reached if x.isdigit()]
    return {"kills": kills, "lanes": whole["lanes"], "last": progress[-1], "identical": same}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks stores", description=__doc__)
    parser.add_argument("--lanes", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=5_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", metavar="STORE", help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.parts:
        parts(options.chunk)
        return 0
    if options.child:
        child(options.child, options.lanes, options.chunk)
        return 0
    table: dict = {}
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        table["few"] = finish(start(folder / "few", 10_000, options.chunk))
        print(table["few"], flush=True)
        table["many"] = finish(start(folder / "many", options.lanes, options.chunk))
        print(table["many"], flush=True)
        few, many = (table[x]["seconds"] / table[x]["lanes"] for x in ("few", "many"))
        table["ratio_per_lane"] = many / few
        print(f"a lane of many takes {many / few:.2f} times one of few", flush=True)
        table["parts"] = finish(start(None, options.lanes, options.chunk))
        print("microseconds a lane, writing left out:", table["parts"], flush=True)
        if options.kills:
            table["killed"] = killed(folder, options.kills)
            print(table["killed"], flush=True)
    table["others"] = watch.others()
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
