"""(IA)³: a learned scale of every output of a layer, or of every input."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lorajax.adapters.kinds.base import Spec
from lorajax.adapters.layers import Adapter
from lorajax.adapters.layouts import Axes, kernel_variable, layout
from lorajax.adapters.methods import PeftLayer, PeftMethod, check_parts, check_shape
from lorajax.adapters.starts import Site
from lorajax.adapters.torch_layers import TorchLayer
from lorajax.environment.judging import POSITIVE, judged


class IA3Method(PeftMethod):
    """PEFT's IA3 of Linear layers: scales of outputs (n, 1), of inputs (1, m)."""

    type = "IA3"
    suffixes = ("ia3_l",)
    omitted = ("bias", "init_lora_weights", "lora_dropout")

    def refusal(self, base: nnx.Module, axes: Axes | None = None) -> str | None:
        """Why PEFT's adapter of a layer would be another one, or None."""
        if isinstance(base, nnx.Embed):
            return "is an Embed, which PEFT's (IA)³ does not adapt"
        if isinstance(base, nnx.Conv):
            return "is a convolution, whose (IA)³ lorajax does not write"
        return super().refusal(base, axes)

    def write(self, torch: TorchLayer, base: nnx.Module, adapter: "IA3") -> PeftLayer:
        """The scales themselves, 1 at the start."""
        scale = 1 + np.asarray(adapter.gain(), np.float32)
        tensor = torch.inputs(scale[:, None]) if adapter.inputs else scale[:, None]
        return PeftLayer({"ia3_l": tensor})

    def config(
        self, modules: dict[str, PeftLayer], adapters: Sequence["IA3"]
    ) -> tuple[dict[str, PeftLayer], dict[str, Any]]:
        """Modules whose inputs are scaled are PEFT's `feedforward_modules`."""
        inward = [name for name, x in modules.items() if x.tensors["ia3_l"].shape[0] == 1]
        for name in modules:
            if name not in inward and any(name.endswith(other) for other in inward):
                raise ValueError(
                    f"PEFT cannot express (IA)³ of the outputs of {name!r}: its name ends with "
                    "that of a layer whose inputs are scaled."
                )
        return modules, {"feedforward_modules": sorted(inward), "init_ia3_weights": True}

    def read(
        self,
        torch: TorchLayer,
        base: nnx.Module,
        parts: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
        *,
        offset: bool,
        dtype: Any,
    ) -> "IA3":
        """The scales of outputs or of inputs, by their shape."""
        check_parts(torch.module, parts, {"ia3_l"})
        (m, n), tensor = layout(base).shape, parts["ia3_l"].astype(np.float32)
        inputs = tensor.shape == (1, m) and m > 1
        check_shape(torch.module, "ia3_l", tensor, (1, m) if inputs else (n, 1))
        scale = torch.from_inputs(tensor)[:, 0] if inputs else tensor[:, 0]
        change = jnp.asarray(scale - 1, dtype)
        return IA3(change, inputs=inputs, start="peft", attends=False)

    def fuse(self, layers: Sequence[PeftLayer | None], outputs: int) -> PeftLayer:
        """Scales of outputs one block below the other, 1 for a block without."""
        blocks = [
            np.ones((outputs, 1), np.float32) if x is None else x.tensors["ia3_l"] for x in layers
        ]
        if any(block.shape != (outputs, 1) for block in blocks):
            raise ValueError("(IA)³ of their inputs scales those of the whole module")
        return PeftLayer({"ia3_l": np.concatenate(blocks)})

    def split(
        self, torch: TorchLayer, parts: Mapping[str, np.ndarray], ranks: Sequence[int] | None
    ) -> dict[str, np.ndarray]:
        """The scales of one block of outputs."""
        check_parts(torch.module, parts, {"ia3_l"})
        rows = torch.shape[0]
        check_shape(torch.module, "ia3_l", parts["ia3_l"], (rows * torch.parts, 1))
        if ranks is not None and not ranks[torch.part]:
            return {}
        return {"ia3_l": parts["ia3_l"][torch.part * rows : (torch.part + 1) * rows]}


class IA3(Adapter):
    """(IA)³: outputs `(1 + s d) ⊙ y`, bias and all, or inputs `(1 + s d) ⊙ x`.

    Args:
      change: d, (*stack, n) for outputs and (*stack, m) for inputs; 0 leaves the layer as it is.
      inputs: whether inputs are scaled instead of outputs.
      options: as for `Adapter`, without `dropout`.

    Source: Liu et al. 2022 (arXiv:2205.05638), recalled; with biases as PEFT has it.
    """

    peft = IA3Method()

    def __init__(self, change: Array, *, inputs: bool = False, **options: Any):
        self.change = nnx.LoRAParam(change)
        self.inputs = bool(inputs)
        super().__init__(**options)

    @property
    def kind(self) -> str:
        """The method's name."""
        return "(IA)³"

    @property
    def rank(self) -> int:
        """1: what alpha is divided by."""
        return 1

    def gain(self) -> Array:
        """What is added to a scale of 1."""
        return self.scaling * self.change[...]

    def update(self, base: nnx.Module) -> Array:
        """The change of the base's kernel, in the kernel's shape and the adapter's dtype."""
        view = layout(base, self.axes)
        w, gain = view.matrix(kernel_variable(base)[...]).astype(self.dtype), self.gain()
        return view.kernel(w * (gain[..., None] if self.inputs else gain[..., None, :]))

    def bias_update(self, base: nnx.Module) -> Array | None:
        """The change of the base's bias: it is scaled with the outputs."""
        bias = getattr(base, "bias", None)
        if self.inputs or bias is None:
            return None
        return bias[...].astype(self.dtype) * self.gain().reshape(bias.shape)

    def __call__(self, base: nnx.Module, x: Array, y: Array, out_sharding: Any = None) -> Array:
        """What is added to the base's output `y` at the input `x`, in the adapter's dtype."""
        if self.inputs:
            return super().__call__(base, x, y, out_sharding)
        return layout(base, self.axes).columns(self.gain(), y) * y.astype(self.dtype)


@judged(alpha=POSITIVE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Spec(Spec):
    """(IA)³: scales of a layer's outputs, or of its inputs.

    Attributes:
      side: "outputs", or "inputs" (PEFT's `feedforward_modules`).

    Raises:
      ValueError: for dropout, which a scale has no use for.
    """

    name = "ia3"

    side: Literal["outputs", "inputs"] = "outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}; a scale of outputs has none, leave it 0.")

    def zeros(self, site: Site) -> Array:
        """A change of 0 for every output, or input, of a layer."""
        view = layout(site.base)
        if view.slices:
            raise ValueError(f"layer {site.path!r} has slices, and scales have no form for them.")
        return jnp.zeros((*view.stack, view.shape[0 if self.side == "inputs" else 1]), self.dtype)

    def build(self, site: Site) -> IA3:
        """The (IA)³ adapter of one layer."""
        options = self.common(site) | {"start": "zero"}
        return IA3(self.zeros(site), inputs=self.side == "inputs", **options)
