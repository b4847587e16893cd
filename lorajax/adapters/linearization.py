"""A Flax NNX model in the NTK regime: linearized in the kernels that an adapter would change."""

from typing import Any

import equinox as eqx
from flax import nnx
from jaxtyping import Array, Float

from lorajax.adapters import paths
from lorajax.adapters.kinds import LoRA, axes_of
from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import kernel_name, kernel_variable, layout
from lorajax.adapters.surgery import Targets, layers
from lorajax.environment.judging import judged
from lorajax.problems import Linearized


class _Kernels(eqx.Module):
    """A model as a function of some of its kernels, each read as a matrix."""

    graph: Any = eqx.field(static=True)
    state: Any
    views: tuple[tuple[str, tuple[str, ...], Any], ...] = eqx.field(static=True)

    def __call__(self, matrices: dict[str, Array], inputs: Any) -> Array:
        flat = nnx.to_flat_state(self.state)
        leaves = {tuple(map(str, path)): i for i, (path, _) in enumerate(flat)}
        entries = list(flat)
        for name, location, view in self.views:
            path, old = entries[leaves[location]]
            kernel = view.kernel(matrices[name]).astype(old[...].dtype)
            entries[leaves[location]] = (path, old.replace(kernel))
        state = nnx.from_flat_state(entries)
        return nnx.merge(self.graph, state, copy=True)(inputs)


@judged
def linearized(
    model: nnx.Module,
    inputs: Any,
    targets: Float[Array, "N K"],
    where: Targets = "**",
    *,
    loss: str = "softmax",
    block: int | None = None,
) -> Linearized:
    """A model linearized in its kernels: the problem of which LoRA theory in the NTK regime speaks.

    The update of each chosen layer is a matrix as in `adapt`, so that a trained adapter's updates
    (`updates_of`) can be handed to `optima.certify`.

    Args:
      model: the base model in evaluation mode, before `adapt`; `model(inputs)` gives (N, K). It is
        not changed.
      inputs: what the model is called with, N samples along the first axis.
      targets: Y, shape (N, K), as for `Linearized`.
      where: the layers that are adapted: a pattern or patterns as for `adapt`.
      loss: "squared", "logistic" or "softmax".
      block: samples that go through the model at a time, a divisor of N; all if None.

    Returns:
      A matrix-free Linearized whose updates are dictionaries by path.

    Raises:
      ValueError: for layers without a match, adapted ones, or ones whose kernel is not one matrix,
        and as for `Linearized.from_function`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((3, 4), jnp.float32)
      >>> adapters.linearized(model, x, jnp.eye(2, dtype="float32")[jnp.array([0, 1, 1])]).shape
      {'': (4, 2)}

    Source: theory section 5 (linearization stated; Jang, Lee, Ryu 2024, arXiv:2402.11867).
    """
    found = paths.find(model)
    matrices, views = {}, []
    for path, entry, _ in paths.select(model, where, found):
        layer = found[path]
        if isinstance(layer, Adapted):
            raise ValueError(f"layer {path!r} has an adapter; give the model before `adapt`.")
        view = layout(layer, axes_of(entry, path))
        if view.stack or view.slices:
            raise ValueError(
                f"layer {path!r} has a stack of kernels, of shape "
                f"{kernel_variable(layer)[...].shape}; choose layers with one matrix each."
            )
        matrices[path] = view.matrix(kernel_variable(layer)[...])
        views.append((path, (*paths.segments(path), kernel_name(layer)), view))
    graph, state = nnx.split(model)
    function = _Kernels(graph, state, tuple(views))
    return Linearized.from_function(function, matrices, inputs, targets, loss, block=block)


@judged
def updates_of(model: nnx.Module, name: str = "default") -> dict[str, Float[Array, "m n"]]:
    """What LoRA has learned: `s (A B − A₀B₀)` of every layer that has the adapter, by path.

    Args:
      model: an adapted model.
      name: of the adapter.

    Returns:
      Matrices by path, in the layout of `linearized`.

    Raises:
      ValueError: if no layer has a LoRA of that name.
    """
    found = {
        path: layer.adapters[name].matrix_update()
        for path, layer in layers(model).items()
        if isinstance(layer.adapters.get(name), LoRA)
    }
    if not found:
        raise ValueError(f"the model has no LoRA named {name!r}; adapt it first.")
    return found
