"""Every claim's verdict is the one on record, and every altered law is caught.

Claims share simulations through one Run a process, so that all of them cost what `lorajax
validate` costs.
"""

import functools
import json
from importlib import resources

import jax
import numpy as np
import pytest
from matplotlib.text import Text

import lorajax.finetune.claims  # noqa: F401  adds to the registry
from lorajax import claims, plots
from lorajax.claims import Assumption, Control, Evidence, Run

ROWS = json.loads(
    resources.files("lorajax").joinpath("claims", "record.json").read_text(encoding="utf-8")
)
RECORD = {claim: row["verdict"] for claim, row in ROWS.items()}
RUN = Run(seed=0, profile="quick")
LONG = {
    "gradient_flow.loss_tail",
    "jang2024.equivalence",
    "jang2024.no_spurious_minima",
    "jang2024.no_spurious_minima_perturbed",
    "mua2026.carried_rate",
    "rslora2023.multiplier",
    "xu2025.slow_tail",
    "xu2025.smaller_alpha_generic",
}
"""Those that run for so long that it pays to optimize their programs, as nothing else here does."""


def test_the_record_names_every_claim_and_no_other():
    assert list(RECORD) == list(claims.REGISTRY)
    assert len(RECORD) >= 20
    assert "inconclusive" not in RECORD.values()
    assert all(row["seeds"] and 0 in row["seeds"] for row in ROWS.values())
    assert RECORD["spectral_dynamics.tanh_squared"] == "refuted"
    assert RECORD["spectral_dynamics.ordering"] == "confirmed"
    assert RECORD["spectral_dynamics.benign_rank"] == "confirmed"


COSTLIEST = {
    "allora2024.frozen_time",
    "gradient_flow.balanced_propagator",
    "gradient_flow.conservation",
    "gradient_flow.loss_tail",
    "intruders2026.gaussian",
    "jang2024.no_spurious_minima",
    "jang2024.no_spurious_minima_perturbed",
    "kim2025.gradient_structure",
    "loraone2025.one_step",
    "mua2026.carried_rate",
    "reflora2025.balanced_flow",
    "riemannian2024.invariance",
    "rslora2023.multiplier",
    "rushka2026.low_rank_loss",
    "rushka2026.trace_squared_loss",
    "spectral_dynamics.random_signs",
    "spectral_dynamics.rank_rule",
    "spectral_dynamics.split_half",
    "spectral_dynamics.tucker_benign_rank",
    "spectral_dynamics.tucker_conservation",
    "spectral_dynamics.tucker_delay",
    "spectral_dynamics.tucker_ranks",
    "xu2025.escape_slope",
    "xu2025.slow_tail",
    "xu2025.smaller_alpha_aligned",
    "xu2025.smaller_alpha_generic",
}
"""What takes longest; `make validate` examines these as well."""
# Those on real networks train for minutes: `lorajax validate finetuning`, a gate of .ci/run.
EACH = [
    pytest.param(
        name,
        marks=[
            pytest.mark.xdist_group(name.partition(".")[0]),
            *([pytest.mark.apart] if name in COSTLIEST else []),
        ],
    )
    for name, claim in claims.REGISTRY.items()
    if not claim.on_request
]


@pytest.fixture
def optimized(request):
    """Optimizes the programs of a long claim."""
    quickly = "jax_disable_most_optimizations"
    jax.config.update(quickly, request.node.callspec.params["name"] not in LONG)
    yield
    jax.config.update(quickly, True)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", EACH)
def test_verdict_is_on_record_and_the_altered_law_is_caught(name):
    claim = claims.REGISTRY[name]
    evidence = claim.check(RUN)
    assert evidence.verdict == RECORD[name], (evidence.error, evidence.tolerance)
    altered = claim.check(RUN, **claim.control.altered)
    assert altered.verdict != "confirmed", claim.control.change
    assert evidence.draw is not None and evidence.caption
    (axes,) = plots.panel(evidence.draw).axes
    assert axes.has_data() and axes.get_xlabel() and axes.get_ylabel()
    sizes = [each.get_fontsize() for each in axes.findobj(Text) if each.get_text()]
    assert min(sizes) >= 8, "letters that cannot be read in print"
    assert claim.statement and claim.source and claim.tolerance


def evidence(error, tolerance=1.0, **rest):
    return Evidence({}, {}, error, tolerance, **rest)


def test_the_rule_of_verdicts():
    assert evidence(1.0).verdict == "confirmed"
    assert evidence(1.1).verdict == "refuted"
    assert evidence(1.1, uncertainty=0.2).verdict == "inconclusive"
    assert evidence(float("nan")).verdict == "inconclusive"
    assert evidence(0.0, vacuous=True).verdict == "vacuous"
    broken = (Assumption("something that fails", False),)
    assert evidence(0.0, assumptions=broken).verdict == "inconclusive"
    assert evidence(0.0, vacuous=True, assumptions=broken).verdict == "inconclusive"


def test_chance_takes_a_true_claim_over_its_tolerance_once_in_a_thousand():
    """Draws by numpy, at a risk that is large enough to be seen by 20 000 of them."""
    draw = np.random.default_rng(0)
    count, seen = 20000, 8
    means = draw.normal(size=(count, 3, seen))
    bars = means.std(axis=2, ddof=1) / seen**0.5
    many = claims.standard_errors(3, freedom=seen - 1)
    failed = np.mean(np.any(np.abs(means.mean(axis=2)) > many * bars, axis=1))
    assert failed <= claims.SAMPLING_RISK + 4 * (claims.SAMPLING_RISK / count) ** 0.5
    np.testing.assert_allclose(claims.standard_errors(), 3.2905267, rtol=1e-6)
    for rate in (0.0, 1e-3, 0.1, 0.5):
        most = claims.most_by_chance(40, rate)
        hits = draw.binomial(40, rate, size=count)
        assert np.mean(hits > most) <= claims.SAMPLING_RISK + 4 * (1e-3 / count) ** 0.5
        assert most == 0 or np.mean(hits > most - 1) > claims.SAMPLING_RISK / 4
    assert claims.most_by_chance(40, 1.0) == 40
    with pytest.raises(ValueError, match="both count"):
        claims.standard_errors(0)
    with pytest.raises(ValueError, match="count is 0"):
        claims.most_by_chance(0, 0.5)


def fake(check):
    return claims.Claim("a.b", "s", "s", "derived", "t", Control("none", {"altered": True}), check)


def test_a_check_that_confirms_an_altered_law_is_inconclusive():
    outcome = claims.examine(fake(lambda run, altered=False: evidence(0.0)), RUN)
    assert outcome.evidence is not None and outcome.evidence.verdict == "confirmed"
    assert outcome.verdict == "inconclusive"


def test_the_resolving_power_is_the_smallest_alteration_that_is_caught():
    def of(check, altered):
        control = Control("altered", {"constant": altered})
        made = claims.Claim("a.b", "s", "s", "derived", "t", control, check)
        return claims.resolving_power(made, RUN)

    def up(run, constant=2.0):
        return evidence(abs(constant / 2 - 1), tolerance=0.015)

    def down(run, constant=-4.0):
        return evidence(abs(constant / 4 + 1) if constant > -4 else 0.0, tolerance=0.035)

    assert of(up, 2.1) == 0.02 and of(up, 1.9) == 0.02
    assert of(down, -3.8) == 0.05
    assert of(lambda run, constant=1.0: evidence(0.0), 1.05) == float("inf")
    assert (
        of(lambda run, constant=1.0: evidence(0.0), -1.0)
        == "no constant: an order, which the control reverses"
    )
    assert str(of(lambda run, constant=False: evidence(0.0), True)).startswith("no constant")
    assert str(of(lambda run, constant=0.0: evidence(0.0), 1.0)).startswith("no constant")
    assert of(lambda run, constant=1.0: evidence(2.0), 1.05) == "not asked: the claim is refuted"


def test_an_outcome_is_read_as_it_was_written():
    kinds = (
        evidence(0.5, caption="a figure"),
        Evidence({"x": 1 / 3, "y": [1.0, 2.5]}, {"x": np.float64(0.3)}, 2.0, 1.0),
        evidence(1.1, uncertainty=0.2),
        evidence(0.0, vacuous=True),
        evidence(0.0, assumptions=(Assumption("something that fails", False, "0.2"),)),
        evidence(float("inf")),
        None,
    )
    claim = fake(lambda run: evidence(0.0))
    for found in kinds:
        for control in ("confirmed", "refuted"):
            made = claims.Outcome(claim, found, control, 0.25, "" if found else "it broke")
            text = json.dumps(made.to_json(), default=float)
            read = claims.Outcome.from_json(made.claim, json.loads(text))
            assert read.verdict == made.verdict
            assert json.dumps(read.to_json(), default=float) == text
    with pytest.raises(KeyError):
        claims.Outcome.from_json(claim, {"error": 1.0})


def test_a_check_that_raises_costs_only_itself():
    def check(run, altered=False):
        raise RuntimeError("out of luck")

    outcome = claims.examine(fake(check), RUN)
    assert outcome.verdict == "inconclusive" and "out of luck" in outcome.problem
    assert outcome.to_json()["problem"] == "RuntimeError: out of luck"


def test_an_unknown_name_is_refused_with_what_was_meant():
    with pytest.raises(ValueError, match="did you mean xu2025"):
        claims.select(["xu2024"])
    assert {c.paper for c in claims.select(["xu2025"])} == {"xu2025"}


def test_the_exact_law_passes_where_tanh_squared_fails():
    """The same comparison, the same tolerance: the check can confirm a law that holds."""
    found = claims.REGISTRY["spectral_dynamics.tanh_squared"].check(RUN)
    exact = found.measured["sup_error_of_exact_law"]
    assert isinstance(exact, list) and min(exact) < found.tolerance < found.error


def test_several_at_once_give_what_one_after_another_gives():
    ran = []

    def check(run, index, altered=False):
        value = run.once("shared", lambda: ran.append(index) or 1.0)
        return evidence(0.5 * value, tolerance=0.1 if altered else 1.0)

    chosen = [
        claims.Claim(
            f"{'ab'[i % 2]}.{i}",
            "s",
            "s",
            "derived",
            "t",
            Control("none", {"altered": True}),
            functools.partial(check, index=i),
        )
        for i in range(7)
    ]
    outcomes = list(claims.examine_all(chosen, Run(), workers=3))
    assert {o.claim.id for o in outcomes} == {c.id for c in chosen} and len(outcomes) == 7
    assert {o.verdict for o in outcomes} == {"confirmed"} and len(ran) == 1
    with pytest.raises(ValueError, match="workers is 0"):
        list(claims.examine_all(chosen, Run(), workers=0))
