"""What `lorajax doctor` looks at: each thing with its state and, where it is not well, a remedy."""

import contextlib
import importlib.util
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from lorajax import environment

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
"""What brings JAX onto an NVIDIA card, by the extra of that name."""
DRIVER = Path("/proc/driver/nvidia/version")
# As many independent LAPACK calls as XLA has threads wait for each other forever.
FEWEST_THREADS = 4


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
      subject: its name.
      found: what was found, in words.
      state: "wrong" is what gives wrong numbers or none; a "note" is worth knowing.
      remedy: what to do about it; empty where there is nothing to do.
    """

    subject: str
    found: str
    state: Literal["ok", "note", "wrong"] = "ok"
    remedy: str = ""


def surroundings() -> list[Finding]:
    """Versions, flags, threads and folders, as they are in the caller's shell; imports no jax."""
    found = [Finding("python", platform.python_version()), *_packages()]
    return [*found, *_cards(), _flags(), _threads(), _cache(), _data()]


def _packages() -> Iterator[Finding]:
    try:
        needed = map(Requirement, metadata.requires("lorajax") or ())
    except metadata.PackageNotFoundError:
        yield Finding(
            "lorajax", "runs from a folder", "note", "pip install -e . checks what it needs."
        )
        return
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "missing", "wrong", f"pip install '{wanted}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, version)
        else:
            found = f"{version}, not {requirement.specifier}"
            yield Finding(requirement.name, found, "wrong", f"pip install '{wanted}'")


def _cards() -> Iterator[Finding]:
    """Of an NVIDIA card, its driver or a plugin for one; nothing where there is none of these."""
    installed = {}
    for name in PLUGINS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    jaxlib = metadata.version("jaxlib")
    for name, version in installed.items():
        extra = name.removeprefix("jax-").removesuffix("-plugin")
        if version == jaxlib:
            yield Finding(name, version)
        else:
            found, remedy = f"{version} beside jaxlib {jaxlib}", f"pip install 'jax[{extra}]'"
            yield Finding(name, found, "wrong", f"{remedy} brings both to one version.")
    if len(installed) > 1:
        names = " and ".join(installed)
        remedy = f"pip uninstall {PLUGINS[1]} {PLUGINS[1].replace('plugin', 'pjrt')}"
        yield Finding("cuda", f"{names} are both installed", "wrong", f"Keep one: {remedy}")
    if DRIVER.exists() and not installed:
        remedy = "pip install 'jax[cuda13]', or jax[cuda12] with a driver older than 580."
        yield Finding("cuda", "an NVIDIA driver is here, and JAX has no plugin", "note", remedy)


def _flags() -> Finding:
    flags = os.environ.get("XLA_FLAGS", "")
    shown = flags or "XLA_FLAGS is unset"
    version = metadata.version("jaxlib")
    if not environment.affected(version) or environment.guarded():
        return Finding("flags", shown)
    return Finding(
        "flags",
        f"{shown}; jaxlib {version} needs a guard on CPU",
        "note",
        f"XLA_FLAGS={environment.GUARD} for programs of your own; this command sets it itself.",
    )


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    named = os.environ.get("NPROC")
    if named is None:
        shown = f"{cores} cores; NPROC is unset, this command sets 16"
        if (cores or 1) >= FEWEST_THREADS:
            return Finding("threads", shown)
        return Finding("threads", shown, "note", "NPROC=16 for programs of your own.")
    shown = f"{cores} cores; NPROC={named}"
    if named.isdecimal() and int(named) >= FEWEST_THREADS:
        return Finding("threads", shown)
    return Finding("threads", shown, "wrong", "Unset NPROC or set it to 16: jitted SVDs can hang.")


def _cache() -> Finding:
    folder = environment.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "Name a folder that can be written in JAX_COMPILATION_CACHE_DIR."
        return Finding("compile cache", f"{folder}: {error.strerror}", "wrong", remedy)
    size = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
    return Finding("compile cache", f"{folder}, {size / 2**20:.0f} MiB")


def _data() -> Finding:
    named = os.environ.get("LORAJAX_DATA")
    if not named:
        remedy = "Set it to a folder of data sets; mnist-sample and cifar10-sample come along."
        return Finding("data", "LORAJAX_DATA is unset", "note", remedy)
    if Path(named).is_dir():
        return Finding("data", named)
    remedy = "Unset LORAJAX_DATA or set it to a folder that exists."
    return Finding("data", f"{named} is not a folder", "wrong", remedy)


def computations() -> list[Finding]:
    """Devices, precision and the canaries of `environment`, in this process as it is."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        remedy = "Unset JAX_PLATFORMS, or install what it names."
        return [Finding("devices", str(error).splitlines()[0], "wrong", remedy)]
    names = ", ".join(dict.fromkeys(f"{d.platform} ({d.device_kind})" for d in devices))
    wide = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    precision = Finding("precision", "float64")
    if not wide:
        remedy = 'jax.config.update("jax_enable_x64", True): the theory\'s tolerances need it.'
        precision = Finding("precision", "float32", "note", remedy)
    return [
        _devices(f"{len(devices)}: {names}", devices[0].platform),
        precision,
        *map(_canary, environment.CANARIES),
    ]


def _devices(shown: str, platform: str) -> Finding:
    plugged = any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin")))
    if platform != "cpu" or not plugged or os.environ.get("JAX_PLATFORMS"):
        return Finding("devices", shown)
    remedy = "JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' tells why."
    return Finding("devices", f"{shown}; JAX's plugin for NVIDIA found no card", "note", remedy)


def _canary(name: str) -> Finding:
    excess = environment.CANARIES[name]()
    if excess <= 1:
        return Finding(name, f"right: error {excess:.2g} of its roundoff bound")
    remedy = f"XLA_FLAGS={environment.GUARD}, or another jax (0.10.1 is right)."
    shown = "infinite" if math.isinf(excess) else f"{excess:.2g} times its roundoff bound"
    return Finding(name, f"WRONG NUMBERS: error {shown}", "wrong", remedy)
