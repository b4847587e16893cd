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


def installs(monkeypatch, **plugins):
    """Lets jaxlib be 1.0 and plugins be installed in the given versions."""

    def version(name):
        if name.replace("-", "_") in plugins:
            return plugins[name.replace("-", "_")]
        if name == "jaxlib":
            return "1.0"
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", version)


@pytest.mark.parametrize(
    ("plugins", "driver", "expected"),
    [
        ({}, False, {}),
        ({}, True, {"cuda": "note"}),
        ({"jax_cuda13_plugin": "1.0"}, True, {"jax-cuda13-plugin": "ok"}),
        ({"jax_cuda12_plugin": "0.9"}, False, {"jax-cuda12-plugin": "wrong"}),
        (
            {"jax_cuda13_plugin": "1.0", "jax_cuda12_plugin": "1.0"},
            True,
            {"jax-cuda13-plugin": "ok", "jax-cuda12-plugin": "ok", "cuda": "wrong"},
        ),
    ],
)
def test_a_card_without_its_plugin_or_with_another_version_of_it(
    plugins, driver, expected, monkeypatch, tmp_path
):
    installs(monkeypatch, **plugins)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path if driver else tmp_path / "missing")
    found = list(doctor._cards())
    assert states(found) == expected
    assert all(finding.remedy for finding in found if finding.state != "ok")


def test_a_card_that_the_plugin_does_not_find_is_noted(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert doctor._devices("1: cpu", "cpu").state == "ok"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    assert doctor._devices("1: cpu", "cpu").state == "note"
    assert doctor._devices("1: gpu", "gpu").state == "ok"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor._devices("1: cpu", "cpu").state == "ok"


def test_a_platform_that_is_not_there_is_wrong(monkeypatch):
    import jax

    def devices():
        raise RuntimeError("Unknown backend: 'tpu'")

    monkeypatch.setattr(jax, "devices", devices)
    assert one(doctor.computations(), "devices").state == "wrong"
