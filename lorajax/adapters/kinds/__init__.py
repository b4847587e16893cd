"""Kinds of adapters, one file each: what it is (an `Adapter`) and how it is asked for (a `Spec`).

A file that is put into this folder is found by `adapt` from its `Spec.name`.
"""

import importlib
import pkgutil

from lorajax.adapters.kinds.adalora import AdaLoRA, AdaLoRASpec
from lorajax.adapters.kinds.base import Kind, Spec, axes_of, kinds, target_spec
from lorajax.adapters.kinds.ia3 import IA3, IA3Spec
from lorajax.adapters.kinds.lora import LoRA, LoRASpec, LowRankSpec
from lorajax.adapters.kinds.propulsion import Propulsion, PropulsionSpec
from lorajax.adapters.kinds.tucker import Tucker, TuckerSpec

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "AdaLoRA",
    "AdaLoRASpec",
    "IA3",
    "IA3Spec",
    "Kind",
    "LoRA",
    "LoRASpec",
    "LowRankSpec",
    "Propulsion",
    "PropulsionSpec",
    "Spec",
    "Tucker",
    "TuckerSpec",
    "axes_of",
    "kinds",
    "target_spec",
]
