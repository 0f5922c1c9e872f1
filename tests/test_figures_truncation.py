"""Figure 3 of Metz et al. 2019 on the noisy quadratic model, where means are cheap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from companions.lopts import hand_designed
from experiments import kinds
from figures import metz_truncation as truncation

SGD = hand_designed(optax.sgd, learning_rate=0.1)
QUADRATIC = truncation.Problem(lambda data, key: kinds.quadratic(), SGD)
BIASED = truncation.Setting(240, (2,), (), (), 240, 2, (0.15,), sigma=0.03)
TINY = truncation.Setting(
    steps=8,
    lengths=(4,),
    starts=(0.1, 0.4),
    probes=(0.4, 0.1, 0.6),
    spent=16,
    seeds=3,
    rates=(0.1, 0.4, 0.6, 1.2),
    estimators=("truncated BPTT", "PES"),
)


@pytest.fixture(scope="module")
def result():
    return truncation.compute_metz3(QUADRATIC, {}, TINY)


def compiled_full(steps):
    run = truncation.full_gradient(QUADRATIC, steps)
    return jax.jit(jax.vmap(run, in_axes=(None, None, 0)))


@pytest.fixture(scope="module")
def eight_steps():
    """Rate 0.1: keys (4000,), losses and slopes (4000, T = 8)."""
    keys = jax.random.split(jax.random.key(1), 4000)
    both = compiled_full(8)({}, np.float32(np.log(0.1)), keys)
    return keys, *(np.asarray(x, float) for x in both)


def mean_and_error(samples):
    return samples.mean(), samples.std() / len(samples) ** 0.5


@pytest.mark.heavy
def test_truncation_turns_the_gradient_around_and_pes_does_not():
    """At 0.15, T = 240: the gradient asks for a higher rate, windows of 2 for a lower."""
    with jax.enable_x64(True):
        log_rate, keys = np.log(0.15), jax.random.split(jax.random.key(0), 8000)
        full = compiled_full(BIASED.steps)
        exact, error = mean_and_error(np.asarray(full({}, log_rate, keys)[1]).mean(1))
        assert exact < -6 * error
        above, below = (full({}, log_rate + h, keys)[0] for h in (1e-5, -1e-5))
        difference = float((above - below).mean()) / 2e-5
        assert exact == pytest.approx(difference, rel=1e-5)

        found = {}
        for name in ("truncated BPTT", "PES"):
            make = truncation.ESTIMATORS[name]
            run = truncation.meta_training(make, QUADRATIC, 2, BIASED)
            run = jax.jit(jax.vmap(run, in_axes=(None, None, None, None, 0)))
            slopes = run({}, log_rate, np.int32(120), np.float64(0), keys)[1]
            found[name] = mean_and_error(np.asarray(slopes)[:, :120].mean(1))
    mean, spread = found["truncated BPTT"]
    assert mean > 6 * spread
    mean, spread = found["PES"]
    assert mean < -6 * spread
    assert abs(mean - exact) < 6 * np.hypot(spread, error)


def test_losses_are_those_of_a_plain_loop(eight_steps):
    """By optax.sgd, step for step, each batch's loss before its update."""
    keys, losses, _ = eight_steps
    task, optimizer, key = kinds.quadratic(), optax.sgd(0.1), keys[0]
    params, expected = task.init(key), []
    for t in range(8):
        batch_key, _ = jax.random.split(jax.random.fold_in(key, t))
        batch = task.batch(batch_key, "train")
        loss, grads = jax.value_and_grad(task.loss)(params, key, batch)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        params = optax.apply_updates(params, updates)
        expected.append(float(loss))
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4)


@pytest.mark.heavy
def test_best_rate_is_the_least_of_the_grid(result):
    """It is the argmin of the mean over T, with 1.2 close to divergence the worst."""
    loss = result["grid_loss"]
    assert result["best_rate"] == TINY.rates[int(np.argmin(loss))]
    assert loss.shape == (4,) and np.argmax(loss) == 3


def test_numbers_are_those_of_the_curves(result):
    """Paths begin at their start; final rates are geometric means over the seeds."""
    paths = result["curves"]["paths"]
    assert result["final_rate"].shape == (2, 1, 2) and len(paths) == 4
    for e, name in enumerate(result["estimators"]):
        for j, start in enumerate(TINY.starts):
            path = paths[name, 0, j]
            assert path.shape == (3, 16 // 4 + 1) and np.isfinite(path).all()
            np.testing.assert_allclose(path[:, 0], np.log(start), rtol=1e-6)
            geometric = np.exp(path[:, -1]).prod() ** (1 / 3)
            assert result["final_rate"][e, 0, j] == pytest.approx(geometric)
    whole = [result["curves"]["whole"][0, j].mean() for j in range(3)]
    np.testing.assert_allclose(result["full_gradient"], whole)
    short = [result["curves"]["truncated"][0, j].mean() for j in range(3)]
    np.testing.assert_allclose(result["truncated_gradient"][0], short)


def test_first_window_is_not_truncated(eight_steps):
    """Before the first cut both see the same: equal means over 4,000 trajectories."""
    keys, _, slope = eight_steps
    log_rate = np.float32(np.log(0.1))
    run = truncation.meta_training(truncation.truncated_bptt, QUADRATIC, 4, TINY)
    run = jax.jit(jax.vmap(run, in_axes=(None, None, None, None, 0)))
    found = run({}, log_rate, np.int32(2), np.float32(0), keys)[1]
    found = np.asarray(found, float)[:, :2]
    differs = []
    for window in range(2):
        whole = slope[:, 4 * window : 4 * window + 4].mean(1)
        mean, error = mean_and_error(whole)
        other, spread = mean_and_error(found[:, window])
        differs.append(abs(mean - other) > 6 * np.hypot(error, spread))
    assert differs == [False, True]


def test_adam_is_optax_adam_and_backpropagates_where_a_gradient_is_zero():
    """eps_root = 1e-16 changes no step by 1e-6 of it; without, the meta-gradient is nan."""

    def after_two_steps(log_rate, optimizer):
        theta, params = {"learning_rate": log_rate}, jnp.array([1.0, 2.0])
        state = optimizer.init(params)
        for _ in range(2):
            grads = jax.grad(lambda p: ((p * jnp.array([1, 0])) ** 2).sum())(params)
            updates, state = optimizer.update(theta, grads, state, params)
            params = params + updates
        return params.sum()

    plain, value_and_grad = hand_designed(optax.adam, learning_rate=1e-3), {}
    for name, optimizer in (("ours", truncation.ADAM), ("plain", plain)):
        both = jax.value_and_grad(after_two_steps)
        value_and_grad[name] = both(jnp.float32(-3.0), optimizer)
    (ours, slope), (expected, broken) = value_and_grad.values()
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)
    assert np.isfinite(slope) and np.isnan(broken)


def test_mnist_small_is_the_papers_size(stand_in, monkeypatch):
    """14x14 pixels, each the mean of 2x2, and two hidden layers of 32."""
    monkeypatch.setattr(kinds.datasets, "mnist", lambda *_, **__: stand_in)
    data, _ = tasks.TASKS["mnist_small"].load()
    images = np.asarray(data["test"].images)
    corners = stand_in.test_images.astype(float)
    blocks = [corners[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    assert images.shape == (500, 14, 14, 1)
    np.testing.assert_array_equal(images, np.round(sum(blocks) / 4))
    params = tasks.TASKS["mnist_small"].build(data, None).init(jax.random.key(0))
    assert [x["w"].shape for x in params] == [(196, 32), (32, 32), (32, 10)]
