"""The reading of trained optimizers: known modes are found, and the reading runs again."""

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

import settings
import star
import train
from companions import dynamics, lopts, problems
from figures import maheswaranathan as figures_dynamics
from tasks import TASKS

HERE = pathlib.Path(__file__).resolve().parent.parent
PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.float32(0.3)}
seeds = st.integers(0, 2**32 - 1)


def linear_optimizer(a, b, w, d=0.0, start=None) -> lopts.LearnedOptimizer:
    """h' = A h + b g, u = w'h' + d g, on every parameter by itself; theta is {}."""
    first = np.zeros(len(b)) if start is None else start

    def init(params):
        def one(p):
            h = first.reshape(-1, *[1] * p.ndim)
            return jnp.broadcast_to(jnp.asarray(h, p.dtype), (len(b), *p.shape))

        return jax.tree.map(one, params)

    def update(theta, grads, state, params):
        def one(g, h):
            new = jnp.einsum("ij,j...->i...", jnp.asarray(a, g.dtype), h)
            new = new + jnp.multiply.outer(jnp.asarray(b, g.dtype), g)
            u = jnp.einsum("i,i...->...", jnp.asarray(w, g.dtype), new)
            return u + jnp.asarray(d, g.dtype) * g, new

        both = jax.tree.map(one, grads, state)
        return jax.tree.transpose(jax.tree.structure(grads), None, both)

    return lopts.LearnedOptimizer(lambda key: {}, init, update)


def read(optimizer, theta=None) -> dynamics.Modes:
    return dynamics.modes_of(dynamics.linearise(optimizer, theta or {}))


def grads_at(t):
    return jax.tree.map(lambda p: jnp.sin(3 * p + t) + 0.1 * p, PARAMS)


def updates_of(optimizer, theta=None, steps=12, grads=grads_at):
    """All updates (steps, 7) for gradients that do not depend on them; plain loop."""
    state, out = optimizer.init(PARAMS), []
    update = jax.jit(optimizer.update)
    for t in range(steps):
        updates, state = update(theta or {}, grads(t), state, PARAMS)
        out.append(jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(updates)]))
    return np.asarray(jnp.stack(out))


def system(seed, n=4):
    """A stable real (A, b, w): one conjugate pair, n - 2 real eigenvalues apart."""
    rng = np.random.default_rng(seed)
    radius, angle = rng.uniform(0.3, 0.95), rng.uniform(0.3, 2.8)
    real = np.linspace(-0.8, 0.97, n - 2) + rng.uniform(-0.02, 0.02, n - 2)
    blocks = np.diag([0.0, 0.0, *real])
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    blocks[:2, :2] = radius * np.array(turn)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0] @ np.diag(rng.uniform(0.5, 2, n))
    a = basis @ blocks @ np.linalg.inv(basis)
    return a, rng.normal(size=n), rng.normal(size=n)


def impulse(a, b, w, d=0.0, steps=30):
    """u at k = 0, 1, ... after g = 1: w'A^k b, plus d at once."""
    out = [w @ np.linalg.matrix_power(a, k) @ b for k in range(steps)]
    return np.array(out) + d * (np.arange(steps) == 0)


# --- what is known is found


def test_known_modes_are_recovered():
    """Three momenta mixed by any basis: every (alpha, beta) comes back."""
    beta, alpha = np.array([0.9, 0.5, -0.3]), np.array([0.1, 2.0, -0.5])
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(3, 3))
    a = basis @ np.diag(beta) @ np.linalg.inv(basis)
    modes = read(linear_optimizer(a, basis @ np.ones(3), -alpha @ np.linalg.inv(basis)))
    order = np.argsort(-modes.momentum.real)
    np.testing.assert_allclose(modes.momentum[order], beta, atol=1e-10)
    np.testing.assert_allclose(modes.learning_rate[order], alpha, atol=1e-9)
    assert abs(modes.direct) < 1e-9 and modes.drift == 0
    np.testing.assert_allclose(modes.left @ modes.right, np.eye(3), atol=1e-10)


@given(seed=seeds, d=st.floats(-2, 2))
def test_any_stable_system_is_the_sum_of_its_modes(seed, d):
    """sum alpha_j beta_j^k is the response of a random system, complex pairs included."""
    a, b, w = system(seed)
    linear = dynamics.Linear(
        a, b, a.T @ w, w @ b + d, np.zeros(4), np.zeros(4), 0.0, 0.0
    )
    modes = dynamics.modes_of(linear)
    np.testing.assert_allclose(
        dynamics.response(modes, 30), -impulse(a, b, w, d), atol=1e-7
    )
    assert modes.direct == pytest.approx(-d, abs=1e-7)
    assert (modes.momentum.imag != 0).sum() == 2


@pytest.mark.parametrize(
    "nesterov, alpha, direct", [(False, 0.3, 0), (True, 0.24, 0.3)]
)
def test_momentum_reads_as_itself(nesterov, alpha, direct):
    """optax's momentum gives its own alpha and beta; Nesterov's: rate * beta, and the
    rate at once, without memory."""
    modes = read(lopts.from_optax(lambda: optax.sgd(0.3, 0.8, nesterov), {}))
    assert modes.momentum == pytest.approx([0.8])
    assert modes.learning_rate == pytest.approx([alpha])
    assert modes.direct == pytest.approx(direct, abs=1e-9)


def test_learned_momentum_reads_as_its_theta():
    """lopts.py's momentum, whose theta are logs and logits, at any theta."""
    learned = lopts.LEARNED["momentum"]
    theta = lopts.encode({"learning_rate": 0.07, "momentum": 0.95})
    modes = read(learned, theta)
    assert modes.momentum == pytest.approx([0.95], rel=1e-6)
    assert modes.learning_rate == pytest.approx([0.07], rel=1e-6)


def test_linear_recurrent_optimizer_is_aggregated_momentum():
    """Appendix B: modes (alpha_j, beta_j) step as the sum of optax's momenta with them."""
    a, b, w = system(3, n=5)
    a = a[2:, 2:] * np.tri(3)  # real eigenvalues: its diagonal
    optimizer = linear_optimizer(a, b[2:], w[2:])
    modes = read(optimizer)
    momenta = [
        lopts.from_optax(lambda b=b, r=r: optax.sgd(r, b), {})
        for b, r in zip(modes.momentum.real, modes.learning_rate.real, strict=True)
    ]
    aggregated = sum(updates_of(momentum) for momentum in momenta)
    np.testing.assert_allclose(updates_of(optimizer), aggregated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_all_modes_together_are_the_linearisation(seed):
    """A linear optimizer, wherever it starts, and `reduced` with all modes: same steps."""
    a, b, w = system(seed)
    start = np.random.default_rng(seed).normal(size=4)
    optimizer = linear_optimizer(a, b, w, d=0.7, start=start)
    rebuilt = dynamics.reduced(read(optimizer))
    np.testing.assert_allclose(
        updates_of(rebuilt), updates_of(optimizer), rtol=1e-4, atol=2e-5
    )


def test_a_pair_is_kept_whole():
    """`keep` in the middle of a complex pair keeps both; steps stay real and right."""
    a, b, w = system(0)
    modes = read(linear_optimizer(a, b, w))
    at = int(np.flatnonzero(modes.momentum.imag)[0])
    kept = dynamics.keep_modes(modes, at + 1)
    assert len(kept) == at + 2
    assert modes.momentum[kept].imag.sum() == pytest.approx(0, abs=1e-12)
    assert len(dynamics.keep_modes(modes, at + 2)) == at + 2
    assert len(dynamics.keep_modes(modes, 0)) == 0


def test_what_has_no_modes_is_refused():
    """A count of steps in the state, and a delay, are no momentum: ValueError."""
    with pytest.raises(ValueError, match="int32"):
        dynamics.cell(lopts.from_optax(lambda: optax.adam(0.1), {}), {})
    delay = dynamics.Linear(
        np.zeros((1, 1)),
        np.ones(1),
        np.ones(1),
        0.0,
        np.zeros(1),
        np.zeros(1),
        0.0,
        0.0,
    )
    with pytest.raises(ValueError, match="late"):
        dynamics.modes_of(delay)


# --- fixed points


@pytest.mark.parametrize("seed", range(3))
def test_fixed_point_is_one(seed):
    """A contraction h' = tanh(A h + b): found, and it stays where it is put."""
    a, b, _ = system(seed)
    a, b = np.float32(0.9 * a / np.linalg.norm(a, 2)), np.float32(b)
    point, residual = dynamics.fixed_point(lambda h: jnp.tanh(a @ h + b), np.zeros(4))
    assert residual < 1e-6  # float32 outside of `linearise`
    np.testing.assert_allclose(np.tanh(a @ point + b), point, atol=1e-5)


def test_a_missing_fixed_point_is_reported():
    """h' = h + 1 has none: a warning, and the residual 1."""
    optimizer = lopts.LearnedOptimizer(
        lambda key: {}, jnp.zeros_like, lambda theta, g, h, p: (h, h + 1.0)
    )
    with pytest.warns(UserWarning, match="no fixed point"):
        assert dynamics.linearise(optimizer, {}, settle=3).residual == pytest.approx(1)


# --- the GRU


def trained_like(key=0):
    """A theta of the GRU with nothing at 0."""
    theta = lopts.gru(hidden=5).init_theta(jax.random.key(key))
    theta = jax.tree.map(lambda x: 0.5 * x + 0.1, theta)
    return theta | {"readout": jnp.linspace(-0.3, 0.2, 5)}


def plain_gru(theta, g, h):
    """One parameter, gate by gate, in numpy."""
    t = {k: np.asarray(v, np.float64) for k, v in theta.items()}

    def part(name, i):
        return t[name][..., 5 * i : 5 * (i + 1)]

    def sigma(x):
        return 1 / (1 + np.exp(-x))

    z = sigma(g * part("g", 0) + h @ part("h", 0) + part("b", 0))
    r = sigma(g * part("g", 1) + h @ part("h", 1) + part("b", 1))
    n = np.tanh(g * part("g", 2) + r * (h @ part("h", 2)) + part("b", 2))
    h = z * h + (1 - z) * n
    return 0.1 * h @ t["readout"], h


def test_gru_equals_a_plain_loop():
    """Cho et al.'s equations, a parameter at a time; 0.1 is the scale of the readout."""
    theta = trained_like()
    ours = updates_of(lopts.gru(hidden=5, scale=0.1), theta, steps=5)
    states = np.zeros((7, 5))
    for t in range(5):
        leaves = [np.asarray(x).reshape(-1) for x in jax.tree.leaves(grads_at(t))]
        for i, g in enumerate(np.concatenate(leaves)):
            u, states[i] = plain_gru(theta, g, states[i])
            assert ours[t, i] == pytest.approx(u, rel=1e-4, abs=1e-6)


def test_gru_near_its_fixed_point_is_linear():
    """Gradients of size e: the linearisation is off by e^2 (float32 allowing)."""
    optimizer, theta = lopts.gru(hidden=5), trained_like()
    linear = dynamics.linearise(optimizer, theta)
    assert linear.residual < 1e-10
    start = jnp.asarray(linear.point, jnp.float32)

    def at_rest(params):
        return jax.tree.map(
            lambda p: jnp.broadcast_to(start.reshape(-1, *[1] * p.ndim), (5, *p.shape)),
            params,
        )

    def error(e):
        def grads(t):
            return jax.tree.map(lambda g: e * g, grads_at(t))

        resting = optimizer._replace(init=at_rest)
        quiet = dynamics.reduced(dynamics.modes_of(linear._replace(start=linear.point)))
        ours, theirs = (
            updates_of(resting, theta, 8, grads),
            updates_of(quiet, {}, 8, grads),
        )
        return np.abs(ours - theirs).max()

    assert error(0.1) < 0.05 * error(1.0)


def test_heavy_ball_is_the_best_momentum():
    """Polyak's (alpha, beta) has the least spectral radius, sqrt(beta), of a grid."""

    def radius(alpha, beta, curvature):
        step = [[beta, curvature], [-alpha * beta, 1 - alpha * curvature]]
        return np.abs(np.linalg.eigvals(step)).max()

    alpha, beta = dynamics.heavy_ball(0.01, 1.0)
    ends = (0.01, 1.0)
    best = max(radius(alpha, beta, x) for x in ends)
    assert best == pytest.approx(beta**0.5, rel=1e-6)
    for factor, shift in ((0.9, 0), (1.1, 0), (1, -0.03), (1, 0.03)):
        worse = max(radius(factor * alpha, beta + shift, x) for x in ends)
        assert worse > best + 1e-4


# --- STAR


def test_accumulator_rates_of_the_nominal_term():
    """STAR with its nominal term alone (beta2 = beta3 = 0) is AggMo over v: each of the
    three running means has alpha_k v = beta1 (1 - beta_k) / 3."""
    constants = star.Constants(beta2=0.0, beta3=0.0)
    optimizer = star.learned_optimizer(constants)
    theta = optimizer.init_theta(jax.random.key(0))
    decays = star.effective_decays(theta, constants).momentum
    params, index = {"b": PARAMS["w"][:, 0]}, {"b": jnp.array([0, 2])}

    def grads_of(t):
        return {"b": grads_at(t)["w"][:, 0]}

    @jax.jit
    def both():
        _, state = optimizer.update(theta, grads_of(0), optimizer.init(params), params)
        grads = grads_of(1)
        alpha = dynamics.accumulator_rates(
            optimizer, theta, decays, grads, state, params, index
        )
        return alpha, optimizer.update(theta, grads, state, params)[1].rms

    alpha, rms = both()
    expected = 1e-3 * (1 - np.asarray(decays)) / 3
    for name, at in index.items():
        v = np.sqrt(np.asarray(rms[name]).reshape(-1)[at] + constants.rms_eps)
        found = np.asarray(alpha[name]) * v[None]
        np.testing.assert_allclose(found, np.tile(expected[:, None], len(at)), 1e-3)


# --- meta-training and problems


def test_gru_preset_has_the_papers_settings():
    """C.2: BPTT through 200 steps of 32 problems, Adam, l2 1e-5, clipped by value at 5,
    the rate times 0.8 every 500 of 5,000 meta-steps. One step of it, by hand."""
    config = settings.parse(["--preset", "gru"])
    assert (config.estimator, config.sigma, config.particles) == (
        "truncated_bptt",
        0,
        32,
    )
    assert config.horizon == config.truncation == 200 and config.start_horizon == 1
    assert (config.steps, config.schedule) == (5000, "staircase")
    optimizer, theta = train.meta_optimizer(config), {"x": jnp.array([3.0, -1.0])}
    adam = optax.adam(lambda count: config.meta_lr * 0.8 ** (count // 500))
    state, their_state = optimizer.init(theta), adam.init(theta)
    for count in (0, 1100):
        move = {"count": jnp.int32(count)}  # of meta-steps, for both schedules
        state, their_state = (optax.tree.set(s, **move) for s in (state, their_state))
        grads = {"x": jnp.array([-100.0, 0.3])}
        clipped = {"x": jnp.clip(grads["x"] + 2e-5 * theta["x"], -5, 5)}
        updates, state = optimizer.update(grads, state, theta)
        expected, their_state = adam.update(clipped, their_state)
        np.testing.assert_allclose(updates["x"], expected["x"], rtol=1e-5)


def test_linear_regression_has_the_stated_spectrum():
    """300 members: eigenvalues of the Hessian log-uniform in [1e-3, 1], conditions of
    median 110; the least loss is 0."""

    @jax.jit
    @jax.vmap
    def quadratic(key):
        problem, zero = problems.linear_regression(key), jnp.zeros(5)
        return (
            jax.hessian(problem.loss)(zero),
            jax.grad(problem.loss)(zero),
            problem.loss(zero),
        )

    keys = jax.random.split(jax.random.key(0), 300)
    hessian, slope, start = (np.asarray(x, np.float64) for x in quadratic(keys))
    values = np.linalg.eigvalsh(hessian)
    assert 0.9e-3 < values.min() and values.max() < 1.001
    assert np.log10(values).mean() == pytest.approx(-1.5, abs=0.1)
    assert np.median(values[:, -1] / values[:, 0]) == pytest.approx(110, rel=0.2)
    solution = np.linalg.solve(hessian, slope[..., None])[..., 0]
    np.testing.assert_allclose(start - 0.5 * (slope * solution).sum(1), 0, atol=5e-3)


def test_rosenbrock_and_its_starts():
    """0 at (1, 1) with slope 0; starts fill (-2, 2) x (-1, 3)."""
    problem = problems.rosenbrock(jax.random.key(0))
    assert problem.loss(jnp.ones(2)) == 0
    assert (jax.grad(problem.loss)(jnp.ones(2)) == 0).all()
    starts = np.asarray(
        jax.vmap(problem.init)(jax.random.split(jax.random.key(1), 500))
    )
    np.testing.assert_allclose(starts.min(0), [-2, -1], atol=0.1)
    np.testing.assert_allclose(starts.max(0), [2, 3], atol=0.1)


def test_two_moons():
    """8,577 weights; balanced classes that a line does not part and a circle pair does."""
    problem = problems.two_moons(jax.random.key(0))
    params = problem.init(jax.random.key(1))
    assert sum(x.size for x in jax.tree.leaves(params)) == 8577
    assert problem.loss(params) == pytest.approx(np.log(2), abs=0.3)
    xy, side = problems.moons(200, noise=0.0)
    assert side.sum() == 0
    centre = np.stack([-side / 2, side / 4], 1)  # of the half circle each belongs to
    np.testing.assert_allclose(np.linalg.norm(xy - centre, axis=1), 1, atol=1e-5)
    flat = np.c_[xy, np.ones(200)]
    fit = flat @ np.linalg.lstsq(flat, side, rcond=None)[0]
    assert 0.7 < (np.sign(fit) == side).mean() < 1


def test_problems_are_tasks():
    """Every problem is in the table of tasks, and its loss is the task's."""
    assert set(problems.PROBLEMS) < set(TASKS)
    key = jax.random.key(3)
    for name in ("linear_regression", "two_moons_small"):
        make = problems.PROBLEMS[name]
        task, problem = TASKS[name].build(None, key), make(key)
        params = task.init(key)
        assert task.loss(params, key, task.batch(key, "train")) == problem.loss(params)
        assert task.evaluate(params)["test_loss"] == problem.loss(params)


# --- figures


def test_random_search_finds_the_best_rate():
    """Momentum on linear regression: near the best of the objective it reports, no edge."""
    size = figures_dynamics.Size(60, 4, 4)
    found = figures_dynamics.tune("linear_regression", "momentum", size)
    rate, decay = found["best"]["learning_rate"], found["best"]["momentum"]
    assert 0.3 < rate < 10 and 0.5 < decay < 0.99 and not found["edge"]
    assert found["losses"].shape == (4, 200)
    at = found["objective"].argmin()
    assert found["configurations"]["learning_rate"][at] == np.float32(rate)


def test_the_edge_of_a_search_is_seen():
    """A best value within 2 % of the end of its range, in log, is on the edge."""
    tuned = figures_dynamics.BASELINES["momentum"]
    inside = {"learning_rate": 0.1, "momentum": 0.9}
    assert figures_dynamics.on_edge(tuned, inside) == []
    assert figures_dynamics.on_edge(tuned, inside | {"learning_rate": 90.0}) == [
        "learning_rate"
    ]
    assert figures_dynamics.on_edge(tuned, inside | {"momentum": 0.9999}) == [
        "momentum"
    ]


def test_module_runs_alone(tmp_path):
    """Copied into an empty folder, dynamics.py imports and works."""
    (tmp_path / "dynamics.py").write_text(
        (HERE / "companions" / "dynamics.py").read_text()
    )
    code = """
import jax, jax.numpy as jnp, dynamics as d
momentum = d.LearnedOptimizer(lambda key: {}, jnp.zeros_like,
    lambda theta, g, h, p: (-0.5 * (0.9 * h + g), 0.9 * h + g))
modes = d.modes_of(d.linearise(momentum, {}))
print(round(modes.learning_rate[0].real, 6), round(modes.momentum[0].real, 6))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0.5", "0.9"]
