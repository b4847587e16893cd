"""Ranks for each layer, from the gradient before training."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lorajax import ranks
from lorajax.adapters import paths
from lorajax.adapters.gradients import Estimate, Gradient, Loss, estimate
from lorajax.adapters.keeping import Kept
from lorajax.adapters.kinds import axes_of
from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import layout
from lorajax.adapters.surgery import Targets
from lorajax.adapters.tables import table
from lorajax.adapters.whitening import moment_groups, whitened_estimates
from lorajax.environment.judging import at_least, judged
from lorajax.initializers import PRNGKey


class Selected(NamedTuple):
    """One layer of a selection.

    Attributes:
      path: the layer's path.
      shape: (m, n) of its kernel, read as a matrix.
      rank: 0 leaves the layer alone. For layers with a stack or slices the largest of their ranks.
      singular_values: of the gradient, in decreasing order; of all matrices, for stack and slices;
        of the whitened gradient, for a rule that asks for it.
      floor: below it, a singular value is noise; 0 for rules without a floor.
      error: bound on how far the singular values may be too small, 0 where they are exact.
      cost: parameters that one rank costs.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    singular_values: Float[Array, "*lead k"]
    floor: float
    error: float
    cost: int

    @property
    def certain(self) -> bool:
        """Whether the rank is the same for every spectrum that the sketch's error allows."""
        squares = np.asarray(self.singular_values, np.float64) ** 2
        low = np.sqrt(squares)
        high = np.sqrt(squares + self.error**2)
        counts = (low >= self.floor).sum(-1), (high >= self.floor).sum(-1)
        return self.floor == 0 or bool(np.all(counts[0] == counts[1]))


class Selection(NamedTuple):
    """What `select_ranks` returns; print it for a table.

    Attributes:
      layers: one Selected for each layer.
      rule: the name of the rule.
      samples: number of samples behind the gradients; of answers, where the loss counts them.
      passes: number of times the data was gone through.
      gradients: that the ranks were read off, by path, for `adapt(…, gradients=…)`.
    """

    layers: tuple[Selected, ...]
    rule: str
    samples: int
    passes: int
    gradients: Mapping[str, Gradient]

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by path, for `adapt(model, selection.ranks, …)`; layers of rank 0 are left out."""
        return {paths.escape(each.path): each.rank for each in self.layers if each.rank}

    @property
    def parameters(self) -> int:
        """Parameters of adapters of these ranks."""
        return sum(each.rank * each.cost for each in self.layers)

    def filled(self, budget: int, max_rank: int | None = None) -> "Selection":
        """The same layers with ranks that spend a budget, also on what the rule calls noise.

        What the rule has found comes first; then the gradient's next directions follow, by energy
        for each parameter.

        Args:
          budget: parameters in all; what is less than the next direction takes is left over.
          max_rank: upper bound of each rank.

        Returns:
          A Selection.

        Raises:
          ValueError: for a budget below 0 or a bound below 1.

        Source: derived, as `ranks.allocate`. No theorem says that it helps; on QNLI and CIFAR-10 it
        did (`docs/glue.md`, `sims/transfer.py`).
        """
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank is {max_rank}; it must be at least 1.")
        spectra = {each.path: _strengths(each)[:max_rank] for each in self.layers}
        chosen = ranks.allocate(
            spectra,
            {each.path: each.cost for each in self.layers},
            budget,
            first={each.path: each.rank for each in self.layers},
        )
        layers = tuple(each._replace(rank=chosen[each.path]) for each in self.layers)
        return self._replace(layers=layers, rule=f"{self.rule} (filled up)")

    def peft(
        self, alpha: float | int | None = None, *, rename: Callable[[str], str] | None = None
    ) -> dict[str, Any]:
        """The ranks as the fields of a PEFT LoraConfig.

        Args:
          alpha: numerator of every layer's scaling; each layer's own rank, a scaling of 1, if None.
          rename: from a layer's path to the name of its torch module; "/" becomes "." if None.

        Returns:
          `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern` and `target_modules`, without the
          layers of rank 0.

        Raises:
          ValueError: if every rank is 0.
        """
        from lorajax.adapters import peft

        chosen = {each.path: each.rank for each in self.layers if each.rank}
        if not chosen:
            raise ValueError("every rank is 0, so that there is nothing for PEFT to adapt.")
        name = rename or peft.dotted
        return peft.patterns(
            {name(path): (rank, alpha or float(rank)) for path, rank in chosen.items()}
        )

    def __str__(self) -> str:
        header = ("layer", "kernel", "rank", "params", "top", "floor", "certain")
        lines = []
        for each in self.layers:
            top = float(jnp.max(each.singular_values))
            cells = (each.path, "×".join(map(str, each.shape)), str(each.rank))
            cells += (f"{each.rank * each.cost:,}", f"{top:.3g}", f"{each.floor:.3g}")
            lines.append((*cells, "yes" if each.certain else "no"))
        return (
            table(header, lines, right=(2, 3, 4, 5))
            + f"\n{self.parameters:,} parameters by {self.rule} on {self.samples:,} samples."
        )


@judged(budget=at_least(0), max_rank=at_least(1), memory=at_least(0))
def select_ranks(
    model: nnx.Module,
    loss: Loss,
    batches: Iterable[Any],
    rule: str | Callable[..., Any] | ranks.Rule = "split_half",
    targets: Targets = "**",
    *,
    budget: int | None = None,
    fill: bool = False,
    max_rank: int | None = None,
    memory: int = 2**30,
    width: int = 64,
    key: PRNGKey | None = None,
    where: Callable[[Any], Array] | None = None,
    keep: Kept | None = None,
    **options: Any,
) -> Selection:
    """Ranks for each layer from the spectrum of its gradient before fine-tuning.

    Args:
      model: an NNX module, in the mode that the loss is meant in. Not changed.
      loss: as for `gradients`; "random_signs" needs one loss a sample.
      batches: an iterable of batches whose leaves lead with the sample axis.
      rule: a name among `ranks.rules()` or a function as `ranks.rule` takes it: "split_half" and
        "random_signs" count what stands above the measured noise, "whitened" likewise with the
        gradient whitened by the layer's inputs, "c_over_n" `σ² ≥ C/n`, "energy" a fraction of
        `Σσ²`.
      targets: as for `adapt`; only the option `axes` is read.
      budget: parameters in all: `ranks.allocate` spends them on the singular values that the rule
        has let through, by energy for each parameter.
      fill: whether the rest of the budget goes to the next directions: `Selection.filled`.
      max_rank: upper bound of each rank.
      memory: bytes that gradients may take; the largest layers are sketched beyond them. Moments of
        inputs take as many again, in several passes over the batches where they have to.
      width: columns of a sketch; no rank of a sketched layer can be larger.
      key: for sketches and signs; key 0 if None.
      where: which inputs of a batch count for a rule that whitens, as for `input_moments`.
      keep: where the sums behind gradients go, so that an interruption does not lose them; batches
        are then a list. Moments of inputs are not among them.
      **options: of the rule, such as `constant`, `fraction`, `margin`.

    Returns:
      A Selection.

    Raises:
      ValueError: as `ranks.rule` and `gradients`, and for a budget or bound out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(1), (2, 512, 4), "float32")
      >>> want = model(x) + x[..., :1]  # every output misses the first input: rank one
      >>> loss = lambda model, batch: jnp.mean((model(batch[0]) - batch[1]) ** 2)
      >>> adapters.select_ranks(model, loss, list(zip(x, want))).layers[0].rank
      1

    Source: OpenReview gg2Wb2HPOI for the rule C/n (stated); theory section 3 for the noise floors
    (derived). The floors are those of the gradient's noise: they stop being right where the loss is
    already at a stationary point, and every layer then gets rank 0.
    """
    _check_fill(fill, budget)
    chosen = ranks.rule(rule)
    chosen.check(**options)
    if chosen.whitens:
        _check_again(batches, chosen.name)
    sketching: dict[str, Any] = {"memory": memory, "width": width, "key": key, "keep": keep}
    found = estimate(model, loss, batches, targets, noise=chosen.noise, **sketching)
    sizes, estimates, passes = shapes(model, targets), found.layers.items(), found.passes
    if chosen.whitens:
        of, groups = found.layers, moment_groups(found.layers, memory)
        passes += len(groups)
        estimates = whitened_estimates(model, loss, batches, targets, of, groups, where)
    rule = functools.partial(chosen, **options)
    selected = [_selected(path, sizes[path], rule, each, found.samples) for path, each in estimates]
    layers = _within(selected, budget, max_rank)
    means = {path: each.mean for path, each in found.layers.items()}
    selection = Selection(layers, chosen.name, found.samples, passes, means)
    return selection.filled(budget or 0, max_rank) if fill else selection


def _check_fill(fill: bool, budget: int | None) -> None:
    if fill and budget is None:
        raise ValueError("fill is True without a budget; give the parameters that are to be spent.")


def _check_again(batches: Any, rule: str) -> None:
    if iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, and rule {rule!r} goes through them once more for the "
            "inputs; give a list, or an object that can be gone through again."
        )


def _selected(
    path: str,
    size: tuple[tuple[int, int], int],
    rule: Callable[..., ranks.RankEstimate],
    estimate: Estimate,
    samples: int,
) -> Selected:
    (shape, slices), mean, noise = size, estimate.mean, estimate.noise
    values, floor = mean.singular_values, None if noise is None else noise.norm
    found = rule(values, shape=shape, samples=samples, floor=floor)
    rank, floor = int(jnp.max(found.rank)), float(jnp.max(found.floor))
    error = float(jnp.max(mean.error))
    return Selected(path, shape, rank, values, floor, error, slices * sum(shape))


def shapes(model: nnx.Module, targets: Targets) -> dict[str, tuple[tuple[int, int], int]]:
    """Shape (m, n) of each layer's kernel, read as a matrix, and how many such slices it has.

    Args:
      model: an NNX module, adapted or not.
      targets: as for `adapt`; only the option `axes` is read.

    Returns:
      By path.

    Raises:
      ValueError: for targets without a match.
    """
    found, sizes = paths.find(model), {}
    for path, entry, _ in paths.select(model, targets, found):
        layer = found[path]
        base = layer.base if isinstance(layer, Adapted) else layer
        view = layout(base, axes_of(entry, path))
        sizes[path] = view.shape, int(np.prod(view.stack + view.slices, dtype=int))
    return sizes


def _within(
    selected: list[Selected], budget: int | None, max_rank: int | None
) -> tuple[Selected, ...]:
    """The same layers with ranks that a bound and a budget of parameters allow."""
    if max_rank is not None:
        selected = [each._replace(rank=min(each.rank, max_rank)) for each in selected]
    if budget is None:
        return tuple(selected)
    spectra = {each.path: _strengths(each)[: each.rank] for each in selected}
    costs = {each.path: each.cost for each in selected}
    chosen = ranks.allocate(spectra, costs, budget)
    return tuple(each._replace(rank=chosen[each.path]) for each in selected)


def _strengths(layer: Selected) -> Array:
    """What each direction holds in all slices together, which share one rank."""
    values = layer.singular_values.reshape(-1, layer.singular_values.shape[-1])
    return jnp.sqrt(jnp.sum(values**2, axis=0))
