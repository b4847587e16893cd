"""Functions of matrices by their decompositions, with derivatives that know no gap.

Differentiating a decomposition divides by the gaps between singular values, and there are none at
LoRA's own starts: B = 0, orthonormal columns. The functions themselves are smooth there, and their
derivatives, written here, divide by sums of singular values alone. Where a matrix has lost rank the
functions are pseudo-inverses, which jump as rank is gained; there a derivative is finite, and that
along changes that leave the rank as it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lorajax.factors import Factors


def spectrum_kept(values: Float[Array, "... k"], size: int) -> tuple[Array, Bool[Array, "... k"]]:
    """Singular values with 1 in place of those that rounding alone leaves, and which are kept."""
    floor = size * float(jnp.finfo(values.dtype).eps) * jnp.max(values, axis=-1, keepdims=True)
    keep = values > floor
    return jnp.where(keep, values, 1), keep


def _sums(values: Array) -> Array:
    return values[..., :, None] + values[..., None, :]


@jax.custom_jvp
def inverse_power(gram: Array, damping: Array, exponent: Array) -> Array:
    """`(gram + damping I)^{−exponent}` of a positive semidefinite matrix, a pseudo-inverse."""
    return _inverse_power(gram, damping, exponent)[0]


def _inverse_power(gram: Array, damping: Array, exponent: Array) -> tuple[Array, ...]:
    values, vectors = jnp.linalg.eigh(gram)
    safe, keep = spectrum_kept(values + damping, gram.shape[-1])
    powers = jnp.where(keep, safe**-exponent, 0)
    return (vectors * powers[..., None, :]) @ vectors.mT, safe, keep, powers, vectors


@inverse_power.defjvp
def _(primals, tangents):
    out, safe, keep, powers, vectors = _inverse_power(*primals)
    exponent = primals[2]
    change, damping, bend = tangents
    # Daleckii–Krein: divided differences of x^−e, by logarithms, which lose nothing where they are
    # near each other: (x^−e − y^−e)/(x − y) = y^(−e−1) expm1(−e l)/expm1(l), l = ln(x/y).
    x, y = safe[..., :, None], safe[..., None, :]
    logs = jnp.log1p((x - y) / y)
    apart = jnp.where(logs == 0, 1, logs)
    ratio = jnp.expm1(-exponent * apart) / jnp.expm1(apart)
    divided = jnp.where(logs == 0, -exponent, ratio) * y ** (-exponent - 1)
    # From a value that is kept to one that counts as 0, whose power is 0 as well.
    across = jnp.where(keep[..., :, None], (powers / safe)[..., :, None], 0)
    across = across + jnp.where(keep[..., None, :], (powers / safe)[..., None, :], 0)
    both = keep[..., :, None] & keep[..., None, :]
    one = keep[..., :, None] ^ keep[..., None, :]
    divided = jnp.where(both, divided, jnp.where(one, across, 0))
    change = change + damping * jnp.eye(change.shape[-1], dtype=change.dtype)
    turned = vectors @ (divided * (vectors.mT @ change @ vectors)) @ vectors.mT
    scaled = -bend * jnp.log(safe) * powers
    return out, turned + (vectors * scaled[..., None, :]) @ vectors.mT


@jax.custom_jvp
def inverse_root(second: Array, lifted: Array, eps: Array) -> Array:
    """`(√(second + lifted I) + eps I)⁻¹` of a positive semidefinite matrix, eps above 0.

    Its slope is infinite between two values of 0. What it is multiplied by here, a gradient that is
    part of the second moment, is 0 there as well, so that the derivative of the product is that
    without this part.
    """
    return _inverse_root(second, lifted, eps)[0]


def _inverse_root(second: Array, lifted: Array, eps: Array) -> tuple[Array, ...]:
    values, vectors = jnp.linalg.eigh(second)
    roots = jnp.sqrt(jnp.maximum(values, 0) + lifted[..., None])
    return (vectors / (roots + eps)[..., None, :]) @ vectors.mT, roots, vectors


@inverse_root.defjvp
def _(primals, tangents):
    out, roots, vectors = _inverse_root(*primals)
    change, lifted, wider = tangents
    lifted = lifted[..., None, None] * jnp.eye(change.shape[-1], dtype=change.dtype)
    damped = roots + primals[2]
    # Daleckii–Krein, of 1/(√x + ε): −1/((√x + √y)(√x + ε)(√y + ε)).
    _, keep = spectrum_kept(roots**2, change.shape[-1])
    both = ~keep[..., :, None] & ~keep[..., None, :]
    sums = jnp.where(both, 1, _sums(roots))
    divided = -1 / (sums * damped[..., :, None] * damped[..., None, :])
    divided = jnp.where(both, 0, divided)
    turned = vectors @ (divided * (vectors.mT @ (change + lifted) @ vectors)) @ vectors.mT
    scaled = -wider / damped**2
    return out, turned + (vectors * scaled[..., None, :]) @ vectors.mT


@jax.custom_jvp
def polar_factor(matrix: Array) -> Array:
    """`U Vᵀ` of a matrix `U Σ Vᵀ`, without the directions that rounding alone leaves."""
    return _polar(matrix)[0]


def _polar(matrix: Array) -> tuple[Array, ...]:
    u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
    safe, keep = spectrum_kept(values, max(matrix.shape[-2:]))
    u, vt = u * keep[..., None, :].astype(u.dtype), vt * keep[..., :, None].astype(u.dtype)
    return u @ vt, u, safe, vt.mT


@polar_factor.defjvp
def _(primals, tangents):
    out, u, safe, v = _polar(*primals)
    (change,) = tangents
    inner = u.mT @ change @ v
    turned = u @ ((inner - inner.mT) / _sums(safe)) @ v.mT
    right, left = change @ v, u.mT @ change
    right, left = right - u @ (u.mT @ right), left - (left @ v) @ v.mT
    return out, turned + (right / safe[..., None, :]) @ v.mT + (u / safe[..., None, :]) @ left


class Product(NamedTuple):
    """`A B = U Σ Vᵀ` with `L = AᵀU` and `R = B V`, so that `LᵀR = Σ`.

    Attributes:
      u: left singular vectors, 0 where a singular value is not kept.
      v: right ones.
      left: L.
      right: R.
      values: Σ, with 1 in place of what is not kept.
    """

    u: Array
    v: Array
    left: Array
    right: Array
    values: Array


def decomposed(factors: Factors) -> Product:
    """The singular values of a product, without the product."""
    qa, ra = jnp.linalg.qr(factors.a)
    qb, rb = jnp.linalg.qr(factors.b.mT)
    u, values, vt = jnp.linalg.svd(ra @ rb.mT, full_matrices=False)
    values, keep = spectrum_kept(values, max(factors.shape))
    here = keep[..., None, :].astype(u.dtype)
    u, v = u * here, vt.mT * here
    return Product(qa @ u, qb @ v, ra.mT @ u, rb.mT @ v, values)


def _moved(factors: Factors, change: Factors, found: Product) -> tuple[Array, Array, Array]:
    """Of the change of A B what lies between the singular vectors, and all of it beside either."""
    right = change.a @ found.right + factors.a @ (change.b @ found.v)
    left = (found.u.mT @ change.a) @ factors.b + found.left.mT @ change.b
    return found.u.mT @ right, right, left


@jax.custom_jvp
def balancing(factors: Factors) -> tuple[Array, Array]:
    """S with `S BBᵀ S = AᵀA`, and its inverse: `L Σ⁻¹ Lᵀ` and `R Σ⁻¹ Rᵀ`."""
    return _balancing(factors)[0]


def _balancing(factors: Factors) -> tuple[tuple[Array, Array], Product]:
    found = decomposed(factors)
    inverse = 1 / found.values[..., None, :]
    s = (found.left * inverse) @ found.left.mT
    return (s, (found.right * inverse) @ found.right.mT), found


@balancing.defjvp
def _(primals, tangents):
    (factors,), (change,) = primals, tangents
    (s, s_inverse), found = _balancing(factors)
    # S = Aᵀ(MMᵀ)^−½A and S⁻¹ = B(MᵀM)^−½Bᵀ, by the divided differences of x^−½ at the σ².
    left, right, values = found.left, found.right, found.values
    inner, _, _ = _moved(factors, change, found)
    scale = -1 / (values[..., :, None] * values[..., None, :] * _sums(values))
    one = inner * values[..., None, :]
    other = values[..., :, None] * inner
    turned = left @ (scale * (one + one.mT)) @ left.mT
    turned_back = right @ (scale * (other + other.mT)) @ right.mT
    own = (left / values[..., None, :]) @ (found.u.mT @ change.a)
    own_back = (right / values[..., None, :]) @ (found.v.mT @ change.b.mT)
    return (s, s_inverse), (own + own.mT + turned, own_back + own_back.mT + turned_back)


@jax.custom_jvp
def balanced_pair(factors: Factors) -> Factors:
    """`U Σ^½` and `Σ^½ Vᵀ` of `A B = U Σ Vᵀ`, with columns of 0 below rank r."""
    return _balanced_pair(factors)[0]


def _balanced_pair(factors: Factors) -> tuple[Factors, Product]:
    found = decomposed(factors)
    root = jnp.sqrt(found.values)[..., None, :]
    return _padded(found.u * root, (found.v * root).mT, factors.rank), found


def _padded(a: Array, b: Array, rank: int) -> Factors:
    pad = [(0, 0)] * (a.ndim - 1) + [(0, rank - a.shape[-1])]
    return Factors(jnp.pad(a, pad), jnp.pad(b.mT, pad).mT)


@balanced_pair.defjvp
def _(primals, tangents):
    (factors,), (change,) = primals, tangents
    even, found = _balanced_pair(factors)
    inner, right, left = _moved(factors, change, found)
    root = jnp.sqrt(found.values)
    # A balanced pair may turn as long as both turn; of all turns that which divides by sums alone.
    even_inner = inner / _sums(found.values)
    a = (right - found.u @ inner) / root[..., None, :]
    b = (left - inner @ found.v.mT) / root[..., :, None]
    a = a + found.u @ (even_inner * root[..., None, :])
    b = b + (root[..., :, None] * even_inner) @ found.v.mT
    return even, _padded(a, b, factors.rank)
