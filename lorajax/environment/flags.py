"""What programs ask of XLA by `XLA_FLAGS`: cheap compiling, or loops as wide as the processor has.

XLA reads its flags once, before the first computation, and ends the process on one that it does not
know.
"""

import functools
import importlib.util
import mmap
import os
import re
from importlib import metadata
from pathlib import Path

WIDTH = "xla_cpu_prefer_vector_width"
WIDE = f"--{WIDTH}=512"
TRIED = (0, 12, 0, 1)
"""The newest jaxlib whose flags were tried here."""


def numbers(version: str) -> tuple[int, ...]:
    """Of a release, without what follows them."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def known(flag: str) -> bool:
    """Whether the installed jaxlib's library has the name of a flag in it."""
    spec = importlib.util.find_spec("jaxlib")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    for library in folder.glob("libjax_common.*"):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            if m.find(flag.encode()) >= 0:
                return True
    return False


def add_flags(*more: str) -> str:
    """Adds flags to `XLA_FLAGS` that it does not name; the name of a file of flags stays.

    Args:
      *more: flags, such as "--xla_a=1". Call it before the first computation, as for `guard`.

    Returns:
      `XLA_FLAGS` as it is now.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if flags.strip() and not flags.lstrip().startswith("-"):
        return flags
    missing = [flag for flag in more if flag.partition("=")[0] not in flags]
    if missing:
        flags = os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    return flags


def compile_fast() -> str:
    """Adds flags to `XLA_FLAGS` that make compiling cheap, for programs that run for seconds.

    LLVM then optimizes little, and XLA does without its fusion emitters on CPU where it still can
    (before jaxlib 0.11, of which later ones do not know the flag). Numbers differ by rounding. Call
    it before the first computation; what is set already stays, as for `guard`.

    Returns:
      `XLA_FLAGS` as it is now.
    """
    given = ["--xla_backend_optimization_level=1"]
    if numbers(metadata.version("jaxlib")) < (0, 11):
        given.append("--xla_cpu_use_fusion_emitters=false")
    return add_flags(*given)


@functools.cache
def _processor() -> frozenset[str]:
    """What the processor can do, in the words of the system; nothing where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def wide() -> str:
    """Adds a flag to `XLA_FLAGS` that lets loops use all 512 bits of a processor that has them.

    XLA prefers 256, for the sake of processors that slow down under wider instructions; those that
    came with `avx512_bf16` do not. Products of matrices are as they were. Flows in closed form take
    about three quarters of the time, LoRA steps a few percent less (docs/benchmarks.md). Numbers
    differ by rounding. Call it before the first computation; what is set already stays, as for
    `guard`.

    Returns:
      `XLA_FLAGS` as it is now.
    """
    asked = "avx512_bf16" in _processor()
    tried = numbers(metadata.version("jaxlib")) <= TRIED
    return add_flags(*[WIDE] * (asked and (tried or known(WIDTH))))
