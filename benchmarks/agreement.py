"""Does a lane's result depend on chunks, devices or processes?

    python -m benchmarks agreement [--json FILE]

180 lanes of each engine (closed form, reduced ODE, two layers; 9 scales by 20 draws, double
precision) run in chunks of 1, 7 and 180 on one device, on 2 and 8 virtual devices, and in two
processes on the loopback. Each is compared with one device and one chunk: the largest difference
anywhere, over the largest value anywhere.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

CASES = ((1, 180), (1, 7), (1, 1), (2, 180), (2, 7), (8, 180))
"""Devices and lanes of a chunk; the first is what the others are compared with."""

WANTED = 1e-12


def engines():
    """The lane functions by engine, with the dimensions of what they return."""
    import functools

    import jax
    import jax.numpy as jnp

    import lorajax
    from lorajax import initializers
    from lorajax.flows import lanes
    from lorajax.problems import TwoLayer

    single = lorajax.MatrixFactorization.from_spectrum(
        jax.random.key(0), (32, 24), (4.0, 3.0, 2.0, 1.0)
    )
    double = TwoLayer.pretrained(jax.random.key(1), 12, "top")
    times = jnp.linspace(0.0, 20.0, 50)

    def start(initializer, rank):
        return jax.vmap(lambda key, scale: initializer(key, single.shape, rank, scale))

    def closed_form(scale, key):
        states = start(initializers.orthogonal, 8)(key, scale)
        return observed(lanes.closed_form(single, states, times, one_sided=True))

    def reduced_ode(scale, key):
        states = start(initializers.lora, 6)(key, scale)
        return observed(lanes.reduced_ode(single, states, times, one_sided=True))

    def observed(found):
        return {"value": found.observed["singular_values"], "status": found.status}

    def two_layer(scale, key):
        def blind(key, scale):
            adapter = functools.partial(initializers.small, rank=2, scale=scale)
            return double.blind_start(adapter, key)

        found = lanes.two_layer(double, jax.vmap(blind)(key, scale), jnp.linspace(0.0, 3.0, 30))
        return {"value": found.observed["losses"], "status": found.status}

    return {
        "closed_form": (closed_form, ("time", "mode")),
        "reduced_ode": (reduced_ode, ("time", "mode")),
        "two_layer": (two_layer, ("time",)),
    }


def run(name: str, store: pathlib.Path, chunk: int, devices: int | None = None) -> None:
    """Runs 180 lanes of an engine into a store."""
    import jax
    import numpy as np

    from lorajax.sweeps import sweep

    function, dims = engines()[name]
    sweep(
        function,
        {"scale": np.logspace(-1, -8, 9), "seed": range(20)},
        key=jax.random.key(5),
        batched=True,
        dims={"value": dims},
        chunk=chunk,
        devices=None if devices is None else jax.devices()[:devices],
        store=store,
    )


def store_of(folder: pathlib.Path, name: str, devices: int | str, chunk: int) -> pathlib.Path:
    return folder / f"{name}-{devices}-{chunk}.zarr"


def child(folder: pathlib.Path, address: str | None, process: int) -> None:
    """All cases on devices, or one of the two processes."""
    import jax

    jax.config.update("jax_enable_x64", True)
    if address is not None:
        jax.distributed.initialize(address, num_processes=2, process_id=process)
    for name in engines():
        if address is not None:
            run(name, store_of(folder, name, "processes", 45), 45)
            continue
        for devices, chunk in CASES:
            begin = time.perf_counter()
            run(name, store_of(folder, name, devices, chunk), chunk, devices)
            seconds = time.perf_counter() - begin
            print(f"{name} {devices} device(s), chunks of {chunk}: {seconds:.0f} s", flush=True)


def start(folder: pathlib.Path, devices: int, *arguments: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "agreement", "--child", str(folder), *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "16"},
    )


def compare(folder: pathlib.Path) -> list[dict]:
    import numpy as np

    from lorajax.sweeps import open_sweep

    rows = []
    for name in engines():
        want = open_sweep(store_of(folder, name, *CASES[0]))
        for devices, chunk in (*CASES[1:], ("processes", 45)):
            found = open_sweep(store_of(folder, name, devices, chunk))
            size = float(np.abs(want["value"]).max())
            rows.append(
                {
                    "engine": name,
                    "devices": devices,
                    "chunk": chunk,
                    "failed": int((found["status"] != 0).sum()),
                    "difference": float(np.abs(found["value"] - want["value"]).max()) / size,
                }
            )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks agreement", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", metavar="FOLDER", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options.child, options.address, options.process)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        workers = [start(folder, 1, "--address", address, "--process", str(i)) for i in range(2)]
        if any([worker.wait() for worker in workers]) or start(folder, 8).wait():
            return 1
        rows = compare(folder)
    for row in rows:
        where = "2 processes" if row["devices"] == "processes" else f"{row['devices']} device(s)"
        print(
            f"{row['engine']:12} {where:12} chunks of {row['chunk']:3}: {row['difference']:.1e}, "
            f"{row['failed']} failed"
        )
    worst = max(row["difference"] for row in rows)
    print(f"largest difference {worst:.1e}; wanted {WANTED:.0e}")
    if options.json:
        text = json.dumps({"wanted": WANTED, "rows": rows}, indent=1)
        pathlib.Path(options.json).write_text(text + "\n", encoding="utf-8")
    return int(not worst <= WANTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
