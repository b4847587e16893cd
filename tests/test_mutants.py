"""The mutants of `make mutants`: each alters code, and one that no test sees is reported."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

SOURCE = '''"""A module."""

LEVEL = 1e-9


def half(x: float, share: float = 0.5) -> float:
    """Half of x, or 2 of something."""
    if x < 0:
        raise ValueError(f"x is {x - 1}; it must be at least 0.")
    return share * x - 0 * LEVEL


def grown(x, t):
    return min(half(x, t), x.T**2) if x >= -t else 1.0
'''


def alterations():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.mutation import alterations
    finally:
        sys.path.remove(str(ROOT))
    return alterations


def test_each_alteration_changes_code_and_nothing_else_is_touched():
    found = alterations().mutants("planted.module", SOURCE)
    seen = {(m.operator, m.before, m.after) for m in found}
    assert len({m.name for m in found}) == len(found)
    for wanted in (
        ("constant", "1e-9", "1e-06"),
        ("constant", "0.5", "0.55"),
        ("arithmetic", "share * x", "(share / x)"),
        ("arithmetic", "share * x - 0 * LEVEL", "(share * x + 0 * LEVEL)"),
        ("function", "min(half(x, t), x.T**2)", "(max(half(x, t), x.T ** 2))"),
        ("argument", "half(x, t)", "(half(t, x))"),
        ("exponent", "x.T**2", "(x.T ** 3)"),
        ("transpose", "x.T", "x"),
        ("sign", "-t", "t"),
        ("comparison", "x >= -t", "(x < -t)"),
    ):
        assert wanted in seen
    whole = ast.dump(ast.parse(SOURCE))
    for mutant in found:
        altered = mutant.apply(SOURCE)
        assert ast.dump(ast.parse(altered)) != whole
        # Docstrings, checks that only raise, and what they say stay as they are.
        assert altered.count("must be at least 0") == altered.count("x < 0") == 1
        assert "{x - 1}" in altered and "or 2 of something" in altered


def test_a_planted_survivor_is_reported_as_one(tmp_path):
    """A test that looks at the sign alone catches a lost sign and misses a factor."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "law.py").write_text("def fall(x):\n    return -3.0 * x\n")
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "test_law.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nfrom planted.law import fall\n\n\n"
        "def test_it_falls():\n    assert fall(1.0) < 0\n"
    )
    where = ["--root", ".", "--package", "planted", "--rooms", "law", "--tests", "test_law.py"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "mutants", *where, "--work", "work"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "SURVIVED" in done.stdout and "-3.0 → (-3.3)" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("tier 1")]
    verdicts = {line.partition("law:")[2]: line.split()[3] for line in lines}
    assert verdicts["fall: -3.0 → 3.0"] == "caught"
    assert verdicts["fall: -3.0 → (-3.3)"] == "SURVIVED"
