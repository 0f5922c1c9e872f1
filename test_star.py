"""What section 5 says of STAR, its fast form, its optax adapter, its files."""

import functools
import pathlib
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from jax.test_util import check_grads

import star
import star_fast
import store

HERE = pathlib.Path(__file__).resolve().parent
VECTORS = np.load(HERE / "tests" / "test_vectors.npz")
FORMS = pytest.mark.parametrize("form", [star, star_fast], ids=["plain", "fast"])
PAPER = star.PAPER
SHAPE = (4, 6)  # of the tensor in most tests, so that they share compiled programs
EVERY_RANK = [(), (1,), (5,), (1, 6), (4, 3), (2, 4, 3), (3, 2, 2, 5), (2, 1, 3, 2, 2)]
SILENT = {name: np.zeros(s, np.float32) for name, s in star.theta_shapes(PAPER).items()}
seeds = st.integers(0, 2**31 - 1)


def random_theta(seed, c=PAPER):
    """A theta with every entry nonzero: biases and decay offsets too."""
    rng, shapes = np.random.default_rng(seed), star.theta_shapes(c)
    scale = {name: 0.02 if "decays" in name else 0.7 for name in shapes}
    return {k: np.float32(scale[k] * rng.normal(size=s)) for k, s in shapes.items()}


def drawn(seed):
    """A gradient and a parameter."""
    return np.float32(np.random.default_rng(seed).normal(size=(2, *SHAPE)))


@functools.cache
def update_of(form, preset):
    return jax.jit(form.PRESETS[preset].update)


def first_update(theta, g, p, preset="star", form=star):
    return update_of(form, preset)(theta, g, star.init(p), p)[0]


def assert_close(found, expected):
    """Equal to 1e-5 of the largest number."""
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --- The paper's claims

CASES = dict.fromkeys(("star_matrix", "star_vector", "star_conv", "scalar"), PAPER)
CASES |= dict.fromkeys(("one_row", "rank_three"), PAPER)
CASES |= {f"{name}_matrix": star.CONSTANTS[name] for name in ("blackbox", "hyperparam")}
CASES |= {name: star.CONSTANTS[name] for name in ("no_nominal", "no_preconditioner")}
CASES |= {f"nominal_{n}": star.Constants(nominal=n) for n in list(star.NOMINAL)[:4]}


@FORMS
@pytest.mark.parametrize("case", CASES)
def test_update_equals_the_authors_code(case, form):
    """After every update, the way from the start agrees to 1e-5 with that of
    google/learned_optimization, run in float32 on a CPU. One gradient is zero."""
    z = {k[len(case) + 1 :]: x for k, x in VECTORS.items() if k.startswith(case + "/")}
    theta = {k[6:]: x for k, x in z.items() if k.startswith("theta/")}
    update_jitted = jax.jit(form.learned_optimizer(CASES[case]).update)
    p = start = z["params0"]
    state = star.init(p)._replace(count=jnp.asarray(z["step0"]))
    for g, expected in zip(z["grads"], z["params"], strict=True):
        update, state = update_jitted(theta, g, state, p)
        p = np.asarray(p + update)
        # 1e-6 for the rounding of the parameters, which are of the order of 1
        np.testing.assert_allclose(p - start, expected - start, rtol=1e-5, atol=1e-6)
    assert any(not g.any() for g in z["grads"])


def test_number_of_meta_parameters():
    """Section 5.2: 197 for small_fc_lopt. STAR adds one head of 5 and no more."""
    for name, optimizer in star.PRESETS.items():
        theta = jax.eval_shape(optimizer.init_theta, jax.random.key(0))
        expected = 197 if name in ("blackbox", "no_nominal") else 202
        assert sum(x.size for x in theta.values()) == expected


def test_untrained_theta():
    """Weights are normals cut off at 2, over sqrt(fan in). Biases and offsets are 0."""
    keys = jax.random.split(jax.random.key(0), 200)
    theta = jax.jit(jax.vmap(star.PRESETS["star"].init_theta))(keys)
    for name in ("w0", "w1", "w2"):
        x = np.asarray(theta.pop(name))
        x = x * x.shape[1] ** 0.5
        assert -2 <= x.min() < -1.95 and 1.95 < x.max() <= 2 and abs(x.mean()) < 0.05
        assert x.std() == pytest.approx(0.88, abs=0.01)
    assert not any(x.any() for x in theta.values())


@jax.jit
def update_with_betas(theta, g, p, beta1, beta3):
    c = star.Constants(beta1=beta1, beta3=beta3)
    return star.learned_optimizer(c).update(theta, g, star.init(p), p)


@given(seed=seeds)
def test_update_is_linear_in_beta1_and_beta3(seed):
    """f = f_b + f_g, with f_b proportional to beta3 and f_g to beta1 (equations 21, 22)."""
    f = functools.partial(update_with_betas, random_theta(seed), *drawn(seed))
    assert_close(f(2.0, 3.0)[0], 2 * f(1.0, 0.0)[0] + 3 * f(0.0, 1.0)[0])


@given(seed=seeds)
def test_preconditioner_divides_the_blackbox_term_by_v(seed):
    """f_b of STAR times v is f_b without the preconditioner (equation 22 against 20)."""
    args = random_theta(seed), *drawn(seed)
    with_v, state = update_with_betas(*args, 0.0, 1e-3)
    nominal, _ = update_with_betas(*args, 1e-3, 0.0)
    v = np.sqrt(state.tensors.v2 + 1e-6)
    assert_close(nominal + with_v * v, first_update(*args, "no_preconditioner"))


def all_finite(*trees):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(trees))


@jax.jit
def states_of(grads):
    """The state after each of grads (T, 3), while all decays are the named ones."""
    one = lambda s, g: (star.accumulate(SILENT, s, g),) * 2  # noqa: E731
    return jax.lax.scan(one, star.init_tensor(grads[0]), grads)[1]


def ema(d, xs):
    return functools.reduce(lambda m, x: optax.tree.update_moment(x, m, d, 1), xs, 0)


@pytest.mark.parametrize("nominal", star.NOMINAL)
def test_nominal_terms_against_optax(nominal):
    """With a silent network the step is the named hand-designed one times beta1. Where
    that uses one momentum, it is the slowest, as in the authors' code."""
    grads = np.float32(np.sin([[0, 1, 2], [3, 4, 5], [6, 7, 8]]))
    g, m = grads[-1], [ema(d, grads) for d in (0.9, 0.99, 0.999)]
    v = np.sqrt(ema(0.999, grads**2) + 1e-6)
    expected = {"sgd": g, "sgdm": m[2], "aggmo": sum(m) / 3}
    expected |= {"adam": m[2] / v, "adam_aggmo": sum(x / v for x in m) / 3}
    last = jax.tree.map(lambda x: x[-1], states_of(grads))
    step = star.step(star.Constants(nominal=nominal), [0.0] * 3, g, last)
    np.testing.assert_allclose(step, -1e-3 * expected[nominal], rtol=2e-5)


def test_nominal_term_overshoots_without_bias_correction():
    """Along a constant gradient the step is 1.17 beta1 at first and 2.59 beta1 at t = 15.
    The authors' means start at zero uncorrected, a hidden warm-up and more."""
    states = states_of(np.ones((2000, 3), np.float32))
    multiplier = -np.asarray(star.step(PAPER, [0.0] * 3, 1.0, states))[:, 0] / 1e-3
    first, peak, last = multiplier[0], multiplier.max(), multiplier[-1]
    np.testing.assert_allclose([first, peak, last], [1.17, 2.59, 1.03], atol=0.01)
    assert multiplier.argmax() + 1 == 15


@given(seed=seeds)
def test_update_moves_with_a_permutation_of_rows_and_columns(seed):
    """The network sees elements, rows and columns, never positions."""
    theta, both, rng = random_theta(seed), drawn(seed), np.random.default_rng(seed)
    rows, cols = rng.permutation(4), rng.permutation(6)
    permuted = first_update(theta, *both[:, rows][:, :, cols])
    assert_close(permuted, first_update(theta, *both)[rows][:, cols])


def test_rows_are_means_over_the_largest_axis():
    """Columns are means over the next, and of equal axes the last is the largest. A vector
    is both of its own."""
    rows = {(5,): (5,), (4, 3): (1, 3), (4, 4): (4, 1), (2, 5, 3): (2, 1, 3)}
    cols = {(5,): (5,), (4, 3): (4, 1), (4, 4): (1, 4), (2, 5, 3): (2, 5, 1)}
    for shape in rows:
        s = jax.eval_shape(star.init_tensor, jnp.zeros(shape))
        assert (s.row.shape, s.col.shape) == ((3, *rows[shape]), (3, *cols[shape]))


@given(offset=st.floats(-1, 1, width=32))
@example(offset=0.0)
def test_decays_shift_on_a_log_scale(offset):
    """An offset o makes decay d 1 - exp(log(1 - d) + 10 o), and 0 leaves d alone.
    Hidden states are stable (section 5.1): squares' decays stay between 0 and 1. Here each
    mean is 1 before a gradient of 0, so that it becomes its decay."""
    theta = {name: x + np.float32(offset) for name, x in SILENT.items()}
    ones = (np.ones(2, np.float32),) * 3
    three = np.stack(ones)
    s = star.TensorState(m=ones, v2=ones[0], row=three, col=three)
    s = jax.jit(star.accumulate)(theta, s, np.zeros(2, np.float32))
    d = 1 - np.exp(np.log([0.1, 0.01, 0.001]) + 10 * offset)
    expected = [*d, *np.clip([*d, *d, d[2]], 0, 1)]
    found = np.array([*s.m, *s.row, *s.col, s.v2])[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_adafactor_of_a_vector_has_two_epsilons():
    """1e-9 under the root for the gradient and 1e-6 for the momenta."""
    x = np.float32([0, 1e-9, 1e-6, 1])
    s = star.TensorState(m=(x,) * 3, v2=x, row=np.stack([x, 2 * x, 3 * x]), col=x)
    for factors, epsilon in zip(star.adafactor_factors(s), (1e-9, 1e-6), strict=True):
        expected = [1 / np.sqrt(k * x + epsilon) for k in (1, 2, 3)]
        np.testing.assert_allclose(factors, expected, rtol=1e-5)


# --- The fast form, dtypes


@pytest.mark.parametrize("name", star.PRESETS)
@given(seed=seeds, exponent=st.floats(-6, 1))
@settings(max_examples=8)
def test_fast_form_equals_the_plain_one(name, seed, exponent):
    """To 1e-5 of the largest update, on all ranks and presets, gradients 0, 1e-6 to 100."""
    rng, theta = np.random.default_rng(seed), random_theta(seed, star.CONSTANTS[name])
    shapes = EVERY_RANK if name == "star" else [SHAPE]
    params = [np.float32(rng.normal(size=s)) for s in shapes]
    state = other = star.init(params)
    for scale in 10**exponent * np.array([1, 0, 10]):
        grads = [np.float32(scale * rng.normal(size=s)) for s in shapes]
        grads[-1][0] *= 1e-6  # where adafactor's factors are bounded
        plain, state = update_of(star, name)(theta, grads, state, params)
        fast, other = update_of(star_fast, name)(theta, grads, other, params)
        both = (np.concatenate([np.ravel(u) for u in us]) for us in (fast, plain))
        assert_close(*both)
    assert optax.tree.allclose(state, other)


@FORMS
def test_zero_gradients_forever_stay_finite(form):
    """No epsilon is missing, on any rank. An empty tree has no updates."""
    p = [np.zeros(s, np.float32) for s in EVERY_RANK]
    state = star.init(p)
    for _ in range(3):
        updates, state = update_of(form, "star")(random_theta(1), p, state, p)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    updates, state = form.PRESETS["star"].update(SILENT, {}, star.init({}), {})
    assert updates == {} and state.count == 1


@FORMS
def test_bfloat16_is_computed_in_float32_and_rounded_once(form):
    """The update of bfloat16 numbers is that of the same numbers in float32, rounded."""
    low = jnp.asarray(drawn(0), jnp.bfloat16)
    found = first_update(random_theta(0), *low, form=form)
    full = first_update(random_theta(0), *low.astype(jnp.float32), form=form)
    np.testing.assert_array_equal(found, full.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_updates_keep_the_dtype_and_running_means_are_float32(dtype):
    """Parameters may be of any precision, and Python floats. The running means never are.
    Integer and complex parameters raise TypeError."""
    update = star.PRESETS["star"].update
    with jax.enable_x64(dtype == "float64"):
        p = {"a": jnp.ones((3, 4), dtype), "b": jnp.ones((), dtype)}
        updates, state = jax.eval_shape(update, SILENT, p, star.init(p), p)
    assert all(u.dtype == dtype for u in updates.values())
    assert all(x.dtype == "float32" for x in jax.tree.leaves(state.tensors))
    python, _ = jax.eval_shape(update, SILENT, 1.0, star.init(1.0), 1.0)
    assert python.dtype == "float32"
    for other in (1, 1j):
        with pytest.raises(TypeError, match="real floating-point"):
            star.init({"p": other})


@pytest.mark.heavy
@FORMS
def test_update_is_differentiable_in_theta(form):
    """The meta-gradient by backpropagation agrees with finite differences."""
    g, p = drawn(0)
    c = star.Constants(beta1=1.0, beta2=0.1, beta3=1.0, beta4=0.1)

    @jax.jit
    def loss(theta):
        update, _ = form.learned_optimizer(c).update(theta, g, star.init(p), p)
        return (update**2).mean()

    check_grads(loss, (random_theta(3),), order=1, modes=["rev"], eps=1e-3, rtol=2e-2)


# --- The optax interface

PARAMS = {"w": jnp.ones((3, 4)), "inner": [jnp.full((4,), 0.5)]}
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.01, PARAMS)
TRANSFORM = star.star(random_theta(0))


def run(transform, *grads):
    """(the last update, state) after these gradients."""
    state, update = transform.init(PARAMS), jax.jit(transform.update)
    for g in grads:
        updates, state = update(g, state, PARAMS)
    return updates, state


def test_adapter_gives_the_optimizers_updates():
    """star.star(theta) is PRESETS["star"] with theta bound. It ignores extra arguments.
    The parameter is a feature, so that update without it is a clear error."""
    assert isinstance(TRANSFORM, optax.GradientTransformationExtraArgs)
    state = TRANSFORM.init(PARAMS)
    found = jax.jit(TRANSFORM.update)(GRADS, state, PARAMS, value=1.0, x=2)
    expected = update_of(star, "star")(random_theta(0), GRADS, state, PARAMS)
    assert optax.tree.allclose(found, expected)
    with pytest.raises(ValueError, match="params"):
        TRANSFORM.update(GRADS, state)


def test_chain_and_scale():
    """STAR composes: clipping before it, a scale after it."""
    chain = optax.chain(optax.clip(0.05), TRANSFORM, optax.scale(0.5))
    clipped = jax.tree.map(lambda g: jnp.clip(g, -0.05, 0.05), GRADS)
    expected = optax.tree.scale(0.5, run(TRANSFORM, clipped)[0])
    assert optax.tree.allclose(run(chain, GRADS)[0], expected)


def test_inject_hyperparams_schedules_a_beta():
    """beta1 and beta3 can be injected, scheduled and read back from the state."""
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    injected = optax.inject_hyperparams(star.star)
    transform = injected(random_theta(0), beta1=schedule, beta3=0.0)
    first, _ = run(transform, GRADS)
    second, state = run(transform, GRADS, GRADS)
    assert all(not u.any() for u in jax.tree.leaves(first))  # the schedule starts at 0
    assert float(state.hyperparams["beta1"]) == pytest.approx(0.1)
    assert all(u.any() for u in jax.tree.leaves(second))


def test_multisteps_uses_the_mean_gradient():
    """optax.MultiSteps over STAR: no update, then that of the mean of both gradients."""
    transform = optax.MultiSteps(TRANSFORM, every_k_schedule=2)
    none, _ = run(transform, GRADS)
    assert all(not u.any() for u in jax.tree.leaves(none))
    found, _ = run(transform, GRADS, optax.tree.scale(3, GRADS))
    assert optax.tree.allclose(found, run(TRANSFORM, optax.tree.scale(2, GRADS))[0])


def test_masked_leaves_pass_through():
    """optax.masked: STAR keeps no state for a masked leaf and leaves its update alone."""
    transform = optax.masked(TRANSFORM, {"w": True, "inner": [False]})
    updates, state = run(transform, GRADS)
    np.testing.assert_array_equal(updates["inner"][0], GRADS["inner"][0])
    assert (updates["w"] != GRADS["w"]).all()
    assert isinstance(state.inner_state.tensors["inner"][0], optax.MaskedNode)


def test_tree_map_params_reaches_every_running_mean():
    """optax.tree.map_params maps all state of the parameters, and not the step count. In a
    map of shardings each parameter's own TensorState meets that parameter's sharding."""
    map_params = functools.partial(optax.tree.map_params, TRANSFORM)
    state = map_params(lambda x: x + 1, TRANSFORM.init(PARAMS))
    means = jax.tree.leaves(state.tensors)
    assert len(means) == 2 * 6 and all((x == 1).all() for x in means)
    of = functools.partial(jax.NamedSharding, jax.make_mesh((1,), ("x",)))
    shardings = {"w": of(jax.P("x")), "inner": [of(jax.P())]}
    is_leaf = lambda x: isinstance(x, star.TensorState)  # noqa: E731
    placed = map_params(jax.device_put, state, shardings, is_leaf=is_leaf)
    for name, tensors in placed.tensors.items():
        found = {x.sharding for x in jax.tree.leaves(tensors)}
        assert found == set(jax.tree.leaves(shardings[name]))
    assert state.count == placed.count == 0


def test_update_compiles_once_and_keeps_the_state_types():
    """Three calls, one trace: no type changes, weak or not. The state may be donated."""
    traces, state = [], TRANSFORM.init(PARAMS)

    @functools.partial(jax.jit, donate_argnums=0)  # traces again if a type changes
    def step(state):
        traces.append(state)
        return TRANSFORM.update(GRADS, state, PARAMS)[1]

    for _ in range(3):
        state = step(state)
    assert len(traces) == 1 and state.count == 3


@pytest.mark.parametrize("form", [star, star_fast])
@pytest.mark.parametrize("shape", [(2,) + (1,) * 11 + (3,), (0, 3), (0,)])
def test_tensors_of_any_rank_and_none_at_all(form, shape):
    """Rank 13, and tensors without an element: nothing is nan, in the state neither."""
    update, p = form.PRESETS["star"].update, jnp.ones(shape)
    updates, state = jax.jit(update)(random_theta(0), p, star.init(p), p)
    assert updates.shape == shape and all_finite(updates, state)


@pytest.mark.parametrize("form", [star, star_fast])
@pytest.mark.parametrize("size", [1e19, 3e38, np.inf])
def test_one_bad_batch_ends_no_training(form, size):
    """A huge gradient is clipped at 1e15, and the parameters move on, finite."""
    update, p = jax.jit(form.PRESETS["star"].update), jnp.ones((4, 3))
    state = star.init(p)
    for scale in (1, size, 1):
        updates, state = update(random_theta(0), scale * jnp.ones((4, 3)), state, p)
        assert all_finite(updates, state)


def test_the_count_stays_at_the_largest_int32():
    """As in optax: time features after 2^31 updates are those of before."""
    last = np.int32(2**31 - 1)
    state = TRANSFORM.init(PARAMS)._replace(count=jnp.asarray(last))
    updates, state = TRANSFORM.update(GRADS, state, PARAMS)
    assert state.count == last and all_finite(updates)


def test_what_is_no_array_of_floats_is_named():
    """Integers, and the functions in an unfiltered model of equinox."""
    for leaf, name in ((jnp.ones(2, int), "int32"), (jax.nn.relu, "relu|function")):
        with pytest.raises(TypeError, match=f"STAR updates.*({name}|jax)"):
            star.init({"leaf": leaf})


def test_float64_changes_no_type():
    """With float64 enabled, and in theta: state and float32 updates stay float32."""
    with jax.enable_x64(True):
        theta = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_theta(0))
        p = jnp.ones((4, 3), jnp.float32)
        state = star.init(p)
        updates, after = star.PRESETS["star"].update(theta, p, state, p)
    assert updates.dtype == jnp.float32
    kinds = [[x.dtype for x in jax.tree.leaves(s)] for s in (state, after)]
    assert kinds[0] == kinds[1]


# --- Theta and its file


def test_wrong_theta_is_named():
    """A theta of another shape or with other names is a one-line ValueError."""
    for change in ({"w0": np.zeros((38, 4))}, {"extra": np.zeros(1)}):
        with pytest.raises(ValueError, match=r"^theta should have[^\n]*\Z"):
            star.star(SILENT | change)
        with pytest.raises(ValueError, match="theta"):
            star.PRESETS["star"].update(SILENT | change, {}, star.init({}), {})


@pytest.mark.parametrize("name", star.CONSTANTS)
def test_theta_survives_its_file(name, tmp_path):
    """save_theta and load_theta: same bits, same constants. Other arrays are skipped."""
    c, path = star.CONSTANTS[name], tmp_path / "theta.npz"
    theta, card = random_theta(0, c), {"constants": c._asdict()}
    star.save_theta(path, theta, card, **{"run/x": np.ones(2)})
    loaded, constants = star.load_theta(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)
    assert constants == c


OLD_CARD = dict(normalizer_eps=1e-5, statistic_eps=1e-8, factor_floor=1e-9)
OLD_CARD |= dict(vector_eps=1e-6, square_floor=1e-30, rms_decay=0.999)
OLD_CARD |= {f"{x}_decays": [0.9, 0.99, 0.999] for x in ("momentum", "adafactor")}
BAD_CONSTANTS = [{"beta9": 1}, {"beta1": "x"}, {"nominal": "lion"}]
BAD_CONSTANTS += [{name: 0.5} for name in (*OLD_CARD, "preconditioner")]


@pytest.mark.parametrize("word, meaning", [("rms", True), ("none", False)])
def test_old_cards_load(word, meaning, tmp_path):
    """They name constants that are fixed now, and the preconditioner by a word."""
    card = {"constants": OLD_CARD | {"preconditioner": word, "beta3": 1e-6}}
    star.save_theta(tmp_path / "theta.npz", SILENT, card)
    _, c = star.load_theta(tmp_path / "theta.npz")
    assert c == star.Constants(beta3=1e-6, preconditioner=meaning)


def test_bad_theta_files_are_one_line_errors(tmp_path):
    """Text, a cut-off file, a pickle, a foreign npz, other constants and an absent file get
    one line from the programs. They never run code from the file."""
    for i, constants in enumerate(BAD_CONSTANTS):
        star.save_theta(tmp_path / f"{i}.npz", SILENT, {"constants": constants})
    good = (tmp_path / "0.npz").read_bytes()
    contents = {
        "text": b"no zip file",
        "empty": b"",
        "cut": good[:300],
        "late": good[:-9],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", **SILENT | {"w0": np.array([{}], dtype=object)})
    np.savez(tmp_path / "card.npz", card=np.array("no json"), **SILENT)
    np.savez(tmp_path / "list.npz", card=np.array("[1]"), **SILENT)
    with pytest.raises(store.UserError, match=r"card.npz[^\n]*\Z"):
        store.read_card(tmp_path / "card.npz")
    for path in (*tmp_path.iterdir(), tmp_path / "absent.npz"):
        with pytest.raises(store.UserError, match=rf"{path.name}[^\n]*\Z"):
            store.read_theta(path, star.load_theta)


# --- Files that users copy, and the README's example

USE = {
    "star.py": """
optimizer, p = m.star(m.PRESETS["star"].init_theta(key)), jax.numpy.ones((2, 3))
assert optimizer.update(p, optimizer.init(p), p)[0].shape == p.shape""",
    "nqm.py": """
u = m.nominal_plus(0 * m.H, 0.5)
assert abs(m.expected_loss(u, m.paper_model(), 10) - 1.608) < 1e-3""",
    "estimators.py": """
problem = m.unroll(lambda key: 0.0, lambda theta, s, key: (s + theta, s + theta), 2)
estimator, theta = m.population(m.pes(problem, 2, 0.1), 2), jax.numpy.ones(())
assert estimator.estimate(key, theta, estimator.init(key, theta))[0].shape == ()""",
    "companions/lopts.py": """
optimizer, p = m.LEARNED["mlp"], {"w": jax.numpy.ones((2, 3))}
optimizer.update(optimizer.init_theta(key), p, optimizer.init(p), p)[0]["w"]""",
    "companions/dynamics.py": """
momentum = lambda theta, g, v, p: (-theta * (0.9 * v + g), 0.9 * v + g)
optimizer = m.LearnedOptimizer(None, jax.numpy.zeros_like, momentum)
assert abs(m.modes_of(m.linearise(optimizer, 0.1)).momentum[0] - 0.9) < 1e-6""",
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", USE)
def test_file_stands_alone(name, tmp_path):
    """Copied into an empty folder, the module imports and works."""
    path = HERE / name
    (tmp_path / path.name).write_text(path.read_text())
    code = f"import jax, {path.stem} as m\nkey = jax.random.key(0){USE[name]}"
    env = {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env)
    assert done.returncode == 0


def test_readme_example_runs():
    """The README's lines for an optax loop, word for word, take a step downhill."""
    example = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {"loss": lambda p: (p["w"] ** 2).sum(), "params": {"w": jnp.ones((3, 4))}}
    exec(example.replace("weights/", f"{HERE}/weights/"), scope)
    assert scope["loss"](scope["params"]) < 12
