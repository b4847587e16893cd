"""The second moments of what layers see, streamed over batches, for starts along them (EVA)."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax.adapters import paths
from lorajax.adapters.kinds import axes_of
from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import layout
from lorajax.adapters.surgery import Targets
from lorajax.environment.judging import judged


class _Standing:
    """Which inputs of the batch that is being traced count; its recorders share it.

    Attributes:
      mask: True where an input counts; None where all do.
      others: paths of layers whose inputs have other axes than the mask.
    """

    def __init__(self) -> None:
        self.mask: Array | None = None
        self.others: set[str] = set()


class Recorder(Adapted):
    """A layer that adds up the second moment of its inputs; for `input_moments` only."""

    def __init__(self, base: nnx.Module, path: str, axes: Any, standing: _Standing):
        super().__init__(base)
        self.path = path
        self.axes = axes
        self.standing = standing
        m = layout(getattr(base, "base", base), axes).shape[0]
        self.moment = nnx.BatchStat(jnp.zeros((m, m), jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.float32))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Records the input and calls the layer."""
        base = self.base.base if isinstance(self.base, Adapted) else self.base
        rows = layout(base, self.axes).rows(x).astype(jnp.float32)
        weights = _weights(self.standing.mask, x.shape, len(rows))
        if weights is None:
            if self.standing.mask is not None:
                self.standing.others.add(self.path)
            self.moment[...] += rows.T @ rows
            self.count[...] += rows.shape[0]
        else:
            self.moment[...] += jnp.where(weights[:, None], rows, 0).T @ rows
            self.count[...] += weights.sum(dtype=jnp.float32)
        return self.base(x, *args, **kwargs)  # type: ignore[operator]


def _weights(standing: Array | None, shape: tuple[int, ...], rows: int) -> Array | None:
    """Which rows of a layer's inputs count; None, all of them, where the axes are others."""
    if standing is None:
        return None
    if shape[: standing.ndim] == standing.shape and rows == standing.size:
        return standing.reshape(-1)
    if shape[:1] == standing.shape[:1] and rows == len(standing):  # one vector for each sample
        return standing.reshape(rows, -1).any(-1)
    return None


@judged
def input_moments(
    model: nnx.Module,
    batches: Iterable[Any],
    targets: Targets = "**",
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    where: Callable[[Any], Array] | None = None,
) -> dict[str, Array]:
    """The second moment `E[x xᵀ]` of each layer's inputs, streamed over batches.

    Args:
      model: an NNX module. It is not changed.
      batches: an iterable of batches.
      targets: as for `adapt`; only the option `axes` is read.
      forward: runs the model on a batch; `model(batch)` if None.
      where: which inputs of a batch count, a bool array (b, ...) whose axes are the first ones of
        the inputs, such as where a token stands in texts of unequal lengths; all if None. What has
        one input for each sample counts those samples in which anything does. Layers whose inputs
        have other axes, such as windows of pictures, count all, with a warning that names them if
        some inputs of these batches do not count.

    Returns:
      A float32 matrix (m, m) for each layer by path, m the rows of its kernel; for a convolution
      the mean over its windows. Give them to `adapt` as `inputs`.

    Raises:
      ValueError: for targets without a match, layers whose inputs are indices, stacked layers, no
        batches, or a layer that the forward pass never calls.
    """
    copy, standing = nnx.clone(model), _Standing()
    chosen: dict[str, Any] = {}
    found = paths.find(copy)
    for path, entry, _ in paths.select(copy, targets, found):
        chosen[path] = axes_of(entry, path)
        layer = found[path]
        base = layer.base if isinstance(layer, Adapted) else layer
        view = layout(base, chosen[path])
        if view.stack or view.slices or isinstance(base, nnx.Embed):
            raise ValueError(
                f"the layer {path!r} has no second moment of inputs: "
                + (
                    "its inputs are indices."
                    if isinstance(base, nnx.Embed)
                    else "its stacked or separate kernels see different inputs."
                )
            )

    def visit(path: str, layer: nnx.Module) -> Any:
        if path in chosen:
            return Recorder(layer, path, chosen[path], standing)
        return layer if isinstance(layer, Adapted) else None

    recording = paths.replace(copy, visit)
    run = forward or (lambda model, batch: model(batch))

    @nnx.jit
    def step(model: Any, batch: Any) -> Array:
        standing.mask = None if where is None else jnp.asarray(where(batch), bool)
        filled = jnp.asarray(False) if standing.mask is None else ~standing.mask.all()
        run(model, batch)
        standing.mask = None  # a tracer, which nothing outside this trace may see
        return filled

    # Looked at when all are on their way: each look waits for the device.
    filled = [step(recording, batch) for batch in batches]
    if standing.others and any(map(bool, filled)):
        warnings.warn(
            f"input_moments counts all inputs of {', '.join(sorted(standing.others))}, those that "
            "do not count by where among them, since they have other axes; leave these layers out "
            "of targets, or give batches without filling.",
            stacklevel=3,
        )
    moments = {}
    for path, layer in paths.find(recording).items():
        if isinstance(layer, Recorder):
            if not float(layer.count[...]):
                raise ValueError(f"the layer {path!r} saw no input on these batches.")
            moments[path] = layer.moment[...] / layer.count[...]
    return moments
