"""Estimators estimate the gradient: on unrolls whose meta-gradient is a formula."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import estimators

seeds = st.integers(0, 2**31 - 1)
thetas = st.floats(-2, 2, width=32)
SIGMA = 0.1
PAIRS = 4096


def line(length):
    """s' = s + theta, loss s': after t steps the loss is t theta, its gradient t."""

    def step(theta, s, key):
        return s + theta, s + theta

    return estimators.unroll(lambda key: jnp.zeros(()), step, length)


def growth(length):
    """s' = theta s from 1, loss s': the loss after t steps is theta^t."""

    def step(theta, s, key):
        return s * theta, s * theta

    return estimators.unroll(lambda key: jnp.ones(()), step, length)


@functools.cache
def compiled(make, problem, length, windows, steps, pairs):
    """The jitted estimates of many pairs, so that hypothesis compiles each case once."""
    pair = make(problem(length), windows, SIGMA)
    init = jax.vmap(pair.init, in_axes=(0, None))
    estimate = jax.vmap(pair.estimate, in_axes=(0, None, 0))

    @jax.jit
    def run(seed, theta):
        init_keys, *keys = jax.random.split(jax.random.key(seed), (steps + 1, pairs))
        state, grads = init(init_keys, theta), []
        for k in keys:
            grad, state, _ = estimate(k, theta, state)
            grads.append(grad)
        return jnp.stack(grads)

    return run


def trajectory(make, problem, length, windows, theta, seed, steps=None, pairs=PAIRS):
    """Estimates of independent pairs at the first `steps` windows: (steps, pairs)."""
    run = compiled(make, problem, length, windows, steps or windows, pairs)
    return np.asarray(run(seed, jnp.float32(theta)))


def assert_mean(samples, expected):
    """The mean of the samples is `expected`, within six of its standard errors."""
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    assert abs(samples.mean() - expected) < 6 * error + 1e-6, (samples.mean(), expected)


@pytest.mark.parametrize("make", [estimators.pes, estimators.noise_reuse_es])
@pytest.mark.parametrize("horizon, length", [(4, 2), (10, 2), (12, 4), (6, 6)])
@given(seed=seeds, theta=thetas)
def test_pes_and_noise_reuse_are_unbiased(make, horizon, length, seed, theta):
    """On s' = s + theta the mean of T losses has gradient (T + 1) / 2, also at T = 4,
    K = 2, where an estimator that mishandles the end of a trajectory is 53 % off."""
    windows = horizon // length
    # two trajectories in a row, so that the second one starts from a reset
    grads = trajectory(make, line, length, windows, theta, seed, 2 * windows)
    for one in (grads[:windows], grads[windows:]):
        assert_mean(one.mean(0), (horizon + 1) / 2)


@given(seed=seeds, theta=thetas)
def test_each_window_is_unbiased_before_the_end(seed, theta):
    """T far away: the estimate of window j has the mean gradient of its own losses."""
    grads = trajectory(estimators.pes, line, 3, 1000, theta, seed, steps=4)
    for j, samples in enumerate(grads):
        assert_mean(samples, 3 * j + 2)  # mean of t = 3 j + 1, 3 j + 2, 3 j + 3


@given(seed=seeds, theta=thetas)
def test_truncated_es_is_biased_by_the_predicted_amount(seed, theta):
    """It reports (K + 1) / 2 in every window: blind to what theta did to s before."""
    grads = trajectory(estimators.truncated_es, line, 3, 4, theta, seed)
    for samples in grads:
        assert_mean(samples, 2.0)


def test_truncated_es_starts_both_runs_from_the_same_carry():
    """Within a window the runs of a pair part; the next one rejoins them."""
    pair = estimators.truncated_es(line(3), 4, SIGMA)
    theta = jnp.float32(1.0)
    _, state, _ = pair.estimate(
        jax.random.key(0), theta, pair.init(jax.random.key(1), theta)
    )
    assert state.carry[0] == state.carry[1]
    np.testing.assert_allclose(state.carry[0], 3 * (theta + state.xi), rtol=1e-6)


def test_noise_reuse_keeps_one_perturbation_a_trajectory():
    """xi stays through all windows of a trajectory, and is drawn anew for the next."""
    pair = estimators.noise_reuse_es(line(2), 3, SIGMA)
    theta = jnp.float32(1.0)
    state = pair.init(jax.random.key(0), theta)
    xi = [state.xi]
    for t in range(6):
        _, state, _ = pair.estimate(jax.random.key(t + 1), theta, state)
        xi.append(state.xi)
    assert xi[0] == xi[1] == xi[2] == xi[3] != xi[4] == xi[5] == xi[6]


@given(seed=seeds, theta=st.floats(0.5, 1.125, width=32))
def test_pes_estimates_the_smoothed_gradient(seed, theta):
    """On s' = theta s, two windows of 2: the gradient of the loss smoothed over one
    perturbation per window, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    x1, x2 = np.meshgrid(nodes, nodes, indexing="ij")
    w = weights[:, None] * weights

    def smoothed(theta):
        a, b = theta + SIGMA * x1, theta + SIGMA * x2
        return (w * (a + a**2 + a**2 * b + a**2 * b**2)).sum() / 4

    h = 1e-5
    expected = (smoothed(theta + h) - smoothed(theta - h)) / (2 * h)
    grads = trajectory(estimators.pes, growth, 2, 2, theta, seed)
    assert_mean(grads.mean(0), expected)


@given(seed=seeds, theta=st.floats(0.5, 1.125, width=32))
def test_noise_reuse_estimates_the_smoothed_gradient(seed, theta):
    """On s' = theta s, two windows of 2: the loss smoothed over ONE perturbation for the
    whole trajectory; E (theta + sigma x)^k in closed form."""
    t, v = theta, SIGMA**2
    moments = [1, 2 * t, 3 * t**2 + 3 * v, 4 * t**3 + 12 * t * v]  # their derivatives
    grads = trajectory(estimators.noise_reuse_es, growth, 2, 2, theta, seed)
    assert_mean(grads.mean(0), sum(moments) / 4)


@given(seed=seeds, theta=st.floats(0.5, 1.125, width=32))
def test_one_window_makes_all_estimators_es(seed, theta):
    """K = T: PES and truncated ES are the same numbers, ES over the whole trajectory."""
    a, b = (
        trajectory(make, growth, 4, 1, theta, seed, steps=3, pairs=8)
        for make in (estimators.pes, estimators.truncated_es)
    )
    np.testing.assert_array_equal(a, b)


def even(length):
    """A loss even in theta, whatever the carry."""
    return estimators.unroll(
        lambda key: jnp.zeros(()), lambda th, s, k: (s, th**2), length
    )


def noisy(length):
    """Loss theta plus noise of 100 that both runs of a pair should share."""

    def step(theta, s, key):
        return s, s + theta + 100 * jax.random.normal(key)

    return estimators.unroll(lambda key: 100 * jax.random.normal(key), step, length)


@given(seed=seeds)
def test_antithetic_pairs_cancel_even_terms(seed):
    """A loss that is even around theta gives exactly zero, not only on average."""
    assert not trajectory(
        estimators.pes, even, 2, 3, 0.0, seed, steps=6, pairs=16
    ).any()


@given(seed=seeds)
def test_pairs_share_their_random_numbers(seed):
    """Noise that does not depend on theta cancels: both runs of a pair replay one key,
    from the same start. Uncancelled it would reach noise / sigma^2 = 10^4 and more."""
    grads = trajectory(estimators.pes, noisy, 2, 3, 0.0, seed, steps=6, pairs=64)
    assert np.abs(grads).max() < 100


def test_a_reset_starts_from_zero():
    """After the last window the next one begins with a fresh carry and no memory of the
    perturbations before."""
    pair = estimators.pes(line(2), 2, SIGMA)
    theta = jnp.float32(1.0)
    state = pair.init(jax.random.key(0), theta)
    for t in range(3):
        _, state, _ = pair.estimate(jax.random.key(t + 1), theta, state)
    assert state.window == 1
    np.testing.assert_array_equal(state.xi_sum, state.xi)  # the first one only
    np.testing.assert_allclose(state.carry, 2 * (1 + np.array([1, -1]) * state.xi))


@pytest.mark.parametrize("particles, windows", [(4, 8), (3, 7), (5, 2), (1, 3)])
def test_particles_start_staggered(particles, windows):
    """The first windows spread evenly over the trajectory, the first at 0."""
    population = estimators.population(
        estimators.pes(line(2), windows, SIGMA), particles
    )
    window = population.init(jax.random.key(0), jnp.float32(1.0)).window
    expected = np.arange(particles) * windows // particles
    np.testing.assert_array_equal(window, expected)


def test_population_is_the_mean_of_its_particles_one_after_the_other_too():
    """vmap and `sequential` agree, and the mean is over independent pairs."""
    theta = jnp.float32(0.9)
    results = []
    for batch in (jax.vmap, estimators.sequential):
        pair = estimators.pes(growth(2), 3, SIGMA, batch)
        population = estimators.population(pair, 5, batch)
        state = population.init(jax.random.key(0), theta)
        for t in range(4):
            grad, state, metrics = population.estimate(jax.random.key(t), theta, state)
        results.append((grad, state.carry, metrics["loss"], metrics["grad_noise"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)

    pair = estimators.pes(growth(2), 3, SIGMA)
    population = estimators.population(pair, 5)
    state = population.init(jax.random.key(0), theta)
    one = jax.vmap(pair.estimate, in_axes=(0, None, 0))
    grads, _, _ = one(jax.random.split(jax.random.key(7), 5), theta, state)
    grad, _, metrics = population.estimate(jax.random.key(7), theta, state)
    np.testing.assert_allclose(grad, grads.mean(), rtol=1e-6)
    noise = grads.std(ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(metrics["grad_noise"], noise, rtol=1e-5)


@given(limit=st.floats(0.1, 10), losses=st.lists(st.floats(width=32), min_size=1))
def test_clip_loss_is_below_its_limit_and_never_nan(limit, losses):
    """min(loss, limit), the limit for nan and inf; losses below it are untouched."""
    losses, limit = np.array(losses, np.float32), np.float32(limit)
    clipped = np.asarray(estimators.clip_loss(losses, limit))
    assert (clipped <= limit).all()
    low = losses < limit
    np.testing.assert_array_equal(clipped[low], losses[low])
    assert (clipped[~low] == limit).all()


def test_a_diverged_particle_changes_nothing_else():
    """One particle's carry full of nan: its pair adds exactly zero, the others are what
    they were, and its next trajectory is healthy."""

    def step(theta, s, key):
        return s + theta, s + theta

    problem = estimators.unroll(lambda key: jnp.zeros(()), step, 2, loss_limit=50.0)
    pair = estimators.pes(problem, 4, SIGMA)
    population = estimators.population(pair, 3)
    theta = jnp.float32(1.0)
    state = population.init(jax.random.key(0), theta)
    sick = state._replace(carry=state.carry.at[1].set(jnp.nan))
    one = jax.vmap(pair.estimate, in_axes=(0, None, 0))
    keys = jax.random.split(jax.random.key(1), 3)
    grads, _, _ = one(keys, theta, state)
    sick_grads, _, _ = one(keys, theta, sick)
    np.testing.assert_array_equal(sick_grads[::2], grads[::2])
    assert sick_grads[1] == 0

    for t in range(5):
        grad, sick, metrics = population.estimate(jax.random.key(t), theta, sick)
        assert np.isfinite(grad) and np.isfinite(metrics["loss"])
    assert np.isfinite(sick.carry).all()


def test_estimate_compiles_once():
    """Seven windows over two resets, one trace; the state keeps its types."""
    traces = itertools.count()
    population = estimators.population(estimators.pes(line(2), 3, SIGMA), 2)

    @jax.jit
    def estimate(key, theta, state):
        next(traces)
        return population.estimate(key, theta, state)

    theta = jnp.float32(1.0)
    state = population.init(jax.random.key(0), theta)
    kinds = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    for t in range(7):
        _, state, _ = estimate(jax.random.key(t), theta, state)
        leaves = jax.tree.leaves(state)
        assert kinds == [(x.shape, x.dtype, x.weak_type) for x in leaves]
    assert next(traces) == 1
