"""Sets of images: packs, folders, and four public sets by name.

Their tables have the columns `images`, bytes (uint8) of shape (n, height, width, 1 or 3), and
`labels`, the class of each, int32 of shape (n,).
"""

import gzip
import math
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorajax import downloads
from lorajax.data.pictures import ClassFolders, ImageFiles, Mode, read_classes
from lorajax.data.table import Dataset, Table
from lorajax.environment.files import check_growth, regular, unpacked
from lorajax.environment.judging import judged

_EMBEDDED = Path(__file__).parent / "embedded"


def _table(name: str, images: np.ndarray | ImageFiles, labels: np.ndarray, classes: int) -> Table:
    labels = np.asarray(labels)
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


@judged
def load(
    source: str | os.PathLike,
    *,
    folder: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    download: bool = True,
) -> Dataset:
    """A data set by name, from a pack, or from a folder of images.

    Args:
      source: one of
        - "mnist-sample": 5,000 of MNIST's training digits and its 10,000 test digits, which come
          with the package;
        - "mnist", "fashion-mnist", "cifar10", "cifar100": from `folder`, else downloaded to the
          cache and checked;
        - an `.npz` pack with `train_x`, `train_y`, `test_x`, `test_y` (or `val_…`), or the same
          with JPEG bytes: `train_jpg` and `train_off`, image i being `jpg[off[i]:off[i + 1]]`;
          optionally `classes` or `names`;
        - a folder with `train` and `test` (or `val`), each with a folder of images a class.
      folder: where named sets and packs are looked for; the environment variable LORAJAX_DATA if
        None.
      size: pixels of a side, or (height, width), that files of an image folder are brought to.
      download: whether a named set may be fetched from its publisher.

    Returns:
      A Dataset. Packs of JPEG bytes are decoded at once, image folders as they are used.

    Raises:
      ValueError: if there is no such source or it is not what it should be.
      downloads.DownloadError: for trouble on the way from a publisher.
    """
    name = os.fspath(source)
    shelf = folder or os.environ.get("LORAJAX_DATA")
    folders = [Path(shelf)] if shelf else []
    if name == "mnist-sample":
        return _pack(_EMBEDDED / "mnist_sample.npz", name)
    if name in NAMED:
        return _named(name, folders, download)
    for path in [Path(name), *(place / name for place in folders)]:
        if path.is_file() and path.suffix == ".npz":
            return _pack(path, path.stem)
        if path.is_dir():
            return _folder(path, (size, size) if isinstance(size, int) else size)
    raise ValueError(
        f"source is {name!r}, which is neither a folder of images nor an npz pack; a named set "
        f"must be one of mnist-sample, {', '.join(NAMED)}."
    )


def _pack(path: Path, name: str) -> Dataset:
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
    splits = []
    for kinds in (("train",), ("test", "val")):
        kind = next((k for k in kinds if f"{k}_y" in arrays), None)
        if kind is None or not ({f"{kind}_x", f"{kind}_jpg"} & arrays.keys()):
            raise ValueError(
                f"{path} has {', '.join(arrays)}; a pack needs {kinds[0]}_y with {kinds[0]}_x or "
                f"{kinds[0]}_jpg."
            )
        images = arrays.get(f"{kind}_x")
        if images is None:
            images = _decode_all(path, arrays, kind)
        splits.append((kind, images, arrays[f"{kind}_y"]))
    names = arrays.get("names", arrays.get("classes"))
    if names is None:
        names = np.arange(1 + max(int(labels.max(initial=0)) for _, _, labels in splits))
    classes = tuple(str(entry) for entry in names)
    train, test = (_table(f"{path} ({k})", x, y, len(classes)) for k, x, y in splits)
    return Dataset(name, train, test, classes)


def _decode_all(path: Path, arrays: dict[str, np.ndarray], kind: str) -> np.ndarray:
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


def _folder(path: Path, size: tuple[int, int] | None) -> Dataset:
    train = path / "train"
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise ValueError(f"{path} must have a folder train and a folder test or val.")
    found = [read_classes(split, size) for split in (train, test)]
    classes = tuple(sorted({*found[0].classes}))
    if extra := sorted({*found[1].classes} - {*classes}):
        raise ValueError(f"{test} has the class {extra[0]!r}, which {train} has not.")
    # Gray pictures stay gray for models of one channel; the others repeat it.
    mode: Mode = "L" if all(each.gray for each in found) else "RGB"
    if size is None and (other := _odd_one(found)):
        raise ValueError(f"{other}; give the size to bring them to.")
    number = {name: i for i, name in enumerate(classes)}
    splits = []
    for split, each in zip((train, test), found, strict=True):
        labels = np.array([number[name] for name in each.classes])
        images = ImageFiles(each.files, size, mode)
        splits.append(_table(str(split), images, labels, len(classes)))
    left_out = tuple(str(file.relative_to(path)) for each in found for file in each.left_out)
    return Dataset(path.name, splits[0], splits[1], classes, left_out)


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


class _Named(NamedTuple):
    """A public set: its own files with MD5 checksums as published, and a pack's name."""

    url: str
    files: dict[str, str]
    pack: str
    classes: tuple[str, ...]


_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
NAMED: dict[str, _Named] = {
    "mnist": _Named(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        dict(
            zip(
                _IDX,
                (
                    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "d53e105ee54ea40749a09fcbcd1e9432",
                    "9fb629c4189551a2d022fa330f9573f3",
                    "ec29112dd5afa0611ce80d1b7f02629c",
                ),
                strict=True,
            )
        ),
        "mnist.npz",
        tuple("0123456789"),
    ),
    "fashion-mnist": _Named(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        dict(
            zip(
                _IDX,
                (
                    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "25c81989df183df01b3e8a0aad5dffbe",
                    "bef4ecab320f06d8554ea6380940ec79",
                    "bb300cfdad3c16e7a12a480ee83cd310",
                ),
                strict=True,
            )
        ),
        "fashion_mnist.npz",
        (
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
    ),
    "cifar10": _Named(
        "https://www.cs.toronto.edu/~kriz",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        "cifar10.npz",
        (),
    ),
    "cifar100": _Named(
        "https://www.cs.toronto.edu/~kriz",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        "cifar100.npz",
        (),
    ),
}
"""The sets that `load` knows by name. Their publishers state MD5 checksums only."""


def _named(name: str, folders: Sequence[Path], download: bool) -> Dataset:
    known = NAMED[name]
    for folder in folders:
        if (folder / known.pack).is_file():
            found = _pack(folder / known.pack, name)
            return found._replace(classes=known.classes or found.classes)
    places = [place for folder in folders for place in (folder, folder / name)]
    cache = downloads.cache_folder() / "data" / name
    for place in [*places, cache]:
        if all((place / file).is_file() for file in known.files):
            break
    else:
        place = cache
        if not download:
            looked = " or ".join(map(str, [*folders, cache]))
            raise ValueError(
                f"{name} is not in {looked}; it needs {known.pack} or {', '.join(known.files)} "
                "there, or leave to download."
            )
    paths = [
        downloads.fetch(f"{known.url}/{file}", place / file, md5=md5)
        for file, md5 in known.files.items()
    ]
    return _read_idx(name, paths) if len(paths) > 1 else _read_cifar(name, paths[0])


@judged
def read_idx(path: str | os.PathLike) -> np.ndarray:
    """An array from a gzipped IDX file of bytes, the format of MNIST.

    Args:
      path: the file.

    Returns:
      uint8 array of the shape that the header states.

    Raises:
      ValueError: if the file is no such thing, or shorter or longer than its header says.
    """
    try:
        with gzip.open(regular(path)) as file:
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


def _read_idx(name: str, paths: Sequence[Path]) -> Dataset:
    classes = NAMED[name].classes
    arrays = [read_idx(path) for path in paths]
    train = _table(str(paths[0]), arrays[0], arrays[1], len(classes))
    return Dataset(name, train, _table(str(paths[2]), arrays[2], arrays[3], len(classes)), classes)


def _read_cifar(name: str, path: Path) -> Dataset:
    ten = name == "cifar10"
    names_file = "batches.meta.txt" if ten else "fine_label_names.txt"
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            # Read in place and by name: nothing is unpacked to disk.
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    check_growth(path, path.stat().st_size, member.size)
                    members[member.name.rpartition("/")[2]] = content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable tar file: {error}.") from error
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
    test = ["test_batch.bin"] if ten else ["test.bin"]
    if missing := [file for file in (*train, *test, names_file) if file not in members]:
        raise ValueError(f"{path} has no {missing[0]}; it is not the binary version of {name}.")
    classes = tuple(members[names_file].decode().split())
    splits = []
    for files in (train, test):
        data = np.frombuffer(b"".join(members[file] for file in files), np.uint8)
        size = 3072 + (1 if ten else 2)  # CIFAR-100 has a coarse label before the fine one
        if data.size % size:
            raise ValueError(f"{path}: {files[0]} is no whole number of {size}-byte records.")
        records = data.reshape(-1, size)
        images = records[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = records[:, size - 3073]
        splits.append(_table(str(path), np.ascontiguousarray(images), labels, len(classes)))
    return Dataset(name, splits[0], splits[1], classes)
