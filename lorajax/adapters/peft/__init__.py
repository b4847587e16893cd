"""Adapters in PEFT's own format: a folder with adapter_config.json and adapter_model.safetensors.

PEFT keeps `lora_A = Aᵀ` and `lora_B = Bᵀ` under the name of a torch module. What the format cannot
say is refused, never approximated: Tucker cores, factors with slices or stacks, convolutions whose
groups, dilation or padding PEFT's adapters do not follow, and embeddings that make logits as well.
What it can say in other words is said so, and the file's metadata tells `load_peft` how to take it
apart again: a start with an offset is LoRA of twice the rank, `[A A₀] [B; −B₀]`, which is right on
the unmodified base; query, key and value in one torch module are one LoRA with all their ranks.

How a kind is held is declared by the kind: see `adapters.PeftMethod`.
"""

from lorajax.adapters.methods import patterns
from lorajax.adapters.peft.reading import load_peft, read_peft
from lorajax.adapters.peft.shared import CONFIG, LARGEST_CONFIG, WEIGHTS
from lorajax.adapters.peft.writing import save_peft, save_peft_start
from lorajax.adapters.torch_layers import dotted

__all__ = [
    "CONFIG",
    "LARGEST_CONFIG",
    "WEIGHTS",
    "dotted",
    "load_peft",
    "patterns",
    "read_peft",
    "save_peft",
    "save_peft_start",
]
