"""Adapters for Flax NNX: the starts and ranks of the theory inside the layers of real models.

```python
adapted = adapters.adapt(model, {"**/query": 8, "**/mlp/*": 4}, start="pissa", key=key)
trainable = adapters.trainable(adapted, heads="classifier")
optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=trainable)
loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, trainable))(adapted, batch)
```

Every function that changes a model returns a new one, and no base weight is ever written to. A base
in bfloat16 with adapters in float32 (their default) is the path for mixed precision.

| file | holds |
|---|---|
| `layouts` | how the kernel of each kind of layer is read as a matrix |
| `layers` | what adapters have in common, and the layer that carries them |
| `kinds` | LoRA with rsLoRA and DoRA, AdaLoRA, Tucker, (IA)³, Propulsion; one file a kind |
| `surgery`, `paths` | adapt, activate, merge, remove, trainable; path patterns |
| `starts` | filling a layer from any of `lorajax.initializers` |
| `gradients`, `moments` | streamed gradients and inputs |
| `keeping` | sums over batches that outlive an interruption |
| `selection`, `whitening` | ranks from the gradients, whitened by the inputs or not |
| `guidance` | base + γ (adapted − base), of outputs and of weights |
| `linearization` | a model in the NTK regime, for `optima.certify` |
| `budget`, `optimizers` | AdaLoRA's budget; LoRA+ and ALLoRA for optax |
| `peft`, `checkpoints` | PEFT's files; full state through orbax |
"""

from lorajax.adapters.budget import RankBudget, cubic_budget, orthogonality
from lorajax.adapters.checkpoints import load_checkpoint, save_checkpoint
from lorajax.adapters.gradients import Gradient, gradients
from lorajax.adapters.guidance import guided, guided_weights
from lorajax.adapters.intruders import Intruder, Intruders, intruders
from lorajax.adapters.kinds import (
    IA3,
    AdaLoRA,
    AdaLoRASpec,
    IA3Spec,
    LoRA,
    LoRASpec,
    Propulsion,
    PropulsionSpec,
    Spec,
    Tucker,
    TuckerSpec,
)
from lorajax.adapters.layers import Adapted, Adapter, Frozen, effective_kernel
from lorajax.adapters.layouts import Axes, kernel_of, layout
from lorajax.adapters.linearization import linearized, updates_of
from lorajax.adapters.methods import PeftLayer, PeftMethod
from lorajax.adapters.moments import input_moments
from lorajax.adapters.optimizers import allora, lora_plus, scale_beside
from lorajax.adapters.paths import Trainable
from lorajax.adapters.peft import load_peft, save_peft, save_peft_start
from lorajax.adapters.preconditioned import by_part, lora_rite, reflora, riemannian, spectral
from lorajax.adapters.selection import Selected, Selection, select_ranks
from lorajax.adapters.starts import Site
from lorajax.adapters.surgery import (
    activate,
    adapt,
    layers,
    merge,
    names,
    remove,
    trainable,
    unmerge,
)
from lorajax.adapters.tables import Description, Row, describe
from lorajax.adapters.whitening import whitened

__all__ = [
    "AdaLoRA",
    "AdaLoRASpec",
    "Adapted",
    "Adapter",
    "Axes",
    "Description",
    "Frozen",
    "Gradient",
    "IA3",
    "IA3Spec",
    "Intruder",
    "Intruders",
    "LoRA",
    "LoRASpec",
    "Propulsion",
    "PropulsionSpec",
    "RankBudget",
    "PeftLayer",
    "PeftMethod",
    "Row",
    "Selected",
    "Selection",
    "Site",
    "Spec",
    "Trainable",
    "Tucker",
    "TuckerSpec",
    "activate",
    "adapt",
    "allora",
    "by_part",
    "cubic_budget",
    "describe",
    "effective_kernel",
    "gradients",
    "guided",
    "guided_weights",
    "input_moments",
    "intruders",
    "kernel_of",
    "layers",
    "layout",
    "linearized",
    "load_checkpoint",
    "load_peft",
    "lora_plus",
    "lora_rite",
    "merge",
    "names",
    "orthogonality",
    "reflora",
    "remove",
    "riemannian",
    "save_checkpoint",
    "save_peft",
    "save_peft_start",
    "scale_beside",
    "select_ranks",
    "spectral",
    "trainable",
    "unmerge",
    "updates_of",
    "whitened",
]
