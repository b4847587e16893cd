"""Attention alone, forward and backward, in bfloat16: our own, XLA's and cuDNN's.

cuDNN refuses some shapes: the reason is then in place of a time. The largest difference is that of
the results from our own attention in float32, over their largest value.
"""

import statistics
from typing import Any

from benchmarks.card import rates, steps
from benchmarks.card.runs import Report

# Samples, tokens, heads, groups, features, causal.
SHAPES = {
    "ViT-B/16": (64, 197, 12, 12, 64, False),
    "BERT-base": (64, 128, 12, 12, 64, False),
    "SmolLM2-135M": (8, 512, 9, 3, 64, True),
}
TINY = {"odd": (2, 5, 2, 2, 8, False), "causal": (2, 6, 4, 2, 8, True)}


def attention(report: Report, tiny: bool) -> None:
    """Seconds of attention and its gradient, by shape and way."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lorajax.models import layers

    by = steps.fused_by()
    report.add(fused_by=by)
    for name, shape in (TINY if tiny else SHAPES).items():
        batch, tokens, heads, groups, features, causal = shape
        keys = jax.random.split(jax.random.key(0), 3)
        sizes = (heads, groups, groups)
        wide = [
            jax.random.normal(k, (batch, tokens, n, features), jnp.float32)
            for k, n in zip(keys, sizes, strict=True)
        ]
        narrow = [x.astype(jnp.bfloat16) for x in wide]
        order = jnp.arange(tokens)
        visible = (order[:, None] >= order[None, :])[None] if causal else None
        everything = jnp.ones((1, 1, tokens, tokens), bool)

        def own(q: Any, k: Any, v: Any, visible: Any = visible) -> Any:
            return layers.attention(q, k, v, visible)

        def of_jax(q: Any, k: Any, v: Any, by: Any, causal: Any = causal, mask: Any = None) -> Any:
            mixed = jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=causal, implementation=by
            )
            return mixed.reshape(*q.shape[:2], -1)

        ways = {
            "lorajax": own,
            "XLA": lambda q, k, v, f=of_jax: f(q, k, v, "xla"),
            f"{by}, as it is": lambda q, k, v, f=of_jax: f(q, k, v, by),
            f"{by}, filled up to even": lambda q, k, v, causal=causal: steps.fused(
                q, k, v, causal=causal
            ),
            f"{by}, all-true mask": lambda q, k, v, f=of_jax, m=everything: f(q, k, v, by, mask=m),
        }
        if tokens % 2 == 0:
            del ways[f"{by}, filled up to even"]
        with jax.default_matmul_precision("highest"):
            want = np.asarray(jax.jit(own)(*wide))
        for way, run in ways.items():
            row: dict[str, Any] = {"shape": name, "way": way}

            def loss(q: Any, k: Any, v: Any, run: Any = run) -> Any:
                mixed = run(q, k, v)
                return mixed.astype(jnp.float32).sum(), mixed

            both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            try:
                (_, mixed), _ = both(*narrow)
            except Exception as error:  # what cuDNN refuses is a result
                report.row(**row, refused=str(error).strip().splitlines()[0][:200])
                continue
            gap = np.abs(np.asarray(mixed, np.float32) - want).max() / np.abs(want).max()
            seconds = rates.seconds_of(
                lambda both=both, x=narrow: both(*x), jax.block_until_ready, 3 if tiny else 30
            )
            row |= {"seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}
            report.row(**row, difference=float(gap))
            if report.left < 5:
                return
