"""Pictures as bytes, the way a viewer shows them.

A file says more than its pixels: how the camera was held, how deep a channel is, what is
transparent, in which order an animation runs. All of it is honored, and what has no meaning as a
picture of bytes is refused with the file's name.
"""

import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from lorajax.environment.judging import judged

LARGEST = 2**27
"""Pixels of the largest picture that is decoded: 134 million, 400 MB of color."""

Mode = Literal["L", "RGB"]
_GRAY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I")


def suffixes() -> frozenset[str]:
    """Endings, in lower case, of the files that Pillow can open on this machine."""
    known = Image.registered_extensions()
    # EPS and the like run an interpreter, PDF only writes, and movies are no pictures.
    return frozenset(
        end for end, kind in known.items() if kind in Image.OPEN and kind not in _NO_PICTURES
    )


_NO_PICTURES = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS", "PDF"}


class Header(NamedTuple):
    """What is known of a picture before its pixels are.

    Attributes:
      size: (height, width) as shown.
      gray: whether it has brightness only.
    """

    size: tuple[int, int]
    gray: bool


def _open(source: Path | bytes) -> Image.Image:
    if isinstance(source, Path) and not source.is_file():
        raise ValueError("it is no regular file")
    image = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    if image.width * image.height > LARGEST:
        raise ValueError(
            f"it has {image.width}×{image.height} pixels; at most {LARGEST:,} are decoded"
        )
    return image


def _as_shown(image: Image.Image, mode: Mode) -> Image.Image:
    """Turned upright, eight bits deep, and opaque."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("its pixels are 32 bits deep, and what is white is not told; save 8 or 16")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow would clip at 255. In the formats let through, such pixels are 16 bits deep.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        # What lies below transparent pixels is arbitrary. Most pages and viewers are white.
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def decode(
    source: Path | bytes, name: str, *, size: tuple[int, int] | None = None, mode: Mode = "RGB"
) -> np.ndarray:
    """The pixels of a picture.

    Args:
      source: a file, or its bytes. Of an animation the first frame is taken.
      name: of the picture, for errors.
      size: (height, width) of the result: the picture is scaled until it covers it, then cut to its
        middle. None keeps its own.
      mode: "RGB" for three channels, "L" for one.

    Returns:
      uint8 of shape (height, width, 3 or 1): turned as its EXIF tag says, 16-bit gray scaled to 8,
      transparent parts on white.

    Raises:
      ValueError: for what is no picture, is damaged, is larger than `LARGEST`, or has values that
        no byte can stand for; it names the picture.
    """
    try:
        with _open(source) as file:
            image = _as_shown(file, mode)
    # Damage surfaces as whatever a decoder runs into: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded as an image: {_reason(error)}.") from error
    if size is not None and image.size != size[::-1]:
        height, width = size
        high, wide = _covering((image.height, image.width), size, name)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - width) // 2, (high - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[..., None] if mode == "L" else pixels


def _covering(size: tuple[int, int], wanted: tuple[int, int], name: str) -> tuple[int, int]:
    """The size, of the same proportions, that just covers the wanted one."""
    scale = max(wanted[0] / size[0], wanted[1] / size[1])
    high, wide = (max(w, round(s * scale)) for w, s in zip(wanted, size, strict=True))
    if high * wide > LARGEST:
        raise ValueError(
            f"{name} is {size[1]}×{size[0]} pixels, too thin to be brought to "
            f"{wanted[1]}×{wanted[0]}; leave it out."
        )
    return high, wide


def check_fits(size: tuple[int, int], wanted: tuple[int, int], name: str) -> None:
    """Raises ValueError for a picture too thin to be brought to a size."""
    _covering(size, wanted, name)


def inspect(source: Path | bytes, name: str) -> Header:
    """Reads a whole picture once, so that damage is found before anything is trained.

    Args:
      source: a file, or its bytes.
      name: of the picture, for errors.

    Returns:
      Its Header.

    Raises:
      ValueError: as `decode`.
    """
    try:
        with _open(source) as file:
            gray, size = file.mode in _GRAY, (file.height, file.width)
            turned = file.getexif().get(0x0112, 1) >= 5
            if file.format == "JPEG":
                # Read to its end, as damage may be anywhere, but at an eighth of its size.
                file.draft(None, (file.width // 8, file.height // 8))
                file.load()
            else:
                _as_shown(file, "L" if gray else "RGB")
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded as an image: {_reason(error)}.") from error
    height, width = size
    return Header((width, height) if turned else size, gray)


class ImageFiles:
    """Images in files or in memory as bytes, decoded when they are asked for.

    Args:
      sources: a path or the encoded bytes of each image.
      size: (height, width) of the result, as for `decode`. None keeps their size, which must then
        be the same for all.
      mode: "RGB" for three channels, "L" for one.

    `images[indices]` gives bytes of shape (len(indices), height, width, channels), as a NumPy array
    would.

    Raises:
      ValueError: as `decode`, and for no sources.
    """

    @judged
    def __init__(
        self,
        sources: Sequence[Path | bytes],
        size: tuple[int, int] | None = None,
        mode: Mode = "RGB",
    ):
        self.sources, self.size = sources, size
        self.mode: Mode = mode
        if not len(sources):
            raise ValueError("sources are empty; there must be at least one image.")
        self.shape = (len(sources), *self._decode(0).shape)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, indices: np.ndarray | slice) -> np.ndarray:
        chosen = np.arange(len(self))[indices]
        # Pillow releases the interpreter's lock while it decodes.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = list(pool.map(self._decode, chosen.tolist()))
        for i, image in zip(chosen.tolist(), decoded, strict=True):
            if image.shape != self.shape[1:]:
                raise ValueError(
                    f"{self._name(i)} is {image.shape[1]}×{image.shape[0]} pixels and the first "
                    f"image {self.shape[2]}×{self.shape[1]}; give the size to bring them to."
                )
        return np.stack(decoded) if decoded else np.zeros((0, *self.shape[1:]), np.uint8)

    def _name(self, i: int) -> str:
        source = self.sources[i]
        return str(source) if isinstance(source, Path) else f"image {i}"

    def _decode(self, i: int) -> np.ndarray:
        return decode(self.sources[i], self._name(i), size=self.size, mode=self.mode)


class ClassFolders(NamedTuple):
    """The pictures of a folder with a folder a class.

    Attributes:
      files: all pictures, class after class.
      classes: name of each picture's class.
      gray: whether none has color.
      sizes: (height, width) of each, as shown.
      left_out: what lies there and is no picture, hidden or of another kind.
    """

    files: list[Path]
    classes: list[str]
    gray: bool
    sizes: list[tuple[int, int]]
    left_out: list[Path]


def read_classes(folder: Path, size: tuple[int, int] | None = None) -> ClassFolders:
    """Finds and checks the pictures of a folder with a folder a class.

    Args:
      folder: it; hidden files and folders (`.ipynb_checkpoints`, `._cat.jpg`) are left out, as are
        files of kinds that Pillow does not read, and folders without pictures are no classes.
      size: (height, width) that the pictures will be brought to.

    Returns:
      The ClassFolders.

    Raises:
      ValueError: if there are no pictures, or one is damaged or too thin for the size; it names the
        first such file.
    """
    known = suffixes()
    files: list[Path] = []
    classes: list[str] = []
    left_out: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            left_out.append(entry)
            continue
        inside = sorted(path for path in entry.rglob("*") if path.is_file())
        kept = [path for path in inside if _is_shown(path, folder, known)]
        files += kept
        classes += [entry.name] * len(kept)
        left_out += sorted({*inside} - {*kept}) if inside else [entry]
    if not files:
        raise ValueError(
            f"{folder} has no images in folders; it must have a folder of images for each class."
        )
    return check_files(files, classes, size)._replace(left_out=left_out)


def check_files(
    files: list[Path], classes: list[str], size: tuple[int, int] | None = None
) -> ClassFolders:
    """Reads every picture once, as `read_classes` does.

    Args:
      files: of the pictures.
      classes: name of each one's class.
      size: (height, width) that they will be brought to.

    Returns:
      The ClassFolders, with nothing left out.

    Raises:
      ValueError: for the first that is damaged or too thin for the size.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        headers = list(pool.map(lambda path: inspect(path, str(path)), files))
    if size is not None:
        for path, header in zip(files, headers, strict=True):
            check_fits(header.size, size, str(path))
    gray = all(header.gray for header in headers)
    return ClassFolders(files, classes, gray, [header.size for header in headers], [])


def _is_shown(path: Path, folder: Path, known: Iterable[str]) -> bool:
    hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in known
