"""Generation: with a cache as without, on both sides of the end, and as transformers does it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import models
from lorajax.models.generation import filtered

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "llama_scaled"
TOKENS = jnp.asarray([[7, 8, 9, 10, 11], [0, 0, 12, 13, 14]], jnp.int32)
MASK = jnp.asarray([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def model():
    return models.load(FIXTURE)


@pytest.fixture(scope="module")
def greedy(model):
    return models.generate(model, TOKENS, MASK, limit=8, ends=())


def plain(model, tokens, steps):
    """The likeliest tokens one by one, the whole text read again each time."""
    room = jnp.zeros((1, tokens.size + steps), jnp.int32).at[0, : tokens.size].set(tokens)
    run = nnx.jit(lambda m, tokens: m(tokens))
    for i in range(tokens.size, tokens.size + steps):
        room = room.at[0, i].set(run(model, room)[0, i - 1].argmax().astype(jnp.int32))
    return room[0, tokens.size :].tolist()


def test_with_a_cache_and_padding_on_the_left_as_without(model, greedy):
    assert greedy.tokens[0].tolist() == plain(model, TOKENS[0], 8)
    assert greedy.tokens[1].tolist() == plain(model, TOKENS[1, 2:], 8)
    assert bool(greedy.mask.all())


def test_a_text_read_in_parts_has_the_logits_of_the_whole(model):
    run = nnx.jit(lambda m, tokens, mask, cache: m(tokens, mask, None, cache))
    whole = nnx.jit(lambda m, tokens, mask: m(tokens, mask))(model, TOKENS, MASK)
    first, cache = run(model, TOKENS[:, :3], MASK[:, :3], model.cache(2, 6))
    second, cache = run(model, TOKENS[:, 3:], MASK[:, 3:], cache)
    assert int(cache.length) == 5
    seen = np.asarray(MASK) > 0
    found = np.asarray(jnp.concatenate([first, second], axis=1))
    np.testing.assert_allclose(found[seen], np.asarray(whole)[seen], atol=1e-5)


def test_a_text_ends_with_its_end_token_and_the_other_goes_on(model, greedy):
    rows = greedy.tokens.tolist()
    end = rows[0][2]
    found = models.generate(model, TOKENS, MASK, limit=8, ends=(end,), filling=39)
    for row, tokens, mask in zip(rows, found.tokens.tolist(), found.mask.tolist(), strict=True):
        written = row.index(end) + 1 if end in row else 8
        assert tokens == row[:written] + [39] * (8 - written)
        assert mask == [True] * written + [False] * (8 - written)
    both = models.generate(model, TOKENS, MASK, limit=8, ends=(rows[0][0], rows[1][0]))
    assert both.mask.sum(axis=1).tolist() == [1, 1]
    assert both.tokens[:, 1:].tolist() == [[0] * 7] * 2


def test_drawing_hangs_on_the_key_alone_and_one_candidate_is_greedy(model, greedy):
    def draw(seed, **options):
        key = jax.random.key(seed)
        given = {"limit": 8, "ends": (), "temperature": 2.0, "key": key} | options
        return models.generate(model, TOKENS, MASK, **given).tokens.tolist()

    assert draw(0) == draw(0) != draw(1)
    assert draw(0, top_k=1) == draw(1, top_p=1e-6) == greedy.tokens.tolist()


def test_what_may_be_drawn():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]], jnp.float32))

    def allowed(**options):
        return jnp.isfinite(filtered(logits, **options)).astype(int).tolist()

    assert allowed() == [[1, 1, 1, 1]] * 2
    assert allowed(top_k=2) == [[1, 1, 0, 0], [1, 1, 1, 1]]  # three are equally likely
    assert allowed(top_p=0.75) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert allowed(top_p=0.6) == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert allowed(top_k=3, top_p=0.7) == [[1, 1, 0, 0], [0, 0, 0, 1]]
    hot = jax.nn.softmax(filtered(logits, temperature=2.0), axis=-1)[0]
    np.testing.assert_allclose(hot, np.sqrt([0.4, 0.3, 0.2, 0.1]) / 1.9436, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0}, "key is None; a temperature of 1.0 needs one"),
    ],
)
def test_options_are_checked(model, options, message):
    with pytest.raises(ValueError, match=message):
        models.generate(model, TOKENS, **({"limit": 2} | options))


@pytest.mark.formats
def test_filters_of_transformers():
    torch = pytest.importorskip("torch", exc_type=(ImportError, RuntimeError))
    transformers = pytest.importorskip("transformers", exc_type=(ImportError, RuntimeError))
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = 3 * rng.standard_normal((4, 30)).astype(np.float32)
        heat, k, p = rng.uniform(0.3, 2), int(rng.integers(1, 30)), rng.uniform(0.05, 1)
        steps = (
            transformers.TemperatureLogitsWarper(heat),
            transformers.TopKLogitsWarper(k),
            transformers.TopPLogitsWarper(p),
        )
        expected = torch.from_numpy(logits)
        for step in steps:
            expected = step(None, expected)
        found = filtered(jnp.asarray(logits), heat, k, p)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


# Real models: stories260k, which comes with the folder of data, and SmolLM2, where that has been
# given it.

REAL = {
    # Tokens to go on from, and the perplexity of the first 8,000 characters of tinyshakespeare.txt
    # in rows of 256 tokens, by transformers.
    "stories260k": ((1, 403, 407, 261, 378), 71.502),
    "smollm2-135m": ((504, 3575, 282, 4649, 314), 57.0296),
}
MAKES = {
    "stories260k": "it comes with that folder, so fetch it anew or name another one.",
    "smollm2-135m": "the folder's make_models.py makes it.",
}


@pytest.fixture(scope="module", params=REAL)
def real(request, data_dir):
    folder = data_dir / request.param
    if not folder.is_dir():
        pytest.skip(f"{request.param} is not in the folder of data; {MAKES[request.param]}")
    return folder, *REAL[request.param]


def peer(folder):
    pytest.importorskip("torch", exc_type=(ImportError, RuntimeError))
    transformers = pytest.importorskip("transformers", exc_type=(ImportError, RuntimeError))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.mark.formats
def test_the_hundred_tokens_of_transformers_with_a_cache_and_without(real):
    folder, start, _ = real
    theirs = peer(folder)
    torch = pytest.importorskip("torch", exc_type=(ImportError, RuntimeError))
    tokens = torch.tensor([start])
    expected = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=100,
        do_sample=False,
        eos_token_id=None,
    )
    model = models.load(folder, dtype=jnp.float32, param_dtype=jnp.float32)
    found = models.generate(model, jnp.asarray([start], jnp.int32), limit=100, ends=())
    assert found.tokens[0].tolist() == expected[0, len(start) :].tolist()
    # Without a cache each token is the likeliest after those before it: one look at all of them.
    whole = jnp.concatenate([jnp.asarray([start], jnp.int32), found.tokens], axis=1)
    again = nnx.jit(lambda m, tokens: m(tokens))(model, whole)[0, len(start) - 1 : -1]
    assert again.argmax(axis=-1).tolist() == found.tokens[0].tolist()


@pytest.mark.slow
def test_the_perplexity_of_transformers(real, data_dir):
    tokenizers = pytest.importorskip("tokenizers")
    folder, _, known = real
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (data_dir / "tinyshakespeare.txt").read_text(encoding="utf-8")[:8000]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    rows = np.asarray(ids[: len(ids) // 256 * 256], np.int32).reshape(-1, 256)
    model = models.load(folder, dtype=jnp.float32, param_dtype=jnp.float32)

    @nnx.jit
    def losses(model, tokens):
        chances = jax.nn.log_softmax(model(tokens)[:, :-1])
        return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean()

    # Row by row: logits of 49,152 words are large.
    found = float(np.exp(np.mean([losses(model, jnp.asarray(row[None])) for row in rows])))
    print(f"perplexity {found:.4f} on {rows.size} tokens")
    assert found == pytest.approx(known, rel=1e-4)
    theirs = peer(folder)
    torch = pytest.importorskip("torch", exc_type=(ImportError, RuntimeError))
    with torch.no_grad():
        tokens = [torch.from_numpy(row[None]).long() for row in rows]
        theirs_of = [float(theirs(each, labels=each).loss) for each in tokens]
    assert found == pytest.approx(float(np.exp(np.mean(theirs_of))), rel=1e-4)
