"""What a traced program costs: its products, and the memory that its values take while it runs.

Nothing is compiled and nothing allocated. The memory is that of a program as XLA makes it of the
trace: cheap entrywise operations are fused into what reads them, and only what a product reads, and
what products, reductions, lookups, exponentials and the like make takes memory, from where it is
made to where it is last read. The rules were found by comparison with XLA's own analysis on CPU
(jaxlib 0.10); they are no promise of its.
"""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Made in memory, and read from there: everything else is fused into its readers.
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot"}
_WHOLE = {
    "cumsum",
    "cummax",
    "cummin",
    "cumlogsumexp",
    "scatter",
    "scatter-add",
    "sort",
    "top_k",
    "while",
    "scan",
    "cond",
    "dynamic_update_slice",
}
_REDUCED = {"gather", "argmax", "argmin", "optimization_barrier"}
# XLA computes these once and keeps them, rather than again for each reader.
_DEAR = {
    *("div", "exp", "log", "tanh", "logistic", "erf", "pow", "sin", "cos", "sqrt", "rsqrt", "cbrt"),
    *("exp2", "log1p", "expm1", "erfc", "erf_inv", "random_bits", "threefry2x32"),
}
_AGAIN = {"remat2", "checkpoint", "remat"}
_MOST = 16
"""Values that what is fused is computed from; of more, one that is read twice is made once."""


def _inner(equation: Any) -> Jaxpr | None:
    """The program of an equation that stands for its equations, such as a call of `jit`."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = equation.params.get(name)
        if isinstance(found, ClosedJaxpr):
            return found.jaxpr
        if isinstance(found, Jaxpr):
            return found
    return None


def _bodies(equation: Any) -> list[tuple[Jaxpr, int]]:
    """Programs that an equation runs, and how often; those of `while` once, as nobody knows."""
    found, times = [], int(equation.params.get("length", 1))
    for value in equation.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                found.append((each.jaxpr, times))
            elif isinstance(each, Jaxpr):
                found.append((each, times))
    return found


def _product(equation: Any) -> int:
    """Operations of one product of arrays: two for each multiplication."""
    result = math.prod(equation.outvars[0].aval.shape)
    left, right = (var.aval.shape for var in equation.invars[:2])
    if equation.primitive.name == "conv_general_dilated":
        spec = equation.params["dimension_numbers"].rhs_spec
        return 2 * result * math.prod(right) // right[spec[0]]
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * result * math.prod(left[axis] for axis in contracted)


def flops(program: Jaxpr) -> int:
    """Floating-point operations of a program's products, the bulk of what a model computes.

    Args:
      program: a traced one, such as `jax.make_jaxpr(f)(…).jaxpr`.

    Returns:
      Two for each multiplication of a product of matrices or a convolution; what stands in a loop
      of known length counts as often as it runs.
    """
    total = 0
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            total += _product(equation)
        total += sum(times * flops(body) for body, times in _bodies(equation))
    return total


def _size(var: Any) -> int:
    aval = var.aval
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(aval.shape)
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize


class _Flat:
    """A program without calls: what each equation makes of which values, by number."""

    def __init__(self, program: Jaxpr):
        self.names: list[str] = []
        self.reads: list[list[int]] = []
        self.makes: list[list[int]] = []
        self.extra: list[int] = []
        self.sizes: list[int] = []
        self.fixed: set[int] = set()  # what a recomputed part is given, which it is kept for
        environment = {var: self._new(var) for var in (*program.constvars, *program.invars)}
        self.given = set(environment.values())
        self._walk(program, environment)
        self.results = [environment[v] for v in program.outvars if not isinstance(v, Literal)]

    def _new(self, var: Any) -> int:
        self.sizes.append(_size(var))
        return len(self.sizes) - 1

    def _walk(self, program: Jaxpr, environment: dict[Any, int]) -> None:
        for equation in program.eqns:
            inner = _inner(equation)
            if inner is not None and len(inner.invars) == len(equation.invars):
                inside: dict[Any, int] = {}
                for var, given in zip(inner.invars, equation.invars, strict=True):
                    literal = isinstance(given, Literal)
                    inside[var] = self._new(var) if literal else environment[given]
                inside |= {var: self._new(var) for var in inner.constvars}
                if equation.primitive.name in _AGAIN:
                    self.fixed |= set(inside.values())
                self._walk(inner, inside)
                for var, result in zip(equation.outvars, inner.outvars, strict=True):
                    literal = isinstance(result, Literal)
                    environment[var] = self._new(var) if literal else inside[result]
                continue
            self.names.append(equation.primitive.name)
            self.reads.append(
                [environment[v] for v in equation.invars if not isinstance(v, Literal)]
            )
            self.makes.append([self._new(var) for var in equation.outvars])
            for var, number in zip(equation.outvars, self.makes[-1], strict=True):
                environment[var] = number
            self.extra.append(max((peak(body) for body, _ in _bodies(equation)), default=0))

    def kept(self) -> set[int]:
        """Values that take memory of their own."""
        kept = self.fixed | set(self.results)
        for name, reads, makes in zip(self.names, self.reads, self.makes, strict=True):
            if name in _PRODUCTS or name in _WHOLE:
                kept |= {*reads, *makes}
            elif name in _REDUCED | _DEAR or name.startswith("reduce_"):
                kept |= set(makes)
        return kept


def peak(program: Jaxpr) -> int:
    """Bytes that the values of a program take where they take most, without what it is given.

    Args:
      program: a traced one.

    Returns:
      Bytes, the results not among them where they are as large as an argument: a step gives its
      state's memory up to the next state.
    """
    flat = _Flat(program)
    kept = flat.kept() - flat.given
    owner = _owners(flat, kept)
    last: dict[int, int] = {}
    for i, reads in enumerate(flat.reads):
        for number in reads:
            for held in owner[number]:
                last[held] = i
    for i, makes in enumerate(flat.makes):
        for number in makes:
            if number in kept:
                last.setdefault(number, i)  # that nothing reads
    results = set(flat.results)
    live = highest = 0
    dying: dict[int, list[int]] = {}
    for number, i in last.items():
        if number in kept and number not in results:
            dying.setdefault(i, []).append(number)
    for i, makes in enumerate(flat.makes):
        made = [number for number in makes if number in kept and number not in results]
        fresh = sum(flat.sizes[number] for number in made)
        dead = dying.get(i, [])
        whole = flat.names[i] in _PRODUCTS or flat.names[i] in _WHOLE
        old = sum(flat.sizes[number] for number in dead if number not in made)
        highest = max(highest, live + flat.extra[i] + (fresh if whole else max(fresh - old, 0)))
        live += fresh - sum(flat.sizes[number] for number in dead)
    return highest


def _owners(flat: _Flat, kept: set[int]) -> dict[int, frozenset[int]]:
    """The kept values that each value is computed from, through what is fused; itself if kept.

    Adds to those kept what is fused from too many and read more than once.
    """
    found: dict[int, frozenset[int]] = {number: frozenset() for number in range(len(flat.sizes))}
    for number in kept:
        found[number] = frozenset((number,))
    readers = Counter(number for reads in flat.reads for number in set(reads))
    for reads, makes in zip(flat.reads, flat.makes, strict=True):
        behind = frozenset().union(*(found[number] for number in reads))
        for number in makes:
            if len(behind) > _MOST and readers[number] > 1:
                kept.add(number)
            found[number] = frozenset((number,)) if number in kept else behind
    return found
