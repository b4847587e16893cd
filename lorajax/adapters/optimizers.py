"""Optax transformations that tell factors from what trains beside them, inside any chain.

They find the factors by their place in the tree, `…/adapters/<name>/a` and `…/b`, so that heads
that train along keep their own learning rate. LoRA+ and ALLoRA act on B alone, `scale_beside` on
all that belongs to no adapter.
"""

from typing import Any

import jax
import optax
from jaxtyping import Array

from lorajax.environment.judging import POSITIVE, judged
from lorajax.factors import Factors, check_positive, column_rates


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a tree path as strings, whatever kind of node they come from."""
    names = []
    for entry in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                names.append(str(getattr(entry, attribute)))
                break
    # A State whose leaves are Variables adds a last entry of its own, the variable's value.
    return tuple(name for name in names if name not in ("value", "raw_value"))


def factor_of(path: tuple[Any, ...]) -> tuple[tuple[str, ...], str] | None:
    """The adapter that a leaf belongs to and which factor it is; None for other leaves."""
    return _factor_of(names_of(path))


def _factor_of(names: tuple[str, ...]) -> tuple[tuple[str, ...], str] | None:
    if len(names) < 3 or names[-3] != "adapters" or names[-1] not in ("a", "b"):
        return None
    return names[:-1], names[-1]


def check_found(count: int, what: str, wanted: str = "LoRA factors") -> None:
    """Raises ValueError unless the parameters hold something that `what` acts on."""
    if not count:
        raise ValueError(
            f"{what} finds no {wanted} in the parameters; build the optimizer with "
            "wrt=adapters.trainable(model)."
        )


def _check_second(params: Any, what: str) -> None:
    """Raises ValueError unless a second factor B is among the parameters, which `what` acts on."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    factors = [found for path, _ in leaves if (found := factor_of(path)) is not None]
    check_found(len(factors), what)
    if not any(which == "b" for _, which in factors):
        raise ValueError(
            f"{what} is given {'/'.join(factors[0][0])!r} with A alone, and acts on B; leave it "
            "out of this part of the parameters, or give it B."
        )


def check_pairs(params: Any, what: str) -> None:
    """Raises ValueError for a B whose A is not among the parameters, or not all of its update."""
    names = {names_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for place, which in filter(None, map(_factor_of, names)):
        if which == "b" and (*place, "a") not in names:
            raise ValueError(
                f"{what} is given {'/'.join(place)!r} with B alone, and needs A for the size of "
                "their product; put both factors into one part of the parameters."
            )
        if which == "b" and (*place, "e") in names:
            raise ValueError(
                f"{what} is given {'/'.join(place)!r}, an AdaLoRA, whose update is not A B; use "
                "kind='lora'."
            )


@judged(ratio=POSITIVE)
def lora_plus(ratio: float | int = 16.0) -> optax.GradientTransformation:
    """LoRA+: B learns `ratio` times as fast as A.

    Args:
      ratio: ρ > 0, learning rate of B over that of A.

    Returns:
      A stateless transformation to put behind the optimizer, where it scales B's updates.

    Raises:
      ValueError: if the ratio is not positive, or (at init) the parameters hold no LoRA factor B.

    Example:
      >>> import optax
      >>> from lorajax import adapters
      >>> optimizer = optax.chain(optax.adam(1e-4), adapters.lora_plus(16.0))

    Source: Hayou et al. 2024 (arXiv:2402.12354), recalled. Under gradient flow the conserved matrix
    becomes `ρ AᵀA − B Bᵀ` (theory section 1, derived).
    """
    check_positive(ratio=ratio)

    def init(params: Any) -> optax.EmptyState:
        _check_second(params, "lora_plus")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
            found = factor_of(path)
            return leaf * ratio if found is not None and found[1] == "b" else leaf

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


@judged
def scale_beside(factor: float | int) -> optax.GradientTransformation:
    """What trains beside the adapters, a head or embeddings, learns `factor` times as fast.

    Args:
      factor: learning rate of all that belongs to no adapter over the optimizer's, positive.

    Returns:
      A stateless transformation to put behind the optimizer, where it scales those updates.

    Raises:
      ValueError: if the factor is not positive, or (at init) the parameters hold no adapter.

    Example:
      >>> import optax
      >>> from lorajax import adapters
      >>> chain = (optax.adam(1e-2), adapters.lora_plus(4.0), adapters.scale_beside(4.0))
      >>> optimizer = optax.chain(*chain)
    """
    check_positive(factor=factor)

    def init(params: Any) -> optax.EmptyState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        found = sum("adapters" in names_of(path) for path, _ in leaves)
        check_found(found, "scale_beside", "adapter")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
            return leaf if "adapters" in names_of(path) else leaf * factor

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


@judged(eta=POSITIVE)
def allora(eta: float | int = 1.0) -> optax.GradientTransformation:
    """ALLoRA: each column of B learns at a rate that falls with the size of its update.

    Args:
      eta: η > 0; a column whose update is zero learns η times as fast as the optimizer says.

    Returns:
      A stateless transformation to put in front of plain gradient descent, where it divides column
      j of B's gradient by `√(‖(A B)_j‖ + 1/η²)`. It needs the parameters in `update`.

    Raises:
      ValueError: if η is not positive, the parameters hold no pairs of LoRA factors, as where a
        partition has parted A from B, or are not given (at update).

    Source: Huang, Balestriero 2024 (arXiv:2410.09692), recalled, in the form of theory section 7:
    a row of PEFT's update is a column here. The method drops the scaling, and so does the norm.
    Adam in front of or behind it undoes constant factors, so use it with SGD or momentum.
    """
    check_positive(eta=eta)

    def init(params: Any) -> optax.EmptyState:
        _check_second(params, "allora")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("allora needs the parameters: call update(grads, state, params).")
        check_pairs(params, "allora")
        factors = {
            found: leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if (found := factor_of(path)) is not None
        }

        def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
            found = factor_of(path)
            if found is None or found[1] != "b":
                return leaf
            pair = Factors(factors[found[0], "a"], factors[found[0], "b"])
            return leaf * column_rates(pair, eta)[..., None, :]

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)
