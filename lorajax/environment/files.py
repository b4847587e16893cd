"""Files that appear complete or not at all, and files of strangers that are read within bounds."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the block ends.

    A reader, a crash or a second writer never sees half a file.

    Args:
      path: the file, or the folder, to make or to replace; what it lies in exists.

    Yields:
      A free name in the same folder, with the same ending. When the block raises, what was written
      there is removed and `path` is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{secrets.token_hex(4)}.part-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file in one step; text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def hold(folder: str | os.PathLike[str]) -> Callable[[], None]:
    """Marks a folder as this process's own until it is let go, or the process ends.

    Args:
      folder: that exists.

    Returns:
      What lets it go.

    Raises:
      BlockingIOError: while another process holds it. Systems without locks hold nothing.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise
    except (ImportError, OSError):
        pass
    left = [number]
    return lambda: os.close(left.pop()) if left else None


LARGEST = 2**31
"""Bytes of the largest file that is read at once."""
GROWTH = 100
"""How many times its size a compressed file may become; real data become 2 to 20 times as large."""
_FREE = 2**24  # what is small is no harm, however it grows


def regular(path: str | os.PathLike[str], largest: int = LARGEST) -> Path:
    """The path of a file that can be read to its end.

    Args:
      path: of the file.
      largest: bytes that it may have.

    Returns:
      The path.

    Raises:
      ValueError: for what is no file: a pipe or a device has no end; or for one that is too large.
    """
    path = Path(path)
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; name a file that can be read to its end.")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} has {size:,} bytes; at most {largest:,} are read, so divide it.")
    return path


def check_growth(path: str | os.PathLike[str], packed: int, unpacked: int) -> None:
    """Raises ValueError where compressed bytes become implausibly many.

    Args:
      path: of the file that holds them.
      packed: bytes in the file.
      unpacked: bytes that they become, at least.
    """
    if unpacked > max(_FREE, GROWTH * packed):
        raise ValueError(
            f"{path} grows from {packed:,} to {unpacked:,} bytes or more; at most {GROWTH} times "
            "its size is unpacked."
        )


def unpacked(path: str | os.PathLike[str], stream: Any) -> bytes:
    """All that a stream unpacks from a file, or ValueError where that grows beyond `GROWTH`.

    Args:
      path: of the file.
      stream: reads what it becomes.
    """
    packed, pieces, size = Path(path).stat().st_size, [], 0
    while piece := stream.read(1 << 20):
        size += len(piece)
        check_growth(path, packed, size)
        pieces.append(piece)
    return b"".join(pieces)
