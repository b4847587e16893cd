"""Sets of images as arrays: npz packs of several makes, and IDX files."""

import gzip
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lorajax.data.order import hold_out
from lorajax.data.pictures import ImageFiles
from lorajax.data.table import Dataset, Table
from lorajax.environment.files import check_growth, regular, unpacked
from lorajax.environment.judging import judged

# Names of the splits, the best to measure on first, and of images and labels in them.
TESTS = ("test", "val", "valid", "validation")
_NAMES = (("{}_x", "{}_y"), ("{}_images", "{}_labels"), ("{}_jpg", "{}_y"))
_WHOLE = (("x", "y"), ("images", "labels"))
MOST_CLASSES = 100_000
"""That are counted by the largest label: one number that is no class could ask for any memory."""


def image_table(
    name: str, images: np.ndarray | ImageFiles, labels: np.ndarray, classes: int
) -> Table:
    """Pictures and their classes, checked.

    Args:
      name: of what they are from, for errors.
      images: bytes of shape (n, height, width) or (n, height, width, 1 or 3), or files.
      labels: whole numbers of shape (n,) or (n, 1).
      classes: how many there are.

    Returns:
      The columns `images` and `labels`.

    Raises:
      ValueError: for anything else.
    """
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or len(labels) != len(images) or not len(labels):
        raise ValueError(
            f"{name} has {len(images)} images and labels of shape {labels.shape}; it must have one "
            "label an image, and at least one."
        )
    if isinstance(images, np.ndarray):
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"{name} has images of shape {images.shape} and dtype {images.dtype}; they must be "
                "bytes (uint8) of shape (n, height, width) or (n, height, width, 1 or 3)."
            )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{name} has labels of {labels.dtype} from {labels.min()} to {labels.max()}; they must "
            f"be integers in 0 … {classes - 1}."
        )
    return Table({"images": images, "labels": labels.astype(np.int32)})


def _numbered(path: Path, labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Names of classes that are counted by the largest label."""
    most = max((int(x.max(initial=0)) for x in labels), default=0)
    if most >= MOST_CLASSES:
        raise ValueError(
            f"{path} has labels up to {most}; number the classes from 0 on, at most "
            f"{MOST_CLASSES:,} of them."
        )
    return tuple(map(str, range(1 + most)))


def set_aside(name: str, table: Table, share: float) -> tuple[Table, Table]:
    """Makes the split that a source lacks: the same share of each class.

    Args:
      name: of the source, for errors.
      table: with the column `labels`.
      share: in (0, 1).

    Returns:
      What to learn from, and what to measure on.

    Raises:
      ValueError: for a share of 0, and if no class has two samples.
    """
    if not share:
        raise ValueError(
            f"{name} has no test set; give hold_out, the share of each class to measure on."
        )
    count = min(max(1, round(share * len(table))), len(table) - 1)
    return hold_out(table, count, by="labels")


def read_pack(path: Path, name: str, share: float = 0.0) -> Dataset:
    """A data set from an npz pack.

    Args:
      path: of the file, with arrays as `data.load` lists them.
      name: of the set.
      share: of each class to set aside where the pack has no test set.

    Returns:
      The Dataset.

    Raises:
      ValueError: if it is no such pack.
    """
    try:
        # Opened here, since NumPy leaves a file open that turns out not to be an archive.
        with open(regular(path, 2**40), "rb") as raw:
            with zipfile.ZipFile(raw) as archive:
                for member in archive.infolist():
                    check_growth(path, member.compress_size, member.file_size)
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable npz file without pickles: {error}.") from error
    found = {kind: pair for kind in ("train", *TESTS) if (pair := _pair(arrays, kind))}
    train = found.pop("train", None) or next((w for w in _WHOLE if {*w} <= arrays.keys()), None)
    kind = next(iter(found), None)
    if train is None or (kind is None and not share):
        lacks = "train" if train is None else "test"
        raise ValueError(
            f"{path} has {', '.join(arrays)}; a pack needs {lacks}_y with {lacks}_x or "
            f"{lacks}_jpg, or {lacks}_labels with {lacks}_images"
            + (", or hold_out." if train else ".")
        )
    splits = [("train", train)] if kind is None else [("train", train), (kind, found.pop(kind))]
    names = arrays.get("names", arrays.get("classes"))
    if names is None:
        labels = [arrays[pair[1]] for _, pair in splits]
        whole = [x for x in labels if np.issubdtype(x.dtype, np.integer)]
        names = _numbered(path, whole)
    classes = tuple(str(entry) for entry in names)
    tables = [
        image_table(f"{path} ({k})", _images(path, arrays, pair[0]), arrays[pair[1]], len(classes))
        for k, pair in splits
    ]
    left_out = tuple(pair[0] for pair in found.values())
    if kind is None:
        return Dataset(name, *set_aside(str(path), tables[0], share), classes, left_out, "held-out")
    return Dataset(name, tables[0], tables[1], classes, left_out)


def _pair(arrays: Mapping[str, np.ndarray], kind: str) -> tuple[str, str] | None:
    """Names of the arrays of images and labels of a split."""
    pairs = [(images.format(kind), labels.format(kind)) for images, labels in _NAMES]
    return next((pair for pair in pairs if {*pair} <= arrays.keys()), None)


def _images(path: Path, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if not name.endswith("_jpg"):
        return arrays[name]
    return _decode_all(path, arrays, name.removesuffix("_jpg"))


def _decode_all(path: Path, arrays: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
    data, offsets = arrays[f"{kind}_jpg"], arrays.get(f"{kind}_off")
    if (
        offsets is None
        or offsets.ndim != 1
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != data.size
        or np.any(np.diff(offsets) <= 0)
    ):
        raise ValueError(
            f"{path} has no {kind}_off that splits {kind}_jpg; offsets must rise from 0 to "
            f"{data.size}."
        )
    encoded = data.tobytes()
    spans = zip(offsets.tolist(), offsets[1:].tolist(), strict=False)
    return ImageFiles([encoded[start:stop] for start, stop in spans])[:]


@judged
def read_idx(path: str | os.PathLike) -> np.ndarray:
    """An array from an IDX file of bytes, the format of MNIST, gzipped or plain.

    Args:
      path: the file.

    Returns:
      uint8 array of the shape that the header states.

    Raises:
      ValueError: if the file is no such thing, or shorter or longer than its header says.
    """
    try:
        with open(regular(path), "rb") as raw:
            packed = Path(path).suffix == ".gz" or raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if packed else raw as file:
                # What a header states is judged before it is unpacked.
                head = file.read(4)
                if head[:3] == b"\0\0\x08":
                    axes = file.read(4 * head[3])
                    stated = struct.unpack(f">{len(axes) // 4}I", axes[: len(axes) // 4 * 4])
                    check_growth(path, Path(path).stat().st_size, math.prod(stated))
                file.seek(0)
                data = unpacked(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable gzip file: {error}.") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes; it begins with {data[:4]!r}.")
    axes = data[3]
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes].ljust(4 * axes, b"\0"))
    body = np.frombuffer(data, np.uint8, offset=min(4 + 4 * axes, len(data)))
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} has {body.size} entries; its header says {shape}.")
    return body.reshape(shape)


_IDX = re.compile(r"(.*)images[-.]idx3-ubyte(\.gz)?")


def idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Files of images and labels in the IDX format, by what stands in front of "images"."""
    found = {}
    for images in sorted(folder.iterdir()):
        if match := _IDX.fullmatch(images.name):
            ends = ("-idx1-ubyte", ".idx1-ubyte", "-idx1-ubyte.gz", ".idx1-ubyte.gz")
            labels = [folder / f"{match[1]}labels{end}" for end in ends]
            if there := [path for path in labels if path.is_file()]:
                found.setdefault(match[1], (images, there[0]))
    return found


def read_idx_folder(folder: Path, share: float = 0.0) -> Dataset:
    """A data set from a folder of IDX files, named as MNIST's or EMNIST's are.

    Args:
      folder: with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and with `t10k-…` or
        `test-…` in place of `train-…`, each gzipped or not.
      share: of each class to set aside where there is no test set.

    Returns:
      The Dataset; its classes are numbers.

    Raises:
      ValueError: if files are missing or broken.
    """
    files = idx_files(folder)
    splits: dict[str, tuple[Path, Path]] = {}
    for front, pair in files.items():
        splits.setdefault("test" if re.search("t10k|test", front) else "train", pair)
    if "train" not in splits:
        raise ValueError(f"{folder} has {', '.join(files)}images-idx3-ubyte and none of train-….")
    arrays = {kind: [read_idx(path) for path in pair] for kind, pair in splits.items()}
    classes = _numbered(folder, [labels for _, labels in arrays.values()])
    tables = {
        kind: image_table(str(splits[kind][0]), images, labels, len(classes))
        for kind, (images, labels) in arrays.items()
    }
    used = {path for pair in splits.values() for path in pair}
    left_out = tuple(path.name for path in sorted(folder.iterdir()) if path not in used)
    if "test" in tables:
        return Dataset(folder.name, tables["train"], tables["test"], classes, left_out)
    parts = set_aside(str(folder), tables["train"], share)
    return Dataset(folder.name, *parts, classes, left_out, "held-out")
