"""The installed environment: JAX computes right numbers, and imports stay light."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import jaxtyping
import pytest

from lorajax import environment
from lorajax.environment import faults, flags
from lorajax.factors import Factors


# Jax 0.10.2 fails 4 of these 32 cases, by up to the full size of the result.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [100, 16_384, 16_385, 32_769])
@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (8, 8), (16, 64)], ids=str)
def test_vmapped_product_then_reduction_is_right(shape, rows, dtype):
    """Jax 0.10.2 returns wrong numbers here: https://github.com/jax-ml/jax/issues/39103."""
    assert environment.vmapped_product(shape, rows, dtype) <= 1


# Jax 0.11.1 to 0.12.0.1 fail those of 64 and 128 without the guard, by factors of 1 to 1e265.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("vmapped", [False, True])
def test_product_with_a_broadcast_scalar_is_right(side, vmapped, dtype):
    """Jax 0.11.1 and later return wrong numbers here, unless guarded."""
    assert environment.scalar_product(side, vmapped=vmapped, dtype=dtype) <= 1


def python(code: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter with these environment variables; None removes one."""
    merged = {**os.environ, **variables}
    kept = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=kept,
    )


LITTLE = "--xla_backend_optimization_level=1"
AFFECTED = environment.affected(jaxlib.version.__version__)


@pytest.mark.skipif(not AFFECTED, reason="the installed jaxlib is not affected")
def test_the_canary_dies_without_the_guard():
    code = "from lorajax.environment import scalar_product; print(scalar_product())"
    bare = python(code, XLA_FLAGS=None, JAX_COMPILATION_CACHE_DIR=None)
    assert float(bare.stdout) > 1
    code = "from lorajax import environment; environment.guard();" + code
    assert float(python(code, XLA_FLAGS=None, JAX_COMPILATION_CACHE_DIR=None).stdout) <= 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.10.1", False),
        ("0.11.0", False),
        ("0.11.1", True),
        ("0.12.0.1", True),
        ("0.12.0.dev20260101", True),
        ("1.0rc1", True),
    ],
)
def test_affected_versions(version, expected):
    assert environment.affected(version) == expected


@pytest.mark.parametrize(
    ("version", "before", "after"),
    [
        ("0.10.1", None, ""),
        ("0.12.0.1", None, environment.GUARD),
        ("0.12.0.1", "--xla_cpu_a=1", f"--xla_cpu_a=1 {environment.GUARD}"),
        ("0.12.0.1", environment.GUARD, environment.GUARD),
        ("0.12.0.1", f"--{faults.FLAG}=dot", f"--{faults.FLAG}=dot"),
        ("0.12.0.1", "flags.txt", "flags.txt"),
    ],
)
def test_the_guard_is_added_once_and_clobbers_nothing(version, before, after, monkeypatch):
    monkeypatch.setattr(faults.metadata, "version", lambda name: version)
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    assert [environment.guard(), environment.guard()] == [after, after]
    assert os.environ.get("XLA_FLAGS", "") == after


@pytest.mark.parametrize(
    ("version", "before", "after"),
    [
        ("0.10.1", None, f"{LITTLE} --xla_cpu_use_fusion_emitters=false"),
        ("0.12.0.1", environment.GUARD, f"{environment.GUARD} {LITTLE}"),
        ("0.12.0.1", "--xla_backend_optimization_level=2", "--xla_backend_optimization_level=2"),
        ("0.12.0.1", "flags.txt", "flags.txt"),
    ],
)
def test_fast_compiling_is_asked_for_once_and_clobbers_nothing(version, before, after, monkeypatch):
    monkeypatch.setattr(flags.metadata, "version", lambda name: version)
    monkeypatch.setenv("XLA_FLAGS", before or "")
    assert [environment.compile_fast(), environment.compile_fast()] == [after, after]


@pytest.mark.parametrize(
    ("processor", "before", "after"),
    [
        ({"avx512f", "avx512_bf16"}, None, flags.WIDE),
        ({"avx512f", "avx512_bf16"}, environment.GUARD, f"{environment.GUARD} {flags.WIDE}"),
        ({"avx512f", "avx512_bf16"}, f"--{flags.WIDTH}=256", f"--{flags.WIDTH}=256"),
        ({"avx512f"}, None, ""),  # slows down under wide instructions
        (set(), None, ""),
    ],
)
def test_wide_loops_are_asked_for_where_they_cost_nothing(processor, before, after, monkeypatch):
    monkeypatch.setattr(flags, "_processor", lambda: frozenset(processor))
    monkeypatch.setenv("XLA_FLAGS", before or "")
    assert [environment.wide(), environment.wide()] == [after, after]


def test_an_untried_release_gets_wide_loops_only_if_it_knows_the_flag(monkeypatch):
    monkeypatch.setattr(flags, "_processor", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(flags.metadata, "version", lambda name: "99.0")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(flags, "known", lambda flag: False)
    assert environment.wide() == ""
    monkeypatch.setattr(flags, "known", lambda flag: flag == flags.WIDTH)
    assert environment.wide() == flags.WIDE


@pytest.mark.parametrize("brief", [False, True])
def test_the_flags_of_a_program_are_printed(brief):
    command = [sys.executable, "-m", "lorajax.environment", *["--brief"] * brief]
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = subprocess.run(command, env=clean, check=True, capture_output=True, text=True).stdout
    assert ("--xla_backend_optimization_level=1" in found.split()) == brief


def test_an_untried_release_gets_the_guard_only_if_it_knows_the_flag(monkeypatch):
    assert faults.accepts_guard("99.0")  # the library at hand has the flag's name
    monkeypatch.setattr(faults, "FLAG", "xla_cpu_no_such_flag" + "_at_all")
    assert not faults.accepts_guard("99.0")


@pytest.mark.apart
def test_a_library_user_is_warned_once_and_told_what_to_set():
    code = (
        "from lorajax.environment import faults; faults.FIRST_AFFECTED = (0, 1);"
        "import lorajax; print('imported'); lorajax.flows, lorajax.problems; faults.warn()"
    )
    told = python(code, XLA_FLAGS=None, JAX_PLATFORMS="cpu").stderr
    assert told.count("UserWarning") == 1 and f"XLA_FLAGS={environment.GUARD}" in told
    for variables in ({"XLA_FLAGS": environment.GUARD}, {"JAX_PLATFORMS": "cuda"}):
        quiet = python(code, **{"XLA_FLAGS": None, "JAX_PLATFORMS": "cpu"} | variables)
        assert quiet.returncode == 0 and "UserWarning" not in quiet.stderr


def test_traces_lists_what_is_traced_and_nothing_else(traces):
    @jax.jit
    def double(x):
        return 2 * x

    x, y = jnp.ones(3), jnp.ones(4)
    with traces() as names:
        double(x)
    assert names == ["double"]
    with traces() as names:
        double(x)
    assert names == []
    with traces() as names:
        double(y)
    assert names == ["double"]


def test_run_time_type_checks_are_on(request):
    if not request.config.getoption("--jaxtyping-packages"):
        pytest.skip("types are checked at run time by `make test FULL=1`, as in CI")
    whole_numbers = Factors(jnp.ones((3, 2), int), jnp.ones((2, 4), int))
    with pytest.raises(jaxtyping.TypeCheckError):
        _ = whole_numbers.product


def modules_after(code: str, *arguments: str) -> tuple[int, set[str]]:
    """The exit status of `code` in a fresh interpreter, and the top-level modules it imported."""
    program = (
        "import sys\n"
        "status = 0\n"
        "try:\n"
        f"    {code}\n"
        "except SystemExit as stop:\n"
        "    status = stop.code or 0\n"
        "print('MODULES', status, *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    last = run.stdout.splitlines()[-1].split()
    assert last[0] == "MODULES"
    return int(last[1]), set(last[2:])


def test_import_lorajax_is_light():
    _, modules = modules_after("import lorajax")
    assert "lorajax" in modules
    assert not modules & {"jax", "flax", "matplotlib", "xarray", "zarr", "diffrax", "optax"}


@pytest.mark.apart
def test_core_rooms_import_neither_flax_nor_matplotlib_nor_xarray():
    core = "exact factors flows initializers laws problems ranks spectra".split()
    code = f"import lorajax; [getattr(lorajax, name) for name in {core}]"
    _, modules = modules_after(code)
    assert "jax" in modules
    assert not modules & {"flax", "matplotlib", "xarray", "zarr"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["validate", "--help"], 0),
        (["claims", "--help"], 0),
        (["spectra", "--help"], 0),
        ([], 0),
        (["doctor", "--help"], 0),
        (["no-such-command"], 2),
        (["validate", "--profile", "no-such-profile"], 2),
        (["validate", "--seed", "one"], 2),
        (["validate", "--seed", "-1"], 2),
        (["validate", "no_such.claim"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_usage_errors_answer_without_jax(arguments, status):
    got, modules = modules_after("from lorajax.cli import main; sys.exit(main())", *arguments)
    assert got == status
    assert "lorajax" in modules
    assert not modules & {"jax", "jaxlib", "numpy", "matplotlib"}
