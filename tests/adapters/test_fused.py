"""Adapters of query, key and value in one module of the torch model, without torch.

What PEFT would make of a file is written down here from its formulas; that PEFT does so itself is
checked where torch is installed (`tests/formats/test_peft_names.py`).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lorajax import adapters, models

FILE = pathlib.Path(__file__).parents[1] / "models" / "fixtures" / "timm_vit" / "model.safetensors"
PIXELS = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
ALL = ["**/query", "**/key", "**/value"]
UNLIKE = {"**/query": 2, "**/key": 1, "**/value": {"rank": 3, "alpha": 6}}
CASES = {
    "lora": (UNLIKE, {}),
    "rslora": (UNLIKE, {"rslora": True}),
    "without keys": ({"**/query": 2, "**/value": 2}, {}),
    "adalora": (ALL, {"kind": "adalora", "rank": 2}),
    "dora": ({"**/query": 2, "**/key": 1, "**/value": 3}, {"dora": True}),
    "ia3": (ALL, {"kind": "ia3"}),
    "ia3 without keys": (["**/query", "**/value"], {"kind": "ia3"}),
}


@pytest.fixture(scope="module")
def base():
    return models.load(FILE, heads=2)


def written(base, case, folder):
    """An adapted model whose adapters have been moved, and the folder that it is written to."""
    targets, options = CASES[case]
    adapted = adapters.adapt(base, targets, key=jax.random.key(0), **options)
    state, draw = nnx.state(adapted, adapters.trainable(adapted)), np.random.default_rng(1)
    change = lambda x: x + jnp.asarray(draw.normal(size=x.shape) / 5, x.dtype)  # noqa: E731
    nnx.update(adapted, jax.tree.map(change, state))
    rules = models.torch_rules(base.config, "timm")
    adapters.save_peft(adapted, folder, rules=rules, base_model=str(FILE))
    return adapted, rules


def pattern(config, name, module, default):
    """A value that PEFT looks up by the end of the module's name."""
    known = (config.get(name) or {}).items()
    found = [value for key, value in known if module == key or module.endswith("." + key)]
    return found[0] if found else default


def torch_weight(config, tensors, module, weight):
    """The weight (outputs, inputs) that PEFT computes with, by its own formulas."""
    parts = {
        name.removeprefix(f"base_model.model.{module}."): x
        for name, x in tensors.items()
        if name.startswith(f"base_model.model.{module}.")
    }
    if config["peft_type"] == "IA3":
        return weight * parts["ia3_l"].reshape(-1, 1)
    if config["peft_type"] == "ADALORA":
        a, b, e = (parts[f"lora_{name}"] for name in "ABE")
        # Divided by the number of its singular values, plus a hundred-thousandth.
        return weight + b @ (a * e) * config["lora_alpha"] / (len(e) + 1e-5)
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    alpha = pattern(config, "alpha_pattern", module, config["lora_alpha"])
    scaling = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
    changed = weight + scaling * b @ a
    if config.get("use_dora"):
        gain = parts["lora_magnitude_vector"].reshape(-1, 1)
        changed *= gain / np.linalg.norm(changed, axis=1, keepdims=True)
    return changed


@pytest.mark.parametrize("case", CASES)
def test_a_fused_module_has_the_weight_of_its_blocks(base, case, tmp_path):
    adapted, rules = written(base, case, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch = load_file(FILE)
    merged = adapters.remove(adapters.merge(adapted))
    for block in range(2):
        module = f"blocks.{block}.attn.qkv"
        found = torch_weight(config, tensors, module, torch[f"{module}.weight"])
        attention = merged.blocks[block].attention
        want = [getattr(attention, name).kernel[...] for name in ("query", "key", "value")]
        np.testing.assert_allclose(found, np.concatenate([x.T for x in want]), atol=2e-5)
    want = np.asarray(adapted(jnp.asarray(PIXELS)))
    assert np.abs(want - np.asarray(base(jnp.asarray(PIXELS)))).max() > 1e-2
    again = adapters.load_peft(base, tmp_path, rules=rules)
    np.testing.assert_allclose(again(jnp.asarray(PIXELS)), want, atol=1e-5)


def test_parts_that_torch_cannot_tell_apart_are_refused(base, tmp_path):
    targets = {"**/query": 2, "**/key": 1}
    adapted = adapters.adapt(base, targets, key=jax.random.key(0), dora=True)
    rules = models.torch_rules(base.config, "timm")
    with pytest.raises(ValueError, match="magnitude for each column, so adapt all of its parts"):
        adapters.save_peft(adapted, tmp_path, rules=rules, base_model=str(FILE))
