"""What do adapters cost: memory and time of a step, and of choosing ranks, against their peers?

    python -m benchmarks adapters [--quick] [--json FILE]

`memory`: bytes that a training step with Adam needs beyond the base's weights, as XLA's own
analysis of the compiled step has them (arguments + temporaries − base), for LoRA and for full
fine-tuning; less the activations, the temporaries of the gradient alone, they are to be at most 16
for each parameter that trains.

`step`: seconds of that step, against full fine-tuning and Flax's own `nnx.LoRA` on the same model.

`ranks`: CPU seconds of `select_ranks` over those of the gradient passes that it needs (the same
gradients, accumulated over the same batches), compilation included in both.

`tucker`: relative error of a Tucker update and of the best LoRA with no fewer parameters, on
convolution kernels whose update has multilinear rank (2, 2, 6, 6).
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lorajax import adapters, initializers

KEY = jax.random.key(0)


class Net(nnx.Module):
    """A stack of wide layers with nonlinearities."""

    def __init__(self, width: int, depth: int, layer: Callable[..., nnx.Module] | None = None):
        rngs = nnx.Rngs(0)
        make = layer or (lambda: nnx.Linear(width, width, rngs=rngs))
        self.layers = nnx.List([make() for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jax.nn.gelu(layer(x))
        return x


def per_sample(model: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Squared error of each sample."""
    return jnp.mean((model(batch[0]) - batch[1]) ** 2, axis=-1)


def training_step(model: Any, wrt: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step of Adam on what `wrt` lets through, and its first arguments."""
    graphdef, params, rest = nnx.split(model, wrt, ...)
    transformation = optax.adam(1e-3)

    def step(params: Any, moments: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        loss = lambda p: jnp.mean(per_sample(nnx.merge(graphdef, p, rest), batch))  # noqa: E731
        updates, moments = transformation.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    return step, (params, transformation.init(params), rest)


def nbytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def data(width: int, rows: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets, float32."""
    draw = np.random.default_rng(seed)
    inputs, targets = (jnp.asarray(draw.normal(size=(rows, width)), jnp.float32) for _ in "xy")
    return inputs, targets


def memory(width: int, depth: int, rows: int, rank: int) -> dict[str, Any]:
    """Bytes of a step beyond the base's weights."""
    model = Net(width, depth)
    batch = data(width, rows)
    result: dict[str, Any] = {"width": width, "depth": depth, "rows": rows, "rank": rank}
    adapted = adapters.adapt(model, key=KEY, rank=rank)
    for name, each, wrt in (
        ("lora", adapted, adapters.trainable(adapted)),
        ("full", model, nnx.Param),
    ):
        step, (params, moments, rest) = training_step(each, wrt)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, rest, batch)
        analysis = compiled.compile().memory_analysis()
        assert analysis is not None, "this backend has no memory analysis"
        weights = nbytes(nnx.state(model))
        peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes - nbytes(batch)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        result[name] = {"parameters": count, "beyond_base": peak - weights}
        graphdef, _, _ = nnx.split(each, wrt, ...)
        loss = lambda p, g=graphdef, r=rest: jnp.mean(  # noqa: E731
            per_sample(nnx.merge(g, p, r), batch)
        )
        # Gradients are outputs here, so that temporaries are what backpropagation itself holds.
        backward = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
        assert backward is not None
        activations = backward.temp_size_in_bytes
        result[name] |= {
            "activations": activations,
            "bytes_per_parameter": (peak - weights - activations) / count,
        }
    return result


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The best wall time of several runs after one that compiles."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - begin)
    return best


def steps(width: int, depth: int, rows: int, rank: int, repeats: int) -> dict[str, float]:
    """Seconds of a training step."""
    model, batch = Net(width, depth), data(width, rows)
    adapted = adapters.adapt(model, key=KEY, rank=rank)
    rngs = nnx.Rngs(0)

    def flax_layer() -> nnx.Module:
        base = nnx.Linear(width, width, rngs=rngs)
        return nnx.LoRA(width, rank, width, base_module=base, rngs=rngs)

    runs = {}
    for name, each, wrt in (
        ("lorajax", adapted, adapters.trainable(adapted)),
        ("flax nnx.LoRA", Net(width, depth, flax_layer), nnx.LoRAParam),
        ("full", model, nnx.Param),
    ):
        step, arguments = training_step(each, wrt)
        runs[name] = functools.partial(jax.jit(step), *arguments, batch)
    result = dict.fromkeys(runs, float("inf"))
    # In turns, since other work on the machine slows whatever runs at the moment.
    for _ in range(repeats):
        for name, run in runs.items():
            result[name] = min(result[name], seconds(run, 1))
    return result


def rank_selection(width: int, depth: int, rows: int, count: int) -> dict[str, Any]:
    """Seconds of select_ranks over those of its gradient passes."""
    model = Net(width, depth)
    batches = [data(width, rows, seed) for seed in range(count)]

    def passes(signs: bool) -> Any:
        graphdef, diff, rest = nnx.split(model, lambda path, _: path[-1] == "kernel", ...)

        @jax.jit
        def step(diff: Any, rest: Any, sums: Any, batch: Any) -> Any:
            losses, pull = jax.vjp(lambda d: per_sample(nnx.merge(graphdef, d, rest), batch), diff)
            cotangents = [jnp.ones_like(losses)] + [-jnp.ones_like(losses)] * signs
            return [
                jax.tree.map(jnp.add, s, pull(c)[0]) for s, c in zip(sums, cotangents, strict=True)
            ]

        sums = [jax.tree.map(jnp.zeros_like, diff)] * (1 + signs)
        for batch in batches:
            sums = step(diff, rest, sums, batch)
        return jax.block_until_ready(sums)

    result: dict[str, Any] = {"width": width, "depth": depth, "rows": rows, "batches": count}
    for rule, signs in (("split_half", False), ("random_signs", True)):
        times: dict[str, list[float]] = {"passes_s": [], "select_ranks_s": []}
        # CPU seconds of all threads: other work on the machine stretches the wall clock.
        for _ in range(3):
            for name, run in (
                ("passes_s", lambda: passes(signs)),  # noqa: B023
                ("select_ranks_s", lambda: adapters.select_ranks(model, per_sample, batches, rule)),  # noqa: B023
            ):
                begin = time.process_time()
                run()
                times[name].append(time.process_time() - begin)
        best = {name: min(values) for name, values in times.items()}
        result[rule] = best | {"ratio": best["select_ranks_s"] / best["passes_s"]}
    return result


def tucker(draws: int) -> dict[str, Any]:
    """Relative errors at equal parameters, on updates of low multilinear rank."""
    shape, true = (3, 3, 64, 64), (2, 2, 6, 6)
    errors = []
    for seed in range(draws):
        draw = np.random.default_rng(seed)
        core = jnp.asarray(draw.normal(size=true))
        frames = tuple(jnp.asarray(draw.normal(size=n)) for n in zip(shape, true, strict=True))
        target = np.asarray(initializers.TuckerFactors(core, frames).product)
        made = initializers.hosvd(jnp.asarray(target), true)
        projected = target
        for mode, frame in enumerate(made.factors):
            moved = np.tensordot(frame @ frame.T, projected, axes=(1, mode))
            projected = np.moveaxis(moved, 0, mode)
        rank = -(-made.parameters // (9 * 64 + 64))  # rounded up, in favor of LoRA
        u, s, vt = np.linalg.svd(target.reshape(-1, 64), full_matrices=False)
        lora = ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(shape)
        size = np.linalg.norm(target)
        pair = [np.linalg.norm(x - target) / size for x in (projected, lora)]
        errors.append(pair)
    best = np.median(errors, axis=0)
    return {
        "parameters_tucker": made.parameters,
        "parameters_lora": rank * 640,
        "error_tucker": float(best[0]),
        "error_lora": float(best[1]),
    }


def main(argv: list[str]) -> int:
    """Runs the four measurements and prints them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks adapters", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds in all")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args(argv)
    quick = options.quick
    width, depth, rows = (128, 4, 64) if quick else (512, 8, 256)
    figures = {
        "memory": memory(width, depth, rows, rank=8),
        "step": steps(width, depth, rows, rank=8, repeats=3 if quick else 20),
        "ranks": rank_selection(
            64 if quick else 256, 4, 512 if quick else 2048, count=8 if quick else 240
        ),
        "tucker": tucker(draws=3 if quick else 10),
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    return 0
