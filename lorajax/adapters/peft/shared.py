"""What writing and reading PEFT's files have in common: names of files, and what both refuse."""

from flax import nnx

from lorajax.adapters import paths
from lorajax.adapters.layouts import Axes
from lorajax.adapters.methods import PeftMethod
from lorajax.adapters.torch_layers import WRAPPED, TorchLayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_layer."
OFFSETS, BLOCKS = "lorajax.offsets", "lorajax.blocks"
LARGEST_CONFIG = 10 * 2**20


def check_layer(path: str, base: nnx.Module, method: PeftMethod, axes: Axes | None = None) -> None:
    """Raises ValueError for a layer that PEFT would adapt in another way, or not at all."""
    if why := method.refusal(base, axes):
        raise ValueError(
            f"PEFT cannot express the adapter of {path!r}: it {why}; merge it, or save the whole "
            "state with save_checkpoint."
        )


def check_output(path: str, torch: TorchLayer) -> None:
    """Raises ValueError for the output of a MultiheadAttention, whose adapter PEFT adds twice.

    Its `MultiheadAttention.merge` adds the update to the weight and has the layer merge it again
    (seen with 0.21), so that no file means one thing.
    """
    if torch.module.endswith(WRAPPED):
        raise ValueError(
            f"PEFT cannot express the adapter of {path!r}, the output of a MultiheadAttention, "
            "which it adds twice; leave such layers out of the targets, or merge the adapter."
        )


def check_whole(path: str, model: nnx.Module) -> None:
    """Raises ValueError for a module that PEFT would not save in full for all that uses it."""
    inside = [
        where
        for where, module in paths.modules(model).items()
        if isinstance(module, nnx.Embed) and f"{where}/".startswith(f"{path}/" if path else "")
    ]
    if inside and paths.attends(model):
        raise ValueError(
            f"the module {path!r} to save in full holds the Embed {inside[0]!r}, whose attend the "
            "model calls; PEFT's copy acts in the lookup alone, so give the output layer a table "
            "of its own, or adapt the Embed."
        )
