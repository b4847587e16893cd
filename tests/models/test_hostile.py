"""Checkpoints that somebody made to do harm: one sentence each, and no memory of their size.

Every file is made here and loaded in this process, whose memory may grow by `LIMIT` bytes in the
meantime, by the system's count and by Python's own; sparse files claim gigabytes that nobody wrote.
"""

import io
import json
import pathlib
import pickle
import resource
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorajax import models

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
LIMIT = 200 << 20
SECONDS = 10
GIGABYTE = 1 << 30


def safetensors(header, data=b"", size=None):
    """The bytes of a safetensors file with any header; `size` is what it says of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sparse(path, header, size):
    """A file of `size` bytes behind its header, nearly none of which is on the disk."""
    with open(path, "wb") as file:
        file.write(safetensors(header))
        file.truncate(file.tell() + size)


def write(name):
    def put(content):
        return lambda folder: (folder / name).write_bytes(content)

    return put


WEIGHTS = write("model.safetensors")
SAFETENSORS = {
    "empty": WEIGHTS(b""),
    "shorter than its length": WEIGHTS(b"\3\0"),
    "header longer than the file": WEIGHTS(safetensors({}, size=1 << 40)),
    "header of 2^64 bytes": WEIGHTS(safetensors({}, size=2**64 - 1)),
    "header of no JSON": WEIGHTS(safetensors(b"{" * 64)),
    "header nested a million deep": WEIGHTS(safetensors(b"[" * 1_000_000)),
    "header that is a list": WEIGHTS(safetensors(b"[1, 2]")),
    "overlapping tensors": WEIGHTS(
        safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))
    ),
    "the same bytes twice": WEIGHTS(
        safetensors({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8))
    ),
    "offsets past the end": WEIGHTS(safetensors({"a": entry([1 << 40], 0, 1 << 42)}, bytes(8))),
    "offsets backwards": WEIGHTS(safetensors({"a": entry([2], 8, 0)}, bytes(8))),
    "negative offsets": WEIGHTS(safetensors({"a": entry([2], -8, 0)}, bytes(8))),
    "a hole between tensors": WEIGHTS(
        safetensors({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, bytes(24))
    ),
    "bytes behind the last tensor": WEIGHTS(safetensors({"a": entry([2], 0, 8)}, bytes(64))),
    "a shape that overflows": WEIGHTS(safetensors({"a": entry([2**32, 2**32, 2], 0, 8)}, bytes(8))),
    "a shape of other size": WEIGHTS(safetensors({"a": entry([3], 0, 8)}, bytes(8))),
    "a negative shape": WEIGHTS(safetensors({"a": entry([-2], 0, 8)}, bytes(8))),
    "an unknown type": WEIGHTS(safetensors({"a": entry([2], 0, 8, "O64")}, bytes(8))),
    "a pickle under another name": WEIGHTS(pickle.dumps({"a": [1, 2, 3]}, protocol=4) * 100),
    "an archive under another name": WEIGHTS(b"PK\3\4" + bytes(200)),
}


def giant_header(folder):
    names = {f"blocks.0.{'x' * 200}.{i}": entry([0], 0, 0) for i in range(40_000)}
    (folder / "model.safetensors").write_bytes(safetensors(names))


def timm(folder, change):
    tensors = load_file(FIXTURES / "timm_vit" / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def with_a_giant_tensor(name, sides):
    """A timm ViT one of whose tensors has other sides, and gigabytes of zeros behind it."""

    def make(folder):
        tensors = load_file(FIXTURES / "timm_vit" / "model.safetensors")
        header, place = {}, 0
        for key, value in tensors.items():
            shape = sides if key == name else list(value.shape)
            size = 4 * int(np.prod(shape, dtype=np.int64))
            header[key] = entry(shape, place, place + size)
            place += size
        sparse(folder / "model.safetensors", header, place)

    return make


def a_billion_layers(folder):
    config = {"image_size": [8, 8], "patch_size": 4, "width": 8, "depth": 10**9, "heads": 2}
    metadata = {"format": "lorajax", "family": "vit", "config": json.dumps(config)}
    save_file({"norm.scale": np.ones(8, np.float32)}, folder / "model.safetensors", metadata)


def own(config):
    metadata = {"format": "lorajax", "family": "vit", "config": config}

    def make(folder):
        save_file({"norm.scale": np.ones(8, np.float32)}, folder / "model.safetensors", metadata)

    return make


MODELS = {
    "a header of megabytes": giant_header,
    "a head of other width in gigabytes": with_a_giant_tensor("head.weight", [5, GIGABYTE]),
    "positions in gigabytes": with_a_giant_tensor("pos_embed", [1, 17, GIGABYTE // 8]),
    "a layer in gigabytes": with_a_giant_tensor("blocks.1.mlp.fc1.bias", [GIGABYTE]),
    "a layer with a number of its own": lambda f: timm(
        f, lambda t: t.update({"blocks.999999999.norm1.weight": np.ones(24, np.float32)})
    ),
    "integers for weights": lambda f: timm(
        f, lambda t: t.update({"norm.weight": np.ones(24, np.int64)})
    ),
    "booleans for weights": lambda f: timm(
        f, lambda t: t.update({"norm.weight": np.ones(24, np.bool_)})
    ),
    "a tensor without axes": lambda f: timm(
        f, lambda t: t.update({"patch_embed.proj.weight": np.ones((), np.float32)})
    ),
    "a tensor without entries": lambda f: timm(
        f, lambda t: t.update({"patch_embed.proj.weight": np.ones((0, 3, 4, 4), np.float32)})
    ),
    "a model of a billion layers": a_billion_layers,
    "a configuration of words": own('{"width": "wide"}'),
    "a configuration of an unknown setting": own('{"__class__": 3}'),
    "a configuration that is no object": own("[1]"),
    "a configuration nested deep": own("[" * 100_000),
    "a family of another kind": lambda f: save_file(
        {"x": np.ones(1, np.float32)},
        f / "model.safetensors",
        {"format": "lorajax", "family": "os.system", "config": "{}"},
    ),
}


def archive(*members, mode=zipfile.ZIP_STORED, suffix=".npy"):
    """An npz with members of given names and bytes."""

    def make(folder):
        with zipfile.ZipFile(folder / "model.npz", "w", mode) as file:
            for name, content in members:
                file.writestr(name + suffix, content)

    return make


def npy(array, **header):
    """The bytes of an npy file, whose header may be made to lie."""
    raw = io.BytesIO()
    stated = np.lib.format.header_data_from_array_1_0(array) | header
    np.lib.format.write_array_header_1_0(raw, stated)
    return raw.getvalue() + array.tobytes()


def bomb(folder):
    """A GiB of zeros in a MiB, under the name of a tensor that a checkpoint has."""
    piece = bytes(1 << 20)
    with zipfile.ZipFile(folder / "model.npz", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("head/kernel.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (GIGABYTE // 4,)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(1024):
                member.write(piece)


def many_members(folder):
    with zipfile.ZipFile(folder / "model.npz", "w") as file:
        for i in range(50_000):
            file.writestr(zipfile.ZipInfo(f"{i:0100d}.npy"), b"")


def twice(folder):
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(("cls", npy(ONES)), ("cls", npy(ONES)))(folder)


ONES = np.ones(4, np.float32)
NPZ = {
    "Python objects": lambda f: np.savez(
        f / "model.npz", **{"embedding/kernel": np.array([{}], dtype=object)}
    ),
    "a pickle as a member": archive(("cls", pickle.dumps([1, 2]))),
    "a member that is no array": archive(("cls", b"import os"), suffix=".py"),
    "a shape of terabytes": archive(("cls", npy(ONES, shape=(1 << 40,)))),
    "a negative shape of npy": archive(("cls", npy(ONES, shape=(-4,)))),
    "a shape with an object": archive(("cls", npy(ONES, shape=(4, "x")))),
    "a description that is code": archive(("cls", npy(ONES, descr="__import__('os')"))),
    "a member twice": twice,
    "a bomb": bomb,
    "a directory of megabytes": many_members,
    "no archive": write("model.npz")(b"\x93NUMPY" + bytes(100)),
    "a pickle named npz": write("model.npz")(pickle.dumps(list(range(1000)))),
    "a cut archive": lambda f: (f / "model.npz").write_bytes(
        (FIXTURES / "augreg_vit" / "model.npz").read_bytes()[:5000]
    ),
}


def outside(folder, name="outside.safetensors"):
    path = folder.parent / name
    path.write_bytes((FIXTURES / "timm_vit" / "model.safetensors").read_bytes())
    return path


def index(weight_map):
    text = json.dumps({"weight_map": weight_map}) if not isinstance(weight_map, str) else weight_map
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def linked_weights(folder):
    (folder / "model.safetensors").symlink_to(outside(folder))


def linked_shard(folder):
    index({"cls_token": "a.safetensors"})(folder)
    (folder / "a.safetensors").symlink_to(outside(folder))


def side_file(content, name="config.json"):
    def make(folder):
        timm(folder, lambda tensors: None)
        (folder / name).write_bytes(content)

    return make


def linked_side_file(folder):
    timm(folder, lambda tensors: None)
    (folder.parent / "secret.json").write_text('{"model_args": {"num_heads": 3}}')
    (folder / "config.json").symlink_to(folder.parent / "secret.json")


def shards_that_overlap(folder):
    timm(folder, lambda tensors: None)
    (folder / "a.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index({"x": "a.safetensors", "y": "model.safetensors"})(folder)


FOLDERS = {
    "an index to the folder above": lambda f: (
        outside(f),
        index({"x": "../outside.safetensors"})(f),
    ),
    "an index to an absolute path": lambda f: index({"x": str(outside(f))})(f),
    "an index of numbers": index({"x": 3}),
    "an index that is a list": index("[1]"),
    "an index nested deep": index("[" * 100_000),
    "an index of lists": index('{"weight_map": ["a"]}'),
    "weights that are a link": linked_weights,
    "a shard that is a link": linked_shard,
    "shards with the same tensors": shards_that_overlap,
    "a configuration that is a link": linked_side_file,
    "a configuration of megabytes": side_file(b"{" + b" " * (8 << 20) + b"}"),
    "a configuration with deep lists": side_file(b"[" * 100_000),
    "a configuration in another encoding": side_file('{"é": 1}'.encode("utf-16")),
    "model_args that are a list": side_file(b'{"model_args": [1]}'),
    "heads that are a word": side_file(b'{"model_args": {"num_heads": "3"}}'),
    "heads that are none": side_file(b'{"model_args": {"num_heads": 0}}'),
    "a size that is a word": side_file(b'{"model_args": {"num_heads": 3, "img_size": "16"}}'),
    "a processor of words": side_file(
        b'{"image_mean": "x", "image_std": [1]}', "preprocessor_config.json"
    ),
    "a folder for weights": lambda f: (f / "model.safetensors").mkdir(),
    "a device for weights": lambda f: (f / "model.safetensors").symlink_to("/dev/zero"),
}
CASES = SAFETENSORS | MODELS | NPZ | FOLDERS


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_one_sentence(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    CASES[name](folder)
    path = folder / "model.npz" if (folder / "model.npz").exists() else folder
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # kibibytes on Linux
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ValueError) as caught:
            models.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(folder) in message
    assert message.endswith(".") and "\n" not in message
    assert peak < LIMIT
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < LIMIT
    assert time.monotonic() - start < SECONDS


def test_the_links_of_the_hubs_own_cache_are_followed(tmp_path):
    fixture = FIXTURES / "huggingface_vit"
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(("model.safetensors", "config.json")):
        (blobs / str(number)).write_bytes((fixture / file).read_bytes())
        (snapshot / file).symlink_to(f"../../blobs/{number}")
    assert models.load(snapshot).config == models.load(fixture).config


@pytest.mark.parametrize("name", ["cls", "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"])
def test_bytes_that_were_changed_in_an_archive_are_noticed(name, tmp_path):
    tensors = dict(np.load(FIXTURES / "augreg_vit" / "model.npz"))
    np.savez(tmp_path / "m.npz", **tensors)
    content = (tmp_path / "m.npz").read_bytes()
    end = content.index(tensors[name].tobytes()) + tensors[name].nbytes
    (tmp_path / "m.npz").write_bytes(content[: end - 8] + b"\7" * 8 + content[end:])
    with pytest.raises(ValueError, match="m.npz .*Bad CRC-32"):
        models.load(tmp_path / "m.npz")
