"""The installed environment: JAX computes right numbers, and imports stay light."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lorajax.factors import Factors


# The fault needs just over 2**14 rows in float64 and 2**15 in float32, and few columns: jax 0.10.2
# fails 4 of these 32 cases, by up to the full size of the result.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [100, 16_384, 16_385, 32_769])
@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (8, 8), (16, 64)], ids=str)
def test_vmapped_product_then_reduction_is_right(shape, rows, dtype):
    """Jax 0.10.2 returns wrong numbers here: https://github.com/jax-ml/jax/issues/39103."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(shape).astype(dtype)
    x = rng.standard_normal((rows, shape[1])).astype(dtype)
    got = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(x)
    wide_x, wide_matrix = x.astype(np.float64), matrix.astype(np.float64)
    want = np.sum((wide_x @ wide_matrix.T) ** 2, axis=1)
    # Roundoff bound: each entry takes at most 2 columns + rows + 2 roundings of terms whose
    # absolute values add up to `size`.
    size = np.sum((np.abs(wide_x) @ np.abs(wide_matrix).T) ** 2, axis=1)
    bound = (2 * shape[1] + shape[0] + 2) * np.finfo(dtype).eps * size
    np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - want), bound)


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


def test_run_time_type_checks_are_on():
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
        ([], 2),
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
