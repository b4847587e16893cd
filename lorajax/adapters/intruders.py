"""Whether trained adapters stand on top of their weights' own directions."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorajax.adapters.layouts import kernel_of, layout
from lorajax.adapters.surgery import layers
from lorajax.environment.judging import judged
from lorajax.environment.text import table
from lorajax.ranks import intruder_threshold


class Intruder(NamedTuple):
    """One adapter in one layer against the weight beneath it.

    Attributes:
      path: the layer's path.
      adapter: the adapter's name.
      strength: the largest singular value of its update, scaling included.
      threshold: the strength above which a generic direction leaves the weight's bulk.
      directions: how many of the update's singular values lie above it.
      left: the singular vectors of these on the input side, shape (m, directions).
      right: those on the output side, shape (n, directions).
      alpha: of the adapter.
      most: the alpha at which none intrudes, for the same factors; infinite for an update of 0.
    """

    path: str
    adapter: str
    strength: float
    threshold: float
    directions: int
    left: np.ndarray
    right: np.ndarray
    alpha: float
    most: float


class Intruders(NamedTuple):
    """What `intruders` returns; print it for a table.

    Attributes:
      rows: one for each adapter in each layer.
    """

    rows: tuple[Intruder, ...]

    def __str__(self) -> str:
        header = ("layer", "adapter", "strength", "threshold", "intruding", "alpha", "at most")
        lines = [
            (row.path, row.adapter, f"{row.strength:.3g}", f"{row.threshold:.3g}")
            + (str(row.directions), f"{row.alpha:.3g}", f"{row.most:.3g}")
            for row in self.rows
        ]
        count = sum(row.directions > 0 for row in self.rows)
        return (
            table(header, lines, right=(2, 3, 4, 5, 6), usual={1: "default"})
            + f"\n{count} of {len(self.rows)} updates have a direction above their weight's "
            "threshold."
        )


@judged
def intruders(model: nnx.Module) -> Intruders:
    """Strength of every update against the threshold of the weight that it is added to.

    Args:
      model: an adapted NNX module, trained or not.

    Returns:
      Intruders, one row for each adapter in each layer, each by itself and in full (the weights of
      a blend are left out); no rows for a model without adapters. Singular values are those of the
      kernel as a matrix (inputs, outputs), computed in float64 from a Gram matrix of its shorter
      side, so that an update below about 1e-8 of its largest one counts as 0.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
      >>> adapted = adapters.adapt(model, key=jax.random.key(0), rank=2)
      >>> print(adapters.intruders(adapted))  # B = 0
      layer     strength  threshold  intruding  alpha  at most
      --------  --------  ---------  ---------  -----  -------
      layers/0         0       1.99          0      2      inf
      0 of 1 updates have a direction above their weight's threshold.

    Source: arXiv:2607.23711 (abstract read), by the formula of Benaych-Georges, Nadakuditi 2012
    (recalled); theory section 9, `ranks.intruder_threshold`. It is about generic directions: one
    along W's own top directions adds to these and is no intruder, however strong.
    """
    rows = []
    for path, layer in layers(model).items():
        base = layer.base if layer.unmerged is None else layer.unmerged
        weight = _matrix(base, kernel_of(base))
        values = _singular_values(weight)
        limit = intruder_threshold(values, weight.shape) if values[0] > 0 else 0.0
        for name, adapter in layer.adapters.items():
            update = _matrix(base, adapter.update(base))
            rows.append(_row(path, name, adapter, update, limit))
    return Intruders(tuple(rows))


def _matrix(base: Any, kernel: Any) -> np.ndarray:
    return np.asarray(layout(base).matrix(jnp.asarray(kernel, jnp.float32)), np.float64)


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(short @ short.T), 0))[::-1]


def _row(path: str, name: str, adapter: Any, update: np.ndarray, limit: float) -> Intruder:
    turned = update.shape[0] > update.shape[1]
    short = update.T if turned else update
    squares, vectors = np.linalg.eigh(short @ short.T)
    values, vectors = np.sqrt(np.maximum(squares, 0))[::-1], vectors[:, ::-1]
    count = int(np.sum(values > limit))
    first = vectors[:, :count]
    second = short.T @ first / values[None, :count]
    left, right = (second, first) if turned else (first, second)
    top = float(values[0])
    most = adapter.alpha * limit / top if top > 0 else float("inf")
    return Intruder(path, name, top, limit, count, left, right, adapter.alpha, most)
