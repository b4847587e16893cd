"""Sets of images as files: folders of classes, and lists of paths with their classes."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorajax.data.packs import TESTS, idx_files, image_table, set_aside
from lorajax.data.pictures import (
    ClassFolders,
    ImageFiles,
    Mode,
    check_files,
    check_fits,
    read_classes,
    suffixes,
)
from lorajax.data.table import Dataset, Table
from lorajax.environment.judging import judged

_LABELS = ("label", "labels", "class", "classname", "class_name", "category", "target", "y")
_SPLITS = ("split", "set", "subset", "fold")
Size = tuple[int, int] | None


@judged
def shows_images(path: str | os.PathLike) -> bool:
    """Whether a path is of images: a list with their paths, or a folder with more than texts."""
    path = Path(path)
    if path.is_dir():
        known = suffixes()
        ends = [each.suffix.lower() for each in path.rglob("*")]
        pictures = sum(end in known for end in ends)
        return bool(idx_files(path)) or (pictures > 0 and pictures >= ends.count(".txt"))
    if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
        return False
    try:
        header, rows = _rows(path, 1)
    except ValueError:
        return False
    return bool(rows) and _path_column(header, rows[0]) is not None


def read_folder(
    path: Path, size: Size = None, fallback: Size = None, share: float = 0.0
) -> Dataset:
    """A data set from a folder with folders of images, a class each.

    Args:
      path: with the folders `train` and `test` (or `val`), or with the classes themselves.
      size: (height, width) that pictures are brought to.
      fallback: likewise where `size` is None and they differ in theirs.
      share: of each class to set aside where there is no test set.

    Returns:
      The Dataset. Pictures are decoded as they are used.

    Raises:
      ValueError: if there are no classes, a picture is damaged, or sizes differ.
    """
    train = path / "train"
    test = next((path / name for name in TESTS if (path / name).is_dir()), None)
    split = train.is_dir() and test is not None
    if not split and not share:
        raise ValueError(
            f"{path} must have a folder train and a folder test or val; give hold_out, the share "
            "of each class to measure on, where it has folders of classes alone."
        )
    roots = [train, test] if split and test else [train if train.is_dir() else path]
    found = [read_classes(root, size) for root in roots]
    classes = tuple(sorted({*found[0].classes}))
    if extra := sorted({name for each in found[1:] for name in each.classes} - {*classes}):
        raise ValueError(f"{test} has the class {extra[0]!r}, which {train} has not.")
    number = {name: i for i, name in enumerate(classes)}
    tables = [
        _table(
            str(root), each, [number[name] for name in each.classes], classes, found, size, fallback
        )
        for root, each in zip(roots, found, strict=True)
    ]
    left_out = [file for each in found for file in each.left_out]
    left_out += [
        entry for entry in sorted(path.iterdir()) if path not in roots and entry not in roots
    ]
    named = tuple(str(file.relative_to(path)) for file in left_out)
    if len(tables) == 2:
        return Dataset(path.name, tables[0], tables[1], classes, named)
    return Dataset(path.name, *set_aside(str(path), tables[0], share), classes, named, "held-out")


def _table(
    name: str,
    files: ClassFolders,
    labels: Sequence[int],
    classes: Sequence[str],
    every: Sequence[ClassFolders],
    size: Size,
    fallback: Size,
) -> Table:
    """Pictures and their classes, of one size and mode in every part of the set."""
    # Gray pictures stay gray for models of one channel; the others repeat it.
    mode: Mode = "L" if all(each.gray for each in every) else "RGB"
    if size is None and (other := _odd_one(every)):
        if fallback is None:
            raise ValueError(f"{other}; give the size to bring them to.")
        size = fallback
        for file, shown in zip(files.files, files.sizes, strict=True):
            check_fits(shown, size, str(file))
    images = ImageFiles(files.files, size, mode)
    return image_table(name, images, np.array(labels), len(classes))


def _odd_one(found: Sequence[ClassFolders]) -> str | None:
    """Which picture is not of the size of the first, in words."""
    files = [file for each in found for file in each.files]
    sizes = [size for each in found for size in each.sizes]
    for file, (height, width) in zip(files, sizes, strict=True):
        if (height, width) != sizes[0]:
            return (
                f"{file} is {width}×{height} pixels and the first image {sizes[0][1]}×{sizes[0][0]}"
            )
    return None


def read_list(path: Path, size: Size = None, fallback: Size = None, share: float = 0.0) -> Dataset:
    """A data set from a list of pictures and their classes.

    Args:
      path: a .csv or .tsv file whose header names a column of paths, relative to the file's folder,
        one of classes (`label`, `class`, `category`, `target`), and perhaps one of splits (`split`
        with train and test or val). Other columns are left out.
      size: (height, width) that pictures are brought to.
      fallback: likewise where `size` is None and they differ in theirs.
      share: of each class to set aside where there is no test set.

    Returns:
      The Dataset. Classes that are all whole numbers are in their order, others by name.

    Raises:
      ValueError: for a header without those columns, a row of another length, a picture that is not
        there or is damaged; it names the row or the file.
    """
    header, rows = _rows(path)
    pictures = _path_column(header, rows[0]) if rows else None
    if pictures is None:
        raise ValueError(f"{path} has no column of paths of pictures among {', '.join(header)}.")
    lower = [name.strip().lower() for name in header]
    split = next((lower.index(name) for name in _SPLITS if name in lower), None)
    others = [i for i in range(len(header)) if i not in (pictures, split)]
    named = [i for i in others if lower[i] in _LABELS]
    if len(named or others) != 1:
        raise ValueError(
            f"{path} has the columns {', '.join(header)}; call the one of classes 'label'."
        )
    column = (named or others)[0]
    values = [row[column].strip() for row in rows]
    if empty := [i for i, value in enumerate(values) if not value]:
        raise ValueError(f"{path}, row {empty[0] + 2}, has no {header[column]}.")
    whole = all(value.isdecimal() for value in values)
    classes = tuple(sorted({*values}, key=int if whole else str))
    files = _files(path, [row[pictures].strip() for row in rows])
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[value] for value in values]
    parts = [row[split].strip().lower() for row in rows] if split is not None else [""] * len(rows)
    groups = [[i for i, part in enumerate(parts) if part not in TESTS]]
    kind = next((name for name in TESTS if name in parts), None)
    if kind is not None:
        groups = [[i for i in groups[0] if parts[i] == "train"]]
        groups.append([i for i, part in enumerate(parts) if part == kind])
    if not groups[0]:
        raise ValueError(f"{path} has no row whose {header[split or 0]} is train.")
    checked = [
        check_files([files[i] for i in group], [values[i] for i in group], size) for group in groups
    ]
    tables = [
        _table(str(path), each, [labels[i] for i in group], classes, checked, size, fallback)
        for each, group in zip(checked, groups, strict=True)
    ]
    used = {i for group in groups for i in group}
    left_out = tuple(str(files[i]) for i in range(len(rows)) if i not in used)
    if kind is not None:
        return Dataset(path.stem, tables[0], tables[1], classes, left_out)
    train, test = set_aside(str(path), tables[0], share)
    return Dataset(path.stem, train, test, classes, left_out, "held-out")


def _rows(path: Path, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a sheet, the first of them or all."""
    tabs = path.suffix.lower() == ".tsv"
    rows: list[list[str]] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.reader(file, delimiter="\t" if tabs else ",", strict=True):
                if row:
                    rows.append(row)
                if most is not None and len(rows) > most:
                    break
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable sheet: {error}.") from error
    if not rows:
        raise ValueError(f"{path} is empty; it must have a header and a row for each picture.")
    for i, row in enumerate(rows[1:]):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path}, row {i + 2}, has {len(row)} fields; its header has {len(rows[0])}."
            )
    return rows[0], rows[1:]


def _path_column(header: Sequence[str], row: Sequence[str]) -> int | None:
    """Which column has paths of pictures, by its first entry."""
    known = suffixes()
    for i in range(min(len(header), len(row))):
        if Path(row[i].strip()).suffix.lower() in known:
            return i
    return None


def _files(path: Path, names: Sequence[str]) -> list[Path]:
    files = [path.parent / name for name in names]
    for i, file in enumerate(files):
        if not file.is_file():
            raise ValueError(f"{path}, row {i + 2}, names {names[i]!r}, which is no file there.")
    return files
