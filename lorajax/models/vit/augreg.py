"""The npz files of Google's vision_transformer ("How to train your ViT", arXiv:2106.10270)."""

from collections.abc import Iterator
from typing import Any

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule
from lorajax.models.files import Source
from lorajax.models.vit.huggingface import refuse
from lorajax.models.vit.model import ViTConfig, grid_of, patches
from lorajax.models.vit.timm import TIMM


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    patch, _, channels, width = tensors["embedding/kernel"].shape
    tokens = tensors["Transformer/posembed_input/pos_embedding"].shape[1]
    block = "Transformer/encoderblock_0"
    query = tensors[f"{block}/MultiHeadDotProductAttention_1/query/kernel"]
    return {
        "image_size": grid_of(tokens - 1, patch),
        "patch_size": patch,
        "width": width,
        "depth": family.count(tensors, r"Transformer/encoderblock_(\d+)/"),
        "heads": query.shape[1],
        "mlp_width": tensors[f"{block}/MlpBlock_3/Dense_0/kernel"].shape[1],
        "classes": family.classes(tensors, "head/kernel", 1),
        "channels": channels,
        "gelu": "tanh",
        "epsilon": 1e-6,
        **vision.statistics(source),
    }


def _rules(config: ViTConfig) -> Iterator[Rule]:
    width, heads = config.width, config.heads
    features = width // heads

    def dense(theirs: str, ours: str) -> Iterator[Rule]:
        yield family.one(f"{theirs}/kernel", f"{ours}.kernel")
        yield family.one(f"{theirs}/bias", f"{ours}.bias")

    def norm(theirs: str, ours: str) -> Iterator[Rule]:
        yield family.one(f"{theirs}/scale", f"{ours}.scale")
        yield family.one(f"{theirs}/bias", f"{ours}.bias")

    yield family.one("cls", "embeddings.prefix")
    yield family.one("Transformer/posembed_input/pos_embedding", "embeddings.positions")
    yield patches("embedding/kernel", config, torch=False)
    yield family.one("embedding/bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            yield family.one(
                f"{attention}/{name}/kernel",
                f"{ours}.attention.{name}.kernel",
                lambda x: x.reshape(width, width),
                lambda x: x.reshape(width, heads, features),
            )
            yield family.one(
                f"{attention}/{name}/bias",
                f"{ours}.attention.{name}.bias",
                lambda x: x.reshape(width),
                lambda x: x.reshape(heads, features),
            )
        yield family.one(
            f"{attention}/out/kernel",
            f"{ours}.attention.out.kernel",
            lambda x: x.reshape(width, width),
            lambda x: x.reshape(heads, features, width),
        )
        yield family.one(f"{attention}/out/bias", f"{ours}.attention.out.bias")
        yield from norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        yield from norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2")
        yield from dense(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.up")
        yield from dense(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.down")
    yield from norm("Transformer/encoder_norm", "norm")
    yield from dense("head", "head")


def _express(config: ViTConfig) -> None:
    refuse(config, "augreg")
    if config.epsilon != 1e-6:
        raise ValueError(
            f"layout is 'augreg', which has no epsilon = {config.epsilon!r}; use 'lorajax'."
        )


AUGREG = Format(
    "augreg",
    ("embedding/kernel", "cls"),
    _infer,
    _rules,
    suffix=".npz",
    express=_express,
    side=vision.SIDE,
    modules=TIMM.rules,  # which reads these files into its own models
)
"""Google's files; their GELU is the tanh form, and timm reads them with the exact one."""
