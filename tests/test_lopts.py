"""The other learned optimizers: Metz's network, the GRU, hand-designed rules as theta."""

import pathlib
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from companions import lopts

PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.array([0.5, -0.2, 0.1])}
KEY = jax.random.key(0)


def grads_at(t):
    grads = jax.tree.map(lambda p: jnp.sin(3 * p + t) + 0.1 * p, PARAMS)
    return grads | {"w": grads["w"].at[0, 0].set(0.0)}  # as a dark pixel's always is


def run(optimizer, theta, steps):
    """Parameters after each step of gradients that do not depend on them."""
    state, params, out = optimizer.init(PARAMS), PARAMS, []
    for t in range(steps):
        updates, state = jax.jit(optimizer.update)(theta, grads_at(t), state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def plain_mlp(theta, g, state, param, step):
    """D.1 of Metz et al. 2019 with a stacked array of features: (update, momenta)."""
    decays = np.array([0.5, 0.9, 0.99, 0.999, 0.9999]).reshape(-1, *[1] * g.ndim)
    momenta = decays * state + (1 - decays) * g
    columns = [x / np.sqrt(1e-5 + (x * x).mean()) for x in (g, param, *momenta)]
    for tau in np.geomspace(3, 300_000, 9):
        columns.append(np.full(g.shape, np.tanh(step / tau - 1)))
    hidden = np.maximum(np.stack(columns, -1) @ theta["w0"] + theta["b0"], 0)
    o1, o2 = np.moveaxis(hidden @ theta["w1"] + theta["b1"], -1, 0)
    return -1e-3 * o2 * np.exp(1e-3 * o1), momenta


def plain_gru(theta, g, h, param, step):
    """Cho et al.'s equations, gate by gate: (update, state). 0.1 is the readout's scale."""
    w, u, b = (np.split(theta[name], 3, -1) for name in "ghb")
    g, h = g[..., None], np.moveaxis(h, 0, -1)
    z, r = (1 / (1 + np.exp(-(g * w[i] + h @ u[i] + b[i]))) for i in range(2))
    h = z * h + (1 - z) * np.tanh(g * w[2] + r * (h @ u[2]) + b[2])
    return 0.1 * h @ theta["readout"], np.moveaxis(h, -1, 0)


NETWORKS = [(lopts.mlp(), plain_mlp), (lopts.gru(hidden=5, scale=0.1), plain_gru)]


@pytest.mark.parametrize("optimizer, plain", NETWORKS)
def test_networks_equal_a_plain_loop(optimizer, plain):
    """Five steps of Metz's optimizer and of the GRU, by hand in float64."""
    theta = jax.tree.map(lambda x: 0.5 * x + 0.1, optimizer.init_theta(KEY))
    numbers, params = jax.tree.map(np.float64, (theta, PARAMS))
    states = {name: np.zeros((5, *x.shape)) for name, x in params.items()}
    for t, ours in enumerate(run(optimizer, theta, 5)):
        for name, g in grads_at(t).items():
            now = np.float64(g), states[name], params[name], t
            update, states[name] = plain(numbers, *now)
            params[name] = params[name] + update
            np.testing.assert_allclose(ours[name], params[name], rtol=1e-5, atol=2e-6)


def test_mlp_counts():
    """16 features and 610 meta-parameters. 11 and 7 features in the ablations."""
    for name, features in (("mlp", 16), ("mlp_no_momentum", 11), ("mlp_no_time", 7)):
        theta = lopts.LEARNED[name].init_theta(KEY)
        assert theta["w0"].shape == (features, 32)
        assert sum(x.size for x in theta.values()) == 610 - 32 * (16 - features)


def test_backpropagation_keeps_features_not_hidden_units():
    """What each of an unroll's updates leaves in memory is less than its hidden units."""
    optimizer, size = lopts.mlp(), 5000

    def loss(theta, steps):
        def one(carry, _):
            p, state = carry
            update, state = optimizer.update(theta, jnp.sin(p), state, p)
            return (p + update, state), None

        start = jnp.ones(size), optimizer.init(jnp.ones(size))
        return (jax.lax.scan(one, start, length=steps)[0][0] ** 2).mean()

    def bytes_of(steps):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        compiled = gradient.lower(optimizer.init_theta(KEY), steps).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    features, hidden = 4 * size * (7 + 1), 4 * size * 32
    assert features / 2 < (bytes_of(40) - bytes_of(20)) / 20 < hidden


@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_mlp_is_blind_to_the_scale_of_gradients(scale):
    """Features are divided by their root mean square. So ten thousand times the gradient
    is the same step, once the slowest momentum is large beside the normalizer's 1e-5."""
    optimizer, first = lopts.mlp(), grads_at(0)
    theta, state = optimizer.init_theta(KEY), optimizer.init(PARAMS)
    grads = [jax.tree.map(lambda g, x=x: x * g, first) for x in (1e4, 1e4 * scale)]
    a, b = (optimizer.update(theta, g, state, PARAMS)[0]["w"] for g in grads)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_hand_designed_rules_are_optax(name):
    """theta is logs of rates and logits of decays. With it optax's optimizer steps."""
    settings = {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "momentum": 0.7}
    settings = {k: settings[k] for k in lopts.LEARNED[name].init_theta(KEY)}
    make = partial(optax.adam, eps_root=1e-8) if name == "adam" else optax.sgd
    theirs = make(**settings)
    state, params = theirs.init(PARAMS), PARAMS
    for t, ours in enumerate(run(lopts.LEARNED[name], lopts.encode(settings), 4)):
        updates, state = theirs.update(grads_at(t), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(ours["w"], params["w"], rtol=1e-5, atol=1e-7)
    assert lopts.decode(lopts.encode(settings)) == pytest.approx(settings, rel=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("name", lopts.LEARNED)
def test_theta_has_a_gradient(name):
    """d(parameters after 3 steps) / d theta is finite, and no leaf of theta is without."""
    optimizer = lopts.LEARNED[name]
    # away from where it starts: a readout of zeros hides all that is read out
    theta = jax.tree.map(lambda x: x + 0.1, optimizer.init_theta(KEY))

    @jax.jit
    def after(theta):
        return sum((x**2).sum() for x in run(optimizer, theta, 3)[-1].values())

    for leaf in jax.tree.leaves(jax.grad(after)(theta)):
        assert np.isfinite(leaf).all() and (leaf != 0).any()


@pytest.mark.parametrize("optimizer", lopts.LEARNED.values(), ids=lopts.LEARNED)
def test_update_compiles_once_and_keeps_its_state(optimizer):
    """Three calls trace once. Shapes, dtypes and weak types of the state stay."""
    theta, state = optimizer.init_theta(KEY), optimizer.init(PARAMS)
    update, before = jax.jit(partial(optimizer.update)), jax.tree.map(jax.typeof, state)
    for t in range(3):
        _, state = update(theta, grads_at(t), state, PARAMS)
    assert update._cache_size() == 1 and jax.tree.map(jax.typeof, state) == before


def scanned(optimizer, theta, dtype):
    """((parameters, state), updates) of three steps in a scan, parameters of this dtype."""
    both = PARAMS, jax.vmap(grads_at)(jnp.arange(3.0))
    params, grads = jax.tree.map(lambda x: x.astype(dtype), both)

    def step(carry, grads):
        updates, state = optimizer.update(theta, grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), updates

    return jax.lax.scan(step, (params, optimizer.init(params)), grads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", lopts.LEARNED.values(), ids=lopts.LEARNED)
def test_short_floats_have_updates_of_their_own_and_float32_state(optimizer, dtype):
    """Three steps in a scan end near those in float32."""
    theta = jax.tree.map(lambda x: x + 0.1, optimizer.init_theta(KEY))
    (params, state), updates = scanned(optimizer, theta, dtype)
    for x in jax.tree.leaves((params, updates)):
        assert x.dtype == dtype
    for x in jax.tree.leaves(state):
        assert x.dtype in (jnp.float32, jnp.int32)
    (expected, _), _ = scanned(optimizer, theta, "float32")
    for name, x in expected.items():
        np.testing.assert_allclose(np.float32(params[name]), x, rtol=0.03, atol=0.03)


def test_a_theta_is_not_blamed_for_jax(monkeypatch):
    """Without a backend JAX's own error is raised, not that the file is no theta."""
    weights = pathlib.Path(__file__).parents[1] / "weights"
    monkeypatch.setattr(jax.random, "key", Mock(side_effect=RuntimeError("no backend")))
    with pytest.raises(RuntimeError, match="no backend"):
        lopts.load_theta(weights / "gru_rosenbrock.npz")


def test_theta_files(tmp_path):
    """A theta and its card load again. What is none: OSError or ValueError, in one line."""
    path, theta = tmp_path / "theta.npz", lopts.gru().init_theta(KEY)

    def saved(card='{"optimizer": "gru"}', **changes):
        np.savez(path, card=card, **theta | changes)
        return path

    found, optimizer = lopts.load_theta(saved())
    assert optimizer is lopts.LEARNED["gru"] and found.keys() == theta.keys()
    assert all((found[name] == theta[name]).all() for name in theta)
    wrong = dict(b=theta["b"] + np.nan), dict(b=theta["b"][:3]), dict(card="{")
    for changes in (*wrong, dict(card='{"optimizer": "star"}')):
        with pytest.raises(ValueError, match="^[^\n]*is no theta of lopts.py[^\n]*$"):
            lopts.load_theta(saved(**changes))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="no theta"):
        lopts.load_theta(path)
    with pytest.raises(OSError):
        lopts.load_theta(tmp_path / "missing.npz")
