"""Adapter files that were made to harm or to mislead: each is refused in one sentence."""

import json
import os
import pathlib
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lorajax import adapters
from lorajax.adapters import peft

A, B = (f"base_model.model.layer.lora_{name}.weight" for name in "AB")
TENSORS = {A: np.ones((2, 6), np.float32), B: np.ones((5, 2), np.float32)}


class Model(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
        self.conv = nnx.Conv(2, 4, (3,), feature_group_count=2, rngs=nnx.Rngs(0))


@pytest.fixture
def folder(tmp_path):
    adapted = adapters.adapt(Model(), "layer", key=jax.random.key(0), rank=2)
    adapters.save_peft(adapted, tmp_path / "adapter")
    adapters.load_peft(Model(), tmp_path / "adapter")
    return tmp_path / "adapter"


def raw(header, data=b""):
    """A safetensors file with the header as it is given."""

    def spoil(folder):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file = folder / peft.WEIGHTS
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return spoil


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def tensors(metadata=None, **changes):
    names = {"a": A, "b": B}

    def spoil(folder):
        given = TENSORS | {names.get(key, key): value for key, value in changes.items()}
        kept = {key: value for key, value in given.items() if value is not None}
        safetensors.numpy.save_file(kept, folder / peft.WEIGHTS, metadata)

    return spoil


def config(**changes):
    def spoil(folder):
        file = folder / peft.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def text(data):
    return lambda folder: (folder / peft.CONFIG).write_bytes(data)


class Payload:
    """What a pickle would run."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("harmed"),)


def pickled(folder):
    (folder / peft.WEIGHTS).write_bytes(pickle.dumps(Payload()))


def zipped(folder):
    np.savez(folder / "w.npz", a=np.array([Payload()], object))
    (folder / "w.npz").rename(folder / peft.WEIGHTS)


def linked(name, aim):
    def spoil(folder):
        outside = folder.parent / "elsewhere"
        (folder / name).rename(outside)
        os.symlink(outside if aim is None else aim, folder / name)

    return spoil


def fifo(folder):
    (folder / peft.WEIGHTS).unlink()
    os.mkfifo(folder / peft.WEIGHTS)


TORN = "is not a whole safetensors file"
HOSTILE = {
    "overlapping tensors": (
        raw({A: entry("F32", [2, 6], 0, 48), B: entry("F32", [5, 2], 8, 48)}, bytes(48)),
        TORN,
    ),
    "offsets beyond the file": (raw({A: entry("F32", [2, 6], 0, 48)}, bytes(8)), TORN),
    "offsets that run backwards": (raw({A: entry("F32", [2, 6], 48, 0)}, bytes(48)), TORN),
    "a gap before the tensor": (raw({A: entry("F32", [2, 6], 8, 56)}, bytes(56)), TORN),
    "a shape that overflows": (raw({A: entry("F32", [2**40, 2**40], 0, 48)}, bytes(48)), TORN),
    "a negative shape": (raw({A: entry("F32", [-2, -6], 0, 48)}, bytes(48)), TORN),
    "an unknown dtype": (raw({A: entry("F128", [2, 6], 0, 48)}, bytes(48)), TORN),
    "eight-bit floats": (raw({A: entry("F8_E4M3", [2, 6], 0, 12)}, bytes(12)), "F8|float8|whole"),
    "a header of gigabytes": (
        lambda f: (f / peft.WEIGHTS).write_bytes(struct.pack("<Q", 2**33) + b"{}"),
        TORN,
    ),
    "a header that nests": (raw(b"[" * 100_000), TORN),
    "a pickle under its name": (pickled, TORN),
    "an archive under its name": (zipped, TORN),
    "integers": (tensors(a=np.ones((2, 6), np.int64)), "weights must be floating point"),
    "booleans": (tensors(a=np.ones((2, 6), bool)), "weights must be floating point"),
    "doubles that overflow": (
        tensors(a=np.full((2, 6), 1e300)),
        "lora_A.weight' with 12 of 12 entries that are NaN or infinite in float32",
    ),
    "one entry that is none": (
        tensors(b=np.where(np.eye(5, 2, k=-4), np.nan, 1).astype(np.float32)),
        "lora_B.weight' with 1 of 10 entries that are NaN or infinite",
    ),
    "a factor with an axis more": (tensors(b=np.ones((5, 2, 1), np.float32)), "lora_B of shape"),
    "a factor without axes": (tensors(a=np.ones((), np.float32)), "lora_A of shape"),
    "rank 0": (tensors(a=np.ones((0, 6), np.float32), b=np.ones((5, 0), np.float32)), "rank 0"),
    "offsets that are no names": (tensors({"lorajax.offsets": "[[1]]"}), "a list of module names"),
    "offsets that nest": (tensors({"lorajax.offsets": "[" * 99_999}), "are not valid JSON"),
    "blocks of negative rank": (tensors({"lorajax.blocks": '{"layer": [-1]}'}), "to ranks"),
    "a base that is none": (
        tensors(**{"base_model.model.layer.base_layer.colour": np.ones(5, np.float32)}),
        "'layer' has .'colour'.",
    ),
    "a base of another shape": (
        tensors(**{"base_model.model.layer.base_layer.weight": np.ones((1, 6), np.float32)}),
        "weight of shape \\(1, 6\\)",
    ),
    "weights of no adapter": (
        tensors(**{"base_model.model.layer.weight": np.ones((5, 6), np.float32)}),
        "belongs to no LoRA adapter",
    ),
    "an absurd rank": (config(r=10**12), "the configuration says 1000000000000"),
    "a rank that is true": (config(r=True), "the configuration says True"),
    "an absurd alpha": (config(lora_alpha=1e300), "it must be positive and finite"),
    "an infinite alpha": (config(lora_alpha=float("inf")), "it must be positive and finite"),
    "an alpha that is none": (config(lora_alpha=float("nan")), "it must be positive and finite"),
    "an alpha that is a list": (config(alpha_pattern={"layer": [1]}), "it must be positive"),
    "a group that repeats": (config(rank_pattern={"(a*)*b": 1}), "too complex"),
    "many repetitions": (config(rank_pattern={".*" * 40: 1}), "too complex"),
    "a long pattern": (config(alpha_pattern={"a" * 10_000: 1}), "too complex"),
    "a torn pattern": (config(alpha_pattern={"[": 1}), "not a regular expression"),
    "a target left out": (config(target_modules=["conv"]), "target_modules in the conf.* leaves"),
    "a method of no name": (config(peft_type=["LORA"]), "peft_type is \\['LORA'\\]"),
    "names that are numbers": (config(modules_to_save=[1]), "is not a list of names"),
    "a configuration that nests": (text(b'{"a":' * 100_000), "is not valid JSON"),
    "a configuration cut in a letter": (text("{é".encode()[:-1]), "is not valid JSON"),
    "numbers beyond any": (text(b"9" * 10_000), "is not valid JSON"),
    "weights that are a link": (linked(peft.WEIGHTS, None), "is a link out of its folder"),
    "a configuration that is a link": (linked(peft.CONFIG, None), "is a link out of its folder"),
    "a link to a device": (linked(peft.WEIGHTS, "/dev/zero"), "is a link out of its folder"),
    "a pipe": (fifo, "has no adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused_in_one_sentence(case, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    spoil, message = HOSTILE[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        adapters.load_peft(Model(), folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (folder.parent / "harmed").exists()


def test_files_of_the_hubs_cache_are_links_that_may_be_followed(folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    for name in (peft.CONFIG, peft.WEIGHTS):
        (folder / name).rename(repository / "blobs" / name)
        os.symlink(f"../../blobs/{name}", snapshot / name)
    x = jnp.ones((1, 6), jnp.float32)
    assert adapters.load_peft(Model(), snapshot).layer(x).shape == (1, 5)
