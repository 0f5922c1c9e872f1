"""The noisy quadratic model: the paper's theorems as properties, its slips as examples.

Each theorem is tested three ways: it holds inside its bounds, a violation exists just
outside (so the test would notice a looser bound), and where the paper claims more than is
true, the counterexample stands and a search finds one by itself.
"""

import random
from functools import cache, partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nqm
from figures import stability as figures_nqm

BOUNDARY = 1e-9  # rounding allowed beyond a spectral radius of 1
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rotation(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def from_spectrum(values, vectors):
    return vectors * values @ vectors.T


@st.composite
def hessians(draw, sizes=(1, 2, 3, 6), decades=2.0):
    """(H, its eigenvectors, rng): eigenvalues within 10^+-decades, any orientation."""
    n, rng = draw(st.sampled_from(sizes)), np.random.default_rng(draw(seeds))
    values = 10 ** rng.uniform(-decades, decades, n)
    vectors = rotation(rng, n) if draw(st.booleans()) else np.eye(n)
    return from_spectrum(values, vectors), vectors, rng


@st.composite
def within(draw, bounds, sizes=(1, 2, 3, 6), widen=(0.0, 0.0)):
    """(H, symmetric P, alpha), P's eigenvalues inside bounds(H, alpha), ends included.

    widen: how far the two ends are moved outward, as a share of the interval.
    """
    h, vectors, rng = draw(hessians(sizes))
    alpha = draw(st.floats(0, 2)) / nqm.largest(h)
    low, high = bounds(h, alpha)
    low, high = low - widen[0] * abs(high - low), high + widen[1] * abs(high - low)
    hypothesis.assume(low <= high)
    share = draw(st.lists(st.floats(0, 1), min_size=len(h), max_size=len(h)))
    own = vectors if draw(st.booleans()) else rotation(rng, len(h))
    return h, from_spectrum(low + np.array(share) * (high - low), own), alpha


def radius(h, p, alpha):
    return nqm.spectral_radius(nqm.system(nqm.nominal_plus(p, alpha), h).a)


def radius_preconditioned(h, p, alpha):
    u = nqm.power(h, -0.5) @ nqm.nominal_plus(p, alpha)
    return nqm.spectral_radius(nqm.system(u, h).a)


def radius_momentum(h, p, alpha, mu=0.9):
    return nqm.spectral_radius(nqm.momentum_system(nqm.nominal_plus(p, alpha), h, mu).a)


CLAIMS = {
    "theorem 1": (nqm.theorem_1, radius),
    "lemma 2": (nqm.lemma_2, radius_preconditioned),
    "momentum": (partial(nqm.momentum_bound, momentum=0.9), radius_momentum),
}


def search(strategy, condition):
    """An example that satisfies the condition; hypothesis raises if it finds none."""
    settings = hypothesis.settings(
        max_examples=3000, phases=[hypothesis.Phase.generate], database=None
    )
    return hypothesis.find(
        strategy, condition, settings=settings, random=random.Random(0)
    )


# --- Theorem 1, Lemma 2, section 4.4


@pytest.mark.parametrize("claim", CLAIMS)
@hypothesis.settings(max_examples=100)
@given(data=st.data())
def test_bounds_are_sufficient_for_symmetric_p(claim, data):
    """Theorem 1, Lemma 2, momentum: symmetric P inside the bounds has rho <= 1."""
    bounds, rho = CLAIMS[claim]
    h, p, alpha = data.draw(within(bounds))
    # a double root of the momentum polynomial is known to the root of the rounding only
    assert rho(h, p, alpha) <= 1 + (1e-6 if claim == "momentum" else BOUNDARY)


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("side", [(0.01, 0.0), (0.0, 0.01)], ids=["lower", "upper"])
def test_bounds_are_tight(claim, side):
    """Either bound moved outward by 1 % of the interval admits an unstable P."""
    bounds, rho = CLAIMS[claim]
    h, p, alpha = search(within(bounds, widen=side), lambda case: rho(*case) > 1 + 1e-4)
    low, high = bounds(h, alpha)
    values = np.linalg.eigvalsh(p)
    assert values[0] < low if side[0] else values[-1] > high


@hypothesis.settings(max_examples=100)
@given(hessians(), st.floats(-1, 1), st.floats(1e-3, 1))
def test_lower_bound_9_is_necessary(hessian, alpha, excess):
    """Symmetric P with lambda_min(P) < -alpha always has an eigenvalue of A above 1."""
    h, _, rng = hessian
    values = rng.uniform(-alpha - excess, -alpha + 3, len(h))
    values[0] = -alpha - excess
    p = from_spectrum(values, rotation(rng, len(h)))
    a = nqm.system(nqm.nominal_plus(p, alpha), h).a
    assert np.linalg.eigvals(a).real.max() > 1


def test_upper_bound_10_is_not_necessary():
    """P = diag(0, 3), H = diag(2, .1) break (10) and are stable."""
    h, p = np.diag([2.0, 0.1]), np.diag([0.0, 3.0])
    assert nqm.theorem_1(h, 0.0).high == 1 < 3
    assert radius(h, p, 0.0) == 1 and radius(h, p, 0.01) < 1


@pytest.mark.parametrize(
    "p, alpha, eigenvalues",
    [
        ([[0.5, -3], [0, 0.6]], 0.0, [1.878, 1.063]),  # uphill in both directions
        ([[0.5, 3], [0, 0.6]], 0.0, [-1.613, 0.979]),  # overshoots
        ([[0.1, -2], [0, 0.2]], 0.5, [1.093 + 0.262j, 1.093 - 0.262j]),  # complex
    ],
)
def test_theorem_1_fails_for_p_that_is_not_symmetric(p, alpha, eigenvalues):
    """Diagonalizable with real eigenvalues inside (9), (10), and yet rho(A) > 1."""
    p = np.array(p)
    found, (low, high) = np.linalg.eigvals(p), nqm.theorem_1(nqm.H, alpha)
    assert np.isreal(found).all() and len(set(found)) == 2
    assert low <= found.min() and found.max() <= high
    a = nqm.system(nqm.nominal_plus(p, alpha), nqm.H).a
    np.testing.assert_allclose(
        np.sort_complex(np.linalg.eigvals(a)), np.sort_complex(eigenvalues), atol=6e-4
    )
    assert radius(nqm.H, p, alpha) > 1


def test_lemma_2_fails_for_p_that_is_not_symmetric():
    """P = [[.5, -6], [0, .6]]: below the bound 1.649 of eq. 13, rho = 2.345."""
    p, (low, high) = np.array([[0.5, -6], [0, 0.6]]), nqm.lemma_2(nqm.H, 0.0)
    assert low <= 0.5 and 0.6 <= high == pytest.approx(1.649, abs=1e-3)
    assert radius_preconditioned(nqm.H, p, 0.0) == pytest.approx(2.345, abs=1e-3)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_search_refutes_the_bounds_for_p_that_is_not_symmetric(claim):
    """V diag(inside the bounds) V^-1 as the paper allows: an unstable one is found."""
    bounds, rho = CLAIMS[claim]

    @st.composite
    def diagonalizable(draw):
        h, p, alpha = draw(within(bounds, sizes=(2, 3)))
        values = np.linalg.eigvalsh(p)
        v = np.random.default_rng(draw(seeds)).normal(size=h.shape)
        return h, v * values @ np.linalg.inv(v), alpha

    h, p, alpha = search(diagonalizable(), lambda case: rho(*case) > 1.01)
    values, (low, high) = np.linalg.eigvals(p), bounds(h, alpha)
    assert np.abs(values.imag).max() < 1e-6  # real, and inside
    assert low - 1e-6 <= values.real.min() and values.real.max() <= high + 1e-6


@given(hessians(), st.floats(0, 1))
def test_preconditioner_loosens_the_bound_where_the_curvature_is_above_one(hessian, x):
    """Lemma 2's upper bound is above Theorem 1's exactly if lambda_max(H) > 1."""
    h = hessian[0]
    looser = nqm.lemma_2(h, x).high > nqm.theorem_1(h, x).high
    assert looser == (nqm.largest(h) > 1)


@given(hessians(), st.floats(0, 2), st.floats(0, 0.99))
def test_momentum_loosens_the_upper_bound(hessian, alpha, mu):
    """Section 4.4: less restrictive than Theorem 1, and the same at mu = 0."""
    h = hessian[0]
    plain, heavy = nqm.theorem_1(h, alpha), nqm.momentum_bound(h, alpha, mu)
    assert heavy.low == plain.low
    assert heavy.high - plain.high == pytest.approx(2 * mu / nqm.largest(h))


def test_stable_parts_do_not_make_a_stable_whole():
    """App. A.4: phi and velocity each stable alone, jointly unstable (rho = 1.44).

    P = [[.1, -.4], [.4, .1]] with H = I turns the gradient; its A has rho = 0.985.
    """
    h, p = np.eye(2), np.array([[0.1, -0.4], [0.4, 0.1]])
    assert radius(h, p, 0.0) < 1
    assert radius_momentum(h, p, 0.0, mu=0.9) == pytest.approx(1.44, abs=0.01)


@hypothesis.settings(max_examples=100)
@given(hessians(), st.floats(-0.99, 0.99))
def test_exact_alpha_is_necessary_and_sufficient(hessian, where):
    """Symmetric P: rho(A) <= 1 inside the interval of alpha, rho(A) > 1 on either side."""
    h, _, rng = hessian
    p = from_spectrum(rng.uniform(0, 1, len(h)) / nqm.largest(h), rotation(rng, len(h)))
    low, high = nqm.exact_alpha(h, p)
    alpha = (low + high) / 2 + where * (high - low) / 2
    assert radius(h, p, alpha) <= 1 + BOUNDARY
    assert radius(h, p, low - 0.01 * (high - low)) > 1
    assert radius(h, p, high + 0.01 * (high - low)) > 1


# --- Lemma 3, equations 14, 18 and 19


@st.composite
def disturbed(draw, widen=(0.0, 0.0)):
    """(H, diagonal P~, alpha, d_max, d): P~ inside Lemma 3's bounds, 0 < d <= d_max."""
    h, _, rng = draw(hessians())
    alpha = draw(st.floats(0.01, 0.99)) * 2 / nqm.largest(h)
    d_max = rng.uniform(0.1, 3, len(h))
    low, high = nqm.lemma_3(h, alpha, d_max)
    low, high = low - widen[0] * (high - low), high + widen[1] * (high - low)
    share = draw(st.lists(st.floats(0, 1), min_size=len(h), max_size=len(h)))
    d = d_max * draw(st.sampled_from([1.0, 0.5, 1e-3]))
    return h, np.diag(low + np.array(share) * (high - low)), alpha, d_max, d


@hypothesis.settings(max_examples=100)
@given(disturbed())
def test_lemma_3_holds_for_diagonal_p(case):
    """Diagonal P~ inside (16), (17): rho(A) <= 1 for every disturbance in D."""
    h, p, alpha, _, d = case
    assert radius(h, np.diag(d) @ p, alpha) <= 1 + BOUNDARY


@pytest.mark.parametrize("side", [(0.01, 0.0), (0.0, 0.01)], ids=["lower", "upper"])
def test_lemma_3_is_tight(side):
    """Either bound moved outward by 1 % admits a P~ and a disturbance with rho > 1."""

    def unstable(case):
        h, p, alpha, _, d = case
        return radius(h, np.diag(d) @ p, alpha) > 1 + 1e-6

    h, p, alpha, d_max, _ = search(disturbed(widen=side), unstable)
    low, high = nqm.lemma_3(h, alpha, d_max)
    assert np.diag(p).min() < low if side[0] else np.diag(p).max() > high


def test_lemma_3_fails_for_symmetric_p_that_is_not_diagonal():
    """Inside (16), (17), eig(A) = {1.081, 1.001}: diag(d) P~ is no longer symmetric."""
    h, p = np.array([[0.4, 1.3], [1.3, 4.3]]), np.array([[0.20, -0.24], [-0.24, 0.29]])
    d, alpha = np.array([0.8, 0.01]), 0.02
    low, high = nqm.lemma_3(h, alpha, d)
    values = np.linalg.eigvalsh(p)
    assert low == pytest.approx(-0.025) and high == pytest.approx(0.5076, abs=1e-4)
    assert low <= values[0] and values[-1] <= high
    a = nqm.system(nqm.nominal_plus(np.diag(d) @ p, alpha), h).a
    assert np.sort(np.linalg.eigvals(a)) == pytest.approx([1.001, 1.081], abs=6e-4)


def test_a_search_refutes_lemma_3_for_symmetric_p():
    """A symmetric P~ inside (16), (17) and a disturbance with rho > 1 are found."""

    @st.composite
    def cases(draw):
        h, _, rng = draw(hessians(sizes=(2,)))
        alpha = draw(st.floats(0.01, 0.5)) * 2 / nqm.largest(h)
        d = np.array([1.0, draw(st.floats(1e-3, 1))])
        low, high = nqm.lemma_3(h, alpha, d)
        values = low + rng.uniform(0, 1, 2) * (high - low)
        return h, np.diag(d) @ from_spectrum(values, rotation(rng, 2)), alpha

    h, p, alpha = search(cases(), lambda case: radius(*case) > 1.001)
    assert radius(h, p, alpha) > 1.001


@pytest.mark.parametrize(
    "alpha, d_max", [(0.0, [1, 1]), (1.4, [1, 1]), (0.5, [1, 0]), (np.nan, [1, 1])]
)
def test_lemma_3_refuses_what_it_does_not_cover(alpha, d_max):
    """alpha outside (0, 2 / lambda_max(H)) or d_max not positive: ValueError."""
    with pytest.raises(ValueError, match="Lemma 3"):
        nqm.lemma_3(nqm.H, alpha, d_max)


@given(seeds, st.floats(0.01, 1), st.floats(0.01, 0.99))
def test_equation_19_has_a_plus(seed, alpha, e):
    """P = (1-e)(P* - alpha I) steps along e alpha I + (1-e) P*, not minus as printed."""
    target = np.random.default_rng(seed).normal(size=(2, 2))
    u = nqm.nominal_plus((1 - e) * (target - alpha * np.eye(2)), alpha)
    np.testing.assert_allclose(u, e * alpha * np.eye(2) + (1 - e) * target, atol=1e-12)
    assert not np.allclose(u, e * alpha * np.eye(2) - (1 - e) * target)
    delta = np.diag([0.3, 0.9])  # equation 18
    u = nqm.nominal_plus(delta @ (target - alpha * np.eye(2)), alpha)
    expected = alpha * (np.eye(2) - delta) + delta @ target
    np.testing.assert_allclose(u, expected, atol=1e-12)


# --- the exact moments, loss and gradients (equations 7 and 8)


def model_of(seed, n=2, mean=1.0):
    """A model with nothing special about it: no two matrices commute."""
    rng = np.random.default_rng(seed)

    def spd(low, high):
        return from_spectrum(rng.uniform(low, high, n), rotation(rng, n))

    start = mean * rng.normal(size=n)
    return nqm.Model(spd(0.2, 1.4), spd(0.2, 2), start, spd(0.5, 4))


def step_matrix(seed, h):
    """A U that is not symmetric, with rho(A) < 1."""
    rng = np.random.default_rng(seed)
    z = from_spectrum(rng.uniform(0.3, 1.2, len(h)), rotation(rng, len(h)))
    u = z @ np.linalg.inv(h) + 0.05 * rng.normal(size=h.shape)
    assert nqm.spectral_radius(nqm.system(u, h).a) < 1
    return u


expected_losses = jax.jit(nqm.expected_losses, static_argnums=2)
moments = jax.jit(nqm.moments, static_argnums=4)


@given(seeds)
def test_moments_equal_the_sum_of_equation_7(seed):
    """The recursion gives A^t phi_0 and the sum over k that the paper prints."""
    model = model_of(seed, n=3)
    linear = nqm.system(step_matrix(seed, model.h), model.h)
    means, covs = moments(linear, model.start_mean, np.zeros((3, 3)), model.noise, 7)
    power = np.linalg.matrix_power
    for t in (1, 2, 7):
        total = sum(
            power(linear.a, t - k - 1)
            @ linear.b
            @ model.noise
            @ linear.b.T
            @ power(linear.a, t - k - 1).T
            for k in range(t)
        )
        np.testing.assert_allclose(covs[t - 1], total, rtol=1e-9, atol=1e-12)
        mean = power(linear.a, t) @ model.start_mean
        np.testing.assert_allclose(means[t - 1], mean, rtol=1e-9, atol=1e-12)


@cache
def simulated(momentum, steps=12, seed=3, draws=20_000):
    """(model, U, parameters (N, T, n), losses (N, T))."""
    model = model_of(seed)
    u = step_matrix(seed, model.h) * (0.3 if momentum else 1.0)

    def one(key):
        phi, xi = nqm.draw(key, model, steps)
        return nqm.trajectory(u, model.h, phi, xi, momentum)

    keys = jax.random.split(jax.random.key(seed), draws)
    return model, u, *jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys))


def within_six_sigma(samples, expected):
    """samples (N, ...), each entry judged by its own standard error."""
    error = samples.std(0, ddof=1) / len(samples) ** 0.5
    return (np.abs(samples.mean(0) - expected) < 6 * error).all()


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_moments_and_loss_agree_with_simulation(momentum):
    """Means, second moments and losses of 20,000 trajectories, at six standard errors."""
    model, u, phi, losses = simulated(momentum)
    linear = nqm.momentum_system(u, model.h, momentum)
    pad = ((0, 2), (0, 2))
    start = np.pad(model.start_mean, (0, 2)), np.pad(model.start_cov, pad)
    means, covs = moments(linear, *start, model.noise, 12)
    means, covs = np.asarray(means)[:, :2], np.asarray(covs)[:, :2, :2]
    assert within_six_sigma(phi, means)
    off = phi - means
    assert within_six_sigma(off[..., :, None] * off[..., None, :], covs)
    expected = np.asarray(expected_losses(linear, model, 12))
    assert within_six_sigma(losses, expected)
    # the paper's equation 8 lacks the 1/2 of its equation 4
    assert not within_six_sigma(losses, 2 * expected)


def test_momentum_system_without_momentum_is_the_plain_one():
    """mu = 0: the same losses, and the same stability."""
    model = model_of(5)
    u = step_matrix(5, model.h)
    plain, joint = nqm.system(u, model.h), nqm.momentum_system(u, model.h, 0.0)
    np.testing.assert_allclose(
        expected_losses(plain, model, 6), expected_losses(joint, model, 6), rtol=1e-12
    )
    assert nqm.spectral_radius(joint.a) == pytest.approx(nqm.spectral_radius(plain.a))


def test_trajectory_equals_optax_momentum():
    """U = 0.3 I with momentum 0.8 is optax.sgd(0.3, 0.8) on the loss of equation 4."""
    model = model_of(1)
    start, xi = nqm.draw(jax.random.key(0), model, 5)
    ours, _ = nqm.trajectory(0.3 * np.eye(2), model.h, start, xi, 0.8)
    optimizer = optax.sgd(0.3, 0.8)
    phi, state = start, optimizer.init(start)
    for t in range(5):
        grads = jax.grad(nqm.loss)(phi, xi[t], model.h)
        updates, state = optimizer.update(grads, state)
        phi = optax.apply_updates(phi, updates)
        np.testing.assert_allclose(ours[t], phi, rtol=1e-12)


def test_equation_8_numbers():
    """Paper's H, T = 10, alpha = .5: 1.608 with the half, 3.216 as printed."""
    u = nqm.nominal_plus(np.zeros((2, 2)), 0.5)
    assert nqm.expected_loss(u, nqm.paper_model(), 10) == pytest.approx(1.608, abs=5e-4)


meta_gradient = jax.jit(nqm.meta_gradient, static_argnums=3)
expected_loss = jax.jit(nqm.expected_loss, static_argnums=2)


@given(seeds, st.floats(0, 0.3))
def test_meta_gradient_equals_finite_differences(seed, alpha):
    """dL/dP and dL/dalpha of equation 8; dL/dalpha = tr dL/dP, since U = alpha I + P."""
    model = model_of(seed)
    p = step_matrix(seed, model.h) - alpha * np.eye(2)
    by_p, by_alpha = meta_gradient(p, alpha, model, 6)
    e = 1e-5
    for i, j in np.ndindex(2, 2):
        shift = np.zeros((2, 2))
        shift[i, j] = e
        up, down = (
            expected_loss(nqm.nominal_plus(p + s, alpha), model, 6)
            for s in (shift, -shift)
        )
        difference = float(up - down) / (2 * e)
        assert by_p[i, j] == pytest.approx(difference, rel=1e-5, abs=1e-6)
    assert by_alpha == pytest.approx(float(jnp.trace(by_p)), rel=1e-9)


@given(st.floats(0, 3))
def test_p_can_cancel_the_nominal_term(alpha):
    """Equation 14: P = P* - alpha I has the meta-loss of P* without a nominal term."""
    model = model_of(0)
    target = step_matrix(0, model.h)
    with_nominal = nqm.nominal_plus(target - alpha * np.eye(2), alpha)
    expected = float(expected_loss(target, model, 6))
    assert expected_loss(with_nominal, model, 6) == pytest.approx(expected)


@cache
def sampled_gradients(seed, steps=8, draws=40_000):
    model = model_of(seed)
    u = step_matrix(seed, model.h)

    def one(key):
        return nqm.sampled_meta_gradients(u, model, *nqm.draw(key, model, steps))

    keys = jax.random.split(jax.random.key(seed), draws)
    return model, u, np.asarray(jax.jit(jax.vmap(one))(keys))


def test_sampled_meta_gradients_equal_backpropagation():
    """For each horizon, what jax.grad of the mean loss of a trajectory so long gives."""
    model = model_of(2)
    u = step_matrix(2, model.h)
    phi, xi = nqm.draw(jax.random.key(1), model, 8)
    forward = nqm.sampled_meta_gradients(u, model, phi, xi)
    for steps in (1, 2, 8):

        def mean_loss(u, steps=steps):
            return nqm.trajectory(u, model.h, phi, xi[: steps + 1])[1].mean()

        np.testing.assert_allclose(
            forward[steps - 1], jax.grad(mean_loss)(u), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("seed", [0, 7])
def test_sampled_meta_gradients_are_unbiased(seed):
    """Their mean is the exact meta-gradient of equation 8, for every horizon."""
    model, u, grads = sampled_gradients(seed)
    for steps in (1, 3, 8):
        exact, _ = meta_gradient(u, 0.0, model, steps)
        assert within_six_sigma(grads[:, steps - 1], np.asarray(exact))


@pytest.mark.parametrize("seed", [0, 7])
def test_gradient_variance_is_exact(seed):
    """The closed form against 40,000 sampled gradients, for every horizon."""
    model, u, grads = sampled_gradients(seed)
    squares = ((grads - grads.mean(0)) ** 2).sum((2, 3))  # (N, T)
    assert within_six_sigma(squares, np.asarray(nqm.gradient_variance(u, model, 8)))


# --- what instability does (section 4.1)


@cache
def loss_along(t):
    """(loss at t, its gradient in s) along U = s U0, for an array of s, compiled once."""

    def loss_at_t(s, u0, model):
        return nqm.expected_losses(nqm.system(s * u0, model.h), model, t)[-1]

    both = jax.value_and_grad(loss_at_t)
    return jax.jit(jax.vmap(both, in_axes=(0, None, None)))


@pytest.mark.parametrize("t", [1, 2, 3])
@given(seed=seeds)
def test_loss_is_a_polynomial_of_degree_2t(t, seed):
    """Along U = s U0 the loss at t has degree 2t and its gradient 2t - 1 in s, not less."""
    model = model_of(seed)
    u0 = step_matrix(seed, model.h)
    found = loss_along(t)(np.arange(2 * t + 2.0), u0, model)
    for values, degree in zip(found, (2 * t, 2 * t - 1), strict=True):
        values = np.asarray(values)[: degree + 2]
        scale = np.abs(values).max()
        assert abs(np.diff(values, degree + 1)[0]) < 1e-9 * scale
        assert abs(np.diff(values, degree)[0]) > 1e-6 * scale


def test_unstable_gradients_grow_as_the_degree_says():
    """rho > 1: d loss_t / dP ~ t rho^(2t-1), and the gradient's variance ~ its square."""
    model = nqm.paper_model()
    u = nqm.nominal_plus(np.zeros((2, 2)), 2.1 / nqm.largest(nqm.H))
    rho = nqm.spectral_radius(nqm.system(u, nqm.H).a)
    assert rho == pytest.approx(1.1)
    by_step = jax.jacfwd(
        lambda u: nqm.expected_losses(nqm.system(u, nqm.H), model, 400)
    )(u)
    t = np.arange(1, 401)
    size = np.linalg.norm(np.asarray(by_step), axis=(1, 2)) / (t * rho ** (2.0 * t - 1))
    assert size[-1] == pytest.approx(size[199], rel=0.02)
    # Var G_T is that of the last term's geometric tail: (T rho^(2T))^2 / T^2 after the mean
    variance = np.asarray(nqm.gradient_variance(u, model, 400)) / rho ** (4.0 * t)
    assert variance[-1] == pytest.approx(variance[199], rel=0.05)
    assert np.isfinite(variance).all()


def test_eigenvalue_minus_one_diverges_under_noise():
    """H = 1, U = 2: rho(A) = 1, and the variance of phi_t is 4t, without end."""
    linear = nqm.system(np.array([[2.0]]), np.eye(1))
    covs = moments(linear, np.zeros(1), np.zeros((1, 1)), np.eye(1), 1000)[1]
    np.testing.assert_allclose(covs[:, 0, 0], 4 * np.arange(1, 1001))


def test_eigenvalue_plus_one_lets_no_noise_in():
    """U = 0: nothing moves, the loss stays what it was."""
    model = nqm.paper_model()
    losses = expected_losses(nqm.system(np.zeros((2, 2)), nqm.H), model, 50)
    np.testing.assert_allclose(losses, 0.5 * 11 * np.trace(nqm.H))


# --- Lemmas 4 and 5


@given(seeds)
def test_lemma_4_deterministic_loss_is_a_lower_bound(seed):
    """At every horizon the noiseless model's expected loss is below the noisy one's."""
    model = model_of(seed, n=3)
    linear = nqm.system(step_matrix(seed, model.h), model.h)
    quiet = expected_losses(linear, nqm.noiseless(model), 20).cumsum()
    assert (quiet < expected_losses(linear, model, 20).cumsum()).all()


@given(seeds)
def test_lemma_5_limit_loss(seed):
    """The loss converges to the discrete Lyapunov solution's, whatever the start."""
    model = model_of(seed)
    linear = nqm.system(step_matrix(seed, model.h), model.h)
    losses = expected_losses(linear, model, 2000)
    assert losses[-1] == pytest.approx(nqm.limit_loss(linear, model), rel=1e-6)


@given(hessians(decades=1.0))
def test_limit_loss_of_symmetric_p_in_closed_form(hessian):
    """sum of w_i / (2 - z_i), z = eig(H^1/2 U H^1/2), w the noise in its basis.

    It is finite up to z = 2, an eigenvalue -1 of A, and nothing special happens at z = 0.
    """
    h, _, rng = hessian
    n = len(h)
    noise = from_spectrum(rng.uniform(0, 2, n), rotation(rng, n))
    values = rng.uniform(0.05, 1.9, n) / nqm.largest(h)
    u = from_spectrum(values, rotation(rng, n))
    half = nqm.power(h, 0.5)
    z, q = np.linalg.eigh(half @ u @ half)
    w = np.diag(q.T @ half @ noise @ half @ q)
    model = nqm.Model(h, noise, np.zeros(n), np.zeros((n, n)))
    limit = nqm.limit_loss(nqm.system(u, h), model)
    assert limit == pytest.approx((w / (2 - z)).sum(), rel=1e-6)


def test_limit_loss_with_momentum():
    """The joint system's covariance is solved for whole, its loss read off phi's part."""
    model = nqm.paper_model()
    linear = nqm.momentum_system(0.1 * np.eye(2), model.h, 0.9)
    last = expected_losses(linear, model, 2000)[-1]
    assert last == pytest.approx(nqm.limit_loss(linear, model), rel=1e-9)


@pytest.mark.parametrize("u", [0.0, 2.0, 2.5])
def test_limit_loss_refuses_what_forgets_nothing(u):
    """rho >= 1, the marginal eigenvalues +1 and -1 among it: ValueError."""
    model = nqm.Model(np.eye(1), np.eye(1), np.zeros(1), np.eye(1))
    with pytest.raises(ValueError, match="spectral radius"):
        nqm.limit_loss(nqm.system(u * np.eye(1), np.eye(1)), model)


@hypothesis.settings(max_examples=100)
@given(within(nqm.theorem_1), st.integers(1, 60))
def test_lemma_5_repaired_bound_on_powers(case, k):
    """Symmetric P: |A^k| <= sqrt(cond H) rho(A)^k. Stable or not."""
    h, p, alpha = case
    a = nqm.system(nqm.nominal_plus(2 * p, alpha), h).a
    norm = np.linalg.norm(np.linalg.matrix_power(a, k), 2)
    bound = np.linalg.cond(h) ** 0.5 * nqm.spectral_radius(a) ** k
    assert norm <= bound * (1 + 1e-6) + 1e-9


def test_lemma_5_printed_step_is_false():
    """(A.14) equates |A^k| and rho(A^k): here rho = .962 and |A| = 1.160."""
    p = np.array([[0.1, -0.1], [-0.1, 1.2]])
    a = nqm.system(p, nqm.H).a
    assert nqm.spectral_radius(a) == pytest.approx(0.962, abs=1e-3)
    assert np.linalg.norm(a, 2) == pytest.approx(1.160, abs=1e-3)


def test_lemma_5_repaired_bound_is_attained():
    """cond(H) = 100 and rho = .999: one step multiplies phi by 9.99 = sqrt(100) rho."""
    h, swap = np.diag([100.0, 1.0]), np.array([[0.0, 1.0], [1.0, 0.0]])
    u = nqm.power(h, -0.5) @ (np.eye(2) - 0.999 * swap) @ nqm.power(h, -0.5)
    a = nqm.system(u, h).a
    assert np.allclose(u, u.T) and nqm.spectral_radius(a) == pytest.approx(0.999)
    assert np.linalg.norm(a, 2) == pytest.approx(9.99)


def test_meta_loss_falls_with_the_horizon():
    """The proof of Lemma 5 begins with L(T) <= L(T + 1); an average need not grow."""
    model = nqm.noiseless(nqm.paper_model())
    losses = expected_losses(nqm.system(0.5 * np.eye(2), nqm.H), model, 50)
    by_horizon = np.asarray(losses).cumsum() / np.arange(1, 51)
    assert (np.diff(by_horizon) < 0).all()


# --- the check to copy, and its command


@given(seeds, st.floats(-1, 1))
def test_check_says_what_the_spectrum_says(seed, alpha):
    """Radius and broken bounds as computed apart; inside `mend` A is stable."""
    rng = np.random.default_rng(seed)
    h = model_of(seed).h
    p = rng.normal(size=(2, 2)) * 0.5
    p = p if rng.random() < 0.5 else (p + p.T) / 2
    found = nqm.check(h, p, alpha)
    assert found.radius == pytest.approx(radius(h, p, alpha))
    assert found.symmetric == np.allclose(p, p.T)
    values = np.linalg.eigvals(p).real
    assert ("(9)" in found.broken) == (values.min() < -alpha)
    assert ("(10)" in found.broken) == (values.max() > 2 / nqm.largest(h) - alpha)
    if found.mend is not None:
        for share in (0.01, 0.5, 0.99):
            inside = found.mend.low + share * (found.mend.high - found.mend.low)
            assert radius(h, p, inside) <= 1 + 1e-3  # a grid, where P is not symmetric
    if found.mend is None or not found.mend.low <= alpha <= found.mend.high:
        assert found.radius > 1 - 1e-3 or not found.symmetric


def test_command_explains_the_counterexample(capsys):
    """`python nqm.py`: both bounds hold, A is unstable all the same, alpha mends it."""
    assert nqm.main([]) == 0
    out = capsys.readouterr().out
    for line in ("1.878: UNSTABLE", "0 <= 0.5: holds", "0.6 <= 1.36: holds"):
        assert line in out
    assert "not symmetric" in out and "stable for alpha in" in out


def test_command_names_the_broken_bound(capsys):
    """A symmetric P that climbs: (9) is broken, and alpha >= .5 mends it."""
    assert nqm.main(["--p", "[[-.5, 0], [0, .2]]"]) == 0
    out = capsys.readouterr().out
    assert "BROKEN, uphill" in out and "alpha in   [0.5, " in out
    assert nqm.main(["--h", "[[2]]", "--p", "[[1.5]]"]) == 0
    assert "BROKEN, may overshoot" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--p", "1,2;3"], "not a matrix"),
        (["--p", "[[1, 2], [3]]"], "not a matrix"),
        (["--p", "[[1]]"], "of one size"),
        (["--h", "[[-1]]", "--p", "[[1]]"], "positive definite"),
        (["--h", "[[1, 2], [0, 1]]"], "symmetric"),
        (["--alpha", "nan"], "finite"),
    ],
)
def test_command_refuses_bad_input_in_one_line(argv, message, capsys):
    """One line on stderr, exit code 2."""
    assert nqm.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.heavy
def test_vmap_over_everything():
    """U, alpha and keys batch by jax.vmap, and agree with one at a time."""
    model, p = nqm.paper_model(), np.zeros((2, 2))

    def everything(alpha, key):
        u = nqm.nominal_plus(p, alpha)
        phi, xi = nqm.draw(key, model, 5)
        return (
            nqm.expected_loss(u, model, 5),
            nqm.meta_gradient(p, alpha, model, 5),
            nqm.gradient_variance(u, model, 5),
            nqm.sampled_meta_gradients(u, model, phi, xi),
        )

    alphas, keys = np.linspace(0.1, 0.9, 3), jax.random.split(jax.random.key(0), 3)
    batched, single = jax.jit(jax.vmap(everything))(alphas, keys), jax.jit(everything)
    for i in range(3):
        for many, one in zip(
            jax.tree.leaves(batched),
            jax.tree.leaves(single(alphas[i], keys[i])),
            strict=True,
        ):
            np.testing.assert_allclose(many[i], one, rtol=1e-9, atol=1e-12)


# --- figures 1 and 2


def test_figure_1_interventions_together_stabilize():
    """Each intervention alone lowers rho and leaves it above 1; all three end below."""
    result = figures_nqm.compute_1(points=11)
    before, after = result["radius_before_after"].T
    assert before == pytest.approx(before[0]) and before[0] > 1
    assert (1 < after[:3]).all() and (after[:3] < before[:3]).all() and after[3] < 1
    path = result["curves"] @ np.array([1, 1j])  # (4, points, 6)
    np.testing.assert_allclose(np.abs(path[:, -1]).max(-1), after)
    assert np.abs(path.imag[:, 0]).max() > 1  # the example has complex eigenvalues
    assert np.abs(np.diff(path, axis=1)).max() < 0.5  # each is followed


@pytest.mark.heavy
def test_figure_2a_sampled_and_exact_agree():
    """4,000 draws are within 15 % of the closed form; nowhere is alpha = 0 the best."""
    result = figures_nqm.compute_2a((1, 5, 20), alphas=5, draws=4000)
    inside = slice(
        1, -1
    )  # at the ends, A has an eigenvalue +-1 and the tails are heavy
    sampled, exact = result["variance"][:, inside], result["exact"][:, inside]
    np.testing.assert_allclose(sampled, exact, rtol=0.15)
    u = nqm.nominal_plus(np.zeros((2, 2)), result["alpha"][2])
    variance = nqm.gradient_variance(u, nqm.paper_model(), 20)
    np.testing.assert_allclose(exact[:, 1], variance[np.array([0, 4, 19])], rtol=1e-9)
    assert (np.diff(result["ratio_at_zero_to_best"]) > 0).all()  # grows with T
    assert (0 < result["best_share"]).all() and (result["best_share"] < 1).all()


def test_best_step_is_the_minimum():
    """P* = U* - alpha I: no gradient, symmetric, and each mode of H at its own optimum."""
    model = nqm.paper_model()
    u, loss = figures_nqm.best_step(model, 50)
    assert np.abs(meta_gradient(u, 0.0, model, 50)[0]).max() < 1e-9
    np.testing.assert_allclose(u, u.T, atol=1e-9)
    # phi_0 and xi are isotropic: modes decouple, and a grid over each one's step is enough
    values, vectors = np.linalg.eigh(nqm.H)
    total = 0.0
    for value, vector in zip(values, vectors.T, strict=True):
        mode = nqm.Model(value * np.eye(1), np.eye(1), np.zeros(1), 10 * np.eye(1))
        steps = np.linspace(0.01, 1.99, 2000)[:, None, None] / value
        losses = jax.jit(jax.vmap(lambda u, m=mode: nqm.expected_loss(u, m, 50)))(steps)
        total += losses.min()
        assert vector @ u @ vector == pytest.approx(steps[losses.argmin()].item(), 2e-3)
    assert loss == pytest.approx(float(total), rel=1e-5)


def test_nqm_unroll_is_the_model():
    """Its mean losses by step are those of equation 8, at six standard errors."""
    model, p = nqm.paper_model(), step_matrix(4, nqm.H) - 0.1 * np.eye(2)
    problem = figures_nqm.nqm_unroll(model, 0.1, 6)

    def one(key):
        start, run = jax.random.split(key)
        return problem.run(p, problem.fresh(start), run)[1]

    losses = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000))
    linear = nqm.system(nqm.nominal_plus(p, 0.1), nqm.H)
    assert within_six_sigma(np.asarray(losses), expected_losses(linear, model, 6))


@pytest.mark.heavy
def test_figure_2bc_meta_training_learns():
    """From P = 0 the exact meta-loss falls, and counts as near at 1.1 of the optimum."""
    with jax.enable_x64(False):  # as the command runs it
        result = figures_nqm.compute_2bc(meta_steps=150, seeds=2, alphas=(0.0, 0.4))
    loss = result["curves"]["loss"]  # (setting, alpha, seed, meta-step)
    model = nqm.paper_model()
    for i, alpha in enumerate((0.0, 0.4)):
        start = nqm.expected_loss(nqm.nominal_plus(np.zeros((2, 2)), alpha), model, 50)
        np.testing.assert_allclose(loss[:2, i, :, 0], float(start), rtol=1e-5)
    assert (loss[0, 0, :, -1] < 0.5 * loss[0, 0, :, 0]).all()
    assert (loss > result["optimum"]).all()
    near = result["meta_steps_until_within_10_percent"]
    for at, losses in zip(near.ravel(), loss.reshape(-1, 150), strict=True):
        close = losses <= 1.1 * result["optimum"]
        assert at == (close.argmax() if close.any() else np.inf)
    magnitudes = result["curves"]["magnitudes"]
    np.testing.assert_allclose(magnitudes[0, 0, 0, 0], 1, rtol=1e-6)  # A = I
