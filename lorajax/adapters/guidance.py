"""Guidance: blends of a base and its adapter, beyond the adapter or short of it."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from lorajax.adapters.surgery import activate, layers
from lorajax.environment.judging import FINITE, judged


@judged(gamma=FINITE)
def guided(
    model: nnx.Module,
    inputs: Any,
    gamma: float | int,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Float[Array, "..."]:
    """Outputs of the base moved along what the adapter changes: `base + γ (adapted − base)`.

    Args:
      model: an adapted model, not merged. It is not changed.
      inputs: what the model takes.
      gamma: γ: 0 is the base and 1 the adapted model, bit for bit; above 1 exaggerates what was
        learned, below 0 turns it around.
      forward: runs the model on the inputs; `model(inputs)` if None.

    Returns:
      The blend, in the shape and dtype of the outputs. For logits it is the softmax that is
      proportional to `p_base^{1−γ} p_adapted^γ`.

    Raises:
      ValueError: for a model without adapters, one that is merged, or a γ that is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> adapted = adapters.adapt(model, key=jax.random.key(0), rank=1)
      >>> adapters.guided(adapted, jnp.ones((4, 3), "float32"), 2.0).shape
      (4, 2)

    Source: AutoLoRA guidance, theory section 9 (recalled). `guided_weights` blends the weights.
    """
    run = forward or (lambda model, inputs: model(inputs))
    base = activate(model, [])
    if gamma == 0:
        return run(base, inputs)
    after = run(model, inputs)
    if gamma == 1:
        return after
    before = run(base, inputs)
    return before + gamma * (after - before)


@judged(gamma=FINITE)
def guided_weights(model: nnx.Module, gamma: float | int) -> Any:
    """A model with γ times its adapters' updates, `W + γ Σ weight · update`, for any later merge.

    Args:
      model: an adapted model, not merged. It is not changed.
      gamma: γ, which multiplies the weight of every active adapter.

    Returns:
      A new model. Its outputs are those of `guided` where they are linear in the weights, and else
      differ by ½ γ(γ − 1) times their second derivative along the update (claim
      `guidance.second_order`).

    Raises:
      ValueError: as `guided`.
    """
    weights: dict[str, float] = {}
    for layer in layers(model).values():
        weights |= dict(layer.active)
    return activate(model, {name: gamma * weight for name, weight in weights.items()})
