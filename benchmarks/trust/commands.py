"""The command in a forked process of which a fault is made: killed, cut off from its disk, misled.

The parent has imported everything and started no backend of JAX, so that a run begins at once.
"""

import ctypes
import os
import pathlib
import resource
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a run ended: its exit status (minus a signal's number), what it said, its seconds."""

    status: int
    said: str
    seconds: float


class Running:
    """A command that runs in a child process.

    Args:
      argv: its arguments.
      log: where what it says is kept.
      before: called in the child first.
    """

    def __init__(
        self, argv: list[str], log: pathlib.Path, before: Callable[[], None] | None = None
    ):
        self.log, self.begun = log, time.monotonic()
        self.child = os.fork()
        if self.child:
            return
        status = 70
        try:
            # A child of a shell's background job ignores interruptions unless told otherwise.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            if before is not None:
                before()
            from lorajax import cli

            status = cli.main(argv)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            import sys

            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        found, status = os.waitpid(self.child, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if found else None

    def finish(self, seconds: float = 120.0) -> Ended:
        """Waits for its end; what takes longer is killed, with status 99."""
        while (status := self.poll()) is None:
            if time.monotonic() - self.begun > seconds:
                os.kill(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)
                status = 99
                break
            time.sleep(0.005)
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(status, said, time.monotonic() - self.begun)

    def struck(self, number: int, after: float) -> Ended:
        """Sends it a signal after some seconds, unless it has ended."""
        while time.monotonic() - self.begun < after:
            if (status := self.poll()) is not None:
                said = self.log.read_text(errors="replace")
                return Ended(status, said, time.monotonic() - self.begun)
            time.sleep(0.001)
        os.kill(self.child, number)
        return self.finish()


def full_disk(size: int) -> Callable[[], None]:
    """A disk on which no file grows beyond a size."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def full_after(folder: pathlib.Path, count: int) -> Callable[[], None]:
    """A disk that is full after so many files were opened for writing in a folder."""

    def before() -> None:
        import errno
        import sys

        left, inside = [count], str(folder)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event != "open" or not isinstance(args[0], (str, bytes, os.PathLike)):
                return
            flags = args[2] if isinstance(args[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR) and os.fsdecode(args[0]).startswith(inside):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(args[0]))

        sys.addaudithook(hook)

    return before


def shifted_clock(seconds: float) -> Callable[[], None]:
    """A clock that is off, and that jumps back and forth."""

    def before() -> None:
        real, jumps = time.time, [0]

        def now() -> float:
            jumps[0] += 1
            return real() + (seconds if jumps[0] % 2 else -seconds)

        time.time = now

    return before


_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


def mortal() -> None:
    """Makes permissions bind the superuser, too, in this process."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(head, data):
        raise OSError(ctypes.get_errno(), "capget")
    data[0] &= ~_OVERRIDES
    if libc.capset(head, data):
        raise OSError(ctypes.get_errno(), "capset")


def read_only(folder: pathlib.Path, allowed: bool) -> None:
    """Takes away, or gives back, the permission to write below a folder."""
    for path in [folder, *folder.rglob("*")]:
        mode = path.stat().st_mode
        path.chmod(mode | 0o200 if allowed else mode & ~0o222)
