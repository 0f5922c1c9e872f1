"""The noisy quadratic model: what the paper claims in section 4, and where it slips.

Each bound holds inside, and an unstable P lies just outside. Where the paper claims more
than is true, its counterexample stands here. What draws the problems is at the end.
"""

import re
from functools import partial

import hypothesis
import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nqm
from nqm import H, nominal_plus, spectral_radius, system

D = np.array([1.7, 0.17, 0.017])  # the disturbance of Lemma 3
BOUNDS = {
    "theorem 1": nqm.theorem_1,
    "lemma 2": nqm.lemma_2,
    "lemma 3": partial(nqm.lemma_3, d_max=D),
    "momentum": partial(nqm.momentum_bound, momentum=0.9),
}
claims, seeds = pytest.mark.parametrize("claim", BOUNDS), st.integers(0, 2**32 - 1)
often = hypothesis.settings(max_examples=100)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def dynamics(h, p, alpha, claim="theorem 1"):
    """The A that the claim is about: disturbed, preconditioned, or joint."""
    p = D[: len(h), None] * p if claim == "lemma 3" else np.array(p)
    u = nominal_plus(p, alpha)
    u = nqm.power(h, -0.5) @ u if claim == "lemma 2" else u
    return (nqm.momentum_system(u, h, 0.9) if claim == "momentum" else system(u, h)).a


def radius(*case):
    return spectral_radius(dynamics(*case))


# --- Theorem 1, Lemmas 2 and 3, momentum (sections 4.2 to 4.4)
@claims
@often
@given(seeds)
def test_bounds_are_sufficient_for_symmetric_p(claim, seed):
    """Symmetric P (in Lemma 3: diagonal) inside the bounds has rho <= 1."""
    slack = 1e-6 if claim == "momentum" else 1e-9  # a double root is known less well
    assert radius(*inside(claim, np.random.default_rng(seed)), claim) <= 1 + slack


@claims
@pytest.mark.parametrize("side", [(0.01, 0.0), (0.0, 0.01)], ids=["lower", "upper"])
def test_bounds_are_tight(claim, side):
    """Either bound moved outward by 1 % of the interval admits an unstable P."""
    cases = (inside(claim, np.random.default_rng(seed), side) for seed in range(3000))
    h, p, alpha = next(case for case in cases if radius(*case, claim) > 1 + 1e-6)
    (low, high), values = BOUNDS[claim](h, alpha), np.linalg.eigvalsh(p)
    assert values[0] < low if side[0] else values[-1] > high


@pytest.mark.parametrize(
    "claim, p, alpha, eigenvalues",
    [
        ("theorem 1", [[0.5, -3], [0, 0.6]], 0.0, [1.878, 1.063]),  # uphill, twice
        ("theorem 1", [[0.5, 3], [0, 0.6]], 0.0, [-1.613, 0.979]),  # overshoots
        ("theorem 1", [[0.1, -2], [0, 0.2]], 0.5, [1.093 + 0.262j, 1.093 - 0.262j]),
        ("lemma 2", [[0.5, -6], [0, 0.6]], 0.0, [2.345, 1.096]),
        ("momentum", [[0.5, -3], [0, 0.6]], 0.0, [2.404, 1.233]),
    ],
)
def test_theorem_1_fails_for_p_that_is_not_symmetric(claim, p, alpha, eigenvalues):
    """Diagonalizable with real eigenvalues inside the bounds, and yet rho(A) > 1."""
    low, high = BOUNDS[claim](H, alpha)
    assert low <= p[0][0] < p[1][1] <= high  # triangular: these are its eigenvalues
    found = np.linalg.eigvals(dynamics(H, p, alpha, claim))
    assert all(np.abs(found - value).min() < 6e-4 for value in eigenvalues)
    assert radius(H, p, alpha, claim) == pytest.approx(np.abs(eigenvalues).max(), 1e-3)


def test_lemma_3_fails_for_symmetric_p_that_is_not_diagonal():
    """Inside (16), (17), eig(A) = {1.081, 1.001}: diag(d) P~ is no longer symmetric."""
    h, p = np.array([[0.4, 1.3], [1.3, 4.3]]), np.array([[0.20, -0.24], [-0.24, 0.29]])
    low, high = nqm.lemma_3(h, 0.02, d := np.array([0.8, 0.01]))
    assert low == pytest.approx(-0.025) and high == pytest.approx(0.5076, abs=1e-4)
    assert low <= np.linalg.eigvalsh(p)[0] and np.linalg.eigvalsh(p)[1] <= high
    a = system(nominal_plus(np.diag(d) @ p, 0.02), h).a
    assert np.sort(np.linalg.eigvals(a)) == pytest.approx([1.001, 1.081], abs=6e-4)


def test_upper_bound_10_is_not_necessary():
    """P = diag(0, 3), H = diag(2, .1) break (10) and are stable."""
    h, p = np.diag([2.0, 0.1]), np.diag([0.0, 3.0])
    assert nqm.theorem_1(h, 0.0) == (0, 1)
    assert radius(h, p, 0.0) == 1 and radius(h, p, 0.01) < 1


@often
@given(seeds, st.floats(-0.99, 0.99))
def test_exact_alpha_is_necessary_and_sufficient(seed, where):
    """Symmetric P: rho(A) <= 1 inside, > 1 outside. So (9), its lower end, is necessary."""
    rng = np.random.default_rng(seed)
    h = hessian(rng)
    p = turned(rng, rng.uniform(-1, 1, len(h)) / norm(h))
    low, high = nqm.exact_alpha(h, p)
    assert low == pytest.approx(-np.linalg.eigvalsh(p)[0])
    hypothesis.assume(low < high)
    middle, half = (low + high) / 2, (high - low) / 2
    assert radius(h, p, middle + where * half) <= 1 + 1e-9
    assert min(radius(h, p, middle + x * half) for x in (-1.01, 1.01)) > 1


@given(seeds, st.floats(-1, 1), st.floats(0, 0.99))
def test_preconditioner_and_momentum_loosen_the_upper_bound(seed, alpha, mu):
    """The preconditioner exactly if lambda_max(H) > 1, momentum by 2 mu / lambda_max(H)."""
    h = hessian(np.random.default_rng(seed))
    low, high = nqm.theorem_1(h, alpha)
    assert (nqm.lemma_2(h, alpha)[1] > high) == (norm(h) > 1)
    heavier = low, high + 2 * mu / norm(h)
    assert nqm.momentum_bound(h, alpha, mu) == pytest.approx(heavier)


def test_stable_parts_do_not_make_a_stable_whole():
    """App. A.4: phi and velocity each stable alone, jointly unstable (rho = 1.44)."""
    h, p = np.eye(2), [[0.1, -0.4], [0.4, 0.1]]  # it turns the gradient
    assert radius(h, p, 0.0) == pytest.approx(0.985, abs=1e-3)
    assert radius(h, p, 0.0, "momentum") == pytest.approx(1.44, abs=0.01)


def test_lemma_3s_upper_bound_does_not_hold_by_itself_for_a_negative_lambda_min():
    """The proof skips (17) where lambda_min(P~) <= 0: H = I, alpha = 1, diag(-1, 3)."""
    p, (low, high) = np.diag([-1.0, 3.0]), nqm.lemma_3(np.eye(2), 1.0, np.ones(2))
    assert low <= p[0, 0] <= 0 and p[1, 1] > high
    assert spectral_radius(system(nominal_plus(p, 1.0), np.eye(2)).a) == 3


def test_lemma_3_refuses_what_it_does_not_cover():
    """alpha outside (0, 2 / lambda_max(H)) or d_max not positive: ValueError."""
    for alpha, d_max in ((0.0, [1, 1]), (1.4, [1, 1]), (0.5, [1, 0])):
        with pytest.raises(ValueError, match="Lemma 3"):
            nqm.lemma_3(H, alpha, d_max)


@given(seeds, st.floats(0.01, 1), st.floats(0.01, 0.99))
def test_equation_19_has_a_plus(seed, alpha, e):
    """P = (1-e)(P* - alpha I) steps along e alpha I + (1-e) P*, not minus as printed."""
    target, eye = np.random.default_rng(seed).normal(size=(2, 2)), np.eye(2)
    p, delta = target - alpha * eye, np.diag([0.3, 0.9])
    same = partial(np.allclose, atol=1e-12)
    assert same(nominal_plus(p, alpha), target)  # equation 14: P cancels alpha
    u = nominal_plus((1 - e) * p, alpha)
    assert same(u, e * alpha * eye + (1 - e) * target)
    assert not same(u, e * alpha * eye - (1 - e) * target)
    u = nominal_plus(delta @ p, alpha)
    assert same(u, alpha * (eye - delta) + delta @ target)  # equation 18


# --- the exact moments, loss and gradients (equations 5 to 8)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_moments_and_loss_agree_with_simulation(momentum):
    """Means, covariances and losses of 20,000 trajectories, at six standard errors."""
    model, u = random_model(3)
    u = (0.3 if momentum else 1.0) * u
    run = partial(nqm.trajectory, u, model.h, momentum=momentum)
    phi, losses = simulated(run, model, draws=20_000, steps=12)
    linear = nqm.momentum_system(u, model.h, momentum)
    means, covs = (np.asarray(x)[:, :2] for x in moments(linear, model, 12))
    assert within_six_sigma(phi, means)
    off = phi - means
    assert within_six_sigma(off[..., :, None] * off[..., None, :], covs[:, :, :2])
    assert within_six_sigma(losses, np.asarray(expected_losses(linear, model, 12)))


def test_equation_8_numbers():
    """The paper's H, T = 10, alpha = .5: 1.608 with the half, 3.216 as printed."""
    u = nominal_plus(np.zeros((2, 2)), 0.5)
    assert expected_loss(u, nqm.paper_model(), 10) == pytest.approx(1.608, abs=5e-4)


@given(seeds)
def test_moments_equal_the_sum_of_equation_7(seed):
    """From a known phi_0: A^t phi_0, and the sum over k that the paper prints."""
    model, u = random_model(seed, n=3)
    a, b = linear = system(u, model.h)
    means, covs = moments(linear, model._replace(start_cov=np.zeros((3, 3))), 7)
    powers = [np.linalg.matrix_power(a, k) for k in range(8)]
    for t in (1, 2, 7):
        total = sum(x @ b @ model.noise @ b.T @ x.T for x in powers[:t])
        np.testing.assert_allclose(covs[t - 1], total, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(means[t - 1], powers[t] @ model.start_mean)


def test_trajectory_equals_optax_momentum():
    """U = 0.3 I with momentum 0.8 is optax.sgd(0.3, 0.8) on the loss of equation 4."""
    model, _ = random_model(1)
    start, xi = nqm.draw(jax.random.key(0), model, 5)
    ours, _ = nqm.trajectory(0.3 * np.eye(2), model.h, start, xi, 0.8)
    optimizer = optax.sgd(0.3, 0.8)
    phi, state = start, optimizer.init(start)
    for t in range(5):
        grads = jax.grad(nqm.loss)(phi, xi[t], model.h)
        updates, state = optimizer.update(grads, state)
        phi = optax.apply_updates(phi, updates)
        np.testing.assert_allclose(ours[t], phi, rtol=1e-12)


@given(seeds, st.floats(0, 0.3))
def test_meta_gradient_equals_finite_differences(seed, alpha):
    """dL/dP and dL/dalpha of equation 8, along three directions of (P, alpha)."""
    model, u = random_model(seed)
    p = u - alpha * np.eye(2)
    exact = np.append(*meta_gradient(p, alpha, model, 6))
    for along in 1e-5 * np.random.default_rng(seed).normal(size=(3, 5)):
        there, back = (
            expected_loss(nominal_plus(p + x[:4].reshape(2, 2), alpha + x[4]), model, 6)
            for x in (along, -along)
        )
        assert float(there - back) == pytest.approx(2 * exact @ along, 1e-5, 1e-11)


@pytest.mark.parametrize("seed", [0, 7])
def test_gradient_variance_is_exact(seed):
    """The closed form, and the exact mean, against 40,000 sampled gradients."""
    model, u = random_model(seed)
    sampled = partial(nqm.sampled_meta_gradients, u, model)
    grads = simulated(sampled, model, draws=40_000, steps=8)  # (N, T, 2, 2)
    exact = np.array([meta_gradient(u, 0.0, model, t)[0] for t in (1, 3, 8)])
    assert within_six_sigma(grads[:, [0, 2, 7]], exact)
    squares = ((grads - grads.mean(0)) ** 2).sum((2, 3))  # (N, T)
    assert within_six_sigma(squares, np.asarray(nqm.gradient_variance(u, model, 8)))
    still = model._replace(noise=0 * model.noise, start_cov=0 * model.start_cov)
    np.testing.assert_allclose(nqm.gradient_variance(u, still, 8), 0, atol=1e-9)
    drawn = nqm.draw(jax.random.key(1), model, 8)
    backward = jax.grad(lambda u: nqm.trajectory(u, model.h, *drawn)[1].mean())(u)
    np.testing.assert_allclose(sampled(*drawn)[-1], backward, rtol=1e-9)


# --- what instability does (section 4.1, Lemmas 4 and 5)
@pytest.mark.parametrize("t", [1, 2, 3])
def test_loss_is_a_polynomial_of_degree_2t(t):
    """Along U = s U0 the loss at t is a polynomial in s of degree 2t, not less."""
    model, u = random_model(t)
    at = jax.vmap(lambda s: expected_losses(system(s * u, model.h), model, t)[-1])
    values = np.asarray(at(np.arange(2 * t + 2.0)))
    assert abs(np.diff(values, 2 * t + 1)[0]) < 1e-9 * np.abs(values).max()
    assert abs(np.diff(values, 2 * t)[0]) > 1e-6 * np.abs(values).max()


def test_unstable_gradients_grow_as_the_degree_says():
    """rho > 1: d loss_t / dP ~ t rho^(2t-1), and the variance of their mean ~ rho^(4t)."""
    model, t, u = nqm.paper_model(), np.arange(1, 401), 2.1 / norm(H) * np.eye(2)
    assert spectral_radius(system(u, H).a) == pytest.approx(rho := 1.1)
    by_step = jax.jacfwd(lambda u: expected_losses(system(u, H), model, 400))(u)
    size = np.linalg.norm(by_step, axis=(1, 2)) / (t * rho ** (2.0 * t - 1))
    assert size[-1] == pytest.approx(size[199], rel=0.02)
    variance = np.asarray(nqm.gradient_variance(u, model, 400)) / rho ** (4.0 * t)
    assert variance[-1] == pytest.approx(variance[199], rel=0.05)


@pytest.mark.parametrize("u, growth", [(2.0, 4), (0.0, 0)])
def test_eigenvalue_minus_one_diverges_under_noise(u, growth):
    """H = 1: the variance of phi_t is 4t for U = 2, without end. U = 0 lets no noise in."""
    model = nqm.Model(np.eye(1), np.eye(1), np.zeros(1), np.zeros((1, 1)))
    linear = system(u * np.eye(1), np.eye(1))
    assert spectral_radius(linear.a) == 1
    variance = moments(linear, model, 1000)[1][:, 0, 0]
    np.testing.assert_allclose(variance, growth * np.arange(1, 1001))


@given(st.floats(0, np.pi))
def test_complex_eigenvalues_on_the_unit_circle_let_noise_in(omega):
    """H = I, A turns by omega: tr cov grows by 2 |1 - exp(i omega)|^2 a step, 8 for pi."""
    a = np.array([[np.cos(omega), -np.sin(omega)], [np.sin(omega), np.cos(omega)]])
    linear = system(np.eye(2) - a, np.eye(2))
    growth = 2 * abs(1 - np.exp(1j * omega)) ** 2
    assert spectral_radius(linear.a) == pytest.approx(1)
    assert traces(linear, 50) == pytest.approx(growth * np.arange(1, 51), abs=1e-9)


def test_eigenvalue_one_without_its_eigenvectors_lets_noise_in():
    """H = I, P = [[0, -1], [0, 0]]: inside (9) and (10), and tr cov is 1, 2, 3, 4."""
    p = np.array([[0.0, -1.0], [0.0, 0.0]])
    linear = system(nominal_plus(p, 0.0), np.eye(2))
    assert (np.linalg.eigvals(linear.a) == 1).all()
    assert np.linalg.matrix_rank(linear.a - np.eye(2)) == 1  # one eigenvector, not two
    assert traces(linear, 4) == pytest.approx([1, 2, 3, 4])


def test_instability_needs_an_unstable_start_where_there_is_no_noise():
    """A = diag(.5, 1.5): from (1, 0) the loss vanishes, and any noise makes it explode."""
    linear, eye = system(np.diag([0.5, -0.5]), np.eye(2)), np.eye(2)
    still = nqm.Model(eye, 0 * eye, np.array([1.0, 0.0]), 0 * eye)
    assert spectral_radius(linear.a) == 1.5
    assert expected_losses(linear, still, 50)[-1] < 1e-30
    noisy = still._replace(noise=1e-6 * eye)
    assert expected_losses(linear, noisy, 50)[-1] > 1e10


def test_figure_2as_claim_fails_near_the_upper_bound():
    """P = 0. At alpha = 2 / lambda_max(H) the variance is above that at 0 for every T. Up
    to 0.9 of that alpha it is below."""
    model, eye = nqm.paper_model(), np.eye(2)
    variance = jax.jit(lambda u: nqm.gradient_variance(u, model, 1000))
    at_zero, top = variance(0 * eye), 2 / norm(H)
    ratio = np.asarray(variance(top * eye) / at_zero)
    assert ratio[[0, 9, 99, 999]] == pytest.approx([1.395, 5.84, 207, 17_940], rel=2e-3)
    assert (np.diff(ratio) > 0).all()
    for share in (0.05, 0.5, 0.9):
        assert (variance(share * top * eye) < at_zero).all()
    for t, below, above in ((1, 0.905, 0.91), (100, 0.98, 0.985)):
        low, high = (variance(x * top * eye)[t - 1] for x in (below, above))
        assert low < at_zero[t - 1] < high


@given(seeds)
def test_lemma_4_deterministic_loss_is_a_lower_bound(seed):
    """Without noise every term of the expected meta-loss is smaller."""
    model, u = random_model(seed, n=3)
    quiet, linear = model._replace(noise=0 * model.noise), system(u, model.h)
    noisy = expected_losses(linear, model, 20)
    assert (expected_losses(linear, quiet, 20) < noisy).all()


def test_equation_a2_has_its_bar_on_the_wrong_side():
    """L = Lbar + mean tr H (Sigma_t + Sigma_xi) / 2: 1.238 = .014 + 1.223, not reversed."""
    model = nqm.Model(H, np.eye(2), np.ones(2), np.zeros((2, 2)))
    linear = system(0.5 * np.eye(2), H)
    noisy = expected_losses(linear, model, 10).mean()
    quiet = expected_losses(linear, model._replace(noise=0 * H), 10).mean()
    spread = np.asarray(moments(linear, model, 10)[1]) + model.noise
    added = 0.5 * np.trace(H @ spread, axis1=1, axis2=2).mean()
    assert (noisy, quiet, added) == pytest.approx((1.238, 0.014, 1.223), abs=5e-4)
    assert noisy == pytest.approx(quiet + added)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@given(seeds)
def test_lemma_5_limit_loss(momentum, seed):
    """The loss converges to the discrete Lyapunov solution's, whatever the start."""
    model, u = random_model(seed)
    linear = nqm.momentum_system(0.5 * u, model.h, momentum)
    last = expected_losses(linear, model, 2000)[-1]
    assert last == pytest.approx(nqm.limit_loss(linear, model), rel=1e-6)


def test_limit_loss_in_one_dimension():
    """H = 1, noise 1: 1 / (2 - U), finite up to U = 2, where A = -1 forgets nothing."""
    one = np.eye(1)
    model = nqm.Model(one, one, np.zeros(1), one)
    for u in (0.001, 1.0, 1.999):
        assert nqm.limit_loss(system(u * one, one), model) == pytest.approx(1 / (2 - u))
    for u in (0.0, 2.0, 2.5):
        with pytest.raises(ValueError, match="spectral radius"):
            nqm.limit_loss(system(u * one, one), model)


@often
@given(seeds, st.integers(1, 60))
def test_lemma_5_repaired_bound_on_powers(seed, k):
    """Symmetric P, stable or not: |A^t| <= sqrt(cond H) rho(A)^t."""
    h, p, alpha = inside("theorem 1", np.random.default_rng(seed))
    a = system(nominal_plus(2 * p, alpha), h).a
    bound = np.linalg.cond(h) ** 0.5 * spectral_radius(a) ** k
    assert norm(np.linalg.matrix_power(a, k)) <= bound * (1 + 1e-6) + 1e-9


def test_lemma_5_printed_step_is_false():
    """(A.14) equates |A^t| and rho(A^t). The repaired bound, sqrt(100) rho, is attained."""
    a = system(np.array([[0.1, -0.1], [-0.1, 1.2]]), H).a
    assert spectral_radius(a) == pytest.approx(0.962, abs=1e-3)
    assert norm(a) == pytest.approx(1.160, abs=1e-3)
    h, swap = np.diag([100.0, 1.0]), np.array([[0.0, 1.0], [1.0, 0.0]])
    u = nqm.power(h, -0.5) @ (np.eye(2) - 0.999 * swap) @ nqm.power(h, -0.5)
    assert spectral_radius(a := system(u, h).a) == pytest.approx(0.999)
    assert np.allclose(u, u.T) and norm(a) == pytest.approx(9.99)


def test_meta_loss_falls_with_the_horizon():
    """The proof of Lemma 5 begins with L(T) <= L(T + 1). An average need not grow."""
    model = nqm.paper_model()._replace(noise=np.zeros((2, 2)))
    losses = expected_losses(system(0.5 * np.eye(2), H), model, 50)
    by_horizon = np.asarray(losses).cumsum() / np.arange(1, 51)
    assert (np.diff(by_horizon) < 0).all()


# --- the command
def test_command_explains_the_counterexample(capsys):
    """`python nqm.py`: both bounds hold, A is unstable all the same, alpha mends it."""
    nqm.main([])
    assert capsys.readouterr().out.splitlines() == [
        "eigenvalues of H      [0.1253 1.4707]",
        "eigenvalues of P      [0.5 0.6]",
        "eigenvalues of A      [1.8785 1.0629]",
        "spectral radius       1.878: UNSTABLE",
        "Theorem 1, (9)        0 <= 0.5: holds",
        "Theorem 1, (10)       0.6 <= 1.36: holds",
        "P is not symmetric    no bound applies; least radius 0.06042 at alpha = 1.916",
    ]
    at_the_bounds = nqm.check(np.eye(2), np.diag([0.0, 2.0]), 0.0)
    assert at_the_bounds.count("holds") == 2 and "1: UNSTABLE" in at_the_bounds


@given(seeds, st.floats(-1, 1))
def test_check_says_what_the_spectrum_says(seed, alpha):
    """Radius, broken bounds and the alpha that mends, as computed apart."""
    h, p = random_model(seed)[0].h, np.random.default_rng(seed).normal(size=(2, 2)) / 2
    p = (p + p.T) / 2 if seed % 2 else p
    rho, values = radius(h, p, alpha), np.linalg.eigvals(p).real
    found = nqm.check(h, p, alpha)
    assert f" {rho:.4g}: {'stable' if rho < 1 else 'UNSTABLE'}\n" in found
    assert ("BROKEN, uphill" in found) == (values.min() < -alpha)
    assert ("BROKEN, may overshoot" in found) == (values.max() > 2 / norm(h) - alpha)
    x, y = (float(x) for x in re.findall(r"-?\d[\d.e-]*", found)[-2:])
    if seed % 2:
        assert (x, y) == pytest.approx(nqm.exact_alpha(h, p), rel=1e-3)
    else:
        least = min(radius(h, p, other) for other in np.linspace(-10, 20, 301))
        assert x == pytest.approx(radius(h, p, y), abs=0.01) and x <= least + 1e-3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--p", "1,2;3"], "invalid syntax"),
        (["--p", "[None]"], "a matrix is written [[1, 2], [3, 4]]"),
        (["--p", "[[1]]"], "mismatch"),
        (["--h", "0", "--p", "1"], "positive definite"),
        (["--h", "[[1, .2], [0, 1]]"], "symmetric"),
        (["--alpha", "nan"], "NaN"),
    ],
)
def test_command_refuses_bad_input_in_one_line(argv, message, capsys):
    """One line on stderr, exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        nqm.main(argv)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# --- problems drawn, and functions compiled once for several tests
norm = partial(np.linalg.norm, ord=2)  # the spectral norm; of H, its largest eigenvalue


def turned(rng, values):
    """The symmetric matrix of these eigenvalues, in a random orientation."""
    vectors = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return vectors * values @ vectors.T


def hessian(rng):
    """H: eigenvalues from .01 to 100, along the axes or not."""
    values = 10 ** rng.uniform(-2, 2, rng.integers(1, 4))
    return turned(rng, values) if rng.random() < 0.5 else np.diag(values)


def inside(claim, rng, widen=(0.0, 0.0)):
    """(H, P, alpha), P's eigenvalues between the bounds, often at one of them."""
    h = hessian(rng)
    alpha, vectors = rng.uniform(0.01, 1.99) / norm(h), np.linalg.eigh(h)[1]
    low, high = BOUNDS[claim](h, alpha)
    low, high = low - widen[0] * (high - low), high + widen[1] * (high - low)
    share = rng.choice([0, 1, *rng.uniform(0, 1, 3)], len(h))
    values = low + share * (high - low)
    if claim == "lemma 3":
        return h, np.diag(values), alpha
    return h, rng.choice([vectors * values @ vectors.T, turned(rng, values)]), alpha


def random_model(seed, n=2):
    """(a model of which no two matrices commute, a U not symmetric with rho(A) < 1)."""
    rng = np.random.default_rng(seed)
    ranges = np.array([(0.2, 1.4), (0.2, 2), (0.5, 4), (0.3, 1.2)])
    h, noise, cov, z = (turned(rng, rng.uniform(*ends, n)) for ends in ranges)
    u = z @ np.linalg.inv(h) + 0.05 * rng.normal(size=(n, n))
    return nqm.Model(h, noise, rng.normal(size=n), cov), u


def simulated(f, model, draws, steps):
    """f(phi_0, xi) of each draw, stacked."""
    each = jax.jit(jax.vmap(lambda key: f(*nqm.draw(key, model, steps))))
    return jax.tree.map(np.asarray, each(jax.random.split(jax.random.key(3), draws)))


def traces(linear, steps):
    """tr Cov(phi_t), t = 1 ... T, from a known start, with noise of covariance I."""
    eye = np.eye(len(linear.b))
    model = nqm.Model(eye, eye, 0 * eye[0], 0 * eye)
    return np.trace(moments(linear, model, steps)[1], axis1=1, axis2=2)


def within_six_sigma(samples, expected):
    """samples (N, ...), each entry judged by its own standard error."""
    error = samples.std(0, ddof=1) / len(samples) ** 0.5
    return (np.abs(samples.mean(0) - expected) < 6 * error).all()


expected_losses = jax.jit(nqm.expected_losses, static_argnums=2)
expected_loss = jax.jit(nqm.expected_loss, static_argnums=2)
meta_gradient = jax.jit(nqm.meta_gradient, static_argnums=3)
moments = jax.jit(nqm.moments, static_argnums=2)
