"""Names and shapes of weights in public checkpoints, beside this package's own.

A layout is a list of rules, each of which ties one tensor of a checkpoint to one or more of a
model's. The same rules read and write, so that what is loaded can also be exported.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lorajax.models.resnet import ResNetConfig
from lorajax.models.vgg import VGGConfig
from lorajax.models.vit import ViTConfig

Config = ViTConfig | ResNetConfig | VGGConfig


class Rule(NamedTuple):
    """Tensors of a checkpoint and what they become.

    Attributes:
      theirs: names in the checkpoint.
      ours: dotted paths in the model.
      read: checkpoint tensors → one array a path.
      write: arrays in the order of `ours` → checkpoint tensors.
      optional: whether the checkpoint may lack the tensors, which then count as zeros.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[..., tuple[np.ndarray, ...]]
    write: Callable[..., tuple[np.ndarray, ...]]
    optional: bool = False


Map = Callable[[np.ndarray], np.ndarray]


def _one(theirs: str, ours: str, read: Map, write: Map, optional: bool = False) -> Rule:
    return Rule((theirs,), (ours,), lambda x: (read(x),), lambda x: (write(x),), optional)


def _same(theirs: str, ours: str, optional: bool = False) -> Rule:
    return _one(theirs, ours, lambda x: x, lambda x: x, optional)


def _conv(theirs: str, ours: str) -> Rule:
    # torch: (out, in, height, width); Flax: (height, width, in, out).
    return _one(theirs, ours, lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def _linear(theirs: str, ours: str, optional_bias: bool = False) -> Iterator[Rule]:
    yield _one(f"{theirs}.weight", f"{ours}.kernel", np.transpose, np.transpose)
    yield _same(f"{theirs}.bias", f"{ours}.bias", optional_bias)


def _layer_norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield _same(f"{theirs}.weight", f"{ours}.scale")
    yield _same(f"{theirs}.bias", f"{ours}.bias")


def _batch_norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield from _layer_norm(theirs, ours)
    yield _same(f"{theirs}.running_mean", f"{ours}.mean")
    yield _same(f"{theirs}.running_var", f"{ours}.var")


def _patches(theirs: str, config: ViTConfig, order: str) -> Rule:
    """The patch embedding, a convolution elsewhere and a matrix on flat patches here."""
    side, channels, width = config.patch_size, config.channels, config.width
    if order == "torch":
        return _one(
            theirs,
            "embeddings.patches.kernel",
            lambda x: x.transpose(2, 3, 1, 0).reshape(-1, width),
            lambda x: x.reshape(side, side, channels, width).transpose(3, 2, 0, 1),
        )
    return _one(
        theirs,
        "embeddings.patches.kernel",
        lambda x: x.reshape(-1, width),
        lambda x: x.reshape(side, side, channels, width),
    )


def huggingface_vit(config: ViTConfig) -> Iterator[Rule]:
    """`ViTForImageClassification` of transformers, as its safetensors files name things."""
    yield _same("vit.embeddings.cls_token", "embeddings.prefix")
    yield _same("vit.embeddings.position_embeddings", "embeddings.positions")
    projection = "vit.embeddings.patch_embeddings.projection"
    yield _patches(f"{projection}.weight", config, "torch")
    yield _same(f"{projection}.bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"vit.encoder.layer.{i}", f"blocks.{i}"
        for name in ("query", "key", "value"):
            yield from _linear(
                f"{theirs}.attention.attention.{name}", f"{ours}.attention.{name}", True
            )
        yield from _linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        yield from _linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.up")
        yield from _linear(f"{theirs}.output.dense", f"{ours}.mlp.down")
        yield from _layer_norm(f"{theirs}.layernorm_before", f"{ours}.norm1")
        yield from _layer_norm(f"{theirs}.layernorm_after", f"{ours}.norm2")
    yield from _layer_norm("vit.layernorm", "norm")
    yield from _linear("classifier", "head")


def timm_vit(config: ViTConfig) -> Iterator[Rule]:
    """`VisionTransformer` and distilled DeiT of timm."""
    width = config.width
    if config.distilled:
        yield Rule(
            ("cls_token", "dist_token"),
            ("embeddings.prefix",),
            lambda first, second: (np.concatenate([first, second], axis=1),),
            lambda x: (x[:, :1], x[:, 1:]),
        )
    else:
        yield _same("cls_token", "embeddings.prefix")
    yield _same("pos_embed", "embeddings.positions")
    yield _patches("patch_embed.proj.weight", config, "torch")
    yield _same("patch_embed.proj.bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"blocks.{i}", f"blocks.{i}"
        names = [f"{ours}.attention.{n}" for n in ("query", "key", "value")]
        yield Rule(
            (f"{theirs}.attn.qkv.weight",),
            tuple(f"{n}.kernel" for n in names),
            lambda x: tuple(x.reshape(3, width, width).transpose(0, 2, 1)),
            lambda *x: (np.concatenate([kernel.T for kernel in x]),),
        )
        yield Rule(
            (f"{theirs}.attn.qkv.bias",),
            tuple(f"{n}.bias" for n in names),
            lambda x: tuple(x.reshape(3, width)),
            lambda *x: (np.concatenate(x),),
            True,
        )
        yield from _linear(f"{theirs}.attn.proj", f"{ours}.attention.out")
        yield from _linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up")
        yield from _linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")
        yield from _layer_norm(f"{theirs}.norm1", f"{ours}.norm1")
        yield from _layer_norm(f"{theirs}.norm2", f"{ours}.norm2")
    yield from _layer_norm("fc_norm" if config.pool == "mean" else "norm", "norm")
    yield from _linear("head", "head")
    if config.distilled:
        yield from _linear("head_dist", "distilled_head")


def augreg_vit(config: ViTConfig) -> Iterator[Rule]:
    """The npz files of Google's vision_transformer ("How to train your ViT")."""
    width, heads = config.width, config.heads
    features = width // heads

    def dense(theirs: str, ours: str) -> Iterator[Rule]:
        yield _same(f"{theirs}/kernel", f"{ours}.kernel")
        yield _same(f"{theirs}/bias", f"{ours}.bias")

    def norm(theirs: str, ours: str) -> Iterator[Rule]:
        yield _same(f"{theirs}/scale", f"{ours}.scale")
        yield _same(f"{theirs}/bias", f"{ours}.bias")

    yield _same("cls", "embeddings.prefix")
    yield _same("Transformer/posembed_input/pos_embedding", "embeddings.positions")
    yield _patches("embedding/kernel", config, "flax")
    yield _same("embedding/bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            yield _one(
                f"{attention}/{name}/kernel",
                f"{ours}.attention.{name}.kernel",
                lambda x: x.reshape(width, width),
                lambda x: x.reshape(width, heads, features),
            )
            yield _one(
                f"{attention}/{name}/bias",
                f"{ours}.attention.{name}.bias",
                lambda x: x.reshape(width),
                lambda x: x.reshape(heads, features),
            )
        yield _one(
            f"{attention}/out/kernel",
            f"{ours}.attention.out.kernel",
            lambda x: x.reshape(width, width),
            lambda x: x.reshape(heads, features, width),
        )
        yield _same(f"{attention}/out/bias", f"{ours}.attention.out.bias")
        yield from norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        yield from norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2")
        yield from dense(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.up")
        yield from dense(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.down")
    yield from norm("Transformer/encoder_norm", "norm")
    yield from dense("head", "head")


def torch_resnet(config: ResNetConfig) -> Iterator[Rule]:
    """The `ResNet` of torchvision, and akamaster's CIFAR ResNets, whose head has another name."""
    yield _conv("conv1.weight", "stem.kernel")
    yield from _batch_norm("bn1", "stem_norm")
    convs = 2 if config.block == "basic" else 3
    expansion = 1 if config.block == "basic" else 4
    features = config.stem_width
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        for i in range(depth):
            theirs, ours = f"layer{stage + 1}.{i}", f"stages.{stage}.{i}"
            for j in range(convs):
                yield _conv(f"{theirs}.conv{j + 1}.weight", f"{ours}.convs.{j}.kernel")
                yield from _batch_norm(f"{theirs}.bn{j + 1}", f"{ours}.norms.{j}")
            changes = (stage and not i) or features != width * expansion
            if changes and config.shortcut == "projection":
                yield _conv(f"{theirs}.downsample.0.weight", f"{ours}.projection.kernel")
                yield from _batch_norm(f"{theirs}.downsample.1", f"{ours}.projection_norm")
            features = width * expansion
    yield from _linear("linear" if config.stem == "cifar" else "fc", "head")


def torchvision_vgg(config: VGGConfig) -> Iterator[Rule]:
    """The `VGG` of torchvision, with or without batch norm."""
    grid, last = config.grid, config.widths[-1]
    size = last * grid**2
    place = i = 0
    for depth in config.depths:
        for _ in range(depth):
            yield _conv(f"features.{place}.weight", f"convs.{i}.kernel")
            yield _same(f"features.{place}.bias", f"convs.{i}.bias")
            if config.batch_norm:
                yield from _batch_norm(f"features.{place + 1}", f"norms.{i}")
            place += 3 if config.batch_norm else 2
            i += 1
        place += 1
    # torch flattens (channel, row, column), Flax (row, column, channel).
    yield _one(
        "classifier.0.weight",
        "hidden.0.kernel",
        lambda x: x.reshape(-1, last, grid, grid).transpose(2, 3, 1, 0).reshape(size, -1),
        lambda x: x.reshape(grid, grid, last, -1).transpose(3, 2, 0, 1).reshape(-1, size),
    )
    yield _same("classifier.0.bias", "hidden.0.bias")
    yield from _linear("classifier.3", "hidden.1")
    yield from _linear("classifier.6", "head")
