"""Estimators estimate the gradient: on unrolls whose meta-gradient is a formula."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import estimators
import nqm
from estimators import noise_reuse_es, pes, sequential, truncated_es, unroll, whole

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=5)
EACH = pytest.mark.parametrize("each", [jax.vmap, sequential])
KEY = jax.random.key(0)
ONE = np.float32(1)
SIGMA = 0.1
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
PAIRS = 4096


@functools.partial(jax.jit, static_argnums=(0, 3))
def history(estimator, key, theta, steps):
    """(gradients, states, metrics) of a row of estimates, each stacked: (steps, ...)."""

    def one(state, key):
        g, state, metrics = estimator.estimate(key, theta, state)
        return state, (g, state, metrics)

    init_key, key = jax.random.split(key)
    state = estimator.init(init_key, theta)
    return jax.lax.scan(one, state, jax.random.split(key, steps))[1]


@functools.partial(jax.jit, static_argnums=(0, 3))
def gradients(estimator, seed, theta, steps):
    """Of independent pairs from the first window on: (steps, PAIRS, ...)."""
    keys = jax.random.split(jax.random.key(seed), PAIRS)
    return jax.vmap(lambda key: history(estimator, key, theta, steps)[0], 0, 1)(keys)


def assert_mean(samples, expected, slack=1e-6):
    """The mean of (PAIRS, ...) is `expected`, within six of its standard errors."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    off = np.abs(samples.mean(0) - expected)
    assert (off < 6 * error + slack).all(), (samples.mean(0), expected)


# --- problems whose gradient is known
def line(length):
    """s' = s + theta, loss s': after t steps the loss is t theta, its gradient t."""
    return unroll(lambda key: jnp.zeros(()), lambda th, s, key: (s + th,) * 2, length)


def growth(length):
    """s' = theta s from 1, loss s': the loss after t steps is theta^t."""
    return unroll(lambda key: jnp.ones(()), lambda th, s, key: (s * th,) * 2, length)


def quadratic(length):
    """The noisy quadratic model with SGD: theta is the learning rate."""

    def step(theta, phi, key):
        before, after = jax.random.normal(key, (2, 2))
        phi = phi - theta * (jnp.asarray(nqm.H) @ (phi - before))
        return phi, nqm.loss(phi, after, jnp.asarray(nqm.H))

    return unroll(lambda key: 10**0.5 * jax.random.normal(key, (2,)), step, length)


def network(length):
    """A two-layer network, full batch, one start. theta: log rates of its two layers."""
    xs = np.linspace(-1, 1, 4)[:, None]
    start = np.array([[0.7, -0.4, 0.9], [0.35, -0.2, 0.45]])

    def loss(w):
        return ((jnp.tanh(xs @ w[:1]) @ w[1:].T - np.sin(2 * xs)) ** 2).mean()

    def step(theta, w, key):
        w = w - jnp.exp(theta)[:, None] * jax.grad(loss)(w)
        return w, loss(w)

    return unroll(lambda key: jnp.asarray(start), step, length)


def network_loss(theta):
    return network(8).run(theta, network(8).fresh(KEY), KEY)[1].mean()


def quadratic_gradient(rate):
    return nqm.meta_gradient(np.zeros((2, 2)), rate, nqm.paper_model(), 6)[1]


# name -> (problem, windows, sigma, thetas, exact gradient over all windows)
RATES = [0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
LOG_RATES = [(a, b) for a in (-1.0, 0.0) for b in (-2.0, -0.5, 0.3)]
PROBLEMS = {
    "line": (line(2), 3, SIGMA, [-2.5, -1, 0, 0.5, 1.5, 2, 3], lambda th: 3.5 + 0 * th),
    "quadratic": (quadratic(3), 2, 0.01, RATES, quadratic_gradient),
    "network": (network(4), 2, 0.03, LOG_RATES, jax.grad(network_loss)),
}
UNBIASED = {"es": estimators.es, "pes": pes, "noise_reuse": noise_reuse_es}
UNBIASED["bptt"] = lambda problem, windows, sigma: estimators.bptt(problem, windows)
TRUNCATED = truncated_es(line(3), 4, SIGMA)
GROWTH = {kind: kind(growth(2), 2, SIGMA) for kind in (pes, noise_reuse_es)}


@functools.cache
def smoothed_gradients(name, sigma):
    """E gradient(theta + sigma x) for all thetas: float64, Gauss-Hermite quadrature."""
    _, _, _, thetas, gradient = PROBLEMS[name]
    x, w = np.polynomial.hermite_e.hermegauss(7)
    thetas, w = np.array(thetas), w / w.sum()
    if thetas.ndim == 2:
        x, w = np.stack(np.meshgrid(x, x), 2).reshape(-1, 2), np.outer(w, w).ravel()
    with jax.enable_x64(True):
        values = jax.jit(jax.vmap(jax.vmap(gradient)))(thetas[:, None] + sigma * x)
    return np.einsum("n,tn...->t...", w, values)


# --- what is unbiased, and what is not
@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_estimator_is_unbiased(problem, name):
    """On 20 problems the mean estimate is the gradient of the smoothed loss, z-score < 6.
    The network has 2 % more: float32, and PES smooths a curved loss in another way."""
    exact = smoothed_gradients(problem, 0 if name == "bptt" else PROBLEMS[problem][2])
    share = 0.02 if problem == "network" and name != "bptt" else 0.0
    problem, windows, sigma, thetas, _ = PROBLEMS[problem]
    estimator = UNBIASED[name](problem, windows, sigma)
    steps = 1 if name in ("es", "bptt") else windows
    for i, (theta, expected) in enumerate(zip(thetas, exact, strict=True)):
        found = gradients(estimator, i, np.float32(theta), steps).mean(0)
        assert_mean(found, expected, share * np.abs(expected) + 1e-4)


@pytest.mark.parametrize("kind", [pes, noise_reuse_es])
@pytest.mark.parametrize("horizon, length", [(4, 2), (12, 4), (6, 6)])
def test_whole_trajectories_are_unbiased(kind, horizon, length):
    """On s' = s + theta the mean of T losses has gradient (T + 1) / 2, in the second
    trajectory, too, after a reset. (At T = 4, K = 2 the authors' code is 53 % off.)"""
    windows, expected = horizon // length, (horizon + 1) / 2
    estimator = kind(line(length), windows, SIGMA)
    runs = [gradients(estimator, seed, ONE, 2 * windows) for seed in range(30)]
    for grads in np.concatenate(runs, 1).reshape(2, windows, -1).mean(1):
        assert_mean(grads, expected)
        assert grads.std() / len(grads) ** 0.5 < 0.02 * expected


def test_each_window_is_unbiased_before_the_end():
    """T far away: the estimate of window j has the mean gradient of its own losses."""
    for j, samples in enumerate(gradients(pes(line(3), 1000, SIGMA), 0, ONE, 4)):
        assert_mean(samples, 3 * j + 2)  # mean of t = 3 j + 1, 3 j + 2, 3 j + 3


def test_truncated_estimators_are_biased_by_the_predicted_amount():
    """They report (K + 1) / 2 of (T + 1) / 2 in every window, blind to what theta did to s
    before. Backpropagation does so without any noise, and from one run."""
    for samples in gradients(TRUNCATED, 0, ONE, 4):
        assert_mean(samples, 2.0)
    grads, state, metrics = history(estimators.truncated_bptt(line(3), 4), KEY, ONE, 6)
    np.testing.assert_allclose(grads, 2.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], [2, 5, 8, 11, 2, 5], rtol=1e-6)
    assert state.window.tolist() == [1, 2, 3, 4, 1, 2]


@given(seed=seeds, theta=st.floats(0.5, 1.125, width=32))
@few
def test_pes_and_noise_reuse_estimate_the_smoothed_gradient(seed, theta):
    """On s' = theta s with two windows of 2, PES smooths a + a^2 + a^2 b + a^2 b^2 over one
    perturbation a window. Noise reuse smooths a + a^2 + a^3 + a^4 over one for all."""
    t, v = theta, SIGMA**2
    slopes = 1 + 2 * t + (3 * t**2 + v) + 4 * t * (t**2 + v)
    assert_mean(gradients(GROWTH[pes], seed, ONE * t, 2).mean(0), slopes / 4)
    slopes = 1 + 2 * t + (3 * t**2 + 3 * v) + (4 * t**3 + 12 * t * v)
    assert_mean(gradients(GROWTH[noise_reuse_es], seed, ONE * t, 2).mean(0), slopes / 4)


# --- the equations and the states, one by one
def test_antithetic_difference_is_its_formula():
    """credit (mean of L+ - mean of L-) / (2 sigma^2). Equal losses give exactly 0."""
    rng = np.random.default_rng(0)
    losses, credit = np.float32(rng.normal(size=(2, 5))), np.float32(rng.normal(size=3))
    expected = credit * (losses[0].mean() - losses[1].mean()) / (2 * 0.3**2)
    found = estimators.antithetic_difference(losses, credit, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not estimators.antithetic_difference(losses[[0, 0]], credit, 0.3).any()


def test_one_window_makes_all_estimators_es():
    """K = T: PES and truncated ES are the same numbers, ES over the whole trajectory."""
    pairs = (kind(growth(4), 1, SIGMA) for kind in (pes, truncated_es))
    a, b = (history(pair, KEY, ONE, 3)[0] for pair in pairs)
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_truncated_es_starts_both_runs_from_the_same_carry():
    """Within a window the runs of a pair part. The next window rejoins them."""
    _, state, _ = history(TRUNCATED, KEY, ONE, 4)
    first = np.cumsum(3 + 3 * np.asarray(state.xi))
    second = np.append(0, first[:-1]) + 3 - 3 * np.asarray(state.xi)
    close(state.carry, np.stack([first, second], 1))


def test_noise_reuse_keeps_one_perturbation_a_trajectory():
    """xi stays through all windows of a trajectory, and is drawn anew for the next."""
    _, state, _ = history(noise_reuse_es(line(2), 3, SIGMA), KEY, ONE, 7)
    xi = state.xi.tolist()
    assert xi[0] == xi[1] == xi[2] != xi[3] == xi[4] == xi[5] != xi[6]
    assert state.window.tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_pes_credits_all_perturbations_and_a_reset_forgets_them():
    """xi_sum is the sum of the trajectory's perturbations. After the last window the next
    begins with a fresh carry and a sum of its first one only."""
    _, state, metrics = history(pes(line(2), 2, SIGMA), KEY, ONE, 3)
    xi = np.asarray(state.xi)
    sums = np.array([xi[0], xi[0] + xi[1], xi[2]])
    np.testing.assert_allclose(state.xi_sum, sums, rtol=1e-6)
    expected = 2 * np.array([[1], [2], [1]]) + 2 * np.outer(sums, [1, -1])
    np.testing.assert_allclose(state.carry, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], [1.5, 3.5, 1.5], rtol=1e-6)
    assert state.window.tolist() == [1, 2, 1]


@EACH
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_pairs_share_their_random_numbers(impl, each):
    """Noise that does not depend on theta cancels exactly. Both runs of a pair replay one
    key from the same start, whatever kind of key it is."""
    step = lambda th, s, key: (s + jax.random.normal(key),) * 2  # noqa: E731
    walk = unroll(jax.random.normal, step, 2)
    many = estimators.population(pes(walk, 2, SIGMA, each), 3, each)
    grads, state, _ = history(many, jax.random.key(0, impl=impl), ONE, 4)
    assert not grads.any()
    assert len(set(state.carry.ravel().tolist())) == 4 * 3


def test_antithetic_pairs_cancel_even_terms():
    """A loss that is even around theta gives exactly zero, not only on average."""
    even = unroll(lambda key: jnp.zeros(()), lambda th, s, key: (s, th**2), 2)
    assert not gradients(pes(even, 3, SIGMA), 0, 0 * ONE, 6).any()


# --- backpropagation
def test_whole_and_bptt_equal_one_long_unroll():
    """Two windows of 4 as one of 8: the same carry and losses (8,), and bptt's gradient is
    jax.grad of their mean. It runs once, at theta itself."""
    theta = np.float32([-0.5, -1.0])
    runs = [p.run(theta, p.fresh(KEY), KEY) for p in (network(8), whole(network(4), 2))]
    grads, _, metrics = history(estimators.bptt(network(4), 2), KEY, theta, 1)
    expected = jax.jit(jax.value_and_grad(network_loss))(theta)
    jax.tree.map(close, *runs)
    jax.tree.map(close, (metrics["loss"][0], grads[0]), expected)


def test_every_step_draws_its_own_randomness():
    """Each of three windows has a key of its own, and so has each of its two steps."""
    step = lambda theta, s, key: (s, theta * jax.random.normal(key))  # noqa: E731
    problem = whole(unroll(lambda key: jnp.zeros(()), step, 2), 3)
    _, losses = jax.jit(problem.run)(ONE, jnp.zeros(()), KEY)
    assert len(set(losses.tolist())) == 6


def test_merged_has_the_reparameterisation_and_the_es_gradient_of_one_pair():
    """grad (L(theta + xi) + L(theta - xi)) / 2, here of s -> theta s, and that of
    truncated ES. Both runs go on from the first one's carry."""
    merged, es = (f(growth(3), 1, SIGMA) for f in (estimators.merged, truncated_es))
    grads, *rest = history(merged, KEY, ONE, 3)
    expected, *same = history(es, KEY, ONE, 3)
    np.testing.assert_allclose(grads["es"], expected, rtol=1e-4)
    jax.tree.map(close, rest, same)
    t = 1 + np.array([[1], [-1]]) * np.asarray(same[0].xi)
    slopes = (1 + 2 * t + 3 * t**2).mean(0) / 3
    close(grads["bptt"], slopes)


@pytest.mark.parametrize("each", [None, sequential, jax.vmap])
def test_backpropagation_keeps_one_window_and_one_data_set(each):
    """T = 400, K = 20: at most 1.3 K/T of the memory that all T steps on tape take. The
    32 MB that every window reads are on no tape."""
    data = jax.ShapeDtypeStruct((400, 20_000), jnp.float32)

    def bytes_of(make, length):
        def estimate(data):
            def step(theta, s, key):
                s = jnp.tanh(theta * s) + data[jax.random.randint(key, (), 0, 400)]
                return s, (s * s).mean()

            pair = make(unroll(lambda key: jnp.ones(20_000), step, length))
            return pair.estimate(KEY, ONE, pair.init(KEY, ONE))[0]

        memory = jax.jit(estimate).lower(data).compile().memory_analysis()
        return memory.temp_size_in_bytes

    def in_windows(problem):
        if each is None:
            return estimators.bptt(problem, 20)
        return estimators.merged(whole(problem, 20), 1, SIGMA, each)

    tape = bytes_of(lambda problem: estimators.truncated_bptt(problem, 1), 400)
    carries = 20 * 20_000 * 4  # one for each window
    found, runs = bytes_of(in_windows, 20), 2 if each else 1
    assert found < runs * (carries + 1.3 * 20 / 400 * tape) < 32e6


# --- many particles
@pytest.mark.parametrize("particles, windows", [(4, 8), (3, 7), (5, 2), (1, 3)])
def test_particles_start_staggered(particles, windows):
    """The first windows spread evenly over the trajectory, the first at 0."""
    many = estimators.population(pes(line(2), windows, SIGMA), particles)
    window = jax.jit(many.init)(KEY, ONE).window
    np.testing.assert_array_equal(window, np.arange(particles) * windows // particles)


@EACH
def test_population_is_the_mean_of_independent_particles(each):
    """vmap and `sequential` give each particle its own estimate, at a key of its own."""
    pair, theta = pes(growth(2), 3, SIGMA), np.float32(0.9)
    many = estimators.population(pes(growth(2), 3, SIGMA, each), 5, each)
    state, one = jax.jit(many.init)(KEY, theta), jax.vmap(pair.estimate, (0, None, 0))
    grads, expected, metrics = jax.jit(one)(jax.random.split(KEY, 5), theta, state)
    grad, state, summary = jax.jit(many.estimate)(KEY, theta, state)
    jax.tree.map(close, state, expected)
    close(grad, grads.mean())
    close(summary["loss"], metrics["loss"].mean())
    close(summary["grad_noise"], np.std(grads, ddof=1) / 5**0.5)


def test_clip_loss_is_below_its_limit_and_never_nan():
    """min(loss, limit), and the limit for nan and +-inf."""
    losses = np.float32([np.nan, np.inf, -np.inf, 3e38, 2.001, 1.999, 0, -3e38])
    found = estimators.clip_loss(losses, np.float32(2))
    np.testing.assert_array_equal(found, [2, 2, 2, 2, 2, *losses[5:]])


def test_a_diverged_particle_changes_nothing_else():
    """One particle's carry full of nan: its pair adds exactly zero, the others are what
    they were, and its next trajectory is healthy."""
    problem = unroll(
        lambda key: jnp.zeros(()), lambda th, s, key: (s + th,) * 2, 2, 50.0
    )
    many = estimators.population(pes(problem, 4, SIGMA), 3, combine=lambda g: (g, {}))
    estimate, state = jax.jit(many.estimate), jax.jit(many.init)(KEY, ONE)
    sick = state._replace(carry=state.carry.at[1].set(jnp.nan))
    for i, key in enumerate(jax.random.split(KEY, 5)):
        grads, state, _ = estimate(key, ONE, state)
        sick_grads, sick, metrics = estimate(key, ONE, sick)
        np.testing.assert_array_equal(sick_grads[::2], grads[::2])
        assert metrics["loss"] < 50 and (sick_grads[1] == 0) == (i < 3)
    assert np.isfinite(sick.carry).all()


def test_estimates_keep_the_types_of_the_state():
    """Shapes, dtypes and weak types, so that all estimates are one compiled program."""
    many = estimators.population(pes(line(2), 3, SIGMA), 2)
    state = jax.eval_shape(many.init, KEY, ONE)
    assert jax.eval_shape(many.estimate, KEY, ONE, state)[1] == state


# --- the mean of particles, and equation 1 of Metz et al. 2019
def drawn(seed, particles, spread=1.0, mean=1.0, size=50):
    """Gradients of both kinds, of which "es" has the given standard deviation."""
    bptt, es = np.random.default_rng(seed).normal(size=(2, particles, size))
    return {"bptt": np.float32(bptt + mean), "es": np.float32(spread * es + mean)}


merge = jax.jit(estimators.inverse_variance_mean)


@given(seed=seeds, ratio=st.floats(-3, 3), power=st.integers(-15, 15))
def test_merge_is_equation_1(seed, ratio, power):
    """(g_rp / s_rp^2 + g_es / s_es^2) / (1 / s_rp^2 + 1 / s_es^2), entry by entry, at any
    scale. The metrics are the mean weights and the standard errors."""
    grads, scale = drawn(seed, 8, 10**ratio, mean=-1.0), 10.0**power
    found, metrics = merge({k: np.float32(g * scale) for k, g in grads.items()})
    a, b = np.float64(grads["bptt"]), np.float64(grads["es"])
    va, vb = a.var(0, ddof=1), b.var(0, ddof=1)
    expected = (a.mean(0) / va + b.mean(0) / vb) / (1 / va + 1 / vb)
    np.testing.assert_allclose(found / scale, expected, rtol=2e-4, atol=1e-4)
    share = (1 / va / (1 / va + 1 / vb)).mean()
    assert metrics["bptt_weight"] == pytest.approx(share, rel=1e-3, abs=1e-6)
    assert metrics["es_weight"] == pytest.approx(1 - share, rel=1e-3, abs=1e-6)
    for name, v in (("bptt", va), ("es", vb), ("grad", 1 / (1 / va + 1 / vb))):
        noise = scale * (v.sum() / 8) ** 0.5
        assert metrics[f"{name}_noise"] == pytest.approx(noise, rel=1e-3)


@pytest.mark.parametrize("particles, most", [(4, 1.45), (8, 1.1), (20, 1.1)])
@given(seed=seeds, ratio=st.floats(-4, 4))
@few
def test_merged_variance_is_near_the_smaller_one(particles, most, seed, ratio):
    """At most 1.1 times the better estimator's variance from 8 particles on, over 8,000
    weights. With 4, where variances are guesses, 1.45 times."""
    found, _ = merge(drawn(seed, particles, 10**ratio, mean=0.0, size=8000))
    best = min(1.0, 10**ratio) ** 2 / particles
    assert float((found**2).mean()) < most * best


@pytest.mark.parametrize("factor", [0, 1e10, 1e20, 1e37, np.inf, np.nan])
def test_merge_takes_the_one_that_is_usable(factor):
    """The merge is the other's mean where one estimator is 10 to 37 orders noisier, inf,
    nan, or 0 without any spread, as behind a dead unit."""
    grads = drawn(0, 4, mean=0.0)
    for name, other in (("bptt", "es"), ("es", "bptt")):
        found, metrics = merge(grads | {name: grads[name] * np.float32(factor)})
        np.testing.assert_allclose(found, grads[other].mean(0), rtol=1e-4, atol=1e-4)
        assert metrics[f"{name}_weight"] < 1e-6 and np.isfinite(metrics["grad_noise"])


def test_merge_without_any_spread():
    """All particles agree: the plain mean of both, as if their s were a millionth of it."""
    for value in np.float32([2, 1e-30, 0]):
        found, metrics = merge({k: np.full((3, 2), value) for k in ("bptt", "es")})
        np.testing.assert_allclose(found, value)
        assert metrics["bptt_weight"] == metrics["es_weight"] == (0.5 if value else 0)
        noise = pytest.approx(1e-6 * value / 3**0.5, rel=1e-3, abs=1e-18)
        assert metrics["grad_noise"] == noise


def test_a_nan_particle_changes_nothing_else():
    """A nan in one particle's weight of one estimator: that weight is the other's mean, and
    all others are what they were. With nan in both, that weight is 0."""
    grads, rest = drawn(0, 4), np.arange(50) != 7
    clean, _ = merge(grads)
    grads["bptt"][2, 7] = np.nan
    found, _ = merge(grads)
    np.testing.assert_array_equal(found[rest], clean[rest])
    assert found[7] == pytest.approx(grads["es"][:, 7].mean(), rel=1e-5)
    grads["es"][0, 7] = np.inf
    nothing, _ = merge(grads)
    assert nothing[7] == 0 and (nothing[rest] == clean[rest]).all()


def test_mean_of_particles_leaves_the_exploded_out():
    """nan and inf count for nothing, entry by entry. With none left the entry is 0. The
    noise is the standard error of what is left."""
    grads = drawn(0, 4)["es"]
    grads[1, 3], grads[2, 3] = np.nan, np.inf
    grads[:, 5], grads[1:, 6] = np.nan, -np.inf
    found, metrics = jax.jit(estimators.mean_of_particles)(grads)
    left = [x[np.isfinite(x)] for x in grads.T]
    expected = [x.mean() if len(x) else 0 for x in left]
    close(found, expected)
    squares = [x.var(ddof=1) / len(x) for x in left if len(x) > 1]
    assert metrics["grad_noise"] == pytest.approx(np.sum(squares) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("theta, better", [(0.5, "bptt"), (1.6, "es")])
def test_merged_estimator_is_the_better_one(theta, better):
    """On s' = theta s with theta < 1 backpropagation is exact. In a rough unroll it is
    not: sin(1000 s) has a slope that only ES averages out."""

    def step(theta, s, key):
        s = theta * s
        return s, s + (0.1 * jnp.sin(1000 * s) if better == "es" else 0.0)

    pair = estimators.merged(unroll(lambda key: jnp.ones(()), step, 4), 1, SIGMA)
    many = estimators.population(pair, 16, combine=estimators.inverse_variance_mean)
    one = jax.vmap(lambda key: history(many, key, np.float32(theta), 1))
    grads, _, metrics = jax.jit(one)(jax.random.split(KEY, 500))
    noise = {name: (metrics[f"{name}_noise"] ** 2).mean() for name in ("bptt", "es")}
    assert metrics[f"{better}_weight"].mean() > 0.8
    assert grads.var() < min(1.1 * noise[better], max(noise.values()))
