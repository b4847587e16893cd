"""A sweep in a process of its own, for the tests: `worker.py MODE STORE [ADDRESS PROCESS]`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.sweeps import sweep

jax.config.update("jax_enable_x64", True)

AXES = {"scale": np.logspace(-3, 0, 4), "seed": range(45)}


def walk(scale, key):
    """A logistic map from a random start: what one rounding error would grow in."""
    start = 0.1 + 0.8 * jax.random.uniform(key, (4,))
    x = jax.lax.fori_loop(0, 20, lambda _, x: (2.5 + scale) * x * (1 - x), start)
    return {"x": x, "mean": jnp.mean(x)}


def run(store, **options):
    return sweep(walk, AXES, key=jax.random.key(11), store=store, **options)


def main() -> None:
    mode, store, *rest = sys.argv[1:]
    if mode == "kill":
        print("ready", flush=True)
        run(store, chunk=3, progress=lambda p: print(p.done, flush=True))
    elif mode == "devices":
        assert jax.device_count() == 8
        for count in (1, 2, 8):
            run(f"{store}-{count}", chunk=45, devices=jax.devices()[:count])
    elif mode == "processes":
        address, process = rest
        jax.distributed.initialize(address, num_processes=2, process_id=int(process))
        found = run(store, chunk=20)
        assert jax.process_count() == 2
        print("done", int((found["status"] == 0).sum()), flush=True)


if __name__ == "__main__":
    main()
