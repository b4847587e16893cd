"""`python -m benchmarks gpu`: its tiny form, on whatever device there is, and what it counts."""

import dataclasses
import importlib
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, peers
from benchmarks.card import lanes, rates, runs, steps, trace
from lorajax.models import layers

EXT = pathlib.Path(__file__).resolve().parents[1] / "docs" / "_ext"


@pytest.fixture
def flags(monkeypatch):
    """The flags that a stage sets for its process are gone after it."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    names = (
        "jax_enable_x64",
        "jax_default_matmul_precision",
        "jax_numpy_dtype_promotion",
        "jax_numpy_rank_promotion",
    )
    before = {name: jax.config.values[name] for name in names}
    # What the peers' side and a user's own program run under.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def stage_of(name):
    (stage,) = (stage for stage in (gpu.CARD, *gpu.STAGES) if stage.name == name)
    return stage


def page_of(monkeypatch, path):
    monkeypatch.syspath_prepend(str(EXT))
    return importlib.import_module("cards").page(path)


@pytest.mark.slow
@pytest.mark.apart
def test_the_tiny_form_runs_every_stage_and_the_page_shows_them(flags, tmp_path, monkeypatch):
    stages = {}
    for stage in (gpu.CARD, *gpu.STAGES):
        if stage.needs:
            stages[stage.name] = {"state": "missing", "missing": list(stage.needs)}
            continue
        path = tmp_path / f"{stage.name}.json"
        assert runs.run_here(stage, path, 600, tiny=True) == 0, stage.name
        stages[stage.name] = {"state": "done", **json.loads(path.read_text())}
    assert all(row["verdict"] == row["recorded"] for row in stages["claims"]["rows"])
    for name in ("adapters", "fixtures", "resumed"):
        assert stages[name]["rows"] and all(row["right"] for row in stages[name]["rows"]), name
    assert all(row["learns"] for row in stages["adapters"]["rows"])
    for row in stages["lanes"]["rows"]:
        assert row["max_error"] < (1e-7 if row["dtype"] == "float64" else 1e-3)
    for name in steps.NAMES:
        plain, fused = stages[name]["rows"]
        assert abs(plain["loss"] - fused["loss"]) < 0.02 * plain["loss"]
    assert [row["engine"] for row in stages["many"]["rows"]] == ["one after another", "at once"]
    assert {row["shape"] for row in stages["attention"]["rows"]} == {"odd", "causal"}
    assert sum(row["share"] for row in stages["profile"]["rows"]) == pytest.approx(1)
    stages["bert"] = {"state": "failed", "error": "RuntimeError: out of memory", "seconds": 1.0}
    result = tmp_path / "gpu.json"
    result.write_text(json.dumps({"tiny": True, "seconds": 9.0, "stages": stages}))
    text = page_of(monkeypatch, result)
    shown = ("1 of 1", "closed form", "ViT-B/16, lorajax", "at once", "kernels a step")
    assert [each for each in shown if each not in text] == []
    assert "vit_peft (not installed: torch, transformers, peft)" in text
    assert "bert (RuntimeError: out of memory)" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_without_a_result_the_page_says_that_nothing_has_run_on_a_card(tmp_path, monkeypatch):
    assert page_of(monkeypatch, tmp_path / "gpu.json").startswith("Nothing of this project has run")


def test_a_stage_that_fails_hangs_or_lacks_something_does_not_stop_the_others(tmp_path):
    broken = runs.Stage("broken", "rates.no_such_function", 60)
    path = tmp_path / "found.json"
    assert runs.run_here(broken, path, 60, tiny=True) == 1
    assert json.loads(path.read_text())["error"].startswith("AttributeError: ")
    hangs = dataclasses.replace(stage_of("claims"), seconds=5.0, beside=False)
    # Five seconds less what the interpreter takes to import JAX are none: it is stopped.
    found = runs.run_apart(hangs, 0.2, tiny=True)
    assert found["state"] == "out of time" and found["seconds"] < 30
    saved = {}
    lacking = runs.Stage("lacking", "rates.card", 60, needs=("no-such-peer",))
    late = runs.Stage("late", "rates.card", 60)
    runs.run_all(
        [lacking, late], 0.0, True, lambda stage: stage.needs, lambda n, f: saved.update({n: f})
    )
    assert saved == {
        "lacking": {"state": "missing", "missing": ["no-such-peer"]},
        "late": {"state": "not begun"},
    }
    told = gpu.summary("claims", {"state": "done", "rows": [{"verdict": "a", "recorded": "b"}]})
    assert "1 WRONG" in told


def test_results_are_written_as_they_come_and_some_stages_can_run_again(
    tmp_path, monkeypatch, capsys
):
    path, begun = tmp_path / "gpu.json", []
    card = {"state": "done", "platform": "gpu", "name": "NVIDIA H200"}

    def run_apart(stage, seconds, tiny):
        if stage is gpu.CARD:
            return dict(card)
        begun.append(stage.name)
        if stage.name == "fixtures":  # what was done before is on disk
            assert "claims" in json.loads(path.read_text())["stages"]
        return {"state": "failed" if "vit" in begun else "done", "error": "none", "rows": []}

    monkeypatch.setattr(runs, "run_apart", run_apart)
    monkeypatch.setattr(runs, "_workers", lambda: 1)
    monkeypatch.setattr(
        peers, "versions", lambda: {"torch": None, "transformers": "5", "peft": "1"}
    )
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    told = ["--json", str(path), "--only"]
    assert gpu.main([*told, "claims", "fixtures", "vit_peft"]) == 0
    found = json.loads(path.read_text())
    assert found["missing"] == ["torch"] and begun == ["claims", "fixtures"]
    assert found["stages"]["vit_peft"] == {"state": "missing", "missing": ["torch"]}
    assert gpu.main([*told, "vit"]) == 1
    assert set(json.loads(path.read_text())["stages"]) == {*found["stages"], "vit"}
    card["name"] = "NVIDIA L4"
    gpu.main([*told, "many"])
    assert set(json.loads(path.read_text())["stages"]) == {"card", "many"}
    card["platform"] = "cpu"
    before = path.read_text()
    assert gpu.main(told[:2]) == 0 and path.read_text() == before
    assert "JAX sees no card here" in capsys.readouterr().out


def products(jaxpr):
    """Operations of every matrix product of a program, those of its subprograms included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (inner, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[i] for i in inner]))
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                each = getattr(each, "jaxpr", each)
                total += products(each) if hasattr(each, "eqns") else 0
    return total


@pytest.mark.parametrize("name", steps.NAMES)
def test_operations_are_those_of_the_program(name, flags):
    made = steps.case(name, tiny=True)
    trainer = steps.trainer_of(made)
    state, columns = trainer.init(), steps.batch_of(made)
    program = jax.jit(trainer.advance).trace(state, trainer.frozen, columns).jaxpr.jaxpr
    # A mask leaves no product out.
    shape = dataclasses.replace(made.shape(), causal=False)
    assert rates.step_flops(shape, made.last) == products(program)
    if made.last is not None:
        assert rates.step_flops(shape) > 1.2 * rates.step_flops(shape, made.last)


def test_lora_costs_four_operations_a_weight_and_token():
    shape = rates.Shape(768, 12, 768, 768, 3072, 2, 128, 4, 0, 2, 1)
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072)
    dense = rates.step_flops(shape) - 12 * 4 * 3 * 4 * 128**2 * 768
    assert dense == pytest.approx(4 * weights * 4 * 128, rel=0.03)


def test_fused_attention_is_attention(flags):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, (2, 5, heads, 8), jnp.float32)
        for k, heads in zip(keys, (4, 2, 2), strict=True)
    )
    causal = jnp.tril(jnp.ones((5, 5), bool))[None]
    for mask, same in ((None, {}), (causal, {"causal": True})):
        want = layers.attention(query, key, value, mask)
        np.testing.assert_allclose(steps.fused(query, key, value, **same), want, atol=1e-6)


@pytest.mark.formats
@pytest.mark.filterwarnings("ignore")
def test_the_plain_integrator_of_torch_solves_what_has_a_solution():
    torch = pytest.importorskip("torch")
    start = (torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    times = torch.linspace(0.0, 5.0, 11, dtype=torch.float64)
    turned, other = lanes.dopri5(lambda t, y: (-y[1], y[0]), start, times, 1e-9, 1e-12)
    assert turned.shape == (11, 3, 2)
    for found, want in ((turned, times.cos()), (other, times.sin())):
        # A thousandth of the solution's size would be a wrong coefficient, 1e-7 is what is left.
        np.testing.assert_allclose(found, want[:, None, None].expand(11, 3, 2), rtol=0, atol=1e-7)


def test_peaks_are_those_of_known_cards_and_no_others():
    for name, (stated, source) in rates.PEAKS.items():
        assert set(stated) <= set(rates.DTYPES) and source, name
        assert stated["bfloat16"] > stated["tfloat32"] > stated["float32"]
    assert rates.peak("NVIDIA H200", "bfloat16") == 989.4e12
    assert rates.peak("NVIDIA L4", "float64") is None and rates.peak("cpu", "bfloat16") is None


def test_kernels_are_told_by_their_names_and_time_is_counted_once():
    names = {
        "sm90_xmma_gemm_bf16": "product",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "MemcpyD2D": "copy",
        "input_reduce_fusion_3": "sum",
        "loop_add_fusion": "elementwise",
        "ncclAllReduce": "sum",
        "unheard of": "other",
    }
    assert {name: trace.kind_of(name) for name in names} == names
    assert trace.busy([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0), (3.2, 3.4)]) == 3.0


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts packages of a few lines in place of torch and torchvision."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torch", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**files):
        for name, text in files.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(text)

    yield write
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torch", "torchvision")]:
        del sys.modules[name]


def test_a_torchvision_that_is_whole_stays(fake):
    fake(torchvision="here = True")
    assert peers.load_torchvision() == "whole" and sys.modules["torchvision"].here


def test_a_torchvision_without_operators_loads(fake, tmp_path):
    fake(
        torch="",
        torchvision="import torch.library\n@torch.library.register_fake('a::b')\ndef f(): return 3",
    )
    (tmp_path / "torch" / "library.py").write_text(
        "def register_fake(name):\n"
        "    def decorate(f):\n"
        "        raise RuntimeError(f'operator {name} does not exist')\n"
        "    return decorate\n"
    )
    assert peers.load_torchvision() == "without operators"
    assert sys.modules["torchvision"].f() == 3
    with pytest.raises(RuntimeError, match="does not exist"):
        sys.modules["torch.library"].register_fake("a::b")(len)


def test_a_torchvision_that_nothing_mends_is_hidden(fake):
    fake(torch="", torchvision="raise RuntimeError('another build')")
    assert peers.load_torchvision() == peers.load_torchvision() == "hidden"
    with pytest.raises(ImportError):
        import torchvision  # noqa: F401


def test_versions_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(peers, "NAMES", ("numpy", "no-such-peer"))
    assert peers.versions() == {"numpy": np.__version__, "no-such-peer": None}
