"""`lorajax sweep` and `lorajax plot`: studies run, resume, and are drawn again."""

import pytest

from lorajax.cli import main
from lorajax.sweeps import open_sweep


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


SMALL = {
    "rank-scale": ["--size", 8, "--ranks", 1, 2],
    "spectrum-gap": ["--size", 6, "--rank", 2],
    "rank-rule": ["--size", 12, "--rank", 2, "--noises", 0.25, 0.5],
    "init-scale": ["--size", 6, "--rank", 2],
    "flow": ["--shape", 8, 6, "--ranks", 2, "--starts", "lora", "spectral"],
}


@pytest.mark.parametrize(
    ("study", "variable", "lanes"),
    [
        pytest.param("rank-scale", "losses", 2 * 2 * 2, marks=pytest.mark.apart),
        ("spectrum-gap", "delay", 19 * 2 * 2),
        ("rank-rule", "split_half", 5 * 2 * 2),
        pytest.param("init-scale", "misalignment", 2 * 2 * 2, marks=pytest.mark.apart),
        ("flow", "singular_values", 2 * 2 * 2),
    ],
)
def test_a_study_runs_and_is_drawn(study, variable, lanes, tmp_path, capsys):
    options = [*SMALL[study], "--seeds", "0:2"]
    options += [] if study == "rank-rule" else ["--scales", "1e-1", "1e-2"]
    store = tmp_path / "s.zarr"
    assert run("sweep", study, *options, "--store", store) == 0
    said = capsys.readouterr()
    assert f"lanes: {lanes} converged" in said.out and f"{lanes}/{lanes} [" in said.err
    assert "engine: " in said.out and (tmp_path / "s.png").stat().st_size > 5000
    found = open_sweep(store)
    assert found[variable].notnull().any() and found["status"].size == lanes
    if study != "rank-scale":
        return
    # Again: nothing is left to run; drawn again: the same picture.
    assert run("sweep", study, *options, "--store", store) == 0
    assert f"({lanes} were there)" in capsys.readouterr().err
    assert run("plot", store, "--out", tmp_path / "again.png") == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "s.png").read_bytes()
    assert run("sweep", study, *options[:-1], "1e-3", "--store", store) == 2
    assert "axes.scale.scale" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("sweep", "spectrum-gap", "--size", 6, "--seeds", "0:2", "--dry-run") == 0
    said = capsys.readouterr().out
    for word in ("lanes: 304", "closed form", "MiB a call", "time: about"):
        assert word in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "init-scale", "--seeds", "-1"], "--seeds has -1"),
        (["sweep", "init-scale", "--seeds", "3:1"], "--seeds has '3:1'"),
        (["sweep", "init-scale", "--seeds", "many"], "a run such as 0:30"),
        (["sweep", "flow", "--scales", "1e-1", "-1"], "--scales has -1.0"),
        (["sweep", "flow", "--scales", "small"], "--scales has 'small'; it must be a number"),
        (["sweep", "flow", "--ranks", "0"], "--ranks has 0"),
        (["sweep", "flow", "--starts", "nope"], "must be one of balanced"),
        (["sweep", "flow", "--starts", "pissa", "--scales", "1"], "no parameter 'scale'"),
        (["sweep", "init-scale", "--devices", "99"], "--devices is 99"),
        (["sweep", "init-scale", "--chunk", "0"], "--chunk is 0"),
        (["plot", "no-such-store.zarr"], "does not exist"),
    ],
)
def test_bad_usage_is_named(arguments, words, capsys):
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err


def test_the_help_of_a_study_shows_its_own_options(capsys):
    with pytest.raises(SystemExit):
        run("sweep", "rank-rule", "--help")
    said = capsys.readouterr().out
    assert "--noises" in said and "--starts" not in said and "default 0:20" in said
