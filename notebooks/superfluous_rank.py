# %% [markdown]
# # Does too much rank do harm?
#
# Nobody knows the rank of the update that fine-tuning needs. Too low, and something is never
# learned. And too high? This notebook gives LoRA more rank than the target has, from two kinds of
# start.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import style

import lorajax
from lorajax import initializers, laws, plots, spectra

jax.config.update("jax_enable_x64", True)  # theory needs double precision
style.use(plots.STYLE)

# %% [markdown]
# ## A target of rank 3
#
# Its singular values are 4, 2 and 1. We train at ranks 2, 3 and 8, long enough for everything
# that can be learned to be learned.

# %%
problem = lorajax.MatrixFactorization.from_spectrum(
    jax.random.key(0), shape=(60, 40), singular_values=(4.0, 2.0, 1.0)
)
ranks = [2, 3, 8]
axes = {"scale": [1e-2], "rank": ranks, "seed": range(5)}
found = lorajax.sweep_flows(problem, "orthogonal", axes, jnp.linspace(0.0, 40.0, 11))
print(found.engine)

# %% [markdown]
# ## Your prediction
#
# The loss is $\frac12\|S - AB\|_F^2$. **What does it end at for each rank?**

# %%
final = found["losses"].isel(scale=0, time=-1).mean("seed").values
s = np.array([4.0, 2.0, 1.0])
for rank, loss in zip(ranks, final, strict=True):
    left = 0.5 * (s[rank:] ** 2).sum()
    print(f"rank {rank}: ends at {loss:8.1e}; half the squares left out: {left}")

# %% [markdown]
# Below the target's rank the top directions are learned, and half the squares of the others stay.
# From rank 3 on nothing stays (what is printed there is rounding). Rank beyond the target's has
# cost nothing but parameters, 100 a rank here.
#
# ## What the extra directions do
#
# **Predict** the singular values 4 to 8 of $AB$ at rank 8: zero, noise, or growing slowly?

# %%
times = jnp.linspace(0.0, 40.0, 101)
start = initializers.lora(jax.random.key(1), problem.shape, rank=8, scale=1e-2)
path = lorajax.gradient_flow(problem, start, times)
values = spectra.singular_values(path)
print("at the end:", values[-1].round(4))
print("largest of the extra ones at any time:", f"{float(values[:, 3:].max()):.1e}")

# %% [markdown]
# Zero at all times, to rounding: from $B = 0$ the update never leaves the target's row space, so
# that its rank is at most 3 on the whole way.
#
# ## Unless B is filled as well
#
# Some starts fill $B$ too. The spectral start lays both factors along the singular directions of
# the gradient, each of norm $\alpha$; with more rank than the target has, five of its directions
# here lead nowhere. Each begins at $m_0 = \alpha^2$ and has to be unlearned, by $\dot m = -2m^2$.
# **Predict**: does the loss fall exponentially now, or more slowly?

# %%
late = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-1, 1e6, 140)])
fig, ax = plots.figure()
for color, scale in enumerate((3e-1, 1e-1, 3e-2)):
    start = initializers.spectral(problem.target, 8, scale=scale)
    path, _ = lorajax.solve(problem, start, late)
    ax.loglog(late[1:], path.losses[1:], color=f"C{color}", label=f"spectral, α = {scale:g}")
    law = 5 * 0.5 * laws.superfluous(late, scale**2) ** 2
    ax.loglog(late[1:], law[1:], ":", color="black", lw=1)
start = initializers.small(jax.random.key(2), problem.shape, rank=8, scale=1e-1)
path = lorajax.gradient_flow(problem, start, late[late < 3e3])
ax.loglog(path.times[1:], path.losses[1:], "--", color="C1", label="random, α = 0.1")
ax.set(
    xlabel="time [1/s]",
    ylabel="loss",
    title="rank 8, dotted: law of 5 extra modes",
    ylim=(1e-16, 1e2),
)
ax.legend(loc="lower left")
fig

# %% [markdown]
# More slowly. Once the target is learned, the loss rests on a floor of the order of $\alpha^4$
# until $t \sim 1/\alpha^2$, and then falls as $t^{-2}$: the dotted law is $m = m_0/(1 + 2m_0t)$
# for each of the five. Where both factors are *random* (dashed), the same floor is there, but the
# two factors of an extra mode differ in size, and after $t \sim 1/\alpha^2$ it decays
# exponentially.
#
# So rank does no harm to where training *ends* here, and with $B = 0$ none to the way there
# either. Two things are left out: labels in these problems have no noise that extra rank could
# fit, and rank costs memory. [Choosing a rank](choosing_ranks.py) is about both.
#
# ## Exercises
#
# 1. Fill three directions only, `initializers.spectral(problem.target, 8, scale=0.1,
#    directions=3)`. Predict the floor before you draw it.
# 2. From the law of a mode, $\dot m = -\sqrt{\lambda^2 + 4m^2}\,m$ with $\lambda$ the difference
#    of the two factors' squared norms: estimate when the dashed curve leaves its floor, and at
#    which rate it then falls. Read both off the figure.
