"""Tables in Markdown, and numbers as they stand in them."""


def rows_of(header: str, rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first column and code are text, what else there is are numbers."""
    marks = ["---", *("---" if cell.startswith("`") else "---:" for cell in rows[0][1:])]
    lines = [f"| {header} |", "|" + "|".join(marks) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def time_of(seconds: float) -> str:
    """Seconds in a unit that can be read."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
        if seconds >= size:
            return f"{seconds / size:.3g}\u00a0{unit}"  # kept on one line
    return f"{seconds:.1e}\u00a0s"


def size_of(count: float) -> str:
    """Bytes in a unit that can be read."""
    return f"{count / 1e9:.2f}\u00a0GB" if count >= 1e9 else f"{count / 1e6:.3g}\u00a0MB"
