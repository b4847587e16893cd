"""Sets of images: packs, folders, lists, and four public sets by name.

Their tables have the columns `images`, bytes (uint8) of shape (n, height, width, 1 or 3), and
`labels`, the class of each, int32 of shape (n,).
"""

import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorajax import downloads
from lorajax.data.folders import read_folder, read_list
from lorajax.data.packs import idx_files, image_table, read_idx, read_idx_folder, read_pack

# Programs of others import it from here, where it once was.
from lorajax.data.pictures import ImageFiles as ImageFiles
from lorajax.data.table import Dataset
from lorajax.environment.files import check_growth
from lorajax.environment.judging import judged

EMBEDDED = {"mnist-sample": "mnist_sample.npz", "cifar10-sample": "cifar10_sample.npz"}
"""The sets that come with the package, and their packs."""


@judged
def load(
    source: str | os.PathLike,
    *,
    folder: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    fallback: tuple[int, int] | None = None,
    hold_out: float = 0.0,
    download: bool = True,
) -> Dataset:
    """A data set by name, from a pack, from files of images, or from a list of them.

    Args:
      source: one of
        - "mnist-sample": 5,000 of MNIST's training digits and its 10,000 test digits, which come
          with the package;
        - "cifar10-sample": 1,000 training and 1,000 test pictures of CIFAR-10, likewise;
        - "mnist", "fashion-mnist", "cifar10", "cifar100": from `folder`, else downloaded to the
          cache and checked;
        - an `.npz` pack with `train_x`, `train_y`, `test_x`, `test_y` (or `val_…`), or the same
          with JPEG bytes: `train_jpg` and `train_off`, image i being `jpg[off[i]:off[i + 1]]`;
          or as MedMNIST has them: `train_images`, `train_labels` and so on; or `x` and `y`, or
          `images` and `labels`, without a split; optionally `classes` or `names`;
        - a folder with `train` and `test` (or `val`), each with a folder of images a class, or with
          folders of classes and no split;
        - a folder of IDX files as MNIST has them, gzipped or not;
        - a .csv or .tsv list with a column of paths, one of classes, and perhaps one of splits.
      folder: where named sets and packs are looked for; the environment variable LORAJAX_DATA if
        None.
      size: pixels of a side, or (height, width), that files of images are brought to.
      fallback: (height, width) that they are brought to where `size` is None and theirs differ.
      hold_out: share of each class, in [0, 1), that is set aside to measure on where a source has
        no test set of its own. The draw is the same each time.
      download: whether a named set may be fetched from its publisher.

    Returns:
      A Dataset. Packs of JPEG bytes are decoded at once, files as they are used; what lies beside
      them and is left out is in `left_out`.

    Raises:
      ValueError: if there is no such source or it is not what it should be.
      downloads.DownloadError: for trouble on the way from a publisher.
    """
    if not 0 <= hold_out < 1:
        raise ValueError(f"hold_out is {hold_out}; it must lie in [0, 1).")
    name = os.fspath(source)
    shelf = folder or os.environ.get("LORAJAX_DATA")
    folders = [Path(shelf)] if shelf else []
    if name in EMBEDDED:
        return read_pack(Path(__file__).parent / "embedded" / EMBEDDED[name], name)
    if name in NAMED:
        return _named(name, folders, download)
    for path in [Path(name), *(place / name for place in folders)]:
        if path.is_file() and path.suffix == ".npz":
            return read_pack(path, path.stem, hold_out)
        sizes = ((size, size) if isinstance(size, int) else size, fallback)
        if path.is_dir():
            if idx_files(path):
                return read_idx_folder(path, hold_out)
            return read_folder(path, *sizes, hold_out)
        if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
            return read_list(path, *sizes, hold_out)
    raise ValueError(
        f"source is {name!r}, which is neither a folder or list of images nor an npz pack; a named "
        f"set must be one of {', '.join([*EMBEDDED, *NAMED])}."
    )


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
            found = read_pack(folder / known.pack, name)
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


def _read_idx(name: str, paths: Sequence[Path]) -> Dataset:
    classes = NAMED[name].classes
    arrays = [read_idx(path) for path in paths]
    train = image_table(str(paths[0]), arrays[0], arrays[1], len(classes))
    return Dataset(
        name, train, image_table(str(paths[2]), arrays[2], arrays[3], len(classes)), classes
    )


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
        splits.append(image_table(str(path), np.ascontiguousarray(images), labels, len(classes)))
    return Dataset(name, splits[0], splits[1], classes)
