"""From ranks and starts that were chosen here to training in torch: folders that PEFT reads."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from lorajax import adapters, data, models
from lorajax.adapters.peft.shared import check_output
from lorajax.adapters.selection import shapes
from lorajax.adapters.starts import name_of, resolve
from lorajax.adapters.surgery import Targets
from lorajax.adapters.torch_layers import Names, base_layers
from lorajax.finetune.setup import adapt, moments_of
from lorajax.tasks import Task

_TASKS = {"texts": "SEQ_CLS", "tokens": "CAUSAL_LM"}
"""PEFT's names of tasks by what a model takes; others have none."""


class Bridge(NamedTuple):
    """What the torch model of a checkpoint is called by.

    Attributes:
      rules: names and order of its tensors, for `adapters.save_peft`.
      heads: of the model's heads those that the torch model has as well.
      task_type: PEFT's name of the task, or None.
      base_model: what the base is called.
    """

    rules: tuple[Any, ...]
    heads: tuple[str, ...]
    task_type: str | None
    base_model: str


def bridge(model: Any, source: str | os.PathLike, also: Sequence[str] = ()) -> Bridge:
    """How a model that was read from a public checkpoint is called in torch.

    Args:
      model: of `models.load`, adapted or not, for example with another number of classes.
      source: what it was loaded from.
      also: paths of what trains in full beside the heads.

    Returns:
      The Bridge. A head that no torch model has, such as one on the mean of an encoder's tokens, is
      not in it; names are then those of the encoder alone.

    Raises:
      ValueError: for a file of this package's own, of which there is no torch model.
    """
    layout = models.layout_of(source)
    rules = models.torch_rules(model.config, layout)
    if rules is None:
        raise ValueError(
            f"model is {os.fspath(source)!r}, a file of this package's own, which no torch model "
            "loads; give one of Hugging Face, timm, augreg or torchvision."
        )
    names = Names(model, rules=rules)

    def told(path: str) -> bool:
        try:
            names.whole(path)
        except ValueError:
            return False
        return True

    heads = tuple(path for path in (*model.heads, *also) if told(path))
    task_type = _TASKS.get(getattr(model, "takes", ""))
    if task_type == "SEQ_CLS" and not set(model.heads) <= set(heads):
        task_type = "FEATURE_EXTRACTION"
    return Bridge(rules, heads, task_type, os.fspath(source))


def check_bridge(
    model: Any, targets: Targets, start: str | Callable[..., Any] | None, made: Bridge
) -> None:
    """Raises ValueError, before any long work, for what PEFT could not train on from.

    Args:
      model: not adapted yet.
      targets: layers that may be adapted.
      start: an initializer or its name; None for PEFT's own.
      made: of `bridge`.

    Raises:
      ValueError: for a layer that the torch model has not, or a start with an offset that PEFT does
        not take off.
    """
    names, bases = Names(model, rules=made.rules), base_layers(model)
    layers = {path: names.layer(path, bases[path]) for path in shapes(model, targets)}
    for path, torch in layers.items():
        check_output(path, torch)
    if start is None:
        return
    layer = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
    eye = jax.numpy.eye(8, dtype="float32")
    given: dict[str, Any] = {"gradients": {"": eye}, "inputs": {"": eye}}
    one = adapters.adapt(layer, key=jax.random.key(0), rank=2, start=start, **given)
    if one.adapters["default"].offset is None:
        return
    if (name := name_of(start)) != "pissa":
        raise ValueError(
            f"start is {name!r}, which takes an offset off the base that PEFT does not take off "
            "when it trains on; use pissa, or a start without an offset, such as lora or "
            "orthogonal."
        )
    for path, torch in layers.items():
        if (
            torch.parts > 1
            or torch.attention
            or isinstance(bases[path], (nnx.Embed, nnx.Conv))
            or torch.shape[2:]
        ):
            raise ValueError(
                f"start is 'pissa', and {path!r} is no Linear layer of its own in torch, where "
                f"PEFT has no such start for {torch.module}; leave it out of the targets, or use a "
                "start without an offset."
            )


def write_start(
    model: Any,
    selection: adapters.Selection,
    folder: str | os.PathLike,
    made: Bridge,
    *,
    task: Task,
    train: data.Table,
    start: str | Callable[..., Any] | None = None,
    alpha: float | int | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Writes what PEFT trains on from: chosen ranks, and where asked for the start itself.

    Args:
      model: of which ranks were chosen, its head fitted. It is not changed.
      selection: of `select_ranks`.
      folder: to write to; see `adapters.save_peft_start`.
      made: of `bridge`.
      task: what a batch means, for starts that read moments of the inputs.
      train: likewise.
      start: an initializer or its name, whose factors are written with the head; None writes the
        configuration alone, for PEFT's own start.
      alpha: numerator of the scaling alpha/rank; a scaling of 1 if None.
      seed: of the start and of the draw of samples.
      **options: of `moments_of`: `samples`, `batch_size`.

    Returns:
      The adapted model.

    Raises:
      ValueError: if every rank is 0, and as `adapt` and `adapters.save_peft_start`.
    """
    if not selection.ranks:
        raise ValueError(
            "every rank is 0, since the gradient has no direction above the noise in any layer, so "
            "that there is nothing for PEFT to adapt; give more samples, or another rule."
        )
    given: dict[str, Any] = {"start": start or "lora", "alpha": alpha}
    if "inputs" in inspect.signature(resolve(given["start"])).parameters:
        given["inputs"] = moments_of(
            model, task, train, targets=list(selection.ranks), seed=seed, **options
        )
    key = jax.random.key(seed)
    adapted = adapt(model, selection.ranks, key=key, gradients=selection.gradients, **given)
    adapters.save_peft_start(
        adapted,
        folder,
        rules=made.rules,
        heads=made.heads,
        base_model=made.base_model,
        task_type=made.task_type,
        weights=start is not None,
    )
    return adapted


def _resized(tuned: Any, source: str | os.PathLike, heads: Sequence[str]) -> str | None:
    """What trained in full beside the heads and has other shapes than in the base, if anything."""
    given = {name: getattr(tuned.config, name, None) for name in ("classes", "pool")}
    try:
        base = models.abstract(source, **{k: v for k, v in given.items() if v is not None})
    except ValueError:  # a file that has to be told more; PEFT says then what does not fit
        return None
    shapes = [
        {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(x, nnx.Param))}
        for x in (base, tuned)
    ]
    for path in sorted(shapes[0].keys() & shapes[1].keys(), key=str):
        name = "/".join(map(str, path))
        inside = next((h for h in heads if name.startswith(f"{h}/") and h not in tuned.heads), None)
        if inside and shapes[0][path] != shapes[1][path]:
            return inside
    return None


def save_adapter(
    tuned: Any, folder: str | os.PathLike, source: str | os.PathLike, heads: Sequence[str]
) -> str | None:
    """Writes a trained adapter in PEFT's format, by torch's names where it has the model.

    Args:
      tuned: an adapted model.
      folder: to write to.
      source: what the base was loaded from.
      heads: paths of what trained in full.

    Returns:
      None, or why the names in it are those of this package.
    """
    try:
        made = bridge(tuned, source)
    except ValueError:
        adapters.save_peft(tuned, folder, heads=heads)
        return None
    if other := _resized(tuned, source, heads):
        adapters.save_peft(tuned, folder, heads=heads)
        return f"{other!r} trained at another size than the base has it; leave it frozen."
    try:
        adapters.save_peft(
            tuned,
            folder,
            heads=heads,
            rules=made.rules,
            base_model=made.base_model,
            task_type=made.task_type,
        )
    except ValueError as why:
        adapters.save_peft(tuned, folder, heads=heads)
        return str(why)
    return None
