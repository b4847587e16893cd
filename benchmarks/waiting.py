"""How long does a newcomer wait for the commands, and for what?

    python -m benchmarks waiting [--json FILE] [--only COMMAND] [--rounds 3]

`lorajax validate` and `lorajax finetune`, each with its defaults in an empty home, and once more in
the same one; medians of some rounds, with the least and the most. Beside the clock's seconds stand
those that all threads together spend on tracing (JAX's own account: tracing, lowering), on XLA's
compiler, and on reading programs that an earlier run has compiled; what is left of the processor's
time is imports, NumPy and the computation itself.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import Watch, own, report

COMMANDS = {"validate": ["validate"], "finetune": ["finetune"]}
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "tracing",
    "/jax/core/compile/backend_compile_duration": "compiling",
    "/jax/compilation_cache/cache_retrieval_time_sec": "reading",
}


def child(arguments: Sequence[str]) -> dict[str, float]:
    """Runs a command in this process and adds up what JAX tells of its time."""
    spent = dict.fromkeys(EVENTS.values(), 0.0)
    programs = 0

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal programs
        if event in EVENTS:
            spent[EVENTS[event]] += duration_secs
            programs += EVENTS[event] == "compiling"

    # Imported by `lorajax.cli` only when it is needed, and its flags are set before.
    import lorajax.cli.output as output

    prepare = output.prepare_jax

    def listened(**options: Any) -> None:
        prepare(**options)
        import jax

        jax.monitoring.register_event_duration_secs_listener(listen)

    output.prepare_jax = listened
    from lorajax.cli import main

    begin = time.process_time()
    status = main(list(arguments))
    if status:
        raise SystemExit(status)
    # What JAX counts as compiling has the reading of compiled programs in it.
    spent["compiling"] = max(0.0, spent["compiling"] - spent["reading"])
    return {**spent, "programs": programs, "processor": time.process_time() - begin}


def rate() -> float:
    """Float64 operations a second of a large product, in a process of its own."""
    program = (
        "import jax; jax.config.update('jax_enable_x64', True); "
        "from benchmarks.sweeps import gemm_rate; print(gemm_rate())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def measured(command: Sequence[str], home: str) -> tuple[dict[str, float], float | None]:
    """Seconds of a command in a process of its own, and the share that others took meanwhile."""
    watch, begin, before = Watch(), time.perf_counter(), own()
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "told.json")
        given = ["--json", target, "--child", *command, "--out", folder]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "waiting", *given],
            env=os.environ | {"XDG_CACHE_HOME": home, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )
        wall = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        with open(target, encoding="utf-8") as file:
            found = json.load(file)
    return {"seconds": wall, **found, "processor": own() - before}, watch.others()


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each number, and the least and the most of the clock's seconds."""
    seconds = [each["seconds"] for each in rounds]
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {**medians, "spread": [min(seconds), max(seconds)]}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each command twice a round and prints where its time goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=COMMANDS, help="one of the commands")
    parser.add_argument("--rounds", type=int, default=3, help="of everything")
    parser.add_argument("--json", metavar="FILE", help="write the table")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        found = child(args.child)
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file)
        return 0
    turns: dict[str, list[dict[str, float]]] = {}
    others = []
    for _ in range(args.rounds):
        for command in [args.only] if args.only else COMMANDS:
            with tempfile.TemporaryDirectory() as home:
                for turn in ("first", "second"):
                    found, busy = measured(COMMANDS[command], home)
                    others.append(busy)
                    turns.setdefault(f"{command}, {turn}", []).append(found)
                    print(f"{command}, {turn}: {found['seconds']:.1f} s", flush=True)
    print("Medians:")
    table = {name: summary(rounds) for name, rounds in turns.items()}
    for name, found in table.items():
        least, most = found["spread"]
        print(
            f"{name}: {found['seconds']:.1f} s ({least:.1f} to {most:.1f}); of "
            f"{found['processor']:.1f} s of the processor's tracing {found['tracing']:.1f}, "
            f"compiling {found['compiling']:.1f} ({found['programs']:.0f} programs), reading "
            f"{found['reading']:.1f}"
        )
    content = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "gemm_flop_rate": rate(),
        "rounds": args.rounds,
        "commands": table,
        "others": others,
    }
    report(args.json, content, others)
    return 0


if __name__ == "__main__":
    sys.exit(main())
