"""What the files of `sims/` share: a command line, a figure, and numbers beside it."""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorajax import environment, plots
from lorajax.studies.base import Study


def command(
    doc: str,
    profiles: Mapping[str, Any],
    run: Callable[[Any, int], tuple[Any, Mapping[str, Any]]],
    out: str,
) -> None:
    """Runs a simulation from the command line: `--profile`, `--seed`, `--out` and `--formats`.

    Args:
      doc: the file's docstring; its first line is the help, all of it the figure's caption.
      profiles: parameters by name, "quick" and "full".
      run: of a profile and a seed; returns a matplotlib figure and named numbers. Those in a
        mapping of their own are a table for the file alone, the others are printed too.
      out: where the figure and the numbers go, a path without ending.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--profile", choices=list(profiles), default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder")
    parser.add_argument("--formats", nargs="+", choices=plots.VECTOR, default=[], help="too")
    args = parser.parse_args()
    if args.profile == "quick":  # which compiles for longer than it computes
        environment.compile_fast()
    profile = profiles[args.profile]
    figure, numbers = run(profile, args.seed)
    path = args.out / f"{out}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(figure, path, *(f".{ending}" for ending in args.formats))
    record = {"profile": args.profile, "parameters": str(profile), "seed": args.seed}
    text = json.dumps(
        {**record, "numbers": _plain(numbers), "caption": doc}, indent=1, ensure_ascii=False
    )
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    for name, value in numbers.items():
        if not isinstance(value, Mapping):
            print(f"{name}: {np.array2string(np.asarray(value), precision=3)}")
    print(f"written: {path} and {path.with_suffix('.json').name}")


class Journal:
    """Finished runs in a file of JSON lines, one a run, so that a program that is killed goes on.

    A line that was cut off when it was killed is passed over.

    Args:
      path: of the file, which need not be there.
      kind: a frozen dataclass of plain values, that has whatever determines a run's result.

    Attributes:
      found: the records by run; each has its run's values under "run".
    """

    def __init__(self, path: Path, kind: type[Any]):
        self.path = path
        self.found: dict[Any, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.found[kind(**record["run"])] = record

    def __call__(self, run: Any, make: Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
        """The record of a run, made unless it is there."""
        if run not in self.found:
            record = {"run": dataclasses.asdict(run), **make(run)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * cut_off + json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.found[run] = record
        return self.found[run]


def fingerprint(*paths: Path) -> str:
    """What files hold, in 16 digits: results of one model and one data set are not another's.

    Args:
      *paths: of files, and of folders, which stand for all files in them.

    Returns:
      The first 64 bits of the SHA-256 of all names and contents, as hexadecimal digits.

    Raises:
      OSError: for what is not there.
    """
    found = hashlib.sha256()
    for path in paths:
        inside = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
        for file in inside:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            found.update(f"{file.name} {content}\n".encode())
    return found.hexdigest()[:16]


def real_texts(*needs: str) -> Path | None:
    """The folder of real models and texts that LORAJAX_DATA names, for a figure that needs one.

    Args:
      *needs: packages of the extra `text` that the figure imports.

    Returns:
      The folder; None, after a sentence that says why nothing is run, without it or a package.
    """
    folder = os.environ.get("LORAJAX_DATA")
    if not folder:
        print("Nothing is run: LORAJAX_DATA, the folder with models and texts, is not set.")
        return None
    if any(importlib.util.find_spec(name) is None for name in needs):
        print("Nothing is run: texts need the extra `text`; pip install 'lorajax[text]'.")
        return None
    return Path(folder)


def first_model(folder: Path, names: Sequence[str]) -> Path:
    """The first of some models that a folder has.

    Args:
      folder: of models, each a folder of its own.
      names: of models, the preferred one first.

    Returns:
      The model's folder.

    Raises:
      ValueError: where the folder has none of them.
    """
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(f"LORAJAX_DATA is {folder}, which has no folder {' or '.join(names)}.")


def _plain(value: Any) -> Any:
    """Numbers, arrays and mappings of them as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return np.asarray(value).tolist()


def swept(study: Study) -> Callable[[Mapping[str, Any], int], tuple[Any, Mapping[str, Any]]]:
    """The `run` of a figure that is a study's sweep.

    Args:
      study: with statements.

    Returns:
      A function of a profile (parameters by name) and a seed, for `command`.
    """

    def run(profile: Mapping[str, Any], seed: int) -> tuple[Any, Mapping[str, Any]]:
        found = study.sweep(key=jax.random.key(seed), **profile)
        numbers = {} if study.statements is None else study.statements(found)
        with plots.style():
            return study.figure(found), numbers

    return run
