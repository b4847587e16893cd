# %% [markdown]
# # Does an adapter survive the way to PEFT and back?
#
# You train an adapter in Flax and somebody wants it in torch; or the other way round. This
# notebook trains one with two different starts, writes it in PEFT's own format, looks into the
# file, and reads it again.

# %%
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import style
from safetensors.numpy import load_file

from lorajax import adapters, plots

style.use(plots.STYLE)

# %% [markdown]
# ## A model, and data that it does not fit yet
#
# A linear layer and targets that miss an update of rank 3. Labels are noisy, so that the loss
# cannot fall below a floor that we know.

# %%
RANK, NOISE = 3, 0.3
model = nnx.Sequential(nnx.Linear(24, 16, rngs=nnx.Rngs(0)))
draw = np.random.default_rng(0)
left, right = (np.linalg.qr(draw.normal(size=(k, k)))[0] for k in (24, 16))
x = draw.normal(size=(4000, 24)).astype("float32")
y = np.asarray(model(x)) + x @ (left[:, :RANK] @ right[:RANK])
y = (y + NOISE * draw.normal(size=y.shape)).astype("float32")
batches = [(x[i : i + 500], y[i : i + 500]) for i in range(0, 4000, 500)]


def loss(model, batch):
    """One loss a sample."""
    return 0.5 * jnp.sum((model(batch[0]) - batch[1]) ** 2, axis=-1)


# %% [markdown]
# ## Adapters
#
# `adapt` returns a new model; the one that was given is not changed, and its arrays are shared. A
# pattern that matches nothing is an error that says what it came close to.

# %%
plain = adapters.adapt(model, "layers/0", key=jax.random.key(0), rank=RANK)
print(adapters.describe(plain))
try:
    adapters.adapt(model, "layer/0", key=jax.random.key(0))
except ValueError as error:
    print("\nValueError:", error)

# %% [markdown]
# ## Two starts
#
# LoRA's default starts with $B = 0$. LoRA-One starts at the best step of this rank along the
# gradient, which is read off the data first. **Predict**: after how many steps will each be near
# the floor?

# %%
gradients = adapters.gradients(model, loss, batches)
spectral = adapters.adapt(
    model, "layers/0", key=jax.random.key(0), rank=RANK, start="lora_one", gradients=gradients
)


@nnx.jit
def step(model, optimizer, batch):
    """One step of Adam on the adapters alone; returns the loss before it."""

    def mean(model, batch):
        return jnp.mean(loss(model, batch))

    wrt = nnx.DiffState(0, adapters.trainable(model))
    value, grads = nnx.value_and_grad(mean, argnums=wrt)(model, batch)
    optimizer.update(model, grads)
    return value


def train(model, epochs=6):
    """Losses of all steps."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=adapters.trainable(model))
    return [float(step(model, optimizer, batch)) for _ in range(epochs) for batch in batches]


curves = {"lora": train(plain), "lora_one": train(spectral)}

# %%
floor = 0.5 * NOISE**2 * y.shape[1]
fig, ax = plots.figure()
for (name, curve), line in zip(curves.items(), ("-", "--"), strict=True):
    ax.semilogy(curve, line, label=name)
ax.axhline(floor, color="0.5", lw=1, label="noise of the labels")
ax.set(xlabel="step", ylabel="loss of the batch")
ax.legend()
fig

# %% [markdown]
# LoRA-One begins near the floor: where inputs are white, the negative gradient estimates the
# missing update itself.
#
# ## Merging, both ways
#
# An adapter can be added to its weight, and taken off again. **Predict**: is what comes back the
# same to the last bit?

# %%
batch = x[:500]
merged = adapters.merge(spectral)
unmerged = adapters.unmerge(merged)
print("merged differs by  ", float(jnp.max(jnp.abs(merged(batch) - spectral(batch)))))
print("unmerged differs by", float(jnp.max(jnp.abs(unmerged(batch) - spectral(batch)))))
print("without adapters it is a", type(adapters.remove(merged).layers[0]).__name__, "again")

# %% [markdown]
# ## To PEFT
#
# PEFT keeps a folder with two files. Ours come out with the names and shapes that PEFT expects:
# it stores transposes, `lora_A` = $A^\top$ and `lora_B` = $B^\top$.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
adapters.save_peft(spectral, folder / "one")
config = json.loads((folder / "one" / "adapter_config.json").read_text())
print({name: config[name] for name in ("r", "lora_alpha", "target_modules", "peft_type")})
tensors = load_file(folder / "one" / "adapter_model.safetensors")
print({name: tensor.shape for name, tensor in tensors.items()})

# %% [markdown]
# What torch would compute with this file takes three lines, without a line of this package:

# %%
a, b = (tensors[next(name for name in tensors if kind in name)] for kind in ("lora_A", "lora_B"))
scaling = config["lora_alpha"] / config["r"]
by_hand = np.asarray(model(batch)) + scaling * (batch @ a.T @ b.T)
print("by hand differs by", float(np.abs(by_hand - np.asarray(spectral(batch))).max()))

# %% [markdown]
# ## And back

# %%
again = adapters.load_peft(model, folder / "one")
print("read again, it differs by", float(jnp.max(jnp.abs(again(batch) - spectral(batch)))))

# %% [markdown]
# ## A start that takes something out of the weight
#
# PiSSA starts at the top singular part of the weight itself, and takes it out of the weight. Here
# the weight is never written to: the part is carried as an explicit offset. PEFT's file has no
# place for an offset. **Predict**: which rank will the file of a rank-3 PiSSA adapter have, if it
# is to be right on the untouched base?

# %%
pissa = adapters.adapt(model, "layers/0", key=jax.random.key(0), rank=RANK, start="pissa")
adapters.save_peft(pissa, folder / "pissa")
config = json.loads((folder / "pissa" / "adapter_config.json").read_text())
print("rank in the file:", config["r"])
again = adapters.load_peft(model, folder / "pissa")
print("read again, it differs by", float(jnp.max(jnp.abs(again(batch) - pissa(batch)))))

# %% [markdown]
# Twice the rank: the adapter's own directions, and the offset's with a minus sign. On reading the
# two are told apart again. What the format cannot say at all is refused by name, never
# approximated. For models that were read from torch checkpoints the names of layers are torch's:
# [Flax ↔ PEFT](../docs/howto/peft.md).
#
# ## Exercises
#
# 1. Give the product of the two factors another scaling, `adapt(..., alpha=12)`. What changes in
#    the file, and what in `by_hand`?
# 2. Train from `start="pissa"` as well and add its curve to the figure. Is the top of the
#    *weight* a good place to look for the missing update?
