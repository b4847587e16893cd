"""Plain text for terminals."""

from collections.abc import Collection, Iterable, Sequence


def table(
    header: Sequence[str], lines: Iterable[Sequence[str]], right: Collection[int] = ()
) -> str:
    """Aligned columns under a header.

    Args:
      header: one cell a column.
      lines: as many cells each.
      right: the columns that are flush right.

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
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [header, ["-" * width for width in widths], *lines]))
