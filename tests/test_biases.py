"""Biases that docs/errata.md states, each with the numbers that it states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimators
import star
import star_fast
import train
from baselines import curves

WINDOWS = 16


def weights_of_windows(kind, meta_steps: int, cycles: int) -> np.ndarray:
    """(cycles, WINDOWS): what windows 1 to 16 count for in the default population of 4.

    The loss of window j is theta_j. So the meta-gradient's entry j is j's weight. All
    entries together make 1, and each should be 1/16.
    """
    pairs = train.Recipe.particles

    def step(theta, t, key):
        return t + 1, theta[t]

    problem = estimators.unroll(lambda key: 0, step, 1)
    one = kind(problem, WINDOWS)
    population = estimators.population(one, pairs)

    def advance(state, key):
        g, state, _ = population.estimate(key, jnp.zeros(WINDOWS), state)
        return state, g

    def run(key):
        state = population.init(key, jnp.zeros(WINDOWS))
        return jax.lax.scan(advance, state, jax.random.split(key, meta_steps))[1]

    grads = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4096))
    return np.asarray(grads).reshape(4096, cycles, -1, WINDOWS).mean(2)


def test_the_first_cycle_after_a_stagger_overweights_early_windows():
    """The quarters of the trajectory weigh 7, 5, 3 and 1 in the first 16 meta-steps, and
    alike in the next 16."""
    # Backpropagation samples nothing.
    weights = weights_of_windows(estimators.truncated_bptt, 32, 2)[0]
    first, second = weights.reshape(2, 4, 4).sum(-1)
    np.testing.assert_allclose(first, np.array([7, 5, 3, 1]) / 16, rtol=1e-6)
    np.testing.assert_allclose(second, 1 / 4, rtol=1e-6)


def test_noise_reuse_has_the_bias_of_the_first_cycle():
    """The loss depends on theta in the last quarter alone. The default estimator finds 1/16
    of it in the first cycle and 1/4 in the second, within six standard errors."""

    def reuse(problem, windows):
        return estimators.noise_reuse_es(problem, windows, 0.1)

    last = weights_of_windows(reuse, 32, 2).reshape(-1, 2, 4, 4)[:, :, 3].sum(-1)
    error = last.std(0) / len(last) ** 0.5
    assert (np.abs(last.mean(0) - [1 / 16, 1 / 4]) < 6 * error).all()
    assert (error < 0.01).all()


def test_the_default_recipe_begins_200_meta_steps_anew():
    """Five staggers, at meta-steps 0, 150, 300, 450, 600 of 1,200, for 8 to 80 windows.
    Their first cycles take 200 meta-steps together."""
    recipe = train.parse([])
    steps = np.arange(recipe.steps)
    windows = np.asarray(jax.vmap(lambda step: train.windows_at(recipe, step))(steps))
    begun = [0, *np.flatnonzero(np.diff(windows)) + 1]
    assert begun == [0, 150, 300, 450, 600] and recipe.steps == 1200
    assert windows[begun].tolist() == [8, 16, 32, 64, 80]
    assert windows[begun].sum() == 200 and recipe.particles == 4


def test_log_uniform_lengths_give_the_last_window_a_hundredth():
    """`--preset small`: 4 to 40 windows. The last weighs .0106 of the first. The first
    tenth of a trajectory has 26 % of all weight, its second half 18 %.

    Drawn lengths agree with the formula."""
    recipe = train.parse(["--preset", "small"])
    most, least = int(train.windows_at(recipe, 0)), train.shortest_windows(recipe)
    n = np.arange(1, most + 1)
    weight = np.minimum(1, 1 - np.log(n / least) / np.log((most + 1) / least))
    assert (least, most) == (4, 40) and weight[-1] == pytest.approx(0.0106, abs=5e-5)
    share = weight / weight.sum()
    assert share[:4].sum() == pytest.approx(0.260, abs=5e-4)
    assert share[20:].sum() == pytest.approx(0.175, abs=5e-4)
    # The windows of the mean trajectory.
    assert weight.sum() == pytest.approx(15.4, abs=0.05)

    state = estimators.Pair(carry=(), xi=(), xi_sum=(), window=jnp.int32(1))
    begun = estimators.Estimator(None, lambda key, theta, state: (0.0, state, {}))
    drawn = train.drawn_lengths(begun, most, least)
    one = jax.vmap(lambda key: drawn.estimate(key, None, state)[1].window)
    lengths = most + 1 - np.asarray(one(jax.random.split(jax.random.key(1), 100_000)))
    reached = (lengths[:, None] >= n).mean(0)
    assert (np.abs(reached - weight) <= 6 * np.sqrt(weight / len(lengths))).all()


def late_reset(horizon: int, length: int) -> tuple[float, float]:
    """Mean gradients on s' = s + theta, loss s before or after the update, of a PES that
    resets its sum late. It credits a trajectory's last loss to the newest perturbation
    alone. This perturbation stays in the sum of the next trajectory. The reset takes one
    step of every trajectory, without a loss. E xi_i xi_j is 0 unless i = j. So a loss
    counts each perturbation that it is credited to, once for every step taken with it.
    """
    credit, steps, over, found = set(), [], False, []
    for window in range(40 * (horizon + 1)):
        credit, ended, grads = credit | {window}, False, []
        for _ in range(length):
            if over:
                steps, over = [], False
                continue
            before, steps = steps, [*steps, window]
            over = len(steps) == horizon
            ended |= over
            to = {window} if ended else credit
            grads.append([sum(w in to for w in taken) for taken in (before, steps)])
        credit = {window} if ended else credit
        found.append(np.mean(grads, 0))
    return tuple(np.mean(found, 0))


@pytest.mark.parametrize(
    "horizon, length, before, after",
    [(4, 2, -0.533, -0.320), (10, 2, -0.263, -0.215), (100, 10, -0.021, -0.020)],
)
def test_a_late_reset_makes_pes_biased(horizon, length, before, after):
    """The authors' rule: -53 % of 1.5 at T = 4, K = 2, or -32 % of 2.5 after the update."""
    exact = np.array([horizon - 1, horizon + 1]) / 2
    bias = np.array(late_reset(horizon, length)) / exact - 1
    assert bias == pytest.approx([before, after], abs=6e-4)


@pytest.mark.heavy
def test_an_untrained_network_diverges_divided_by_v_and_not_without(small_task):
    """Section 4.2 calls the division robust to any initialization. At beta3 1e-3, three
    untrained networks end 50 steps on the stand-in above the first loss, and below it."""
    build, data = small_task
    keys = jax.random.split(jax.random.key(0), 3)
    thetas = [star.init_theta(key, star.PAPER) for key in keys]
    one, losses = jax.random.split(jax.random.key(1), 1), {}
    for name in ("star", "no_preconditioner"):
        found = curves(build, data, star_fast.PRESETS[name], thetas, one, 50).losses
        losses[name] = np.asarray(found).reshape(3, 50)
    divided, plain = losses["star"], losses["no_preconditioner"]
    assert (divided.mean(-1) > divided[:, 0]).all() and (
        plain.mean(-1) < plain[:, 0]
    ).all()
