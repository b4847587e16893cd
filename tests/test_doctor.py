"""`lorajax doctor`: what it looks at, and that it sees what is wrong."""

import os
import subprocess
import sys

import pytest

from lorajax import environment
from lorajax.cli import main
from lorajax.environment import doctor


def states(findings):
    """The states by subject."""
    return {finding.subject: finding.state for finding in findings}


def one(findings, subject):
    """The finding of a subject; whatever is wrong has a remedy."""
    (found,) = (finding for finding in findings if finding.subject == subject)
    assert found.state != "wrong" or found.remedy
    return found


def test_the_command_reports_a_sound_environment():
    variables = {**os.environ, "NPROC": "16"}
    for name in ("LORAJAX_DATA", "XLA_FLAGS"):  # the tests' own flags are not the command's
        variables.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "lorajax", "doctor"], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing is wrong." in done.stdout and not done.stderr
    for subject in ("python", "devices", "precision", *environment.CANARIES, "threads", "data"):
        assert f" {subject} " in done.stdout


@pytest.mark.parametrize("excess", [1.5, float("inf")])
def test_a_dead_canary_is_wrong_and_exits_one(excess, monkeypatch, capsys):
    name = "product with a scalar"
    monkeypatch.setitem(environment.CANARIES, name, lambda: excess)
    assert one(doctor.computations(), name).state == "wrong"
    monkeypatch.setattr(doctor, "surroundings", list)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG NUMBERS" in printed and environment.GUARD in printed and "1 wrong" in printed


@pytest.mark.parametrize(
    ("variable", "value", "subject", "state"),
    [
        ("NPROC", "2", "threads", "wrong"),
        ("NPROC", "many", "threads", "wrong"),
        ("NPROC", "16", "threads", "ok"),
        ("LORAJAX_DATA", "no-such-folder", "data", "wrong"),
        ("LORAJAX_DATA", ".", "data", "ok"),
        ("JAX_COMPILATION_CACHE_DIR", os.devnull, "compile cache", "wrong"),
    ],
)
def test_threads_and_folders(variable, value, subject, state, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert one(doctor.surroundings(), subject).state == state


def test_a_missing_guard_is_noted(monkeypatch):
    monkeypatch.setattr(doctor.environment, "affected", lambda version: True)
    monkeypatch.setenv("XLA_FLAGS", environment.GUARD)
    assert one(doctor.surroundings(), "flags").state == "ok"
    monkeypatch.delenv("XLA_FLAGS")
    assert environment.GUARD in one(doctor.surroundings(), "flags").remedy


def test_packages_out_of_range_or_missing_are_wrong(monkeypatch):
    wanted = ["numpy>=99", "no-such-package>=1", "jax>=0.1", "torch; extra == 'benchmark'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    found = states(doctor.surroundings())
    assert found["numpy"] == found["no-such-package"] == "wrong" and found["jax"] == "ok"
    assert "torch" not in found
    assert "numpy>=99" in one(doctor.surroundings(), "numpy").remedy


def test_a_platform_that_is_not_there_is_wrong(monkeypatch):
    import jax

    def devices():
        raise RuntimeError("Unknown backend: 'tpu'")

    monkeypatch.setattr(jax, "devices", devices)
    assert one(doctor.computations(), "devices").state == "wrong"
