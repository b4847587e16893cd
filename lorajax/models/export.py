"""Saving of models: in this package's own format, and in the public formats of each family."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lorajax.environment.judging import judged
from lorajax.models import catalog
from lorajax.models.checkpoints import path_of, some
from lorajax.models.family import Format, Model


def _layout(model: Model, layout: str) -> Format | None:
    """The format that a layout names, None for this package's own."""
    if layout == "lorajax":
        return None
    forms = {form.layout: form for form in catalog.family_of(model.config).formats}
    if layout not in forms:
        raise ValueError(
            f"layout is {layout!r}; for a {type(model).__name__} it must be one of "
            f"{', '.join(['lorajax', *forms])}."
        )
    forms[layout].express(model.config)
    return forms[layout]


@judged
def tensors(model: Any, layout: str = "lorajax") -> dict[str, np.ndarray]:
    """A model's weights under the names of a layout.

    Args:
      model: without adapters; merge them first.
      layout: "lorajax", or that of a format of the model's family: "huggingface" for a Bert or a
        Llama; this, "huggingface-dinov2", "huggingface-clip", "huggingface-siglip", "timm",
        "augreg" or "torchvision" for a ViT; "torchvision" for ResNet and VGG (CIFAR ResNets come
        out as akamaster's).

    Returns:
      NumPy arrays by name.

    Raises:
      ValueError: if the layout does not exist for this model or cannot express it.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    arrays = {
        path_of(parts): np.asarray(leaf.get_value()) for parts, leaf in nnx.to_flat_state(state)
    }
    if (form := _layout(model, layout)) is None:
        return arrays
    rules = list(form.rules(model.config))
    if left := arrays.keys() - {name for rule in rules for name in rule.ours}:
        raise ValueError(
            f"model has {some(left)}, which the layout {layout!r} has no place for; merge or "
            "remove adapters first."
        )
    return {
        form.spell(model.config, name): np.ascontiguousarray(value)
        for rule in rules
        if rule.ours
        for name, value in zip(
            rule.theirs, rule.write(*(arrays[p] for p in rule.ours)), strict=True
        )
    }


@judged
def save(
    model: Any,
    path: str | os.PathLike,
    *,
    layout: str = "lorajax",
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Writes a model to one file, in this package's format or in a public one.

    Args:
      model: without adapters; merge them first.
      path: a .safetensors file, or .npz for the augreg layout.
      layout: as in `tensors`. For "huggingface" and "timm" the JSON files of these libraries are
        written beside the file.
      notes: strings to keep in the file's metadata, for example a recipe.

    Returns:
      The path.

    Raises:
      ValueError: for a layout that does not fit the model or the file's suffix.
    """
    path = Path(path)
    form = _layout(model, layout)
    suffix = ".safetensors" if form is None else form.suffix
    if path.suffix != suffix:
        raise ValueError(
            f"path is {str(path)!r}; for the layout {layout!r} it must end in {suffix}."
        )
    found = tensors(model, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".npz":
        np.savez(path, allow_pickle=False, **found)
        return path
    metadata = dict(notes or {}) | {"format": "pt"}
    if form is None:
        config = json.dumps(dataclasses.asdict(model.config))
        family = catalog.family_of(model.config).name
        metadata |= {"format": "lorajax", "family": family, "config": config}
    save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, path, metadata)
    for name, content in ({} if form is None else form.beside(model.config)).items():
        text = json.dumps(content, indent=2, sort_keys=True)
        (path.parent / name).write_text(text + "\n", encoding="utf-8")
    return path
