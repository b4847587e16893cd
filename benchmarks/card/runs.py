"""A stage in a process of its own, with a budget, whose results are on disk as they come."""

import concurrent.futures
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from lorajax import environment
from lorajax.environment import files

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the benchmark.

    Attributes:
      name: of the stage, in the results.
      function: "module.function" of this package, called with a Report and whether it is tiny.
      seconds: that it may take.
      needs: packages without which it is not run, but named as missing.
      beside: whether it may run beside others, because it measures no time.
    """

    name: str
    function: str
    seconds: float
    needs: tuple[str, ...] = ()
    beside: bool = False


class Report:
    """What a stage has found, written after each addition.

    Args:
      path: of the file.
      seconds: that the stage may take from now on.
    """

    def __init__(self, path: pathlib.Path, seconds: float) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.found: dict[str, Any] = {}

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - time.monotonic()

    def add(self, **found: Any) -> None:
        """Adds results by name."""
        self.found |= found
        files.write(self.path, json.dumps(self.found))

    def row(self, **row: Any) -> None:
        """Adds a row to the stage's table."""
        self.add(rows=[*self.found.get("rows", ()), row])


def run_here(stage: Stage, path: pathlib.Path, seconds: float, tiny: bool) -> int:
    """Runs a stage in this process, which is its own; an error becomes part of what is found."""
    environment.guard()  # before any stage imports jax
    os.environ.setdefault("NPROC", "16")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    report = Report(path, seconds)
    module, _, name = stage.function.partition(".")
    try:
        run = getattr(importlib.import_module(f"benchmarks.card.{module}"), name)
        run(report, tiny)
    except Exception as error:
        traceback.print_exc()
        told = (str(error).strip().splitlines() or [""])[0][:300]
        report.add(error=f"{type(error).__name__}: {told}")
        return 1
    report.add(finished=True)
    return 0


def run_apart(stage: Stage, seconds: float, tiny: bool) -> dict[str, Any]:
    """Runs a stage in a process of its own and returns what it found, whatever becomes of it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path, log = pathlib.Path(folder, "found.json"), pathlib.Path(folder, "log.txt")
        command = [sys.executable, "-m", "benchmarks", "gpu", "--stage", stage.name]
        command += ["--report", str(path), "--seconds", f"{seconds:.0f}", *["--tiny"] * tiny]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=_environment()
            )
            try:
                # A stage looks at its budget itself; this is for one that hangs.
                status: int | None = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
            except BaseException:
                process.kill()
                raise
        found = json.loads(path.read_text()) if path.exists() else {}
        said = log.read_text(errors="replace").strip().splitlines()
    found["seconds"] = round(time.monotonic() - begin, 1)
    if found.pop("finished", False):
        return {"state": "done", **found}
    if status is None:
        return {"state": "out of time", **found}
    if "error" not in found:
        found["error"] = f"ended with status {status}: {said[-1][:300] if said else 'no output'}"
    return {"state": "failed", **found}


def _environment() -> dict[str, str]:
    # Stages that run beside each other share the card's memory; threads of torch on a busy
    # processor would wait for each other by spinning.
    return os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_WAIT_POLICY": "PASSIVE"}


def run_all(
    stages: Sequence[Stage],
    end: float,
    tiny: bool,
    missing: Callable[[Stage], Sequence[str]],
    save: Callable[[str, dict[str, Any]], None],
) -> None:
    """Runs stages until a time, those that measure no time beside each other, and saves each.

    Args:
      stages: which, those that may run beside each other first.
      end: on the monotonic clock, after which none begins and all are stopped.
      tiny: whether in the tiny form.
      missing: packages that a stage needs and that are not installed.
      save: called with a stage's name and what it found.
    """

    def one(stage: Stage) -> tuple[str, dict[str, Any]]:
        if lacking := missing(stage):
            return stage.name, {"state": "missing", "missing": list(lacking)}
        # The tiny form is for any machine, however busy.
        seconds = min(stage.seconds * (4 if tiny else 1), end - time.monotonic())
        if seconds < 5:
            return stage.name, {"state": "not begun"}
        return stage.name, run_apart(stage, seconds, tiny)

    writing = threading.Lock()

    def kept(stage: Stage) -> None:
        # By the thread that ran it, before it begins another: an end in between loses nothing.
        done = one(stage)
        with writing:
            save(*done)

    beside = [stage for stage in stages if stage.beside]
    with concurrent.futures.ThreadPoolExecutor(max(1, min(len(beside), _workers()))) as pool:
        for done in concurrent.futures.as_completed([pool.submit(kept, s) for s in beside]):
            done.result()
    for stage in stages:
        if not stage.beside:
            kept(stage)


def _workers() -> int:
    # Each of them compiles, which takes a core or two.
    return max(1, (os.cpu_count() or 1) // 2)
