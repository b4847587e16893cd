"""What benchmarks, simulations and tests need to know about their peers before they import them."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

NAMES = ("torch", "torchdiffeq", "transformers", "peft", "timm", "torchvision")


def load_torchvision() -> str:
    """Imports torchvision where it stands in the way of others, or hides it.

    Beside a torch of another build its compiled operators are missing, and it raises when it is
    imported. transformers and timm import it where it is installed and do not where it is not, and
    PEFT imports them, so that none of the three loads. Its models and transforms are plain Python:
    it is imported without what it tells torch about operators that are not there; where that does
    not help it is hidden, as if it were not installed. Call it before any of the others is
    imported.

    Returns:
      "whole", "without operators", "hidden" or "missing".
    """
    if "torchvision" in sys.modules:
        return "hidden" if sys.modules["torchvision"] is None else "whole"
    if importlib.util.find_spec("torchvision") is None:
        return "missing"
    for state, importing in (("whole", _imported), ("without operators", _without_operators)):
        try:
            importing()
            return state
        except Exception:  # whatever a compiled part raises
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    return "hidden"


def _imported() -> None:
    importlib.import_module("torchvision")


def _without_operators() -> None:
    library: Any = importlib.import_module("torch.library")
    register = library.register_fake

    def lenient(operator: str, *arguments: Any, **options: Any) -> Any:
        decorate = register(operator, *arguments, **options)

        def one(function: Callable[..., Any]) -> Any:
            try:
                return decorate(function)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
                return function

        return one

    library.register_fake = lenient
    try:
        _imported()
    finally:
        library.register_fake = register


def lora(model: Any, rank: int) -> tuple[Any, list[Any], Any]:
    """A model of transformers with PEFT's LoRA of queries and values, ready to train.

    Args:
      model: a ViT, BERT or Llama.
      rank: of the adapters, and their alpha.

    Returns:
      The model, its parameters that train, and AdamW over them.
    """
    peft, torch = map(importlib.import_module, ("peft", "torch"))
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]
    options = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model = peft.get_peft_model(model, options)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, trainable, torch.optim.AdamW(trainable, lr=1e-3)


def versions() -> dict[str, str | None]:
    """The installed version of each peer, None of one that is missing; imports none of them."""
    found: dict[str, str | None] = {}
    for name in NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
