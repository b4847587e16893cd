"""What the subcommands share: folders for results, the compile cache, progress."""

import hashlib
import os
import platform
import sys
import tempfile
import time
from pathlib import Path


def output_folder(name: str) -> Path:
    """Makes the folder of a run's results, and fails early if nothing can be written there.

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
            f"--out is {name!r}, which cannot be written ({error.strerror}); give a "
            f"folder that can."
        ) from error
    return folder


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def prepare_jax(*, x64: bool = True) -> None:
    """Switches the process to float64 and to a compile cache that later runs share.

    The theory's tolerances need float64; real models are trained without. The cache is kept apart
    by jaxlib and by the processor's features, because compiled code of another processor may not
    run.
    """
    # XLA runs LAPACK calls inside its thread pool, where as many independent ones as there are
    # threads wait for each other forever; with a thread a core that happens on two cores (jaxlib
    # 0.10.1).
    os.environ.setdefault("NPROC", "16")
    # XLA reports harmless tuning hints of cached code as errors, a page for each program.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from importlib import metadata

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
    tag = hashlib.sha256(f"{metadata.version('jaxlib')} {_cpu()}".encode()).hexdigest()[:12]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "lorajax" / f"compiled-{tag}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # Without a home every run compiles anew; nothing else changes.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Progress:
    """One line a finished step, and on a terminal a line for the step that runs.

    Args:
      total: number of steps.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.begin = time.perf_counter()
        self.live = sys.stderr.isatty()

    def start(self, name: str) -> None:
        """Says what runs now, where the line can be taken back."""
        if self.live:
            print(f"\r\x1b[K[{self.done + 1:>2}/{self.total}] {name} …", end="", file=sys.stderr)
            sys.stderr.flush()

    def finish(self, text: str) -> None:
        """Says how a step ended."""
        self.done += 1
        clear = "\r\x1b[K" if self.live else ""
        elapsed = time.perf_counter() - self.begin
        line = f"{clear}[{self.done:>2}/{self.total}] {text}  ({elapsed:.0f} s so far)"
        print(line, file=sys.stderr, flush=True)
