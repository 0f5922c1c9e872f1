"""Metz et al. 2019: its figures against closed forms and plain loops, its Algorithm 1."""

import json
import pathlib
from functools import cache, partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import estimators
import store
import tasks
import train
from baselines import BASELINES
from companions import lopts, metz
from experiments.catalogue import TASKS
from figures import __main__ as figures
from figures import metz_chaos as chaos
from figures import metz_conv
from figures import metz_truncation as truncation

KEY = jax.random.key(0)
STEPS = 10  # of every network here: one compilation of the batches
SLOPE, CURVATURE = jax.grad(chaos.toy_loss), jax.grad(jax.grad(chaos.toy_loss))
SGD = lopts.hand_designed(optax.sgd, learning_rate=0.1)
BUILD = partial(tasks.quadratic, {})
toy_run = jax.jit(chaos.toy_run, static_argnums=2)
slopes_of_a_rate = jax.jit(chaos.loss_and_slope(lambda rate: (rate, 0.0), 8))
compute_2abc, compute_9 = (cache(f) for f in (chaos.compute_2abc, chaos.compute_9))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# --- one weight
def test_toy_has_the_papers_minima():
    """Minima 0 at w = 0 and -3.12 at 3.569, barrier 8.64 at 1.681. w_0 is left of all."""
    w = np.array([0, chaos.BARRIER, chaos.GLOBAL_MINIMUM])
    np.testing.assert_allclose(w, [0, 1.681, 3.569], atol=1e-3)
    np.testing.assert_allclose(chaos.toy_loss(w), [0, 8.64, -3.12], atol=0.01)
    np.testing.assert_allclose(jax.vmap(SLOPE)(w), 0, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(CURVATURE)(w), [24, -12.69, 26.94], atol=0.01)
    assert chaos.START < 0


@pytest.mark.parametrize("learning_rate, momentum", [(0.02, 0.0), (0.01, 0.85)])
def test_toy_run_equals_optax_step_for_step(learning_rate, momentum):
    """The scan is optax.sgd with momentum, from w_0, in a plain loop."""
    optimizer, w = optax.sgd(learning_rate, momentum), jnp.float64(chaos.START)
    state = optimizer.init(w)
    for found in np.asarray(toy_run(learning_rate, momentum, 12)):
        updates, state = optimizer.update(SLOPE(w), state)
        w = optax.apply_updates(w, updates)
        assert found == pytest.approx(float(w), rel=1e-9)


@pytest.mark.parametrize("theta, momentum", [(0.7, None), (-4.0, 0.8), (-3.5, 0.0)])
def test_slope_equals_finite_differences(theta, momentum):
    """At every T, where the final loss is smooth in theta: the momentum, or ln(rate)."""
    setting = lambda x: (0.01, x) if momentum is None else (jnp.exp(x), momentum)  # noqa: E731
    run = jax.jit(chaos.loss_and_slope(setting, 30))
    slope, (w, loss) = run(jnp.float64(theta))
    np.testing.assert_allclose(loss, chaos.toy_loss(w))
    above, below = (run(jnp.float64(theta + h))[1][1] for h in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (above - below) / 2e-6, rtol=1e-5, atol=1e-6)


def meta_gradient(theta, steps):
    """dl(w_T)/dtheta by autodiff, momentum 0; g_0 ... g_T, H_0 ... H_T."""
    exact, (w, _) = slopes_of_a_rate(theta)
    w = np.insert(w[:steps], 0, chaos.START)
    return exact[steps - 1], jax.vmap(SLOPE)(w), jax.vmap(CURVATURE)(w)


@given(st.floats(0.002, 0.07), st.sampled_from([1, 2, 8]))
def test_appendix_a_meta_gradient(theta, steps):
    """dl(w_T)/dtheta = <g_T, -sum_i prod_{j>i} (I - theta H_j) g_i>; T = 1: -<g_1, g_0>."""
    exact, g, h = (np.asarray(x) for x in meta_gradient(theta, steps))
    total = sum(np.prod(1 - theta * h[i + 1 : steps]) * g[i] for i in range(steps))
    assert -g[-1] * total == pytest.approx(float(exact), rel=1e-8, abs=1e-10)
    assert steps > 1 or float(exact) == pytest.approx(-g[1] * g[0])


def test_appendix_a_slips():
    """Its recursion prints (I - H) for (I - theta H), and - dw/dtheta where + is meant."""
    exact, g, h = (np.asarray(x) for x in meta_gradient(0.03, 2))
    for wrong in ((1 - h[1]) * g[0] + g[1], (1 - 0.03 * h[1]) * g[0] - g[1]):
        assert abs(-g[2] * wrong - exact) > 0.1 * abs(exact)


def test_slope_at_the_threshold_grows_by_the_barriers_eigenvalue():
    """From T = 30 on log slope gains, within 1 %, ln of the eigenvalue of one step's
    Jacobian in (w, m) on the barrier. Without momentum the eigenvalue is 1 - alpha l''."""
    curvature = float(CURVATURE(chaos.BARRIER))
    for row in (*compute_2abc(1e-3), *compute_9(1e-3)):
        rate, momentum = row["learning_rate_and_momentum_there"]
        step = np.array([[1, -rate], [0, 1]])  # w - alpha m, with the new m
        jacobian = step @ [[1, 0], [curvature, momentum]]
        growth = row["growth_per_step_there"]
        assert growth == pytest.approx(np.abs(np.linalg.eigvals(jacobian)).max())
        gain = np.diff(np.log(row["curves"]["max_slope_at_threshold"][30:])).mean()
        assert growth > 1.3 and gain == pytest.approx(np.log(growth), rel=1e-2)
    assert growth == pytest.approx(1 - rate * curvature) and momentum == 0


def test_figure_2abc_momentum_chooses_the_minimum():
    """Low momentum ends at 0, above the threshold at 3.569. T = 5 has no steep wall."""
    (result,) = compute_2abc(1e-3)
    momentum, w = result["curves"]["theta"], result["curves"]["w"][:, -1]
    threshold = result["threshold"]
    assert momentum[[0, -1]] == pytest.approx([0.4, 0.96])
    np.testing.assert_allclose(w[momentum < threshold], 0, atol=0.05)
    above = (momentum > threshold) & (momentum < 0.93)
    np.testing.assert_allclose(w[above], chaos.GLOBAL_MINIMUM, atol=0.1)
    assert (w[momentum > 0.93] < 1).any()  # swings back
    ends = [toy_run(0.01, threshold + side, 400)[-1] for side in (-1e-12, 1e-12)]
    assert ends == pytest.approx([0, chaos.GLOBAL_MINIMUM], abs=1e-6)
    walls = np.abs(np.diff(result["curves"]["loss"], axis=1)).max(1)
    assert walls[4] < 0.06 and walls[-1] > 3  # per .001 of momentum


def test_smoothing_bounds_the_slope():
    """At T = 100 the raw slope has grown by nine decades, the smoothed one by none."""
    (result,) = compute_2abc(1e-3)
    raw, smooth = result["max_slope_at_threshold"], result["max_slope_smoothed"]
    assert (np.diff(np.log10(raw[1:])) > 1.5).all() and raw[-1] > 1e9 * raw[2]
    assert (smooth <= 1.001 * result["bound_of_smoothed_slope"]).all()
    assert smooth[-1] < smooth.max() and smooth[-1] < 1e-6 * raw[-1]


def test_figure_9_rates_choose_the_minimum_and_diverge():
    """Low rates end at 0, higher ones at 3.569, the highest count as TOY_LIMIT."""
    bound = chaos.slope_bound(np.array([chaos.toy_loss(chaos.GLOBAL_MINIMUM), 40]))
    for row in compute_9(1e-3):
        beyond, loss = row["curves"]["theta"] - row["threshold"], row["curves"]["loss"]
        w = row["curves"]["w"][:, -1]
        np.testing.assert_allclose(w[beyond < 0], 0, atol=0.05)
        above = w[(beyond > 0) & (beyond < 0.3)]
        assert np.median(np.abs(above - chaos.GLOBAL_MINIMUM)) < 0.01
        assert loss[-1, -1] == chaos.TOY_LIMIT == loss.max() and np.isfinite(loss).all()
        assert row["max_slope_smoothed"].max() <= 1.001 * bound


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_smoothed_of_a_parabola(a, b, c):
    """a x^2 + b x + c becomes itself + a sigma^2, its slope 2 a x + b, along any axis."""
    x, inner = chaos.grid_for(0.0, 0.1, 0.002)
    values = a * x**2 + b * x + c
    expected, slope = values[inner] + a * chaos.SIGMA**2, 2 * a * x[inner] + b
    for axis, grid in ((-1, values), (0, np.stack([values] * 2, 1))):
        mean, found = (y.T for y in chaos.smoothed(grid, 0.002, axis))
        np.testing.assert_allclose(mean - expected, 0, atol=2e-6)
        np.testing.assert_allclose(found - slope, 0, atol=1e-9)


@hypothesis.settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_smoothed_slope_is_bounded_whatever_the_loss(seed):
    """At most (max - min) / (sigma sqrt(2 pi)). A step function attains it."""
    values = np.random.default_rng(seed).standard_cauchy(300)
    assert (np.abs(chaos.smoothed(values, 2e-3)[1]) <= chaos.slope_bound(values)).all()
    step = np.repeat([2.0, 5.0], 500)
    largest = np.abs(chaos.smoothed(step, 2e-4)[1]).max()
    assert largest == pytest.approx(chaos.slope_bound(step), rel=5e-3)


# --- a network
@pytest.fixture(scope="module")
def task(stand_in):
    """`fmnist_small` on the small stand-in, built once, so that its programs are kept."""
    data = tasks.split_images(stand_in, tasks.pool_to_8x8)
    return TASKS["fmnist_small"].build(data, KEY)


@pytest.fixture(scope="module")
def outer_loss(task):
    with jax.enable_x64(True):
        return jax.jit(chaos.outer_loss(task, KEY, STEPS))


def plain_loop(task, optimizer, steps):
    """Losses before each update, parameters before and after, and the held-out loss, of a
    loop in Python."""
    init_key, batch_key, valid_key, _ = jax.random.split(KEY, 4)
    start, unravel = ravel_pytree(task.init(init_key))
    loss = jax.jit(lambda params, batch: task.loss(unravel(params), KEY, batch))
    slope, losses = jax.jit(jax.grad(loss)), []
    params, state = start, optimizer.init(start)
    for key in jax.random.split(batch_key, STEPS)[:steps]:
        batch = task.batch(key, "train")
        losses.append(float(loss(params, batch)))
        updates, state = optimizer.update(slope(params, batch), state)
        params = params + updates
    return losses, start, params, loss(params, task.batch(valid_key, "valid"))


@pytest.mark.heavy
def test_figure_2d_equals_a_plain_adam_loop(task):
    """The highest rate's losses, projected end and held-out loss, by optax in a loop. After
    one step the sensitivity is the distance travelled, since Adam moves by rate times sign.
    Its share of the distance grows from there."""
    figure = chaos.compute_2d(task, KEY, 12, [1, 3, 6, STEPS])
    losses, start, end, held_out = plain_loop(task, optax.adam(0.1484), STEPS)
    np.testing.assert_allclose(figure["curves"]["loss"][-1], losses, rtol=1e-6)
    assert figure["final_valid_loss"][-1] == pytest.approx(float(held_out))
    directions = np.random.default_rng(0).normal(size=(len(start), 2))
    expected = (end - start) @ np.linalg.qr(directions)[0]
    np.testing.assert_allclose(figure["curves"]["path"][-1, -1], expected, rtol=1e-5)
    for name in ("spread_over_log_rate", "neighbors_over_log_rate_median"):
        ratio = figure[name] / figure["travelled"]
        assert ratio[0] == pytest.approx(1, rel=1e-3)
        assert (np.diff(ratio) > 0).all() and ratio[-1] > 2, (name, ratio)


def test_outer_loss_counts_steps_and_divergence(task, outer_loss):
    """T = 3 read off a run of 10 steps is a run of 3 steps by optax.sgd in a loop. A rate
    of e^400 gives nan: the mean is that of loss_0 and the limit."""
    long = outer_loss(jnp.log(0.5), jnp.log(0.1))
    losses, *_ = plain_loop(task, optax.sgd(0.5, 0.9), 3)
    assert long[2] == pytest.approx(np.mean(losses)) and len(long) == STEPS
    lost = outer_loss(jnp.float64(400.0), jnp.log(0.1))
    expected = lost[0] + (STEPS - 1) * task.loss_limit
    assert lost[-1] == pytest.approx(float(expected) / STEPS)


def test_outer_loss_of_a_relu_network_has_true_steps(outer_loss):
    """Over 2 steps the mean loss is continuous. Over 3 a jump outlives bisection, and the
    slopes by autodiff on either side do not show it."""
    at = jax.jit(jax.vmap(lambda x: jax.jvp(outer_loss, (x,), (jnp.ones_like(x),))))
    low, high = 0.0, 0.7
    for _ in range(9):
        grid = np.linspace(low, high, 33)
        values, slopes = (x[:, :3] for x in at(grid))
        change = np.abs(np.diff(values, axis=0))
        low, high = grid[change[:, 2].argmax() + np.arange(2)]
    jump = change.max(0)
    assert high - low < 1e-12 and jump[1] < 1e-10 and jump[2] > 1e-5
    assert np.abs(slopes).max() < 10


def test_figure_2ef_slices_agree_where_they_cross(task):
    """The square's center is on the line, the smoothed line keeps its bounds, and the
    variation grows with T."""
    line, side = (1.15, 1.25, 0.005), (0.01, 0.005)
    result = chaos.compute_2ef(task, KEY, [2, STEPS], line, side)
    curves, bound = result["curves"], result["bound_of_smoothed_slope"]
    middle = curves["square"][:, 2, 2]  # at the center: a rate of 1.2, momentum .9
    for found, values in zip(middle, curves["loss"], strict=True):
        nearby = np.interp(1.2, curves["rate"], values)
        assert found == pytest.approx(nearby, abs=np.abs(np.diff(values)).max())
    assert curves["rate"][[0, -1]] == pytest.approx(line[:2], rel=3e-3)
    assert (result["max_slope_smoothed"] <= 1.001 * bound).all()
    raw, smooth = (np.abs(np.diff(curves[k])).sum(1) for k in ("loss", "smoothed"))
    assert (smooth <= 1.2 * raw).all() and (np.diff(raw) > 0).all()


# --- truncation, on the noisy quadratic model, where means are cheap
def runs(make, *args):
    """(ln rate, keys) -> what the run of make(*args, ...) returns, stacked."""
    return jax.jit(jax.vmap(make(*args, BUILD, SGD), in_axes=(None, 0)))


def mean_and_error(samples):
    return samples.mean(), samples.std() / len(samples) ** 0.5


@pytest.mark.heavy
def test_truncation_turns_the_gradient_around_and_pes_does_not():
    """At 0.15, T = 240: the gradient asks for a higher rate, windows of 2 for a lower."""
    log_rate, keys = np.log(0.15), jax.random.split(KEY, 8000)
    full = runs(truncation.full_gradient, 240)
    exact, error = mean_and_error(full(log_rate, keys)[1].mean(1))
    above, below = (full(log_rate + h, keys)[0].mean() for h in (1e-5, -1e-5))
    assert exact < -6 * error
    assert float(exact) == pytest.approx(float(above - below) / 2e-5, rel=1e-5)
    found = {}
    for make in (estimators.truncated_bptt, partial(estimators.pes, sigma=0.03)):
        run = runs(truncation.meta_training, make, 2, 240, 240, 0.0)
        found[make] = mean_and_error(run(log_rate, keys)[1].mean(1))
    (truncated, truncated_error), (pes, pes_error) = found.values()
    assert truncated > 6 * truncated_error and pes < -6 * pes_error
    assert abs(pes - exact) < 6 * np.hypot(pes_error, error)


def test_first_window_is_not_truncated():
    """At a rate of 0.1, T = 8. Before the first cut both gradients are equal in the mean
    over 4,000 trajectories, after it they are not."""
    log_rate, keys = np.log(0.1), jax.random.split(jax.random.key(1), 4000)
    slope = runs(truncation.full_gradient, 8)(log_rate, keys)[1]
    run = runs(truncation.meta_training, estimators.truncated_bptt, 4, 8, 8, 0.0)
    found, differs = run(log_rate, keys)[1], []
    for window in range(2):
        mean, error = mean_and_error(slope[:, 4 * window : 4 * window + 4].mean(1))
        other, spread = mean_and_error(found[:, window])
        differs.append(bool(abs(mean - other) > 6 * np.hypot(error, spread)))
    assert differs == [False, True]


def test_figure_3s_numbers_are_those_of_its_curves():
    """Paths begin at their start. Final rates are geometric means over the seeds. The best
    rate is the least of the grid, and 1.3, close to divergence, the worst."""
    names, starts, rates = ("truncated BPTT", "PES"), (0.1, 0.4), (0.1, 0.4, 0.6, 1.3)
    setting = truncation.Setting(8, 16, (4,), starts, rates, (1, 0, 2), 3, names)
    result = truncation.compute_metz3(tasks.quadratic, {}, setting, SGD)
    curves, loss = result["curves"], result["grid_loss"]
    assert result["best_rate"] == rates[int(np.argmin(loss))]
    assert loss.shape == (4,) and np.argmax(loss) == 3
    for path, final in zip(curves["paths"].values(), result["final_rate"], strict=True):
        assert path.shape == (2, 3, 16 // 4 + 1) and np.isfinite(path).all()
        np.testing.assert_allclose(path[:, :, 0].T, [np.log(starts)] * 3)
        np.testing.assert_allclose(final[0], np.exp(path[:, :, -1]).prod(1) ** (1 / 3))
    np.testing.assert_allclose(result["full_gradient"], curves["whole"][4].mean(1))
    short = curves["truncated"][4].mean(1)
    np.testing.assert_allclose(result["truncated_gradient"], [short])


def test_adam_is_optax_adam_and_backpropagates_where_a_gradient_is_zero():
    """eps_root = 1e-16 changes no step by 1e-6. Without it the meta-gradient is nan."""

    def after_two_steps(log_rate, optimizer):
        params = jnp.array([1.0, 2.0])
        state, theta = optimizer.init(params), {"learning_rate": log_rate}
        for _ in range(2):
            grads = 2 * params * jnp.array([1, 0])
            updates, state = optimizer.update(theta, grads, state, params)
            params = params + updates
        return params.sum()

    both = jax.value_and_grad(after_two_steps)
    ours, slope = both(-3.0, truncation.ADAM)
    plain, broken = both(-3.0, lopts.hand_designed(optax.adam, learning_rate=1e-3))
    assert float(ours) == pytest.approx(float(plain), rel=1e-6)
    assert np.isfinite(slope) and np.isnan(broken)


def test_mnist_small_is_the_papers_size(stand_in, use_stand_in):
    """14x14 pixels, each the mean of 2x2, and two hidden layers of 32."""
    data, _ = TASKS["mnist_small"].load()
    means = stand_in.test_images.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    np.testing.assert_array_equal(data["test"].images, np.round(means))
    params = TASKS["mnist_small"].build(data, KEY).init(KEY)
    assert [x["w"].shape for x in params] == [(196, 32), (32, 32), (32, 10)]


# --- Algorithm 1
@pytest.mark.parametrize("windows", [1, 2, 4])
def test_several_windows_are_one_longer_window(windows):
    """A traced number of windows, at most 4: carry, mean loss and gradient of so many. Each
    has a key of its own."""
    noisy = estimators.unroll(None, lambda th, s, key: (s, jax.random.normal(key)), 2)
    drawn = metz.several(noisy, windows, windows).run(0.9, 1.0, KEY)[1]
    assert len(set(drawn.tolist())) == 2 * windows
    problem = estimators.unroll(lambda key: 1.0, lambda th, s, key: (s * th, s * th), 3)

    def run(theta, windows):
        carry, losses = metz.several(problem, windows, 4).run(theta, 1.0, KEY)
        return losses.mean(), (carry, losses)

    both = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, (carry, losses)), slope = both(0.9, jnp.int32(windows))
    t = np.arange(1, 3 * windows + 1)  # the loss after t steps is theta^t
    assert losses.shape == (12,) and carry == pytest.approx(0.9 ** t[-1])
    assert loss == pytest.approx((0.9**t).mean())
    assert slope == pytest.approx((t * 0.9 ** (t - 1)).mean())


@pytest.mark.parametrize("name, split", [("fresh", "train"), ("valid", "valid")])
def test_objective_is_the_loss_after_the_update(name, split, task):
    """Equation 3 on a batch of its own split, at the parameters the update made."""
    optimizer, theta = BASELINES["sgdm"], {"learning_rate": jnp.float32(0.5)}
    args = lambda key: task, optimizer, theta  # noqa: E731
    carry = tasks.fresh(*args[:2], KEY)
    after, loss = metz.OBJECTIVES[name](*args, carry, KEY)
    inner_key, batch_key, _ = jax.random.split(KEY, 3)
    same, before = tasks.inner_step(*args, carry, inner_key)
    jax.tree.map(np.testing.assert_array_equal, after.params, same.params)
    expected = task.loss(after.params, KEY, task.batch(batch_key, split))
    assert loss == pytest.approx(float(expected)) and loss != before


def test_unroll_grows_as_told():
    """From 1 to 32 windows over the meta-steps: halfway 16.5, or the root of 32, or 32."""
    halfway = {"linear": 16.5, "log": 32**0.5, "constant": 32}
    for name, windows in halfway.items():
        found = [metz.GROWTHS[name](32, share) for share in (0, 0.5, 1)]
        first = 32 if name == "constant" else 1
        assert found == pytest.approx([first, windows, 32])


def test_jitter_varies_the_unroll_within_its_share():
    """+-20 % of 100 windows: evenly between 80 and 120, by the key. Never less than one."""
    drawn = jax.vmap(partial(metz.windows_drawn, 100, 0.2))(jax.random.split(KEY, 500))
    assert drawn.min() in (80, 81) and drawn.max() in (119, 120)
    assert abs(float(drawn.mean()) - 100) < 6 * 40 / 12**0.5 / 500**0.5
    assert metz.windows_drawn(100, 0.0, KEY) == 100
    assert metz.windows_drawn(1, 0.9, KEY) >= 1


def test_family_of_tasks_draws_its_classes(use_stand_in):
    """Ten classes of a hundred in an order of their own, for a network of D.2's 19,722
    parameters. Labels name the drawn class, and a run keeps its member to the end."""
    data, _ = metz.TASKS["conv_classes_small"].load()
    build = partial(metz.TASKS["conv_classes_small"].build, data)
    keys = jax.random.split(KEY, 4)
    drawn = [[build(jax.random.key(i)).batch(k, "train") for k in keys] for i in (0, 1)]
    (x, y), (other, _) = (
        [np.concatenate(z) for z in zip(*d, strict=True)] for d in drawn
    )
    class_of = {
        p.tobytes(): c for c in range(100) for p in np.asarray(data["train"][c])
    }
    raw = np.round(np.asarray(x) * 255).astype(np.uint8)
    names = {(int(i), class_of[p.tobytes()]) for i, p in zip(y, raw, strict=True)}
    labels, classes = (set(x) for x in zip(*names, strict=True))
    assert len(names) == len(classes) == 10 and labels == set(range(10))
    assert (x != other).any() and build(KEY).loss_limit == 1.5 * np.log(10)
    begun = tasks.fresh(build, BASELINES["sgdm"], jax.random.key(1))
    assert sum(p.size for p in jax.tree.leaves(begun.params)) == 19_722
    theta = {"learning_rate": jnp.float32(0.1)}
    after, _ = tasks.inner_step(build, BASELINES["sgdm"], theta, begun, KEY)
    np.testing.assert_array_equal(after.member, jax.random.key_data(jax.random.key(1)))


METZ = "--task quadratic --steps 12 --horizon 20 --truncation 5 --particles 4"
BAD_INPUT = {
    "--unroll 7": "--unroll must be whole windows",
    "--unroll 40": "up to --horizon",
    "--jitter 1.5": "--jitter must be in 0 .. 1",
    "--beta3 1": "--beta3",
    "--optimizer sgd --init theta.npz": "is not for sgd",
}


@pytest.mark.heavy
def test_algorithm_1_as_a_command(tmp_path, monkeypatch, capsys):
    """The card is of an MLP optimizer and counts the inner steps of unrolls that grow from
    one window to two. --init takes its theta. What is wrong is one line and exit code 2."""
    monkeypatch.chdir(tmp_path)

    def command(flags):
        with jax.enable_x64(False):
            words = f"{METZ} --unroll 10 {flags}".split()
            return store.run_command("metz", metz.main, words)

    assert command("--out .") == 0
    card = json.loads(pathlib.Path("theta.json").read_text())
    assert card["optimizer"] == "mlp" and card["constants"] == {}
    assert "nominal_loss" not in card and card["fresh_loss"] > 0
    assert card["inner_steps"] == round(np.linspace(1, 2, 13)[:12].sum() * 5 * 4 * 2)
    assert card["command"].startswith("python -m companions.metz")
    assert command("--steps 14 --init theta.npz --out more") == 0
    assert len(pathlib.Path("more/log.csv").read_text().splitlines()) == 1 + 2
    for flags, says in BAD_INPUT.items():
        capsys.readouterr()
        assert command(f"{flags} --out bad") == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


@pytest.mark.heavy
def test_learned_momentum_gets_better_and_trajectories_end():
    """Rate and momentum that start too small end with less than half of the loss. Each of
    four windows of an unroll counts: after one meta-step a trajectory of four is over."""
    argv = "--task quadratic --optimizer momentum --steps 120 --horizon 40 --jitter 0"
    argv += " --growth constant --truncation 10 --unroll 40 --meta-lr 0.05"
    with jax.enable_x64(False):
        recipe = train.parse(argv.split(), metz.Recipe)
        made, losses = metz.parts(recipe, tasks.quadratic), []
        slow, _ = ravel_pytree(lopts.encode({"learning_rate": 0.002, "momentum": 0.5}))
        state = train.init_state(recipe, made, {})._replace(theta=slow)
        step = train.compile_meta_step(recipe, made, {}, state)
        for _ in range(recipe.steps):
            state, metrics = step({}, KEY, state)
            losses.append(float(metrics["loss"]))
            assert (state.particles.window >= 4).all()
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:10])


@pytest.mark.heavy
def test_metz6_compares_what_its_folder_holds(tmp_path, capsys):
    """Every run and two rates of Adam, on two members of the family. What is missing is
    named in one line."""
    line = f"metz6 --quick --data stand-in --out {tmp_path}"
    with jax.enable_x64(False):
        assert store.run_command("figures", figures.main, line.split()) == 0
    found = json.loads((tmp_path / "metz6.json").read_text())
    names = [label for label, _ in metz_conv.RUNS.values()]
    assert found["optimizers"][:7] == names and len(found["optimizers"]) == 9
    assert np.shape(found["mean_loss"]) == np.shape(found["test_loss"]) == (9, 2)
    noise = found["median_gradient_noise"]
    assert noise["gradients"] > 1e3 * noise["es"]
    capsys.readouterr()
    line = f"metz6 --runs {tmp_path} --out {tmp_path}"
    assert store.run_command("figures", figures.main, line.split()) == 2
    assert "has no merged, gradients" in capsys.readouterr().err
