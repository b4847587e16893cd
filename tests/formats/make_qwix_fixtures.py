"""Writes the outputs of Qwix's LoRA on a Linear, an attention and a Conv layer.

    python tests/formats/make_qwix_fixtures.py

needs `qwix`. The layers and factors are written along, so that the test needs Qwix no more.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

RANK, ALPHA = 3, 6.0


def layers():
    rngs = nnx.Rngs(0)
    draw = np.random.default_rng(0)
    image, tokens = draw.normal(size=(2, 7, 6, 4)), draw.normal(size=(2, 5, 8))
    return {
        "linear": (nnx.Linear(8, 6, rngs=rngs), tokens),
        "attention": (nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), tokens),
        "conv": (nnx.Conv(4, 6, (3, 2), strides=(2, 1), padding="VALID", rngs=rngs), image),
    }


class Root(nnx.Module):
    """Qwix finds modules by path, and a root has none."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def main(file):
    draw, arrays = np.random.default_rng(1), {}
    for name, (layer, x) in layers().items():
        x = jnp.asarray(x, jnp.float32)
        provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(Root(layer), provider, x, rngs=nnx.Rngs(1))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            variable.set_value(jnp.asarray(draw.normal(size=variable.shape) / 2, jnp.float32))
            nnx.update(model, nnx.from_flat_state([(path, variable)]))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            arrays["/".join([name, *map(str, path[1:])])] = np.asarray(variable[...])
        arrays[f"{name}/x"] = np.asarray(x)
        arrays[f"{name}/y"] = np.asarray(model(x))
    np.savez(file, rank=RANK, alpha=ALPHA, **arrays)
    print({name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main(pathlib.Path(__file__).resolve().parent / "fixtures" / "qwix.npz")
