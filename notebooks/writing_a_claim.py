# %% [markdown]
# # When may a law be called confirmed?
#
# A simulation and a law never agree to the last digit. How close is close enough? A *claim*
# settles that before looking: it has a statement, an error, a tolerance with a derivation, and a
# negative control. This notebook writes one, breaks it, and measures how sharp it is.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import style

from lorajax import DiagonalFactorization, Factors, claims, gradient_flow, laws, plots

jax.config.update("jax_enable_x64", True)  # theory needs double precision
style.use(plots.STYLE)

# %% [markdown]
# ## A law and a simulation
#
# One mode of LoRA: a 1×1 problem whose target is 2, from $A = 0.1$, $B = 0$. `laws.lora_mode`
# says how $AB$ grows, and `square` multiplies the law's constant $a^2$; 1 is the claimed value.

# %%
S, A, RTOL = 2.0, 0.1, 1e-10
times = np.linspace(0.0, 6.0, 61)
problem = DiagonalFactorization(jnp.array([S]), (1, 1))
start = Factors(jnp.full((1, 1), A), jnp.zeros((1, 1)))
path = gradient_flow(problem, start, times, rtol=RTOL)
simulated = np.asarray(path.core.product[:, 0, 0])

# %% [markdown]
# ## Your prediction
#
# Alter the constant by 5 %. **Would you see it in a plot of the curves?**

# %%
fig, (left, right) = plots.figure(1, 2)
for square, line in ((1.0, "-"), (1.05, "--")):
    law = np.asarray(laws.lora_mode(times, S, A, square=square))
    left.plot(times, law, line, label=f"law, a² × {square:g}")
    right.semilogy(times[1:], np.abs(law - simulated)[1:] / S, line, label=f"a² × {square:g}")
left.plot(times[::4], simulated[::4], "o", ms=3, label="simulated")
left.set(xlabel="time [1/s]", ylabel="AB")
right.set(xlabel="time [1/s]", ylabel="|law − simulated| / s")
left.legend()
right.legend()
fig

# %% [markdown]
# Hardly by eye, and by seven orders of magnitude in the error. A figure convinces; a number
# decides.
#
# ## A tolerance that is derived
#
# What may the error be if the law is *right*? Only the solver stands between them: each of its
# steps errs by at most `rtol` relative to a factor, a product has two factors, so that $2 \cdot$
# steps $\cdot$ rtol bounds the sum. This number was written down before the error was looked at;
# had it been fitted to the error, the verdict would say nothing.

# %%
error = float(np.abs(simulated - np.asarray(laws.lora_mode(times, S, A))).max() / S)
print(f"error {error:.1e}, tolerance {2 * RTOL * int(path.steps):.1e}")

# %% [markdown]
# ## The claim
#
# The check is a function of the law's constants. Its docstring is the statement. The *control*
# runs the very same check with a constant altered, and must not be confirmed: a check that also
# confirms a wrong law proves nothing.


# %%
@claims.claim(
    "notebook.single_mode",
    source="theory section 2.2",
    standing="derived",
    tolerance="solver error: 2 · steps · rtol",
    control=claims.Control("a² becomes 1.05 a²", {"square": 1.05}),
)
def single_mode(run, square=1.0):
    """One mode from A = 0.1, B = 0 follows the closed form."""
    law = np.asarray(laws.lora_mode(times, S, A, square=square))
    error = float(np.abs(simulated - law).max() / S)
    tolerance = 2 * RTOL * int(path.steps)
    return claims.Evidence({"sup": error}, {"sup": 0.0}, error, tolerance)


run = claims.Run(seed=0)
found = claims.examine(single_mode, run)
print("verdict:", found.verdict, "| the control is", found.control)

# %% [markdown]
# ## How sharp is it?
#
# A claim that only notices an alteration of 50 % says little. **Predict** the smallest alteration
# of $a^2$ that this one refutes, from the two numbers above.

# %%
alterations = np.geomspace(1e-12, 1.0, 25)
errors = [single_mode.check(run, square=1 + x).error for x in alterations]
fig, ax = plots.figure()
ax.loglog(alterations, errors, "o-", ms=3, label="error of the altered law")
ax.axhline(2 * RTOL * int(path.steps), color="C1", ls="--", label="tolerance")
ax.set(xlabel="relative alteration of a²", ylabel="error / s")
ax.legend()
fig

# %%
print(
    "smallest of the usual alterations that is refuted:", claims.resolving_power(single_mode, run)
)

# %% [markdown]
# Where the two lines cross is the claim's resolution. [A page](../docs/resolving.md) lists it for
# all claims of this package.
#
# ## A law that is wrong
#
# The published $\lambda\tanh^2(\lambda t/\sqrt2)$ as a claim, with the same tolerance: what will
# `examine` say, and what of its control?


# %%
@claims.claim(
    "notebook.tanh_squared",
    source="OpenReview gg2Wb2HPOI",
    standing="stated",
    tolerance="solver error: 2 · steps · rtol",
    control=claims.Control("λ becomes 1.05 λ", {"rate": 1.05 * 2**-0.5}),
)
def tanh_squared(run, rate=2**-0.5):
    """One mode from A = 0.1, B = 0 follows λ tanh²(λt/√2)."""
    law = np.asarray(laws.tanh_squared(times, S, rate=rate))
    error = float(np.abs(simulated - law).max() / S)
    return claims.Evidence({"sup": error}, {"sup": 0.0}, error, 2 * RTOL * int(path.steps))


found = claims.examine(tanh_squared, run)
print("verdict:", found.verdict, "| error", f"{found.evidence.error:.2f}")

# %% [markdown]
# Refuted, and not by a hair's breadth. In the package a claim is one file of `lorajax/claims/`, and
# its verdict is on record: [a claim of your own](../docs/extending/claim.md).
#
# ## Exercises
#
# 1. Loosen the solver to `rtol=1e-4`. The tolerance grows with it: is the claim still confirmed,
#    is its control still caught, and what is its resolution now?
# 2. Write a claim of `laws.lazy` for $A = 3$. Its tolerance must say how far the lazy limit may
#    be from the exact law; derive it from the equation of a mode before you run it.
