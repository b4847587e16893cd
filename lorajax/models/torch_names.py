"""What the torch models that public checkpoints are of call their modules, for adapters of them."""

from typing import Any

from lorajax.environment.judging import judged
from lorajax.models import catalog
from lorajax.models.family import Rule


@judged
def torch_rules(config: Any, layout: str) -> tuple[Rule, ...] | None:
    """Names and order of the tensors of the torch model that a checkpoint is loaded into.

    Args:
      config: of the model here.
      layout: of the checkpoint, as `layout_of` tells it; with "-4" behind a "huggingface…" for
        modules as transformers called them before version 5, which are the names in its files.

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
    forms = {form.layout: form for form in catalog.family_of(config).formats}
    form = forms.get(layout.removesuffix("-4"))
    if form is None:
        raise ValueError(
            f"layout is {layout!r}; for a {type(config).__name__} it must be one of "
            f"{', '.join(['lorajax', *forms])}."
        )
    if form.modules is not None and not layout.endswith("-4"):
        return tuple(form.modules(config))
    return tuple(
        rule._replace(theirs=tuple(form.spell(config, name) for name in rule.theirs))
        for rule in form.rules(config)
    )
