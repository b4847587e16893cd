# %% [markdown]
# # Why does the loss stand still before it falls?
#
# Fine-tuning with LoRA from a small start often shows a plateau first: step after step nothing
# happens, then the loss drops. This notebook looks at what the adapters do meanwhile, in the
# setting of Xu et al. (2025): two frozen layers with an adapter on each, under gradient flow of
# $\frac12\|Y_{ft} - (W_2 + A_2B_2)(W_1 + A_1B_1)\|_F^2$.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import style

import lorajax
from lorajax import initializers, laws, plots, spectra

jax.config.update("jax_enable_x64", True)  # theory needs double precision
style.use(plots.STYLE)

# %% [markdown]
# ## A pretrained network and a new target
#
# `pretrained` draws two square layers, as gradient flow would have trained them, and a target
# that adds 5 times the top principal component of what they compute. Near zero each adapter grows
# on its own, exponentially: the first layer at the rate $g_1$, the second at $g_2$.

# %%
problem = lorajax.TwoLayer.pretrained(jax.random.key(0), 20, "top")
g1, g2 = (float(g) for g in laws.growth_rates(problem))
print(f"g1 = {g1:.2f}, g2 = {g2:.2f}; the slower over the faster, δ_w = {g1 / g2:.2f}")

# %% [markdown]
# ## Your prediction
#
# Both factors of both adapters start at random, with norms of about $\alpha = 10^{-5}$. They grow
# as $\alpha e^{gt}$. **When will the loss begin to fall?** Write down a time before you go on.

# %%
SCALE = 1e-5


def start_at(scale):
    """Both factors of both adapters random, columns of A and rows of B of norm `scale`."""
    small = functools.partial(initializers.small, rank=3, scale=scale)
    return problem.blind_start(small, jax.random.key(1))


times = jnp.linspace(0.0, 4.0, 161)
path = lorajax.gradient_flow(problem, start_at(SCALE), times)
print(path.describe())

# %% [markdown]
# ## What happens on the plateau
#
# Three quantities on one logarithmic axis: the loss, the size of the faster adapter, and its
# *misalignment*: $1 - \cos$ of the angle between its top singular vector and the direction in
# which theory says that it grows, the top singular pair of $E W_1^\top$.

# %%
growing = spectra.top_direction(problem.alignment_matrices()[1])
misalignment = spectra.top_misalignment(path.core.second, growing)
norm = spectra.factor_norm(path.core.second)

fig, ax = plots.figure()
ax.semilogy(times, path.losses / path.losses[0], label="loss")
ax.semilogy(times, norm, "--", label="norm")
ax.semilogy(times, misalignment, ":", label="misalignment")
ax.axvline(np.log(1 / SCALE) / g2, color="0.5", lw=1)
ax.set(xlabel="time [1/s]", ylabel="loss / loss(0), ‖[A₂; B₂ᵀ]‖, 1 − cos", ylim=(1e-13, 30))
ax.legend(loc="center right")
fig

# %% [markdown]
# Two phases. In the first the adapter turns towards one direction and its norm grows
# exponentially, far too small for the loss to notice. In the second it is large enough, and the
# loss falls. The gray line is the prediction $\ln(1/\alpha)/\max(g_1, g_2)$: how close was yours?

# %% [markdown]
# ## The plateau's length, over the scale
#
# If that is right, every factor of ten in $\alpha$ costs the same time, $\ln(10)/\max(g_1, g_2)$.
# **Predict**: will a start ten times smaller make the plateau ten times longer?

# %%
scales = 10.0 ** -np.arange(2, 8)


def escape(scale):
    """When the loss has fallen by a tenth."""
    path = lorajax.gradient_flow(problem, start_at(scale), times)
    return float(spectra.hitting_times(times, path.losses, 0.9 * path.losses[0]))


escapes = np.array([escape(scale) for scale in scales])
slope = float(laws.escape_slope(problem))
law = escapes[-1] + slope * np.log(scales[-1] / scales)
fig, ax = plots.figure()
ax.semilogx(scales, escapes, "o", label="simulated")
ax.semilogx(scales, law, "--", color="black", label=f"slope 1/max(g₁, g₂) = {slope:.3f}")
ax.set(xlabel="scale α of the start", ylabel="time of escape [1/s]")
ax.legend()
fig

# %%
measured = np.polyfit(np.log(1 / scales[2:]), escapes[2:], 1)[0]
print(f"slope measured from 1e-4 on: {measured:.4f}, law: {slope:.4f}")

# %% [markdown]
# The wait grows with the logarithm of the scale: a start a hundred thousand times smaller waits
# three and a half times as long. And in return it is better aligned when it leaves:

# %%
for scale in (1e-2, 1e-4, 1e-6):
    path = lorajax.gradient_flow(problem, start_at(scale), times)
    best = float(spectra.top_misalignment(path.core.second, growing).min())
    print(f"α = {scale:.0e}: least misalignment {best:.1e}, loss at the end {path.losses[-1]:.1e}")

# %% [markdown]
# The [page of the paper](../docs/papers/xu2025.md) has these statements as claims, with
# tolerances and negative controls, and one that did not hold: a smaller start does not end at a
# lower loss for *every* target.
#
# ## Exercises
#
# 1. Take `"generic"` in place of `"top"`: the target then lies along random directions. Which of
#    the three curves changes, and does the smaller start still end lower?
# 2. Start along the gradient: `problem.directed_start(functools.partial(initializers.spectral,
#    rank=3, scale=1e-5))`. Predict the dotted curve first. What is left of the plateau?
