"""Figures 1 and 2 of the STAR paper: they show what the model of nqm.py says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nqm
from figures import stability

MODEL = nqm.paper_model()


def test_figure_1_interventions_together_stabilize():
    """Each intervention alone lowers rho and leaves it above 1. All three end below."""
    result = stability.compute_1(points=11)
    before, after = result["radius_before_after"].T
    assert before == pytest.approx(before[0]) and before[0] > 1
    assert (1 < after[:3]).all() and (after[:3] < before[:3]).all() and after[3] < 1
    path = result["curves"] @ np.array([1, 1j])  # (4, points, 6)
    np.testing.assert_allclose(np.abs(path[:, -1]).max(-1), after)
    assert np.abs(path.imag[:, 0]).max() > 1  # the example has complex eigenvalues
    assert np.abs(np.diff(path, axis=1)).max() < 0.5  # each is followed


@pytest.mark.heavy
def test_figure_2a_sampled_and_exact_agree():
    """4,000 draws are within 15 % of the closed form. Nowhere is alpha = 0 the best."""
    result = stability.compute_2a((1, 5, 20), alphas=5, draws=4000)
    exact, sampled = result["exact"], result["variance"]
    # at the ends, A has an eigenvalue +-1 and the tails are heavy
    np.testing.assert_allclose(sampled[:, 1:-1], exact[:, 1:-1], rtol=0.15)
    with jax.enable_x64(True):
        last = nqm.gradient_variance(result["alpha"][2] * np.eye(2), MODEL, 20)[-1]
    assert exact[-1, 2] == pytest.approx(float(last), rel=1e-9)
    assert (np.diff(result["ratio_at_zero_to_best"]) > 0).all()  # grows with T
    assert (0 < result["best_share"]).all() and (result["best_share"] < 1).all()


def test_best_step_is_the_minimum():
    """Each mode of H is at its own optimum. They decouple: phi_0 and xi are isotropic."""
    (u, loss), (values, vectors) = stability.best_step(MODEL, 50), np.linalg.eigh(nqm.H)
    step = jnp.linspace(0.01, 1.99, 2000)[:, None, None]  # of value * u
    mode = nqm.Model(np.eye(1), np.eye(1), np.zeros(1), 10 * np.eye(1))
    losses = jax.vmap(lambda u: nqm.expected_loss(u, mode, 50))(step)
    assert loss == pytest.approx(float(losses.min()) * values.sum(), rel=1e-5)
    best = float(step[losses.argmin()].item()) * np.eye(2)
    np.testing.assert_allclose(vectors.T @ u @ vectors * values, best, atol=2e-3)


def test_nqm_problem_is_the_model():
    """Its mean losses by step are those of equation 8, at six standard errors."""
    problem, u = stability.nqm_problem(MODEL, 6), np.array([[0.9, -0.8], [-0.6, 1.5]])
    start_keys, run_keys = jax.random.split(jax.random.key(0), (2, 20_000))
    run = jax.vmap(problem.run, in_axes=(None, 0, 0))
    losses = jax.jit(run)(u, jax.vmap(problem.fresh)(start_keys), run_keys)[1]
    expected = nqm.expected_losses(nqm.system(u, nqm.H), MODEL, 6)
    error = losses.std(0) / len(losses) ** 0.5
    assert (jnp.abs(losses.mean(0) - expected) < 6 * error).all()


@pytest.mark.heavy
def test_figure_2bc_meta_training_learns():
    """From P = 0 the exact meta-loss falls, and counts as near at 1.1 of the optimum."""
    alphas = np.array([0.0, 0.4])
    result = stability.compute_2bc(meta_steps=150, seeds=2, alphas=alphas)
    loss = result["curves"]["loss"]  # (setting, alpha, seed, meta-step)
    start = [float(nqm.expected_loss(x * np.eye(2), MODEL, 50)) for x in alphas]
    np.testing.assert_allclose(loss[0, :, 0, 0], start, rtol=1e-5)
    assert (loss[0, 0, :, -1] < 0.5 * loss[0, 0, :, 0]).all()
    assert (loss > result["optimum"]).all()
    close = loss <= 1.1 * result["optimum"]
    near = np.where(close.any(-1), close.argmax(-1), np.inf)
    np.testing.assert_array_equal(result["meta_steps_until_within_10_percent"], near)
    assert result["curves"]["magnitudes"][0, 0, 0, 0] == pytest.approx(1)  # A = I
