"""AdaLoRA's budget: which singular values of which layers live, over the course of training."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lorajax.adapters import paths
from lorajax.adapters.kinds import AdaLoRA
from lorajax.adapters.surgery import layers
from lorajax.environment.judging import at_least, judged


@judged(steps=at_least(1))
def cubic_budget(
    step: int | Int[Array, ""],
    *,
    initial: int,
    final: int,
    steps: int,
    warmup: int = 0,
    settle: int = 0,
) -> Int[Array, ""]:
    """The number of singular values that live at a step.

    Args:
      step: counted from 0. May be traced.
      initial: number at the start, r_0 over all layers.
      final: number at the end, r_T over all layers.
      steps: length of the training T.
      warmup: steps at the start that keep the initial budget.
      settle: steps at the end that keep the final one.

    Returns:
      `r_T + (r_0 − r_T)(1 − τ)³`, rounded down, with τ the share of the steps between warmup and
      settle that is over; int32.

    Raises:
      ValueError: for budgets or steps out of order.

    Example:
      >>> from lorajax import adapters
      >>> [int(adapters.cubic_budget(t, initial=64, final=16, steps=100)) for t in (0, 50, 100)]
      [64, 22, 16]

    Source: Zhang et al. 2023 (arXiv:2303.10512), recalled.
    """
    if not 0 < final <= initial:
        raise ValueError(f"final is {final}; it must lie in 1 … initial = {initial}.")
    if warmup < 0 or settle < 0 or steps <= warmup + settle:
        raise ValueError(
            f"steps is {steps}; it must exceed warmup + settle = {warmup} + {settle}, neither of "
            "them negative."
        )
    # Integers until the division: a float32 step count is exact only up to 2^24.
    done = jnp.clip(jnp.asarray(step, jnp.int32) - warmup, 0, steps - warmup - settle)
    left = 1 - done.astype(jnp.float32) / (steps - warmup - settle)
    return jnp.floor(final + (initial - final) * left**3 + 1e-4).astype(jnp.int32)


class RankBudget(nnx.Module):
    """AdaLoRA's allocator, used as an `nnx.Optimizer` is: `update(model, grads)` after each step.

    Importance of an entry w is the smoothed |w ∂L/∂w| times its smoothed uncertainty; a direction's
    is that of its singular value plus the means over its two vectors. Below the budget the singular
    values are set to zero, in the adapter only; until training settles they may grow back.

    Args:
      model: a model with AdaLoRA adapters.
      final_rank: mean rank of a matrix at the end.
      final_parameters: what the adapters have at the end, singular values counted, instead of
        `final_rank`: a direction then takes as much of the budget as it has parameters, so that
        less than one direction of it is left over.
      steps: length of the training.
      warmup: steps before the first pruning.
      settle: steps at the end that train the ranks then reached.
      every: steps between prunings.
      sensitivity_decay: β1 of the smoothed importance.
      uncertainty_decay: β2 of the smoothed uncertainty.
      name: the adapter's name.

    Raises:
      ValueError: for a model without AdaLoRA adapters of this name, settings out of range, or
        unless exactly one of `final_rank` and `final_parameters` is given.

    Source: Zhang et al. 2023 (arXiv:2303.10512), recalled; there a budget counts directions.
    """

    @judged(steps=at_least(1), every=at_least(1), final_parameters=at_least(1))
    def __init__(
        self,
        model: nnx.Module,
        *,
        final_rank: float | int | None = None,
        final_parameters: int | None = None,
        steps: int,
        warmup: int = 0,
        settle: int = 0,
        every: int = 1,
        sensitivity_decay: float = 0.85,
        uncertainty_decay: float = 0.85,
        name: str = "default",
    ):
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1.")
        for label, decay in (
            ("sensitivity_decay", sensitivity_decay),
            ("uncertainty_decay", uncertainty_decay),
        ):
            if not 0 < decay < 1:
                raise ValueError(f"{label} is {decay}; it must lie in (0, 1).")
        if (final_rank is None) == (final_parameters is None):
            raise ValueError(
                f"final_rank is {final_rank} and final_parameters {final_parameters}; give one of "
                "them."
            )
        found = adalora_layers(model, name)
        if final_rank is not None:
            matrices = sum(adapter.e.size // adapter.rank for adapter in found.values())
            self.final, self.costs = int(final_rank * matrices), (1,) * len(found)
        else:
            assert final_parameters is not None
            self.final = final_parameters
            self.costs = tuple(x.a.shape[-2] + x.b.shape[-1] + 1 for x in found.values())
        self.initial = sum(
            cost * adapter.e.size for cost, adapter in zip(self.costs, found.values(), strict=True)
        )
        self.steps, self.warmup, self.settle, self.every = steps, warmup, settle, every
        self.decays = (sensitivity_decay, uncertainty_decay)
        self.name = name
        self.paths = tuple(found)
        self.budget(0)  # raises for settings out of order, before any training
        self.step = nnx.Variable(jnp.zeros((), jnp.int32))
        zeros = lambda v: nnx.Variable(jnp.zeros_like(v[...]))  # noqa: E731
        self.sensitivity = nnx.List(
            [nnx.Dict(a=zeros(x.a), b=zeros(x.b), e=zeros(x.e)) for x in found.values()]
        )
        self.uncertainty = nnx.List(
            [nnx.Dict(a=zeros(x.a), b=zeros(x.b), e=zeros(x.e)) for x in found.values()]
        )
        self.masks = nnx.List([nnx.Variable(jnp.ones(x.e.shape, bool)) for x in found.values()])

    def budget(self, step: int | Int[Array, ""]) -> Int[Array, ""]:
        """The number of singular values, or of parameters, that live at a step."""
        return cubic_budget(
            step,
            initial=self.initial,
            final=self.final,
            steps=self.steps,
            warmup=self.warmup,
            settle=self.settle,
        )

    def update(self, model: nnx.Module, grads: Any) -> None:
        """Takes in the gradients of a step and prunes the model's singular values to the budget.

        Args:
          model: the model, right after the optimizer's update.
          grads: the gradients of that step, a State as `nnx.grad` returns it.
        """
        found = adalora_layers(model, self.name)
        flat = {tuple(map(str, path)): v for path, v in nnx.to_flat_state(grads)}
        scores = []
        for index, path in enumerate(self.paths):
            adapter = found[path]
            place = (*paths.segments(path), "adapters", self.name)
            score = {}
            for part in ("a", "b", "e"):
                if (*place, part) not in flat:
                    raise ValueError(
                        f"grads lack {'/'.join((*place, part))!r}; differentiate with respect to "
                        "adapters.trainable(model)."
                    )
                gradient = flat[*place, part][...]
                score[part] = self._observe(index, part, getattr(adapter, part)[...] * gradient)
            scores.append(score["e"] + score["a"].mean(axis=-2) + score["b"].mean(axis=-1))
        step = self.step[...] + 1
        self.step[...] = step
        settled = step > self.steps - self.settle
        prune = (step > self.warmup) & (step % self.every == 0) & ~settled
        masks = _strongest(scores, self.budget(step), self.costs)
        for path, mask, new in zip(self.paths, self.masks, masks, strict=True):
            mask[...] = jnp.where(prune, new, mask[...])
            e = found[path].e
            e[...] = jnp.where((prune | settled) & ~mask[...], 0, e[...])

    def _observe(self, index: int, part: str, product: Array) -> Array:
        first, second = self.decays
        mean, spread = self.sensitivity[index][part], self.uncertainty[index][part]
        importance = jnp.abs(product)
        mean[...] = first * mean[...] + (1 - first) * importance
        spread[...] = second * spread[...] + (1 - second) * jnp.abs(importance - mean[...])
        return mean[...] * spread[...]

    def ranks(self, model: nnx.Module) -> dict[str, int]:
        """The number of singular values of each layer that are not zero."""
        found = adalora_layers(model, self.name)
        return {path: int(jnp.sum(found[path].e[...] != 0)) for path in self.paths}


def _strongest(scores: list[Array], budget: Int[Array, ""], costs: Sequence[int]) -> list[Array]:
    """Masks of the largest scores over all layers together, as many as the budget pays for."""
    flat = jnp.concatenate([score.reshape(-1) for score in scores])
    pairs = zip(costs, scores, strict=True)
    price = jnp.concatenate([jnp.full(score.size, cost, jnp.int32) for cost, score in pairs])
    # Places in an order, not a threshold: equal scores must not let more through than the budget.
    order = jnp.argsort(-flat, stable=True)
    spent = jnp.cumsum(price[order], dtype=jnp.int32)
    keep = jnp.zeros(flat.size, bool).at[order].set(spent <= budget)
    masks, start = [], 0
    for score in scores:
        masks.append(keep[start : start + score.size].reshape(score.shape))
        start += score.size
    return masks


def adalora_layers(model: nnx.Module, name: str = "default") -> dict[str, AdaLoRA]:
    """The AdaLoRA adapters of a name, by the path of their layer.

    Args:
      model: an adapted model.
      name: the adapter's name.

    Returns:
      Adapters in the model's order.

    Raises:
      ValueError: if there are none.
    """
    found = {
        path: layer.adapters[name]
        for path, layer in layers(model).items()
        if name in layer.adapters and isinstance(layer.adapters[name], AdaLoRA)
    }
    if not found:
        raise ValueError(
            f"the model has no AdaLoRA adapter {name!r}; adapt it with kind='adalora'."
        )
    return found


@judged
def orthogonality(model: nnx.Module, name: str = "default") -> Float[Array, ""]:
    """AdaLoRA's penalty on frames that are not orthonormal, to be added to the loss.

    Args:
      model: a model with AdaLoRA adapters.
      name: the adapter's name.

    Returns:
      The mean over the layers of `‖PᵀP − I‖_F² + ‖Q Qᵀ − I‖_F²`; the paper weighs it with 0.1.

    Raises:
      ValueError: if the model has no such adapter.
    """
    terms = []
    for adapter in adalora_layers(model, name).values():
        a, b = adapter.a[...], adapter.b[...]
        eye = jnp.broadcast_to(
            jnp.eye(adapter.rank, dtype=a.dtype), (*a.shape[:-2],) + (adapter.rank,) * 2
        )
        terms.append(jnp.sum((a.mT @ a - eye) ** 2) + jnp.sum((b @ b.mT - eye) ** 2))
    return sum(terms[1:], terms[0]) / len(terms)
