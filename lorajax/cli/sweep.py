"""Sweep flows over scales, ranks, spectra or seeds, into a Zarr store.

`flow` takes a problem of your own; the other studies are those of the papers. Lists are values,
`--scales 1e-1 1e-3 1e-5`; consecutive whole numbers may be written `--seeds 0:30` (0 to 29). A
sweep that was stopped goes on where it was when it is started again with the same store. Of several
processes (`--distributed`) each writes its own part of the store, and the first one speaks.
"""

import argparse
import os
from typing import Any

from lorajax import studies
from lorajax.cli import processes
from lorajax.cli.finetuning import MOST, bounded
from lorajax.cli.interrupts import saying
from lorajax.cli.output import Progress, output_folder

HELP = "run flows over scales, ranks and seeds, or a study of the papers, into a store"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for each study, with the study's own options."""
    inner = parser.add_subparsers(dest="study", metavar="STUDY", required=True)
    for name in studies.names():
        study = studies.find(name)
        own = inner.add_parser(name, help=study.about, description=f"{study.about}.")
        for parameter in study.parameters:
            _add(own, parameter)
        _configure_run(own, name)


def _add(parser: argparse.ArgumentParser, parameter: studies.Parameter) -> None:
    shown = parameter.about
    if parameter.default not in (None, ()):
        shown += f" (default {_spelled(parameter.default)})"
    options: dict[str, Any] = {"help": shown.replace("%", "%%"), "default": None}
    if parameter.is_list:
        options["nargs"] = "+"
    if parameter.choices:
        options["choices"] = parameter.choices
    else:
        metavar = {int: "N", float: "X", str: "NAME"}[parameter.kind]
        # Runs such as 0:30 are taken apart later, with an error that names the option.
        options |= {"metavar": metavar}
    parser.add_argument(parameter.option, **options)


def _spelled(default: Any) -> str:
    values = default if isinstance(default, tuple) else (default,)
    run = range(values[0], values[-1] + 1) if isinstance(values[0], int) else ()
    if len(values) > 2 and values == tuple(run):
        return f"{values[0]}:{values[-1] + 1}"
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _configure_run(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument_group("running").add_argument
    add("--store", metavar="DIR", help=f"Zarr store (default lorajax-sweep-{name}.zarr)")
    add("--plot", metavar="FILE", help="figure (default beside the store, as PNG)")
    add("--dry-run", action="store_true", help="print lanes, engine, memory and time, and stop")
    add("--chunk", type=int, metavar="N", help="lanes that are run and written together")
    add("--memory", type=float, metavar="MIB", help="for a chunk's results and temporaries")
    add("--devices", type=int, metavar="N", help="how many to spread lanes over (default all)")
    processes.configure(add, "sweep")


def given_values(study: studies.Study, args: argparse.Namespace) -> dict[str, Any]:
    """The study's parameters that the command line gives, checked.

    Raises:
      ValueError: naming the option and the value.
    """
    given = {}
    for parameter in study.parameters:
        words = getattr(args, parameter.name)
        if words is None:
            continue
        several = [words] if isinstance(words, str) else words
        values = [v for word in several for v in _values(parameter, word)]
        if not parameter.is_list and len(values) != 1:
            raise ValueError(f"{parameter.option} is {words}; give one value.")
        value = tuple(values) if parameter.is_list else values[0]
        given[parameter.name] = parameter.check(value, parameter.option)
    return given


def _values(parameter: studies.Parameter, word: str) -> list[Any]:
    """What one word stands for: a value, or a run of whole numbers."""
    try:
        if parameter.kind is int and ":" in word:
            first, last = (int(part) for part in word.split(":"))
            if last <= first or last - first > 10**7:
                raise ValueError
            return list(range(first, last))
        return [parameter.kind(word)]
    except ValueError:
        wanted = {int: "a whole number, or a run such as 0:30", float: "a number"}
        kind = wanted.get(parameter.kind, "a name")
        raise ValueError(f"{parameter.option} has {word!r}; it must be {kind}.") from None


def run(args: argparse.Namespace) -> int:
    """Runs the sweep, prints a summary and draws it."""
    study = studies.find(args.study)
    given = given_values(study, args)
    for name in ("chunk", "memory", "devices"):
        bounded(args, name, 1, MOST)
    processes.check(args)
    for name in ("store", "plot"):
        if (place := getattr(args, name)) and "://" not in place:
            output_folder(os.path.dirname(place) or ".", f"--{name}")
    with processes.joined(args, x64=True):
        return _run(args, study, given)


def _run(args: argparse.Namespace, study: studies.Study, given: dict[str, Any]) -> int:
    import jax

    from lorajax import sweeps

    devices = jax.local_devices()
    if args.devices is not None and args.devices > len(devices):
        raise ValueError(f"--devices is {args.devices}; this process has {len(devices)}.")
    store = args.store or f"lorajax-sweep-{args.study}.zarr"
    ready = study.prepare(**given)
    options = {**ready.options, "devices": devices[: args.devices], "store": store}
    if args.chunk:
        options["chunk"] = args.chunk
    if args.memory:
        options["memory"] = int(args.memory * 2**20)
    print(f"engine: {ready.engine}", flush=True)
    if args.dry_run:
        _say(sweeps.estimate(ready.function, ready.axes, **options), len(options["devices"]))
        return 0
    settings = {**study.settings(**given), "engine": ready.engine}
    shown = Shown()
    with saying(lambda: shown.left(store)):
        found = sweeps.sweep(
            ready.function, ready.axes, settings=settings, progress=shown, **options
        )
    if jax.process_index() != 0:
        return 0
    headline = study.headline if study.headline in found else next(iter(found.data_vars))
    print(summary(found, str(headline)))
    print(f"store: {store}")
    path = args.plot or f"{store.removesuffix('/').removesuffix('.zarr')}.png"
    print(f"figure: {studies.draw(found, path)}")
    return 0


def _say(found, devices: int) -> None:
    chunk = " × ".join(map(str, found.chunk))
    print(f"lanes: {found.lanes} in {found.chunks} chunks of {chunk}, on {devices} device(s)")
    print(f"programs to compile: {found.programs}")
    print(f"memory: {found.chunk_bytes / 2**20:.1f} MiB a call")
    print(f"results: {found.bytes / 2**20:.1f} MiB before compression")
    for name, v in found.variables.items():
        print(
            f"    {name}: {v.dtype} {'×'.join(map(str, v.shape)) or 'scalar'}  {' '.join(v.dims)}"
        )
    print(f"time: about {found.seconds:.1f} s, and the compilation")


class Shown:
    """Shows how far a sweep has come; called with a `sweeps.Progress` after each chunk."""

    bar: Progress | None = None

    def __call__(self, progress) -> None:
        """Moves the bar, which begins at what was there already."""
        if self.bar is None:
            self.bar = Progress(progress.total, "lane", progress.resumed)
            if progress.resumed:
                self.bar.say(f"({progress.resumed} were there)")
        if progress.failed:
            self.bar.set_postfix(failed=progress.failed, refresh=False)
        self.bar.update(progress.done - self.bar.n)
        if progress.done == progress.total:
            self.bar.close()

    def left(self, store: str) -> str:
        """How an interrupted sweep goes on."""
        done, total = (0, 0) if self.bar is None else (self.bar.n, self.bar.total)
        there = f"{done} of {total} lanes are in {store}" if done else f"no lane is in {store} yet"
        return f"{there}, and the same command goes on from there."


def summary(found, headline: str) -> str:
    """A table of the last value of a variable over the seeds, and how the lanes ended."""
    import numpy as np

    from lorajax.sweeps import STATUS

    values = found[headline]
    for dim in ("time", "mode", "target_mode"):
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
