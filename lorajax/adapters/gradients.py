"""What the data says about each layer before training: its gradient, streamed over batches.

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
from lorajax.adapters.keeping import Kept
from lorajax.adapters.kinds import LoRA, axes_of
from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import Layout, kernel_name, layout
from lorajax.adapters.surgery import Targets
from lorajax.environment.judging import at_least, judged
from lorajax.factors import Factors
from lorajax.initializers import PRNGKey

Loss = Callable[[Any, Any], Array | tuple[Array, Array]]
"""`loss(model, batch)`: the batch's mean loss; or one loss a sample; or two arrays (samples,), sums
of losses and how many answers each sums up, of which the gradient is that of Σ loss / Σ count."""

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
      mean: gradient of the mean loss, Σ loss / Σ count.
      noise: the difference of the means of two halves of the data, `√(w (1 − w)) (G₁ − G₂)` with
        the share w of the answers in the first (half of it, for equal halves), which has the noise
        of the mean; or the gradient of the randomly signed losses; None where none was asked for.
    """

    mean: Gradient
    noise: Gradient | None


@judged(memory=at_least(0))
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
      loss: `loss(model, batch)`, the mean loss of the batch, one loss a sample, or losses and
        counts a sample, as `tasks.per_sample` gives them: a mean over answers, such as tokens, is
        not one of means over samples.
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
      samples: number of samples that the loss was averaged over; of answers, where it counts them.
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
    keep: Kept | None = None,
) -> Estimates:
    """Gradients of each layer and, if asked for, what their noise looks like.

    Args:
      model: as for `gradients`, and so are the arguments that are not named here.
      loss: with `noise="signs"` it must return one loss a sample, with counts or without.
      batches: with `noise="halves"`, two at least; even and odd ones make the halves.
      targets: as for `adapt`.
      noise: "none", "halves" (no further cost) or "signs" (one more backward pass a batch).
      memory: bytes, over both gradients of each layer.
      width: columns of a sketch.
      key: for sketches and signs; key 0 if None.
      keep: where sums go that an interruption is not to lose; batches are then a list.

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
    copy = nnx.clone(model)
    sites = _sites(copy, targets)
    columns = width + _HELD_OUT
    sketched = _plan(sites, memory, columns, 1 if noise == "none" else 2)
    if sketched and iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, and {len(sketched)} layers are sketched, which takes two "
            "passes; give a list, or an object that can be gone through again."
        )
    key_probe, key_signs = jax.random.split(key)
    probes = {path: _random_probe(sites[path], path, columns, key_probe) for path in sketched}
    full = {site.kernel for path, site in sites.items() if path not in probes}

    def wrt(path: tuple[Any, ...], _: Any) -> bool:
        return tuple(map(str, path)) in full or _is_probe(path, "a")

    arguments = (loss, batches, noise, key_signs, keep)
    sums, counts = _accumulate(_probed(copy, probes), wrt, *arguments)
    states = [dict(nnx.to_flat_state(state)) for state in sums]
    results: dict[str, list[Gradient]] = {}
    for path, site in sites.items():
        if path not in probes:
            matrices = [site.view.matrix(_leaf(state, site.kernel)) for state in states]
            zero = jnp.zeros(matrices[0].shape[:-2], jnp.float32)
            results[path] = [Gradient(None, g.astype(jnp.float32), zero) for g in matrices]
    if probes:
        ranges = {path: [_probe_leaf(state, path, "a") for state in states] for path in probes}
        results.update(_project(copy, sites, ranges, arguments))
    layers = _mean_and_noise({path: results[path] for path in sites}, noise, counts)
    finite = _finite([each.mean.core for each in layers.values()])
    for path, good in zip(layers, np.asarray(finite), strict=True):
        if not good:
            raise ValueError(
                f"the gradient of {path!r} is not finite; look at the loss on these batches."
            )
    return Estimates(layers, round(sum(counts)), 2 if probes else 1)


class _Site(NamedTuple):
    """A layer whose gradient is wanted: how its kernel is read, and where it lies in the state."""

    view: Layout
    axes: Any
    kernel: tuple[str, ...]

    @property
    def lead(self) -> tuple[int, ...]:
        return self.view.stack + self.view.slices


def _sites(model: nnx.Module, targets: Targets) -> dict[str, _Site]:
    found, sites = paths.find(model), {}
    for path, entry, _ in paths.select(model, targets, found):
        layer = found[path]
        base = layer.base if isinstance(layer, Adapted) else layer
        axes = axes_of(entry, path)
        inside = ("base",) if isinstance(layer, Adapted) else ()
        kernel = (*paths.segments(path), *inside, kernel_name(base))
        sites[path] = _Site(layout(base, axes), axes, kernel)
    return sites


def _random_probe(site: _Site, path: str, columns: int, key: PRNGKey) -> LoRA:
    """A LoRA whose gradient is the kernel's gradient times random columns."""
    m, n = site.view.shape
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    omega = jax.random.normal(key, (*site.lead, columns, n), jnp.float32)
    zero = jnp.zeros((*site.lead, m, columns), jnp.float32)
    return LoRA(Factors(zero, omega), axes=site.axes)


def _leaf(state: Mapping[tuple[Any, ...], Any], location: tuple[str, ...]) -> Array:
    for path, value in state.items():
        if tuple(map(str, path)) == location:
            return value[...]
    raise KeyError(location)


def _plan(sites: Mapping[str, _Site], memory: int, columns: int, channels: int) -> list[str]:
    """The layers to sketch: the largest ones, until the sum of all gradients fits the memory."""
    cost, saving = {}, {}
    for path, site in sites.items():
        (m, n), lead = site.view.shape, int(np.prod(site.lead, dtype=int))
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
    keep: Kept | None = None,
) -> tuple[list[Any], list[float]]:
    """Gradients with respect to what `wrt` lets through, and the answers they are means over.

    The gradients are those of the mean; of the two halves' means for "halves"; of the mean and of
    the signed mean for "signs". The counts are one number, or one a half.
    """
    graphdef, diff, rest = nnx.split(model, wrt, ...)
    signed = noise == "signs"
    halves = 2 if noise == "halves" else 1

    def losses_of(diff: Any, rest: Any, batch: Any) -> tuple[Array, Array]:
        return _counted(loss(nnx.merge(graphdef, diff, rest), batch), signed, batch)

    # Sums are donated, so that memory holds the running sum and not two of them.
    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def step(
        diff: Any, rest: Any, sums: list[Any], count: Array, batch: Any, index: Array
    ) -> tuple[list[Any], Array]:
        losses, pull, counts = jax.vjp(lambda d: losses_of(d, rest, batch), diff, has_aux=True)
        # The gradient of a sum over answers, so that batches of any size add up.
        weight = counts.astype(losses.dtype) if not losses.ndim else 1
        cotangents = [jnp.full_like(losses, weight)]
        if signed:
            signs_key = jax.random.fold_in(key, index)
            cotangents.append(jax.random.rademacher(signs_key, losses.shape, losses.dtype))
        grads = [pull(cotangent)[0] for cotangent in cotangents]
        sums = [jax.tree.map(jnp.add, s, g) for s, g in zip(sums, grads, strict=True)]
        return sums, count + counts.sum()

    sums = [[_zeros(diff) for _ in range(1 + signed)] for _ in range(halves)]
    counts = [jnp.zeros((), jnp.float32) for _ in range(halves)]

    def add(so_far: Any, batch: Any, index: int) -> Any:
        sums, counts = ([*each] for each in so_far)
        half = index % halves
        sums[half], counts[half] = step(
            diff, rest, sums[half], counts[half], batch, np.int32(index)
        )
        return sums, counts

    if keep is not None:
        identity = (diff, rest, key, np.asarray([halves, int(signed)]))
        sums, counts = keep.fold(add, (sums, counts), list(batches), identity)
    else:
        for index, batch in enumerate(batches):
            sums, counts = add((sums, counts), batch, index)
    found = [float(count) for count in counts]
    if not min(found) > 0:
        raise ValueError(
            f"batches hold {sum(count > 0 for count in found)}; "
            + ("two halves need two at least." if halves == 2 else "at least one is needed.")
        )
    means = [
        _divided(each, count) for group, count in zip(sums, counts, strict=True) for each in group
    ]
    return means, found


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


@functools.partial(jax.jit, static_argnames="sign")
def _combined(
    first: list[Array], second: list[Array], share: Any, *, sign: int = -1
) -> tuple[list[Array], list[Array]]:
    """Means of two halves, the first of which holds a share of the answers, and their noise."""
    pairs = list(zip(first, second, strict=True))
    unlike = jnp.sqrt(share * (1 - share))
    return (
        [share * a + (1 - share) * b for a, b in pairs],
        [unlike * (a + sign * b) for a, b in pairs],
    )


def _counted(result: Array | tuple[Array, Array], signed: bool, batch: Any) -> tuple[Array, Array]:
    """Losses and counts of what a loss returns; ValueError unless it has a shape to use."""
    if isinstance(result, tuple):
        losses, counts = result
        if losses.ndim == 1 and losses.shape == counts.shape:
            return losses, jax.lax.stop_gradient(counts.astype(jnp.float32))
        shape = f"arrays of shapes {losses.shape} and {counts.shape}"
    else:
        losses, shape = result, f"an array of shape {result.shape}"
        if losses.ndim == 1:
            return losses, jnp.ones(losses.shape, jnp.float32)
        if losses.ndim == 0 and not signed:
            return losses, jnp.full((), _leading(batch), jnp.float32)
    raise ValueError(
        f"loss returns {shape}; it must be "
        + (
            "one loss a sample, shape (samples,), since the losses get signs."
            if signed
            else "the batch's mean loss, or one loss a sample, shape (samples,), alone or with a "
            "count of the answers in each."
        )
    )


def _leading(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves or not np.ndim(leaves[0]):
        raise ValueError("batches hold one without arrays; leaves must lead with the sample axis.")
    return np.shape(leaves[0])[0]


def _mean_and_noise(
    results: dict[str, list[Gradient]], noise: str, counts: list[float]
) -> dict[str, Estimate]:
    """Mean and noise of each layer out of the channels that were accumulated."""
    if noise == "none":
        return {path: Estimate(channels[0], None) for path, channels in results.items()}
    if noise == "signs":
        return {path: Estimate(*channels) for path, channels in results.items()}
    firsts, seconds = zip(*results.values(), strict=True)
    share = np.float32(counts[0] / sum(counts))
    means, differences = _combined(
        [each.core for each in firsts], [each.core for each in seconds], share
    )
    # The bound on a difference is the sum of the bounds.
    errors, unsure = _combined(
        [each.error for each in firsts], [each.error for each in seconds], share, sign=1
    )
    found = zip(results, firsts, means, differences, errors, unsure, strict=True)
    return {
        path: Estimate(Gradient(x.basis, mean, error), Gradient(x.basis, difference, doubt))
        for path, x, mean, difference, error, doubt in found
    }


def _project(
    model: nnx.Module,
    sites: Mapping[str, _Site],
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
        b = jnp.zeros((*lead, q.shape[-1], sites[path].view.shape[1]), q.dtype)
        probes[path] = LoRA(Factors(q, b), axes=sites[path].axes)
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
