"""PEFT's Riemannian optimizer takes the steps of ours, live: needs torch and peft."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorajax import adapters

pytestmark = [pytest.mark.formats, pytest.mark.filterwarnings("ignore")]
for package in ("torch", "peft"):
    pytest.importorskip(package, reason=f"{package} is missing: install the extra 'benchmark'.")

STEPS, RATE, DAMPING = 10, 0.05, 0.1
IN, RANK, OUT = 6, 3, 5


def data():
    rng = np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in ((32, IN), (32, OUT), (OUT, IN))]


def theirs(inner):
    """The factors after ten steps of PEFT's optimizer, and the start."""
    import peft
    import torch
    from peft.optimizers import create_riemannian_optimizer

    x, y, weight = (torch.tensor(v) for v in data())
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    base[0].weight.data = weight
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    pairs = dict(model.named_parameters())
    a, b = (next(v for k, v in pairs.items() if f"lora_{which}" in k) for which in "AB")
    b.data = torch.randn_like(b) * 0.3
    start = a.detach().numpy().T.copy(), b.detach().numpy().T.copy()
    rule = create_riemannian_optimizer(
        model, getattr(torch.optim, inner), lr=RATE, reg=DAMPING, weight_decay=0.0
    )
    for _ in range(STEPS):
        rule.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        rule.step()
    return start, (a.detach().numpy().T, b.detach().numpy().T)


@pytest.mark.parametrize(("inner", "ours"), [("SGD", optax.sgd(RATE)), ("AdamW", optax.adam(RATE))])
def test_ten_steps_are_those_of_peft(inner, ours):
    start, want = theirs(inner)
    x, y, weight = data()
    rule = optax.chain(adapters.riemannian(DAMPING), ours)
    params = {
        "layer": {"adapters": {"default": dict(zip("ab", map(jnp.asarray, start), strict=True))}}
    }
    state = rule.init(params)

    def loss(params):
        pair = params["layer"]["adapters"]["default"]
        return jnp.mean((x @ (weight.T + pair["a"] @ pair["b"]) - y) ** 2)

    for _ in range(STEPS):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    found = params["layer"]["adapters"]["default"]
    np.testing.assert_allclose(found["a"], want[0], atol=1e-5)
    np.testing.assert_allclose(found["b"], want[1], atol=1e-5)
    assert np.abs(want[0] - start[0]).max() > 0.01
