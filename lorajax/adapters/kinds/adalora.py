"""AdaLoRA: an update in the form of an SVD whose singular values are pruned to a budget."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lorajax import initializers
from lorajax.adapters.kinds.lora import LoRA, LowRankSpec
from lorajax.adapters.layouts import Axes
from lorajax.adapters.methods import (
    PeftLayer,
    PeftMethod,
    block_of,
    check_parts,
    check_shape,
    dropout,
    fused,
    is_one,
    number,
    read_factors,
    rounded,
)
from lorajax.adapters.starts import Site
from lorajax.adapters.torch_layers import TorchLayer
from lorajax.environment.judging import POSITIVE, SHARE, at_least, judged
from lorajax.factors import Factors, any_nonzero, is_traced

EPSILON = 1e-5
"""What PEFT's AdaLoRA adds to the rank before it divides alpha by it."""


class AdaLoRAMethod(PeftMethod):
    """PEFT's ADALORA, which has one rank and one alpha for all layers."""

    type = "ADALORA"
    suffixes = ("lora_A", "lora_B", "lora_E")

    def refusal(self, base: nnx.Module, axes: Axes | None = None) -> str | None:
        """Why PEFT's adapter of a layer would be another one, or None."""
        if isinstance(base, nnx.Embed):
            return "is an Embed, which PEFT's AdaLoRA does not adapt"
        if isinstance(base, nnx.Conv) and len(base.kernel_size) != 2:
            return "is no two-dimensional convolution, the only one that PEFT's AdaLoRA has"
        return super().refusal(base, axes)

    def dilated(self, conv: nnx.Conv) -> bool:
        """PEFT's AdaLoRA forms the kernel, so that only dilated inputs are beyond it."""
        return not is_one(conv.input_dilation)

    def write(self, torch: TorchLayer, base: nnx.Module, adapter: "AdaLoRA") -> PeftLayer:
        """The two frames as matrices, and the singular values as a column."""
        a, b, e = (np.asarray(v[...], np.float32) for v in (adapter.a, adapter.b, adapter.e))
        inward = torch.inputs(a).reshape(adapter.rank, -1)
        tensors = {"lora_A": inward, "lora_B": b.T, "lora_E": e[:, None]}
        return PeftLayer(tensors, adapter.rank, adapter.scaling)

    def config(
        self, modules: dict[str, PeftLayer], adapters: Sequence["AdaLoRA"]
    ) -> tuple[dict[str, PeftLayer], dict[str, Any]]:
        """Zero singular values fill up to the largest rank, E takes the scalings."""
        rank = max(layer.rank for layer in modules.values())
        divisor = rank + EPSILON
        alpha = rounded(next(iter(modules.values())).scaling * divisor)
        changed = {}
        for module, layer in modules.items():
            a, b, e = (layer.tensors[f"lora_{part}"] for part in "ABE")
            missing = rank - layer.rank
            e = e * np.float32(layer.scaling * divisor / alpha)
            tensors = {
                "lora_A": np.pad(a, ((0, missing), (0, 0))),
                "lora_B": np.pad(b, ((0, 0), (0, missing))),
                "lora_E": np.pad(e, ((0, missing), (0, 0))),
            }
            changed[module] = PeftLayer(tensors, rank, layer.scaling)
        # total_step is for PEFT's own training, which refuses a config without it.
        fields = {"init_r": rank, "target_r": rank, "lora_alpha": alpha, "total_step": 1}
        return changed, {"rank_pattern": None} | fields

    def read(
        self,
        torch: TorchLayer,
        base: nnx.Module,
        parts: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
        *,
        offset: bool,
        dtype: Any,
    ) -> "AdaLoRA":
        """The frames and singular values, whatever pruning has left of the rank."""
        module, pair = torch.module, ("lora_A", "lora_B")
        check_parts(module, parts, {*pair, "lora_E"})
        if offset:
            raise ValueError(f"the layer {module!r} has an offset, and AdaLoRA has none.")
        first, second = (parts[name] for name in pair)
        factors = read_factors(torch, base, first, second, pair, dtype, flat=True)
        rank = factors.rank
        check_shape(module, "lora_E", parts["lora_E"], (rank, 1))
        alpha = number("lora_alpha", config.get("lora_alpha", 8))
        # PEFT divides by the rank that training began with, whatever pruning has left of it.
        divisor = number("init_r", config.get("init_r", 12)) + EPSILON
        e = jnp.asarray(parts["lora_E"][:, 0].astype(np.float32), dtype)
        options = {"start": "peft", "dropout": dropout(config), "attends": False}
        return AdaLoRA(factors, e, alpha=alpha * rank / divisor, **options)

    def fuse(self, layers: Sequence[PeftLayer | None], outputs: int) -> PeftLayer:
        """Frames side by side, as LoRA's factors."""
        return fused(layers, outputs, ("lora_A", "lora_B"), "lora_E")

    def split(
        self, torch: TorchLayer, parts: Mapping[str, np.ndarray], ranks: Sequence[int] | None
    ) -> dict[str, np.ndarray]:
        """The components of one block."""
        return block_of(torch, parts, ranks, ("lora_A", "lora_B"), "lora_E")


class AdaLoRA(LoRA):
    """An update in the form of an SVD, `s P diag(E) Q`, whose entries of E are pruned to a budget.

    `a` holds P (m, r), `b` holds Q (r, n), `e` the singular values E. A pruned direction has E = 0
    and may come back while the budget is still above the final one; see `budget`.

    Args:
      factors: P and Q.
      e: E, (*stack, *slices, r).
      alpha: numerator of the scaling; None for a scaling of 1.
      options: as for `LoRA`.

    Source: Zhang et al. 2023 (arXiv:2303.10512), recalled.
    """

    @judged(alpha=POSITIVE)
    def __init__(
        self, factors: Factors, e: Array, *, alpha: float | int | None = None, **options: Any
    ):
        super().__init__(factors, alpha=alpha, **options)
        self.e = nnx.LoRAParam(e)

    peft = AdaLoRAMethod()

    @property
    def kind(self) -> str:
        """The method's name."""
        return "AdaLoRA"

    @property
    def factors(self) -> Factors:
        """`P diag(E)` and Q."""
        return Factors(self.a[...] * self.e[...][..., None, :], self.b[...])


@judged(alpha=POSITIVE, dropout=SHARE, rank=at_least(0))
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRASpec(LowRankSpec):
    """AdaLoRA: `s P diag(E) Q`; it starts at E = 0, from balanced frames of scale 1 by default."""

    name = "adalora"

    def build(self, site: Site) -> AdaLoRA:
        """The AdaLoRA adapter of one layer."""
        default = functools.partial(initializers.balanced, scale=1.0)
        _, (factors, _), common = self.started(site, default)
        # The singular values start at 0, so both frames have to be there for one of them to move.
        if not is_traced(factors) and not all(any_nonzero(factor) for factor in factors):
            raise ValueError(
                f"the start of {site.path!r} leaves a factor zero; AdaLoRA's singular values start "
                "at 0 and need both frames, such as start='balanced'."
            )
        return AdaLoRA(
            factors, jnp.zeros((*factors.a.shape[:-2], factors.rank), self.dtype), **common
        )
