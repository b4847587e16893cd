"""Hostile files of every kind that is read: pictures, texts, tokenizers, templates, stores.

Those of models and of adapters are made by the tests of the same name. Each maker writes into an
empty folder and returns what is to be loaded; makers may use sparse files, never real gigabytes.
"""

import gzip
import json
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Maker = Callable[[pathlib.Path], pathlib.Path]
GIGABYTE = 1 << 30


def plain(name: str, content: bytes | str) -> Maker:
    """A file of given content."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return folder / name

    return make


def sparse(name: str, size: int, head: bytes = b"") -> Maker:
    """A file that claims a size and takes no room."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(size)
        return folder / name

    return make


def linked(name: str, aim: str) -> Maker:
    """A link to something else."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).symlink_to(aim)
        return folder / name

    return make


def pipe(name: str) -> Maker:
    """A pipe that nobody writes to."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, body: bytes = b"") -> bytes:
    """A PNG of 8-bit gray with any sides, and zeros as far as the body goes."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = _chunk(b"IDAT", body or zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + data + _chunk(b"IEND", b"")


def _bomb(size: int) -> bytes:
    pressed, piece = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(pressed.compress(piece) for _ in range(size >> 20)) + pressed.flush()


def bmp(width: int, height: int) -> bytes:
    """A BMP header alone."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, 54) + head + bytes(64)


def tiff(width: int, height: int) -> bytes:
    """A TIFF of one strip with any sides."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1)]
    entries += [(262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, height), (279, 4, 1, 1 << 31)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + bytes(4)


TEXT_CHUNK = _chunk(b"zTXt", b"Comment\0\0" + _bomb(64 << 20))
PICTURES: dict[str, Maker] = {
    "a PNG of 10^10 pixels": plain("a.png", png(100_000, 100_000)),
    "a PNG of 2^62 pixels": plain("a.png", png(2**31 - 1, 2**31 - 1)),
    "a PNG whose text grows": plain("a.png", png(64, 64, TEXT_CHUNK)),
    "a PNG cut off": plain("a.png", png(64, 64)[:60]),
    "a PNG with a wrong sum": plain("a.png", png(64, 64).replace(b"IHDR", b"IHDX")),
    "a PNG of no pixels": plain("a.png", png(0, 0)),
    "a GIF of a giant screen": plain(
        "a.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b";"
    ),
    "a GIF without a frame": plain(
        "a.gif", b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";"
    ),
    "a BMP of gigabytes": plain("a.bmp", bmp(60_000, 60_000)),
    "a BMP of negative width": plain("a.bmp", bmp(-5, 5)),
    "a TIFF of gigabytes": plain("a.tif", tiff(60_000, 60_000)),
    "a PPM of gigabytes": plain("a.ppm", b"P6 50000 50000 255\n" + bytes(100)),
    "a JPEG that is a pickle": plain("a.jpg", pickle.dumps([1])),
    "a JPEG that is a page": plain("a.jpg", b"<html><script>alert(1)</script>"),
    "a JPEG of nothing": plain("a.jpg", b""),
    "a picture that is a pipe": pipe("a.png"),
    "a picture that is a device": linked("a.png", "/dev/zero"),
}

TEXTS: dict[str, Maker] = {
    "a TSV of gigabytes": sparse("a.tsv", 8 * GIGABYTE, b"text\tlabel\n"),
    "a CSV of gigabytes": sparse("a.csv", 8 * GIGABYTE, b"text,label\n"),
    "lines of gigabytes": sparse("a.jsonl", 8 * GIGABYTE, b'{"text": "a"}\n'),
    "a text of gigabytes": sparse("a.txt", 8 * GIGABYTE, b"words"),
    "a CSV with a giant cell": plain("a.csv", "text,label\n" + "x" * 200_000 + ",1\n"),
    "a CSV with an open quote": plain("a.csv", 'text,label\n"open,1\n'),
    "a TSV of ragged rows": plain("a.tsv", "text\tlabel\na\t1\nb\n"),
    "a TSV with a header twice": plain("a.tsv", "text\ttext\na\t1\nb\t0\n"),
    "a TSV of one line": plain("a.tsv", "text\tlabel\n"),
    "a TSV of NULs": plain("a.tsv", b"text\tlabel\n" + b"\0" * 100),
    "a TSV in no UTF-8": plain("a.tsv", b"text\tlabel\n\xff\xfe\t1\n"),
    "lines that nest": plain("a.jsonl", "[" * 200_000 + "\n"),
    "lines of objects that nest": plain("a.jsonl", '{"a":' * 200_000 + "\n"),
    "lines of lists": plain("a.jsonl", "[1, 2]\n"),
    "lines cut off": plain("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"'),
    "a number of a million digits": plain("a.jsonl", '{"text": "a", "label": ' + "9" * 10**6 + "}"),
    "labels that are lists": plain("a.jsonl", '{"text": "a", "label": [1]}\n'),
    "texts that are numbers": plain(
        "a.jsonl", '{"text": 1, "label": 1}\n{"text": 2, "label": 0}\n'
    ),
    "a text that is a pickle": plain("a.tsv", pickle.dumps(list(range(100)))),
    "a text that is an archive": plain("a.csv", b"PK\3\4" + bytes(range(200, 256)) * 9),
    "a text that is a pipe": pipe("a.tsv"),
    "a text that is a device": linked("a.tsv", "/dev/zero"),
}


def _tokenizer(**changes: Any) -> Maker:
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
    }
    return plain("tokenizer.json", json.dumps(whole | changes))


def _beside(content: bytes, name: str = "tokenizer_config.json") -> Maker:
    def make(folder: pathlib.Path) -> pathlib.Path:
        _tokenizer()(folder)
        (folder / name).write_bytes(content)
        return folder

    return make


def _heavy_beside(folder: pathlib.Path) -> pathlib.Path:
    _tokenizer()(folder)
    sparse("tokenizer_config.json", 8 * GIGABYTE, b"{")(folder)
    return folder


TOKENIZER = _tokenizer()
TOKENIZERS: dict[str, Maker] = {
    "a tokenizer of gigabytes": sparse("tokenizer.json", 8 * GIGABYTE, b"{"),
    "a tokenizer that nests": plain("tokenizer.json", "[" * 200_000),
    "a tokenizer that is a pickle": plain("tokenizer.json", pickle.dumps({"model": 1})),
    "a tokenizer of an unknown kind": _tokenizer(model={"type": "os.system"}),
    "a tokenizer with numbers below 0": _tokenizer(
        model={"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}
    ),
    "a tokenizer that is a list": plain("tokenizer.json", "[]"),
    "a tokenizer that is a pipe": pipe("tokenizer.json"),
    "a tokenizer that is a device": linked("tokenizer.json", "/dev/zero"),
    "settings that nest": _beside(b"[" * 200_000),
    "settings of gigabytes": _heavy_beside,
    "settings that are a list": _beside(b"[1]"),
    "settings in no UTF-8": _beside(b"\xff\xfe{}"),
    "a template cut off": _beside(
        json.dumps({"chat_template": "{% for m in messages %}"}).encode()
    ),
    "a template that is a number": _beside(b'{"chat_template": 7}'),
    "templates that have no names": _beside(b'{"chat_template": [1, 2]}'),
    "a template of gigabytes": lambda f: (
        _tokenizer()(f),
        sparse("chat_template.jinja", 8 * GIGABYTE, b"a")(f),
        f,
    )[-1],
}

LOOP, SET = "{{% for i in range({}) %}}{}{{% endfor %}}", "{% set n = namespace(x='a') %}"
HARM = "{{ cycler.__init__.__globals__.os.mkdir('harmed') }}"
TEMPLATES: dict[str, str] = {
    "reaches for the class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches for globals": HARM,
    "reaches through a function": "{{ raise_exception.__globals__['os'] }}",
    "reaches through a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "reaches through attr": "{{ (messages|attr('__class__')).mro() }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.mkdir('harmed') }}",
    "writes to the messages": "{{ messages.append({'role': 'user'}) }}",
    "loops a long time": LOOP.format("99999", LOOP.format("99999", "")),
    "loops over what it is given": (
        "{% set x = 'aaaaaaaaaa' * 1000 %}"
        "{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}{% endfor %}{% endfor %}"
    ),
    "calls itself forever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "repeats a text": "{{ 'a' * 10000000000 }}",
    "repeats a list": "{{ ([1] * 10000000000)|length }}",
    "raises to a power": "{{ 9 ** (9 ** 9) }}",
    "multiplies powers": "{% set x = 10 ** 1000000 %}{{ x * x * x }}",
    "doubles a text": (SET + LOOP.format("60", "{% set n.x = n.x ~ n.x %}")),
    "doubles a text by adding": (SET + LOOP.format("60", "{% set n.x = n.x + n.x %}")),
    "replaces ever more": (
        "{% set n = namespace(x='aaaaaaaaaa') %}"
        "{% for i in range(60) %}{% set n.x = n.x|replace('a', 'aaaaaaaaaa') %}{% endfor %}"
    ),
    "replaces by a method": (
        "{% set n = namespace(x='aaaaaaaaaa') %}"
        "{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aaaaaaaaaa') %}{% endfor %}"
    ),
    "centers": "{{ 'a'|center(10000000000) }}",
    "centers by a method": "{{ 'a'.center(10000000000) }}",
    "formats wide": "{{ '%10000000000d' % 1 }}",
    "formats wide by a method": "{{ '{:10000000000}'.format(1) }}",
    "indents": "{{ 'a\nb'|indent(10000000000) }}",
    "fills up batches": "{{ [1]|batch(1000000000, 'x')|list }}",
    "writes nonsense without end": "{{ lipsum(n=100000000) }}",
    "indents JSON": "{{ [1]|tojson(indent=10000000000) }}",
    "sums a range": "{{ range(10000000000)|sum }}",
    "raises": "{{ raise_exception('no') }}",
}


def _store(**changes: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    """A sweep's store, one of whose arrays is described otherwise."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        file = folder / "status" / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return make


def _grid(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def _status(content: bytes) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        for chunk in (folder / "status" / "c").rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(content)
        return folder

    return make


def _group(content: str) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / "zarr.json").write_text(content)
        return folder

    return make


def _codecs(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "configuration": {}} for name in names]


MADE = {"creating": False, "chunk": [2]}
STORES: dict[str, Maker] = {
    "a status of terabytes": _store(shape=[1 << 42], chunk_grid=_grid(1 << 20)),
    "a chunk of terabytes": _store(shape=[1 << 42], chunk_grid=_grid(1 << 42)),
    "a chunk of no lanes": _store(chunk_grid=_grid(0)),
    "a negative shape": _store(shape=[-4]),
    "a shape that is a word": _store(shape=["many"]),
    "an unknown dtype": _store(data_type="object"),
    "a codec that is a pickle": _store(codecs=_codecs("numcodecs.pickle")),
    "an unknown codec": _store(codecs=_codecs("os.system")),
    "no codec": _store(codecs=[]),
    "bytes that are no chunk": _status(b"\0" * 64),
    "a chunk that is a pickle": _status(pickle.dumps([1])),
    "a description that nests": _group("[" * 200_000),
    "a description that is a list": _group("[1]"),
    "a description of no sweep": _group('{"zarr_format": 3, "node_type": "group"}'),
    "a sweep that is a list": _group(
        '{"zarr_format": 3, "node_type": "group", "attributes": {"lorajax_sweep": [1]}}'
    ),
    "a description that is a pickle": lambda f: ((f / "zarr.json").write_bytes(b"\x80\4."), f)[1],
}


def _pack(**arrays: Any) -> Maker:
    def make(folder: pathlib.Path) -> pathlib.Path:
        np.savez(folder / "pack.npz", **arrays)
        return folder / "pack.npz"

    return make


def _pack_bomb(folder: pathlib.Path) -> pathlib.Path:
    head = {"descr": "|u1", "fortran_order": False, "shape": (4 * 1024, 1 << 20)}
    with zipfile.ZipFile(folder / "pack.npz", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("train_images.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, head)
            for _ in range(1024):
                member.write(bytes(1 << 20))
    return folder / "pack.npz"


def _gzipped(folder: pathlib.Path) -> pathlib.Path:
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb", 1) as file:
        file.write(struct.pack(">IIII", 0x803, 1 << 20, 64, 64))
        for _ in range(1500):
            file.write(bytes(1 << 20))
    return folder / "train-images-idx3-ubyte.gz"


GRAY = np.zeros((4, 8, 8), np.uint8)
PACKS: dict[str, Maker] = {
    "a pack of objects": _pack(train_images=np.array([{}], object)),
    "a pack without labels": _pack(train_images=GRAY),
    "a pack with labels to spare": _pack(
        train_images=GRAY,
        train_labels=np.zeros(5, np.int64),
        test_images=GRAY,
        test_labels=np.zeros(4, np.int64),
    ),
    "a pack with labels below 0": _pack(
        train_images=GRAY,
        train_labels=-np.ones(4, np.int64),
        test_images=GRAY,
        test_labels=-np.ones(4, np.int64),
    ),
    "a pack with labels beyond any": _pack(
        train_images=GRAY,
        train_labels=np.full(4, 2**60),
        test_images=GRAY,
        test_labels=np.zeros(4, np.int64),
    ),
    "a pack of complex pictures": _pack(
        train_images=GRAY.astype(complex),
        train_labels=np.zeros(4, int),
        test_images=GRAY.astype(complex),
        test_labels=np.zeros(4, int),
    ),
    "a pack that grows": _pack_bomb,
    "a pack that is a pickle": plain("pack.npz", pickle.dumps([1])),
    "a pack that is a pipe": pipe("pack.npz"),
}
IDX: dict[str, Maker] = {
    "an IDX file that grows": _gzipped,
    "an IDX header of terabytes": plain(
        "a-idx3-ubyte", struct.pack(">IIII", 0x803, 2**31, 2**31, 2**31)
    ),
    "an IDX file of nothing": plain("a-idx3-ubyte", b""),
    "an IDX file of 255 axes": plain("a-idx3-ubyte", struct.pack(">I", 0x8FF) + b"\1" * 64),
    "an IDX file that is a pickle": plain("a-idx3-ubyte", pickle.dumps([1])),
    "an IDX file of gigabytes": sparse(
        "a-idx3-ubyte", 8 * GIGABYTE, struct.pack(">IIII", 0x803, 1, 2, 2)
    ),
}
