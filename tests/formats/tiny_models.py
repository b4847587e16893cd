"""The tiny BERT and ViT of transformers, in as little NNX as their logits need.

Attributes carry the names that transformers gives its modules, so that the default renaming (dots
for slashes) already fits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

HEADS = 4


class Names(nnx.Module):
    """A module that is nothing but names for what is in it."""

    def __init__(self, others=None, **parts):
        for name, part in {**(others or {}), **parts}.items():
            setattr(self, name, part)


def linear(tensors, name):
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    layer = nnx.eval_shape(
        lambda: nnx.Linear(*weight.shape[::-1], use_bias=bias is not None, rngs=nnx.Rngs(0))
    )
    layer.kernel = nnx.Param(jnp.asarray(weight.T))
    if bias is not None:
        layer.bias = nnx.Param(jnp.asarray(bias))
    return layer


def heads_in(tensors, name):
    """A projection onto heads, with the three-dimensional kernel of Flax's attention."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    n, m = weight.shape
    layer = nnx.eval_shape(lambda: nnx.LinearGeneral(m, (HEADS, n // HEADS), rngs=nnx.Rngs(0)))
    layer.kernel = nnx.Param(jnp.asarray(weight.T.reshape(m, HEADS, n // HEADS)))
    layer.bias = nnx.Param(jnp.asarray(bias.reshape(HEADS, n // HEADS)))
    return layer


def heads_out(tensors, name):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    n, m = weight.shape
    layer = nnx.eval_shape(
        lambda: nnx.LinearGeneral((HEADS, m // HEADS), n, axis=(-2, -1), rngs=nnx.Rngs(0))
    )
    layer.kernel = nnx.Param(jnp.asarray(weight.T.reshape(HEADS, m // HEADS, n)))
    layer.bias = nnx.Param(jnp.asarray(bias))
    return layer


def norm(tensors, name):
    weight = tensors[f"{name}.weight"]
    layer = nnx.eval_shape(lambda: nnx.LayerNorm(weight.shape[0], epsilon=1e-12, rngs=nnx.Rngs(0)))
    layer.scale = nnx.Param(jnp.asarray(weight))
    layer.bias = nnx.Param(jnp.asarray(tensors[f"{name}.bias"]))
    return layer


def embed(tensors, name):
    table = tensors[f"{name}.weight"]
    layer = nnx.eval_shape(lambda: nnx.Embed(*table.shape, rngs=nnx.Rngs(0)))
    layer.embedding = nnx.Param(jnp.asarray(table))
    return layer


def conv(tensors, name):
    weight = tensors[f"{name}.weight"]
    out, inside, *window = weight.shape
    layer = nnx.eval_shape(
        lambda: nnx.Conv(
            inside, out, window, strides=tuple(window), padding="VALID", rngs=nnx.Rngs(0)
        )
    )
    layer.kernel = nnx.Param(jnp.asarray(np.transpose(weight, (2, 3, 1, 0))))
    layer.bias = nnx.Param(jnp.asarray(tensors[f"{name}.bias"]))
    return layer


def attend(query, key, value):
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


class Bert(nnx.Module):
    def __init__(self, tensors):
        part = "bert.embeddings."
        layers = []
        while f"bert.encoder.layer.{len(layers)}.output.dense.weight" in tensors:
            at = f"bert.encoder.layer.{len(layers)}."
            attention = Names(
                {
                    "self": Names(
                        {
                            name: heads_in(tensors, f"{at}attention.self.{name}")
                            for name in ("query", "key", "value")
                        }
                    ),
                    "output": Names(
                        dense=heads_out(tensors, at + "attention.output.dense"),
                        LayerNorm=norm(tensors, at + "attention.output.LayerNorm"),
                    ),
                }
            )
            layers.append(
                Names(
                    attention=attention,
                    intermediate=Names(dense=linear(tensors, at + "intermediate.dense")),
                    output=Names(
                        dense=linear(tensors, at + "output.dense"),
                        LayerNorm=norm(tensors, at + "output.LayerNorm"),
                    ),
                )
            )
        self.bert = Names(
            embeddings=Names(
                word_embeddings=embed(tensors, part + "word_embeddings"),
                position_embeddings=embed(tensors, part + "position_embeddings"),
                token_type_embeddings=embed(tensors, part + "token_type_embeddings"),
                LayerNorm=norm(tensors, part + "LayerNorm"),
            ),
            encoder=Names(layer=nnx.List(layers)),
            pooler=Names(dense=linear(tensors, "bert.pooler.dense")),
        )
        self.classifier = linear(tensors, "classifier")

    def __call__(self, tokens):
        e = self.bert.embeddings
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1])[None], tokens.shape)
        x = e.word_embeddings(tokens) + e.position_embeddings(positions)
        x = e.LayerNorm(x + e.token_type_embeddings(jnp.zeros_like(tokens)))
        for layer in self.bert.encoder.layer:
            mine, out = layer.attention.self, layer.attention.output
            x = out.LayerNorm(x + out.dense(attend(mine.query(x), mine.key(x), mine.value(x))))
            x = layer.output.LayerNorm(x + layer.output.dense(gelu(layer.intermediate.dense(x))))
        return self.classifier(jnp.tanh(self.bert.pooler.dense(x[:, 0])))


class Vit(nnx.Module):
    def __init__(self, tensors):
        layers = []
        while f"vit.layers.{len(layers)}.mlp.fc1.weight" in tensors:
            at = f"vit.layers.{len(layers)}."
            attention = {
                name: heads_in(tensors, f"{at}attention.{name}")
                for name in ("q_proj", "k_proj", "v_proj")
            }
            layers.append(
                Names(
                    attention=Names(
                        **attention, o_proj=heads_out(tensors, at + "attention.o_proj")
                    ),
                    mlp=Names(
                        fc1=linear(tensors, at + "mlp.fc1"), fc2=linear(tensors, at + "mlp.fc2")
                    ),
                    layernorm_before=norm(tensors, at + "layernorm_before"),
                    layernorm_after=norm(tensors, at + "layernorm_after"),
                )
            )
        patch = conv(tensors, "vit.embeddings.patch_embeddings.projection")
        self.vit = Names(
            embeddings=Names(patch_embeddings=Names(projection=patch)),
            layers=nnx.List(layers),
            layernorm=norm(tensors, "vit.layernorm"),
        )
        self.cls = nnx.Param(jnp.asarray(tensors["vit.embeddings.cls_token"]))
        self.positions = nnx.Param(jnp.asarray(tensors["vit.embeddings.position_embeddings"]))
        self.classifier = linear(tensors, "classifier")

    def __call__(self, pixels):
        x = self.vit.embeddings.patch_embeddings.projection(jnp.moveaxis(pixels, 1, -1))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...]
        for layer in self.vit.layers:
            mine, y = layer.attention, layer.layernorm_before(x)
            x = x + mine.o_proj(attend(mine.q_proj(y), mine.k_proj(y), mine.v_proj(y)))
            x = x + layer.mlp.fc2(gelu(layer.mlp.fc1(layer.layernorm_after(x))))
        return self.classifier(self.vit.layernorm(x)[:, 0])


INPUTS = {"bert": "input_ids", "vit": "pixel_values"}


def load(folder):
    """The model of a family of fixtures, from its base.safetensors."""
    kind = {"bert": Bert, "vit": Vit}[folder.name]
    return kind(safetensors.numpy.load_file(folder / "base.safetensors"))


def logits(model, inputs):
    """The model's logits, op by op: the cases share the ops, but no compiled program."""
    return np.asarray(model(jnp.asarray(inputs)))
