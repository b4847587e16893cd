# %% [markdown]
# # What does the scale of a start do?
#
# Libraries draw LoRA's $A$ at different sizes and hardly mention it. In one unit, the
# root-mean-square norm of a column of $A$, PEFT starts at $1/\sqrt3$ and Flax at $\sqrt2$. Does
# it matter? This notebook turns that one knob from $10^{-3}$ to 3.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import style

import lorajax
from lorajax import initializers, laws, plots
from lorajax.plots import sweeps

jax.config.update("jax_enable_x64", True)  # theory needs double precision
style.use(plots.STYLE)
print(initializers.SCALES)

# %% [markdown]
# ## A problem with a closed form
#
# The target has the singular values 2, 1 and ½. With orthonormal columns of $A$ times the scale
# $a$, and $B = 0$, the flow is known exactly, so that no solver's error can blur the picture.
# Each mode obeys $\dot\sigma = \sqrt{a^4 + 4\sigma^2}\,(s - \sigma)$.

# %%
problem = lorajax.MatrixFactorization.from_spectrum(
    jax.random.key(0), shape=(32, 48), singular_values=(2.0, 1.0, 0.5)
)


def modes(scale, times):
    """Singular values over time from one orthogonal start."""
    start = initializers.orthogonal(jax.random.key(1), problem.shape, rank=32, scale=scale)
    path, _ = lorajax.solve(problem, start, times)
    return path, lorajax.spectra.singular_values(path)[:, :3]


# %% [markdown]
# ## Your prediction
#
# Look at the equation. **For $a^2 \gg s$, at which rate does each of the three modes grow? For
# $a^2 \ll s$?** Will the three curves, each divided by its $s$, lie on top of each other?

# %%
fig, panels = plots.figure(1, 2)
for ax, scale, last in zip(panels, (3.0, 0.01), (0.6, 24.0), strict=True):
    times = jnp.linspace(0.0, last, 241)
    _, values = modes(scale, times)
    for i, s in enumerate(problem.singular_values):
        ax.plot(times, values[:, i] / s, ("-", "--", ":")[i], label=f"s = {s:g}")
    ax.set(xlabel="time [1/s]", ylabel="share of s learned", title=f"scale {scale:g}")
    ax.legend(loc="lower right")
fig

# %% [markdown]
# At the large scale all modes grow alike, at the rate $a^2$: the *lazy* regime, in which LoRA is
# a linear model. At the small scale they come one after the other: the *rich* regime, in which
# the largest direction of the target is learned while the others still wait.
#
# ## How far does A itself move?
#
# **Predict**: in which of the two regimes does $A$ stay where it was drawn?

# %%
scales = np.geomspace(1e-2, 3.0, 9)
moved = []
for scale in scales:
    last = 30.0 / max(scale**2, 0.5)
    path, _ = modes(scale, jnp.linspace(0.0, last, 241))
    change = jnp.linalg.norm(path.core.a[-1] - path.core.a[0]) / jnp.linalg.norm(path.core.a[0])
    moved.append(float(change))

fig, ax = plots.figure()
ax.loglog(scales, moved, "o-")
for name, at in initializers.SCALES.items():
    ax.axvline(at, color="0.5", lw=1)
    ax.annotate(
        name, (at, 1.0), xytext=(2, 0), textcoords="offset points", color="0.3", rotation=90
    )
ax.set(xlabel="scale a of the start", ylabel="‖A(end) − A(0)‖ / ‖A(0)‖")
fig

# %% [markdown]
# Far above $\sqrt s$ it hardly moves; far below, all that $A$ ends with is what it learned. The
# defaults of the libraries (gray) stand in between, for a target of this size. For an update
# whose singular values are much smaller they are lazy: the scale means nothing without the
# update's size beside it.
#
# ## When is a mode learned?
#
# A sweep runs all scales and several draws in one program, and says which engine it took.

# %%
times = jnp.linspace(0.0, 40.0, 401)
axes = {"scale": np.geomspace(1e-3, 0.2, 7), "rank": [4], "seed": range(8)}
found = lorajax.sweep_flows(problem, "orthogonal", axes, times, observe=["half_times"])
print(found.engine)

# %% [markdown]
# **Predict**: from scale $10^{-2}$ to $10^{-3}$, by how much does the half-time of the mode $s =
# 1$ grow?

# %%
fig, ax = plots.figure()
half = found["half_times"].isel(rank=0)
for i, s in enumerate(problem.singular_values):
    one = half.isel(target_mode=i)
    sweeps.band(ax, one, x="scale", color=f"C{i}", label=f"s = {s:g}", log=False)
    # Rank 4 of 32: a random frame leaves a mode √(4/32) of the scale, in the mean square.
    amplitude = half["scale"].values * (4 / 32) ** 0.5
    ax.plot(half["scale"], laws.half_time(s, amplitude), "--", color="black", lw=1)
ax.set(xscale="log", xlabel="scale a of the start", ylabel="half-time [1/s]")
ax.legend(loc="upper right")
fig

# %% [markdown]
# By $\ln(10)/s \approx 2.3$. The dashed law $\ln(4s/a^2)/(2s)$ knows no more than the typical
# amplitude of a mode. What a draw adds is the band, and that later modes start from a little
# less, since earlier ones have used some of it up, is the gap.
#
# So the scale decides *how* LoRA learns: all at once or in turn, moving $A$ or not; and it costs
# only a logarithm of time. Whether it also decides *where* training ends is a question of two
# layers: [see the two phases](two_phases.py).
#
# ## Exercises
#
# 1. Replace `"orthogonal"` by `"lora"` in the sweep. Which engine is taken, and how does the band
#    change? Why?
# 2. Double every singular value of the target and multiply the scale by √2. Predict what happens
#    to the curves, from the equation of a mode; then check it.
