"""What a flow needs to know of a problem, and losses of the product alone."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import Factors


@runtime_checkable
class Problem(Protocol):
    """What a flow needs to know of a problem."""

    def loss(self, factors: Any, /) -> Array:
        """The loss, a scalar."""
        ...

    def gradient(self, factors: Any, /) -> Any:
        """The derivative of `loss`, a pytree like `factors`."""
        ...


@judged
class ProductLoss(eqx.Module):
    """Any differentiable loss of the product `W = A B`: `function(W, *arguments)`.

    Attributes:
      function: a differentiable, scalar function of an m×n matrix and of `arguments`.
      shape: (m, n) of the update.
      arguments: arrays that the function needs (data, targets); any pytrees.
    """

    function: Callable[..., Array] = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)
    arguments: tuple[Any, ...] = ()

    @property
    def dtype(self):
        """Floating dtype of the arguments; JAX's default float where there are none."""
        leaves = jax.tree.leaves(self.arguments)
        return jnp.result_type(*leaves) if leaves else jnp.result_type(float)

    def loss(self, factors: Factors) -> Float[Array, ""]:
        """`function(A B)`."""
        return self.function(factors.product, *self.arguments)

    def full_gradient(self, factors: Factors) -> Float[Array, "m n"]:
        """`G = ∇_W L` at `W = A B`."""
        return jax.grad(self.function)(factors.product, *self.arguments)

    def gradient(self, factors: Factors) -> Factors:
        """`(G Bᵀ, AᵀG)`."""
        full = self.full_gradient(factors)
        return Factors(full @ factors.b.T, factors.a.T @ full)
