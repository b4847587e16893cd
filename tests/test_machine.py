"""What a benchmark says of others on the machine."""

import json

import pytest

from benchmarks import anatomy, gradients, machine, waiting


@pytest.mark.parametrize(
    ("everyone", "own", "share"),
    [(14.0, 12.0, 0.0), (15.5, 11.0, 0.25), (13.9, 12.0, 0.0)],
    ids=["all is one's own", "a quarter is others'", "clocks that tick apart"],
)
def test_others_have_what_is_not_ones_own(monkeypatch, everyone, own, share):
    clock = iter([100.0, 105.0])
    spent, mine = iter([10.0, everyone]), iter([8.0, own])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine, "everyone", lambda: next(spent))
    monkeypatch.setattr(machine, "own", lambda: next(mine))
    assert machine.Watch().others() == pytest.approx(share)


def test_a_busy_machine_is_told_and_a_quiet_one_is_not():
    assert machine.said([0.01, None, 0.04]) == ""
    assert "up to 25% of the machine" in machine.said([0.01, 0.25, None])


def test_without_the_system_s_count_nothing_is_said(monkeypatch):
    monkeypatch.setattr(machine, "everyone", lambda: None)
    assert machine.Watch().others() is None
    assert machine.said([None]) == ""


def test_the_system_s_count_holds_ones_own():
    before = machine.everyone()
    if before is None:
        pytest.skip("the system has no /proc/stat")
    begin = machine.own()
    while machine.own() - begin < 0.1:
        sum(range(10_000))
    after = machine.everyone()
    assert after is not None
    # Either counts in hundredths of a second.
    assert after - before >= machine.own() - begin - 0.03


@pytest.mark.apart
def test_a_point_of_the_closed_form_is_taken_apart():
    found = anatomy.measure(lanes=8, rounds=1)
    assert 0 < found["spread"][0] <= found["point"] <= found["spread"][1]
    # By hand: a Gram matrix of four columns, their Cholesky factor, a sweep of six rotations.
    assert 500 < found["operations"] < 5000 and found["loops"] > 6
    # Four modes that grow, fade and shrink at rates of their own, from one to another.
    assert found["transcendentals"] >= 4 + 4 + 16
    assert found["bytes alone"] == pytest.approx(found["bytes"] / 16 * found["passes"]["product"])


def test_a_report_says_where_others_took_of_the_machine(tmp_path, capsys):
    path = tmp_path / "table.json"
    machine.report(str(path), {"rows": 1}, [0.0, None])
    assert json.loads(path.read_text()) == {"rows": 1} and not capsys.readouterr().out
    machine.report(str(path), {"rows": 1}, [0.0, 0.4])
    assert "40%" in json.loads(path.read_text())["busy"] and "40%" in capsys.readouterr().out


@pytest.mark.apart
def test_a_step_of_two_layers_is_taken_apart():
    found = anatomy.steps(size=16, rounds=1)
    assert 0 < found["operations alone"] < found["step"] and found["stages"] == 13
    assert 0 < found["sums"] and 0 < found["slopes"]


@pytest.mark.apart
def test_waiting_tells_the_first_run_from_the_second(tmp_path):
    command = ["validate", "gradient_flow.half_times"]
    first, _ = waiting.measured(command, str(tmp_path))
    second, _ = waiting.measured(command, str(tmp_path))
    assert first["programs"] == second["programs"] > 0
    assert first["reading"] == 0 < second["reading"]
    assert 0 < second["compiling"] < first["compiling"] < first["seconds"]


@pytest.mark.apart
def test_a_gradient_is_as_good_as_the_tolerance_and_the_closed_form_s_better():
    rows = gradients.measure(gradients.reducible(8), rounds=1)
    off = {row["engine"]: row["off"] for row in rows if row["task"] == "backward"}
    assert 0 < off[gradients.CHECKPOINTED] < 100 * gradients.RTOL
    assert off[gradients.CLOSED] < gradients.RTOL
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in rows)
