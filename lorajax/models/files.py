"""Reading of checkpoint files from anywhere: judged by their headers before anything is allocated.

Only safetensors and npz without pickles are read: no file can run code. Sizes, types and names are
compared with what is there on disk first, and tensors are read one at a time, when they are asked
for; what is refused costs a few megabytes.
"""

import contextlib
import functools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

# A header or a side file of 4 MiB names tens of thousands of tensors or classes.
_HEADER = 4 << 20
_INDEX = "model.safetensors.index.json"
_PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))
# Weights hardly compress. What claims to grow a hundredfold, and to more than this, is no model.
_RATIO, _SMALL = 100, 64 << 20

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_BROKEN = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,  # zipfile, for a compression that it does not know
    RuntimeError,
    MemoryError,
    KeyError,
)


class Tensor(NamedTuple):
    """A tensor of a file that has not been read yet.

    Attributes:
      shape: as the file states it, in agreement with the bytes there.
      dtype: NumPy's name of the type.
      read: reads it into memory.
      file: that it lies in; None for one of a plan.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    file: Path | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class Source(NamedTuple):
    """A checkpoint that is open for reading.

    Attributes:
      path: of the file or folder.
      tensors: by the names of the checkpoint.
      metadata: what a safetensors file says about itself.
      told: fields of the configuration that the caller gives, for a format that can be read in
        several ways.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    told: Mapping[str, Any] = MappingProxyType({})

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name` beside the tensors; empty if there is no such file.

        Raises:
          ValueError: if the file holds anything else, is huge, or is a link out of its folder.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        path = inside(folder, name)
        return _json(path) if path.is_file() else {}


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, which may not be there.

    Raises:
      ValueError: if the name has folders in it, or the file is a link out of the folder (other than
        the links of the Hugging Face cache, from `snapshots` to `blobs` of one repository).
    """
    path = folder / name
    if Path(name).name != name:
        raise ValueError(f"{folder} has no file {name!r}, which a checkpoint there needs.")
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if path.is_symlink() and target.parent not in (home, blobs):
        raise ValueError(f"{path} is a link out of its folder, which is not followed.")
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Source]:
    """A checkpoint whose tensors can be read within the block.

    Args:
      path: a .safetensors or .npz file, or a folder with `model.safetensors`, or with
        `model.safetensors.index.json` and the files that it names.

    Raises:
      ValueError: for anything else, in one sentence that names the file.
    """
    with contextlib.ExitStack() as stack:
        metadata: dict[str, str] = {}
        if path.is_dir():
            tensors: dict[str, Tensor] = {}
            files = _index(path)
            for name in sorted(set(files.values())) or ["model.safetensors"]:
                shard = inside(path, name)
                if not shard.is_file():
                    raise ValueError(
                        f"{path} has no file {name!r}, which a checkpoint there needs"
                        + _pickled(path)
                    )
                part, metadata = _safetensors(shard)
                if twice := tensors.keys() & part.keys():
                    raise ValueError(
                        f"{shard} has {min(twice)}, as another file of the folder has."
                    )
                tensors |= part
            _check_index(path, files, tensors)
        elif not path.is_file():
            raise ValueError(
                f"{path} is no regular file; it must be a folder, .safetensors or .npz."
            )
        elif path.suffix == ".npz":
            tensors = _npz(path, stack)
        elif path.suffix == ".safetensors":
            tensors, metadata = _safetensors(path)
        else:
            raise ValueError(
                f"{path} is no checkpoint; it must be a folder, .safetensors or .npz"
                + _pickled(path)
            )
        yield Source(path, tensors, metadata)


def _pickled(path: Path) -> str:
    """The end of a sentence: where weights are pickled, why they are not read and what helps."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = next((file.name for file in files if file.suffix in _PICKLES), None)
    if found is None:
        return "."
    return (
        f"; {found} is pickled, and reading a pickle runs whatever is in it: save it as "
        "safetensors, where you trust it."
    )


def _index(folder: Path) -> dict[str, str]:
    """Which file each tensor lies in, as the folder says; empty where it has one file."""
    index = Source(folder, {}, {}).json(_INDEX)
    files = index.get("weight_map", {})
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{folder / _INDEX} has a weight_map that maps no names.")
    return files


def _check_index(folder: Path, files: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor that lies in another file than the index says.

    Names that no file has are left to whoever reads them: old indices name buffers that were
    dropped, and some leave out a prefix.
    """
    for name, shard in files.items():
        held = tensors[name].file if name in tensors else None
        if held is not None and held.name != shard:
            raise ValueError(
                f"{folder / _INDEX} says that {name} lies in {shard}, and {held.name} has it: "
                "files of two checkpoints may be mixed; fetch the folder anew, or mend the index."
            )


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _HEADER:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_HEADER} are read.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must hold a JSON object.")
    return found


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with open(path, "rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if not 2 <= header <= min(_HEADER, path.stat().st_size - 8):
            raise ValueError(f"it states a header of {header} bytes")
        # The library refuses offsets that overlap, leave holes, or pass the end of the file.
        with safe_open(path, framework="flax") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                code = str(part.get_dtype())
                read = functools.partial(_read, path, functools.partial(_tensor, path), name)
                shape = tuple(part.get_shape())
                tensors[name] = Tensor(shape, _DTYPES.get(code, code), read, path)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, *_BROKEN) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {said(error)}.") from error


def _tensor(path: Path, name: str) -> Any:
    # Opened anew: what is read stays mapped while a file is open, and a model would be in memory
    # twice. NumPy has no bfloat16 of its own; the flax framework hands such tensors over as JAX's.
    with safe_open(path, framework="flax") as file:
        return file.get_tensor(name)


def _read(path: Path, get: Callable[[str], Any], name: str) -> np.ndarray:
    try:
        return np.asarray(get(name))
    except (SafetensorError, *_BROKEN) as error:
        raise ValueError(f"{path} has {name}, which cannot be read: {said(error)}.") from error


def _npz(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    try:
        if (size := _directory(path)) > _HEADER:
            raise ValueError(f"its directory has {size} bytes")
        file = stack.enter_context(zipfile.ZipFile(path))
        members = file.infolist()
        size = sum(member.file_size for member in members)
        if size > _SMALL and size > _RATIO * path.stat().st_size:
            raise ValueError(f"its {path.stat().st_size} bytes claim to hold {size}")
        tensors: dict[str, Tensor] = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in tensors:
                raise ValueError(f"it holds {member.filename!r}, twice or as no array")
            shape, dtype = _array(file, member)
            read = functools.partial(_read, path, functools.partial(_member, file), name)
            tensors[name] = Tensor(shape, dtype, read, path)
        return tensors
    except _BROKEN as error:
        raise ValueError(
            f"{path} is not a readable npz file without pickles: {said(error)}."
        ) from error


def _directory(path: Path) -> int:
    """Bytes of a zip file's directory, which the library reads at once."""
    with open(path, "rb") as raw:
        raw.seek(max(0, path.stat().st_size - (1 << 17)))
        tail = raw.read()
    end, end64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    small = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    large = int.from_bytes(tail[end64 + 40 : end64 + 48], "little") if end64 >= 0 else 0
    return large if small == 0xFFFFFFFF else small


def _array(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], str]:
    """Shape and type of an array by its header, which must agree with the member's size."""
    form = np.lib.format
    with file.open(member) as raw:
        version = form.read_magic(raw)
        if version == (1, 0):
            shape, _, dtype = form.read_array_header_1_0(raw)
        elif version == (2, 0):
            shape, _, dtype = form.read_array_header_2_0(raw)
        else:
            raise ValueError(f"{member.filename} has version {version}")
        held = member.file_size - raw.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{member.filename} states the shape {shape} and holds {held} bytes")
    return shape, dtype.name


def _member(file: zipfile.ZipFile, name: str) -> np.ndarray:
    with file.open(f"{name}.npy") as raw:
        return np.lib.format.read_array(raw, allow_pickle=False)


def said(error: BaseException) -> str:
    """The first line of an error, without its full stop."""
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
