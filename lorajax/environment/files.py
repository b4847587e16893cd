"""Files that appear complete or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the block ends.

    A reader, a crash or a second writer never sees half a file.

    Args:
      path: the file to make or to replace; its folder exists.

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
        partial.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file in one step; text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
