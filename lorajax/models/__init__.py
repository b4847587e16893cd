"""Models in Flax NNX, and their public checkpoints.

`load` reads a checkpoint whatever its format; `config` and `build` make a random model of a
published shape; `normalize` scales images to what a vision model was trained on. Each family of
models is declared in one file here, or outside by `register`.
"""

from lorajax.models.bert import Bert, BertConfig
from lorajax.models.catalog import build, config, families, register
from lorajax.models.checkpoints import (
    EMBEDDED,
    abstract,
    layout_of,
    load,
    notes,
    unread,
)
from lorajax.models.export import save, tensors
from lorajax.models.family import Family, Format, Model, Rule, Untold
from lorajax.models.files import Source
from lorajax.models.generation import Generated, generate
from lorajax.models.llama import Llama, LlamaConfig
from lorajax.models.resnet import ResNet, ResNetConfig
from lorajax.models.torch_names import torch_rules
from lorajax.models.vgg import VGG, VGGConfig
from lorajax.models.vision import normalize
from lorajax.models.vit import ViT, ViTConfig

__all__ = [
    "EMBEDDED",
    "VGG",
    "Bert",
    "BertConfig",
    "Family",
    "Format",
    "Generated",
    "Llama",
    "LlamaConfig",
    "Model",
    "ResNet",
    "ResNetConfig",
    "Rule",
    "Source",
    "Untold",
    "VGGConfig",
    "ViT",
    "ViTConfig",
    "abstract",
    "build",
    "config",
    "families",
    "generate",
    "layout_of",
    "load",
    "normalize",
    "notes",
    "register",
    "save",
    "tensors",
    "torch_rules",
    "unread",
]
