"""AdaLoRA's budget as an optax transformation, so that pure training steps prune as they go."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lorajax import adapters


class BudgetState(NamedTuple):
    """State of `budgeted`.

    Attributes:
      inner: of the optimizer.
      budget: of the `adapters.RankBudget`.
    """

    inner: Any
    budget: Any


def budgeted(
    optimizer: optax.GradientTransformation,
    model: Any,
    wrt: Any,
    final_rank: float | None,
    steps: int,
    final_parameters: int | None = None,
) -> optax.GradientTransformation:
    """An optimizer whose updates leave AdaLoRA's singular values within its budget.

    Args:
      optimizer: what moves the parameters.
      model: a model with AdaLoRA adapters. It is not changed.
      wrt: NNX filter of what trains; the parameters of the transformation are `nnx.state(model,
        wrt)`.
      final_rank: mean rank of a matrix at the end; None with `final_parameters`.
      steps: length of the training. The budget is the initial one for its first tenth and the final
        one for its last third, the proportions of the paper's runs (recalled).
      final_parameters: of all adapters at the end, instead; see `adapters.RankBudget`.

    Returns:
      A GradientTransformation whose `update` needs the parameters.

    Raises:
      ValueError: as `adapters.RankBudget`.

    Source: Zhang et al. 2023 (arXiv:2303.10512), recalled.
    """
    graph, _, rest = nnx.split(model, wrt, ...)
    budget = adapters.RankBudget(
        model,
        final_rank=final_rank,
        final_parameters=final_parameters,
        steps=steps,
        warmup=steps // 10,
        settle=steps // 3,
    )
    budget_graph, budget_state = nnx.split(budget)

    def init(params: Any) -> BudgetState:
        return BudgetState(optimizer.init(params), jax.tree.map(jnp.copy, budget_state))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, BudgetState]:
        gradient = updates
        updates, inner = optimizer.update(gradient, state.inner, params)
        moved = optax.apply_updates(params, updates)
        trained = nnx.merge(graph, moved, rest, copy=True)
        keeper = nnx.merge(budget_graph, state.budget, copy=True)
        keeper.update(trained, gradient)
        pruned = nnx.state(trained, wrt)
        # Untouched entries keep the optimizer's own update, to the last bit.
        updates = jax.tree.map(
            lambda u, m, p, q: jnp.where(m == q, u, q - p), updates, moved, params, pruned
        )
        return updates, BudgetState(inner, nnx.state(keeper))

    return optax.GradientTransformation(init, update)
