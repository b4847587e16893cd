"""What campaigns leave: a file of JSON each, and the page `docs/campaigns.md` made of all."""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "campaigns.md"
NAMES = ("badcalls", "hostile", "faults")

HEAD = """\
# Campaigns of harm

Made by `python -m benchmarks badcalls`, `hostile` and `faults`, each of which does all of its part
anew, keeps its table in `benchmarks/results/` and renews this page. Every draw comes from a seed.
"""


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Rows as Markdown; numbers stand to the right."""
    numbers = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    lines = [head, ["---:" if right else "---" for right in numbers]]
    lines += [[f"{x:,}" if isinstance(x, int) else str(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(name: str, found: dict[str, Any]) -> None:
    """Keeps a campaign's result, whose `page` is its section, and makes the page of all."""
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    parts = [HEAD]
    for each in NAMES:
        file = RESULTS / f"{each}.json"
        if file.exists():
            parts.append(json.loads(file.read_text())["page"])
    PAGE.write_text("\n".join(part.rstrip() + "\n" for part in parts))


class Journal:
    """What a campaign has done so far, a line each, so that one that was cut off goes on.

    Args:
      path: of the file.
      fresh: whether to begin anew.
    """

    def __init__(self, path: pathlib.Path, fresh: bool):
        if fresh:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # cut off in the middle
                    continue
                self.done[row["name"]] = row
        self._file = path.open("a")

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, whose `name` tells it."""
        self.done[row["name"]] = row
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
