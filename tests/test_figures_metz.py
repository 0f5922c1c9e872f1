"""Figures of Metz et al. 2019: the toy against closed forms, the network against a loop."""

from functools import cache, partial

from figures import metz_chaos as metz
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from tasks import TASKS, pool_to_8x8, split_images

SLOPE = jax.grad(metz.toy_loss)
CURVATURE = jax.grad(SLOPE)
STEPS = 10  # of every network here: one compilation of the batches
toy_run = jax.jit(metz.toy_run, static_argnums=2)
compute_2abc, compute_9 = (cache(f) for f in (metz.compute_2abc, metz.compute_9))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def task(stand_in):
    """`fmnist_small` on the small stand-in; built once, for its compilations to be kept."""
    data = split_images(stand_in, pool_to_8x8)
    return TASKS["fmnist_small"].build(data, jax.random.key(0))


@pytest.fixture(scope="module")
def fixed(task):
    with jax.enable_x64(True):
        return metz.fix(task, jax.random.key(0), STEPS)


@pytest.fixture(scope="module")
def outer_loss(task, fixed):
    return jax.jit(metz.outer_loss(task, fixed))


@pytest.fixture(scope="module")
def figure_2d(task):
    with jax.enable_x64(True):
        iterations = (1, 3, 6, STEPS)
        return metz.compute_2d(task, jax.random.key(0), 12, STEPS, iterations)


def plain_loop(task, fixed, optimizer, steps):
    """(losses before each update, last parameters) of a loop in Python."""

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(task.loss)(params, fixed.key, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    params, losses = fixed.params, []
    state = optimizer.init(params)
    for t in range(steps):
        batch = jax.tree.map(lambda x, t=t: x[t], fixed.batches)
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses, params


# --- the toy


def test_toy_has_the_papers_minima():
    """Minima 0 at w = 0 and -3.12 at 3.569, barrier 8.64 at 1.681; w_0 is left of all."""
    expected = {
        0.0: (0, 24),
        metz.BARRIER: (8.64, -12.69),
        metz.GLOBAL_MINIMUM: (-3.12, 26.94),
    }
    assert metz.START < 0 and metz.toy_loss(metz.START) == pytest.approx(
        31.45, abs=0.01
    )
    for w, (loss, curvature) in expected.items():
        assert SLOPE(w) == pytest.approx(0, abs=1e-12)
        assert metz.toy_loss(w) == pytest.approx(loss, abs=0.01)
        assert CURVATURE(w) == pytest.approx(curvature, abs=0.01)
    assert metz.BARRIER == pytest.approx(1.681, abs=1e-3)
    assert metz.GLOBAL_MINIMUM == pytest.approx(3.569, abs=1e-3)


@pytest.mark.parametrize("learning_rate, momentum", [(0.02, 0.0), (0.01, 0.85)])
def test_toy_run_equals_optax_step_for_step(learning_rate, momentum):
    """The scan is optax.sgd with momentum, from w_0, in a plain loop."""
    optimizer = optax.sgd(learning_rate, momentum)
    w, steps = jnp.float64(metz.START), 12
    state = optimizer.init(w)
    for found in np.asarray(toy_run(learning_rate, momentum, steps)):
        updates, state = optimizer.update(SLOPE(w), state)
        w = optax.apply_updates(w, updates)
        assert found == pytest.approx(float(w), rel=1e-9)


@pytest.mark.parametrize(
    "theta, setting",
    [
        (0.7, lambda mu: (0.01, mu)),
        (-4.0, lambda log_rate: (jnp.exp(log_rate), 0.8)),
        (-3.5, lambda log_rate: (jnp.exp(log_rate), 0.0)),
    ],
)
def test_slope_equals_finite_differences(theta, setting):
    """At every T, where the final loss is smooth in theta."""
    run = jax.jit(metz.loss_and_slope(setting, 30))
    w, loss, slope = run(jnp.float64(theta))
    np.testing.assert_allclose(loss, metz.toy_loss(w))
    above, below = (run(jnp.float64(theta + h))[1] for h in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (above - below) / 2e-6, rtol=1e-5, atol=1e-6)


@partial(jax.jit, static_argnums=1)
def meta_gradient(theta, steps):
    """dl(w_T)/dtheta by autodiff, momentum 0; g_0 ... g_T, H_0 ... H_T."""

    def last_loss(theta):
        w = metz.toy_run(theta, 0.0, steps)
        return metz.toy_loss(w[-1]), w

    exact, w = jax.grad(last_loss, has_aux=True)(theta)
    w = jnp.insert(w, 0, metz.START)
    return exact, jax.vmap(SLOPE)(w), jax.vmap(CURVATURE)(w)


@given(st.floats(0.002, 0.07), st.sampled_from([1, 2, 8]))
def test_appendix_a_meta_gradient(theta, steps):
    """dl(w_T)/dtheta = <g_T, -sum_i prod_{j>i} (I - theta H_j) g_i>; T = 1: -<g_1, g_0>."""
    exact, g, h = (np.asarray(x) for x in meta_gradient(theta, steps))
    total = sum(np.prod(1 - theta * h[i + 1 : steps]) * g[i] for i in range(steps))
    assert -g[-1] * total == pytest.approx(float(exact), rel=1e-8, abs=1e-10)
    if steps == 1:
        assert float(exact) == pytest.approx(-g[1] * g[0])


def test_appendix_a_slips():
    """Its recursion prints (I - H) for (I - theta H), and - dw/dtheta where + is meant."""
    theta, w_0 = 0.03, metz.START
    dw = jax.jacfwd(lambda theta: metz.toy_run(theta, 0.0, 2))(theta)
    w_1 = metz.toy_run(theta, 0.0, 1)[0]
    partial = -SLOPE(w_1)  # of w_2 with respect to theta, at a fixed w_1
    carried, printed = ((1 - x * CURVATURE(w_1)) * dw[0] for x in (theta, 1.0))
    assert dw[0] == pytest.approx(-float(SLOPE(w_0)))
    assert dw[1] == pytest.approx(float(carried + partial))
    for wrong in (printed + partial, carried - partial):
        assert abs(wrong - dw[1]) > 0.1 * abs(dw[1])


def test_slope_at_the_threshold_grows_by_the_barriers_eigenvalue():
    """From T = 30 on log slope gains ln of the predicted factor per step, within 1 %."""
    single, double = compute_2abc(1e-3), compute_9(1e-3)
    curves = [single["curves"], *double["curves"]]
    predicted = single["growth_per_step_there"], *double["growth_per_step_there"]
    for curve, growth in zip(curves, predicted, strict=True):
        gain = np.diff(np.log(curve["largest"]["at_threshold"][30:]))
        assert growth > 1.3 and gain.mean() == pytest.approx(np.log(growth), rel=1e-2)


def test_growth_at_barrier_is_an_eigenvalue():
    """Of one step's Jacobian in (w, m) on the barrier; 1 - alpha l'' without momentum."""
    curvature = float(CURVATURE(metz.BARRIER))
    for learning_rate, momentum in ((0.01, 0.8), (0.04, 0.0)):
        step = np.array([[1, -learning_rate], [0, 1]])  # w - alpha m, with the new m
        jacobian = step @ np.array([[1, 0], [curvature, momentum]])
        growth = metz.growth_at_barrier(learning_rate, momentum)
        assert growth == pytest.approx(np.abs(np.linalg.eigvals(jacobian)).max())
    assert growth == pytest.approx(1 - 0.04 * curvature)


def test_smoothing_bounds_the_slope():
    """At T = 100 the raw slope has grown by nine decades, the smoothed one by none."""
    result = compute_2abc(1e-3)
    raw, smooth = result["max_slope_at_threshold"], result["max_slope_smoothed"]
    assert (np.diff(np.log10(raw[1:])) > 1.5).all() and raw[-1] > 1e9 * raw[2]
    assert (smooth <= 1.001 * result["bound_of_smoothed_slope"]).all()
    assert smooth[-1] < smooth.max() and smooth[-1] < 1e-6 * raw[-1]


def test_figure_2abc_momentum_chooses_the_minimum():
    """Low momentum ends at 0; above the threshold at 3.569; T = 5 has no steep wall."""
    result = compute_2abc(1e-3)
    momentum, w = result["curves"]["theta"], result["curves"]["w"][:, -1]
    threshold = result["threshold"]
    assert momentum[0] == pytest.approx(0.4) and momentum[-1] == pytest.approx(0.96)
    np.testing.assert_allclose(w[momentum < threshold], 0, atol=0.05)
    above = (momentum > threshold) & (momentum < 0.93)
    np.testing.assert_allclose(w[above], metz.GLOBAL_MINIMUM, atol=0.1)
    assert (w[momentum > 0.93] < 1).any()  # swings back
    for side, minimum in ((-1e-12, 0), (1e-12, metz.GLOBAL_MINIMUM)):
        last = metz.toy_run(0.01, threshold + side, 400)[-1]
        assert last == pytest.approx(minimum, abs=1e-6)
    walls = np.abs(np.diff(result["curves"]["loss"], axis=1)).max(1)
    assert walls[4] < 0.06 and walls[-1] > 3  # per .001 of momentum


def test_figure_9_rates_choose_the_minimum_and_diverge():
    """Low rates end at 0, higher ones at 3.569, the highest count as TOY_LIMIT."""
    result = compute_9(1e-3)
    for row, threshold in zip(result["curves"], result["threshold"], strict=True):
        w, below = row["w"][:, -1], row["theta"] < threshold
        np.testing.assert_allclose(w[below], 0, atol=0.05)
        above = (row["theta"] > threshold) & (row["theta"] < threshold + 0.3)
        assert np.median(np.abs(w[above] - metz.GLOBAL_MINIMUM)) < 0.01
        assert row["loss"][-1, -1] == metz.TOY_LIMIT == row["loss"].max()
        assert np.isfinite(row["loss"]).all()
    assert result["max_slope_smoothed"].max() <= 1.001 * metz.slope_bound(
        np.array([metz.toy_loss(metz.GLOBAL_MINIMUM), metz.TOY_LIMIT])
    )


# --- the variational loss


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_smoothed_of_a_parabola(a, b, c):
    """a x^2 + b x + c becomes itself + a sigma^2, its slope 2 a x + b."""
    x = metz.grid_for(0.0, 0.1, 0.002)
    mean, slope = metz.smoothed(a * x**2 + b * x + c, 0.002)
    inner = np.linspace(0, 0.1, 51)
    expected = a * (inner**2 + metz.SIGMA**2) + b * inner + c
    np.testing.assert_allclose(mean, expected, atol=2e-6)
    np.testing.assert_allclose(slope, 2 * a * inner + b, atol=1e-9)


@hypothesis.settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_smoothed_slope_is_bounded_whatever_the_loss(seed):
    """At most (max - min) / (sigma sqrt(2 pi)); a step function attains it."""
    values = np.random.default_rng(seed).standard_cauchy(300)
    assert (np.abs(metz.smoothed(values, 2e-3)[1]) <= metz.slope_bound(values)).all()
    step = np.repeat([2.0, 5.0], 500)
    largest = np.abs(metz.smoothed(step, 2e-4)[1]).max()
    assert largest == pytest.approx(metz.slope_bound(step), rel=5e-3)


def test_gradient_norms_of_a_plane():
    """3 x - 4 y has a gradient of norm 5 everywhere, smoothed or not, and is unchanged."""
    x = metz.grid_for(0.0, 0.05, 0.005)
    plane = 3 * x[None] - 4 * x[:, None]
    mean, norm, smooth_norm = metz.gradient_norms(np.stack([plane, 2 * plane]), 0.005)
    inner = np.linspace(0, 0.05, 11)
    np.testing.assert_allclose(
        mean[0], 3 * inner[None] - 4 * inner[:, None], atol=1e-12
    )
    for found in (norm, smooth_norm):
        assert found.shape == (2, 11, 11)
        np.testing.assert_allclose(found[0], 5)
        np.testing.assert_allclose(found[1], 10)


# --- the network


@pytest.mark.heavy
def test_figure_2d_equals_a_plain_adam_loop(task, fixed, figure_2d):
    """The highest rate's losses, projected end and held-out loss, by optax in a loop."""
    result = figure_2d
    losses, params = plain_loop(task, fixed, optax.adam(0.1484), STEPS)
    np.testing.assert_allclose(result["curves"]["loss"][-1], losses, rtol=1e-6)
    final = task.loss(params, fixed.key, fixed.valid)
    assert result["final_valid_loss"][-1] == pytest.approx(float(final))
    moved = ravel_pytree(params)[0] - ravel_pytree(fixed.params)[0]
    directions = np.random.default_rng(0).normal(size=(len(moved), 2))
    expected = moved @ np.linalg.qr(directions)[0]
    np.testing.assert_allclose(result["curves"]["path"][-1, -1], expected, rtol=1e-5)


@pytest.mark.heavy
def test_figure_2d_sensitivity_grows_from_plain_scaling(figure_2d):
    """After one step it is the distance travelled, for Adam moves by rate times sign; its
    share of the distance grows from there."""
    result = figure_2d
    for name in ("spread_over_log_rate", "neighbors_over_log_rate_median"):
        ratio = result[name] / result["travelled"]
        assert ratio[0] == pytest.approx(1, rel=1e-3)
        assert (np.diff(ratio) > 0).all() and ratio[-1] > 2, (name, ratio)


def test_outer_loss_of_a_long_run_holds_the_short_ones(task, fixed, outer_loss):
    """T = 3 read off a run of 10 steps is a run of 3 steps by optax.sgd in a loop."""
    long = outer_loss(jnp.log(0.5), jnp.log(0.1))
    losses, _ = plain_loop(task, fixed, optax.sgd(0.5, 0.9), 3)
    assert long[2] == pytest.approx(np.mean(losses)) and len(long) == STEPS


def test_outer_loss_counts_divergence_as_the_limit(task, outer_loss):
    """A learning rate of e^400 gives nan: the mean is that of loss_0 and the limit."""
    loss = outer_loss(jnp.float64(400.0), jnp.log(0.1))
    expected = loss[0] + (STEPS - 1) * task.loss_limit
    assert loss[-1] == pytest.approx(float(expected) / STEPS)


def test_outer_loss_of_a_relu_network_has_true_steps(task, fixed):
    """Over 2 steps the mean loss is continuous; over 3 a jump outlives bisection, and the
    slopes by autodiff on either side of it do not know."""
    three = fixed._replace(batches=jax.tree.map(lambda x: x[:3], fixed.batches))
    loss, rest = metz.outer_loss(task, three), jnp.log(0.1)

    def value_and_slope(log_rate):
        one = jnp.ones_like(log_rate)
        return jax.jvp(lambda x: loss(x, rest), (log_rate,), (one,))

    at = jax.jit(jax.vmap(value_and_slope))
    low, high = 0.0, 0.7
    for _ in range(9):
        grid = np.linspace(low, high, 33)
        values, slopes = at(grid)
        change = np.abs(np.diff(values, axis=0))
        low, high = grid[change[:, 2].argmax() + np.arange(2)]
    jump = change.max(0)
    assert high - low < 1e-12 and jump[1] < 1e-10 and jump[2] > 1e-5
    assert np.abs(slopes).max() < 10


def test_figure_2ef_slices_agree_where_they_cross(task):
    """The square's center is on the line, and the smoothed line keeps its bounds."""
    cut = metz.Slice((0.9, 1.0), 0.005, 0.005, 5, (0.95, 0.9))
    result = metz.compute_2ef(task, jax.random.key(0), (2, STEPS), cut)
    curves = result["curves"]
    middle = curves["square"][:, 2, 2]  # at the center: a rate of .95, momentum .9
    for found, line in zip(middle, curves["loss"], strict=True):
        nearby = np.interp(0.95, curves["rate"], line)
        assert found == pytest.approx(nearby, abs=np.abs(np.diff(line)).max())
    assert curves["rate"][[0, -1]] == pytest.approx([0.9, 1.0], rel=3e-3)
    bound = result["bound_of_smoothed_slope"]
    assert (result["max_slope_smoothed"] <= 1.001 * bound).all()
    variation = result["total_variation"]
    assert (result["total_variation_smoothed"] <= 1.2 * variation).all()
    assert (np.diff(variation) > 0).all()
