"""Executes a notebook that is written as text: `python notebooks/_execute.py NOTEBOOK.py FOLDER`.

The folder gets the same notebook as `.ipynb`, with the outputs of all its cells.
"""

import pathlib
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient

TIMEOUT = 600  # seconds of a cell


def execute(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Runs all cells in a new kernel; the first one that raises ends it with its traceback."""
    notebook = jupytext.read(source)
    # A kernel warns that it can be overheard, which on one machine is nothing to tell of each time.
    quiet = ["--IPKernelApp.log_level=ERROR"]
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", extra_arguments=quiet
    ).execute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source.stem}.ipynb"
    nbformat.write(notebook, path)
    return path


if __name__ == "__main__":
    begin = time.perf_counter()
    where = execute(*map(pathlib.Path, sys.argv[1:]))
    print(f"{where} after {time.perf_counter() - begin:.0f} s")
