"""Riemannian LoRA, RefLoRA, LoRA-RITE and spectral descent against formulas written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

import lorajax
from lorajax import Factors, adapters, flows, initializers
from lorajax.factors import descents

M, R, N = 7, 3, 5


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pair(seed, scale=1.0):
    return Factors(scale * draw(seed, M, R), scale * draw(seed + 100, R, N))


def jnp_pair(factors, dtype=jnp.float64):
    return Factors(*(jnp.asarray(x, dtype) for x in factors))


def by_hand_riemannian(g, x, damping=0.0):
    eye = damping * np.eye(R)
    return Factors(g.a @ np.linalg.inv(x.b @ x.b.T + eye), np.linalg.inv(x.a.T @ x.a + eye) @ g.b)


def by_hand_reflora(g, x):
    """S of theory section 9, by matrix square roots."""
    p, k = x.b @ x.b.T, x.a.T @ x.a
    root = np.real(scipy.linalg.sqrtm(p))
    middle = np.real(scipy.linalg.sqrtm(root @ k @ root))
    s = np.linalg.inv(root) @ middle @ np.linalg.inv(root)
    np.testing.assert_allclose(s @ p @ s, k, rtol=1e-9)
    return Factors(g.a @ s, np.linalg.inv(s) @ g.b)


class ByHandRite:
    """LoRA-RITE with the factors as tall matrices, one loop a factor."""

    def __init__(self, escape, clip=1.0, skip=1.0, decays=(0.9, 0.999), eps=1e-6):
        self.escape, self.clip, self.skip, self.decays, self.eps = escape, clip, skip, decays, eps
        self.count, self.kept = 0, None

    def __call__(self, g, x):
        tall, slopes = (x.a, x.b.T), (g.a, g.b.T)
        if self.kept is None:
            self.kept = [[np.zeros((len(t), R)), np.zeros((R, R)), 0.0, None] for t in tall]
        t = self.count + 1
        b1, b2 = (d * (1 - d ** (t - 1)) / (1 - d**t) for d in self.decays)
        parts = [np.linalg.qr(tall[1 - i]) for i in (0, 1)]
        free = [slope @ np.linalg.pinv(r) for slope, (_, r) in zip(slopes, parts, strict=True)]
        free = [f * (np.sqrt(np.mean(f**2)) <= self.skip) for f in free]
        norm = np.sqrt(sum(np.sum(f**2) for f in free))
        out = []
        for f, (q, r), kept in zip(free, parts, self.kept, strict=True):
            f = f * min(1, self.clip / norm) if norm else f
            first, second, escaped, last = kept
            turn = np.zeros((R, R)) if last is None else q.T @ last
            turned = turn @ second @ turn.T
            if self.escape:
                lost = (np.linalg.eigvalsh(second) - np.linalg.eigvalsh(turned)).max()
                escaped += max(0, min(lost, np.trace(second - turned)))
                escaped *= b2
            second = b2 * turned + (1 - b2) * f.T @ f / len(f)
            w, v = np.linalg.eigh(second)
            root = np.sqrt(np.maximum(w, 0) + escaped) + self.eps
            first = b1 * first @ turn.T + (1 - b1) * f @ (v / root) @ v.T
            kept[:] = first, second, escaped, q
            out.append(first @ np.linalg.pinv(r).T)
        self.count = t
        return Factors(out[0], out[1].T)


def check_steps(rule, by_hand, steps=6, atol=1e-12):
    """Several steps of a transformation, with gradients of their own, against a formula."""
    x = jnp_pair(pair(0))
    state, update = rule.init(x), jax.jit(rule.update)
    for step in range(steps):
        g = pair(10 + step, 0.1)
        want = by_hand(g, Factors(*map(np.asarray, x)))
        found, state = update(jnp_pair(g), state, x)
        for got, should in zip(found, want, strict=True):
            scale = np.abs(should).max()
            np.testing.assert_allclose(-got / scale, should / scale, atol=atol)
        x = jax.tree.map(lambda a, b: a + 0.3 * b, x, found)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_riemannian_is_the_formula(damping):
    check_steps(flows.scaled_gradient(1.0, damping), lambda g, x: by_hand_riemannian(g, x, damping))


def test_reflora_is_the_formula():
    check_steps(flows.reflora_descent(1.0), by_hand_reflora)


@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_lora_rite_is_the_formula(escape, clip):
    # Clipped gradients are small against eps, unclipped ones large.
    rule = flows.lora_rite(1.0, escape=escape, clip=clip)
    check_steps(rule, ByHandRite(escape, clip))


def test_a_large_unmagnified_gradient_is_skipped():
    rule = flows.lora_rite(1.0, skip=1e-3)
    x = jnp_pair(pair(0))
    found, _ = rule.update(jnp_pair(pair(1)), rule.init(x), x)
    assert not np.any(found.a) and not np.any(found.b)


@pytest.mark.parametrize(("size", "moves"), [(0.95, True), (1.05, False)])
def test_an_unmagnified_gradient_is_skipped_from_1_on(size, moves):
    x, g = pair(0), pair(1)
    free = [
        slope @ np.linalg.pinv(np.linalg.qr(tall)[1])
        for slope, tall in ((g.a, x.b.T), (g.b.T, x.a))
    ]
    by = [size / np.sqrt(np.mean(f**2)) for f in free]
    rule, x = flows.lora_rite(1.0), jnp_pair(x)
    found, _ = rule.update(jnp_pair(Factors(by[0] * g.a, by[1] * g.b)), rule.init(x), x)
    assert [bool(np.any(each)) for each in found] == [moves, moves]


def place(factors):
    return {"layer": {"adapters": {"default": factors._asdict()}}, "head": jnp.ones(3)}


RULES = {
    "riemannian": (flows.scaled_gradient(1.0, 1e-2), adapters.riemannian()),
    "reflora": (flows.reflora_descent(1.0), adapters.reflora(0)),
    "lora-rite": (flows.lora_rite(1.0), adapters.lora_rite()),
    "spectral": (flows.spectral_descent(1.0), adapters.spectral()),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_the_same_for_a_problem_and_for_a_model(name):
    problems, models = RULES[name]
    x, g = jnp_pair(pair(0)), jnp_pair(pair(1, 0.1))
    want, _ = problems.update(g, problems.init(x), x)
    found, _ = models.update(place(g), models.init(place(x)), place(x))
    got = found["layer"]["adapters"]["default"]
    np.testing.assert_allclose(got["a"], -want.a, rtol=1e-12)
    np.testing.assert_allclose(got["b"], -want.b, rtol=1e-12)
    np.testing.assert_array_equal(found["head"], jnp.ones(3))


@pytest.mark.parametrize("name", RULES)
def test_each_rule_runs_in_lanes_and_in_low_precision(name):
    rule = RULES[name][1]

    def step(g, x):
        return rule.update(place(g), rule.init(place(x)), place(x))[0]["layer"]

    lanes = [(pair(i), pair(i + 1, 0.1)) for i in (0, 20)]
    x, g = (jax.tree.map(lambda *v: jnp.stack(v), *parts) for parts in zip(*lanes, strict=True))
    found = jax.vmap(step)(g, x)["adapters"]["default"]["a"]
    for lane, (x, g) in zip(found, lanes, strict=True):
        want = step(jnp_pair(g), jnp_pair(x))["adapters"]["default"]["a"]
        np.testing.assert_allclose(lane, want, rtol=1e-9)
    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.1)):
        low = step(jnp_pair(g, dtype), jnp_pair(x, dtype))["adapters"]["default"]["a"]
        assert low.dtype == dtype
        scale = np.abs(want).max()
        np.testing.assert_allclose(low.astype(jnp.float64) / scale, want / scale, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
def test_nothing_blows_up_at_a_factor_of_zero(name):
    rule = RULES[name][1]
    x, g = jnp_pair(pair(0)), jnp_pair(pair(1, 0.1))
    x, g = x._replace(b=jnp.zeros_like(x.b)), g._replace(a=jnp.zeros_like(g.a))
    found, _ = rule.update(place(g), rule.init(place(x)), place(x))
    moved = found["layer"]["adapters"]["default"]
    assert np.all(np.isfinite(moved["b"])) and np.any(moved["b"]) and not np.any(moved["a"])
    if name == "reflora":
        np.testing.assert_array_equal(moved["b"], g.b)


def test_reflora_takes_plain_steps_first():
    rule = flows.reflora_descent(1.0, warmup=2)
    x, g = jnp_pair(pair(0)), jnp_pair(pair(1))
    state, plain = rule.init(x), []
    for _ in range(4):
        found, state = rule.update(g, state, x)
        plain.append(bool(jnp.all(found.a == -g.a)))
    assert plain == [True, True, False, False]


def test_rebalanced_factors_are_balanced_and_multiply_to_the_same():
    x = jnp_pair(pair(0))
    even = descents.rebalanced(x)
    np.testing.assert_allclose(even.product, x.product, atol=1e-13)
    np.testing.assert_allclose(even.a.T @ even.a, even.b @ even.b.T, atol=1e-13)
    wide = Factors(jnp.ones((2, 4)), jnp.ones((4, 3)))  # more columns than the product has rank
    assert descents.rebalanced(wide).a.shape == (2, 4)
    np.testing.assert_allclose(descents.rebalanced(wide).product, wide.product, atol=1e-13)


def test_the_flow_of_reflora_is_its_closed_form(key):
    problem = lorajax.MatrixFactorization.from_spectrum(key, (M, N), (2.0, 1.0))
    times = np.linspace(0.0, 3.0, 7)
    start = jnp_pair(pair(0))
    solved = flows.gradient_flow(problem, start, times, metric="reflora", rtol=1e-11)
    closed = flows.reflora_flow(problem, start, times)
    np.testing.assert_allclose(closed.factors.product, solved.factors.product, atol=1e-9)
    assert np.isnan(float(solved.drift)) and solved.converged and closed.converged
    early = flows.gradient_flow(problem, start, times, rtol=1e-11)
    warm = flows.reflora_flow(problem, start, times, warmup=1.2, rtol=1e-11)
    np.testing.assert_allclose(warm.factors.product[:3], early.factors.product[:3], atol=1e-9)
    assert float(jnp.abs(warm.factors.product[-1] - early.factors.product[-1]).max()) > 1e-3


def orthonormal(seed):
    a, b = (np.linalg.qr(draw(seed + i, n, R))[0] for i, n in enumerate((M, N)))
    return Factors(a, b.T)


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


STARTS = {
    "generic": pair(0),
    "tied": orthonormal(0),
    "LoRA's": pair(0)._replace(b=np.zeros((R, N))),
    "orthonormal, B = 0": orthonormal(0)._replace(b=np.zeros((R, N))),
    "deficient": Factors(*(x.copy() for x in pair(0))),
    "zero": Factors(np.zeros((M, R)), np.zeros((R, N))),
    "wide": Factors(draw(0, 3, 4), draw(1, 4, 3)),  # r > m, n: the product has less rank than r
}
STARTS["deficient"].a[:, 1] = STARTS["deficient"].a[:, 0]
DIRECTIONS = {
    "riemannian": lambda x, g: descents.riemannian(g, x),
    "damped": lambda x, g: descents.riemannian(g, x, damping=0.3),
    "altered": lambda x, g: descents.riemannian(g, x, damping=0.3, exponent=1.5),
    "reflora": lambda x, g: descents.reflora(g, x),
    "rebalanced": lambda x, g: descents.rebalanced(x).product,
    "polar": lambda x, g: descents.polar(x.a),
}


def lanes_of(names):
    """Starts of one shape, side by side."""
    return jax.tree.map(lambda *x: jnp.stack(x), *(jnp_pair(STARTS[name]) for name in names))


NARROW = tuple(name for name in STARTS if name != "wide")


@pytest.mark.parametrize("names", [NARROW, ("wide",)], ids=["narrow", "wide"])
@pytest.mark.parametrize("rule", DIRECTIONS)
def test_derivatives_of_the_directions_are_those_of_differences(rule, names):
    """At equal singular values and without full rank, where decompositions have none."""
    starts = lanes_of(names)
    m, rank, n = *starts.a.shape[1:], starts.b.shape[2]
    g = jnp.asarray(draw(5, m, n))
    moves = jnp_pair(Factors(draw(6, m, rank), draw(7, rank, n)))

    def value(x, start):
        moved = jax.tree.map(lambda y, z: y + x * z, start, moves)
        gradient = Factors(g @ moved.b.T, moved.a.T @ g)
        return flat(DIRECTIONS[rule](moved, gradient))

    at = jax.jit(jax.vmap(value, (None, 0)))
    got = jax.jvp(lambda x: at(x, starts), (0.0,), (1.0,))[1]
    weights = jnp.asarray(draw(8, got.shape[1]))
    slope = jax.grad(lambda x, start: weights @ value(x, start))
    back = jax.jit(jax.vmap(slope, (None, 0)))(0.0, starts)
    assert bool(jnp.all(jnp.isfinite(got)) & jnp.all(jnp.isfinite(back)))
    np.testing.assert_allclose(back, got @ weights, rtol=1e-9, atol=1e-9)
    smooth = ["generic", "tied", "wide"]
    # Pseudo-inverses jump as rank is gained; a damped inverse does not.
    smooth += list(STARTS) if rule in ("damped", "altered") else []
    smooth += ["LoRA's", "orthonormal, B = 0"] if rule == "polar" else []
    want = (at(1e-5, starts) - at(-1e-5, starts)) / 2e-5
    for i, name in enumerate(names):
        if name in smooth:
            np.testing.assert_allclose(got[i], want[i], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize("names", [("generic", "tied"), ("LoRA's", "orthonormal, B = 0")])
def test_derivatives_of_lora_rite_are_those_of_differences(names, escape):
    """At B = 0, LoRA's own start, along changes of A and of the gradient; elsewhere along all."""
    starts = lanes_of(names)
    g, turn = jnp.asarray(0.1 * draw(5, M, N)), jnp.asarray(0.1 * draw(9, M, N))
    moves = jnp_pair(Factors(draw(6, M, R), draw(7, R, N)))
    at_zero = not bool(starts.b.any())
    rule = flows.lora_rite(1.0, escape=escape)

    def value(x, y, start):
        moved = Factors(start.a + x * moves.a, start.b + (y if at_zero else x) * moves.b)
        gradient = g + x * turn
        pair_of = Factors(gradient @ moved.b.T, moved.a.T @ gradient)
        found, state = rule.update(pair_of, rule.init(moved), moved)
        second = jax.tree.map(lambda z: 0.1 * z, pair_of)
        if at_zero:  # the second moments turn by what the bases turn by
            return flat(found)
        return flat((found, rule.update(second, state, moved)[0]))

    at = jax.jit(jax.vmap(lambda x, start: value(x, 0.0, start), (None, 0)))
    got = jax.jvp(lambda x: at(x, starts), (0.0,), (1.0,))[1]
    assert bool((jnp.abs(got).max(axis=1) > 0.1).all())
    want = (at(1e-5, starts) - at(-1e-5, starts)) / 2e-5
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    weights = jnp.asarray(draw(8, got.shape[1]))
    slopes = jax.grad(lambda x, y, start: weights @ value(x, y, start), (0, 1))
    back = jax.jit(jax.vmap(slopes, (None, None, 0)))(0.0, 0.0, starts)
    # Of what raises the rank of B there is none; it is finite, and spoils nothing.
    assert bool(jnp.isfinite(jnp.stack(back)).all())
    np.testing.assert_allclose(back[0], got @ weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", ["riemannian", pytest.param("reflora", marks=pytest.mark.apart)])
def test_derivatives_of_the_flows_are_those_of_differences(metric, key):
    problem = lorajax.MatrixFactorization.from_spectrum(key, (M, N), (2.0, 1.0))
    start, moves = jnp_pair(orthonormal(0)), jnp_pair(pair(3))
    times = np.linspace(0.0, 1.0, 3)

    def value(kind, x):
        moved = jax.tree.map(lambda y, z: y + x * z, start, moves)
        if kind == "flow":
            path = flows.gradient_flow(problem, moved, times, metric=metric, rtol=1e-10)
        else:
            path = flows.reflora_flow(problem, moved, times, warmup=kind, rtol=1e-10)
        return flat((path.losses, path.factors.product))

    for kind in ("flow", 0.0, 0.3) if metric == "reflora" else ("flow",):
        at = functools.partial(value, kind)
        run = jax.jit(lambda x, at=at: jax.jvp(at, (x,), (1.0,)))
        want = (run(1e-4)[0] - run(-1e-4)[0]) / 2e-4
        np.testing.assert_allclose(run(0.0)[1], want, rtol=1e-5, atol=1e-5)


def test_reflora_says_where_it_is_not_defined(key):
    problem = lorajax.MatrixFactorization.from_spectrum(key, (M, N), (2.0, 1.0))
    start, times = jnp_pair(pair(0)), np.linspace(0.0, 1.0, 3)
    lost = start._replace(b=0 * start.b)
    with pytest.raises(ValueError, match="factors multiply to 0"):
        flows.gradient_flow(problem, lost, times, metric="reflora")
    for flow in (
        lambda x: flows.gradient_flow(problem, x, times, metric="reflora"),
        lambda x: flows.reflora_flow(problem, x, times),
    ):
        both = jax.tree.map(lambda *x: jnp.stack(x), start, lost)
        paths = jax.vmap(flow)(both)
        assert [flows.path.STATUS[int(s)] for s in paths.status] == ["converged", "non-finite"]
        assert bool(jnp.all(jnp.isnan(paths.core.a[1])))
        traced = jax.jit(lambda x, flow=flow: flow(x).factors.product)(start)
        np.testing.assert_allclose(traced, flow(start).factors.product, 1e-6)


def test_bad_input_is_named(key):
    problem = lorajax.MatrixFactorization.from_spectrum(key, (M, N), (2.0, 1.0))
    start = initializers.orthogonal(key, (M, N), 2, 0.1)
    times = np.linspace(0.0, 1.0, 3)
    with pytest.raises(ValueError, match="give a warmup"):
        flows.reflora_flow(problem, start, times)
    with pytest.raises(ValueError, match="warmup is -1"):
        flows.reflora_flow(problem, start, times, warmup=-1.0)
    with pytest.raises(ValueError, match="metric is 'natural'"):
        flows.gradient_flow(problem, start, times, metric="natural")
    for bad, message in (
        (lambda: adapters.riemannian(-1), "damping is -1"),
        (lambda: flows.scaled_gradient(1.0, -1), "damping is -1"),
        (lambda: flows.reflora_descent(0.0), "learning_rate is 0"),
        (lambda: flows.lora_rite(-1.0), "learning_rate is -1"),
        (lambda: flows.reflora_flow(problem, start, times, rtol=0.0), "rtol is 0"),
        (lambda: adapters.reflora(-1), "warmup is -1"),
        (lambda: adapters.lora_rite((1.0, 0.9)), "first decay is 1.0"),
        (lambda: adapters.lora_rite(eps=0), "eps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    for rule in (pair[1] for pair in RULES.values()):
        with pytest.raises(ValueError, match="finds no LoRA factors"):
            rule.init({"kernel": jnp.ones((2, 2))})
    parted = {"layer": {"adapters": {"default": {"a": jnp.ones((2, 1))}}}}
    with pytest.raises(ValueError, match="with A alone"):
        adapters.riemannian().init(parted)
    x = place(jnp_pair(pair(0)))
    with pytest.raises(ValueError, match="needs the parameters"):
        adapters.riemannian().update(x, adapters.riemannian().init(x))
    with pytest.raises(ValueError, match="no pair of Factors"):
        flows.reflora_descent(1.0).init(jnp.ones((2, 2)))


@pytest.mark.parametrize("name", ["riemannian", "reflora", "lora-rite", "spectral"])
def test_recipes_train_adapters_and_what_is_beside_them(name):
    from lorajax.finetune import recipes

    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    # Not from two small factors: see the docstring of LoRA-RITE.
    model = adapters.adapt(model, "layers/0", key=jax.random.key(0), rank=2, start="orthogonal")
    wrt = adapters.trainable(model, heads=("layers/1",))
    rule = recipes.lora(40, optimizer=name, learning_rate=0.01).transformation()
    optimizer = nnx.Optimizer(model, rule, wrt=wrt)
    x = jnp.asarray(draw(3, 32, 6), jnp.float32)
    y = x[:, :2] * x[:, 2:4].mean()

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: jnp.mean((m(x) - y) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0] and np.all(np.isfinite(losses))
