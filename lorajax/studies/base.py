"""What a study is: a sweep that a paper makes, with its parameters, its figure and its numbers.

A study is a module of this folder with a `STUDY`; its name is then known to the command and to
`studies.find`. The module imports jax inside its functions only, so that the command can read the
parameters without it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST = 2**31 - 1
"""The largest whole number of anything: sizes and seeds are counted in 32 bits."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a study may be given.

    Attributes:
      name: an argument of `make`; with dashes, the command's option.
      about: what it means, with its unit.
      default: a value, or a tuple of them for a list.
      kind: int, float or str: the type of a value.
      choices: the only values, where they are few.
      least: smallest number that is allowed.
      above: number that each must be larger than.
    """

    name: str
    about: str
    default: Any
    kind: type = int
    choices: tuple[Any, ...] = ()
    least: int | float | None = None
    above: int | float | None = None

    @property
    def is_list(self) -> bool:
        """Whether it takes a list of values."""
        return isinstance(self.default, tuple)

    @property
    def option(self) -> str:
        """The command's option."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any, name: str | None = None) -> Any:
        """The value, a tuple where a list is due.

        Args:
          value: what was given.
          name: what to call the parameter in an error.

        Raises:
          ValueError: for a value, or a value of the list, that is not allowed.
        """
        name = name or self.name
        if not self.is_list:
            return value if value is None and self.default is None else self._one(value, name)
        if isinstance(value, str) or not isinstance(value, Sequence | range):
            if not hasattr(value, "__len__"):
                raise ValueError(f"{name} is {value!r}; give a list of values.")
        values = tuple(self._one(each, name) for each in value)
        if self.default and not values:
            raise ValueError(f"{name} is empty; give at least one value.")
        for i, each in enumerate(values):
            if each in values[:i] and self.name not in ("shape", "singular_values"):
                raise ValueError(f"{name} has {each!r} twice; give each value once.")
        return values

    def _one(self, value: Any, name: str) -> Any:
        if self.choices and value not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise ValueError(f"{name} is {value!r}; it must be one of {known}.")
        if self.kind is str:
            return value
        number = float(value)
        if self.kind is int and math.isfinite(number) and abs(number) > MOST:
            raise ValueError(f"{name} is {value!r}; it must be at most {MOST:,}.")
        if not math.isfinite(number) or (self.kind is int and number != int(number)):
            kind = "an integer" if self.kind is int else "finite"
            raise ValueError(f"{name} has {value!r}; it must be {kind}.")
        if self.least is not None and number < self.least:
            raise ValueError(f"{name} has {value!r}; it must be at least {self.least:g}.")
        if self.above is not None and number <= self.above:
            raise ValueError(f"{name} has {value!r}; it must be above {self.above:g}.")
        return self.kind(value)


@dataclasses.dataclass(frozen=True)
class Run:
    """A study's sweep, ready to run.

    Attributes:
      function: what is swept.
      axes: its axes.
      options: of `sweeps.sweep`: key, static, dims, coords and so on.
      engine: what runs a lane, and why; a line.
    """

    function: Callable[..., Any]
    axes: Mapping[str, Any]
    options: Mapping[str, Any]
    engine: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A sweep with its parameters, its figure and its statements.

    Attributes:
      name: the command's word for it.
      about: a line, with the paper.
      parameters: what may be given, each with its meaning and default.
      make: the Run, from all parameters by name.
      figure: of the sweep's data set.
      headline: the variable of the summary.
      statements: what the data set shows, in numbers by name.
    """

    name: str
    about: str
    parameters: tuple[Parameter, ...]
    make: Callable[..., Run]
    figure: Callable[[Any], Any]
    headline: str
    statements: Callable[[Any], Mapping[str, Any]] | None = None

    def values(self, **given: Any) -> dict[str, Any]:
        """All parameters: what is given, checked, and the defaults of the rest.

        Raises:
          ValueError: for an unknown name, or a value that is not allowed.
        """
        known = {p.name: p for p in self.parameters}
        for name in given:
            if name not in known:
                raise ValueError(
                    f"study {self.name!r} has no parameter {name!r}; it takes {', '.join(known)}."
                )
        return {n: p.check(given[n]) if n in given else p.default for n, p in known.items()}

    def prepare(self, **given: Any) -> Run:
        """The sweep for some parameters, the others at their defaults.

        Raises:
          ValueError: for an unknown name, or a value that is not allowed.
        """
        return self.make(**self.values(**given))

    def sweep(self, *, key: Any = None, progress: Any = None, **given: Any) -> Any:
        """Runs the sweep in memory.

        Args:
          key: a PRNG key; the study's own if None.
          progress: as in `sweeps.sweep`.
          **given: parameters.

        Returns:
          The data set.
        """
        from lorajax import sweeps

        run = self.prepare(**given)
        options = dict(run.options) if key is None else {**run.options, "key": key}
        return sweeps.sweep(
            run.function, run.axes, settings=self.settings(**given), progress=progress, **options
        )

    def settings(self, **given: Any) -> dict[str, Any]:
        """What a store says of the sweep: the study, and all that no axis tells."""
        return {"study": self.name, **self.values(**given)}
