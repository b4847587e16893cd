import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lorajax.cli import COMMANDS, main, output


def run(*arguments):
    """The command in a process of its own, with the modules it imported."""
    code = (
        "import sys; from lorajax.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print('jax' in sys.modules); sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "no.such_claim"], "neither a claim nor a paper"),
        (["validate", "xu2024"], "did you mean xu2025"),
        (["validate", "--seed", "-1"], "--seed is -1"),
        (["validate", "--profile", "slow"], "invalid choice"),
        (["validate", "--jobs", "0"], "--jobs is 0"),
        (["validate", "--out", "/proc/none"], "cannot be written"),
        (["claims", "nothing"], "neither a claim nor a paper"),
        (["spectra", "--until", "-3"], "--until is -3.0"),
        (["spectra", "--scales", "0"], "--scales has 0.0"),
        (["no-such-command"], "invalid choice"),
    ],
)
def test_usage_errors_answer_in_a_sentence_without_jax(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip().endswith("False")


def test_alone_it_says_what_to_type_next():
    done = run()
    assert done.returncode == 0 and not done.stderr
    offered = re.findall(r"^  lorajax (\w+)  ", done.stdout, re.MULTILINE)
    assert len(offered) == 5 and set(offered) <= set(COMMANDS)
    assert done.stdout.strip().endswith("False")


def test_progress_is_a_line_a_tenth_where_there_is_no_terminal(capsys):
    bar = output.Progress(40, "claim", done=4)
    for i in range(4, 40):
        bar.update()
        if i == 20:
            bar.say("half")
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert "half" in lines and len(lines) == 11  # 10 % to 100 %, and what was said
    assert "40/40" in lines[-1] and "\r" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "rank is 0"),
        (["--rank", "-2"], "rank is -2"),
        (["--rank", "50"], "must lie in 1 … 40"),
        (["--singular-values", "1", "2"], "decreasing order"),
        (["--singular-values", "nan"], "positive and finite"),
    ],
)
def test_bad_problems_are_refused(arguments, message, tmp_path, capsys):
    assert main(["spectra", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_spectra_writes_plot_table_and_data(tmp_path, capsys):
    arguments = ["spectra", "--shape", "20", "15", "--rank", "4", "--scales", "0.1", "0.001"]
    assert main([*arguments, "--laws", "lora", "tanh_squared", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "best time-warp error" in printed and "reduced ODE" in printed
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "spectra.json").read_text())
    rows = {(r["scale"], r["law"], r["mode"]): r for r in content["rows"]}
    assert len(rows) == 2 * 2 * 3
    assert rows[0.001, "lora", 1]["sup_error"] < 1e-3
    assert rows[0.001, "tanh_squared", 1]["sup_error"] > 0.5
    # The shape is wrong as well: no clock makes tanh² a logistic curve.
    assert rows[0.001, "tanh_squared", 1]["warp_error"] > 0.02
    assert rows[0.001, "lora", 1]["warp_error"] < 1e-3
    with np.load(tmp_path / "spectra.npz") as data:
        assert data["simulated_0.1"].shape == (801, 3)


def test_validate_writes_verdicts_report_and_figures(tmp_path, capsys):
    name = "gradient_flow.lora_mode"
    vectors = ["--formats", "svg", "pdf"]
    assert main(["validate", name, "--out", str(tmp_path), "--seed", "3", *vectors]) == 0
    assert "All 1 verdicts are those on record." in capsys.readouterr().out
    content = json.loads((tmp_path / "verdicts.json").read_text())
    assert {"schema", "environment", "seed", "profile", "claims"} <= set(content)
    (entry,) = content["claims"]
    assert {
        "id",
        "paper",
        "standing",
        "verdict",
        "measured",
        "predicted",
        "error",
        "tolerance",
    } < set(entry)
    assert entry["control"].keys() == {"change", "verdict"} and entry["seconds"] > 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f'id="{name}"' in page and "data:image/png;base64," in page
    assert not re.findall(r'(?:src|href)="https?:', page)
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for ending, first in begins.items():
        assert (tmp_path / "figures" / f"{name}.{ending}").read_bytes().startswith(first)


def test_a_changed_verdict_is_exit_status_one(tmp_path, capsys, monkeypatch):
    from lorajax.cli import validate

    record = {**validate.read_record(), "gradient_flow.lora_mode": "refuted"}
    monkeypatch.setattr(validate, "read_record", lambda: record)
    assert main(["validate", "gradient_flow.lora_mode", "--out", str(tmp_path)]) == 1
    assert "confirmed, on record refuted" in capsys.readouterr().err


@pytest.mark.apart
def test_several_seeds_are_told_apart_in_one_table(tmp_path, capsys):
    name = "lora_ga2024.first_step"
    assert main(["validate", name, "--seeds", "2", "--seed", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"seed 3 +seed 4\n{re.escape(name)} +confirmed +confirmed", printed)
    assert "All 2 verdicts are those on record." in printed
    for seed in (3, 4):
        assert json.loads((tmp_path / f"seed-{seed}" / "verdicts.json").read_text())["seed"] == seed
    assert "Report of all seeds" in printed
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Seeds of this run: 3–4 " in page


RESUMED = [f"gradient_flow.{x}" for x in ("scaled_gd_one_step", "spectral_flow", "logistic")]


def without_seconds(text):
    content = json.loads(text)
    for entry in content["claims"]:
        del entry["seconds"]
    return content


@pytest.mark.apart
def test_a_validation_goes_on_from_the_verdicts_that_are_there(tmp_path, capsys, monkeypatch):
    from lorajax.claims import base

    out = ["--out", str(tmp_path)]
    assert main(["validate", *RESUMED, *out, "--resume"]) == 0  # nothing there yet
    assert "were there" not in capsys.readouterr().out
    path, figure = tmp_path / "verdicts.json", tmp_path / "figures" / f"{RESUMED[1]}.png"
    whole, drawn = path.read_text(), figure.read_bytes()
    cut = json.loads(whole)
    cut["claims"] = cut["claims"][:2]  # as it was before the last claim ended
    path.write_text(json.dumps(cut))
    figure.write_bytes(drawn[:-9])  # a figure that is not what it was is drawn again
    examined, plain = [], base.examine
    monkeypatch.setattr(base, "examine", lambda c, r: (examined.append(c.id), plain(c, r))[1])
    assert main(["validate", *RESUMED, *out, "--resume"]) == 0
    assert "(1 were there)" in capsys.readouterr().out
    assert sorted(examined) == sorted(RESUMED[1:])
    assert without_seconds(path.read_text()) == without_seconds(whole)
    assert figure.read_bytes() == drawn
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 3
    path.write_text(whole[:-30])
    assert main(["validate", *RESUMED, *out, "--resume"]) == 0
    assert "is damaged, and what it held is done again" in capsys.readouterr().out
    assert without_seconds(path.read_text()) == without_seconds(whole)


@pytest.mark.parametrize(
    ("names", "options", "changed", "said"),
    [
        (RESUMED[:1], ["--seed", "4"], {}, "was made with seed 3, not 4"),
        (RESUMED[:1], ["--profile", "full"], {}, "was made with profile 'quick', not 'full'"),
        (RESUMED[:1], [], {"code": "0"}, "was made with another code"),
        (RESUMED[:1], [], {"environment": {}}, "was made with another environment"),
        (RESUMED[1:2], [], {}, f"has {RESUMED[0]} as well"),
    ],
)
def test_verdicts_of_another_command_are_not_gone_on_with(
    names, options, changed, said, tmp_path, capsys
):
    out = ["--out", str(tmp_path), "--seed", "3"]
    assert main(["validate", RESUMED[0], *out]) == 0
    path = tmp_path / "verdicts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    before = path.read_bytes()
    assert main(["validate", *names, *out, *options, "--resume"]) == 2
    assert said in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_interrupted_validation_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from lorajax.claims import base

    plain = base.examine

    def examine(claim, run):
        if claim.id == RESUMED[1]:
            while not (tmp_path / "verdicts.json").exists():  # the first one's
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return plain(claim, run)

    monkeypatch.setattr(base, "examine", examine)
    out = ["--out", str(tmp_path), "--jobs", "1"]
    assert main(["validate", *RESUMED, *out]) == 143
    words = "1 of 3 verdicts and their report are in"
    said = capsys.readouterr().err
    assert words in said and "the same command with --resume goes on from there." in said
    monkeypatch.setattr(base, "examine", plain)
    assert main(["validate", *RESUMED, *out, "--resume", "--resolving"]) == 0
    assert "(1 were there)" in capsys.readouterr().out
    assert "is refuted" in (tmp_path / "report.html").read_text()
    powers = json.loads((tmp_path / "resolving.json").read_text())
    assert all(0 < powers[name] <= 0.05 for name in RESUMED)


def test_claims_lists_standing_and_source(capsys):
    assert main(["claims", "xu2025"]) == 0
    printed = capsys.readouterr().out
    assert "xu2025.escape_slope" in printed and "arXiv:2503.06982" in printed
    assert "reconstructed" in printed and "gradient_flow" not in printed
