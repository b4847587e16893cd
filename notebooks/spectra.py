# %% [markdown]
# # Which law do the singular values of LoRA obey?
#
# A LoRA update is a product $AB$ of two thin matrices. Under gradient flow of $\frac12\|S -
# AB\|_F^2$ its singular values grow from zero to those of the target $S$. How, exactly? One paper
# states $\lambda\tanh^2(\lambda t/\sqrt2)$; solving the equation of a single mode gives something
# else. Here both are held against the simulation.

# %%
import jax
import jax.numpy as jnp
from matplotlib import style

import lorajax
from lorajax import initializers, laws, plots, spectra

jax.config.update("jax_enable_x64", True)  # theory needs double precision
style.use(plots.STYLE)

# %% [markdown]
# ## A problem, a start, a flow
#
# The target has the singular values 4, 2 and 1. LoRA's default start is $A$ random and $B = 0$;
# its `scale` is the root-mean-square norm of a column of $A$. The flow runs on 8×8 matrices
# instead of 60×40, which changes nothing: only the target's three directions and the adapter's
# five matter.

# %%
problem = lorajax.MatrixFactorization.from_spectrum(
    jax.random.key(0), shape=(60, 40), singular_values=(4.0, 2.0, 1.0)
)
times = jnp.linspace(0.0, 14.0, 281)


def flow(scale, rank=5):
    """A start and the path of its gradient flow."""
    start = initializers.lora(jax.random.key(1), problem.shape, rank, scale=scale)
    return start, lorajax.gradient_flow(problem, start, times)


start, path = flow(1e-2)
print(path.describe())
print("solved on", path.core.a.shape[1:], "and", path.core.b.shape[1:], "instead of 60×40")

# %% [markdown]
# ## Your prediction
#
# **Which singular value is learned first, and do the three rise together or in turn?** Sketch the
# three curves over time before you look.

# %%
simulated = spectra.singular_values(path)[:, :3]
exact = laws.lora_modes(problem, start, times)
published = laws.tanh_squared_modes(problem, start, times)[:, :3]

fig, ax = plots.figure()
for i, s in enumerate(problem.singular_values):
    ax.plot(times, simulated[:, i], label=f"s = {s:g}")
ax.plot(times, exact, "--", color="black", lw=1)
ax.plot(times, published, ":", color="black", lw=1)
ax.set(xlabel="time [1/s]", ylabel="singular value of AB", title="dashed: exact; dotted: tanh²")
ax.legend(loc="center right", bbox_to_anchor=(1.0, 0.74))
fig

# %% [markdown]
# One after the other, the largest first. The dashed law lies on the simulation; the dotted one
# has the order right and the times wrong.
#
# ## How wrong?

# %%
for name, law in (("exact", exact), ("tanh²", published)):
    errors = jnp.abs(simulated - law).max(0) / problem.singular_values
    print(f"{name}: largest error of each mode, relative to s: {errors.round(4)}")

# %% [markdown]
# ## What the published law cannot know
#
# $\tanh^2$ depends on $\lambda$ alone. **Predict**: make the start ten times smaller. Does the
# time at which a mode is half learned stay, grow tenfold, or grow by a constant?

# %%
for scale in (1e-1, 1e-2, 1e-3, 1e-4):
    start, path = flow(scale)
    values = spectra.singular_values(path)[:, :3]
    half = spectra.hitting_times(times, values, problem.singular_values / 2)
    law = laws.half_time(problem.singular_values, laws.deflated_amplitudes(problem, start))
    print(f"scale {scale:g}: half-times {half.round(3)}, exact law {law.round(3)}")

# %% [markdown]
# By a constant, $\ln(10)/s$: the wait is logarithmic in the scale. The law takes each mode's own
# amplitude, which is not $|A^\top u_i|$: what the earlier modes have used up is taken off
# (`deflated_amplitudes`). At the scale 0.1 the modes are not well separated in time any more, and
# the law is off by more.
#
# ## What never changes
#
# $\Lambda = A^\top A - BB^\top$ is the same at all times, for any differentiable loss. It also
# tells, for free, how well the flow was integrated.

# %%
print(f"relative drift of Λ: {spectra.imbalance_drift(path):.1e}")

# %% [markdown]
# ## Without a solver
#
# If the columns of $A$ start orthonormal, $\Lambda$ is a multiple of the identity and the flow
# has a closed form at any size. `solve` notices:

# %%
large = lorajax.MatrixFactorization.from_spectrum(
    jax.random.key(2), shape=(1024, 1024), singular_values=(4.0, 2.0, 1.0)
)
start = initializers.orthogonal(jax.random.key(3), large.shape, rank=8, scale=1e-3)
path, plan = lorajax.solve(large, start, times)
print(plan)
print("singular values at the end:", spectra.singular_values(path)[-1, :4].round(6))

# %% [markdown]
# The [page on spectral dynamics](../docs/papers/spectral_dynamics.md) has both laws as claims:
# the order holds, the shape is refuted.
#
# ## Exercises
#
# 1. Give the target the singular values 2, 1.99 and 1. Which assumption of `laws.lora_modes`
#    breaks, and how does the figure show it?
# 2. Take `rank=2`. Predict what is never learned, and what the loss ends at; then check both.
