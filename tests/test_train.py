"""train.py: what it learns, resuming, faults, and what bad input gets."""

import contextlib
import json
import os
import resource
import shlex
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import estimators
import eval as evaluation
import star
import store
import tasks
import train
from baselines import BASELINES, curves

KEY = jax.random.key(0)
TINY = "--task quadratic --steps 12 --horizon 20 --truncation 5 --checkpoint-every 4"
TINY = TINY.split()


def command(*argv, program=train):
    """Exit code of a command line, run in this process."""
    return store.run_command(program.__name__, program.main, [str(a) for a in argv])


def compiled(*flags, build=tasks.quadratic, data=()):
    """(recipe, parts, meta-step) of TINY and more flags."""
    recipe = train.parse([*TINY, *flags])
    made = train.parts(recipe, build)
    state = train.init_state(recipe, made, data)
    return recipe, made, train.compile_meta_step(recipe, made, data, state)


def log_of(folder):
    """The lines of log.csv but for the seconds."""
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.rsplit(",", 1)[0] for line in lines]


def assert_same_run(folder, other):
    """Bit for bit: theta, what --init goes on with, and the log."""
    ours, theirs = (store.read_npz(d / "theta.npz") for d in (folder, other))
    assert all(ours[k].tobytes() == theirs[k].tobytes() for k in ours if k != "card")
    assert log_of(folder) == log_of(other) and not any(folder.glob("*.tmp"))


def steps_saved(folder):
    return int(store.read_npz(folder / "checkpoint.npz")[".step"])


def assert_finite(*trees):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trees))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("finished")
    assert command(*TINY, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def tiny():
    return compiled()


@pytest.fixture
def run(tiny, monkeypatch):
    """run(*argv): exit code of a run of TINY, with hook(step) before each meta-step."""
    monkeypatch.setattr(train, "finish", lambda *_: None)

    def of(*argv, hook=lambda step: None):
        def step_fn(data, key, state):
            hook(int(state.step))
            return tiny[-1]((), key, state)

        monkeypatch.setattr(train, "compile_meta_step", lambda *_: step_fn)
        return command(*TINY, *argv)

    return of


def test_a_run_leaves_its_files(finished):
    """config, log with a row per meta-step, theta with its card, checkpoint, curve."""
    names = {path.name for path in finished.iterdir()}
    expected = {"config.json", "log.csv", "theta.npz", "theta.json", "checkpoint.npz"}
    assert names == expected | {"curve.png"}
    steps = [line.split(",")[0] for line in log_of(finished)]
    assert steps == ["step", *map(str, range(1, 13))]
    card = store.read_card(finished / "theta.npz")
    assert card == json.loads((finished / "theta.json").read_text())
    assert card["meta_steps"] == 12 and card["inner_steps"] == 12 * 2 * 4 * 5
    assert card["fresh_loss"] > 0 and card["recipe"]["horizon"] == 20
    assert train.parse(shlex.split(card["command"])[2:]) == train.parse(TINY[:-2])
    _, constants = star.load_theta(finished / "theta.npz")
    assert constants == star.CONSTANTS[card["optimizer"]]


def room_on_disk(size):
    """From now on the kernel refuses to write beyond so many bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def out_of_memory():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 TB")


# Step, what happens there, exit code, what is said, meta-steps saved.
STOPS = {
    "Ctrl-C": (6, lambda: os.kill(os.getpid(), signal.SIGINT), 130, "saved at 7", 7),
    "SIGTERM": (6, lambda: os.kill(os.getpid(), signal.SIGTERM), 130, "saved at 7", 7),
    "no room for the log": (6, lambda: room_on_disk(150), 2, "log.csv: File too", 4),
    "no room": (6, lambda: room_on_disk(2000), 2, "checkpoint.npz: File too large", 4),
    "no memory": (6, out_of_memory, 2, "out of memory", 4),
    "at once": (0, out_of_memory, 2, "out of memory", 0),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_ends_with_the_same_bytes(name, finished, run, tmp_path, capsys):
    """A step under way is finished, errors are one line, and --resume ends alike."""
    when, happens, code, says, saved = STOPS[name]
    assert run("--out", tmp_path, hook=lambda step: step == when and happens()) == code
    room_on_disk(resource.RLIM_INFINITY)
    out, err = capsys.readouterr()
    assert says in (out if code == 130 else err) and err.count("\n") == (code == 2)
    assert steps_saved(tmp_path) == saved and not any(tmp_path.glob("*.tmp"))
    assert run("--out", tmp_path, "--resume") == 0
    assert_same_run(tmp_path, finished)


def test_init_goes_on_with_the_meta_optimizer(finished, run, tiny, tmp_path):
    """--init takes theta, AdamW's means and the step count from one small file. It staggers
    the particles over the horizon of that step. --fresh-meta takes theta alone."""
    init = ["--steps", "14", "--init", str(finished / "theta.npz")]
    recipe, made = train.parse([*TINY, *init]), tiny[1]
    state = train.start_from(recipe, made, {}, train.init_state(recipe, made, {}))
    saved = store.read_npz(finished / "checkpoint.npz")
    for name, x in store.flatten(state._replace(particles=())).items():
        np.testing.assert_array_equal(x, saved[name])
    assert state.particles.window.tolist() == [0, 1, 2, 3]
    for flags, steps in ("", ["13", "14"]), ("--fresh-meta --steps 2", ["1", "2"]):
        out = tmp_path / steps[0]
        assert run(*init, *flags.split(), "--out", out) == 0
        assert [line.split(",")[0] for line in log_of(out)[1:]] == steps
        assert "--init" in store.read_card(out / "theta.npz")["command"]


@given(where=st.floats(0, 1), change=st.integers(1, 255))
def test_a_damaged_file_is_whole_or_refused(where, change, finished, tmp_path):
    """A flipped byte: the same arrays, or UserError."""
    content = bytearray((finished / "checkpoint.npz").read_bytes())
    content[int(where * (len(content) - 1))] ^= change
    (tmp_path / "x.npz").write_bytes(content)
    with contextlib.suppress(store.UserError):
        found = store.read_npz(tmp_path / "x.npz")
        for name, x in store.read_npz(finished / "checkpoint.npz").items():
            np.testing.assert_array_equal(found.get(name, x), x)


def poisoned(data, key):
    """The noisy quadratic plus `data` times the parameters."""
    task = tasks.quadratic({}, key)
    return task._replace(loss=lambda *args: task.loss(*args) + data * args[0].sum())


@pytest.fixture(
    scope="module", params=["pes", "truncated_bptt", "merged", "pes --sigma 1e-30"]
)
def poisonable(request):
    """Of learned momentum, which compiles fast. 1e-30 squared is 0: gradients of 0 / 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("star_fast.learned_optimizer", lambda c: BASELINES["sgdm"])
        flags = ["--start-horizon", "1", "--estimator", *request.param.split()]
        return compiled(*flags, build=poisoned, data=jnp.float32(0))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_nan_in_the_inner_problem_never_reaches_theta(poison, poisonable):
    """Three meta-steps whose losses and gradients are nan, inf or huge: meta-losses stay at
    most at the limit, theta and AdamW finite. A trajectory later all particles are well."""
    recipe, made, step = poisonable
    state = train.init_state(recipe, made, jnp.float32(0))
    for slope in [0.0] * 2 + [poison] * 3 + [0.0] * 5:
        state, metrics = step(jnp.float32(slope), KEY, state)
        assert_finite(state.theta, state.meta, metrics["loss"])
        assert metrics["loss"] <= 1000
    assert_finite(state.particles, metrics)


def test_what_has_overflowed_is_not_saved(tiny, tmp_path):
    """inf in theta or in AdamW's means: UserError, and no file."""
    recipe, made, _ = tiny
    good = train.init_state(recipe, made, {})
    bad = jax.tree.map(lambda x: x + jnp.inf, good._replace(particles=()))
    for state in (good._replace(theta=bad.theta), good._replace(meta=bad.meta)):
        with pytest.raises(store.UserError, match="--meta-lr"):
            store.save_run(tmp_path, recipe, made, {}, state, {})
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory):
    """Broken and foreign files."""
    folder = tmp_path_factory.mktemp("files")
    whole = (finished / "theta.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(folder / "checkpoint.npz", x=np.zeros(3))
    (folder / "other").mkdir()
    other = '{"dataset_checksum": "f00"}'
    np.savez(folder / "other" / "checkpoint.npz", made_with=other)
    theta = star.PRESETS["star"].init_theta(KEY)
    star.save_theta(folder / "half.npz", theta, {"constants": {"beta3": 0.5}})
    return folder


# Program and what it is given -> what its line says.
BAD_INPUT = """
train.py --task imagenet -> 'imagenet' is none of fmnist,
train.py --optimizer lion -> argument --optimizer: invalid choice: 'lion'
train.py --steps 0 -> --steps must be in 1 ..
train.py --truncation 30 --horizon 2000 -> --truncation 30 does not divide --horizon 2000
train.py --start-horizon 7 -> --start-horizon must be in 1e-06 .. 1
train.py --sigma nan -> --sigma must be in 1e-38 ..
train.py --weight-decay -1 -> --weight-decay must be in 0 ..
train.py --beta3 nan -> --beta3 must be in
train.py --estimator merged --particles 3 -> merged needs 4 --particles or more
train.py --init {files}/absent.npz -> absent.npz: No such file
train.py --init {files}/cut.npz -> cut.npz cannot be used:
train.py --init {files}/checkpoint.npz -> checkpoint.npz cannot be used:
train.py --init {files}/half.npz -> half.npz is not for star_small_beta3 with
train.py --init {finished}/theta.npz -> has 12 meta-steps behind it and --steps is 12
train.py --init {finished}/theta.npz --resume -> --init begins anew, --resume goes on
train.py --resume --out {files}/nothing -> checkpoint.npz: No such file
train.py --resume --out {files} -> checkpoint.npz is not a checkpoint of
train.py --resume --out {files}/other -> checkpoint.npz was made on other data than
train.py --resume --out {finished} --sigma 0.5 -> checkpoint.npz was made with --sigma
train.py --out {finished} -> holds a run: --resume it, or choose another --out
train.py --out {files}/cut.npz -> cut.npz: File exists
train.py --task fmnist --data real --data-dir {files}/absent -> absent is not a folder
eval.py --baselines adam,lion -> no baseline lion
eval.py --theta {files}/cut.npz -> cut.npz cannot be used:
eval.py --steps 0 -> must be at least 1
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_is_one_line_and_exit_code_2(line, finished, files, tmp_path, capsys):
    """It names what is wrong, no traceback, and what was already written stays."""
    before = {path: path.read_bytes() for path in finished.iterdir()}
    line, says = line.format(files=files, finished=finished).split(" -> ")
    name, *argv = line.split()
    program, base = (train, TINY) if name == "train.py" else (evaluation, TINY[:2])
    assert command(*base, "--out", tmp_path / "run", *argv, program=program) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert says in error
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_paper_preset_has_the_papers_settings(small_task):
    """Appendix B: K 50, sigma .01, AdamW 1e-4, clip 1.0, T 2000, batch 128, betas 1e-3."""
    recipe, (build, data) = train.parse(["--preset", "paper"]), small_task
    settings = (recipe.truncation, recipe.sigma, recipe.meta_lr, recipe.clip)
    assert settings == (50, 0.01, 1e-4, 1.0) and recipe.horizon == 2000
    assert recipe.estimator == "pes" and recipe.schedule == "constant"
    assert star.CONSTANTS[recipe.optimizer][:4] == (1e-3,) * 4
    assert build(data, KEY).batch(KEY, "train")[1].shape == (128,)
    assert train.parse(["--preset", "paper", "--clip", "2"]).clip == 2  # a flag wins


@pytest.mark.parametrize("clip_by", ["value", "norm"])
def test_meta_optimizer_is_clipped_adamw(clip_by):
    """Clip, then optax.adamw at the cosine rate, by value or by global norm."""
    recipe = train.Recipe(clip_by=clip_by, clip=0.5, weight_decay=0.3, steps=4)
    plain = optax.adamw(optax.cosine_decay_schedule(2e-3, 4), b2=0.99, weight_decay=0.3)
    optimizer, theta = train.meta_optimizer(recipe), jnp.asarray([1.0, -2.0])
    state, plain_state = optimizer.init(theta), plain.init(theta)
    for g in jnp.asarray([[3.0, 0.4], [-0.3, -0.04], [3.0, 0.4]]):
        update, state = optimizer.update(g, state, theta)
        by_norm = g * jnp.minimum(1, 0.5 / jnp.linalg.norm(g))
        clipped = jnp.clip(g, -0.5, 0.5) if clip_by == "value" else by_norm
        expected, plain_state = plain.update(clipped, plain_state, theta)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


@given(weight_decay=st.floats(0.1, 1), seed=st.integers(0, 1000))
def test_weight_decay_bounds_theta(weight_decay, seed):
    """AdamW cannot carry |theta| far beyond 1/wd, whatever the gradients: section 5.1's
    magnitude control. By Cauchy and Schwarz Adam's step is at most
    (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) = 2.35 of its rate."""
    recipe = train.Recipe(schedule="constant", meta_lr=0.1, weight_decay=weight_decay)
    optimizer = train.meta_optimizer(recipe)

    def step(carry, scale):
        theta, state = carry
        updates, state = optimizer.update(-(10**scale) * jnp.ones(3), state, theta)
        return (optax.apply_updates(theta, updates), state), theta

    theta = jnp.zeros(3)
    scales = jax.random.uniform(jax.random.key(seed), (1000,), minval=-3, maxval=3)
    _, path = jax.lax.scan(step, (theta, optimizer.init(theta)), scales)
    assert np.abs(path).max() < 2.35 / weight_decay


@pytest.mark.heavy
def test_meta_step_compiles_once_while_horizons_double():
    """T doubles as a traced number up to --horizon, nothing retraces, and at each
    doubling the particles are spread evenly over the longer trajectory."""
    recipe = train.parse([*TINY, "--start-horizon", "0.25", "--particles", "2"])
    windows = [int(train.windows_at(recipe, jnp.int32(t))) for t in range(12)]
    assert windows == [1] * 3 + [2] * 3 + [4] * 6
    made = train.parts(recipe, tasks.quadratic)
    state, done = train.init_state(recipe, made, {}), []
    step = jax.jit(lambda s: train.meta_step(recipe, made, {}, KEY, s)[0])
    for _ in range(7):
        state = step(state)
        done.append(state.particles.window.tolist())
    assert step._cache_size() == 1
    assert done[3] == [1, 2] and done[6] == [1, 3]  # from 0, 1 of 2 and from 0, 2 of 4


@pytest.mark.heavy
@pytest.mark.parametrize("make", [estimators.pes, estimators.noise_reuse_es])
def test_lengths_are_log_uniform_and_every_window_unbiased(make):
    """2 to 8 windows, n of them with P(n) ~ log((n + 1) / n). On s' = s + theta, loss s',
    window j of a trajectory of any length has the mean gradient of its own two losses."""
    line = estimators.unroll(lambda key: 0.0, lambda theta, s, key: (s + theta,) * 2, 2)
    pair = train.drawn_lengths(make(line, 8, 0.1), 8, 2)
    first, *keys = jax.random.split(KEY, (40, 4096))
    state = jax.vmap(pair.init, in_axes=(0, None))(first, jnp.float32(1))
    estimate = jax.jit(jax.vmap(pair.estimate, in_axes=(0, None, 0)))
    lengths, grads, begun, age = [], [[] for _ in range(8)], True, np.zeros(4096)
    for key in keys:
        g, state, _ = estimate(key, jnp.float32(1), state)
        g, window = np.asarray(g), np.asarray(state.window)
        age = np.where(begun, 0, age + 1)
        lengths.append(9 - window[age == 0])
        grads = [[*all_g, g[age == j]] for j, all_g in enumerate(grads)]
        begun = window >= 8
    n, found = np.arange(2, 9), np.bincount(np.concatenate(lengths))
    expected = np.array([0, 0, *np.log((n + 1) / n) / np.log(9 / 2)]) * found.sum()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected)).all()
    for j, g in enumerate(map(np.concatenate, grads)):
        assert abs(g.mean() - (2 * j + 1.5)) < 6 * g.std() / len(g) ** 0.5


def test_log_uniform_horizons_reach_from_start_horizon_to_horizon(monkeypatch):
    """From the first meta-step on."""
    seen = []
    monkeypatch.setattr(train, "drawn_lengths", lambda *args: seen.append(args[1:]))
    monkeypatch.setattr(train.estimators, "population", lambda *args: None)
    recipe = train.parse([*TINY, "--horizons=log-uniform", "--start-horizon=0.25"])
    train.parts(recipe, tasks.quadratic).estimator({}, 0, KEY)
    assert seen == [(4, 1)]


@pytest.mark.heavy
def test_meta_training_learns():
    """On the noisy quadratic, 150 meta-steps of PES lower the loss of fresh runs well
    below that of the untrained theta."""
    argv = "--steps 150 --horizon 50 --truncation 10 --particles 16 --meta-lr 0.01"
    recipe, made, step = compiled(*argv.split(), "--optimizer", "star")
    state, optimizer = train.init_state(recipe, made, {}), made.optimizer
    for _ in range(recipe.steps):
        state, _ = step((), jax.random.key(1), state)
    untrained = optimizer.init_theta(train.run_keys(recipe)[0])
    thetas = [untrained, store.unravel_of(optimizer)(state.theta)]
    keys = jax.random.split(KEY, 32)
    found = curves(tasks.quadratic, (), optimizer, thetas, keys, 50)
    before, after = estimators.clip_loss(found.losses, 1e3).mean((1, 2))
    assert after < 0.7 * before
