"""Ranks for each layer, from the gradient before training."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lorajax import ranks
from lorajax.adapters import paths
from lorajax.adapters.gradients import Gradient, Loss, estimate
from lorajax.adapters.kinds import axes_of
from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import layout
from lorajax.adapters.surgery import Targets
from lorajax.adapters.tables import table
from lorajax.initializers import PRNGKey


class Selected(NamedTuple):
    """One layer of a selection.

    Attributes:
      path: the layer's path.
      shape: (m, n) of its kernel, read as a matrix.
      rank: 0 leaves the layer alone. For layers with a stack or slices the largest of their ranks.
      singular_values: of the gradient, in decreasing order; of all matrices, for stack and slices.
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
      samples: number of samples behind the gradients.
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


def select_ranks(
    model: nnx.Module,
    loss: Loss,
    batches: Iterable[Any],
    rule: str = "split_half",
    targets: Targets = "**",
    *,
    constant: float | int | None = None,
    noise: float | int | None = None,
    fraction: float | int = 0.9,
    margin: float | int | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    memory: int = 2**30,
    width: int = 64,
    key: PRNGKey | None = None,
) -> Selection:
    """Ranks for each layer from the spectrum of its gradient before fine-tuning.

    Args:
      model: an NNX module, in the mode that the loss is meant in. Not changed.
      loss: `loss(model, batch)`, the mean loss of the batch or one loss a sample (needed by
        "random_signs").
      batches: an iterable of batches whose leaves lead with the sample axis.
      rule: "split_half" and "random_signs" count what stands above the measured noise and need no
        constant; "c_over_n" counts `σ² ≥ C/n`; "energy" takes a fraction of `Σσ²`.
      targets: as for `adapt`; only the option `axes` is read.
      constant: C, for "c_over_n".
      noise: standard deviation of the labels' noise, from which "c_over_n" derives a C for each
        layer (see `ranks.noise_constant`); instead of `constant`.
      fraction: for "energy", in (0, 1].
      margin: δ by which `floor²` is raised, against counting noise as signal; None for
        `ranks.edge_margin` of each layer's shape, which lets about 1 layer in 1000 gain a rank by
        chance, and 0 for a C that was given as `constant`.
      budget: parameters in all: `ranks.allocate` spends them on the singular values that the rule
        has let through, by energy for each parameter.
      max_rank: upper bound of each rank.
      memory: bytes that gradients may take; the largest layers are sketched beyond them.
      width: columns of a sketch; no rank of a sketched layer can be larger.
      key: for sketches and signs; key 0 if None.

    Returns:
      A Selection.

    Raises:
      ValueError: for an unknown rule, missing or superfluous constants, or as `gradients`.

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
    kinds: dict[str, str] = {
        "split_half": "halves",
        "random_signs": "signs",
        "c_over_n": "none",
        "energy": "none",
    }
    if rule not in kinds:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(map(repr, kinds))}.")
    if rule == "c_over_n" and (constant is None) == (noise is None):
        raise ValueError("rule 'c_over_n' needs either constant or noise, and not both.")
    if rule != "c_over_n" and not (constant is None and noise is None):
        raise ValueError(f"rule {rule!r} takes neither constant nor noise; 'c_over_n' does.")
    if margin is not None and margin < 0:
        raise ValueError(f"margin is {margin}; it must be at least 0.")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; it must be at least 1.")
    found = estimate(
        model, loss, batches, targets, noise=kinds[rule], memory=memory, width=width, key=key
    )
    shapes = _shapes(model, targets)
    selected = []
    for path, (mean, noisy) in found.layers.items():
        values = mean.singular_values
        shape, count = shapes[path]
        if rule == "energy":
            counts, floor = ranks.energy(values, fraction), 0.0
        else:
            if noisy is not None:
                floors = noisy.norm
            else:
                c = ranks.noise_constant(shape, noise) if noise is not None else constant
                assert c is not None
                floors = jnp.full(values.shape[:-1], (c / found.samples) ** 0.5, values.dtype)
            raised = margin
            if raised is None:
                raised = ranks.edge_margin(shape) if constant is None else 0.0
            floors = floors * (1 + raised) ** 0.5
            counts, floor = ranks.above(values, floors), float(jnp.max(floors))
        rank = int(jnp.max(counts))
        rank = rank if max_rank is None else min(rank, max_rank)
        error = float(jnp.max(mean.error))
        cost = count * sum(shape)
        selected.append(Selected(path, shape, rank, values, floor, error, cost))
    if budget is not None:
        selected = _within(selected, budget)
    gradients = {path: each.mean for path, each in found.layers.items()}
    return Selection(tuple(selected), rule, found.samples, found.passes, gradients)


def _shapes(model: nnx.Module, targets: Targets) -> dict[str, tuple[tuple[int, int], int]]:
    found, shapes = paths.find(model), {}
    for path, entry, _ in paths.select(model, targets, found):
        layer = found[path]
        base = layer.base if isinstance(layer, Adapted) else layer
        view = layout(base, axes_of(entry, path))
        shapes[path] = view.shape, int(np.prod(view.stack + view.slices, dtype=int))
    return shapes


def _within(selected: list[Selected], budget: int) -> list[Selected]:
    """The same layers with ranks that a budget of parameters allows."""
    spectra = {}
    for each in selected:
        # Slices share one rank, so a direction is worth what it holds in all of them together.
        values = each.singular_values.reshape(-1, each.singular_values.shape[-1])
        spectra[each.path] = jnp.sqrt(jnp.sum(values**2, axis=0))[: each.rank]
    costs = {each.path: each.cost for each in selected}
    chosen = ranks.allocate(spectra, costs, budget)
    return [each._replace(rank=chosen[each.path]) for each in selected]
