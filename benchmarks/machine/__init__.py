"""How much of the machine others used while something was measured.

A load average also counts the threads of what is measured, and remembers what ran before it, so
that it calls a quiet machine busy. What counts here is processor time that went to other processes.
"""

import json
import os
import pathlib
import resource
import time
from typing import Any

BUSY = 0.05
"""The share of the machine from which on times by the clock compare nothing."""


def everyone() -> float | None:
    """Seconds of processor time of all processes since the machine started; None but on Linux."""
    try:
        line = pathlib.Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft = map(int, line.split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """Seconds of processor time of this process and of those of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak() -> int:
    """Bytes that this process has had in memory at most (Linux counts them in kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Looks on from when it is made."""

    def __init__(self) -> None:
        self._everyone, self._own, self._begin = everyone(), own(), time.perf_counter()

    def others(self) -> float | None:
        """The share of the machine's processor time since then that other processes took.

        Of children that still run nothing is known: it is asked after they have ended.
        """
        now = everyone()
        if now is None or self._everyone is None:
            return None
        spent = now - self._everyone - (own() - self._own)
        whole = (time.perf_counter() - self._begin) * (os.cpu_count() or 1)
        return max(0.0, spent / whole)


def said(shares: list[float | None]) -> str:
    """In words, what others took; empty where the machine was quiet, or nothing is known of it."""
    most = max((x for x in shares if x is not None), default=0.0)
    if most <= BUSY:
        return ""
    return (
        f"other processes took up to {most:.0%} of the machine: the clock's times are those of a "
        "busy machine and compare nothing; processor times are the engines' own"
    )


def report(path: str | None, content: dict[str, Any], shares: list[float | None]) -> None:
    """Says where a machine was not quiet, and writes that with a table, where a file is given."""
    busy = said(shares)
    if busy:
        print(busy)
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content | ({"busy": busy} if busy else {}), file, indent=1)
            file.write("\n")
