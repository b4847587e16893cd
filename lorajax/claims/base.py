"""What a claim is, what evidence it returns, and how a verdict follows from the evidence.

A claim is a function `check(run, **law) -> Evidence`. It simulates, predicts, and compares; `law`
are the constants of the law (or the assumption) under test, with the claimed values as defaults.
Its negative control calls the same function with one of them altered, by about 5 % where it is a
number, and must not be confirmed: a check that also confirms a wrong law proves nothing.
"""

import collections
import dataclasses
import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from scipy.special import bdtr, stdtrit

Standing = Literal["stated", "derived", "reconstructed", "recalled"]
Verdict = Literal["confirmed", "refuted", "inconclusive", "vacuous"]
Profile = Literal["quick", "full"]
Value = float | list[float]

PROFILES: tuple[Profile, ...] = ("quick", "full")
"""How thoroughly claims run: in a minute for all of them, or with more draws and finer grids."""

SAMPLING_RISK = 1e-3
"""Probability that chance alone takes a true claim over its tolerance, all its statements together.

Every sampling term of a tolerance follows from it. Twelve claims of `lorajax validate` have one,
so that a run of all of them shows a wrong verdict by chance in at most 12 of 1000 cases.
"""


def standard_errors(statements: int = 1, freedom: float | int = np.inf) -> float:
    """How many standard errors chance exceeds in SAMPLING_RISK of all claims, on either side.

    Args:
      statements: how many means the claim compares; the risk is shared among them (Bonferroni).
      freedom: degrees of freedom of the standard error, repetitions less one where it is estimated.

    Returns:
      The quantile of Student's t.

    Raises:
      ValueError: for fewer statements than one, or no degree of freedom.

    Example:
      >>> from lorajax.claims import standard_errors
      >>> round(standard_errors(), 2), round(standard_errors(18, freedom=63), 2)
      (3.29, 4.33)
    """
    if statements < 1 or freedom <= 0:
        raise ValueError(f"{statements} statements of {freedom} degrees of freedom; both count.")
    # Beyond a million degrees of freedom the quantile is the normal one to all digits.
    return float(stdtrit(min(freedom, 1e9), 1 - SAMPLING_RISK / (2 * statements)))


def most_by_chance(count: int, rate: float | int, statements: int = 1) -> int:
    """How many of `count` independent cases of probability `rate` chance exceeds in SAMPLING_RISK.

    Args:
      count: of cases.
      rate: probability of one.
      statements: how many counts the claim compares; the risk is shared among them.

    Returns:
      The least k with P(more than k) ≤ SAMPLING_RISK / statements, of the binomial law itself: it
      is skewed where few cases are expected.

    Raises:
      ValueError: for a count below 1 or a rate outside [0, 1].

    Example:
      >>> from lorajax.claims import most_by_chance
      >>> most_by_chance(40, 0.1), most_by_chance(40, 1e-6)
      (11, 0)
    """
    if count < 1 or not 0 <= rate <= 1:
        raise ValueError(f"count is {count} and rate {rate}; they must be positive, and a rate.")
    numbers = np.arange(count + 1, dtype=np.float64)
    return int(np.argmax(bdtr(numbers, count, rate) >= 1 - SAMPLING_RISK / statements))


@dataclasses.dataclass(frozen=True)
class Assumption:
    """A condition of a claim, looked at on the instance at hand.

    Attributes:
      text: the condition in words.
      holds: whether it holds here.
      detail: the numbers that say so.
    """

    text: str
    holds: bool
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one check found.

    Attributes:
      measured: named numbers from the simulation.
      predicted: the same names from the law, where it gives them.
      error: the one number that is held against the tolerance, in the claim's own unit.
      tolerance: how large it may be if the law is right; derived, never fitted.
      assumptions: the claim's conditions on this instance; one that fails makes it inconclusive.
      vacuous: nothing was found that the statement speaks of, so that it was not tested.
      uncertainty: standard error of `error`; an excess below it decides nothing.
      draw: draws the claim's figure on a matplotlib Axes.
      caption: what the figure shows.
    """

    measured: Mapping[str, Value]
    predicted: Mapping[str, Value]
    error: float
    tolerance: float
    assumptions: tuple[Assumption, ...] = ()
    vacuous: bool = False
    uncertainty: float = 0.0
    draw: Callable[[Any], None] | None = None
    caption: str = ""

    @property
    def verdict(self) -> Verdict:
        """Confirmed, refuted, inconclusive or vacuous, by the same rule for every claim."""
        if not np.isfinite(self.error) or not all(a.holds for a in self.assumptions):
            return "inconclusive"
        if self.vacuous:
            return "vacuous"
        if self.error <= self.tolerance:
            return "confirmed"
        return "refuted" if self.error > self.tolerance + self.uncertainty else "inconclusive"


@dataclasses.dataclass(frozen=True)
class Control:
    """The negative control of a claim.

    Attributes:
      change: what is altered, in words.
      altered: the keyword arguments that alter it.
    """

    change: str
    altered: Mapping[str, Any]


class Run:
    """One validation: its seed, its profile, and what has been simulated already.

    Args:
      seed: from which every claim's key is folded.
      profile: "quick" (2 cores, a minute for all claims) or "full".
    """

    def __init__(self, seed: int = 0, profile: Profile = "quick") -> None:
        self.seed = seed
        self.profile: Profile = profile
        self._memory: dict[Any, Any] = {}
        self._guard = threading.Lock()
        self._locks: dict[Any, threading.Lock] = {}

    def key(self, index: int = 0) -> jax.Array:
        """A PRNG key that depends on the seed and the index alone."""
        return jax.random.fold_in(jax.random.key(self.seed), index)

    def pick(self, quick: Any, full: Any) -> Any:
        """The value for this run's profile."""
        return full if self.profile == "full" else quick

    def once(self, name: Any, simulate: Callable[[], Any]) -> Any:
        """Result of a simulation, run at most once: claims and their controls share it."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._memory:
                self._memory[name] = simulate()
            return self._memory[name]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of theory with the check that holds it against simulation.

    Attributes:
      id: `paper.name`.
      statement: in our words.
      source: where it comes from.
      standing: stated, derived, reconstructed or recalled.
      tolerance: how the tolerance is derived.
      control: the negative control.
      check: the function; see this module.
      on_request: run in a quick validation only if named, because it trains a network.
    """

    id: str
    statement: str
    source: str
    standing: Standing
    tolerance: str
    control: Control
    check: Callable[..., Evidence]
    on_request: bool = False

    @property
    def paper(self) -> str:
        """The part of the id before the dot."""
        return self.id.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A claim's evidence, its control's, and how long both took.

    Attributes:
      claim: the claim.
      evidence: None if the check raised.
      control: the control's verdict.
      seconds: wall time of both.
      problem: the exception's message, if any.
    """

    claim: Claim
    evidence: Evidence | None
    control: Verdict
    seconds: float
    problem: str = ""

    @property
    def verdict(self) -> Verdict:
        """The claim's verdict; inconclusive where its check raised or its control was confirmed."""
        if self.evidence is None or self.control == "confirmed":
            return "inconclusive"
        return self.evidence.verdict

    def to_json(self) -> dict[str, Any]:
        """The entry of `verdicts.json`."""
        evidence = self.evidence
        entry: dict[str, Any] = {
            "id": self.claim.id,
            "paper": self.claim.paper,
            "standing": self.claim.standing,
            "verdict": self.verdict,
            "measured": dict(evidence.measured) if evidence else {},
            "predicted": dict(evidence.predicted) if evidence else {},
            "error": evidence.error if evidence else None,
            "tolerance": evidence.tolerance if evidence else None,
            "derivation": self.claim.tolerance,
            "uncertainty": evidence.uncertainty if evidence else None,
            "vacuous": bool(evidence and evidence.vacuous),
            "assumptions": [dataclasses.asdict(a) for a in evidence.assumptions]
            if evidence
            else [],
            "caption": evidence.caption if evidence else "",
            "control": {"change": self.claim.control.change, "verdict": self.control},
            "seconds": round(self.seconds, 3),
        }
        return entry | ({"problem": self.problem} if self.problem else {})

    @classmethod
    def from_json(cls, claim: Claim, entry: Mapping[str, Any]) -> "Outcome":
        """The outcome that an entry of `verdicts.json` was made of, all but its drawing.

        Raises:
          KeyError, TypeError: for an entry that `to_json` did not make.
        """
        names = ("measured", "predicted", "error", "tolerance", "vacuous", "uncertainty", "caption")
        evidence = None
        if entry["error"] is not None:
            assumptions = tuple(Assumption(**each) for each in entry["assumptions"])
            given = {name: entry[name] for name in names}
            evidence = Evidence(**given, assumptions=assumptions)
        control, seconds = entry["control"]["verdict"], entry["seconds"]
        return cls(claim, evidence, control, seconds, entry.get("problem", ""))


REGISTRY: dict[str, Claim] = {}
"""All claims by id, in the order of their modules."""


def claim(
    id: str,
    *,
    source: str,
    standing: Standing,
    tolerance: str,
    control: Control,
    on_request: bool = False,
) -> Callable[[Callable[..., Evidence]], Claim]:
    """Registers a check as a claim; its docstring is the statement.

    Args:
      id: `paper.name`, unique.
      source: where the statement comes from.
      standing: stated, derived, reconstructed or recalled.
      tolerance: how the tolerance is derived.
      control: the negative control.
      on_request: leave it out of quick validations that do not name it.

    Returns:
      A decorator that replaces the function by its Claim.

    Raises:
      ValueError: for an id that is taken or has no paper, or a check without a statement.
    """

    def register(check: Callable[..., Evidence]) -> Claim:
        if id.count(".") != 1 or id in REGISTRY:
            raise ValueError(f"id is {id!r}; it must be a new `paper.name`.")
        statement = " ".join((check.__doc__ or "").split())
        if not statement:
            raise ValueError(f"claim {id} has no statement; give its check a docstring.")
        REGISTRY[id] = Claim(id, statement, source, standing, tolerance, control, check, on_request)
        return REGISTRY[id]

    return register


def examine(claim: Claim, run: Run) -> Outcome:
    """Runs a claim and its negative control.

    Args:
      claim: which.
      run: seed and profile.

    Returns:
      An Outcome; a check that raises is inconclusive and does not stop the others.
    """
    begin = time.perf_counter()
    try:
        evidence = claim.check(run)
        control = claim.check(run, **claim.control.altered).verdict
        return Outcome(claim, evidence, control, time.perf_counter() - begin)
    except Exception as error:  # One broken check must not cost the verdicts of all the others.
        message = f"{type(error).__name__}: {error}"
        return Outcome(claim, None, "inconclusive", time.perf_counter() - begin, message)


ALTERATIONS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Relative alterations of a constant that `resolving_power` tries, in turn."""


def resolving_power(claim: Claim, run: Run) -> float | str:
    """The smallest relative alteration of a claim's constant that its check refutes.

    The constant is the number that the control alters, and it is altered the same way, by less or
    more, through the same check.

    Args:
      claim: which.
      run: seed and profile; what the claim has simulated is not simulated again.

    Returns:
      One of ALTERATIONS; infinity where none of them is refuted. Where there is no constant to
      alter, the reason in words.
    """
    numbers = {
        name: (float(parameter.default), float(claim.control.altered[name]))
        for name, parameter in inspect.signature(claim.check).parameters.items()
        if name in claim.control.altered
        and isinstance(parameter.default, int | float)
        and not isinstance(parameter.default, bool)
    }
    if len(numbers) != 1 or len(claim.control.altered) != 1:
        return "no constant: the control replaces a part of the statement"
    ((name, (claimed, altered)),) = numbers.items()
    if claimed == 0:
        return "no constant: the control breaks an assumption, or counts one more"
    if altered / claimed < 0:
        return "no constant: an order, which the control reverses"
    if (verdict := claim.check(run).verdict) != "confirmed":
        return f"not asked: the claim is {verdict}"
    direction = 1 if altered > claimed else -1
    for size in ALTERATIONS:
        value = claimed + direction * abs(claimed) * size
        if claim.check(run, **{name: value}).verdict == "refuted":
            return size
    return float("inf")


def examine_all(claims: Sequence[Claim], run: Run, workers: int = 1) -> Iterator[Outcome]:
    """Runs claims with their controls, several at once: half of their time goes into compiling.

    Args:
      claims: which.
      run: seed and profile; what claims share is still simulated once.
      workers: threads. Results do not depend on their number.

    Yields:
      Outcomes, as they are ready.

    Raises:
      ValueError: for fewer workers than one.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1.")
    waiting: dict[str, collections.deque[Claim]] = {}
    for each in claims:
        waiting.setdefault(each.paper, collections.deque()).append(each)
    busy, guard = collections.Counter[str](), threading.Lock()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    stop = threading.Event()

    def take() -> Claim | None:
        # Claims of a paper share simulations: each worker has a paper to itself where it can.
        with guard:
            papers = [paper for paper, rest in waiting.items() if rest]
            if stop.is_set() or not papers:
                return None
            paper = min(papers, key=lambda name: busy[name])
            busy[paper] += 1
            return waiting[paper].popleft()

    def work() -> None:
        while (claim := take()) is not None:
            outcome = examine(claim, run)
            with guard:
                busy[claim.paper] -= 1
            done.put(outcome)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(claims)))]
    for thread in threads:
        thread.start()
    try:
        for _ in claims:
            yield done.get()
    finally:
        stop.set()


def select(names: list[str] | tuple[str, ...]) -> list[Claim]:
    """Claims by id or by paper, all of them for no names.

    Raises:
      ValueError: for a name that is neither, with the nearest ones that are.
    """
    import difflib

    papers = {c.paper for c in REGISTRY.values()}
    for name in names:
        if name not in REGISTRY and name not in papers:
            near = difflib.get_close_matches(name, [*REGISTRY, *papers], n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; see `lorajax claims`."
            raise ValueError(f"claim is {name!r}, which is neither a claim nor a paper{hint}")
    return [c for c in REGISTRY.values() if not names or c.id in names or c.paper in names]
