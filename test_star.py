"""The claims of section 5 about the optimizer, and its conformance to optax."""

import itertools
import pathlib
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import star

HERE = pathlib.Path(__file__).resolve().parent
VECTORS = np.load(HERE / "tests" / "test_vectors.npz")
CASES = {
    "star_matrix": "star",
    "star_vector": "star",
    "star_conv": "star",
    "blackbox_matrix": "blackbox",
    "hyperparam_matrix": "hyperparam",
}
SHAPES = [(), (5,), (1,), (3, 4), (4, 3), (4, 4), (1, 6), (2, 3, 4), (3, 2, 2, 5)]
seeds = st.integers(0, 2**31 - 1)
run_jitted = {
    name: jax.jit(optimizer.update) for name, optimizer in star.PRESETS.items()
}


def random_theta(seed, constants=star.Constants()):  # noqa: B008
    """A theta with every entry nonzero: biases and decay offsets too."""
    rng = np.random.default_rng(seed)
    small = {"momentum_decays", "rms_decays", "adafactor_decays"}
    return {
        name: jnp.asarray(
            rng.normal(0, 0.02 if name in small else 0.7, shape), jnp.float32
        )
        for name, shape in star.theta_shapes(constants).items()
    }


def plain_update(theta, c, count, m, v, row, col, g, p):
    """The optimizer once more, in float64 numpy, one feature after the other.

    All 39 features of every parameter are written out as columns of one table. Means m
    (3, *P), v (*P), row and col (3, *P) already full size, are updated in place.
    """
    shift = lambda d, o: 1 - np.exp(10 * (np.log(1 - d) / 10 + o))  # noqa: E731
    axes = tuple(range(g.ndim))
    g2 = g * g + 1e-30
    second, largest = (
        (np.argsort(g.shape, kind="stable")[-2:]) if g.ndim > 1 else (0, 0)
    )
    for k, d in enumerate((0.9, 0.99, 0.999)):
        dm = shift(d, theta["momentum_decays"][k])
        da = np.clip(shift(d, theta["adafactor_decays"][k]), 0, 1)
        m[k] = dm * m[k] + (1 - dm) * g
        means = (
            (g2, g2)
            if g.ndim < 2
            else (g2.mean(largest, keepdims=True), g2.mean(second, keepdims=True))
        )
        row[k] = da * row[k] + (1 - da) * means[0]
        col[k] = da * col[k] + (1 - da) * means[1]
    dv = np.clip(shift(0.999, theta["rms_decays"][0]), 0, 1)
    v[...] = dv * v + (1 - dv) * g2
    inverse_v = 1 / np.sqrt(v + 1e-6)

    features = [g, p, *m, v, *(x * inverse_v for x in m), inverse_v]
    factor, momentum_factor = [], []
    for k in range(3):
        if g.ndim < 2:
            factor.append(1 / np.sqrt(np.maximum(row[k] + 1e-9, 1e-9)))
            momentum_factor.append(1 / np.sqrt(row[k] + 1e-6))
        else:
            row_mean = row[k].mean(second, keepdims=True) + 1e-9
            r = 1 / np.sqrt(np.maximum(row[k] / row_mean, 1e-9))
            factor.append(r / np.sqrt(np.maximum(col[k], 1e-9)))
            momentum_factor.append(factor[-1])
    features += [g * f for f in factor]
    features += [*row, *col, *(1 / np.sqrt(x + 1e-8) for x in (*row, *col))]
    features += [x * f for x, f in zip(m, momentum_factor, strict=True)]
    table = []
    for x in features:
        x = np.broadcast_to(x, g.shape)
        table.append((x / np.sqrt(1e-5 + (x * x).mean(axes))).reshape(-1))
    for tau in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000):
        table.append(np.full(g.size, np.tanh(count / tau - 1)))
    x = np.stack(table, 1)  # (n, 39)
    h = np.maximum(x @ theta["w0"] + theta["b0"], 0)
    h = np.maximum(h @ theta["w1"] + theta["b1"], 0)
    out = (h @ theta["w2"] + theta["b2"]).reshape(*g.shape, -1)
    d, m_b = out[..., 0], out[..., 1]
    f_b = c.beta3 * d * np.exp(c.beta4 * m_b)
    if c.preconditioner == "rms":
        f_b = f_b * inverse_v
    if c.nominal == "none":
        return -f_b
    return -(f_b + c.beta1 * np.exp(c.beta2 * out[..., 2]) * m.mean(0) * inverse_v)


def plain_state(p):
    if p.ndim < 2:
        return [np.zeros((3, *p.shape)), np.zeros(p.shape)] + [
            np.zeros((3, *p.shape)) for _ in "rc"
        ]
    second, largest = np.argsort(p.shape, kind="stable")[-2:]
    shapes = (
        [1 if i == axis else n for i, n in enumerate(p.shape)]
        for axis in (largest, second)
    )
    return [
        np.zeros((3, *p.shape)),
        np.zeros(p.shape),
        *(np.zeros((3, *s)) for s in shapes),
    ]


def test_python_floats_and_x64():
    """A Python float is a parameter too; with x64 the state stays float32."""
    updates, _ = star.PRESETS["star"].update(
        random_theta(0), {"a": 0.1}, star.init({"a": 1.0}), {"a": 1.0}
    )
    assert updates["a"].dtype == jnp.float32
    with jax.enable_x64(True):
        theta = star.PRESETS["star"].init_theta(jax.random.key(0))
        p = {"a": jnp.ones((2, 3), jnp.float64)}
        updates, state = jax.jit(star.PRESETS["star"].update)(theta, p, star.init(p), p)
        assert updates["a"].dtype == jnp.float64
        means = (state.momentum, state.rms, state.row, state.col)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(means))


@pytest.mark.parametrize("case", CASES)
def test_update_equals_the_authors_code(case):
    """Parameters after every step agree to 1e-5 with google/learned_optimization's, run in
    float32 on a CPU: its small_fc_lopt, STAR, and STAR with beta3 = 0."""
    z = {
        k.removeprefix(f"{case}/"): VECTORS[k]
        for k in VECTORS.files
        if k.startswith(case)
    }
    theta = {
        k.removeprefix("theta/"): v for k, v in z.items() if k.startswith("theta/")
    }
    p = jnp.asarray(z["params0"])
    state = star.init(p)._replace(count=jnp.asarray(z["step0"]))
    for g, expected in zip(z["grads"], z["params"], strict=True):
        update, state = run_jitted[CASES[case]](theta, jnp.asarray(g), state, p)
        p = p + update
        np.testing.assert_allclose(p, expected, rtol=1e-5)
    assert any(not g.any() for g in z["grads"])  # a zero gradient is among them


@pytest.mark.parametrize("name", star.PRESETS)
@given(seed=seeds)
def test_folded_form_equals_the_plain_one(name, seed):
    """The fast update equals the 39-column table on ranks 0 to 4, zero gradients too."""
    rng = np.random.default_rng(seed)
    c = star.CONSTANTS[name]
    theta = random_theta(seed, c)
    theta64 = {k: np.asarray(x, np.float64) for k, x in theta.items()}
    shapes = SHAPES if name in ("star", "blackbox") else [(5,), (3, 4)]
    params = [rng.normal(size=s).astype(np.float32) for s in shapes]
    state = star.init([jnp.asarray(p) for p in params])
    plain = [plain_state(p) for p in params]
    for t in range(3):
        scale = 0.0 if t == 1 else 10 ** rng.uniform(-4, 1)
        grads = [(scale * rng.normal(size=s)).astype(np.float32) for s in shapes]
        updates, state = run_jitted[name](theta, grads, state, params)
        for u, g, p, accumulators in zip(updates, grads, params, plain, strict=True):
            expected = plain_update(
                theta64, c, t, *accumulators, g.astype(np.float64), p
            )
            # In float32 the direction head may cancel to a few times 1e-6 of its terms.
            largest_step = c.beta1 + c.beta3 / np.sqrt(accumulators[1].min() + 1e-6)
            np.testing.assert_allclose(u, expected, rtol=2e-4, atol=2e-5 * largest_step)


@pytest.mark.parametrize(
    "name, count",
    [("star", 202), ("hyperparam", 202), ("blackbox", 197), ("no_nominal", 197)],
)
def test_number_of_meta_parameters(name, count):
    """Section 5.2: 197 for small_fc_lopt; STAR adds one head of 5 and no more."""
    theta = star.PRESETS[name].init_theta(jax.random.key(0))
    assert sum(x.size for x in theta.values()) == count


@jax.jit
def update_with_betas(theta, beta1, beta3, g, p):
    c = star.Constants(beta1=beta1, beta3=beta3)
    return star.learned_optimizer(c).update(theta, g, star.init(p), p)


@given(seed=seeds)
def test_update_is_linear_in_beta1_and_beta3(seed):
    """f = f_b + f_g, with f_b proportional to beta3 and f_g to beta1 (equations 21, 22)."""
    rng = np.random.default_rng(seed)
    p, g = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))

    def f(beta1, beta3):
        return update_with_betas(random_theta(seed), beta1, beta3, g, p)[0]

    expected = 2 * f(1.0, 0.0) + 3 * f(0.0, 1.0)
    np.testing.assert_allclose(f(2.0, 3.0), expected, rtol=1e-4, atol=1e-4)


@given(seed=seeds)
def test_preconditioner_divides_the_blackbox_term_by_v(seed):
    """f_b of STAR times v is f_b without the preconditioner (equation 22 against 20)."""
    rng = np.random.default_rng(seed)
    p, g = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    theta = random_theta(seed)
    with_v, state = update_with_betas(theta, 0.0, 1e-3, g, p)
    nominal, _ = update_with_betas(theta, 1e-3, 0.0, g, p)
    without, _ = run_jitted["no_preconditioner"](theta, g, star.init(p), p)
    blackbox = with_v * jnp.sqrt(state.rms + 1e-6)
    np.testing.assert_allclose(nominal + blackbox, without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nominal", [n for n in star.NOMINAL])
def test_nominal_terms_against_optax(nominal):
    """With beta3 = 0 and m_g = 0, f_g is the named hand-designed step times beta1."""
    c = star.Constants(beta3=0.0, nominal=nominal)
    theta = {k: jnp.zeros(s) for k, s in star.theta_shapes(c).items()}
    p = jnp.asarray([1.0, -2.0, 3.0])
    update_jitted = jax.jit(star.learned_optimizer(c).update)
    state = star.init(p)
    means = [optax.ema(d, debias=False) for d in (0.9, 0.99, 0.999)]
    ema_states = [mean.init(p) for mean in means]
    square = optax.ema(0.999, debias=False)
    square_state = square.init(p)
    for t in range(5):
        g = jnp.sin(p + t)
        update, state = update_jitted(theta, g, state, p)
        pairs = [mean.update(g, s) for mean, s in zip(means, ema_states, strict=True)]
        m, ema_states = zip(*pairs, strict=True)
        v, square_state = square.update(g * g, square_state)
        rms = jnp.sqrt(v + 1e-6)
        expected = {
            "sgd": g,
            "sgdm": m[0],
            "aggmo": sum(m) / 3,
            "adam": m[0] / rms,
            "adam_aggmo": sum(x / rms for x in m) / 3,
        }[nominal]
        np.testing.assert_allclose(update, -1e-3 * expected, rtol=2e-5)


def test_nominal_term_overshoots_without_bias_correction():
    """A constant gradient is stepped along 1.17 x beta1 at first, 2.59 x at t = 15.

    The authors' running means start at zero uncorrected: a hidden warm-up (and more).
    """
    c = star.Constants(beta3=0.0)
    theta = {k: jnp.zeros(s) for k, s in star.theta_shapes(c).items()}
    g = p = jnp.asarray([1.0])

    def step(state, _):
        update, state = star.learned_optimizer(c).update(theta, g, state, p)
        return state, -update[0] / 1e-3

    _, multiplier = jax.lax.scan(step, star.init(p), None, length=2000)
    first, peak, last = multiplier[0], multiplier.max(), multiplier[-1]
    np.testing.assert_allclose([first, peak, last], [1.17, 2.59, 1.03], atol=0.01)
    assert int(multiplier.argmax()) + 1 == 15


@given(seed=seeds)
def test_update_moves_with_a_permutation_of_rows_and_columns(seed):
    """The network sees elements, rows and columns, never positions."""
    theta, rng = random_theta(seed), np.random.default_rng(seed)
    p, g = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    rows, cols = rng.permutation(4), rng.permutation(6)

    def f(p, g):
        return np.asarray(run_jitted["star"](theta, g, star.init(p), p)[0])

    permuted = f(p[rows][:, cols], g[rows][:, cols])
    np.testing.assert_allclose(permuted, f(p, g)[rows][:, cols], rtol=1e-4, atol=1e-4)


@given(offset=st.floats(-1, 1, width=32))
def test_second_moment_decays_stay_in_the_unit_interval(offset):
    """Stable hidden states (section 5.1): whatever the offset, rms and adafactor's."""
    theta = random_theta(0) | {
        "rms_decays": jnp.full(1, offset),
        "adafactor_decays": jnp.full(3, offset),
    }
    decays = star.effective_decays(theta, star.Constants())
    for d in (decays.rms, decays.adafactor):
        assert ((d >= 0) & (d <= 1)).all()


def test_offset_zero_gives_the_named_decays():
    """The decays of the running means are .9 .99 .999 until they are learned."""
    theta = {k: jnp.zeros(s) for k, s in star.theta_shapes(star.Constants()).items()}
    decays = star.effective_decays(theta, star.Constants())
    np.testing.assert_allclose(decays.momentum, [0.9, 0.99, 0.999], rtol=1e-6)
    np.testing.assert_allclose(decays.rms, [0.999], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_the_dtype_and_accumulators_are_float32(dtype):
    """Parameters may be of low precision; the running means never are."""
    p = {"a": jnp.ones((3, 4), dtype), "b": jnp.ones((), dtype)}
    updates, state = run_jitted["star"](random_theta(0), p, star.init(p), p)
    assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
    means = (state.momentum, state.rms, state.row, state.col)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(means))


def test_bfloat16_agrees_with_float32():
    """The update is computed in float32 and rounded once."""
    rng = np.random.default_rng(0)
    p, g = (jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16) for _ in range(2))
    low, _ = run_jitted["star"](random_theta(0), g, star.init(p), p)
    p, g = p.astype(jnp.float32), g.astype(jnp.float32)
    full, _ = run_jitted["star"](random_theta(0), g, star.init(p), p)
    np.testing.assert_array_equal(low, full.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_other_dtypes_are_refused(dtype):
    """Integer and complex parameters raise TypeError at init."""
    with pytest.raises(TypeError, match="real floating-point"):
        star.init({"p": jnp.ones(2, dtype)})


def test_zero_gradients_forever_stay_finite():
    """No epsilon is missing: zeros give finite updates on every rank."""
    p = [jnp.zeros(s) for s in SHAPES]
    state = star.init(p)
    for _ in range(3):
        updates, state = run_jitted["star"](random_theta(1), p, state, p)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.heavy
def test_update_is_differentiable_in_theta():
    """The meta-gradient by backpropagation agrees with finite differences."""
    rng = np.random.default_rng(0)
    p, g = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    c = star.Constants(beta1=1.0, beta2=0.1, beta3=1.0, beta4=0.1)

    @jax.jit
    def loss(theta):
        update, _ = star.learned_optimizer(c).update(theta, g, star.init(p), p)
        return (update**2).mean()

    theta, direction = random_theta(3), random_theta(4)
    slope = optax.tree.vdot(jax.jit(jax.grad(loss))(theta), direction)
    h = 1e-3
    ahead = loss(optax.tree.add_scale(theta, h, direction))
    behind = loss(optax.tree.add_scale(theta, -h, direction))
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * h), rel=2e-2)


# The optax interface.

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.full((4,), 0.5), "scale": jnp.float32(2.0)}
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.01, PARAMS)


def test_adapter_gives_the_optimizers_updates():
    """star.star(theta) is PRESETS["star"] with theta bound; extra arguments are ignored."""
    theta = random_theta(0)
    transform = star.star(theta)
    assert isinstance(transform, optax.GradientTransformationExtraArgs)
    updates, _ = transform.update(GRADS, transform.init(PARAMS), PARAMS, value=1.0, x=2)
    expected, _ = star.PRESETS["star"].update(theta, GRADS, star.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_adapter_needs_params():
    """The parameter is a feature, so update without it is a clear error."""
    transform = star.star(random_theta(0))
    with pytest.raises(ValueError, match="params"):
        transform.update(GRADS, transform.init(PARAMS))


def test_chain_and_scale():
    """STAR composes: clipping before it, a scale after it."""
    transform = optax.chain(
        optax.clip(0.05), star.star(random_theta(0)), optax.scale(0.5)
    )
    updates, _ = transform.update(GRADS, transform.init(PARAMS), PARAMS)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -0.05, 0.05), GRADS)
    plain = star.star(random_theta(0))
    expected, _ = plain.update(clipped, plain.init(PARAMS), PARAMS)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, 0.5 * e), updates, expected)


def test_inject_hyperparams_schedules_a_beta():
    """beta1 and beta3 can be injected, scheduled and read back from the state."""
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    make = optax.inject_hyperparams(star.star)
    transform = make(random_theta(0), beta1=schedule, beta3=0.0)
    state = transform.init(PARAMS)
    first, state = jax.jit(transform.update)(GRADS, state, PARAMS)
    second, state = jax.jit(transform.update)(GRADS, state, PARAMS)
    assert all(not u.any() for u in jax.tree.leaves(first))  # the schedule starts at 0
    assert float(state.hyperparams["beta1"]) == pytest.approx(0.1)
    assert all(u.any() for u in jax.tree.leaves(second))


def test_multisteps_uses_the_mean_gradient():
    """optax.MultiSteps over STAR: no update, then that of the mean of both gradients."""
    transform = optax.MultiSteps(star.star(random_theta(0)), every_k_schedule=2)
    state = transform.init(PARAMS)
    doubled = jax.tree.map(lambda g: 3 * g, GRADS)
    none, state = transform.update(GRADS, state, PARAMS)
    updates, state = transform.update(doubled, state, PARAMS)
    assert all(not u.any() for u in jax.tree.leaves(none))
    plain = star.star(random_theta(0))
    mean = jax.tree.map(lambda g: 2 * g, GRADS)
    expected, _ = plain.update(mean, plain.init(PARAMS), PARAMS)
    jax.tree.map(
        lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-4), updates, expected
    )


def test_masked_leaves_pass_through():
    """optax.masked: STAR keeps no state for a masked leaf and leaves its update alone."""
    transform = optax.masked(
        star.star(random_theta(0)), {"w": True, "b": False, "scale": True}
    )
    state = transform.init(PARAMS)
    updates, _ = transform.update(GRADS, state, PARAMS)
    np.testing.assert_array_equal(updates["b"], GRADS["b"])
    assert isinstance(state.inner_state.rms["b"], optax.MaskedNode)


def test_tree_map_params_reaches_every_running_mean():
    """optax.tree.map_params maps all parameter-shaped state, and not the step count."""
    transform = star.star(random_theta(0))
    state = optax.tree.map_params(transform, lambda x: x + 1, transform.init(PARAMS))
    means = jax.tree.leaves((state.momentum, state.rms, state.row, state.col))
    assert all((x == 1).all() for x in means) and state.count == 0
    # momentum and rms have the parameters' own shapes, so sharding specs apply to them
    for tree in (*state.momentum, state.rms):
        jax.tree.map(
            lambda x, p: np.testing.assert_equal(x.shape, p.shape), tree, PARAMS
        )


def test_update_compiles_once_and_keeps_the_state_types():
    """Three calls, one trace; shapes, dtypes and weak types of the state do not change."""
    traces = itertools.count()
    transform = star.star(random_theta(0))

    @jax.jit
    def step(grads, state, params):
        next(traces)
        return transform.update(grads, state, params)

    state = transform.init(PARAMS)
    kinds = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    for _ in range(3):
        _, state = step(GRADS, state, PARAMS)
        assert kinds == [
            (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)
        ]
    assert next(traces) == 1


def test_empty_tree():
    """No parameters, no updates, no error."""
    transform = star.star(random_theta(0))
    updates, state = transform.update({}, transform.init({}), {})
    assert updates == {} and state.count == 1


# Theta and its file.


@pytest.mark.parametrize(
    "change", [{"w0": jnp.zeros((38, 4))}, {"extra": jnp.zeros(1)}]
)
def test_wrong_theta_is_named(change):
    """A theta of another shape or with other names is a one-line ValueError."""
    with pytest.raises(ValueError, match="theta") as error:
        star.star(random_theta(0) | change)
    assert "\n" not in str(error.value)


@given(seed=seeds)
def test_theta_survives_its_file(seed, tmp_path):
    """save_theta and load_theta: same bits, same constants."""
    c = star.Constants(beta3=1e-6)
    theta = random_theta(seed, c)
    star.save_theta(tmp_path / "theta.npz", theta, {"constants": c._asdict()})
    loaded, constants = star.load_theta(tmp_path / "theta.npz")
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)
    assert constants == c


def test_bad_theta_files_are_one_line_errors(tmp_path):
    """Text, a truncated file, a pickle, a foreign npz, nan: ValueError, never a traceback
    from inside numpy and never code from the file."""
    good = tmp_path / "good.npz"
    star.save_theta(good, random_theta(0), {})
    cases = {
        "text.npz": b"not a zip file",
        "truncated.npz": good.read_bytes()[:300],
        "empty.npz": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", w0=np.array([{}], dtype=object))
    star.save_theta(
        tmp_path / "nan.npz", random_theta(0) | {"b0": jnp.full(4, jnp.nan)}, {}
    )
    star.save_theta(
        tmp_path / "beta.npz", random_theta(0), {"constants": {"beta1": "x"}}
    )
    star.save_theta(tmp_path / "card.npz", random_theta(0), {"constants": {"beta9": 1}})
    for name in [
        *cases,
        "foreign.npz",
        "pickle.npz",
        "nan.npz",
        "card.npz",
        "beta.npz",
    ]:
        with pytest.raises(ValueError) as error:
            star.load_theta(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(OSError):
        star.load_theta(tmp_path / "absent.npz")


@pytest.mark.parametrize("field", [{"nominal": "lion"}, {"preconditioner": "hessian"}])
def test_unknown_constants_are_refused(field):
    """The names of the nominal term and the preconditioner are checked."""
    with pytest.raises(ValueError, match=next(iter(field.values()))):
        star.learned_optimizer(star.Constants(**field))


USE_STAR = """
o = m.star(m.PRESETS["star"].init_theta(jax.random.key(0)))
p = {"w": jax.numpy.ones((2, 3))}
print(o.update(p, o.init(p), p)[0]["w"].size)
"""
USE_ESTIMATORS = """
problem = m.unroll(lambda key: 0.0, lambda theta, s, key: (s + theta, s + theta), 2)
estimator, theta = m.population(m.pes(problem, 2, 0.1), 2), jax.numpy.ones(6)[0]
state = estimator.init(jax.random.key(0), theta)
print(estimator.estimate(jax.random.key(1), theta, state)[0].size + 5)
"""
USE_LOPTS = """
o, p = m.LEARNED["mlp"], {"w": jax.numpy.ones((2, 3))}
print(o.update(o.init_theta(jax.random.key(0)), p, o.init(p), p)[0]["w"].size)
"""
USE_NQM = """
import numpy
check = m.check(m.H, numpy.zeros((2, 2)), 0.5)
loss = m.expected_loss(m.nominal_plus(jax.numpy.zeros((2, 2)), 0.5), m.paper_model(), 10)
print(6 if check.radius < 1 and abs(loss - 1.608) < 1e-3 else check)
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name, use",
    [
        ("star.py", USE_STAR),
        ("estimators.py", USE_ESTIMATORS),
        ("nqm.py", USE_NQM),
        ("companions/lopts.py", USE_LOPTS),
    ],
)
def test_file_stands_alone(name, use, tmp_path):
    """Copied into an empty folder, the module imports and works."""
    (tmp_path / pathlib.Path(name).name).write_text((HERE / name).read_text())
    code = f"import jax, {pathlib.Path(name).stem} as m\n{use}"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "6"


def test_readme_example_runs():
    """The README's lines for an optax loop, word for word, take a step downhill."""
    text = (HERE / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    scope = {
        "loss": lambda p: (p["w"] ** 2).sum(),
        "params": {"w": jnp.ones((3, 4))},
    }
    exec(example.replace("weights/", f"{HERE}/weights/"), scope)
    assert scope["loss"](scope["params"]) < 12
