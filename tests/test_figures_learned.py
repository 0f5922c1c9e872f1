"""An update of STAR taken apart, and the thetas with something taken out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inner
import star
import store
from experiments import kinds
from figures import __main__ as figures
from figures import star_learned as learned

# Betas at which every part of the update is large enough to be seen in float32.
CONSTANTS = star.Constants(beta2=0.3, beta3=1e-4, beta4=0.3)
OPTIMIZER = star.learned_optimizer(CONSTANTS)
SHAPES = {"b": (4,), "w": (5, 4)}
BETAS = {name: getattr(CONSTANTS, name) for name in ("beta1", "beta3")}


@jax.jit
def update(theta, asked, betas):
    constants = CONSTANTS._replace(**betas)
    return star.learned_optimizer(constants).update(theta, *asked)


def normal(key, scale=1.0):
    keys = dict(zip(SHAPES, jax.random.split(key, len(SHAPES)), strict=True))
    return {k: scale * jax.random.normal(keys[k], shape) for k, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def theta():
    """Every entry nonzero, biases and decay offsets too."""
    shapes = star.theta_shapes(CONSTANTS)
    rng = np.random.default_rng(0)
    size = {name: 0.02 if name in learned.DECAYS else 0.7 for name in shapes}
    return {k: jnp.float32(rng.normal(0, size[k], s)) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def asked(theta):
    """What the fourth update of a run of random gradients is asked."""
    params = normal(jax.random.key(0))
    state = OPTIMIZER.init(params)
    for t in range(1, 4):
        asked = learned.Asked(normal(jax.random.key(t), 0.1), state, params)
        _, state = update(theta, asked, BETAS)
    return learned.Asked(normal(jax.random.key(9), 0.1), state, params)


@pytest.fixture(scope="module")
def taken_apart():
    """Jitted, theta and asked -> (Parts, measure)."""

    def both(theta, asked):
        parts = learned.take_apart(OPTIMIZER, theta, asked)
        return parts, learned.measure(OPTIMIZER, theta, asked)

    return jax.jit(both)


def test_the_two_parts_add_up_to_the_update(theta, asked, taken_apart):
    """Nominal: the update at beta3 = 0; blackbox: at beta1 = 0; whole: the optimizer's."""
    parts, _ = taken_apart(theta, asked)
    whole, _ = update(theta, asked, BETAS)
    for part, beta in ((parts.nominal, "beta3"), (parts.blackbox, "beta1")):
        alone, _ = update(theta, asked, BETAS | {beta: 0.0})
        for k in SHAPES:
            scale = np.abs(whole[k]).max()
            np.testing.assert_allclose(part[k], alone[k], atol=1e-5 * scale)
            assert np.abs(alone[k]).max() > 0.01 * scale
    for k in SHAPES:
        both = parts.nominal[k] + parts.blackbox[k]
        np.testing.assert_allclose(both, whole[k], rtol=1e-5, atol=1e-9)


def test_plain_nominal_step_is_equation_21_without_its_exponential(
    theta, asked, taken_apart
):
    """beta1 times the mean of three momenta over v, in numpy from the new state."""
    parts, _ = taken_apart(theta, asked)
    _, state = update(theta, asked, BETAS)
    for k in SHAPES:
        v = np.sqrt(np.asarray(state.rms[k]) + CONSTANTS.rms_eps)
        mean = sum(np.asarray(m[k]) for m in state.momentum) / 3
        expected = -CONSTANTS.beta1 * mean / v
        np.testing.assert_allclose(parts.plain[k], expected, rtol=1e-4, atol=1e-8)


def test_multiplier_is_one_without_the_nominal_head(theta, asked, taken_apart):
    """At all three percentiles; with the head it is not, and they are in order."""
    silent = learned.without_heads(theta, learned.NOMINAL_MAGNITUDE)
    np.testing.assert_array_equal(taken_apart(silent, asked)[1]["multiplier"], 1)
    multiplier = np.asarray(taken_apart(theta, asked)[1]["multiplier"])
    assert multiplier.shape == (2, 3) and (np.diff(multiplier) > 0).all()
    assert np.abs(multiplier - 1).max() > 0.01


def test_multiplier_is_that_of_the_head(theta, asked, taken_apart):
    """A nominal head that says log 2 / beta2 everywhere doubles the nominal step."""
    b2 = theta["b2"].at[learned.NOMINAL_MAGNITUDE].set(np.log(2) / CONSTANTS.beta2)
    silent = learned.without_heads(theta, learned.NOMINAL_MAGNITUDE)
    _, numbers = taken_apart(silent | {"b2": b2}, asked)
    np.testing.assert_allclose(numbers["multiplier"], 2, rtol=1e-5)


def test_cosines_and_norms_are_numpys(theta, asked, taken_apart):
    """Within [-1, 1]; along the nominal step exactly 1 without a direction head."""
    parts, numbers = taken_apart(theta, asked)
    for i, k in enumerate(SHAPES):
        step, grad = (np.ravel(x[k]) for x in (parts.update, asked.grads))
        angle = -step @ grad / np.linalg.norm(step) / np.linalg.norm(grad)
        assert float(numbers["cosine_gradient"][i]) == pytest.approx(angle, abs=1e-5)
        ratio = np.linalg.norm(parts.blackbox[k]) / np.linalg.norm(parts.nominal[k])
        found = float(numbers["blackbox_over_nominal"][i])
        assert found == pytest.approx(ratio, rel=1e-5)
        rms = np.sqrt(np.mean(step**2))
        assert float(numbers["rms"][i]) == pytest.approx(rms, rel=1e-5)
    for name in ("cosine_gradient", "cosine_nominal"):
        assert (np.abs(numbers[name]) <= 1).all()
    _, silent = taken_apart(learned.without_heads(theta, learned.DIRECTION), asked)
    np.testing.assert_allclose(silent["cosine_nominal"], 1, rtol=1e-6)
    np.testing.assert_array_equal(silent["blackbox_over_nominal"], 0)


def test_a_gradient_of_zero_has_no_multiplier(theta, asked, taken_apart):
    """Where nothing was ever seen the nominal step is 0 and tells nothing."""
    nothing = jax.tree.map(jnp.zeros_like, (asked.grads, asked.state))
    _, numbers = taken_apart(theta, learned.Asked(*nothing, asked.params))
    assert np.isnan(numbers["multiplier"]).all()
    assert np.isnan(numbers["cosine_nominal"]).all()


def test_groups_partition_the_39_features():
    """Each row of w0 is in one group, in the order of star.py."""
    rows = [i for group in learned.FEATURES.values() for i in range(*group.indices(39))]
    assert rows == list(range(39)) == list(range(star.theta_shapes(CONSTANTS)["w0"][0]))


def test_what_is_taken_out_is_zero_and_nothing_else(theta):
    """All groups one by one are w0 = 0; each part changes the arrays it names."""
    bare = theta
    for rows in learned.FEATURES.values():
        bare = learned.without_features(bare, rows)
    parts = learned.parts_of_theta(theta)
    no_w0 = theta | {"w0": jnp.zeros((39, 4))}
    for found in (bare, parts["all 39 features"]):
        jax.tree.map(np.testing.assert_array_equal, found, no_w0)
    changed = {
        name: {k for k in theta if not np.array_equal(theta[k], part[k])}
        for name, part in parts.items()
    }
    assert changed["all but time"] == {"w0"}
    np.testing.assert_array_equal(parts["all but time"]["w0"][28:], theta["w0"][28:])
    assert changed["decay offsets"] == set(learned.DECAYS)
    assert changed["everything learned"] == {"w2", "b2", *learned.DECAYS}
    heads = parts["direction head: no blackbox"]
    np.testing.assert_array_equal(heads["w2"][:, 1:], theta["w2"][:, 1:])
    assert not heads["w2"][:, 0].any() and float(heads["b2"][0]) == 0


def quadratic(data, key):
    return kinds.quadratic()


@pytest.fixture(scope="module")
def result(theta):
    return learned.compute_learned(quadratic, {}, OPTIMIZER, theta, 2, 4, 3)


@pytest.mark.heavy
def test_runs_are_those_of_inner_training(theta, result):
    """The root mean square of updates 1 to 3, in a plain loop on the first seed."""
    keys = jax.random.split(jax.random.key(learned.comparison.EVALUATION_SEED), 2)
    task = partial(quadratic, {})
    fresh, step = inner.inner_training(task, OPTIMIZER)
    step, rms = jax.jit(step), []
    for key in keys:
        init_key, run_key = jax.random.split(key)
        carry = fresh(init_key)
        for t in range(3):
            before = carry.params
            carry, _ = step(theta, carry, jax.random.fold_in(run_key, t))
            rms.append(float(jnp.sqrt(jnp.mean((carry.params - before) ** 2))))
    assert result["curves"]["at"] == [1, 2, 3] and result["at"] == [1]
    expected = np.reshape(rms, (2, 3)).mean(0)
    np.testing.assert_allclose(result["curves"]["rms"][:, 0], expected, rtol=1e-3)


@pytest.mark.heavy
def test_figure_holds_what_was_computed(result):
    """A line per tensor, a dot per seed for each of 13 groups and 6 parts."""
    from matplotlib import pyplot as plt

    differences = result["loss_difference"]
    assert [len(x) for x in differences.values()] == [13, 6]
    features = list(differences["features"].values())
    assert np.shape(features) == (13, 2) and np.isfinite(features).all()
    assert np.abs(features).max() > 0
    figure = learned.plot_learned(result | {"horizon": 2}, plt)
    multiplier = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(multiplier, result["curves"]["multiplier"][:, 0, 1])
    losses = next(a for a in figure.axes if a.get_title().startswith("loss without"))
    dots = [line.get_xdata() for line in losses.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(dots[:13], features)
    assert len(dots) == 19
    plt.close(figure)


def test_tensors_have_names():
    """Layers count from 1; a deeper tree keeps its paths."""
    flat = [{"w": jnp.zeros((784, 128)), "b": jnp.zeros(128)}]
    assert learned.tensor_names(flat) == ["b1 128", "w1 784x128"]
    deep = {"conv": [{"w": jnp.zeros((3, 3, 1, 8))}]}
    assert learned.tensor_names(deep) == ["conv.0.w 3x3x1x8"]


@pytest.mark.parametrize("kind", ["two thetas", "no nominal term", "no task"])
def test_what_cannot_be_taken_apart_is_refused_in_one_line(kind, tmp_path, capsys):
    """One theta of a STAR with a nominal term, whose card names its task."""
    preset = "no_nominal" if kind == "no nominal term" else "star"
    constants, path = star.CONSTANTS[preset], tmp_path / "theta.npz"
    shapes = star.theta_shapes(constants)
    theta = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    star.save_theta(path, theta, {"constants": constants._asdict()})
    line = ["learned", "--quick", "--out", str(tmp_path / "out")]
    line += ["--theta", str(path)] * (2 if kind == "two thetas" else 1)
    assert store.run_command("figures", figures.main, line) == 2
    assert capsys.readouterr().err.count("\n") == 1
