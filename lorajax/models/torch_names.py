"""What the torch models that public checkpoints are of call their modules, for adapters of them.

A checkpoint's names are not always those of the live model: transformers renames on the way in, and
Google's npz files become timm's models.
"""

import re
from typing import Any

from lorajax.models.formats import FORMATS
from lorajax.models.layouts import Rule, timm_vit

_TRANSFORMERS_5 = (
    (r"^vit\.encoder\.layer\.", "vit.layers."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""From the names in files, which are those of the modules before version 5, to the modules'."""


def torch_rules(config: Any, layout: str) -> tuple[Rule, ...] | None:
    """Names and order of the tensors of the torch model that a checkpoint is loaded into.

    Args:
      config: of the model here.
      layout: of the checkpoint, as `layout_of` tells it; "huggingface-4" for modules as
        transformers called them before version 5.

    Returns:
      Rules to give to `adapters.save_peft` and `adapters.load_peft`; None for this package's own
      files, of which there is no torch model.

    Raises:
      ValueError: if the layout does not exist for this configuration.

    Example:
      >>> from lorajax import models
      >>> config = models.config("vit-ti/16", depth=1)
      >>> models.torch_rules(config, "huggingface")[4].theirs
      ('vit.layers.0.attention.q_proj.weight',)
    """
    if layout == "lorajax":
        return None
    if layout == "augreg":
        return tuple(timm_vit(config))
    wanted = layout.removesuffix("-4")
    for form in FORMATS:
        if form.layout == wanted and isinstance(config, form.config):
            rules = tuple(form.rules(config))
            return tuple(map(_renamed, rules)) if layout == "huggingface" else rules
    known = [form.layout for form in FORMATS if isinstance(config, form.config)]
    raise ValueError(
        f"layout is {layout!r}; for a {type(config).__name__} it must be one of "
        f"{', '.join(['lorajax', *known])}."
    )


def _renamed(rule: Rule) -> Rule:
    names = []
    for name in rule.theirs:
        for old, new in _TRANSFORMERS_5:
            name = re.sub(old, new, name)
        names.append(name)
    return rule._replace(theirs=tuple(names))
