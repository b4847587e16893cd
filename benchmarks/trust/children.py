"""Work in a forked process, so that neither a hang nor a crash nor a gigabyte is the campaign's.

The parent imports whatever is heavy, JAX's backends excepted: threads do not survive a fork.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

ROOM = 3 << 30
"""Bytes of address space beyond what the process has: a bomb must not reach the machine."""


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # kibibytes on Linux


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def told(error: BaseException) -> dict[str, Any]:
    """What a campaign keeps of an exception: its kind, its words and the file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "message": str(error),
        "file": frames[-1].filename if frames else "",
        "line": frames[-1].lineno if frames else 0,
    }


def apart(task: Callable[[], Any], seconds: float, *, room: int | None = ROOM) -> dict[str, Any]:
    """The result of a task in a child process.

    Args:
      task: returns JSON.
      seconds: after which it is killed.
      room: bytes of address space that it may add; None for any.

    Returns:
      `value`, what the task returned, or what is `told` of its error; `seconds`; `hung` where it
      was killed; `status` where the process died of something else.
    """
    read, write = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            if room is not None:
                limit = _address_space() + room
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                found = {"value": task()}
            except BaseException as error:
                found = told(error)
            with os.fdopen(write, "w") as file:
                file.write(json.dumps(found))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(0)
    os.close(write)
    os.set_blocking(read, False)
    content, hung = b"", False
    while True:
        try:
            piece = os.read(read, 1 << 20)
        except BlockingIOError:
            if hung := time.monotonic() - begun > seconds:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
            continue
        if not piece:
            break
        content += piece
    os.close(read)
    _, status = os.waitpid(child, 0)
    found = json.loads(content) if content and not hung else {"hung": hung, "status": status}
    return {**found, "seconds": time.monotonic() - begun}
