"""The JAX flags that every test and doctest runs under; the library itself never sets one."""

import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")
# Independent LAPACK calls in one program can wait for each other forever in XLA's thread pool when
# it has a thread for each of two cores only (lorajax/cli/output.py does the same for the command).
os.environ.setdefault("NPROC", "16")
# What one test has compiled, others and the commands that they start read from a cache: one for
# each worker and each session, because JAX does not write entries atomically.
CACHE = tempfile.TemporaryDirectory(prefix="lorajax-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
import pytest  # noqa: E402

from lorajax import environment  # noqa: E402

# Before the first computation, which is when XLA reads its flags. Tests compile hundreds of small
# programs and run each for milliseconds: LLVM's optimizations cost more than they save.
if "xla_backend_optimization_level" not in environment.guard():
    os.environ["XLA_FLAGS"] = f"{environment.guard()} --xla_backend_optimization_level=0".strip()

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keeps the tests of a file in one worker, where they share what has been compiled."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Forgets compiled programs before a process runs out of memory maps.

    Each program holds several maps, Linux grants 65,530 a process, and XLA crashes beyond that.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
