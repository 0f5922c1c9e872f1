"""The other learned optimizers: Metz's network and hand-designed rules as theta."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from baselines import BASELINES
from companions import lopts

PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.array([0.5, -0.2, 0.1])}


def grads_at(t):
    return jax.tree.map(lambda p: jnp.sin(3 * p + t) + 0.1 * p, PARAMS)


def run(optimizer, theta, steps):
    """Parameters after each step of gradients that do not depend on them."""
    state, params, out = optimizer.init(PARAMS), PARAMS, []
    for t in range(steps):
        updates, state = jax.jit(optimizer.update)(theta, grads_at(t), state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out, state


def plain_mlp(theta, grads, momenta, param, step):
    """D.1 of Metz et al. 2019 with loops and a stacked array of features, in numpy."""
    columns = [grads, param, *momenta]
    columns = [x / np.sqrt(1e-5 + (x * x).mean()) for x in columns]
    for tau in np.geomspace(3, 300_000, 9):
        columns.append(np.full(param.shape, np.tanh(step / tau - 1)))
    x = np.stack(columns, -1).reshape(-1, 16)
    hidden = np.maximum(x @ theta["w0"] + theta["b0"], 0)
    o1, o2 = (hidden @ theta["w1"] + theta["b1"]).T
    return -(1e-3 * o2 * np.exp(1e-3 * o1)).reshape(param.shape)


def test_mlp_equals_a_plain_loop():
    """Five steps of Metz's optimizer: the stacked features, momenta and steps by hand."""
    theta = lopts.mlp().init_theta(jax.random.key(0))
    theta = jax.tree.map(lambda x: x + 0.1, theta)
    ours, _ = run(lopts.mlp(), theta, 5)
    numbers = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    for name in PARAMS:
        param = np.asarray(PARAMS[name], np.float64)
        momenta = np.zeros((5, *param.shape))
        for t in range(5):
            g = np.asarray(grads_at(t)[name], np.float64)
            for i, decay in enumerate((0.5, 0.9, 0.99, 0.999, 0.9999)):
                momenta[i] = decay * momenta[i] + (1 - decay) * g
            param = param + plain_mlp(numbers, g, momenta, param, t)
            np.testing.assert_allclose(ours[t][name], param, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name, features", [("mlp", 16), ("mlp_no_momentum", 11), ("mlp_no_time", 7)]
)
def test_mlp_counts(name, features):
    """16 features and 610 meta-parameters; 11 and 7 features in the ablations."""
    theta = lopts.LEARNED[name].init_theta(jax.random.key(0))
    assert theta["w0"].shape == (features, 32)
    assert sum(x.size for x in theta.values()) == 32 * features + 32 + 66
    assert name != "mlp" or 32 * features + 32 + 66 == 610


def test_backpropagation_keeps_features_not_hidden_units():
    """What each of an unroll's updates leaves in memory is less than its hidden units."""
    optimizer, size = lopts.mlp(), 5000

    def bytes_of(steps):
        def loss(theta, p):
            def one(carry, _):
                p, state = carry
                update, state = optimizer.update(theta, jnp.sin(p), state, p)
                return (p + update, state), None

            (p, _), _ = jax.lax.scan(one, (p, optimizer.init(p)), None, length=steps)
            return (p * p).mean()

        theta = optimizer.init_theta(jax.random.key(0))
        compiled = jax.jit(jax.grad(loss)).lower(theta, jnp.ones(size)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    features, hidden = 4 * size * (7 + 1), 4 * size * 32
    assert features / 2 < (bytes_of(40) - bytes_of(20)) / 20 < hidden


@given(scale=st.floats(1, 1e4))
def test_mlp_is_blind_to_the_scale_of_gradients(scale):
    """Features are divided by their root mean square: ten thousand times the gradient,
    the same step, once 1e-5 in the normalizer is small beside the slowest momentum."""
    theta = lopts.mlp().init_theta(jax.random.key(0))
    optimizer, grads = lopts.mlp(), jax.tree.map(lambda g: 1e4 * g, grads_at(0))
    big = jax.tree.map(lambda g: g * jnp.float32(scale), grads)
    a, _ = optimizer.update(theta, grads, optimizer.init(PARAMS), PARAMS)
    b, _ = optimizer.update(theta, big, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "name, make",
    [
        ("sgd", lambda h: optax.sgd(h["learning_rate"])),
        ("momentum", lambda h: optax.sgd(h["learning_rate"], h["momentum"])),
        ("adam", lambda h: lopts.ADAM(h["learning_rate"], h["b1"], h["b2"])),
    ],
)
def test_hand_designed_rules_are_optax(name, make):
    """With theta decoded, optax's own optimizer takes the same steps."""
    learned = lopts.LEARNED[name]
    theta = jax.tree.map(lambda x: x + 0.3, learned.init_theta(jax.random.key(0)))
    ours, _ = run(learned, theta, 4)
    theirs = make({k: float(x) for k, x in lopts.decode(theta).items()})
    state, params = theirs.init(PARAMS), PARAMS
    for t in range(4):
        updates, state = theirs.update(grads_at(t), state, params)
        params = optax.apply_updates(params, updates)
        for key in PARAMS:
            np.testing.assert_allclose(ours[t][key], params[key], rtol=1e-5, atol=1e-7)


@given(rate=st.floats(1e-6, 10), decay=st.floats(0.01, 0.999))
def test_encode_and_decode_are_inverse(rate, decay):
    """Logs of rates, logits of decays: any theta is a valid setting."""
    found = lopts.decode(lopts.encode({"learning_rate": rate, "b1": decay}))
    assert found["learning_rate"] == pytest.approx(rate, rel=1e-4)
    assert found["b1"] == pytest.approx(decay, rel=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*lopts.LEARNED])
def test_theta_has_a_gradient(name):
    """d(parameters after 3 steps) / d theta is finite, and no leaf of theta is without."""
    optimizer = lopts.LEARNED[name]
    # away from where it starts: a readout of zeros hides all that is read out
    theta = jax.tree.map(lambda x: x + 0.1, optimizer.init_theta(jax.random.key(1)))

    @jax.jit
    def after(theta):
        state, params = optimizer.init(PARAMS), PARAMS
        for t in range(3):
            grads = jax.tree.map(lambda p, t=t: jnp.sin(3 * p + t), params)
            grads["w"] = grads["w"].at[0, 0].set(0.0)  # as a dark pixel's always is
            updates, state = optimizer.update(theta, grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return sum((x**2).sum() for x in params.values())

    for leaf in jax.tree.leaves(jax.grad(after)(theta)):
        assert np.isfinite(leaf).all() and (leaf != 0).any()


@pytest.mark.parametrize("name", [*lopts.LEARNED])
def test_update_compiles_once_and_keeps_its_state(name):
    """Three calls trace once; shapes, dtypes and weak types of the state stay."""
    optimizer, traces = lopts.LEARNED[name], []

    @jax.jit
    def update(theta, grads, state, params):
        traces.append(None)
        return optimizer.update(theta, grads, state, params)

    theta, state = optimizer.init_theta(jax.random.key(0)), optimizer.init(PARAMS)
    before = jax.tree.map(lambda x: jax.typeof(x), state)
    for t in range(3):
        _, state = update(theta, grads_at(t), state, PARAMS)
    assert len(traces) == 1
    assert jax.tree.map(lambda x: jax.typeof(x), state) == before


def test_baselines_have_the_plain_rate_as_theta():
    """baselines.py's theta is the plain rate: SGD steps by it."""
    ours, _ = run(BASELINES["sgd"], {"learning_rate": jnp.float32(1e-2)}, 1)
    expected = PARAMS["w"] - 1e-2 * grads_at(0)["w"]
    np.testing.assert_allclose(ours[0]["w"], expected, rtol=1e-6)
