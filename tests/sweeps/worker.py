"""A sweep in a process of its own, for the tests: `worker.py MODE STORE [ADDRESS PROCESS]`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import lorajax
from lorajax import initializers
from lorajax.flows import lanes
from lorajax.sweeps import sweep

jax.config.update("jax_enable_x64", True)

AXES = {"scale": np.logspace(-3, 0, 4), "seed": range(45)}


def walk(scale, key):
    """A logistic map from a random start: what one rounding error would grow in."""
    start = 0.1 + 0.8 * jax.random.uniform(key, (4,))
    x = jax.lax.fori_loop(0, 20, lambda _, x: (2.5 + scale) * x * (1 - x), start)
    return {"x": x, "mean": jnp.mean(x)}


def flow(scale, key):
    """A flow whose adaptive steps would carry one rounding error to 1e-9."""
    problem = lorajax.MatrixFactorization.from_spectrum(jax.random.key(0), (12, 10), (3.0, 2.0))
    start = jax.vmap(lambda k, a: initializers.lora(k, problem.shape, 4, a))(key, 1e-2 * scale)
    found = lanes.reduced_ode(problem, start, jnp.linspace(0.0, 20.0, 30), one_sided=True)
    return {**found.observed, "status": found.status}


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
    elif mode == "flow":
        for count, chunk in ((1, 180), (2, 7)):
            used = jax.devices()[:count]
            options = dict(key=jax.random.key(5), batched=True, devices=used, chunk=chunk)
            sweep(flow, AXES, store=f"{store}-{count}-{chunk}", **options)
    elif mode == "processes":
        address, process = rest
        jax.distributed.initialize(address, num_processes=2, process_id=int(process))
        found = run(store, chunk=20)
        assert jax.process_count() == 2
        print("done", int((found["status"] == 0).sum()), flush=True)


if __name__ == "__main__":
    main()
