"""Vision models in Flax NNX, and their public checkpoints.

`load` reads a checkpoint whatever its format; `config` and `build` make a random model of a
published shape; `normalize` scales images to what a model was trained on.
"""

from lorajax.models.catalog import Model, build, config, normalize
from lorajax.models.checkpoints import EMBEDDED, layout_of, load, notes, save, tensors
from lorajax.models.resnet import ResNet, ResNetConfig
from lorajax.models.torch_names import torch_rules
from lorajax.models.vgg import VGG, VGGConfig
from lorajax.models.vit import ViT, ViTConfig

__all__ = [
    "EMBEDDED",
    "VGG",
    "Model",
    "ResNet",
    "ResNetConfig",
    "VGGConfig",
    "ViT",
    "ViTConfig",
    "build",
    "config",
    "layout_of",
    "load",
    "normalize",
    "notes",
    "save",
    "tensors",
    "torch_rules",
]
