"""Pictures of every kind: as a viewer shows them, or one sentence with the file's name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lorajax import data
from lorajax.data import pictures

DRAWS = np.random.default_rng(0)
COLORS = DRAWS.integers(0, 255, (24, 36, 3), dtype=np.uint8)


def stored(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def read(path: Path, **options) -> np.ndarray:
    return pictures.decode(path, str(path), **options)


@pytest.mark.parametrize("turn", range(2, 9))
def test_a_picture_stands_as_its_tag_says(tmp_path, turn):
    image = Image.fromarray(COLORS)
    tags = image.getexif()
    tags[0x0112] = turn
    path = stored(tmp_path / "x.png", image, exif=tags)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(read(path), expected)
    assert pictures.inspect(path, "x").size == expected.shape[:2]


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_become_the_upper_eight(tmp_path, ending):
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    path = tmp_path / f"x.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5\n64 48\n65535\n" + deep.astype(">u2").tobytes())
    else:
        stored(path, Image.fromarray(deep))
    for mode, channels in (("L", 1), ("RGB", 3)):
        found = read(path, mode=mode)
        np.testing.assert_array_equal(found, np.repeat((deep >> 8)[..., None], channels, 2))
    assert pictures.inspect(path, "x") == ((48, 64), True)


def test_what_is_transparent_is_white(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (10, 20, 30, 255)
    found = read(stored(tmp_path / "x.png", Image.fromarray(clear)))
    assert (found[:, :4] == (10, 20, 30)).all() and (found[:, 4:] == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    assert (read(stored(tmp_path / "p.png", palette, transparency=0)) == 255).all()
    half = Image.new("LA", (8, 8), (0, 128))
    assert np.abs(read(stored(tmp_path / "g.png", half), mode="L").astype(int) - 127).max() <= 1


def test_cmyk_palettes_bits_and_animations(tmp_path):
    plain = Image.fromarray(np.full((16, 16, 3), (0, 128, 255), np.uint8))
    for name, image in {
        "cmyk.tif": plain.convert("CMYK"),
        "palette.gif": plain.quantize(4),
        "first.gif": plain,
    }.items():
        more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "red")]}
        path = stored(tmp_path / name, image, **(more if name == "first.gif" else {}))
        assert np.abs(read(path).astype(int) - (0, 128, 255)).max() <= 2, name
    bits = Image.fromarray(np.eye(8) > 0)
    np.testing.assert_array_equal(
        read(stored(tmp_path / "bits.png", bits), mode="L")[..., 0], np.eye(8) * 255
    )


def broken_png() -> bytes:
    """A PNG with a damaged name of its second block of pixels: a SyntaxError to Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(COLORS).save(buffer, "PNG")
    raw = buffer.getvalue()
    begin = raw.index(b"IDAT")
    (length,) = struct.unpack(">I", raw[begin - 4 : begin])
    pixels = raw[begin + 4 : begin + 4 + length]

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    first, second = pixels[: length // 2], pixels[length // 2 :]
    rest = raw[begin + 8 + length :]
    return raw[: begin - 4] + chunk(b"IDAT", first) + chunk(b"\xffD\x01\x02", second) + rest


def cut(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLORS).save(buffer, kind)
    return buffer.getvalue()[:-200]


def huge() -> bytes:
    """A PNG of a few bytes that says it is 100,000 pixels wide and high."""
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    raw = bytearray(buffer.getvalue())
    raw[16:24] = struct.pack(">II", 100_000, 100_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


def real() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


BROKEN = {
    "name.png": broken_png(),
    "cut.png": cut("PNG"),
    "cut.jpg": cut("JPEG"),
    "cut.bmp": cut("BMP"),
    "text.png": b"hello",
    "empty.png": b"",
    "pickle.png": b"\x80\x04N.",
    "huge.png": huge(),
    "real.tif": real(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_one_sentence_with_the_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    for look in (read, lambda path: pictures.inspect(path, str(path))):
        with pytest.raises(ValueError, match=rf"{name} cannot be decoded as an image: [^\n]*\.$"):
            look(path)


def folder_of(root: Path, gray: bool, names=("1.png",)) -> Path:
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (root / split / kind).mkdir(parents=True)
            for name in names:
                pixels = COLORS[..., 0] if gray else COLORS
                stored(root / split / kind / name, Image.fromarray(pixels))
    return root


@pytest.mark.parametrize("gray", [True, False])
def test_a_folder_is_read_whole_and_says_what_it_leaves_out(tmp_path, gray):
    names = ("1.png", "2.tif", "3.tiff", "4.jpg", "5.bmp", "6.webp")
    # WebP has no gray: it would make the whole folder one of colors.
    root = folder_of(tmp_path / "set", gray, names[:5] if gray else names)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "empty").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no picture")
    (root / "train" / "cat" / "._1.png").write_bytes(b"a resource fork")
    found = data.load(root)
    assert found.classes == ("cat", "dog")
    assert len(found.train.labels) == 2 * (5 if gray else 6)
    assert found.train.images.shape[1:] == (24, 36, 1 if gray else 3)
    assert [Path(name).as_posix() for name in found.left_out] == [
        "train/.ipynb_checkpoints",
        "train/cat/._1.png",
        "train/cat/notes.txt",
        "train/empty",
    ]


def test_a_damaged_file_is_found_before_anything_is_trained(tmp_path):
    root = folder_of(tmp_path, gray=False)
    (root / "test" / "dog" / "2.jpg").write_bytes(cut("JPEG"))
    with pytest.raises(ValueError, match=r"2\.jpg cannot be decoded"):
        data.load(root)


def test_sizes_that_differ_ask_for_one(tmp_path):
    root = folder_of(tmp_path, gray=False)
    stored(root / "test" / "dog" / "2.png", Image.new("RGB", (5, 7)))
    with pytest.raises(ValueError, match=r"2\.png is 5×7 pixels and the first image 36×24; give"):
        data.load(root)
    assert data.load(root, size=8).test.images.shape == (3, 8, 8, 3)
    stored(root / "test" / "dog" / "3.png", Image.new("L", (1, 20_000)))
    with pytest.raises(ValueError, match=r"3\.png is 1×20000 pixels, too thin"):
        data.load(root, size=128)
