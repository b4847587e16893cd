"""What the subcommands share: folders for results, the compile cache, progress."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from lorajax import environment


def output_folder(name: str, option: str = "--out") -> Path:
    """Makes the folder of a run's results, and fails early if nothing can be written there.

    Args:
      name: of the folder.
      option: that gave it.

    Raises:
      ValueError: naming the folder and the reason.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} is {name!r}, which cannot be written ({error.strerror}); give a "
            f"folder that can."
        ) from error
    return folder


def add_formats(parser: argparse.ArgumentParser) -> None:
    """Adds the option of vector formats for figures."""
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=("svg", "pdf"),
        default=[],
        help="write figures in these formats too, beside PNG",
    )


def prepare_jax(*, x64: bool = True, brief: bool = False) -> None:
    """Switches the process to float64 and to a compile cache that later runs share.

    The theory's tolerances need float64; real models are trained without. Programs that run for
    seconds (`brief`) are compiled with little optimization, others with wide loops.
    """
    environment.guard()
    if brief:
        environment.compile_fast()
    else:
        environment.wide()
    # XLA runs LAPACK calls inside its thread pool, where as many independent ones as there are
    # threads wait for each other forever; with a thread a core that happens on two cores (jaxlib
    # 0.10.1).
    os.environ.setdefault("NPROC", "16")
    # XLA reports harmless tuning hints of cached code as errors, a page for each program.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Equinox raises from compiled code through host callbacks, and such programs are never
    # kept in the compile cache; every run has a status of its own instead.
    os.environ.setdefault("EQX_ON_ERROR", "nan")
    import gc

    import jax

    # Tracing makes millions of small objects, few of them in cycles: collecting at the usual rate
    # takes a tenth of a warm run.
    gc.set_threshold(50_000, 50, 100)
    jax.config.update("jax_enable_x64", x64)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = environment.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # Without a home every run compiles anew; nothing else changes.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Progress(tqdm):
    """A bar on a terminal, and elsewhere a line a tenth of the way.

    Args:
      total: number of steps.
      unit: what a step is called.
      done: steps that an earlier run has done.
    """

    monitor_interval = 0  # no thread: a bar moves when a step ends

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        self.live, self.tenth = sys.stderr.isatty(), -1
        interval = 0.1 if self.live else 0.0
        super().__init__(
            total=total,
            initial=done,
            unit=" " + unit,
            file=sys.stderr,
            dynamic_ncols=self.live,
            mininterval=interval,
            miniters=None if self.live else 1,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Shows how far it is; tqdm calls it."""
        if self.live:
            return bool(super().display(msg, pos))
        tenth = 10 * self.n // max(self.total, 1)
        if tenth > self.tenth and self.n:
            print(self, file=sys.stderr, flush=True)
        self.tenth = max(tenth, self.tenth)
        return True

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.live:
            self.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is; elsewhere the last line has been said already."""
        self.disable = self.disable or not self.live
        super().close()
