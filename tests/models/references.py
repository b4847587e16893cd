"""The defining libraries' own models with random weights, small and in full size.

`python -m tests.models.references` writes the committed fixtures (needs torch, torchvision,
transformers and timm); the tests of the group `formats` import it to compare full-size models.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet, vgg, vision_transformer

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def randomize(model: nn.Module) -> nn.Module:
    """Fills every weight and statistic, so that no name can be swapped without being seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or name.endswith("inv_freq"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + noise.abs() / 4)
            elif tensor.ndim == 1:
                norm = name.endswith(("weight", "gamma", "lambda1"))
                tensor.copy_(noise / 10 + (1 if norm else 0))
            else:
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
                embedding = tensor.ndim == 3
                tensor.copy_(noise * (0.2 if embedding else (1.5 / fan_in) ** 0.5))
    return model.eval()


def save_torch(
    model: nn.Module, folder: pathlib.Path, name: str = "model.safetensors"
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / name)
    return folder / name


def huggingface_vit(folder: pathlib.Path, **config: Any):
    model = randomize(transformers.ViTForImageClassification(transformers.ViTConfig(**config)))
    model.save_pretrained(folder)
    return folder, lambda x: model(x).logits


def timm_vit(folder: pathlib.Path, name: str, **changes: Any):
    model = randomize(timm.create_model(name, **changes))
    return save_torch(model, folder), model


def timm_folder(folder: pathlib.Path, name: str, **changes: Any):
    """A folder as timm itself writes it for the hub, config.json and all."""
    model = randomize(timm.create_model(name, **changes))
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=changes)
    return folder, model


def augreg_vit(folder: pathlib.Path, name: str, **changes: Any):
    """Random arrays in the layout of Google's npz files, which timm reads."""
    model = timm.create_model(name, **changes)
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    rng = np.random.default_rng(0)
    patch, grid = model.patch_embed.patch_size[0], model.patch_embed.num_patches
    hidden, features = model.blocks[0].mlp.fc1.out_features, width // heads

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
        return (shift + scale * rng.standard_normal(shape)).astype(np.float32)

    arrays = {
        "cls": draw(1, 1, width, scale=0.2),
        "Transformer/posembed_input/pos_embedding": draw(1, 1 + grid, width, scale=0.2),
        "embedding/kernel": draw(patch, patch, 3, width, scale=0.1),
        "embedding/bias": draw(width, scale=0.1),
        "Transformer/encoder_norm/scale": draw(width, scale=0.1, shift=1),
        "Transformer/encoder_norm/bias": draw(width, scale=0.1),
        "head/kernel": draw(width, model.num_classes, scale=width**-0.5),
        "head/bias": draw(model.num_classes, scale=0.1),
    }
    for i in range(len(model.blocks)):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"] = draw(width, scale=0.1, shift=1)
            arrays[f"{block}/{norm}/bias"] = draw(width, scale=0.1)
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            arrays[f"{attention}/{name}/kernel"] = draw(width, heads, features, scale=width**-0.5)
            arrays[f"{attention}/{name}/bias"] = draw(heads, features, scale=0.1)
        arrays[f"{attention}/out/kernel"] = draw(heads, features, width, scale=width**-0.5)
        arrays[f"{attention}/out/bias"] = draw(width, scale=0.1)
        for j, (inputs, outputs) in enumerate(((width, hidden), (hidden, width))):
            dense = f"{block}/MlpBlock_3/Dense_{j}"
            arrays[f"{dense}/kernel"] = draw(inputs, outputs, scale=inputs**-0.5)
            arrays[f"{dense}/bias"] = draw(outputs, scale=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.npz"
    np.savez(path, **arrays)
    model.load_pretrained(str(path))
    return path, model.eval()


def huggingface(folder: pathlib.Path, kind: str, **config: Any):
    """A classifier of transformers by the first word of its class."""
    configuration = getattr(transformers, f"{kind}Config")(**config)
    model = getattr(transformers, f"{kind}ForImageClassification")(configuration)
    randomize(model).save_pretrained(folder)
    return folder, lambda x: model(x).logits


def dinov3(folder: pathlib.Path, **config: Any):
    """The tower, which has no classifier: its vector of each image."""
    configuration = transformers.DINOv3ViTConfig(num_register_tokens=2, **config)
    model = randomize(transformers.DINOv3ViTModel(configuration))
    model.save_pretrained(folder)
    return folder, lambda x: model(x).pooler_output


# The texts' half of a pair is there to be left out.
TEXTS = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 5,
    "max_position_embeddings": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def pair(folder: pathlib.Path, kind: str, classes: int, **vision: Any):
    """Both towers of a CLIP or SigLIP in one file, and a head on what the pair compares."""
    texts = TEXTS | ({} if kind == "CLIP" else {"projection_size": 8})
    more = {"projection_dim": 8} if kind == "CLIP" else {}
    configuration = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=texts, **more
    )
    model = getattr(transformers, f"{kind}Model")(configuration)
    model.classifier = nn.Linear(model.vision_model.config.hidden_size, classes)
    randomize(model).save_pretrained(folder)
    return folder, lambda x: model.classifier(model.vision_model(x).pooler_output)


def tower(folder: pathlib.Path, kind: str, classes: int, **vision: Any):
    """A classifier of transformers whose configuration has that of the tower inside."""
    return huggingface(folder, kind, vision_config=vision, text_config=TEXTS, num_labels=classes)


def torchvision_vit(folder: pathlib.Path, **sizes: Any):
    model = randomize(vision_transformer.VisionTransformer(**sizes))
    return save_torch(model, folder), model


class NarrowResNet(resnet.ResNet):
    """The ResNet of torchvision with its own layers and forward pass, at other widths."""

    def __init__(self, block: type, depths: tuple[int, ...], widths: tuple[int, ...], classes: int):
        nn.Module.__init__(self)
        self._norm_layer, self.groups, self.base_width, self.dilation = nn.BatchNorm2d, 1, 64, 1
        self.inplanes = widths[0]
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            setattr(self, f"layer{i + 1}", self._make_layer(block, width, depth, 2 if i else 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1] * block.expansion, classes)


def torchvision_resnet(folder: pathlib.Path, block: str, depths, widths, classes: int):
    kind = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[block]
    model = randomize(NarrowResNet(kind, depths, widths, classes))
    return save_torch(model, folder), model


def full(folder: pathlib.Path, constructor: Callable[[], nn.Module]):
    model = randomize(constructor())
    return save_torch(model, folder), model


def torchvision_vgg(folder: pathlib.Path, batch_norm: bool):
    """The VGG of torchvision with narrow layers; its own classifier is fixed at 4096."""
    features = vgg.make_layers([4, "M", 6, 6, "M", 8, "M"], batch_norm=batch_norm)
    model = vgg.VGG.__new__(vgg.VGG)
    nn.Module.__init__(model)
    model.features, model.avgpool = features, nn.AdaptiveAvgPool2d((2, 2))
    model.classifier = nn.Sequential(
        nn.Linear(8 * 2 * 2, 16),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(16, 16),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(16, 5),
    )
    randomize(model)
    return save_torch(model, folder), model


# Heads of width 64 are what timm's files leave to be assumed; the fixtures' are narrower and state
# the number of heads to the loader.
SMALL_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}

SMALL_TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
SMALL_DINO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    # Larger than one fixture's images and smaller than the other's, to be interpolated both ways.
    "image_size": 20,
    "patch_size": 4,
    "num_labels": 5,
}
SMALL_TIMM = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 5,
}

SMALL: dict[str, tuple[int, Callable[[pathlib.Path], Any]]] = {
    "huggingface_vit": (
        16,
        lambda f: huggingface_vit(
            f,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            image_size=16,
            patch_size=4,
            num_labels=5,
        ),
    ),
    "timm_vit": (16, lambda f: timm_vit(f, "vit_tiny_patch16_224", num_classes=5, **SMALL_VIT)),
    "timm_deit_distilled": (
        16,
        lambda f: timm_vit(f, "deit_tiny_distilled_patch16_224", num_classes=5, **SMALL_VIT),
    ),
    "timm_vit_mean": (
        16,
        lambda f: timm_vit(
            f,
            "vit_tiny_patch16_224",
            num_classes=5,
            global_pool="avg",
            class_token=True,
            **SMALL_VIT,
        ),
    ),
    "augreg_vit": (16, lambda f: augreg_vit(f, "vit_tiny_patch16_224", num_classes=5, **SMALL_VIT)),
    "dinov2": (16, lambda f: huggingface(f, "Dinov2", use_swiglu_ffn=True, **SMALL_DINO)),
    "dinov2_registers": (
        16,
        lambda f: huggingface(
            f, "Dinov2WithRegisters", num_register_tokens=2, **SMALL_DINO | {"image_size": 12}
        ),
    ),
    "dinov3": (16, lambda f: dinov3(f, use_gated_mlp=True, hidden_act="silu", **SMALL_TOWER)),
    "clip": (16, lambda f: tower(f, "CLIP", 5, **SMALL_TOWER)),
    "clip_pair": (16, lambda f: pair(f, "CLIP", 5, **SMALL_TOWER)),
    "siglip": (16, lambda f: tower(f, "Siglip", 5, **SMALL_TOWER)),
    "siglip_pair": (16, lambda f: pair(f, "Siglip", 5, **SMALL_TOWER)),
    "torchvision_vit": (
        16,
        lambda f: torchvision_vit(
            f,
            image_size=16,
            patch_size=4,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=24,
            num_classes=5,
        ),
    ),
    "timm_deit3": (16, lambda f: timm_folder(f, "deit3_small_patch16_224", **SMALL_TIMM)),
    "timm_dinov2": (
        16,
        lambda f: timm_folder(f, "vit_giant_patch14_reg4_dinov2", mlp_ratio=3, **SMALL_TIMM),
    ),
    "timm_clip": (
        16,
        lambda f: timm_folder(f, "vit_base_patch16_clip_quickgelu_224", **SMALL_TIMM),
    ),
    "timm_siglip": (16, lambda f: timm_folder(f, "vit_so400m_patch16_siglip_256", **SMALL_TIMM)),
    "timm_siglip_mean": (
        16,
        lambda f: timm_folder(f, "vit_base_patch16_siglip_gap_224", **SMALL_TIMM),
    ),
    "resnet_basic": (
        33,
        lambda f: torchvision_resnet(f, "basic", (1, 2, 1, 1), (4, 6, 8, 10), 5),
    ),
    "resnet_bottleneck": (
        40,
        lambda f: torchvision_resnet(f, "bottleneck", (2, 1, 1, 1), (4, 6, 8, 10), 5),
    ),
    "vgg": (24, lambda f: torchvision_vgg(f, False)),
    "vgg_bn": (40, lambda f: torchvision_vgg(f, True)),
}


def images(size: int, number: int = 3) -> np.ndarray:
    """Random normalized images, (batch, height, width, channels)."""
    return np.random.default_rng(1).standard_normal((number, size, size, 3)).astype(np.float32)


def logits(model: Callable[[torch.Tensor], Any], inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(inputs).permute(0, 3, 1, 2)).numpy()


def main() -> None:
    """Writes the fixtures that are named, or all."""
    for name, (size, make) in SMALL.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        folder = FIXTURES / name
        _, model = make(folder)
        inputs = images(size)
        np.savez(folder / "expected.npz", images=inputs, logits=logits(model, inputs))
        print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
