"""A process for each alteration: forked where JAX is imported but not started, then left to pytest.

The files on disk stay as they are: the importer hands out the altered source in place of one file.
Programs that an alteration does not touch come from a compilation cache that the first, unaltered
run has filled and that nothing else writes to.
"""

import builtins
import contextlib
import importlib
import importlib.machinery
import json
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]

ROOM = 100_000
"""Numbers of lines that each module has in a record of what was executed."""

PRELOADED = (
    "jax",
    "jax.experimental.ode",
    "diffrax",
    "optax",
    "equinox",
    "flax.nnx",
    "scipy.integrate",
    "scipy.optimize",
    "scipy.stats",
    "xarray",
    "zarr",
    "cvxpy",
    "safetensors",
    "matplotlib.pyplot",
    "beartype",
    "jaxtyping",
    "pytest",
)
"""What costs seconds to import, of which a campaign pays none for each alteration."""

MEMORY = 24 * 2**30
PATIENCE = (20.0, 8.0)
"""Seconds that a test may take, and how many times what it takes unaltered on top of them."""


def preload(cache: pathlib.Path) -> None:
    """Imports what every child needs, and points JAX to the cache."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Before jax is imported: a thread pool of two can block itself for good, see conftest.py.
    os.environ.setdefault("NPROC", "16")
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def keep_programs(write: bool) -> None:
    """Whether this process may write to the compilation cache."""
    if "jax" in sys.modules:
        least = 0.0 if write else 1e9
        sys.modules["jax"].config.update("jax_persistent_cache_min_compile_time_secs", least)


def hand_out(sources: Mapping[str, str]) -> None:
    """From now on these modules are imported from these sources."""
    loader = importlib.machinery.SourceFileLoader
    plain = loader.get_code

    def get_code(self: Any, fullname: str) -> Any:
        if fullname in sources:
            return self.source_to_code(sources[fullname].encode(), self.get_filename(fullname))
        return plain(self, fullname)

    loader.get_code = get_code


def in_child(task: Callable[[], Any], log: pathlib.Path, seconds: float) -> tuple[Any, str]:
    """What a task returns in a process of its own.

    Returns:
      Its result, None if it died, and how it ended: "done", "slow" or "crashed".
    """
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _run_and_leave(task, log, result)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, "slow"
        time.sleep(0.01)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return None, "slow"
    if not result.exists():
        return None, "crashed"
    return json.loads(result.read_text(encoding="utf-8")), "done"


def _run_and_leave(task: Callable[[], Any], log: pathlib.Path, result: pathlib.Path) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        text = json.dumps(task())
        result.with_suffix(".part").write_text(text, encoding="utf-8")
        result.with_suffix(".part").rename(result)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        # No atexit handlers: they belong to the parent.
        os._exit(code)


class Watch:
    """A pytest plugin: how each test ends, how long it takes, and what it executes.

    Args:
      hits: filled by instrumented modules; empties before each test.
      allowed: CPU seconds of each test; more ends the process by SIGPROF.
    """

    def __init__(self, hits: set[int] | None = None, allowed: Mapping[str, float] | None = None):
        self.hits, self.allowed = hits, allowed
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: str | None = None
        self.reason = ""

    @contextlib.contextmanager
    def around(self, item: Any) -> Iterator[None]:
        """One test."""
        if self.hits is not None:
            self.forget(item)
        if self.allowed is not None:
            limit = self.allowed.get(item.nodeid, PATIENCE[0])
            signal.setitimer(signal.ITIMER_PROF, limit)
        begin = time.perf_counter()
        yield
        if self.hits is not None:
            row = self.tests.setdefault(item.nodeid, {"outcome": "passed"})
            row["seconds"] = round(time.perf_counter() - begin, 3)
            row["hits"] = sorted(self.hits)

    def forget(self, item: Any) -> None:
        """What earlier tests have traced or simulated must be executed again to be seen."""
        assert self.hits is not None
        self.hits.clear()
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        run = getattr(getattr(item, "module", None), "RUN", None)
        if run is not None:
            run._memory.clear()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of a test."""
        if report.passed:
            return
        row = self.tests.setdefault(report.nodeid, {"outcome": report.outcome})
        row["outcome"] = report.outcome
        if report.failed and self.failed is None:
            self.failed, self.reason = report.nodeid, self.short(report)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that could not be imported."""
        if report.failed and self.failed is None:
            self.failed, self.reason = f"import of {report.nodeid}", self.short(report)

    @staticmethod
    def short(report: Any) -> str:
        """The last line that says what went wrong, without the place of the checkout."""
        text = str(report.longreprtext).replace(f"{ROOT}{os.sep}", "")
        lines = [x for x in text.splitlines() if x.startswith("E ")]
        return lines[0][2:].strip()[:160] if lines else text[-160:]


def run_pytest(watch: Watch, arguments: Sequence[str], modules: Sequence[str]) -> int:
    """Runs pytest in this process with the watch on, and these modules imported first.

    In their own order: a doctest that is asked for alone would import its file before its package,
    and shadow a function of the same name.
    """
    import pytest

    class Plugin:
        def pytest_sessionstart(self) -> None:
            try:
                for name in modules:
                    importlib.import_module(name)
            except Exception as error:
                watch.failed, watch.reason = "import", f"{type(error).__name__}: {error}"
                pytest.exit("the altered module cannot be imported", returncode=1)

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
            with watch.around(item):
                return (yield)

    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    # As CI runs the tests: checks of shapes and dtypes at each call are among what may notice.
    quiet.append("--jaxtyping-packages=lorajax,beartype.beartype")
    return int(pytest.main([*quiet, *arguments], plugins=[watch, Plugin()]))


def record(
    sources: Mapping[str, str], arguments: Sequence[str], modules: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Each test of an unaltered run: its outcome, its seconds, and what it executed."""
    hits: set[int] = set()
    builtins._mutation_hit = hits.add  # type: ignore[attr-defined]
    keep_programs(write=True)
    hand_out(sources)
    watch = Watch(hits=hits)
    code = run_pytest(watch, arguments, modules)
    if code not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with {code} on {arguments}.")
    return watch.tests


def judge(
    module: str, source: str, tests: Mapping[str, float], modules: Sequence[str]
) -> dict[str, Any]:
    """The first test that an altered module fails, of those given with their seconds."""
    keep_programs(write=False)
    hand_out({module: source})
    watch = Watch(allowed={k: PATIENCE[0] + PATIENCE[1] * v for k, v in tests.items()})
    code = run_pytest(watch, ["-x", *tests], modules)
    if watch.failed is None and code != 0:
        raise RuntimeError(f"pytest ended with {code}, and no test failed.")
    return {"by": watch.failed, "reason": watch.reason}
