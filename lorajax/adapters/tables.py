"""Tables that print themselves: what is adapted, and which ranks were selected."""

from typing import Any, NamedTuple

from flax import nnx

from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import kernel_variable
from lorajax.adapters.surgery import layers
from lorajax.environment.judging import judged
from lorajax.environment.text import table


class Row(NamedTuple):
    """One adapter in one layer.

    Attributes:
      path: the layer's path.
      layer: type of the base layer.
      shape: shape of its kernel.
      adapter: the adapter's name, with its weight where that is not 1; "(off)" if it is not active.
      kind: "LoRA", "DoRA", "AdaLoRA", "Tucker", or that of a kind of your own.
      rank: r, or the multilinear ranks of a Tucker update.
      parameters: trainable entries; those of a tied update are counted in its first layer only.
      start: name of the start.
      scaling: the factor in front of the update.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    adapter: str
    kind: str
    rank: int | tuple[int, ...]
    parameters: int
    start: str
    scaling: float


class Description(NamedTuple):
    """What `describe` returns; print it for a table.

    Attributes:
      rows: one for each adapter in each layer.
      trainable: trainable entries of all adapters together.
      total: entries of all parameters of the model, the adapters' included.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        header = ("layer", "type", "kernel", "adapter", "kind", "rank", "params", "start", "scale")
        lines = [
            (*row[:2], _sizes(row.shape), row.adapter, row.kind, _sizes(row.rank))
            + (f"{row.parameters:,}", row.start, f"{row.scaling:.4g}")
            for row in self.rows
        ]
        share = 100 * self.trainable / max(self.total, 1)
        return (
            table(header, lines, right=(6, 8), usual={3: "default"})
            + f"\n{self.trainable:,} of {self.total:,} parameters are adapters' ({share:.2f} %)."
        )


def _sizes(sizes: Any) -> str:
    return str(sizes) if isinstance(sizes, int) else "×".join(map(str, sizes))


@judged
def describe(model: nnx.Module) -> Description:
    """What is adapted: a table of layer, shape, rank, parameters, start and scale.

    Args:
      model: an NNX module.

    Returns:
      A Description, with no rows for a model without adapters. Printed, it has a column of
      adapters' names only where one is not "default".

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> print(adapters.describe(adapters.adapt(model, key=jax.random.key(0), rank=2)))
      layer     type    kernel  kind  rank  params  start  scale
      --------  ------  ------  ----  ----  ------  -----  -----
      layers/0  Linear  8×4     LoRA  2         24  lora       1
      24 of 60 parameters are adapters' (40.00 %).
    """
    rows, seen = [], set()
    for path, layer in layers(model).items():
        for name, adapter in layer.adapters.items():
            rows.append(_row(path, layer, name, adapter, seen))
    total = sum(leaf.size for leaf in _leaves(nnx.state(model, nnx.Param)))
    merged = [x.unmerged for x in layers(model).values() if x.unmerged is not None]
    total -= sum(leaf.size for base in merged for leaf in _leaves(nnx.state(base, nnx.Param)))
    return Description(tuple(rows), sum(row.parameters for row in rows), total)


def _leaves(state: Any) -> list[Any]:
    return [variable[...] for _, variable in nnx.to_flat_state(state)]


def _row(path: str, layer: Adapted, name: str, adapter: Any, seen: set[int]) -> Row:
    weight = dict(layer.active).get(name)
    label = name if weight == 1 else f"{name} (off)" if weight is None else f"{weight:g}·{name}"
    parameters = adapter.parameters
    if adapter.shared is not None:
        parameters = 0 if id(adapter.shared) in seen else parameters
        seen.add(id(adapter.shared))
    return Row(
        path=path,
        layer=type(layer.base).__name__,
        shape=tuple(kernel_variable(layer.base).shape),
        adapter=label,
        kind=adapter.kind,
        rank=getattr(adapter, "ranks", adapter.rank),
        parameters=parameters,
        start=adapter.start,
        scaling=adapter.scaling,
    )
