"""Files of texts as columns of strings: TSV, CSV, JSON lines, folders of .txt files.

What a file does not say is not guessed: a row that does not fit the header, bytes that are no
UTF-8, a column that could be two things, all are one sentence with the file's name and the line.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorajax.environment.files import regular
from lorajax.environment.judging import judged

SUFFIXES = (".tsv", ".csv", ".jsonl", ".txt")
"""Endings of the files that `read_sheet` takes."""
TEXTS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
)
"""Names of columns that are texts to classify, where a header has one group and no more of them."""
LABELS = ("label", "score")
"""Names of columns that are the answers, likewise."""
ANSWERS: tuple[tuple[str, ...], ...] = (
    ("instruction", "input", "output"),
    ("prompt", "completion"),
)
"""Names of columns that are a request and last the answer to learn; "input" may be missing."""


class Sheet(NamedTuple):
    """A file's rows.

    Attributes:
      name: of the file or folder, for errors.
      columns: by name, values in the order of the rows. They are strings but where JSON says else.
      lines: where each row stands: the number of its line, or its file.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: list[str]

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, option: str) -> list[Any]:
        """A column by its name.

        Raises:
          ValueError: if there is none, naming the option and the columns there are.
        """
        if name not in self.columns:
            raise ValueError(
                f"{option} is {name!r}, but {self.name} has the columns "
                f"{', '.join(self.columns)}; name one of them."
            )
        return self.columns[name]

    def strings(self, name: str, option: str) -> list[str]:
        """A column of texts, none of them empty.

        Raises:
          ValueError: for a value that is no text, or has nothing but white space.
        """
        values = self.column(name, option)
        for value, line in zip(values, self.lines, strict=True):
            if not isinstance(value, str) or not value.strip():
                what = "is empty" if value is None or value == "" or isinstance(value, str) else ""
                raise ValueError(
                    f"{self.name}, {line}: {name} {what or f'is {value!r}, which is no text'}; "
                    "mend the row or leave it out."
                )
        return values


@judged
def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is one of texts: a file by its ending, a folder by holding .txt files."""
    path = Path(path)
    if path.is_dir():
        return any(path.glob("*.txt")) or any(path.glob("*/*.txt")) or any(path.glob("*/*/*.txt"))
    return path.suffix.lower() in SUFFIXES


@judged
def read_sheet(path: str | os.PathLike) -> Sheet:
    """Reads a file of texts.

    Args:
      path: by its ending
        - `.tsv`: one header line, then a row a line, tab-separated; there is no quoting, as in
          GLUE's files, so that a quote is a quote;
        - `.csv`: one header line, comma-separated, quoted by RFC 4180;
        - `.jsonl`: a JSON object a line, all with the keys of the first;
        - `.txt`: one text, in the column `text`;
        - a folder: with a folder of `.txt` files a class (columns `text` and `label`), or with
          `.txt` files (column `text`), in the order of their names.

    Returns:
      The Sheet. A byte order mark is dropped.

    Raises:
      ValueError: for another ending, bytes that are no UTF-8, a header with a name twice, a row of
        other columns than the header's, or no row at all.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; texts are read from folders and "
            f"{', '.join(SUFFIXES)}."
        )
    text = _decoded(path)
    kind = path.suffix.lower()
    if kind == ".txt":
        sheet = Sheet(str(path), {"text": [text]}, ["the whole file"])
    elif kind == ".jsonl":
        sheet = _objects(str(path), text)
    else:
        sheet = _tabular(str(path), _tabbed(text) if kind == ".tsv" else _quoted(str(path), text))
    if not len(sheet):
        raise ValueError(f"{path} has no rows; it needs at least one.")
    return sheet


def _decoded(path: Path) -> str:
    regular(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        # The mark that some editors put in front would become part of the first column's name.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is no UTF-8: line {line} has the byte {raw[error.start]:#04x}; save it so."
        ) from error


def _tabbed(text: str) -> list[tuple[int, list[str]]]:
    # Not splitlines: texts hold characters such as U+2028 that it takes for the end of a line.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    return [(i, line.split("\t")) for i, line in enumerate(lines, 1)]


def _quoted(name: str, text: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}; mend its quotes.") from error
    return rows


def _tabular(name: str, rows: Sequence[tuple[int, list[str]]]) -> Sheet:
    if not rows:
        raise ValueError(f"{name} is empty; it needs a header line and rows.")
    header = [each.strip() for each in rows[0][1]]
    if len(set(header)) < len(header) or not all(header):
        raise ValueError(
            f"{name} has the header {', '.join(map(repr, header))}; each column needs a name "
            "of its own."
        )
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(
                f"{name}, line {line}: it has {len(row)} fields where the header has "
                f"{len(header)}; mend the row or leave it out."
            )
    columns = {key: [row[i] for _, row in rows[1:]] for i, key in enumerate(header)}
    return Sheet(name, columns, [f"line {line}" for line, _ in rows[1:]])


def _objects(name: str, text: str) -> Sheet:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number}: it is no JSON: {error}.") from error
        if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
            wanted = f"with the keys {', '.join(rows[0])}" if rows else "of columns by name"
            raise ValueError(f"{name}, line {number}: it must be a JSON object {wanted}.")
        rows.append(row)
        lines.append(f"line {number}")
    if not rows:
        raise ValueError(f"{name} has no rows; it needs at least one.")
    return Sheet(name, {key: [row[key] for row in rows] for key in rows[0]}, lines)


def _folder(path: Path) -> Sheet:
    classes = sorted(each for each in path.iterdir() if each.is_dir() and any(each.glob("*.txt")))
    loose = sorted(path.glob("*.txt"))
    if bool(classes) == bool(loose):
        raise ValueError(
            f"{path} has {len(classes)} folders of .txt files and {len(loose)} .txt files of its "
            "own; it needs either a folder a class, or files alone."
        )
    files = [file for each in classes for file in sorted(each.glob("*.txt"))] or loose
    columns: dict[str, list[Any]] = {"text": [_decoded(file) for file in files]}
    if classes:
        columns["label"] = [file.parent.name for file in files]
    return Sheet(str(path), columns, [str(file.relative_to(path)) for file in files])


class Columns(NamedTuple):
    """Which columns are what.

    Attributes:
      kind: "labels" (texts with an answer each), "answers" (a request and its answer),
        "messages" (conversations) or "text" (texts to continue).
      texts: names of the columns of text, in order; of "answers" the last is the answer.
      label: name of the column of answers of "labels".
    """

    kind: str
    texts: tuple[str, ...]
    label: str | None = None


@judged
def choose(sheet: Sheet, text: Sequence[str] | None = None, label: str | None = None) -> Columns:
    """Which columns of a sheet are read, by its header where that is plain, else as asked.

    Args:
      sheet: of `read_sheet`.
      text: one or two columns of text; None reads the header.
      label: the column of answers; None reads the header.

    Returns:
      The Columns. A header is plain where exactly one of the groups of names in `TEXTS` and one
      name of `LABELS` is in it; or `messages`; or one of `ANSWERS`; or `text` alone.

    Raises:
      ValueError: for a column that is not there, or a header that leaves open which is which.
    """
    names = set(sheet.columns)
    for name in text or ():
        sheet.column(name, "text")
    if label is not None:
        sheet.column(label, "label")
    if text is not None and not (1 <= len(text) <= 2 and len(set(text)) == len(text)):
        raise ValueError(f"text is {' '.join(text)}; it takes one column, or two different ones.")
    if label is not None and label in (text or ()):
        raise ValueError(f"label is {label!r}, which is a column of text, too; name another.")
    open_ends = f"{sheet.name} has the columns {', '.join(sheet.columns)}"
    if text is None and label is None:
        if "messages" in names:
            return Columns("messages", ("messages",))
        for group in ANSWERS:
            wanted = tuple(name for name in group if name in names or name != "input")
            if names >= set(wanted):
                return Columns("answers", wanted)
    labels = [label] if label is not None else [each for each in LABELS if each in names]
    if text is None:
        # "label" may be both: what is asked for as one thing is not taken for another.
        there = {name for group in TEXTS for name in group if name in names and name != label}
        plain = [group for group in TEXTS if set(group) == there]
        if not plain:
            raise ValueError(f"{open_ends}; say by text which one or two are the texts.")
        text = plain[0]
    labels = [each for each in labels if each not in text]
    if len(labels) == 1:
        return Columns("labels", tuple(text), labels[0])
    if not labels and len(text) == 1 and names == set(text):
        return Columns("text", tuple(text))
    if not labels and len(text) == 2 and names == set(text):
        return Columns("answers", tuple(text))
    raise ValueError(f"{open_ends}; say by label which one is the answer.")
