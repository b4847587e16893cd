"""A LoRA step on ViT-B/16: lorajax against PEFT with torch, on this machine and in this run.

`python -m benchmarks finetune` needs the extra `benchmark`. Each engine runs in a process of its
own, in turn and several times over, so that a busy machine slows both alike (what other processes
took in the meantime is told), and loads one and the same checkpoint in Hugging Face's format
(random weights); memory is the largest resident set of the process. The share of the GEMM peak
counts the matrix products of the step and compares them with what one large product of the same
engine reaches in the same process: engines differ in how much of a processor their products use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import machine

WIDTH, DEPTH, HIDDEN, PATCH, SIDE, CLASSES = 768, 12, 3072, 16, 224, 1000
TOKENS = (SIDE // PATCH) ** 2 + 1


def step_flops(batch: int, rank: int) -> float:
    """Floating-point operations of the matrix products of one step.

    Forward, and backward with respect to activations; kernels are frozen, so that their gradients
    cost nothing. Attention's two products come back twice each.
    """
    dense = DEPTH * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN)
    adapters = DEPTH * 2 * 2 * WIDTH * rank
    attention = DEPTH * 2 * TOKENS * WIDTH
    per_token = 2 * (2 * dense + 3 * adapters + 3 * attention)
    return batch * (TOKENS * per_token + 2 * (TOKENS - 1) * 3 * PATCH**2 * WIDTH)


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Seconds of each step."""
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def measured(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """The first step by itself, then the others by the clock and by what the processor spent."""
    first = timed(step, 1)[0]
    begin = time.process_time()
    seconds = timed(step, steps)
    cpu = (time.process_time() - begin) / steps
    memory = machine.peak()
    return {"first": first, "seconds": seconds, "cpu": cpu, "memory": memory}


def peft_engine(folder: str, batch: int, rank: int, steps: int) -> dict[str, Any]:
    from benchmarks import peers

    peers.load_torchvision()
    import peft
    import torch
    import transformers

    model = transformers.ViTForImageClassification.from_pretrained(folder)
    model, trainable, optimizer = peers.lora(model, rank)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.standard_normal((batch, 3, SIDE, SIDE)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, CLASSES, batch))

    def step() -> None:
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    found = measured(step, steps)
    matrix = torch.randn(2048, 2048)
    _ = matrix @ matrix  # the first product also allocates
    gemm = 2 * 2048**3 / min(timed(lambda: (matrix @ matrix, None)[1], 5))
    return {
        **found,
        "gemm": gemm,
        "trainable": sum(p.numel() for p in trainable),
        "version": f"peft {peft.__version__}, torch {torch.__version__}",
    }


def write_checkpoint(folder: str) -> None:
    """A ViT-B/16 of random weights, for both engines; in a process of its own."""
    from flax import nnx

    from lorajax import models

    model = models.build(models.config("vit-b/16", classes=CLASSES), rngs=nnx.Rngs(0))
    models.save(model, f"{folder}/model.safetensors", layout="huggingface")


def lorajax_engine(folder: str, batch: int, rank: int, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from lorajax import adapters, environment, finetune, models, tasks

    environment.guard()  # as the command does for its users
    environment.wide()
    model = models.load(folder)
    adapted = adapters.adapt(
        model,
        ["**/attention/query", "**/attention/value"],
        key=jax.random.key(0),
        rank=rank,
    )
    recipe = finetune.Recipe(steps=1000, batch_size=batch)
    trainer = finetune.Trainer(
        adapted, adapters.trainable(adapted), tasks.Images.of(model.config), recipe
    )
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, CLASSES, batch).astype(np.int32))
    state = trainer.init()

    def step() -> None:
        nonlocal state
        state, metrics = trainer.step(state, {"images": images, "labels": labels})
        float(metrics.loss)

    found = measured(step, steps)
    matrix = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.float32)
    product = jax.jit(lambda m: m @ m)
    product(matrix).block_until_ready()
    gemm = 2 * 2048**3 / min(timed(lambda: (product(matrix).block_until_ready(), None)[1], 5))
    return {
        **found,
        "gemm": gemm,
        "trainable": trainer.parameters,
        "version": f"jax {jax.__version__} on {jax.devices()[0].platform}",
    }


COMMAND = [sys.executable, "-m", "benchmarks", "finetune"]
ENGINES = {"lorajax": lorajax_engine, "peft": peft_engine}


def run_rounds(args: argparse.Namespace, folder: str) -> dict[str, list[dict[str, Any]]]:
    """What the engines measured, a dictionary a round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    for _ in range(args.rounds):
        for name in ENGINES:
            command = [*COMMAND, "--engine", name, "--batch", str(args.batch)]
            command += ["--rank", str(args.rank), "--steps", str(args.steps), "--folder", folder]
            watch = machine.Watch()
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ
            )
            last = {**json.loads(done.stdout.splitlines()[-1]), "others": watch.others()}
            found[name].append(last)
            print(f"{name}: {[round(s, 2) for s in found[name][-1]['seconds']]} s", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the engines in turn and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the table")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.engine:
        engine = ENGINES[args.engine]
        print(json.dumps(engine(args.folder, args.batch, args.rank, args.steps)))
        return 0
    if args.folder:
        write_checkpoint(args.folder)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*COMMAND, "--folder", folder], check=True)
        found = run_rounds(args, folder)
    print(
        f"\nViT-B/16, batch {args.batch}, rank {args.rank} on query and value, float32, "
        f"{os.cpu_count()} cores; {args.rounds} rounds of {args.steps} steps"
    )
    flops = step_flops(args.batch, args.rank)
    medians, table = {}, {}
    for name, rounds in found.items():
        seconds = [s for each in rounds for s in each["seconds"]]
        medians[name] = statistics.median(seconds)
        memory = max(each["memory"] for each in rounds)
        gemm = max(each["gemm"] for each in rounds)
        table[name] = {
            "version": rounds[0]["version"],
            "seconds_per_step": medians[name],
            "spread": [min(seconds), max(seconds)],
            "processor_seconds": statistics.median(each["cpu"] for each in rounds),
            "peak_bytes": memory,
            "images_per_second": args.batch / medians[name],
            "share_of_gemm": flops / medians[name] / gemm,
            "gemm_flop_rate": gemm,
            "others": [each["others"] for each in rounds],
        }
        print(
            f"{name:8} {medians[name]:.2f} s a step (best {min(seconds):.2f}), "
            f"{min(each['cpu'] for each in rounds):.2f} s of processor time, "
            f"{args.batch / medians[name]:.2f} images/s, peak memory {memory / 1e9:.2f} GB, "
            f"{100 * flops / medians[name] / gemm:.0f} % of its GEMM peak "
            f"({gemm / 1e9:.0f} GFLOP/s), "
            f"first step {min(each['first'] for each in rounds):.1f} s, "
            f"{rounds[0]['trainable']:,} trainable; {rounds[0]['version']}"
        )
    ratio = medians["lorajax"] / medians["peft"]
    memory = table["lorajax"]["peak_bytes"] / table["peft"]["peak_bytes"]
    print(f"lorajax takes {ratio:.2f} of PEFT's time and {memory:.2f} of its memory")
    content = {"batch": args.batch, "rank": args.rank, "cores": os.cpu_count()}
    content |= {"engines": table, "time": ratio, "memory": memory}
    machine.report(args.json, content, [x for each in table.values() for x in each["others"]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
