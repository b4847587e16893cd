"""The card: what it is, what its maker promises, what a product reaches, and operations of a step.

Peak rates are dense ones, without the twofold that sparse weights could give.
"""

import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.card.runs import Report

DTYPES = ("bfloat16", "tfloat32", "float32", "float64")
_AMPERE = "NVIDIA A100 Tensor Core GPU datasheet"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture (whitepaper), SXM5"
_PCIE = "NVIDIA H100 Tensor Core GPU Architecture (whitepaper), PCIe"
_ADA = "NVIDIA L40S datasheet"
_L4 = "NVIDIA L4 Tensor Core GPU datasheet"

_A100 = {"bfloat16": 312e12, "tfloat32": 156e12, "float32": 19.5e12, "float64": 19.5e12}
_SXM = {"bfloat16": 989.4e12, "tfloat32": 494.7e12, "float32": 66.9e12, "float64": 66.9e12}
_H100_PCIE = {"bfloat16": 756e12, "tfloat32": 378e12, "float32": 51.2e12, "float64": 51.2e12}
PEAKS: dict[str, tuple[dict[str, float], str]] = {
    "NVIDIA A100-SXM4-40GB": (_A100, _AMPERE),
    "NVIDIA A100-SXM4-80GB": (_A100, _AMPERE),
    "NVIDIA A100-PCIE-40GB": (_A100, _AMPERE),
    "NVIDIA A100 80GB PCIe": (_A100, _AMPERE),
    "NVIDIA H100 80GB HBM3": (_SXM, _HOPPER),
    "NVIDIA H100 PCIe": (_H100_PCIE, _PCIE),
    # The same chip as the H100 of this form, with more and faster memory.
    "NVIDIA H200": (_SXM, _HOPPER + "; NVIDIA H200 datasheet"),
    "NVIDIA L4": ({"bfloat16": 121e12, "tfloat32": 60e12, "float32": 30.3e12}, _L4),
    "NVIDIA L40S": ({"bfloat16": 362e12, "tfloat32": 183e12, "float32": 91.6e12}, _ADA),
}
"""Operations a second in dense matrix products, by the name that the driver gives a card, and where
that is stated. Float64 is that of the tensor cores. A name that is not here has no peak."""


def peak(name: str, dtype: str) -> float | None:
    """The stated rate of a card, or None where nothing is known of it."""
    return PEAKS[name][0].get(dtype) if name in PEAKS else None


def device() -> Any:
    """The device that JAX computes on."""
    import jax

    return jax.devices()[0]


def seconds_of(
    run: Callable[[], Any], wait: Callable[[Any], Any], repeats: int, spend: float = 1.0
) -> list[float]:
    """Seconds of repeated runs after one that compiles, each waited for.

    Args:
      run: what is timed.
      wait: waits for its result.
      repeats: how many at most.
      spend: seconds after which no further one begins.
    """
    wait(run())
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < spend):
        begin = time.perf_counter()
        wait(run())
        seconds.append(time.perf_counter() - begin)
    return seconds


def product_rate(dtype: str, size: int) -> float:
    """Operations a second of one large product by JAX, the best of several, on drawn numbers.

    Zeros would cost a card less power and so be faster than any real product.
    """
    import jax
    import jax.numpy as jnp

    kind, precision = (
        (jnp.float32, "tensorfloat32" if dtype == "tfloat32" else "highest")
        if dtype.endswith("float32")
        else (jnp.dtype(dtype), None)
    )
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(kind)
    # On a CPU there is no narrower float32.
    precision = "highest" if device().platform == "cpu" and precision else precision
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    best = min(seconds_of(lambda: product(a), jax.block_until_ready, 10))
    return 2.0 * size**3 / best


def card(report: Report, tiny: bool) -> None:
    """What the card is, versions, and rates of products."""
    import jax
    import jax.numpy as jnp

    from lorajax import environment

    jax.config.update("jax_enable_x64", True)
    found = device()
    stats = found.memory_stats() or {}
    report.add(
        platform=found.platform,
        name=found.device_kind,
        devices=len(jax.devices()),
        bytes=stats.get("bytes_limit"),
        driver=_driver(),
        cores=os.cpu_count(),
        versions=environment.versions() | peers.versions(),
        peaks={d: peak(found.device_kind, d) for d in DTYPES},
        peaks_from=PEAKS[found.device_kind][1] if found.device_kind in PEAKS else None,
    )
    if found.platform == "cpu" and not tiny:
        return
    size = 256 if tiny else 8192
    rates = {}
    for dtype in DTYPES:
        # Cards for graphics compute float64 at a sixty-fourth of their float32.
        rates[dtype] = product_rate(dtype, size // 2 if dtype == "float64" else size)
        report.add(products=dict(rates))
    numbers = jnp.ones(2**16 if tiny else 2**30, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    best = min(seconds_of(lambda: copy(numbers), jax.block_until_ready, 10))
    report.add(bandwidth=2 * numbers.nbytes / best)


def _driver() -> str | None:
    """What the driver says of itself and of the first card."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return (said.strip().splitlines() or [None])[0]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the operations of a transformer's LoRA step depend on.

    Attributes:
      width: features of a token.
      depth: blocks.
      inner: features of all heads together.
      shared: features of the keys, and of the values.
      hidden: features within the MLP.
      layers: linear layers of the MLP.
      tokens: of a sample.
      batch: samples.
      rank: of the adapters on query and value.
      head: outputs of the layer at the end.
      answers: tokens of a sample that this layer is applied to.
      dense: entries of a layer before that one, on as many tokens; 0 for none.
      patches: tokens that a linear layer makes; none where a table does.
      patch: inputs of that layer.
      causal: whether a token sees only those before it.
    """

    width: int
    depth: int
    inner: int
    shared: int
    hidden: int
    layers: int
    tokens: int
    batch: int
    rank: int
    head: int
    answers: int
    dense: int = 0
    patches: int = 0
    patch: int = 0
    causal: bool = False


def step_flops(shape: Shape, last: int | None = None) -> float:
    """Operations of the matrix products of one LoRA step: a product and an addition count as two.

    A frozen layer's weights cost 2 a token forward and 2 backward through its inputs, 4ND in all
    and not 6ND, since it has no gradient of its own; the adapters' cost 6. Below the first adapter
    nothing comes back: not to the tokens, not through the first block's query, key and value, and
    not to its keys. Attention's two products come back twice each; causal ones count by half.

    Args:
      shape: of the step.
      last: tokens of a sample that the last block takes through query, output and MLP, where the
        head reads no others; all if None.
    """
    s = shape
    qkv = s.width * (s.inner + 2 * s.shared)
    rest = s.inner * s.width + s.layers * s.width * s.hidden
    adapters = s.rank * (2 * s.width + s.inner + s.shared)
    pairs = s.tokens * s.tokens / (2 if s.causal else 1)
    block = s.tokens * (4 * (qkv + rest) + 6 * adapters) + 3 * 4 * pairs * s.inner
    total = s.depth * block - s.tokens * 2 * (qkv + 2 * s.rank * s.width) - 2 * pairs * s.inner
    if last is not None:
        gone = s.tokens - last
        query = s.width * s.inner
        total -= gone * (4 * (query + rest) + 6 * s.rank * (s.width + s.inner))
        total -= 3 * 4 * gone * s.tokens * s.inner
    total += 4 * s.answers * (s.width * s.head + s.dense)
    total += 2 * s.patches * s.patch * s.width
    return float(s.batch * total)
