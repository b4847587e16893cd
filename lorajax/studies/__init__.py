"""Studies: the sweeps that papers make, one file each, with their figures.

`find("init-scale")` is a `Study`: parameters with their defaults, a sweep (`prepare`, `sweep`), a
figure and, for some, statements in numbers. `names()` lists them; nothing here imports jax before a
study runs.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorajax.studies.base import Parameter, Run, Study

MARK = "\nSTUDY = "
"""A module with this line is a study."""


@functools.cache
def _found() -> Mapping[str, Study]:
    studies = {}
    for info in pkgutil.iter_modules(__path__):
        text = (Path(__path__[0]) / f"{info.name}.py").read_text(encoding="utf-8")
        if MARK in text:
            study = importlib.import_module(f"{__name__}.{info.name}").STUDY
            studies[study.name] = study
    return studies


def names() -> tuple[str, ...]:
    """Names of all studies."""
    return tuple(_found())


def find(name: str) -> Study:
    """The study of a name.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in _found():
        raise ValueError(f"study is {name!r}; it must be one of {', '.join(names())}.")
    return _found()[name]


def draw(found: Any, path: str | Path) -> Path:
    """Draws the figure of a study's sweep.

    Args:
      found: what the sweep returned or `sweeps.open_sweep` opened, complete or not.
      path: of the figure; its ending names the format.

    Returns:
      The path.

    Raises:
      ValueError: for a sweep of no study; draw it with `plots.sweeps.curves` and `heat`.
    """
    from lorajax import plots
    from lorajax.sweeps.store import ATTRIBUTE

    name = found.attrs.get(ATTRIBUTE, {}).get("settings", {}).get("study")
    if name not in _found():
        raise ValueError(
            f"the sweep is of the study {name!r}; the figures are those of {', '.join(names())}."
        )
    with plots.style():
        return plots.save(find(name).figure(found), path)


__all__ = ["Parameter", "Run", "Study", "draw", "find", "names"]
