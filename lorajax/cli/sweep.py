"""Sweep a preset of the papers over scale, rank, spectrum or samples, into a Zarr store.

A run that was stopped goes on where it was when it is started again with the same store. On
several processes (`--distributed`; JAX finds Slurm, Kubernetes, Open MPI and TPU pods by itself)
each writes its own part of the store.
"""

import argparse

from lorajax.cli.output import Progress, prepare_jax

HELP = "run a sweep that the papers make, into a store"
# Name, what it shows, and the defaults: size, rank, seeds and number of scales (or noise levels).
PRESETS = {
    "init-scale": (
        "two frozen layers over the initialization scale (Xu et al., Fig. 1)",
        32,
        4,
        30,
        6,
    ),
    "rank-scale": ("ranks against initialization scales", 128, 8, 10, 9),
    "spectrum-gap": ("two modes whose singular values approach", 64, 4, 10, 8),
    "rank-rule": ("rank rules over label noise and samples", 60, 5, 20, 8),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add = parser.add_argument
    shown = "; ".join(f"{name}: {about}" for name, (about, *_) in PRESETS.items())
    add("preset", choices=list(PRESETS), metavar="PRESET", help=shown)
    add("--store", metavar="DIR", help="Zarr store (default lorajax-sweep-PRESET.zarr)")
    add("--seeds", type=int, help="repetitions")
    add("--scales", type=int, help="number of scales or noise levels")
    add("--size", type=int, help="side of the matrices")
    add(
        "--rank", type=int, help="of the adapter (rank-scale: the largest; rank-rule: the target's)"
    )
    add("--chunk", type=int, help="lanes that are run and written together")
    add("--memory", type=float, metavar="MIB", help="for a chunk's results and temporaries")
    add("--devices", type=int, help="how many to spread lanes over (default all)")
    add("--distributed", action="store_true", help="join the other processes of this job")
    add("--coordinator", metavar="HOST:PORT", help="of the job, where JAX cannot find it")
    add("--processes", type=int, help="in the job, where JAX cannot find it")
    add("--process", type=int, help="number of this one, where JAX cannot find it")
    add("--plot", metavar="FILE", help="figure (default beside the store, as PNG)")
    add("--dry-run", action="store_true", help="print lanes, engine, memory and time, and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the sweep, prints a summary and draws it."""
    for name in ("seeds", "scales", "size", "rank", "chunk", "memory", "devices"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1.")
    prepare_jax()
    import jax

    if args.distributed or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    from lorajax import presets, sweeps

    _, size, rank, seeds, scales = PRESETS[args.preset]
    preset = presets.PRESETS[args.preset](
        args.size or size, args.rank or rank, args.seeds or seeds, args.scales or scales
    )
    store = args.store or f"lorajax-sweep-{args.preset}.zarr"
    options = dict(preset.options)
    devices = jax.local_devices()
    if args.devices is not None:
        if args.devices > len(devices):
            raise ValueError(f"--devices is {args.devices}; this process has {len(devices)}.")
        devices = devices[: args.devices]
    options |= {"devices": devices, "store": store}
    if args.chunk:
        options["chunk"] = args.chunk
    if args.memory:
        options["memory"] = int(args.memory * 2**20)
    print(f"engine: {preset.engine} ({preset.reason})", flush=True)
    if args.dry_run:
        _say(sweeps.plan(preset.function, preset.axes, **options), len(devices))
        return 0
    found = sweeps.sweep(
        preset.function, preset.axes, settings=preset.settings, progress=Shown(), **options
    )
    if jax.process_index() != 0:
        return 0
    print(summary(found, preset.headline))
    print(f"store: {store}")
    path = args.plot or f"{store.removesuffix('/').removesuffix('.zarr')}.png"
    from lorajax.plots import sweeps as figures

    print(f"figure: {figures.draw(found, path)}")
    return 0


def _say(plan, devices: int) -> None:
    chunk = " × ".join(map(str, plan.chunk))
    print(f"lanes: {plan.lanes} in {plan.chunks} chunks of {chunk}, on {devices} device(s)")
    print(f"programs to compile: {plan.programs}")
    print(f"memory: {plan.chunk_bytes / 2**20:.1f} MiB a call")
    print(f"results: {plan.bytes / 2**20:.1f} MiB before compression")
    for name, v in plan.variables.items():
        print(
            f"    {name}: {v.dtype} {'×'.join(map(str, v.shape)) or 'scalar'}  {' '.join(v.dims)}"
        )
    print(f"time: about {plan.seconds:.1f} s, and the compilation")


class Shown:
    """Shows how far a sweep has come; called with a `sweeps.Progress` after each chunk."""

    bar: Progress | None = None

    def __call__(self, progress) -> None:
        """Moves the bar, which begins at what was there already."""
        if self.bar is None:
            self.bar = Progress(progress.total, "lane", progress.resumed)
        if progress.failed:
            self.bar.set_postfix(failed=progress.failed, refresh=False)
        self.bar.update(progress.done - self.bar.n)
        if progress.done == progress.total:
            self.bar.close()


def summary(found, headline: str) -> str:
    """A table of the last value of a variable over the seeds, and how the lanes ended."""
    import numpy as np

    from lorajax.sweeps import STATUS

    values = found[headline]
    for dim in ("time", "mode"):
        if dim in values.dims:
            values = values.isel({dim: -1})
    axes = [d for d in values.dims if d != "seed"]
    mean, deviation = values.mean("seed"), values.std("seed")
    lines = [f"{headline} at the end, mean ± 1 sd over {found.sizes['seed']} seeds"]
    for index in np.ndindex(*(found.sizes[d] for d in axes)):
        at = dict(zip(axes, index, strict=True))
        label = "  ".join(f"{d} {_short(found[d].values[i])}" for d, i in at.items())
        lines.append(f"  {label:<44} {float(mean[at]):>12.4g} ± {float(deviation[at]):.2g}")
    codes = found["status"].values
    ended = ", ".join(f"{int(np.sum(codes == i))} {name}" for i, name in enumerate(STATUS))
    return "\n".join([*lines, f"lanes: {ended}"])


def _short(value) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
