"""The reading of trained optimizers: known modes are found, and the reading runs again."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import star
import store
import train
from companions import dynamics, gru, lopts, problems
from figures import maheswaranathan

PARAMS = jnp.linspace(-1, 1, 6).reshape(3, 2)
KEY = jax.random.key(0)


def copies(h):
    """p (*S) -> a state (k, *S), h (k,) for every parameter."""
    return lambda p: jnp.multiply.outer(h, jnp.ones_like(p))


def linear_optimizer(a, b, w, d=0.0, start=None) -> lopts.LearnedOptimizer:
    """h' = A h + b g, u = w'h' + d g, on every parameter by itself. theta is {}."""

    def update(theta, g, h, p):
        h = jnp.tensordot(a, h, 1) + jnp.multiply.outer(b, g)
        return jnp.tensordot(w, h, 1) + d * g, h

    init = copies(np.zeros(len(b)) if start is None else start)
    return lopts.LearnedOptimizer(lambda key: {}, init, update)


def read(optimizer, theta=None) -> dynamics.Modes:
    return dynamics.modes_of(dynamics.linearise(optimizer, theta or {}))


def updates_of(optimizer, theta=None, steps=12, size=1.0):
    """All updates (steps, 3, 2) for gradients that do not depend on them, in a loop."""
    state, out, update = optimizer.init(PARAMS), [], jax.jit(optimizer.update)
    for t in range(steps):
        grads = size * jnp.sin(3 * PARAMS + t)
        updates, state = update(theta or {}, grads, state, PARAMS)
        out.append(updates)
    return np.asarray(out)


def system(seed):
    """A stable real (A, b, w): 4 eigenvalues, two of them a pair."""
    rng = np.random.default_rng(seed)
    blocks = np.diag([0, 0, -0.8, 0.97])
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.7)
    blocks[:2, :2] = [[x, -y], [y, x]]
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0] @ np.diag(rng.uniform(0.5, 2, 4))
    a = basis @ blocks @ np.linalg.inv(basis)
    return a, rng.normal(size=4), rng.normal(size=4)


def linear(a, b, c, d) -> dynamics.Linear:
    """At rest in its fixed point 0."""
    rest = np.zeros(len(b))
    return dynamics.Linear(a, b, c, d, rest, rest, drift=0.0, residual=0.0)


# --- what is known is found
def test_known_modes_are_recovered():
    """Appendix B: three momenta mixed by any basis. Every (alpha, beta) comes back, and
    the optimizer steps as the sum of three momenta with them (aggregated momentum)."""
    beta, alpha = np.array([0.9, 0.5, -0.3]), np.array([0.1, 2.0, -0.5])
    basis = np.random.default_rng(0).normal(size=(3, 3))
    inverse, one = np.linalg.inv(basis), np.ones(1)
    a = basis @ np.diag(beta) @ inverse
    optimizer = linear_optimizer(a, basis @ np.ones(3), -alpha @ inverse)
    modes = read(optimizer)
    order = np.argsort(-modes.momentum.real)
    np.testing.assert_allclose(modes.momentum[order], beta, atol=1e-10)
    np.testing.assert_allclose(modes.learning_rate[order], alpha, atol=1e-9)
    assert abs(modes.direct) < 1e-9 and modes.drift == 0
    pairs = zip(beta, alpha, strict=True)
    momenta = [linear_optimizer(b * one[None], one, -r * one) for b, r in pairs]
    aggregated = sum(updates_of(momentum) for momentum in momenta)
    np.testing.assert_allclose(updates_of(optimizer), aggregated, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 2**32 - 1), d=st.floats(-2, 2))
def test_any_stable_system_is_the_sum_of_its_modes(seed, d):
    """sum alpha_j beta_j^t is the response of a random system, complex pairs included,
    and no choice of modes splits a pair."""
    a, b, w = system(seed)
    modes = dynamics.modes_of(linear(a, b, a.T @ w, w @ b + d))
    impulse = np.array([w @ np.linalg.matrix_power(a, k) @ b for k in range(30)])
    impulse[0] += d
    powers = modes.momentum[None] ** np.arange(30)[:, None]
    response = powers @ modes.learning_rate + modes.direct * np.eye(30)[0]
    np.testing.assert_allclose(response, -impulse, atol=1e-7)
    assert modes.direct == pytest.approx(-d, abs=1e-7)
    assert (modes.momentum.imag != 0).sum() == 2
    for n in range(5):
        kept = modes.momentum[dynamics.keep_modes(modes, n)]
        assert n <= len(kept) <= n + 1 and abs(kept.imag.sum()) < 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_reads_as_itself(nesterov):
    """Momentum gives its own alpha and beta. Nesterov's: rate * beta, the rate at once."""
    make = partial(optax.sgd, nesterov=nesterov)
    start = dict(learning_rate=0.3, momentum=0.8)
    modes = read(lopts.hand_designed(make, **start), lopts.encode(start))
    assert modes.momentum == pytest.approx([0.8])
    assert modes.learning_rate == pytest.approx([0.24 if nesterov else 0.3])
    assert modes.direct == pytest.approx(0.3 * nesterov, abs=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_all_modes_together_are_the_linearisation(seed):
    """A linear optimizer, wherever it starts, and `reduced` with all modes: same steps."""
    a, b, w = system(seed)
    start = np.random.default_rng(seed).normal(size=4)
    optimizer = linear_optimizer(a, b, w, d=0.7, start=start)
    rebuilt = updates_of(dynamics.reduced(read(optimizer)))
    np.testing.assert_allclose(rebuilt, updates_of(optimizer), rtol=1e-4, atol=2e-5)


def test_what_has_no_modes_is_refused():
    """A count of steps in the state, and a delay, are no momentum: ValueError."""
    for optimizer in (lopts.LEARNED["adam"], star.PRESETS["star"]):
        with pytest.raises(ValueError, match="int32"):
            dynamics.linearise(optimizer, {})
    with pytest.raises(ValueError, match="late"):
        dynamics.modes_of(linear(np.zeros((1, 1)), np.ones(1), np.ones(1), 0.0))


# --- fixed points
def test_fixed_point_is_one():
    """A contraction h' = tanh(A h + b): found, and it stays where it is put."""
    a, b, _ = system(0)
    a, b = np.float32(0.9 * a / np.linalg.norm(a, 2)), np.float32(b)
    point, residual = dynamics.fixed_point(lambda h: jnp.tanh(a @ h + b), np.zeros(4))
    assert residual < 1e-6  # float32 outside of `linearise`
    np.testing.assert_allclose(np.tanh(a @ point + b), point, atol=1e-5)


def test_a_missing_fixed_point_is_reported():
    """h' = h + 1 has none: a warning, and the residual 1."""
    optimizer = lopts.LearnedOptimizer(
        lambda key: {}, jnp.zeros_like, lambda theta, g, h, p: (h, h + 1.0)
    )
    with pytest.warns(UserWarning, match="no fixed point"):
        assert dynamics.linearise(optimizer, {}, settle=3).residual == pytest.approx(1)


def test_gru_near_its_fixed_point_is_linear():
    """Gradients of size e: the linearisation is off by e^2 (float32 allowing)."""
    optimizer = lopts.gru(hidden=5)
    theta = jax.tree.map(lambda x: 0.5 * x + 0.1, optimizer.init_theta(KEY))
    found = dynamics.linearise(optimizer, theta)
    assert found.residual < 1e-10
    quiet = dynamics.reduced(dynamics.modes_of(found._replace(start=found.point)))
    resting = optimizer._replace(init=copies(found.point))

    def error(e):
        off = updates_of(resting, theta, 8, e) - updates_of(quiet, {}, 8, e)
        return np.abs(off).max()

    assert error(0.1) < 0.05 * error(1.0)


def test_heavy_ball_is_the_best_momentum():
    """Polyak's (alpha, beta) has the least spectral radius, sqrt(beta), of a grid."""

    def radius(alpha, beta):
        rows = [[[beta, h], [-alpha * beta, 1 - alpha * h]] for h in (0.01, 1.0)]
        return np.abs(np.linalg.eigvals(np.array(rows))).max()

    alpha, beta = dynamics.heavy_ball(0.01, 1.0)
    assert radius(alpha, beta) == pytest.approx(beta**0.5, rel=1e-6)
    for factor, shift in ((0.9, 0), (1.1, 0), (1, -0.03), (1, 0.03)):
        assert radius(factor * alpha, beta + shift) > beta**0.5 + 1e-4


def test_accumulator_rates_of_the_nominal_term():
    """STAR's nominal term alone is AggMo over v: alpha_j v = beta1 (1 - beta_j) / 3."""
    constants = star.Constants(beta2=0.0, beta3=0.0)
    optimizer = star.learned_optimizer(constants)
    theta = optimizer.init_theta(KEY)
    decays = star.learned_decay(star.DECAYS, theta["momentum_decays"])
    params, at = {"b": PARAMS[:, 0]}, jnp.array([0, 2])
    first, second = ({"b": jnp.sin(params["b"] + t)} for t in range(2))

    @jax.jit
    def both():
        _, state = optimizer.update(theta, first, optimizer.init(params), params)
        now = second, state, params
        alpha = dynamics.accumulator_rates(optimizer, theta, decays, *now, {"b": at})
        return alpha["b"], optimizer.update(theta, *now)[1].tensors["b"].v2[at]

    alpha, v2 = both()
    expected = 1e-3 * (1 - np.asarray(decays)) / 3
    found = alpha * np.sqrt(v2 + constants.rms_eps)[None]
    np.testing.assert_allclose(found, np.tile(expected[:, None], 2), 1e-3)


# --- problems and meta-training
def test_linear_regression_has_the_stated_spectrum():
    """Eigenvalues log-uniform in [1e-3, 1], conditions of median 110, least loss 0."""

    @jax.jit
    @jax.vmap
    def quadratic(key):
        task, zero = problems.linear_regression({}, key), jnp.zeros(5)
        value, slope = jax.value_and_grad(task.loss)(zero, key, ())
        return jax.hessian(task.loss)(zero, key, ()), slope, value

    found = quadratic(jax.random.split(KEY, 300))
    hessian, slope, start = (np.asarray(x, np.float64) for x in found)
    values = np.linalg.eigvalsh(hessian)
    assert 0.9e-3 < values.min() and values.max() < 1.001
    assert np.log10(values).mean() == pytest.approx(-1.5, abs=0.1)
    assert np.median(values[:, -1] / values[:, 0]) == pytest.approx(110, rel=0.2)
    solution = np.linalg.solve(hessian, slope[..., None])[..., 0]
    np.testing.assert_allclose(start - 0.5 * (slope * solution).sum(1), 0, atol=5e-3)


def test_rosenbrock_and_its_starts():
    """0 at (1, 1) with slope 0. Starts fill (-2, 2) x (-1, 3)."""
    task = problems.rosenbrock({}, KEY)
    value, slope = jax.value_and_grad(task.loss)(jnp.ones(2), KEY, ())
    assert value == task.evaluate(jnp.ones(2))["test_loss"] == 0 and (slope == 0).all()
    starts = jax.vmap(task.init)(jax.random.split(KEY, 500))
    np.testing.assert_allclose(starts.min(0), [-2, -1], atol=0.1)
    np.testing.assert_allclose(starts.max(0), [2, 3], atol=0.1)


def test_two_moons():
    """8,577 weights. A pair of circles parts the balanced classes, a line does not."""
    task = problems.TASKS["two_moons"].build({}, KEY)
    params = task.init(KEY)
    assert sum(x.size for x in jax.tree.leaves(params)) == 8577
    assert task.loss(params, KEY, ()) == pytest.approx(np.log(2), abs=0.3)
    xy, side = problems.moons(200, noise=0.0)
    centre = np.stack([-side / 2, side / 4], 1)  # of the half circle each belongs to
    np.testing.assert_allclose(np.linalg.norm(xy - centre, axis=1), 1, atol=1e-5)
    flat = np.c_[xy, np.ones(200)]
    fit = flat @ np.linalg.lstsq(flat, side, rcond=None)[0]
    assert side.sum() == 0 and 0.7 < (np.sign(fit) == side).mean() < 1


def test_gru_recipe_is_the_papers():
    """C.2: BPTT through all 200 steps of 32 problems, Adam, l2 1e-5, clipped by value at
    5, the rate times 0.8 every 500 meta-steps. One step of it, by hand."""
    recipe = train.parse(["--task", "linear_regression"], gru.Recipe, problems.TASKS)
    assert (recipe.estimator, recipe.particles, recipe.truncation) == ("bptt", 32, 200)
    optimizer, theta = gru.meta_optimizer(recipe), jnp.array([3.0, -1.0])
    adam = optax.adam(lambda count: recipe.meta_lr * 0.8 ** (count // 500))
    grads = jnp.array([-100.0, 0.3])
    for count in (0, 1100):
        at = partial(optax.tree.set, count=jnp.int32(count))  # of meta-steps
        updates, _ = optimizer.update(grads, at(optimizer.init(theta)), theta)
        clipped = jnp.clip(grads + 2e-5 * theta, -5, 5)
        expected, _ = adam.update(clipped, at(adam.init(theta)))
        np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("preset", gru.PRESETS)
def test_gru_trains(preset, tmp_path):
    """Two meta-steps of every preset. Their theta starts another run, of its kind alone."""
    flags = ["--preset", preset, "--particles", "2", "--steps", "2", "--fresh-meta"]
    assert gru.main([*flags, "--out", str(tmp_path / "a")]) == 0
    flags += ["--init", str(tmp_path / "a" / "theta.npz"), "--out", str(tmp_path / "b")]
    assert gru.main(flags) == 0
    with pytest.raises(store.UserError, match="not for mlp"):
        gru.main([*flags[:-1], str(tmp_path / "c"), "--optimizer", "mlp"])


# --- figures
def test_random_search_finds_the_best_rate(monkeypatch):
    """Momentum on linear regression: near the best of the objective it reports, no edge.
    It says which of the best lie nearer to an end of their range, in log, than EDGE."""
    size = (60, 4, 4)
    tuned = maheswaranathan.tune("linear_regression", "momentum", size)
    rate, decay = tuned["best"].values()
    assert 0.3 < rate < 10 and 0.5 < decay < 0.99 and "edge" not in tuned["found"]
    assert tuned["losses"].shape == (4, 200)
    at = tuned["objective"].argmin()
    assert tuned["tried"]["learning_rate"][at] == np.float32(rate)
    monkeypatch.setattr(maheswaranathan, "EDGE", 0.37)  # a rate of 0.3 lies at 64 %
    again = maheswaranathan.tune("linear_regression", "momentum", size)
    assert "edge of its range: learning_rate" in again["found"]
