"""`lorajax sweep` and `lorajax plot`: presets run, resume, and are drawn again."""

import pytest

from lorajax.cli import main
from lorajax.cli.sweep import PRESETS
from lorajax.sweeps import open_sweep


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_the_parser_and_the_presets_agree():
    from lorajax import presets

    assert list(PRESETS) == list(presets.PRESETS)


@pytest.mark.parametrize(
    ("preset", "variable", "lanes"),
    [
        ("rank-scale", "losses", 2 * 2 * 2),
        ("spectrum-gap", "delay", 19 * 2 * 2),
        ("rank-rule", "split_half", 5 * 2 * 2),
        ("init-scale", "misalignment", 2 * 2 * 2),
    ],
)
def test_a_preset_runs_and_is_drawn(preset, variable, lanes, tmp_path, capsys):
    small = {"rank-rule": (12, 2), "rank-scale": (8, 2)}.get(preset, (6, 2))
    options = ["--size", small[0], "--rank", small[1], "--seeds", 2, "--scales", 2]
    store = tmp_path / "s.zarr"
    assert run("sweep", preset, *options, "--store", store) == 0
    said = capsys.readouterr()
    assert f"lanes: {lanes} converged" in said.out and f"{lanes}/{lanes} lanes" in said.err
    assert "engine: " in said.out and (tmp_path / "s.png").stat().st_size > 5000
    found = open_sweep(store)
    assert found[variable].notnull().any() and found["status"].size == lanes
    if preset != "rank-scale":
        return
    # Again: nothing is left to run; drawn again: the same picture.
    assert run("sweep", preset, *options, "--store", store) == 0
    assert f"({lanes} were there)" in capsys.readouterr().err
    assert run("plot", store, "--out", tmp_path / "again.png") == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "s.png").read_bytes()
    assert run("sweep", preset, *options[:-1], 3, "--store", store) == 2
    assert "axes.scale.scale" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("sweep", "spectrum-gap", "--size", 6, "--seeds", 2, "--dry-run") == 0
    said = capsys.readouterr().out
    for word in ("lanes: 304", "closed form", "MiB a call", "time: about"):
        assert word in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "init-scale", "--seeds", "0"], "--seeds is 0"),
        (["sweep", "init-scale", "--devices", "99"], "--devices is 99"),
        (["plot", "no-such-store.zarr"], "does not exist"),
    ],
)
def test_bad_usage_is_named(arguments, words, capsys):
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
