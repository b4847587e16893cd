"""Adapters in PEFT's own format: a folder with adapter_config.json and adapter_model.safetensors.

PEFT keeps `lora_A = Aᵀ` and `lora_B = Bᵀ` under the name of a torch module. What the format cannot
say is refused, never approximated: Tucker cores, factors with lanes or stacks, and convolutions
whose groups, dilation or padding PEFT's adapters do not follow. What it can say in other words is
said so: a start with an offset is written as LoRA of twice the rank, `[A A₀] [B; −B₀]`, which is
right on the unmodified base; the file's metadata tells `load_peft` how to take the two apart again.
"""

from lorajax.adapters.peft.reading import load_peft, read_peft
from lorajax.adapters.peft.shared import CONFIG, LARGEST_CONFIG, WEIGHTS, dotted, patterns
from lorajax.adapters.peft.writing import save_peft

__all__ = [
    "CONFIG",
    "LARGEST_CONFIG",
    "WEIGHTS",
    "dotted",
    "load_peft",
    "patterns",
    "read_peft",
    "save_peft",
]
