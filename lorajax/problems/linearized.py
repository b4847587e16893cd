"""A model linearized in the weights that are adapted: the NTK regime (theory §5)."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, judged
from lorajax.factors import Factors, check_finite, is_factors, is_traced
from lorajax.problems.checks import check_precision
from lorajax.problems.convex_losses import LOSSES, ConvexLoss


def updates(update: Any) -> Any:
    """The matrices of a pytree of matrices and Factors: each pair of factors as its product.

    Args:
      update: a matrix, Factors, or any pytree of them (one entry a weight).

    Returns:
      The same tree with a matrix in the place of each pair.
    """
    return jax.tree.map(
        lambda node: node.product if is_factors(node) else node, update, is_leaf=is_factors
    )


def _gram(left: Array, right: Array) -> Array:
    """Inner products of features (p, K, m, n) and (q, K, m, n): (p, K, q, K)."""
    return jnp.tensordot(left, right, ((2, 3), (2, 3)))


class Features(eqx.Module):
    """The derivative of the outputs, written out: `G_ik = ∂f_k(X_i)/∂W`.

    Attributes:
      features: pytree of arrays (N, K, m, n), one for each adapted weight.
    """

    features: Any

    def push(self, update: Any) -> Float[Array, "N K"]:
        """`⟨G_ik, δ⟩`: the outputs' change for a change of the weights."""
        parts = jax.tree.map(
            lambda g, d: jnp.tensordot(g, d, ((2, 3), (0, 1))), self.features, update
        )
        return functools.reduce(jnp.add, jax.tree.leaves(parts))

    def pull(self, cotangent: Float[Array, "N K"]) -> Any:
        """`Σ_ik p_ik G_ik`: the transpose of `push`."""
        return jax.tree.map(lambda g: jnp.tensordot(cotangent, g, ((0, 1), (0, 1))), self.features)

    def hoisted(self) -> "Features":
        """Itself: there is nothing to compute beforehand."""
        return self

    def kernel(self, block: int | None = None) -> Float[Array, "N K N K"]:
        """The neural tangent kernel `⟨G_ik, G_jl⟩`; see `Linearized.kernel`."""
        del block  # what is written out already needs no blocks
        parts = [_gram(g, g) for g in jax.tree.leaves(self.features)]
        return functools.reduce(jnp.add, parts)


class _Operators(eqx.Module):
    """`push` and `pull` as closures, linearized once: for a loop inside one program."""

    weights: Any
    push: Callable[[Any], Array]
    pull: Callable[[Array], Any]


class Tangents(eqx.Module):
    """The derivative of the outputs as a linear map, by `jax.jvp` and `jax.vjp`: never formed.

    Attributes:
      function: `function(weights, inputs)` with outputs (N, K), sample by sample (no batch norm).
      weights: the weights at which the model is linearized, a matrix or a pytree of matrices.
      inputs: a pytree of arrays with N samples along their first axis.
      block: samples that go through the model at a time, a divisor of N; all of them if None.
        Memory is that of one block, time that of all.
    """

    function: Callable[[Any, Any], Array]
    weights: Any
    inputs: Any
    block: int | None = eqx.field(static=True, default=None)

    @property
    def samples(self) -> int:
        """N."""
        return jax.tree.leaves(self.inputs)[0].shape[0]

    def _blocks(self, size: int | None) -> Any:
        size = size or self.samples
        return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), self.inputs)

    def push(self, update: Any) -> Float[Array, "N K"]:
        """`⟨G_ik, δ⟩` by one forward derivative."""

        def one(inputs: Any) -> Array:
            return jax.jvp(lambda w: self.function(w, inputs), (self.weights,), (update,))[1]

        if self.block is None:
            return one(self.inputs)
        return jax.lax.map(one, self._blocks(self.block)).reshape(self.samples, -1)

    def pull(self, cotangent: Float[Array, "N K"]) -> Any:
        """`Σ_ik p_ik G_ik` by one backward derivative."""

        def one(inputs: Any, p: Array) -> Any:
            _, back = jax.vjp(lambda w: self.function(w, inputs), self.weights)
            return back(p)[0]

        if self.block is None:
            return one(self.inputs, cotangent)
        parts = cotangent.reshape(-1, self.block, cotangent.shape[1])
        zero = jax.tree.map(jnp.zeros_like, self.weights)

        def add(total: Any, each: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(*each)), None

        return jax.lax.scan(add, zero, (self._blocks(self.block), parts))[0]

    def hoisted(self) -> "Tangents | _Operators":
        """The map with the model's own forward pass taken out, for a loop inside one program.

        In blocks it stays as it is: what the forward pass leaves behind is what blocks are to save.
        """
        if self.block is not None:
            return self
        _, push = jax.linearize(lambda w: self.function(w, self.inputs), self.weights)
        transpose = jax.linear_transpose(push, self.weights)
        return _Operators(self.weights, push, lambda p: transpose(p)[0])

    def features_of(self, inputs: Any) -> Any:
        """`G` of some samples, written out: a pytree of (samples, K, m, n)."""

        def one(x: Any) -> Any:
            single = jax.tree.map(lambda leaf: leaf[None], x)
            return jax.jacrev(lambda w: self.function(w, single)[0])(self.weights)

        return jax.vmap(one)(inputs)

    def kernel(self, block: int | None = None) -> Float[Array, "N K N K"]:
        """The neural tangent kernel in blocks of samples; see `Linearized.kernel`."""
        blocks = self._blocks(block)

        def row(left: Any) -> Array:
            mine = jax.tree.leaves(self.features_of(left))

            def cell(right: Any) -> Array:
                other = jax.tree.leaves(self.features_of(right))
                parts = [_gram(x, y) for x, y in zip(mine, other, strict=True)]
                return functools.reduce(jnp.add, parts)

            return jax.lax.map(cell, blocks)

        cells = jax.lax.map(row, blocks)  # (rows, columns, block, K, block, K)
        n, k = self.samples, cells.shape[-1]
        return cells.transpose(0, 2, 3, 1, 4, 5).reshape(n, k, n, k)


@judged
class Linearized(eqx.Module):
    """The linearized loss `L̂(δ) = Σ_i c_i ℓ(f0(X_i) + ⟨G_i, δ⟩, Y_i)`, with c_i = 1/N at first.

    δ is the update of one weight (m, n), or a pytree of updates for several weights; LoRA puts
    Factors in the place of each. Make it with `from_features`, which has the derivatives written
    out, or with `from_function`, which never forms them; both are the same problem.

    Attributes:
      outputs: f0(X), the model's outputs without an update, shape (N, K).
      targets: Y, shape (N, K): real numbers for the squared loss, ±1 for the logistic one (K binary
        answers), a distribution over the K classes for softmax.
      sample_weights: c, shape (N,), not negative; 0 takes a sample out.
      jacobian: Features or Tangents.
      loss_name: "squared", "logistic" or "softmax".

    Source: Jang, Lee, Ryu 2024 (arXiv:2402.11867), stated; theory section 5. It describes
    fine-tuning as long as the update is so small that the model is linear in it.
    """

    outputs: Float[Array, "N K"]
    targets: Float[Array, "N K"]
    sample_weights: Float[Array, " N"]
    jacobian: Any
    loss_name: str = eqx.field(static=True)

    @classmethod
    @judged
    def from_features(
        cls,
        features: Any,
        targets: Float[Array, "N K"],
        loss: str = "squared",
        *,
        outputs: Float[Array, "N K"] | None = None,
    ) -> "Linearized":
        """The problem of given features.

        Args:
          features: G, shape (N, K, m, n), or a pytree of such arrays, one for each weight.
          targets: Y, shape (N, K).
          loss: "squared", "logistic" or "softmax".
          outputs: f0(X), shape (N, K); zero if None.

        Returns:
          The problem.

        Raises:
          ValueError: for shapes that do not fit, infinite entries, or targets the loss refuses.

        Example:
          >>> import jax, jax.numpy as jnp, lorajax
          >>> key, other = jax.random.split(jax.random.key(0))
          >>> features = jax.random.normal(key, (20, 1, 6, 5))
          >>> targets = jax.random.normal(other, (20, 1))
          >>> problem = lorajax.Linearized.from_features(features, targets)
          >>> problem.shape, problem.equations
          ((6, 5), 20)
        """
        _check(targets, outputs, loss)
        for leaf in jax.tree.leaves(features):
            if leaf.ndim != 4 or leaf.shape[:2] != targets.shape:
                raise ValueError(
                    f"features have shape {leaf.shape}; with targets of shape {targets.shape} they "
                    f"must be ({targets.shape[0]}, {targets.shape[1]}, m, n)."
                )
        check_finite(features=features)
        outputs = jnp.zeros_like(targets) if outputs is None else outputs
        return cls(outputs, targets, _equal(targets), Features(features), loss)

    @classmethod
    @judged
    def from_function(
        cls,
        function: Callable[[Any, Any], Array],
        weights: Any,
        inputs: Any,
        targets: Float[Array, "N K"],
        loss: str = "squared",
        *,
        block: int | None = None,
    ) -> "Linearized":
        """The problem of any function of the weights to be adapted, without its Jacobian.

        Args:
          function: `function(weights, inputs)` with outputs (N, K), sample by sample, defined once
            (one made anew compiles anew); an `equinox.Module` may carry arrays, as frozen weights.
          weights: a matrix or a pytree of matrices.
          inputs: a pytree of arrays with N samples along their first axis.
          targets: Y, shape (N, K).
          loss: "squared", "logistic" or "softmax".
          block: samples that go through the model at a time, a divisor of N; all if None.

        Returns:
          The problem. `with_features` writes its features out.

        Raises:
          ValueError: for shapes that do not fit, entries that are not finite, targets that the loss
            does not take, or a block that does not divide N.

        Example:
          >>> import jax, jax.numpy as jnp, lorajax
          >>> def model(weight, x):
          ...     return jnp.tanh(x @ weight)
          >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
          >>> problem = lorajax.Linearized.from_function(model, jnp.ones((3, 2)), x, y)
          >>> problem.kernel().shape
          (8, 2, 8, 2)
        """
        for leaf in jax.tree.leaves(weights):
            if leaf.ndim != 2:
                raise ValueError(f"weights have shape {leaf.shape}; each must be a matrix.")
        _check_block(block, targets.shape[0])
        if len(jax.tree.leaves(function)) == 1 and jax.tree.leaves(function)[0] is function:
            function = jax.tree_util.Partial(function)  # a plain function is no pytree
        jacobian = Tangents(function, weights, inputs, block)

        outputs = _outputs(jacobian)
        _check(targets, outputs, loss)
        return cls(outputs, targets, _equal(targets), jacobian, loss)

    @property
    def loss_of_outputs(self) -> ConvexLoss:
        """ℓ with its derivative, conjugate and curvature."""
        return LOSSES[self.loss_name]

    @property
    def shape(self) -> Any:
        """(m, n) of the update; a pytree of shapes where several weights are adapted."""
        if isinstance(self.jacobian, Features):
            return jax.tree.map(lambda g: g.shape[-2:], self.jacobian.features)
        return jax.tree.map(lambda w: w.shape, self.jacobian.weights)

    @property
    def dtype(self):
        """Floating dtype of the problem."""
        return self.outputs.dtype

    @property
    def equations(self) -> int:
        """K N, the number of outputs that data determine: what ranks are counted against.

        Samples of weight 0 are not counted, but inside `jit`, where they cannot be told.
        """
        samples, outputs = self.outputs.shape
        if not is_traced(self.sample_weights):
            samples = int(np.count_nonzero(np.asarray(self.sample_weights)))
        return samples * outputs

    def zero(self) -> Any:
        """The update that changes nothing: zeros of the weights' shapes."""
        tree = self.jacobian
        tree = tree.features if isinstance(tree, Features) else tree.weights
        return jax.tree.map(lambda x: jnp.zeros(x.shape[-2:], self.dtype), tree)

    def predict(self, update: Any) -> Float[Array, "N K"]:
        """`f0(X) + ⟨G, δ⟩`: what the linearized model answers.

        Args:
          update: matrices or Factors, in the tree of the weights.

        Returns:
          Outputs, shape (N, K).
        """
        return self.outputs + self.jacobian.push(updates(update))

    def loss(self, update: Any) -> Float[Array, ""]:
        """`L̂(δ)` of matrices or Factors, without any decay (see `Decayed`)."""
        values = self.loss_of_outputs.value(self.predict(update), self.targets)
        return self.sample_weights @ values

    def residual(self, outputs: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """`c_i ∂ℓ/∂z_i` at outputs z: the dual variable of the data, which `pull` maps to ∇L̂."""
        return self.sample_weights[:, None] * self.loss_of_outputs.derivative(outputs, self.targets)

    def full_gradient(self, update: Any) -> Any:
        """`∇L̂(δ)`, a matrix for each weight, at matrices or Factors."""
        return self.jacobian.pull(self.residual(self.predict(update)))

    def gradient(self, factors: Any) -> Any:
        """The derivative with respect to the factors, `(G Bᵀ, AᵀG)` for each weight."""
        full = self.full_gradient(factors)
        return jax.tree.map(
            lambda f, g: Factors(g @ f.b.T, f.a.T @ g), factors, full, is_leaf=is_factors
        )

    def kernel(self, block: int | None = None) -> Float[Array, "N K N K"]:
        """The neural tangent kernel `⟨G_ik, G_jl⟩`, summed over the weights.

        Args:
          block: samples whose features are written out at a time, a divisor of N, so that at most
            2 · block · K · m · n numbers are held beside the kernel; all of them if None. Smaller
            blocks cost time: the features are formed anew for each of the N/block rows.

        Returns:
          Shape (N, K, N, K), symmetric and positive semidefinite.

        Raises:
          ValueError: for a block that does not divide N.
        """
        _check_block(block, self.outputs.shape[0])
        return _kernel(self.jacobian, block)

    def with_features(self) -> "Linearized":
        """The same problem with its features written out: N · K · m · n numbers a weight."""
        if isinstance(self.jacobian, Features):
            return self
        features = Features(_features(self.jacobian))
        return eqx.tree_at(lambda p: p.jacobian, self, features)

    def hoisted(self) -> "Linearized":
        """The same problem with whatever a loop need not repeat computed once; inside `jit` only.

        Without blocks this keeps what one forward pass over all samples leaves for its derivative.
        """
        return eqx.tree_at(lambda p: p.jacobian, self, self.jacobian.hoisted())


@eqx.filter_jit
def _outputs(jacobian: Tangents) -> Array:
    def one(inputs: Any) -> Array:
        return jacobian.function(jacobian.weights, inputs)

    if jacobian.block is None:
        return one(jacobian.inputs)
    outputs = jax.lax.map(one, jacobian._blocks(jacobian.block))
    return outputs.reshape(-1, outputs.shape[-1])


# As one program each: op by op, the derivative of a real model compiles for a minute.
@eqx.filter_jit
def _kernel(jacobian: Any, block: int | None) -> Array:
    return jacobian.kernel(block)


@eqx.filter_jit
def _features(jacobian: Tangents) -> Any:
    return jacobian.features_of(jacobian.inputs)


def _equal(targets: Array) -> Array:
    return jnp.full(targets.shape[:1], 1 / targets.shape[0], targets.dtype)


def _check_block(block: int | None, samples: int) -> None:
    if block is not None and (block < 1 or samples % block):
        raise ValueError(f"block is {block}; it must divide the number of samples, {samples}.")


def _check(targets: Array, outputs: Array | None, loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}.")
    if targets.ndim != 2 or 0 in targets.shape:
        raise ValueError(f"targets have shape {targets.shape}; they must be (samples, outputs).")
    if outputs is not None and outputs.shape != targets.shape:
        raise ValueError(
            f"outputs have shape {outputs.shape}; they must have the targets', {targets.shape}."
        )
    check_precision(targets=targets, outputs=() if outputs is None else outputs)
    check_finite(targets=targets, outputs=() if outputs is None else outputs)
    if is_traced(targets):
        return
    values = np.asarray(targets)
    if loss == "logistic" and not np.all(np.abs(values) == 1):
        raise ValueError("targets of the logistic loss must be +1 or −1 each.")
    if loss == "softmax":
        off = np.abs(values.sum(axis=1) - 1).max()
        if values.min() < 0 or off > 1e-5:
            miss = f"have rows that miss a sum of 1 by {off:.1e} or negative entries"
            raise ValueError(
                f"targets of the softmax loss {miss}; each row must be a distribution."
            )


@judged(decay=NOT_NEGATIVE)
class Decayed(eqx.Module):
    """Any problem of Factors with weight decay: `L + (w/2)(‖A‖² + ‖B‖²) + ½⟨P, Z Zᵀ⟩`, Z = [A; Bᵀ].

    Least over all factors of one product X, the decay is w‖X‖_*: full fine-tuning with a
    nuclear-norm penalty. P, if given, is the small perturbation of Jang et al.'s theorem.

    Attributes:
      problem: anything with `loss` and `gradient`.
      decay: w ≥ 0, in the unit of the loss over that of the update.
      perturbation: symmetric (m + n, m + n), or a tree of such in the tree of the factors; None for
        no perturbation.

    Source: Jang, Lee, Ryu 2024 (arXiv:2402.11867): decay stated, the form of P reconstructed.
    """

    problem: Any
    decay: Float[Array, ""]
    perturbation: Any = None

    @property
    def shape(self) -> Any:
        """As the problem's."""
        return self.problem.shape

    @property
    def dtype(self):
        """As the problem's."""
        return self.problem.dtype

    def slope(self, factors: Any) -> Any:
        """Derivative of the decay alone, a tree of Factors: `(w I + P) Z`, split into A's and B's.

        It is linear in the factors, so that the decay is half their inner product with it.
        """

        def one(f: Factors, p: Array | None) -> Factors:
            a, b = self.decay * f.a, self.decay * f.b
            if p is None:
                return Factors(a, b)
            moved = p @ jnp.concatenate([f.a, f.b.T])
            return Factors(a + moved[: f.a.shape[0]], b + moved[f.a.shape[0] :].T)

        if self.perturbation is None:
            return jax.tree.map(lambda f: one(f, None), factors, is_leaf=is_factors)
        return jax.tree.map(one, factors, self.perturbation, is_leaf=is_factors)

    def penalty(self, factors: Any) -> Float[Array, ""]:
        """`(w/2)(‖A‖² + ‖B‖²) + ½⟨P, Z Zᵀ⟩`, summed over the weights."""
        products = jax.tree.map(lambda x, y: jnp.sum(x * y) / 2, factors, self.slope(factors))
        return jnp.sum(jnp.stack(jax.tree.leaves(products)))

    def loss(self, factors: Any) -> Float[Array, ""]:
        """The problem's loss with the decay."""
        return self.problem.loss(factors) + self.penalty(factors)

    def gradient(self, factors: Any) -> Any:
        """Derivative of `loss` with respect to the factors."""
        return jax.tree.map(jnp.add, self.problem.gradient(factors), self.slope(factors))
