"""What benchmarks, simulations and tests need to know about their peers before they import them."""

import importlib.util
import sys
from importlib import metadata

NAMES = ("torch", "torchdiffeq", "transformers", "peft", "timm", "torchvision")


def hide_broken_torchvision() -> bool:
    """Hides a torchvision that does not load beside the installed torch, as if it were missing.

    transformers and timm look for torchvision when they are imported, and PEFT looks into
    transformers: they do without it where it is missing, and fail where it is there and raises, as
    it does beside a torch of another build. Call it before any of them is imported; it imports
    torch and torchvision where both are installed.

    Returns:
      Whether one is hidden.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"] is None
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception:  # whatever its compiled part raises
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return True
    return False


def versions() -> dict[str, str | None]:
    """The installed version of each peer, None of one that is missing; imports none of them."""
    found: dict[str, str | None] = {}
    for name in NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
