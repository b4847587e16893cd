"""LoRA's own optimizers for models: Riemannian, RefLoRA, LoRA-RITE, spectral descent.

Each is one optax transformation that turns the gradients of every pair A, B by what the pair itself
says; `lorajax.factors.descents` has the formulas, `lorajax.flows` the same for problems. They find
the pairs by their place in the tree, as `lora_plus` does, and leave all else as it is.
"""

from typing import Any

import jax
import optax

from lorajax.adapters.optimizers import check_found, check_pairs, factor_of
from lorajax.environment.judging import judged
from lorajax.factors import Factors
from lorajax.factors.descents import polar, widened
from lorajax.factors.transformations import Pairs, reflora_of, riemannian_of, rite_of


def _take(tree: Any) -> dict[str, Factors]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    parts = {found: leaf for path, leaf in leaves if (found := factor_of(path)) is not None}
    check_found(len(parts), "an optimizer of pairs")
    check_pairs(tree, "an optimizer of pairs")
    places = list(dict.fromkeys(place for place, _ in parts))
    for place in places:
        if (place, "b") not in parts:
            raise ValueError(
                f"an optimizer of pairs is given {'/'.join(place)!r} with A alone, and needs B; "
                "put both factors into one part of the parameters."
            )
    return {"/".join(place): Factors(parts[place, "a"], parts[place, "b"]) for place in places}


def _put(tree: Any, pairs: dict[str, Factors]) -> Any:
    def one(path: Any, leaf: Any) -> Any:
        found = factor_of(path)
        return leaf if found is None else getattr(pairs["/".join(found[0])], found[1])

    return jax.tree_util.tree_map_with_path(one, tree)


_PAIRS = Pairs(_take, _put)


@judged
def riemannian(damping: float | int = 1e-2) -> optax.GradientTransformation:
    """Riemannian (scaled) LoRA: `∂A (BBᵀ + εI)⁻¹` and `(AᵀA + εI)⁻¹ ∂B`.

    Args:
      damping: ε ≥ 0, PEFT's default if not given; 0 takes pseudo-inverses.

    Returns:
      A stateless transformation to put in front of an optimizer, as the method does with SGD and
      AdamW. It needs the parameters in `update`; what is no pair passes unchanged.

    Raises:
      ValueError: for a negative damping, or (at init) parameters without pairs of LoRA factors, as
        where a partition has parted A from B.

    Example:
      >>> import optax
      >>> from lorajax import adapters
      >>> optimizer = optax.chain(adapters.riemannian(), optax.adamw(1e-3))

    Source: Zhang, Pilanci 2024 (arXiv:2402.02347); PEFT's `create_riemannian_optimizer` gives the
    same steps. Under the flow at ε = 0 all modes grow at one rate (theory section 9, derived).
    """
    return riemannian_of(_PAIRS, damping)


@judged
def reflora(warmup: int = 100) -> optax.GradientTransformation:
    """RefLoRA: the gradients that the balanced factorization of the same product would have.

    Args:
      warmup: steps in which gradients are left as they are, because S is singular at B = 0 and
        erratic next to it; a pair whose product is exactly 0 keeps them anyhow.

    Returns:
      A transformation to put in front of an optimizer. It needs the parameters in `update`; what is
      no pair passes unchanged.

    Raises:
      ValueError: for a negative warm-up, or (at init) parameters without pairs.

    Source: Zhang et al. 2025 (arXiv:2505.18877), by its published code; theory section 9. The
    default of the warm-up is ours.
    """
    return reflora_of(_PAIRS, warmup)


@judged
def lora_rite(
    decays: tuple[float, float] = (0.9, 0.999),
    *,
    eps: float | int = 1e-6,
    clip: float | int = 1.0,
    skip: float | int = 1.0,
    escape: bool = False,
) -> optax.GradientTransformation:
    """LoRA-RITE in place of Adam: its path of A B does not depend on how A B is factored.

    Args:
      decays: of first and second moments.
      eps: added to the root of the second moments, in the gradient's unit.
      clip: bound on the norm of all unmagnified gradients together; 0 for none.
      skip: root mean square beyond which an unmagnified gradient counts as 0; 0 for no bound.
      escape: whether what second moments lose by turning is added to them, as in the paper; the
        published code leaves it out unless asked.

    Returns:
      A transformation to put in front of `optax.scale_by_learning_rate`. It needs the parameters in
      `update`; what is no pair passes as plain gradients, so see `by_part`.

    Raises:
      ValueError: for a number out of its range, or (at init) parameters without pairs.

    A's step has the size of the rate over B's least singular value, and B's likewise: from two
    factors far below the root of the rate their product swamps the step (measured: from factors of
    1e-3 the first step multiplied a loss by 33), so start at B = 0.

    Source: Yen et al. 2024 (arXiv:2410.20625), by its published code, whose defaults these are.
    """
    return rite_of(_PAIRS, decays, eps, clip, skip, escape)


@judged
def spectral() -> optax.GradientTransformation:
    """Spectral descent on both factors: every gradient U Σ Vᵀ becomes U Vᵀ.

    Returns:
      A stateless transformation to put in front of `optax.scale_by_learning_rate`, whose rate is
      then the spectral norm of each step. What is no factor passes unchanged, so see `by_part`.

    Raises:
      ValueError: (at init) for parameters without LoRA factors.

    Source: Jordan et al. 2024 (Muon), recalled; on factors √σ grows at unit rate (theory sections
    2.5 and 9, derived).
    """

    def init(params: Any) -> optax.EmptyState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        check_found(sum(factor_of(path) is not None for path, _ in leaves), "spectral")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def one(path: Any, leaf: Any) -> Any:
            if factor_of(path) is None:
                return leaf
            return polar(widened(leaf)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(init, update)


@judged
def by_part(
    factors: optax.GradientTransformation, beside: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One transformation for A and B, another for what trains beside them (a head, embeddings).

    Args:
      factors: of LoRA factors, with its learning rate.
      beside: of the rest, with its own.

    Returns:
      A transformation of both.

    Example:
      >>> import optax
      >>> from lorajax import adapters
      >>> rate = optax.scale_by_learning_rate(1e-2)
      >>> optimizer = adapters.by_part(optax.chain(adapters.spectral(), rate), optax.adam(1e-3))
    """

    def parts(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "beside" if factor_of(path) is None else "factors", params
        )

    return optax.multi_transform({"factors": factors, "beside": beside}, parts)
