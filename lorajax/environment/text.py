"""Plain text for terminals."""

import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence

WIDTH = 80
"""Columns of a terminal."""


def filled(text: str, indent: str = "", rest: str = "  ") -> str:
    """A text in lines that fit a terminal; words such as paths are never broken.

    Args:
      text: one paragraph.
      indent: in front of its first line.
      rest: in front of the others.

    Returns:
      Lines of text without a newline at the end.
    """
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    header: Sequence[str],
    lines: Iterable[Sequence[str]],
    right: Collection[int] = (),
    usual: Mapping[int, str] | None = None,
) -> str:
    """Aligned columns under a header.

    Args:
      header: one cell a column.
      lines: as many cells each.
      right: the columns that are flush right.
      usual: for some columns what each of their cells usually says; a column that says nothing
        else is left out.

    Returns:
      Lines of text without a newline at the end.

    Example:
      >>> print(table(("name", "size"), [("a", "7"), ("bcdef", "12")], right=(1,)))
      name   size
      -----  ----
      a         7
      bcdef    12
    """
    lines = list(lines)
    dull = {i for i, cell in (usual or {}).items() if all(line[i] == cell for line in lines)}
    keep = [i for i in range(len(header)) if i not in dull]
    right = {place for place, i in enumerate(keep) if i in right}
    header, *lines = ([cells[i] for i in keep] for cells in (header, *lines))
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [header, ["-" * width for width in widths], *lines]))
