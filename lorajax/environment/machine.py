"""What a run stands on: versions, devices, the folder of what has been compiled."""

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "diffrax", "equinox", "flax", "optax", "numpy")


def versions() -> dict[str, Any]:
    """Versions and the machine's kind: what one needs to reproduce a number."""
    import jax

    from lorajax import __version__

    return {
        "lorajax": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
    }


def code() -> str:
    """A digest of this package's Python files: results of the same one were made by the same code.

    A version does not tell: in a checkout the code changes and the version does not.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def cache_folder() -> Path:
    """Where the command keeps what it has compiled: `JAX_COMPILATION_CACHE_DIR`, or the user's.

    The user's is kept apart by jaxlib and by the processor's features, because compiled code of
    another processor may not run.
    """
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(named)
    kind = f"{metadata.version('jaxlib')} {_processor()}".encode()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "lorajax" / f"compiled-{hashlib.sha256(kind).hexdigest()[:12]}"
