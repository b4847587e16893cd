"""What the data says about each layer before training: gradients and inputs, streamed over batches.

The gradient of a large layer is never formed. A *probe* takes its place: a LoRA whose one factor is
zero and trainable and whose other is fixed. With G the gradient of the kernel, `∂L/∂A = G Bᵀ` at
A = 0 and `∂L/∂B = Aᵀ G` at B = 0 (theory section 1), so the gradient of a probe *is* a sketch of G,
at the cost of a LoRA step. One pass with B random finds the range, orthonormalized to Q; a second
with A = Q gives `Qᵀ G`, and `Q Qᵀ G` is the randomized SVD's approximation.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lorajax.adapters import paths
from lorajax.adapters.kinds import LoRA, axes_of
from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import kernel_name, layout
from lorajax.adapters.surgery import Targets
from lorajax.factors import Factors
from lorajax.initializers import PRNGKey

Loss = Callable[[Any, Any], Array]

_PROBE = "probe"
_HELD_OUT = 6
"""Columns of a sketch that only measure its error; each one costs a factor 10 in its failure
rate."""


class Gradient(NamedTuple):
    """The gradient of one kernel, read as a matrix: in full, or as `basis @ core`.

    Attributes:
      basis: orthonormal columns (*lead, m, p), or None where `core` is the gradient itself.
      core: (*lead, p, n), or (*lead, m, n).
      error: bound of the spectral norm of what the sketch left out, which fails with probability
        1e-6 at most; 0 in full.
    """

    basis: Float[Array, "*lead m p"] | None
    core: Float[Array, "*lead p n"]
    error: Float[Array, "*lead"]

    @property
    def matrix(self) -> Float[Array, "*lead m n"]:
        """The gradient as a matrix, formed here and now."""
        return self.core if self.basis is None else self.basis @ self.core

    @property
    def singular_values(self) -> Float[Array, "*lead k"]:
        """In decreasing order; never above the gradient's own, and `√(σ² + error²)` never below."""
        return jnp.linalg.svd(self.core, compute_uv=False)

    @property
    def norm(self) -> Float[Array, "*lead"]:
        """The largest singular value alone, from the smaller Gram matrix; cheaper than all."""
        g = self.core if self.core.shape[-2] <= self.core.shape[-1] else self.core.mT
        return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(g @ g.mT)[..., -1], 0))


class Estimate(NamedTuple):
    """Gradients of one layer over all batches.

    Attributes:
      mean: gradient of the mean loss.
      noise: its half-difference over two halves of the data, or the gradient of the randomly signed
        losses; None where no noise was asked for.
    """

    mean: Gradient
    noise: Gradient | None


def gradients(
    model: nnx.Module,
    loss: Loss,
    batches: Iterable[Any],
    targets: Targets = "**",
    *,
    memory: int = 2**30,
    width: int = 64,
    key: PRNGKey | None = None,
) -> dict[str, Gradient]:
    """The gradient of the mean loss for each layer, streamed over batches.

    Args:
      model: an NNX module, in the mode (train or eval) that the loss is meant in. Not changed.
      loss: `loss(model, batch)`, the mean loss of the batch or one loss a sample.
      batches: an iterable of batches whose leaves lead with the sample axis; it is gone through
        twice where a layer is sketched.
      targets: as for `adapt`; only the option `axes` is read.
      memory: bytes that the gradients may take. The largest layers are sketched until they fit.
      width: columns of a sketch, at least the rank that is wanted plus some; each layer's takes
        (m + n) · width numbers.
      key: for the sketches; key 0 if None.

    Returns:
      A Gradient for each layer, by path; give them to `adapt` as `gradients`.

    Raises:
      ValueError: for targets without a match, no batches, an iterator where two passes are needed,
        a loss of the wrong shape, or a gradient that is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> loss = lambda model, batch: jnp.mean((model(batch) - 1) ** 2)
      >>> estimate = adapters.gradients(model, loss, [jnp.ones((8, 4), "float32")])
      >>> adapted = adapters.adapt(model, key=jax.random.key(0), rank=1, start="lora_one",
      ...                          gradients=estimate)
    """
    found = estimate(
        model, loss, batches, targets, noise="none", memory=memory, width=width, key=key
    )
    return {path: each.mean for path, each in found.layers.items()}


class Estimates(NamedTuple):
    """What `estimate` returns.

    Attributes:
      layers: an Estimate for each layer, by path.
      samples: number of samples that the loss was averaged over.
      passes: number of times the batches were gone through.
    """

    layers: dict[str, Estimate]
    samples: int
    passes: int


def estimate(
    model: nnx.Module,
    loss: Loss,
    batches: Iterable[Any],
    targets: Targets = "**",
    *,
    noise: str = "none",
    memory: int = 2**30,
    width: int = 64,
    key: PRNGKey | None = None,
) -> Estimates:
    """Gradients of each layer and, if asked for, what their noise looks like.

    Args:
      model: as for `gradients`, and so are the arguments that are not named here.
      loss: with `noise="signs"` it must return one loss a sample.
      batches: with `noise="halves"`, two at least; even and odd ones make the halves.
      targets: as for `adapt`.
      noise: "none", "halves" (no further cost) or "signs" (one more backward pass a batch).
      memory: bytes, over both gradients of each layer.
      width: columns of a sketch.
      key: for sketches and signs; key 0 if None.

    Returns:
      The Estimates.

    Raises:
      ValueError: as for `gradients`.
    """
    key = jax.random.key(0) if key is None else key
    if noise not in ("none", "halves", "signs"):
        raise ValueError(f"noise is {noise!r}; it must be 'none', 'halves' or 'signs'.")
    if width < 1:
        raise ValueError(f"width is {width}; a sketch needs at least one column.")
    channels = 1 if noise == "none" else 2
    copy = nnx.clone(model)
    found = paths.find(copy)
    views, axes, kernels = {}, {}, {}
    for path, entry, _ in paths.select(copy, targets, found):
        layer = found[path]
        base = layer.base if isinstance(layer, Adapted) else layer
        axes[path] = axes_of(entry, path)
        views[path] = layout(base, axes[path])
        inside = ("base",) if isinstance(layer, Adapted) else ()
        kernels[path] = (*paths.segments(path), *inside, kernel_name(base))
    columns = width + _HELD_OUT
    sketched = _plan(views, memory, columns, channels)
    if sketched and iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, and {len(sketched)} layers are sketched, which takes two "
            "passes; give a list, or an object that can be gone through again."
        )
    key_probe, key_signs = jax.random.split(key)
    probes = {}
    for path in sketched:
        (m, n), lead = views[path].shape, views[path].stack + views[path].slices
        probe_key = jax.random.fold_in(key_probe, zlib.crc32(path.encode()))
        omega = jax.random.normal(probe_key, (*lead, columns, n), jnp.float32)
        zero = jnp.zeros((*lead, m, columns), jnp.float32)
        probes[path] = LoRA(Factors(zero, omega), axes=axes[path])
    full = {kernels[path] for path in views if path not in probes}

    def wrt(path: tuple[Any, ...], _: Any) -> bool:
        return tuple(map(str, path)) in full or _is_probe(path, "a")

    sums, samples = _accumulate(_probed(copy, probes), wrt, loss, batches, noise, key_signs)
    states = [dict(nnx.to_flat_state(state)) for state in sums]
    results: dict[str, list[Gradient]] = {}
    for path in views:
        if path not in probes:
            matrices = [views[path].matrix(_leaf(state, kernels[path])) for state in states]
            zero = jnp.zeros(matrices[0].shape[:-2], jnp.float32)
            results[path] = [Gradient(None, g.astype(jnp.float32), zero) for g in matrices]
    if probes:
        ranges = {path: [_probe_leaf(state, path, "a") for state in states] for path in probes}
        arguments = (loss, batches, noise, key_signs)
        results.update(_project(copy, views, axes, ranges, arguments))
    layers = _mean_and_noise({path: results[path] for path in views}, noise)
    finite = _finite([each.mean.core for each in layers.values()])
    for path, good in zip(layers, np.asarray(finite), strict=True):
        if not good:
            raise ValueError(
                f"the gradient of {path!r} is not finite; look at the loss on these batches."
            )
    return Estimates(layers, samples, 2 if probes else 1)


def _leaf(state: Mapping[tuple[Any, ...], Any], location: tuple[str, ...]) -> Array:
    for path, value in state.items():
        if tuple(map(str, path)) == location:
            return value[...]
    raise KeyError(location)


def _plan(views: Mapping[str, Any], memory: int, columns: int, channels: int) -> list[str]:
    """The layers to sketch: the largest ones, until the sum of all gradients fits the memory."""
    cost, saving = {}, {}
    for path, view in views.items():
        (m, n), lead = view.shape, int(np.prod(view.stack + view.slices, dtype=int))
        cost[path] = 4 * channels * lead * m * n
        saving[path] = cost[path] - 4 * channels * lead * (m + n) * columns
    total, chosen = sum(cost.values()), []
    for path in sorted(cost, key=lambda path: -saving[path]):
        if total <= memory or saving[path] <= 0:
            break
        total -= saving[path]
        chosen.append(path)
    return chosen


def _probed(model: Any, probes: Mapping[str, LoRA]) -> Any:
    """A copy of the model with probes beside what it computes; they add zero to it."""

    def visit(path: str, layer: nnx.Module) -> Any:
        if path not in probes:
            return layer if isinstance(layer, Adapted) else None
        adapted = layer if isinstance(layer, Adapted) else Adapted(layer)
        adapted.adapters[_PROBE] = probes[path]
        adapted.active = (*adapted.active, (_PROBE, 1.0))
        return adapted

    return paths.replace(nnx.clone(model), visit) if probes else model


def _is_probe(path: tuple[Any, ...], factor: str) -> bool:
    return tuple(map(str, path[-3:])) == ("adapters", _PROBE, factor)


def _probe_leaf(state: Mapping[tuple[Any, ...], Any], path: str, factor: str) -> Array:
    return _leaf(state, (*paths.segments(path), "adapters", _PROBE, factor))


def _accumulate(
    model: nnx.Module,
    wrt: Callable[[tuple[Any, ...], Any], bool],
    loss: Loss,
    batches: Iterable[Any],
    noise: str,
    key: PRNGKey,
) -> tuple[list[Any], int]:
    """Gradients with respect to what `wrt` lets through: of the mean, or of the two channels.

    The channels are the two halves' means for "halves", and mean and signed mean for "signs".
    """
    graphdef, diff, rest = nnx.split(model, wrt, ...)
    signed = noise == "signs"
    halves = 2 if noise == "halves" else 1

    def losses_of(diff: Any, rest: Any, batch: Any) -> Array:
        return loss(nnx.merge(graphdef, diff, rest), batch)

    # Sums are donated, so that memory holds the running sum and not two of them.
    @functools.partial(jax.jit, donate_argnums=2)
    def step(diff: Any, rest: Any, sums: list[Any], batch: Any, index: Array) -> list[Any]:
        losses, pull = jax.vjp(lambda d: losses_of(d, rest, batch), diff)
        # The gradient of a sum over samples, so that batches of any size add up.
        weight = 1 if losses.ndim else _leading(batch)
        cotangents = [jnp.full_like(losses, weight)]
        if signed:
            signs_key = jax.random.fold_in(key, index)
            cotangents.append(jax.random.rademacher(signs_key, losses.shape, losses.dtype))
        grads = [pull(cotangent)[0] for cotangent in cotangents]
        return [jax.tree.map(jnp.add, s, g) for s, g in zip(sums, grads, strict=True)]

    sums = [[_zeros(diff) for _ in range(1 + signed)] for _ in range(halves)]
    counts, known = [0] * halves, {}
    for index, batch in enumerate(batches):
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        if shapes not in known:
            result = jax.eval_shape(losses_of, diff, rest, batch)
            known[shapes] = _check_losses(result, signed, batch)
        half = index % halves
        sums[half] = step(diff, rest, sums[half], batch, np.int32(index))
        counts[half] += known[shapes]
    if 0 in counts:
        raise ValueError(
            f"batches hold {sum(count > 0 for count in counts)}; "
            + ("two halves need two at least." if halves == 2 else "at least one is needed.")
        )
    means = [
        _divided(each, jnp.float32(count))
        for group, count in zip(sums, counts, strict=True)
        for each in group
    ]
    return means, sum(counts)


# One program for all leaves: one by one, each shape would compile several small ones.
@jax.jit
def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


@jax.jit
def _divided(tree: Any, count: Array) -> Any:
    return jax.tree.map(lambda x: x / count.astype(x.dtype), tree)


@jax.jit
def _finite(arrays: list[Array]) -> Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays])


@jax.jit
def _half_sum_and_difference(first: list[Array], second: list[Array]) -> tuple[list[Array], ...]:
    pairs = list(zip(first, second, strict=True))
    return [(a + b) / 2 for a, b in pairs], [(a - b) / 2 for a, b in pairs]


def _leading(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves or not np.ndim(leaves[0]):
        raise ValueError("batches hold one without arrays; leaves must lead with the sample axis.")
    return np.shape(leaves[0])[0]


def _check_losses(losses: Any, signed: bool, batch: Any) -> int:
    """The number of samples in a batch; raises ValueError unless the loss has a shape to use."""
    if losses.ndim == 1:
        return losses.shape[0]
    if losses.ndim == 0 and not signed:
        return _leading(batch)
    raise ValueError(
        f"loss returns an array of shape {losses.shape}; it must be "
        + (
            "one loss a sample, shape (samples,), since the losses get signs."
            if signed
            else "the batch's mean loss, or one loss a sample, shape (samples,)."
        )
    )


def _mean_and_noise(results: dict[str, list[Gradient]], noise: str) -> dict[str, Estimate]:
    """Mean and noise of each layer out of the channels that were accumulated."""
    if noise == "none":
        return {path: Estimate(channels[0], None) for path, channels in results.items()}
    if noise == "signs":
        return {path: Estimate(*channels) for path, channels in results.items()}
    firsts, seconds = zip(*results.values(), strict=True)
    means, differences = _half_sum_and_difference(
        [each.core for each in firsts], [each.core for each in seconds]
    )
    errors, _ = _half_sum_and_difference(
        [each.error for each in firsts], [each.error for each in seconds]
    )
    found = zip(results, firsts, means, differences, errors, strict=True)
    return {
        path: Estimate(Gradient(x.basis, mean, error), Gradient(x.basis, difference, error))
        for path, x, mean, difference, error in found
    }


def _project(
    model: nnx.Module,
    views: Mapping[str, Any],
    axes: Mapping[str, Any],
    ranges: Mapping[str, list[Array]],
    arguments: tuple[Any, ...],
) -> dict[str, list[Gradient]]:
    """The second pass: what of the gradients lies in the ranges that the first pass has found."""
    bases, errors, probes = {}, {}, {}
    for path, (*channels,) in ranges.items():
        kept = jnp.concatenate([y[..., :-_HELD_OUT] for y in channels], axis=-1)
        q, _ = jnp.linalg.qr(kept)
        held = [y[..., -_HELD_OUT:] for y in channels]
        left = [y - q @ (q.mT @ y) for y in held]
        # Halko, Martinsson, Tropp 2011, lemma 4.1 (recalled): the spectral norm is at most
        # 10 √(2/π) max ‖·ω‖ over h Gaussian vectors ω, except with probability 10^−h.
        bound = 10 * (2 / np.pi) ** 0.5
        errors[path] = [bound * jnp.max(jnp.linalg.norm(y, axis=-2), axis=-1) for y in left]
        bases[path] = q
        lead = q.shape[:-2]
        b = jnp.zeros((*lead, q.shape[-1], views[path].shape[1]), q.dtype)
        probes[path] = LoRA(Factors(q, b), axes=axes[path])
    probed = _probed(model, probes)
    sums, _ = _accumulate(probed, lambda path, _: _is_probe(path, "b"), *arguments)
    states = [dict(nnx.to_flat_state(state)) for state in sums]
    return {
        path: [
            Gradient(q, _probe_leaf(state, path, "b"), error)
            for state, error in zip(states, errors[path], strict=True)
        ]
        for path, q in bases.items()
    }


class Recorder(Adapted):
    """A layer that adds up the second moment of its inputs; for `input_moments` only."""

    def __init__(self, base: nnx.Module, axes: Any):
        super().__init__(base)
        self.axes = axes
        m = layout(getattr(base, "base", base), axes).shape[0]
        self.moment = nnx.BatchStat(jnp.zeros((m, m), jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.float32))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Records the input and calls the layer."""
        base = self.base.base if isinstance(self.base, Adapted) else self.base
        rows = layout(base, self.axes).rows(x).astype(jnp.float32)
        self.moment[...] += rows.T @ rows
        self.count[...] += rows.shape[0]
        return self.base(x, *args, **kwargs)  # type: ignore[operator]


def input_moments(
    model: nnx.Module,
    batches: Iterable[Any],
    targets: Targets = "**",
    *,
    forward: Callable[[Any, Any], Any] | None = None,
) -> dict[str, Array]:
    """The second moment `E[x xᵀ]` of each layer's inputs, streamed over batches.

    Args:
      model: an NNX module. It is not changed.
      batches: an iterable of batches.
      targets: as for `adapt`; only the option `axes` is read.
      forward: runs the model on a batch; `model(batch)` if None.

    Returns:
      A float32 matrix (m, m) for each layer by path, m the rows of its kernel; for a convolution
      the mean over its windows. Give them to `adapt` as `inputs`.

    Raises:
      ValueError: for targets without a match, layers whose inputs are indices, stacked layers, no
        batches, or a layer that the forward pass never calls.
    """
    copy = nnx.clone(model)
    chosen: dict[str, Any] = {}
    found = paths.find(copy)
    for path, entry, _ in paths.select(copy, targets, found):
        chosen[path] = axes_of(entry, path)
        layer = found[path]
        base = layer.base if isinstance(layer, Adapted) else layer
        view = layout(base, chosen[path])
        if view.stack or view.slices or isinstance(base, nnx.Embed):
            raise ValueError(
                f"the layer {path!r} has no second moment of inputs: "
                + (
                    "its inputs are indices."
                    if isinstance(base, nnx.Embed)
                    else "its stacked or separate kernels see different inputs."
                )
            )

    def visit(path: str, layer: nnx.Module) -> Any:
        if path in chosen:
            return Recorder(layer, chosen[path])
        return layer if isinstance(layer, Adapted) else None

    recording = paths.replace(copy, visit)
    run = forward or (lambda model, batch: model(batch))

    @nnx.jit
    def step(model: Any, batch: Any) -> None:
        run(model, batch)

    for batch in batches:
        step(recording, batch)
    moments = {}
    for path, layer in paths.find(recording).items():
        if isinstance(layer, Recorder):
            if not float(layer.count[...]):
                raise ValueError(f"the layer {path!r} saw no input on these batches.")
            moments[path] = layer.moment[...] / layer.count[...]
    return moments
