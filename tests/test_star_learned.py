"""An update of STAR taken apart, and the thetas with something taken out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import eval as evaluation
import star
import star_fast
import store
from figures import __main__ as figures
from figures import star_learned as learned
from tasks import TASKS, fresh, inner_step

# Betas at which every part of the update is large enough to be seen in float32.
CONSTANTS = star.Constants(beta2=0.3, beta3=1e-4, beta4=0.3)
OPTIMIZER = star_fast.learned_optimizer(CONSTANTS)
SHAPES, RNG = star.theta_shapes(CONSTANTS), np.random.default_rng(0)


@jax.jit
def update(theta, asked, **betas):
    constants = CONSTANTS._replace(**betas)
    return star_fast.learned_optimizer(constants).update(theta, *asked)


@jax.jit
def taken_apart(theta, asked):
    """The parts of an update of one tensor, stacked, and its measures."""
    parts = learned.take_apart(OPTIMIZER, theta, *asked)
    return jnp.stack(parts), learned.measure(OPTIMIZER, theta, *asked)


@pytest.fixture(scope="module")
def theta():
    """Every entry nonzero, biases and decay offsets too."""
    scale = {name: 0.02 if name in learned.DECAYS else 0.7 for name in SHAPES}
    return {k: jnp.float32(RNG.normal(0, scale[k], s)) for k, s in SHAPES.items()}


@pytest.fixture(scope="module")
def asked(theta):
    """Gradient, state and parameters of the fourth update of a run, one tensor."""
    params, *grads = jnp.float32(RNG.normal(size=(5, 5, 4)))
    state = OPTIMIZER.init(params)
    for g in grads[:3]:
        _, state = update(theta, (0.1 * g, state, params))
    return 0.1 * grads[3], state, params


def test_an_update_is_the_sum_of_two_parts(theta, asked):
    """Nominal: the update at beta3 = 0. Blackbox: at beta1 = 0. Plain: equation 21 without
    its exponential, beta1 times the mean of three momenta over v, from the new state."""
    whole, state = update(theta, asked)
    nominal, _ = update(theta, asked, beta3=0.0)
    blackbox, _ = update(theta, asked, beta1=0.0)
    v = jnp.sqrt(state.tensors.v2 + CONSTANTS.rms_eps)
    plain = -CONSTANTS.beta1 * sum(state.tensors.m) / 3 / v
    expected = jnp.stack([whole, nominal, blackbox, plain])
    scale = np.abs(whole).max()
    parts, _ = taken_apart(theta, asked)
    np.testing.assert_allclose(parts, expected, atol=1e-5 * scale)
    np.testing.assert_allclose(parts[1] + parts[2], whole, rtol=1e-5, atol=1e-9)
    assert (np.abs(expected).max((1, 2)) > 0.01 * scale).all()


def test_multiplier_is_that_of_the_nominal_head(theta, asked):
    """1 without the head, 2 where it says log 2 / beta2 everywhere, else in order. It is
    nan where the gradient was always zero: the nominal step is then 0."""
    silent = learned.without_heads(theta, learned.NOMINAL_MAGNITUDE)
    np.testing.assert_array_equal(taken_apart(silent, asked)[1]["multiplier"], 1)
    b2 = theta["b2"].at[learned.NOMINAL_MAGNITUDE].set(np.log(2) / CONSTANTS.beta2)
    _, numbers = taken_apart(silent | {"b2": b2}, asked)
    np.testing.assert_allclose(numbers["multiplier"], 2, rtol=1e-5)
    multiplier = np.asarray(taken_apart(theta, asked)[1]["multiplier"])
    assert multiplier.shape == (1, 3) and (np.diff(multiplier) > 0).all()
    assert np.abs(multiplier - 1).max() > 0.01
    nothing = jax.tree.map(jnp.zeros_like, asked[:2])
    _, numbers = taken_apart(theta, (*nothing, asked[2]))
    assert np.isnan(numbers["multiplier"]).all() and np.isnan(numbers["cosine_nominal"])


def test_cosines_and_norms_are_numpys(theta, asked):
    """Along the nominal step exactly 1 without a direction head, and no blackbox step."""
    parts, numbers = taken_apart(theta, asked)
    step, nominal, blackbox, _, grad = (np.ravel(x) for x in (*parts, asked[0]))
    norm = np.linalg.norm
    for name, expected in {
        "cosine_gradient": -step @ grad / norm(step) / norm(grad),
        "cosine_nominal": step @ nominal / norm(step) / norm(nominal),
        "blackbox_over_nominal": norm(blackbox) / norm(nominal),
        "rms": np.sqrt(np.mean(step**2)),
    }.items():
        assert float(numbers[name][0]) == pytest.approx(expected, rel=1e-4), name
    _, silent = taken_apart(learned.without_heads(theta, learned.DIRECTION), asked)
    np.testing.assert_allclose(silent["cosine_nominal"], 1, rtol=1e-6)
    np.testing.assert_array_equal(silent["blackbox_over_nominal"], 0)


def test_groups_are_the_rows_of_star_py(asked):
    """All 39 in order. Momenta and v2 move the features that are named after them."""
    rows = np.concatenate([*learned.FEATURES.values()])
    assert rows.tolist() == list(range(39)) and learned.FEATURES["time"][0] == 28
    g, state, p = asked
    for change, names in (
        ({"m": tuple(m**3 for m in state.tensors.m)}, ("momenta", "momenta / v")),
        ({"v2": state.tensors.v2**2}, ("mean square", "momenta / v", "1 / v")),
    ):
        s = state.tensors._replace(**change)
        pairs = (star.tensor_features(g, p, x, CONSTANTS) for x in (state.tensors, s))
        moved = [not np.allclose(*pair, rtol=1e-3) for pair in zip(*pairs, strict=True)]
        expected = np.concatenate([learned.FEATURES[name] for name in names])
        assert np.flatnonzero(moved[:25]).tolist() == expected.tolist()


def test_what_is_taken_out_is_zero_and_nothing_else(theta):
    """All groups one by one are w0 = 0. Each part changes the arrays it names."""
    bare, parts = theta, learned.parts_of_theta(theta)
    for rows in learned.FEATURES.values():
        bare = learned.without_features(bare, rows)
    expected = theta | {"w0": jnp.zeros((39, 4))}
    for found in (bare, parts["all 39 features"]):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    changed = {
        name: {k for k in theta if not np.array_equal(theta[k], part[k])}
        for name, part in parts.items()
    }
    np.testing.assert_array_equal(parts["all but time"]["w0"][28:], theta["w0"][28:])
    assert changed["all but time"] == {"w0"}
    assert changed["decay offsets"] == set(learned.DECAYS)
    assert changed["everything learned"] == {"w2", "b2", *learned.DECAYS}
    heads = parts["direction head: no blackbox"]
    np.testing.assert_array_equal(heads["w2"][:, 1:], theta["w2"][:, 1:])
    assert not heads["w2"][:, 0].any() and float(heads["b2"][0]) == 0


@pytest.mark.heavy
def test_figure_holds_the_runs_of_inner_training(theta):
    """The root mean square of updates 1 to 3, in a plain loop. A line per tensor, and a
    dot per seed for each of 13 groups and 6 parts."""
    build = TASKS["quadratic"].build
    result = learned.compute_learned(build, {}, OPTIMIZER, theta, 1, 4, 3)
    step, rms = jax.jit(partial(inner_step, partial(build, {}), OPTIMIZER)), []
    (key,) = jax.random.split(jax.random.key(evaluation.EVALUATION_SEED), 1)
    init_key, run_key = jax.random.split(key)
    carry = fresh(partial(build, {}), OPTIMIZER, init_key)
    for t in range(3):
        before = carry.params
        carry, _ = step(theta, carry, jax.random.fold_in(run_key, t))
        rms.append(float(jnp.sqrt(jnp.mean((carry.params - before) ** 2))))
    assert learned.tensor_names([{"w": jnp.zeros((7, 2))}]) == ["0.w 7x2"]
    drawn = result["curves"]
    assert drawn["at"] == [1, 2, 3] and result["at"] == [1]
    np.testing.assert_allclose(drawn["rms"][:, 0], rms, rtol=1e-3)
    differences = [[*x.values()] for x in result["loss_difference"].values()]
    assert [len(x) for x in differences] == [13, 6] and np.abs(differences[0]).max() > 0
    figure = Figure()
    learned.plot_learned(figure, result | {"horizon": 2})
    multiplier = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(multiplier, drawn["multiplier"][:, 0, 1])
    losses = next(a for a in figure.axes if a.get_title().startswith("loss without"))
    dots = [line.get_xdata() for line in losses.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(dots, np.concatenate(differences))


@pytest.mark.parametrize("preset, task", [("no_nominal", "quadratic"), ("star", "no")])
def test_what_cannot_be_taken_apart_is_refused_in_one_line(
    preset, task, tmp_path, capsys
):
    """A STAR without a nominal term, or whose card names no known task."""
    constants, path = star.CONSTANTS[preset], tmp_path / "theta.npz"
    theta = star.init_theta(jax.random.key(0), constants)
    star.save_theta(path, theta, {"constants": constants._asdict(), "task": task})
    line = f"learned --quick --out {tmp_path / 'out'} --theta {path}"
    assert store.run_command("figures", figures.main, line.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1
