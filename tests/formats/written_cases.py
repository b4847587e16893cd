"""The adapters that lorajax writes for PEFT to read, one for each thing that the format can say."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models
from flax import nnx

from lorajax import adapters

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"

CASES = {
    "bert": {
        "ranks": ({"**/query": 4, "**/value": {"rank": 2, "alpha": 6}, "**/key": 4}, {}),
        "rslora": ({"**/query": 4, "**/layer/1/**/dense": 3}, {"rslora": True, "alpha": 5.0}),
        "dora": ("**/self/*", {"rank": 3, "dora": True, "alpha": 6.0}),
        "pissa": ({"**/query": 4, "**/value": 2}, {"start": "pissa", "alpha": 3.0}),
        "dora-pissa": ("**/query", {"rank": 2, "start": "pissa", "dora": True}),
        "rslora-olora": ("**/output/dense", {"rank": 2, "start": "olora", "rslora": True}),
        "recentered": ("**/query", {"rank": 2, "start": "small", "recenter": True}),
        "embedding": (["**/word_embeddings", "classifier"], {"rank": 3, "alpha": 6.0}),
        "adalora": ({"**/query": 4, "**/value": 2}, {"kind": "adalora", "alpha": 6.0}),
        "ia3": (
            {"**/key": {}, "**/value": {}, "**/output/dense": {"side": "inputs"}},
            {"kind": "ia3", "rank": None},
        ),
    },
    "vit": {
        "conv": ({"**/projection": 2, "**/fc1": 4}, {"alpha": 3.0}),
        "dora-conv": ("**/projection", {"rank": 2, "dora": True}),
        "pissa-conv": (["**/projection", "**/o_proj"], {"rank": 2, "start": "pissa"}),
        "adalora-conv": ({"**/projection": 3, "**/q_proj": 2}, {"kind": "adalora"}),
    },
}
PAIRS = [(family, case) for family, cases in CASES.items() for case in cases]


def make(family, case):
    """The adapted model of a case, with every adapter leaf away from its start."""
    targets, options = CASES[family][case]
    model = tiny_models.load(FIXTURES / family)
    options = {name: x for name, x in ({"rank": 8} | options).items() if x is not None}
    adapted = adapters.adapt(model, targets, key=jax.random.key(1), **options)
    graphdef, params, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(draw.normal(size=x.shape) / 4, x.dtype), params)
    return nnx.merge(graphdef, params, rest)
