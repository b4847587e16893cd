"""What an interrupted command does: it keeps what is done, and says how to go on."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Args:
      *words: how to go on, if that is known.
      signal: number of the signal.
    """

    def __init__(self, *words: str, signal: int = signal.SIGINT):
        super().__init__(*words)
        self.signal = signal


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal=number)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any], *signals: int) -> Iterator[None]:
    """A handler for some signals within the block; only a main thread has any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM ends a command as SIGINT does: batch systems send it first."""
    with _handling(_raise, signal.SIGTERM):
        yield


@contextlib.contextmanager
def saying(words: Callable[[], str]) -> Iterator[None]:
    """Within the block an interruption says how to go on.

    Args:
      words: makes them, when it comes to that.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        number = getattr(error, "signal", signal.SIGINT)
        raise Interrupted(*(error.args or (words(),)), signal=number) from None


class Stop:
    """Whether a signal has asked to stop; a context manager in which the first one only asks.

    The second one interrupts at once.
    """

    signal: int | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted(signal=number)
        self.signal = number

    def __enter__(self) -> "Stop":
        self._block = _handling(self._note, signal.SIGINT, signal.SIGTERM)
        self._block.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._block.__exit__(*details)
