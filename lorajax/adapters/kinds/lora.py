"""LoRA, with rsLoRA's scaling, DoRA's magnitudes and the offsets of starts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lorajax import initializers
from lorajax.adapters import starts
from lorajax.adapters.kinds.base import Spec
from lorajax.adapters.layers import Adapter, Frozen
from lorajax.adapters.layouts import Axes, Layout, Lookup, kernel_variable, layout
from lorajax.adapters.methods import (
    PeftLayer,
    PeftMethod,
    block_of,
    check_parts,
    check_shape,
    dropout,
    fused,
    number,
    pattern_value,
    patterns,
    read_factors,
    rounded,
)
from lorajax.adapters.starts import Site
from lorajax.adapters.torch_layers import TorchLayer
from lorajax.environment.judging import POSITIVE, SHARE, at_least, judged
from lorajax.factors import Factors, check_rank, is_traced
from lorajax.initializers import Start


class LoRAMethod(PeftMethod):
    """PEFT's LORA, with rsLoRA and DoRA.

    A start with an offset is written as LoRA of twice the rank, `[A A₀] [B; −B₀]`, which is right
    on the unmodified base.
    """

    type = "LORA"
    suffixes = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )

    def write(self, torch: TorchLayer, base: nnx.Module, adapter: "LoRA") -> PeftLayer:
        """A and B transposed, in torch's order."""
        a, b = (np.asarray(x, np.float32) for x in adapter.factors)
        if (offset := adapter.offset) is not None:
            a = np.concatenate([a, np.asarray(offset.a, np.float32)], axis=1)
            b = np.concatenate([b, -np.asarray(offset.b, np.float32)], axis=0)
        rank, window = a.shape[1], (1,) * (len(torch.shape) - 2)
        if torch.embedded:
            tensors = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
        else:
            outward = b.T.reshape(b.shape[1], rank, *window)
            tensors = {"lora_A.weight": torch.inputs(a), "lora_B.weight": outward}
        if adapter.magnitude is not None:
            magnitude = np.asarray(adapter.magnitude[...], np.float32)
            shape = (1, -1, *window) if window else (-1,)
            tensors["lora_magnitude_vector"] = magnitude.reshape(shape)
        return PeftLayer(tensors, rank, adapter.scaling)

    def config(
        self, modules: dict[str, PeftLayer], adapters: Sequence["LoRA"]
    ) -> tuple[dict[str, PeftLayer], dict[str, Any]]:
        """Ranks and alphas by pattern; rsLoRA only where all layers have it."""
        rslora = all(adapter.rslora for adapter in adapters)
        power = 0.5 if rslora else 1.0
        pairs = {m: (x.rank, rounded(x.scaling * x.rank**power)) for m, x in modules.items()}
        dora = any(adapter.magnitude is not None for adapter in adapters)
        return modules, {"use_dora": dora} | patterns(pairs, rslora=rslora)

    def read(
        self,
        torch: TorchLayer,
        base: nnx.Module,
        parts: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
        *,
        offset: bool,
        dtype: Any,
    ) -> "LoRA":
        """LoRA or DoRA, with the offset that PEFT takes off a Linear layer for some starts."""
        module, rslora = torch.module, bool(config.get("use_rslora"))
        pair = ("lora_embedding_A", "lora_embedding_B") if torch.embedded else ("lora_A", "lora_B")
        extra = {"lora_magnitude_vector"} if config.get("use_dora") else set()
        check_parts(module, parts, {*pair, *extra})
        first, second = (parts[name] for name in pair)
        factors = read_factors(torch, base, first, second, pair, dtype)
        rank = factors.rank
        told = pattern_value(config, "rank_pattern", module, config.get("r", 8))
        whole = isinstance(told, int) and told > rank and torch.parts > 1
        if isinstance(told, bool) or (told != rank and not whole):
            raise ValueError(
                f"the layer {module!r} has rank {rank}; the configuration says {told!r}."
            )
        alpha = pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        # Of several blocks in one module each has a part of the module's components.
        alpha = number("lora_alpha", alpha) * (rank / told) ** (0.5 if rslora else 1.0)
        if offset:
            if rank % 2:
                raise ValueError(f"the layer {module!r} has an offset, but the odd rank {rank}.")
            half = rank // 2
            taken = Factors(factors.a[:, half:], -factors.b[half:])
            factors = Factors(factors.a[:, :half], factors.b[:half])
            alpha *= 0.5**0.5 if rslora else 0.5
        else:
            scaling = alpha / (rank**0.5 if rslora else rank)
            taken = _converted_offset(torch, base, rank, scaling, config)
        magnitude = None
        if extra:
            flat = parts["lora_magnitude_vector"].reshape(-1)
            check_shape(module, "lora_magnitude_vector", flat, (layout(base).shape[1],))
            magnitude = jnp.asarray(flat.astype(np.float32), dtype)
        options = {"rslora": rslora, "start": "peft", "dropout": dropout(config)}
        return LoRA(factors, taken, magnitude, alpha=alpha, attends=False, **options)

    def fuse(self, layers: Sequence[PeftLayer | None], outputs: int) -> PeftLayer:
        """Factors side by side: A of each block above the other, B block by block."""
        gains = [x.tensors.get("lora_magnitude_vector") for x in layers if x is not None]
        whole = fused(layers, outputs, ("lora_A.weight", "lora_B.weight"))
        if any(gain is not None for gain in gains):
            if len(gains) < len(layers):
                raise ValueError("DoRA has a magnitude for each column, so adapt all of its parts")
            whole.tensors["lora_magnitude_vector"] = np.concatenate(gains)  # type: ignore[arg-type]
        return whole

    def split(
        self, torch: TorchLayer, parts: Mapping[str, np.ndarray], ranks: Sequence[int] | None
    ) -> dict[str, np.ndarray]:
        """The components of one block."""
        rest = {name: x for name, x in parts.items() if name != "lora_magnitude_vector"}
        found = block_of(torch, rest, ranks, ("lora_A", "lora_B"))
        if found and len(rest) < len(parts):
            outputs = torch.shape[0]
            gains = parts["lora_magnitude_vector"].reshape(-1)
            found["lora_magnitude_vector"] = gains[torch.part * outputs :][:outputs]
        return found


class LoRA(Adapter):
    """A low-rank update `s A B`, minus the offset of its start, and DoRA's magnitudes.

    The adapted kernel, read as a matrix, is `V = W − s A₀B₀ + s A B`, where `A₀B₀` is the offset,
    or with magnitudes μ it is `V diag(μ / ‖V‖)` with ‖·‖ the norm of each column. The norms are
    treated as constants in the gradient, as DoRA's paper and PEFT have it.

    Args:
      factors: A (*stack, *slices, m, r) and B (*stack, *slices, r, n), floating point.
      offset: the start's offset, in the same shapes; None for none.
      magnitude: μ (*stack, n) for DoRA; None for plain LoRA.
      alpha: numerator of the scaling; None for a scaling of 1.
      options: `rslora`, `start`, `axes`, `dropout`, `rngs`, `attends`, as for `Adapter`.

    Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732) for rsLoRA; Liu
    et al. 2024 (arXiv:2402.09353) for DoRA. Recalled.
    """

    @judged(alpha=POSITIVE)
    def __init__(
        self,
        factors: Factors,
        offset: Factors | None = None,
        magnitude: Array | None = None,
        *,
        alpha: float | int | None = None,
        **options: Any,
    ):
        self.a = nnx.LoRAParam(factors.a)
        self.b = nnx.LoRAParam(factors.b)
        self.offset_a = nnx.data(None if offset is None else Frozen(offset.a))
        self.offset_b = nnx.data(None if offset is None else Frozen(offset.b))
        self.magnitude = nnx.data(None if magnitude is None else nnx.LoRAParam(magnitude))
        super().__init__(alpha, **options)

    peft = LoRAMethod()

    @property
    def kind(self) -> str:
        """The method's name."""
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        """The inner dimension of the factors."""
        return self.a.shape[-1]

    @property
    def factors(self) -> Factors:
        """The trainable factors as arrays, without the scaling."""
        return Factors(self.a[...], self.b[...])

    @property
    def offset(self) -> Factors | None:
        """The start's offset as arrays, or None."""
        if self.offset_a is None or self.offset_b is None:
            return None
        return Factors(self.offset_a[...], self.offset_b[...])

    def matrix_update(self) -> Array:
        """`s (A B − A₀B₀)`, without the magnitudes."""
        update = self.factors.product
        if (offset := self.offset) is not None:
            update = update - offset.product
        return self.scaling * update

    def norms(self, base: nnx.Module) -> Array:
        """The norm of each column of `W + s (A B − A₀B₀)`, (*stack, n), no matrix formed.

        Expanded, a column's squared norm is `‖w‖² + 2s wᵀ(Ab) + s² bᵀ(AᵀA)b`, so that the m×n
        products are only ever those with r columns.
        """
        view = layout(base, self.axes)
        w = view.matrix(kernel_variable(base)[...]).astype(self.dtype)
        a, b = self.factors
        if (offset := self.offset) is not None:
            a = jnp.concatenate([a, offset.a], axis=-1)
            b = jnp.concatenate([b, -offset.b], axis=-2)
        s = self.scaling
        cross = jnp.sum((a.mT @ w) * b, axis=-2)
        square = jnp.sum(((a.mT @ a) @ b) * b, axis=-2)
        return jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=-2) + 2 * s * cross + s * s * square, 0))

    def update(self, base: nnx.Module) -> Array:
        """The change of the base's kernel, in the kernel's shape and the adapter's dtype."""
        view = layout(base, self.axes)
        update = self.matrix_update()
        if self.magnitude is not None:
            w = view.matrix(kernel_variable(base)[...]).astype(self.dtype)
            gain = self.magnitude[...] / jax.lax.stop_gradient(self.norms(base))
            update = gain[..., None, :] * (w + update) - w
        return view.kernel(update)

    def __call__(self, base: nnx.Module, x: Array, y: Array, out_sharding: Any = None) -> Array:
        """What is added to the base's output `y` at the input `x`, in the adapter's dtype."""
        view = layout(base, self.axes)
        x = self.dropped(x)
        # The scaling goes onto B, which is smaller than anything that leads with the samples.
        a, b = self.factors
        change = view.apply(x, a, self.scaling * b, out_sharding)
        if (offset := self.offset) is not None:
            # Apart, not as one product of rank 2r: at the start the two cancel to the last bit.
            change = change - view.apply(x, offset.a, self.scaling * offset.b, out_sharding)
        if self.magnitude is None:
            return change
        gain = view.columns(self.magnitude[...] / jax.lax.stop_gradient(self.norms(base)), y)
        y = y.astype(self.dtype)
        bias = view.bias(y)
        linear = y if bias is None else y - bias.astype(self.dtype)
        return (gain - 1) * linear + gain * change

    def attend(self, base: nnx.Embed, query: Array) -> Array:
        """What is added to the logits of `Embed.attend`."""
        view = layout(base)
        assert isinstance(view, Lookup)
        query = query.astype(self.dtype)
        if self.magnitude is not None:
            table = (base.embedding[...].astype(self.dtype) + self.matrix_update()).T
            gain = self.magnitude[...] / jax.lax.stop_gradient(self.norms(base))
            weight = base.embedding[...].astype(self.dtype).T
            return query @ (gain[:, None] * table - weight)
        change = view.attend(query, *self.factors)
        if (offset := self.offset) is not None:
            change = change - view.attend(query, *offset)
        return self.scaling * change


@judged(alpha=POSITIVE, dropout=SHARE, rank=at_least(0))
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankSpec(Spec):
    """What the kinds with one pair of factors have in common.

    Attributes:
      rank: r; 0 leaves the layer alone.
      start: an initializer, or its name; None for the kind's default.
      axes: which axes of the kernel are inputs and outputs; the others are slices with factors of
        their own. None for the layer's own contraction.
    """

    rank: int | Sequence[int | None] = 8
    start: str | Callable[..., Any] | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, Sequence):
            raise ValueError(f"rank is {self.rank}; it must be one integer.")

    @property
    def skips(self) -> bool:
        """Whether the rank is 0."""
        return self.rank == 0 and not isinstance(self.rank, bool)

    def started(
        self, site: Site, default: str | Callable[..., Any], *, rslora: bool = False
    ) -> tuple[Layout, Start, dict[str, Any]]:
        """The layer's layout, factors and offset placed beside its kernel, and adapter options."""
        view, rank = layout(site.base, self.axes), self.rank
        assert isinstance(rank, int)
        try:
            check_rank(rank, view.shape)
        except ValueError as error:
            raise ValueError(f"layer {site.path!r}: {error}") from None
        start, scaling = self.start or default, 1.0
        if self.alpha is not None:
            scaling = self.alpha / (math.sqrt(rank) if rslora else rank)
        options = {"rank": rank, "scaling": scaling, "dtype": self.dtype}
        filled = starts.fill(start, site, view, **options)
        placed = Start(*(_sharded(factors, site.base, view) for factors in filled))
        common = self.common(site) | {"start": starts.name_of(start), "axes": self.axes}
        return view, placed, common


@judged(alpha=POSITIVE, dropout=SHARE, rank=at_least(0))
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASpec(LowRankSpec):
    """LoRA: `s A B`, the default kind.

    Attributes:
      rslora: divide alpha by √r instead of by r.
      dora: train a magnitude for each column of the kernel as well.
      recenter: freeze a copy of the start as its offset, so that starts whose product is not zero
        leave the function where it was as well.

    Example:
      >>> from lorajax import adapters
      >>> adapters.LoRASpec(rank=4, alpha=8, rslora=True).rank
      4
    """

    name = "lora"

    rslora: bool = False
    dora: bool = False
    recenter: bool = False

    def build(self, site: Site) -> LoRA:
        """The LoRA or DoRA adapter of one layer."""
        view, (factors, offset), common = self.started(site, "lora", rslora=self.rslora)
        if self.recenter:
            offset = factors
        options = common | {"offset": offset if offset.rank else None, "rslora": self.rslora}
        if not self.dora:
            return LoRA(factors, **options)
        if view.slices:
            raise ValueError(
                f"dora of {site.path!r} is set; columns of a kernel with slices have no norm."
            )
        empty = jnp.zeros(view.stack + view.shape[1:], self.dtype)
        adapter = LoRA(factors, magnitude=empty, **options)
        norms = adapter.norms(site.base)
        if not is_traced(norms) and not bool(jnp.all(norms > 0)):
            raise ValueError(
                f"dora of {site.path!r} is set, and {int(jnp.sum(norms == 0))} columns of its "
                "kernel are zero, so that their direction is undefined; leave the layer out of the "
                "targets."
            )
        assert adapter.magnitude is not None
        adapter.magnitude.set_value(norms)
        return adapter


def _converted_offset(
    torch: TorchLayer, base: nnx.Module, rank: int, scaling: float, config: Mapping[str, Any]
) -> Factors | None:
    """What PEFT takes off the base for an adapter that was not converted to plain LoRA."""
    start = config.get("init_lora_weights", True)
    # PEFT leaves the base of an Embed and of a Conv alone whatever the start is called.
    if not isinstance(start, str) or isinstance(base, (nnx.Embed, nnx.Conv)):
        return None
    start = start.lower()
    if start in ("gaussian", "eva", "orthogonal", "mica", "true", "false"):
        return None
    weight = layout(base).matrix(kernel_variable(base)[...]).astype(jnp.float32)
    if start in ("pissa", "olora") and torch.parts > 1:
        raise ValueError(
            f"the adapter was started with {start!r} on {torch.module!r}, which is {torch.parts} "
            "layers here; save it with path_initial_model_for_weight_conversion."
        )
    if start == "pissa":
        return initializers.pissa(weight, rank, scaling=scaling).offset
    if start == "olora":
        # PEFT decomposes the transpose of the weight, so that B holds the orthonormal rows.
        offset = initializers.olora(weight.T, rank, scaling=scaling).offset
        return Factors(offset.b.T, offset.a.T)
    raise ValueError(
        f"the adapter was started with {start!r}, which changes the base in a way that its file "
        "does not tell; save it with path_initial_model_for_weight_conversion."
    )


def _sharded(factors: Factors, layer: nnx.Module, view: Layout) -> Factors:
    """Places factors beside a sharded kernel: A split as its rows are, B as its columns are."""
    kernel = kernel_variable(layer)[...]
    if is_traced(kernel):  # asking where it is placed would search the whole trace for a message
        return factors
    placed = getattr(kernel, "sharding", None)
    if not isinstance(placed, jax.sharding.NamedSharding):
        return factors
    if not any(placed.spec) or view.slices or not factors.rank:
        return factors
    spec = [*placed.spec, *[None] * (kernel.ndim - len(placed.spec))]
    stack = spec[: len(view.stack)]
    rest = spec[len(view.stack) :]
    axes = getattr(view, "axes", None) or Axes(tuple(range(len(rest) - 1)), (len(rest) - 1,))

    def outermost(group: tuple[int, ...]) -> Any:
        # Axes that are merged into one stay split only along the outermost of them.
        return rest[group[0]]

    rows, columns = outermost(axes.inputs), outermost(axes.outputs)
    mesh = placed.mesh
    named = functools.partial(jax.sharding.NamedSharding, mesh)
    partition = jax.sharding.PartitionSpec
    return Factors(
        jax.device_put(factors.a, named(partition(*stack, rows, None))),
        jax.device_put(factors.b, named(partition(*stack, None, columns))),
    )
