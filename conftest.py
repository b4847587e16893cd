"""The JAX flags that every test and doctest runs under; the library itself never sets one."""

import functools
import gc
import os
import tempfile
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")
# Independent LAPACK calls in one program can wait for each other forever in XLA's thread pool when
# it has a thread for each of two cores only (lorajax/cli/output.py does the same for the command).
os.environ.setdefault("NPROC", "16")
# What one command has compiled, those that run after it read from a cache: one for each worker and
# each session, because JAX does not write entries atomically.
CACHE = tempfile.TemporaryDirectory(prefix="lorajax-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from lorajax import environment  # noqa: E402
from lorajax.environment import memory  # noqa: E402

# Before the first computation, which is when XLA reads its flags. Tests compile thousands of small
# programs and run each for milliseconds: there is nothing to compile in parallel, and the fusion
# emitters cost more than they save where XLA can still do without them (twice the time of a program
# in 0.10.1; 0.12.0.1 does not know the flag). So do LLVM's optimizations, see below. The gates that
# run the command itself run it as users do.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
environment.guard()
environment.add_flags(*FLAGS)

# JAX lowers each program in a context of MLIR of its own; to make and to unmake one takes longer
# than to lower a small program in it, and a quarter of all time with JAX 0.10.1. Tests have one a
# file. It is no public part of JAX: where it has moved, tests are slower, and nothing else.
CONTEXT = "make_ir_context"
if hasattr(mlir, CONTEXT):
    setattr(mlir, CONTEXT, functools.cache(getattr(mlir, CONTEXT)))

# Tracing makes millions of small objects, few of them in cycles (as in lorajax/cli/output.py); what
# whole collections cost, 5 s each, is paid where memory maps run out.
gc.set_threshold(50_000, 50, 1000)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


CACHED = ("test_cli", "test_sims", "test_contest")
"""Files of tests that run whole programs, which compile the same again and again."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Parts of all tests, for a gate that has no time for more."""
    parser.addoption(
        "--part", metavar="K/N", default="1/1", help="run every N-th test, from the K-th on"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what another part runs."""
    try:
        first, count = map(int, config.getoption("--part").split("/"))
        if not 1 <= first <= count:
            raise ValueError
    except ValueError as error:
        given = config.getoption("--part")
        raise pytest.UsageError(f"--part is {given!r}; it must be K/N with K in 1..N.") from error
    others = [item for i, item in enumerate(items) if i % count != first - 1]
    config.hook.pytest_deselected(items=others)
    items[:] = items[first - 1 :: count]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keeps the tests of a file in one worker, where they share what has been compiled."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Forgets compiled programs before a process runs out of memory maps."""
    yield
    if hasattr(mlir, CONTEXT):
        getattr(mlir, CONTEXT).cache_clear()
    # A file's programs have some 8,000 at most, and to forget and collect takes 4 s.
    if memory.crowded(40_000):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def cached_programs(request: pytest.FixtureRequest) -> None:
    """Uses the cache on disk where whole programs run.

    Elsewhere a program is small and compiled once: to look it up takes a sixth of all the time.
    """
    jax.config.update("jax_enable_compilation_cache", request.path.name.startswith(CACHED))
    compilation_cache.reset_cache()
