"""Ways to spread a budget of parameters over layers, each in one place: `METHODS`.

A way says what each further direction of a layer is worth, and how many stand above noise. `spread`
takes the directions in the order of worth for each parameter until the budget is spent to the last
parameter, whatever the way, so that what is compared afterwards has equally many.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax import adapters, data, initializers
from lorajax.adapters import paths
from lorajax.adapters.selection import shapes
from lorajax.adapters.surgery import Targets
from lorajax.environment.judging import at_least, judged
from lorajax.finetune import setup
from lorajax.tasks import Task

Worth = dict[str, np.ndarray]
"""Of each layer by path what its directions are worth, in decreasing order."""


class Signals:
    """What ways to choose ranks look at, measured when it is asked for and then kept.

    Args:
      model: pretrained, its head fitted, in evaluation mode.
      task: what a batch means to it.
      train: what to measure on.
      targets: layers to adapt.
      samples: that gradients and moments are averaged over, at most.

    Attributes:
      sizes: (m, n) of the layers' kernels by path.
      costs: parameters that one direction takes, by path.
      seconds: of processor time that each measurement took, by its name.
    """

    @judged(samples=at_least(2))
    def __init__(
        self,
        model: Any,
        task: Task,
        train: data.Table,
        targets: Targets = "**",
        samples: int = 2048,
    ):
        self._model = model
        self._given = {"targets": targets, "samples": samples}
        self._all = model, task, train
        found = shapes(model, targets)
        self.sizes = {path: shape for path, (shape, _) in found.items()}
        self.costs = {path: slices * sum(shape) for path, (shape, slices) in found.items()}
        self.seconds: dict[str, float] = {}
        self._kept: dict[str, Any] = {}
        batches = setup.batches_of(train, samples)
        self.samples = sum(len(next(iter(batch.values()))) for batch in batches)

    def _measured(self, name: str, measure: Callable[..., Any], **options: Any) -> Any:
        if name not in self._kept:
            begin = time.process_time()
            self._kept[name] = jax.block_until_ready(measure(*self._all, **self._given, **options))
            self.seconds[name] = time.process_time() - begin
        return self._kept[name]

    def selection(self, rule: str) -> adapters.Selection:
        """Ranks by a rule of `ranks.rules`, and the spectra behind them."""
        return self._measured(rule, setup.select_ranks, rule=rule)

    @property
    def gradients(self) -> Mapping[str, adapters.Gradient]:
        """The gradient of each layer's kernel, by path."""
        return self.selection("split_half").gradients

    @property
    def moments(self) -> dict[str, Array]:
        """The second moment of each layer's inputs, by path."""
        return self._measured("moments", setup.moments_of)

    @property
    def kernels(self) -> dict[str, Array]:
        """Each layer's kernel as a matrix, by path."""
        adapted = setup.adapt(
            self._model, [*map(paths.escape, self.costs)], key=jax.random.key(0), rank=1
        )
        bases = {path: layer.base for path, layer in adapters.layers(adapted).items()}
        return {p: adapters.layout(b).matrix(adapters.kernel_of(b)) for p, b in bases.items()}


def _evenly(signals: Signals, shares: Mapping[str, Any]) -> tuple[Worth, dict[str, int]]:
    """Worth by which ranks are proportional to shares for each parameter (Webster's method)."""
    worth = {}
    for path, share in shares.items():
        places = np.arange(min(signals.sizes[path]), dtype=np.float64)
        worth[path] = share / (places + 0.5)
    return worth, {path: len(each) for path, each in worth.items()}


def one_everywhere(signals: Signals) -> tuple[Worth, dict[str, int]]:
    """The same rank in all layers."""
    return _evenly(signals, signals.costs)


def above_noise(signals: Signals, rule: str) -> tuple[Worth, dict[str, int]]:
    """Energy of the gradient's directions, those above the rule's floor before all others."""
    layers = signals.selection(rule).layers
    worth = {each.path: _energies(each.singular_values) for each in layers}
    return worth, {each.path: each.rank for each in layers}


def by_energy(signals: Signals, share: float = 1.0) -> tuple[Worth, dict[str, int]]:
    """Energy of the gradient's directions, whatever the noise; of a share of them at most."""
    worth = {path: _energies(each.singular_values) for path, each in signals.gradients.items()}
    worth = {path: each[: max(1, int(share * len(each)))] for path, each in worth.items()}
    return worth, {path: len(each) for path, each in worth.items()}


def by_inputs(signals: Signals) -> tuple[Worth, dict[str, int]]:
    """Share of the layer's input variance that a direction explains: EVA's."""
    worth = {}
    for path, moment in signals.moments.items():
        values = np.maximum(np.asarray(_eigenvalues(moment), np.float64), 0)
        worth[path] = (values / values.sum())[: min(signals.sizes[path])]
    return worth, {path: len(each) for path, each in worth.items()}


def by_importance(signals: Signals) -> tuple[Worth, dict[str, int]]:
    """Ranks in proportion to the layer's mean |W ∘ G|: GoRA's, without its bounds."""
    kernels = signals.kernels
    shares = {
        path: float(jnp.mean(jnp.abs(kernels[path] * each.matrix)))
        for path, each in signals.gradients.items()
    }
    return _evenly(signals, shares)


def _energies(values: Array) -> np.ndarray:
    """Squares, of stack and slices together: they share one rank."""
    squares = np.asarray(values, np.float64) ** 2
    return squares.reshape(-1, squares.shape[-1]).sum(axis=0)


@jax.jit
def _eigenvalues(moment: Float[Array, "m m"]) -> Float[Array, " m"]:
    return jnp.linalg.eigvalsh(moment)[::-1]


class Method(NamedTuple):
    """One way to train adapters of a budget.

    Attributes:
      said: for a reader.
      worth: of a layer's directions, and how many stand above noise; None for full fine-tuning.
      passes: what choosing takes of each sample that it looks at, in forward passes.
      needs: what it reads, by the names in `Signals.seconds`.
      start: an initializer or its name.
      kind: "lora", "adalora" or "full".
      share: of the budget.
    """

    said: str
    worth: Callable[[Signals], tuple[Worth, dict[str, int]]] | None
    passes: float = 0.0
    needs: tuple[str, ...] = ()
    start: Any = "orthogonal"
    kind: str = "lora"
    share: float = 1.0


FORWARD, BACKWARD, KERNELS = 1.0, 1.0, 1.0
"""Of one sample: the products with the kernels on the way forward, those that carry the gradient
back through them, and those that form the gradients of the kernels: equally many operations."""
TRAINING = {
    "lora": FORWARD + BACKWARD,
    "adalora": FORWARD + BACKWARD,
    "full": FORWARD + BACKWARD + KERNELS,
}
"""Of a sample in training; the adapters' own products, a few percent, are left out."""
_GRADIENT = FORWARD + BACKWARD + KERNELS
GORA_STEP = 0.05
"""The γ of GoRA's start, its paper's value (recalled)."""

METHODS: dict[str, Method] = {
    "uniform": Method("one rank everywhere", one_everywhere),
    "rule": Method(
        "rank rule, split half",
        functools.partial(above_noise, rule="split_half"),
        _GRADIENT,
        ("split_half",),
    ),
    "signs": Method(
        "rank rule, random signs",
        functools.partial(above_noise, rule="random_signs"),
        _GRADIENT + BACKWARD + KERNELS,
        ("random_signs",),
    ),
    "whitened": Method(
        "rank rule, whitened",
        functools.partial(above_noise, rule="whitened"),
        _GRADIENT + FORWARD,
        ("whitened",),
    ),
    "energy": Method("energy of the gradient", by_energy, _GRADIENT, ("split_half",)),
    "LoRA-GA": Method(
        "energy, LoRA-GA's start",
        # Its start takes twice as many singular directions as it has columns.
        functools.partial(by_energy, share=0.5),
        _GRADIENT,
        ("split_half",),
        "lora_ga",
    ),
    "GoRA": Method(
        "GoRA, ranks and start",
        by_importance,
        _GRADIENT,
        ("split_half",),
        functools.partial(initializers.gora, gamma=GORA_STEP),
    ),
    "EVA": Method("EVA, ranks and start", by_inputs, FORWARD, ("moments",), "eva"),
    "AdaLoRA": Method(
        "AdaLoRA",
        one_everywhere,
        start=functools.partial(initializers.balanced, scale=1.0),
        kind="adalora",
    ),
    "full": Method("full fine-tuning", None, kind="full"),
    "starved": Method(
        "control: the rule with a tenth of the budget",
        functools.partial(above_noise, rule="split_half"),
        _GRADIENT,
        ("split_half",),
        share=0.1,
    ),
}
"""By name; full fine-tuning is what they are all measured by, and "starved" a negative control."""


class Spread(NamedTuple):
    """A budget, spread over layers.

    Attributes:
      ranks: by path, of all layers.
      parameters: that they take.
      filled: of these, the parameters of directions that do not stand above noise: what is left of
        the budget after those that do.
    """

    ranks: dict[str, int]
    parameters: int
    filled: int


@judged(budget=at_least(0))
def spread(
    worth: Mapping[str, np.ndarray],
    found: Mapping[str, int],
    costs: Mapping[str, int],
    budget: int,
    *,
    exact: bool = True,
) -> Spread:
    """Ranks that spend a budget, to the last parameter.

    Directions are taken by worth for each parameter, those above noise first. What then is left,
    less than the next direction takes, is spent by the least change: as few parameters as possible
    move, those worth most come in, and those worth least go.

    Args:
      worth: of each layer's directions, in decreasing order; as many as its rank may be.
      found: how many of them stand above noise.
      costs: parameters that one direction takes.
      budget: in all.
      exact: False leaves over what does not fit.

    Returns:
      A Spread.

    Raises:
      ValueError: for a budget that no ranks spend exactly, or that exceeds what all layers take.

    Example:
      >>> import numpy as np
      >>> from lorajax.finetune import allocations
      >>> worth = {"a": np.array([9.0, 4.0, 1.0]), "b": np.array([8.0, 7.0, 0.0])}
      >>> allocations.spread(worth, {"a": 2, "b": 1}, {"a": 2, "b": 3}, 8).ranks
      {'a': 1, 'b': 2}

    Source: derived; greedy as `ranks.allocate`, then a subset sum over the few distinct costs.
    """
    most = {path: len(values) for path, values in worth.items()}
    whole = sum(most[path] * cost for path, cost in costs.items())
    if budget > whole:
        raise ValueError(f"budget is {budget}; all directions of all layers take {whole}.")
    chosen = dict.fromkeys(worth, 0)
    left = budget
    for among in (found, most):
        candidates = sorted(
            (-values[i] / costs[path], order, i, path)
            for order, (path, values) in enumerate(worth.items())
            for i in range(chosen[path], among[path])
        )
        for _, _, i, path in candidates:
            # A direction only counts behind the stronger ones of its own layer.
            if chosen[path] == i and costs[path] <= left:
                chosen[path] += 1
                left -= costs[path]
    if left and exact:
        _exchange(chosen, worth, costs, left)
    spent = sum(rank * costs[path] for path, rank in chosen.items())
    filled = sum(max(0, rank - found[path]) * costs[path] for path, rank in chosen.items())
    return Spread(chosen, spent, filled)


def _exchange(
    chosen: dict[str, int], worth: Mapping[str, np.ndarray], costs: Mapping[str, int], left: int
) -> None:
    """Spends what is left by moving as few parameters as possible; `chosen` is changed."""
    groups: dict[int, list[str]] = {}
    for path, cost in costs.items():
        groups.setdefault(cost, []).append(path)
    # No combination needs more of one cost (Bézout).
    reach = max(groups) // math.gcd(*groups)
    sums: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for cost, layers in groups.items():
        least = -min(reach, sum(chosen[path] for path in layers))
        room = sum(len(worth[path]) - chosen[path] for path in layers)
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for amount, (moved, shifts) in sums.items():
            for shift in range(least, min(reach, room) + 1):
                one = moved + abs(shift) * cost, (*shifts, shift)
                at = amount + shift * cost
                if at not in reached or one < reached[at]:
                    reached[at] = one
        sums = reached
    if left not in sums:
        raise ValueError(
            f"budget leaves {left} parameters over that no ranks spend, at costs of "
            f"{', '.join(map(str, sorted(groups)))} a direction; take a multiple of one rank in "
            "all layers."
        )
    for (_, layers), shift in zip(groups.items(), sums[left][1], strict=True):
        for _ in range(shift):
            open_ = [path for path in layers if chosen[path] < len(worth[path])]
            chosen[max(open_, key=lambda path: worth[path][chosen[path]])] += 1
        for _ in range(-shift):
            taken = [path for path in layers if chosen[path]]
            chosen[min(taken, key=lambda path: worth[path][chosen[path] - 1])] -= 1


@judged
def check_methods(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is none of METHODS."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"methods name {unknown[0]!r}; known are {', '.join(METHODS)}.")
