"""Faults and bad input: kills, full disks, nan, hostile files, two runs in one folder."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import typing
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import settings as example_count
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_train import TINY, command, theta_bytes

import estimators
import eval as evaluation
import settings
import star
import store
import train
from companions import lopts
from experiments import comparison, kinds
from tasks import TASKS

HERE = pathlib.Path(__file__).resolve().parent.parent
KEY = jax.random.key(0)

SMALL = [*TINY, "--optimizer", "momentum", "--particles", "4"]  # compiles faster
CLEAN = {"share": jnp.float32(0), "poison": jnp.float32(0)}


def poisoned(data, key, batch_size=None) -> kinds.Task:
    """The noisy quadratic; a share of the batches adds `poison` times the parameters."""
    task = kinds.quadratic()

    def batch(key, split):
        bad = jax.random.uniform(jax.random.fold_in(key, 1)) < data["share"]
        return task.batch(key, split), jnp.where(bad, data["poison"], 0.0)

    def loss(phi, key, batch):
        xi, slope = batch
        return task.loss(phi, key, xi) + slope * phi.sum()

    return task._replace(batch=batch, loss=loss)


def compile_poisoned(*flags):
    """(config, meta-step) of SMALL; the poison is data, so one program does for all."""
    config = settings.parse([*SMALL, *flags])
    with pytest.MonkeyPatch.context() as patch:
        spec = TASKS["quadratic"]._replace(build=poisoned)
        patch.setitem(TASKS, "quadratic", spec)
        # what runs for milliseconds need not be optimised
        quick = {"xla_backend_optimization_level": 0}
        patch.setattr(train, "compiler_options", lambda: quick)
        state = train.init_state(config, CLEAN)
        return config, train.compile_meta_step(config, CLEAN, state)


@pytest.fixture(scope="module")
def pes():
    return compile_poisoned()


@pytest.fixture(scope="module")
def truncated_bptt():
    return compile_poisoned("--estimator", "truncated_bptt")


@pytest.fixture(scope="module")
def merged():
    return compile_poisoned("--estimator", "merged")


@pytest.fixture
def run_with(pes, monkeypatch):
    """run_with(hook)(*argv): exit code of a run of SMALL that calls hook(step) before each
    meta-step and does not compare itself on fresh seeds."""
    monkeypatch.setattr(train, "finish", lambda *_: 0)

    def with_hook(hook=lambda step: None):
        def step_fn(data, key, state):
            hook(int(state.step))
            return pes[1](CLEAN, key, state)

        monkeypatch.setattr(train, "compile_meta_step", lambda *_: step_fn)
        return lambda *argv: command(*SMALL, *argv)

    return with_hook


@pytest.fixture
def whole(run_with, tmp_path):
    """The folder of an uninterrupted run."""
    assert run_with()("--out", tmp_path / "whole") == 0
    return tmp_path / "whole"


def one_line(capsys) -> str:
    """What stderr has, which must be one line."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def steps_saved(folder) -> int:
    return int(store.read_npz(folder / "checkpoint.npz")[".step"])


# Killed.


KILLED = """
import os, sys, time, train
compiled, fsync, replace = train.compile_meta_step, os.fsync, os.replace
def slowly(f, seconds):
    return lambda *args: (time.sleep(seconds), f(*args))[1]
train.compile_meta_step = lambda *args: slowly(compiled(*args), STEP)
os.fsync, os.replace = slowly(fsync, WRITE), slowly(replace, WRITE)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_twenty_kills_and_resumes_give_the_same_bytes(tmp_path):
    """kill -9 at 20 random moments of one run, most of them in the middle of a write.

    Steps and writes are slowed, so that 20 lives of at most 1.4 s cannot reach the end, at
    30 s of sleep alone, and most of a life is writing.
    """
    recipe = [*SMALL, "--steps", "150", "--checkpoint-every", "1", "--log-every", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*recipe, "--out", whole) == 0
    rng = np.random.default_rng(0)
    code = KILLED.replace("STEP", "0.05").replace("WRITE", "0.025")
    torn, saved = 0, []
    for kill in range(20):
        argv = [*recipe, "--out", str(killed)]
        # killed before its first checkpoint, it has nothing to resume
        argv += ["--resume"] if (killed / "checkpoint.npz").exists() else []
        life = [sys.executable, "-c", code, *argv]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(life, cwd=HERE, **pipes) as process:
            for line in process.stdout:
                if line.startswith("compiled"):
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 1.4))
            process.kill()
            error = process.stderr.read()
        assert process.returncode == -signal.SIGKILL, error
        torn += any(killed.glob("*.tmp"))
        if (killed / "checkpoint.npz").exists():
            saved.append(steps_saved(killed))
        print(f"kill {kill + 1}: {saved[-1:]} meta-steps, {torn} in a write")
    assert saved == sorted(saved) and 0 < saved[-1] < 150 and torn > 0
    assert command(*recipe, "--out", killed, "--resume") == 0
    assert theta_bytes(killed) == theta_bytes(whole)
    ours, theirs = (
        [line.split(",")[:4] for line in (d / "log.csv").read_text().splitlines()]
        for d in (killed, whole)
    )
    assert ours == theirs and not any(killed.glob("*.tmp"))


# A disk that is full or may not be written.


def failing_open(name: str, code: int, after: int | None):
    """`open`, but the file of this name takes `after` bytes and then raises the error.
    None: it cannot be opened for writing."""

    class Full(io.FileIO):
        def write(self, data):
            data = bytes(data)
            room = after - self.tell()
            if len(data) <= room:
                return super().write(data)
            super().write(data[: max(room, 0)])
            raise OSError(code, os.strerror(code))

    def opens(path, mode="r", *args, **kwargs):
        if pathlib.Path(path).name.removesuffix(".tmp") != name or mode[0] not in "aw":
            return open(path, mode, *args, **kwargs)
        if after is None:
            raise OSError(code, os.strerror(code), str(path))
        return Full(path, mode)

    return opens


@pytest.mark.parametrize(
    "name, code, after, saved",
    [
        ("checkpoint.npz", errno.ENOSPC, 1000, 4),
        ("checkpoint.npz", errno.EROFS, None, 4),
        ("checkpoint.npz", errno.EIO, 0, 4),
        ("theta.npz", errno.ENOSPC, 1000, 8),
        ("theta.json", errno.EDQUOT, 100, 8),
        ("log.csv", errno.ENOSPC, 150, 4),
        ("log.csv", errno.EACCES, None, 4),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    name, code, after, saved, whole, run_with, tmp_path, monkeypatch, capsys
):
    """From the sixth meta-step on a file cannot be written: exit code 2, the line names it,
    the checkpoint before is whole, and with room again the run ends with the same bytes."""
    folder = tmp_path / "run"

    def fill(step):
        if step == 6:
            for module in (store, train):
                opens = failing_open(name, code, after)
                monkeypatch.setattr(module, "open", opens, raising=False)

    assert run_with(fill)("--out", folder) == 2
    line = one_line(capsys)
    assert str(folder / name) in line and os.strerror(code) in line
    assert steps_saved(folder) == saved and not any(folder.glob("*.tmp"))
    store.load_theta(folder / "theta.npz")
    for module in (store, train):
        monkeypatch.setattr(module, "open", open, raising=False)
    assert run_with()("--out", folder, "--resume") == 0
    assert theta_bytes(folder) == theta_bytes(whole)
    lines = [(d / "log.csv").read_text().splitlines() for d in (folder, whole)]
    assert [x.split(",")[:4] for x in lines[0]] == [x.split(",")[:4] for x in lines[1]]


@contextlib.contextmanager
def no_file_above(size: int):
    """The kernel itself refuses to write beyond so many bytes of a file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(share=st.floats(0, 0.999))
def test_a_write_cut_anywhere_leaves_the_earlier_file(share, tmp_path):
    """Wherever the kernel stops a `.npz` of 9 KB, in an array or in the directory of the
    zip: an OSError that names the file, its earlier bytes, nothing left beside it."""
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(b"earlier")
    arrays = {f"x{i}": np.arange(300, dtype=np.float32) for i in range(6)}
    whole = io.BytesIO()
    np.savez(whole, **arrays)
    limit = int(share * len(whole.getvalue()))
    with no_file_above(limit), pytest.raises(OSError) as error:
        store.write_atomically(path, lambda f: np.savez(f, **arrays))
    assert error.value.filename == str(path) and error.value.errno == errno.EFBIG
    assert path.read_bytes() == b"earlier" and os.listdir(tmp_path) == [path.name]


def test_a_curve_that_cannot_be_drawn_leaves_the_earlier_one(tmp_path, monkeypatch):
    """curve.png is written like the other files: whole or not at all, and named."""
    (tmp_path / "curve.png").write_bytes(b"earlier")
    log = train.Log(None)
    log.rows = [[1.0, 0.5, 0.1, 0.1, 1.0], [2.0, 0.4, 0.1, 0.1, 2.0]]
    names = ("fresh_loss", "untrained_loss", "adam_loss", "adam_learning_rate")
    fresh = dict.fromkeys(names, 0.5)
    opens = failing_open("curve.png", errno.ENOSPC, 1000)
    monkeypatch.setattr(store, "open", opens, raising=False)
    with pytest.raises(OSError, match="curve.png"):
        train.plot(tmp_path, settings.parse(SMALL), log, fresh, {"dataset": ""})
    assert (tmp_path / "curve.png").read_bytes() == b"earlier"


def test_a_folder_that_may_not_be_written_is_one_line(
    run_with, tmp_path, monkeypatch, capsys
):
    """Below a file, on a read-only disk, without permission: exit code 2, no traceback."""
    (tmp_path / "file").write_text("")
    assert run_with()("--out", tmp_path / "file" / "run") == 2
    assert str(tmp_path / "file") in one_line(capsys)
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid() != 0:  # root may write everywhere
        locked.chmod(0o500)
        assert run_with()("--out", locked / "run") == 2
        assert str(locked) in one_line(capsys)
        locked.chmod(0o700)
    opens = failing_open("config.json", errno.EROFS, None)
    monkeypatch.setattr(store, "open", opens, raising=False)
    assert run_with()("--out", locked) == 2
    assert "Read-only" in one_line(capsys) and not any(locked.iterdir())


def test_out_of_memory_is_one_line(run_with, tmp_path, capsys):
    """The runtime's way to say so, and Python's."""

    def exhausted(step):
        if step == 6:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 TB")

    assert run_with(exhausted)("--out", tmp_path) == 2
    assert "out of memory" in one_line(capsys) and steps_saved(tmp_path) == 4

    def other(step):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault of ours")

    with pytest.raises(
        jax.errors.JaxRuntimeError
    ):  # what is no user's fault is not hidden
        run_with(other)("--out", tmp_path, "--resume")


# nan and inf.


@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("estimator", ["pes", "truncated_bptt", "merged"])
def test_nan_in_the_inner_problem_never_reaches_theta(
    estimator, poison, share, request
):
    """A loss and gradient that are nan, inf or huge, from a random step on or in all steps
    of all particles: meta-losses stay at most at the limit, theta and AdamW finite."""
    config, step = request.getfixturevalue(estimator)
    state = train.init_state(config, {})
    data = {"share": jnp.float32(share), "poison": jnp.float32(poison)}
    theta, losses = jax.tree.map(np.asarray, state.theta), []
    for _ in range(config.steps):
        state, metrics = step(data, KEY, state)
        losses.append(float(metrics["loss"]))
    train.check_finite(state)
    assert np.isfinite(losses).all() and max(losses) <= 1000
    moved = [float(abs(state.theta[k] - x).max()) for k, x in theta.items()]
    if share < 1:
        assert max(losses) > 0 and max(moved) > 0
    elif np.isnan(poison):
        # nothing to learn from: theta only shrinks by AdamW's weight decay
        assert losses == [1000.0] * config.steps
        rate = optax.cosine_decay_schedule(config.meta_lr, config.steps)
        steps = np.arange(config.steps)
        shrunk = np.prod(1 - config.weight_decay * np.asarray(rate(steps)))
        for name, x in theta.items():
            np.testing.assert_allclose(state.theta[name], x * shrunk, rtol=1e-5)


def test_a_particle_that_is_nan_starts_anew(pes):
    """nan in all that one particle remembers: it adds nothing to the gradient, and is gone
    with the next trajectory, four windows at most."""
    config, step = pes
    state = train.init_state(config, {})
    params = state.particles.carry.params.at[0].set(jnp.nan)
    sick = state._replace(
        particles=state.particles._replace(
            carry=state.particles.carry._replace(params=params)
        )
    )
    finite = []
    for _ in range(5):
        sick, metrics = step(CLEAN, KEY, sick)
        finite.append(bool(np.isfinite(sick.particles.carry.params).all()))
        assert np.isfinite(float(metrics["grad_norm"]))
    train.check_finite(sick)
    assert not finite[0] and finite[-1]


def test_a_nan_gradient_does_not_poison_the_meta_optimizer(monkeypatch):
    """As with --sigma 1e-30, whose square is 0 in float32, so that an ES gradient is 0 / 0:
    it counts as 0, theta and AdamW stay finite and move where there is a gradient. The
    log shows nan."""
    grad = {"learning_rate": jnp.float32(jnp.nan), "momentum": jnp.float32(1.0)}

    def estimate(key, theta, particles):
        return grad, particles, {}

    config = settings.parse([*SMALL, "--weight-decay", "0"])
    first = state = train.init_state(config, {})
    spoilt = estimators.Estimator(lambda *_: state.particles, estimate)
    monkeypatch.setattr(train, "build_estimator", lambda *_: spoilt)
    for _ in range(2):
        state, metrics = train.meta_step(config, {}, KEY, state)
    train.check_finite(state)
    assert np.isnan(float(metrics["grad_norm"]))
    assert state.theta["learning_rate"] == first.theta["learning_rate"]
    assert state.theta["momentum"] < first.theta["momentum"]


def test_a_theta_that_overflows_is_found():
    """What no clipping can prevent: two steps of --meta-lr 1e38."""
    config = settings.parse([*SMALL, "--meta-lr", "1e38", "--schedule", "constant"])
    state = train.init_state(config, {})
    optimizer, theta, meta = train.meta_optimizer(config), state.theta, state.meta
    for _ in range(2):
        update, meta = optimizer.update(state.theta, meta, theta)
        theta = optax.apply_updates(theta, update)
    state = state._replace(theta=theta, meta=meta)
    with pytest.raises(store.UserError, match="--meta-lr"):
        train.check_finite(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_theta_that_is_not_finite_is_not_saved(
    bad, pes, run_with, tmp_path, monkeypatch, capsys
):
    """From the sixth meta-step on: exit code 2, and the checkpoint stays the fourth's."""
    folder = tmp_path / "run"
    run = run_with()

    def step_fn(data, key, state):
        state, metrics = pes[1](CLEAN, key, state)
        if int(state.step) >= 6:
            spoilt = jax.tree.map(lambda x: jnp.full_like(x, bad), state.theta)
            state = state._replace(theta=spoilt)
        return state, metrics

    monkeypatch.setattr(train, "compile_meta_step", lambda *_: step_fn)
    assert run("--out", folder) == 2
    assert "overflowed" in one_line(capsys) and steps_saved(folder) == 4
    store.load_theta(folder / "theta.npz")


def test_an_adamw_state_that_is_nan_is_not_gone_on_with(
    whole, run_with, tmp_path, capsys
):
    """--init with a good theta and nan in what goes on: one line, before any meta-step."""
    arrays = store.read_npz(whole / "theta.npz")
    means = [name for name in arrays if name.startswith("train/") and ".mu" in name]
    assert means
    arrays |= {name: np.full_like(arrays[name], np.nan) for name in means}
    np.savez(tmp_path / "bad.npz", **arrays)
    argv = ["--steps", "14", "--out", tmp_path / "run", "--init", tmp_path / "bad.npz"]
    assert run_with(lambda step: pytest.fail("it ran"))(*argv) == 2
    assert "AdamW" in one_line(capsys)
    assert not (tmp_path / "run" / "checkpoint.npz").exists()


# Command lines.


def one_line_or_fine(program, parse, argv) -> bool:
    """Whether the command line is taken; one that is not gets one line, exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = store.run_command(program, lambda argv: parse(argv) and None, argv)
    lines = err.getvalue().splitlines()
    assert (code, len(lines)) in [(None, 0), (2, 1)], (argv, lines)
    return code is None


def is_help(word: str) -> bool:
    return word.startswith(("-h", "--h"))


words = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.integers(-3, 3000).map(str),
    st.floats().map(repr),
    st.text(max_size=8).filter(lambda word: not is_help(word)),
    st.sampled_from(["0", "-0.0", "1e999", "nan", "-inf", "1_0", "0x10", "", "a\nb"]),
)


def flag_with_value(names, values):
    """One flag as words: alone, its value after it, or joined by "="."""
    flag, value = st.sampled_from(names), st.one_of(words, st.sampled_from(values))
    return st.one_of(
        flag.map(lambda f: [f]),
        st.tuples(flag, value).map(list),
        st.tuples(flag, value).map(lambda x: ["=".join(x)]),
        words.map(lambda word: [word]),
    )


FIELDS = dataclasses.fields(settings.Config)
TRAIN_FLAGS = ["--preset", *("--" + f.name.replace("_", "-") for f in FIELDS)]
CHOICES = sorted({c for f in FIELDS for c in f.metadata.get("choices", ())})
EVAL_FLAGS = (
    "--theta --task --steps --seeds --baselines --data --data-dir --out"
).split()


@example_count(max_examples=100)
@given(
    st.lists(flag_with_value(TRAIN_FLAGS, CHOICES + [*settings.PRESETS]), max_size=6)
)
def test_any_words_are_settings_or_one_line(flags):
    """train.py's command line: settings that pass their own check again, or one line."""
    argv = [word for flag in flags for word in flag]
    if one_line_or_fine("train.py", settings.parse, argv):
        config = settings.parse(argv)
        settings.check(config)
        json.dumps(dataclasses.asdict(config), allow_nan=False)


def by_field(field):
    """[flag, a value that is right or nearly so] for one field of Config."""
    kind, *_ = typing.get_args(field.type) or (field.type,)
    flag = "--" + field.name.replace("_", "-")
    if kind is bool:
        return st.just([flag])
    values = {
        int: st.one_of(st.integers(0, 50), st.integers(0, 2**32)),
        float: st.one_of(st.floats(0, 1), st.floats(width=32)),
        str: st.sampled_from(field.metadata.get("choices", ("a", "b:1", "c:70000"))),
    }[kind]
    return values.map(lambda value: [f"{flag}={value}"])


@example_count(max_examples=100)
@given(st.lists(st.one_of([by_field(f) for f in FIELDS]), max_size=5))
def test_nearly_right_flags_are_settings_or_one_line(flags):
    """The same with values of the right type: the command line of a card repeats it."""
    argv = [word for flag in flags for word in flag]
    if one_line_or_fine("train.py", settings.parse, argv):
        config = settings.parse(argv)
        again = settings.parse(shlex.split(settings.command_line(config))[2:])
        for field in FIELDS:
            if field.name not in settings.NOT_RECIPE:
                assert getattr(again, field.name) == getattr(config, field.name)


@example_count(max_examples=100)
@given(
    st.lists(
        flag_with_value(EVAL_FLAGS, ["small", "quadratic", "adam", "1", "9"]),
        max_size=5,
    )
)
def test_any_words_to_eval_are_arguments_or_one_line(flags):
    """eval.py's command line likewise."""
    one_line_or_fine("eval.py", evaluation.parse, [w for flag in flags for w in flag])


@pytest.mark.parametrize(
    "argv",
    [
        ("--beta3", "nan"),
        ("--meta-lr", "1e39"),
        ("--weight-decay", "1e300"),
        ("--horizon", "100000000000"),
        ("--particles", "99999999999"),
        ("--steps", "2147483648"),
        ("--log-every", "1" + 30 * "0"),
        ("--distributed", "--coordinator", "a:" + 5000 * "1"),
        ("an\nunknown\nword",),
    ],
)
def test_numbers_that_do_not_fit_are_refused(argv):
    """Beyond int32 nothing would work; what a user typed stays on one line."""
    more = ["--num-processes", "2", "--process-id", "0"] if len(argv) == 3 else []
    assert not one_line_or_fine("train.py", settings.parse, [*argv, *more])


@pytest.mark.parametrize("flag", ["--steps", "--seeds"])
def test_a_huge_number_of_inner_steps_is_refused(flag):
    """At once: a search for a divisor of a prime near 10^18 would not end."""
    assert not one_line_or_fine("eval.py", evaluation.parse, [flag, f"{10**18 + 3}"])


# Files of theta, and checkpoints.


def theta_or_refused(path) -> bool:
    """Whether the file is taken, and then it is whole; what is refused is a UserError."""
    try:
        theta, optimizer, _ = store.load_theta(path)
        comparison.trained(path)
        store.minutes_spent(path)
    except store.UserError:
        return False
    like = jax.eval_shape(optimizer.init_theta, KEY)
    assert jax.tree.structure(theta) == jax.tree.structure(like)
    for found, wanted in zip(*map(jax.tree.leaves, (theta, like)), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert np.isfinite(found).all()
    return True


@pytest.fixture(scope="module")
def thetas():
    """The arrays of a good file of each kind, with a card as train.py makes it."""
    made = {
        "star": star.PRESETS["star"].init_theta(KEY),
        "mlp": lopts.mlp().init_theta(KEY),
    }
    constants = {"star": star.CONSTANTS["star"]._asdict(), "mlp": {}}
    return {
        name: {k: np.asarray(x) for k, x in theta.items()}
        | {"card": np.array(json.dumps({"optimizer": name, "constants": constants[name]}))}
        for name, theta in made.items()
    }  # fmt: skip


def packed(arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@example_count(max_examples=60)
@given(
    name=st.sampled_from(["star", "mlp"]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
    end=st.booleans(),
)
def test_a_damaged_theta_is_whole_or_refused(name, flips, keep, end, thetas, tmp_path):
    """Bytes flipped, anywhere or in the zip's directory at the end; the rest cut off."""
    content = bytearray(packed(thetas[name]))
    first = content.index(b"PK\x01\x02") if end else 0
    for where, change in flips:
        content[first + int(where * (len(content) - first - 1))] ^= change
    (tmp_path / "theta.npz").write_bytes(content[: int(keep * len(content))])
    taken = theta_or_refused(tmp_path / "theta.npz")
    assert taken or flips or keep < 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x),
    max_leaves=6,
)
cards = json_values | st.fixed_dictionaries(
    {},
    optional={
        "optimizer": st.sampled_from(["star", "mlp", "adam"]) | json_values,
        "recipe": json_values,
        "minutes": json_values,
        "constants": json_values
        | st.dictionaries(
            st.sampled_from(star.Constants._fields),
            json_values | st.lists(st.floats(0, 0.99), min_size=3, max_size=3),
            max_size=3,
        ),
    },
)


@example_count(max_examples=60)
@given(name=st.sampled_from(["star", "mlp"]), card=cards)
def test_any_card_is_taken_or_refused(name, card, thetas, tmp_path):
    """Cards that are JSON of any kind, some with names that are looked for."""
    arrays = thetas[name] | {"card": np.array(json.dumps(card))}
    np.savez(tmp_path / "theta.npz", **arrays)
    theta_or_refused(tmp_path / "theta.npz")


dtypes = st.sampled_from(
    "f2 f4 f8 g c8 c16 i1 i8 u8 ? S3 U3 M8[s] m8[s] V4 >f4 f4,f4".split()
)
shapes = st.sampled_from([(), (0,), (3,), (4,), (39, 4), (4, 39), (1, 1, 4)])


@example_count(max_examples=60)
@given(
    name=st.sampled_from(["star", "mlp"]),
    changes=st.dictionaries(
        st.sampled_from(
            ["w0", "b0", "rms_decays", "card", "file", "../w", "ä", "w0.npy"]
        ),
        st.tuples(dtypes, shapes | st.none()) | st.none(),
        max_size=3,
    ),
)
def test_any_arrays_are_a_theta_or_refused(name, changes, thetas, tmp_path):
    """Arrays left out, added, of other dtypes and shapes."""
    arrays = dict(thetas[name])
    for key, change in changes.items():
        old = arrays.pop(key, np.zeros(3))
        if change is not None:
            dtype, shape = change
            arrays[key] = np.zeros(old.shape if shape is None else shape, dtype)
    with zipfile.ZipFile(tmp_path / "theta.npz", "w") as file:
        for key, array in arrays.items():
            with file.open(key + ".npy", "w") as raw:
                np.save(raw, array)
    theta_or_refused(tmp_path / "theta.npz")


def header(descr: str, shape: str) -> bytes:
    """A `.npy` of no data that says it has this dtype and shape."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def zipped(members: dict, compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return file.getvalue()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


HOSTILE = {
    "empty": lambda good: b"",
    "a zip of nothing": lambda good: zipped({}),
    "a zip of text": lambda good: zipped({"w0": b"hello", "card": b"{}"}),
    "one array, no zip": lambda good: npy(np.zeros(3)),
    "a pickle": lambda good: b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",
    "a pickle inside": lambda good: packed(good | {"w0": np.array([{}], object)}),
    "a shape beyond memory": lambda good: zipped(
        {"w0.npy": header("'<f4'", "(10000000000000,)")}
    ),
    "a shape beyond int64": lambda good: zipped({"w0.npy": header("'<f4'", "(1e30,)")}),
    "a negative shape": lambda good: zipped({"w0.npy": header("'<f4'", "(-1, 4)")}),
    "code in the header": lambda good: zipped(
        {"w0.npy": header("__import__('os').abort()", "(3,)")}
    ),
    "a bomb": lambda good: zipped(
        {"w0.npy": bytes(2**25)}, compression=zipfile.ZIP_DEFLATED
    ),
    "an object dtype": lambda good: zipped({"w0.npy": header("'|O'", "(1,)")}),
    "a card nested too deeply": lambda good: packed(
        good | {"card": np.array(5000 * "[" + 5000 * "]")}
    ),
    "a card of numbers": lambda good: packed(good | {"card": np.zeros((3, 4))}),
    "complex weights": lambda good: packed(good | {"w0": good["w0"] + 1j}),
    "whole numbers": lambda good: packed(good | {"w0": good["w0"].astype(int)}),
    "weights beyond float32": lambda good: packed(
        good | {"w0": np.full((39, 4), 1e300)}
    ),
    "a constant that is a list": lambda good: packed(
        good | {"card": np.array('{"constants": {"beta1": [1, 2]}}')}
    ),
    "a constant that is text": lambda good: packed(
        good | {"card": np.array('{"constants": {"beta1": "0.1"}}')}
    ),
    "a constant beyond int64": lambda good: packed(
        good | {"card": np.array('{"constants": {"beta1": 1' + 30 * "0" + "}}")}
    ),
    "decays above 1": lambda good: packed(
        good | {"card": np.array('{"constants": {"rms_decay": 1.5}}')}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_theta_is_refused(name, thetas, tmp_path, capsys):
    """By eval.py and by --init: one line, exit code 2, nothing run, nothing unpacked. By
    `star.load_theta` alone, which a user may have copied: ValueError."""
    path = tmp_path / "theta.npz"
    path.write_bytes(HOSTILE[name](thetas["star"]))
    for program, flag in ((evaluation, "--theta"), (train, "--init")):
        argv = ["--task", "quadratic", flag, path, "--out", tmp_path / "run"]
        if name != "a card of numbers":  # then it is a theta without a card
            assert command(*argv, program=program) == 2
            assert str(path) in one_line(capsys)
    if name == "a card of numbers":
        path.write_bytes(HOSTILE[name](thetas["mlp"]))
        assert not theta_or_refused(path)
    else:
        with pytest.raises(ValueError, match="theta") as error:
            star.load_theta(path)
        assert "\n" not in str(error.value)


def test_minutes_that_are_no_number_are_refused(thetas, tmp_path):
    """--init adds to the time on the card."""
    for minutes in ('"long"', "[]", "NaN", "1e999", "-1", "null"):
        card = np.array(f'{{"optimizer": "mlp", "minutes": {minutes}}}')
        np.savez(tmp_path / "theta.npz", **thetas["mlp"] | {"card": card})
        with pytest.raises(store.UserError, match="minutes"):
            store.minutes_spent(tmp_path / "theta.npz")


@given(where=st.floats(0, 1), change=st.integers(1, 255), keep=st.floats(0, 1))
def test_a_damaged_checkpoint_is_whole_or_refused(
    where, change, keep, whole, tmp_path_factory
):
    """A flipped byte, or the end cut off: the same state, bit for bit, or UserError."""
    folder = tmp_path_factory.mktemp("damaged")
    good = (whole / "checkpoint.npz").read_bytes()
    config, about = settings.parse(SMALL), TASKS["quadratic"].load()[1]
    template = train.init_state(config, {})
    _, expected = train.load_checkpoint(whole, config, about, template)
    flipped = bytearray(good)
    flipped[int(where * (len(good) - 1))] ^= change
    for content in (bytes(flipped), good[: int(keep * (len(good) - 1))]):
        (folder / "checkpoint.npz").write_bytes(content)
        with contextlib.suppress(store.UserError):
            _, state = train.load_checkpoint(folder, config, about, template)
            jax.tree.map(np.testing.assert_array_equal, state, expected)


# Two runs in one folder.


def test_a_second_run_in_the_folder_is_refused(whole, run_with, tmp_path, capsys):
    """Begun anew or resumed while the first one runs: exit code 2, and the first goes on as
    if nothing had been."""
    folder, refused = tmp_path / "run", []

    def start_others(step):
        if step in (0, 6):
            again = ["--resume"] if step else ["--steps", "12"]
            refused.append(command(*SMALL, "--out", folder, *again))

    checkpoint_of_0 = folder / "checkpoint.npz"
    run = run_with(start_others)

    assert run("--out", folder) == 0
    lines = capsys.readouterr().err.splitlines()
    assert refused == [2, 2] and "holds a run" in lines[0]
    assert "another run is writing" in lines[1] and checkpoint_of_0.exists()
    assert theta_bytes(folder) == theta_bytes(whole)
    assert (folder / "log.csv").read_text().count("\n") == 13
    assert run_with()("--out", folder, "--resume") == 0  # the first has let go


@pytest.mark.parametrize("argv", [(), ("--resume",)])
def test_two_runs_started_at_once(argv, run_with, tmp_path, capsys):
    """Before the first of them has a checkpoint: the folder itself is locked."""
    with store.only_run_in(tmp_path):
        assert run_with()("--out", tmp_path, *argv) == 2
        line = one_line(capsys)
        assert command("--out", tmp_path, "--steps", "9", program=evaluation) == 2
    assert line == f"train: another run is writing in {tmp_path}"
    assert one_line(capsys) == f"eval: another run is writing in {tmp_path}"
    assert not any(tmp_path.iterdir())


def test_the_lock_ends_with_the_process(tmp_path):
    """Even by kill -9: nothing is left that a user would have to remove."""
    code = (
        "import sys, time, store\n"
        "with store.only_run_in(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    hold = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(hold, cwd=HERE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(store.UserError), store.only_run_in(tmp_path):
            pass
        process.kill()
    with store.only_run_in(tmp_path):
        assert not any(tmp_path.iterdir())


def test_without_locks_runs_are_not_hindered(tmp_path, monkeypatch):
    """On a file system or a system that has none."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    entered = []
    if store.fcntl:
        monkeypatch.setattr(store.fcntl, "flock", no_locks)
        with store.only_run_in(tmp_path):
            entered.append("no locks")
    monkeypatch.setattr(store, "fcntl", None)
    with store.only_run_in(tmp_path), store.only_run_in(tmp_path):
        entered.append("no fcntl")
    assert entered[-1] == "no fcntl"


# The optax interface, at full width. The rest of it is in test_star.py.


PARAMS = {"w": jnp.ones((8, 4)), "scale": jnp.float32(2.0)}
GRADS = jax.tree.map(
    lambda p: 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), PARAMS
)
TRANSFORM = star.star(star.PRESETS["star"].init_theta(KEY))
update = jax.jit(TRANSFORM.update)


def all_close(found, expected):
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)


@pytest.fixture(scope="module")
def plain():
    """Three updates in a Python loop: [(updates, state)]."""
    state, out = TRANSFORM.init(PARAMS), []
    for _ in range(3):
        updates, state = update(GRADS, state, PARAMS)
        out.append((updates, state))
    return out


def test_scan_equals_the_loop(plain):
    """The state is a carry of scan: same structure, shapes and dtypes."""

    def step(state, _):
        updates, state = TRANSFORM.update(GRADS, state, PARAMS)
        return state, updates

    state, updates = jax.lax.scan(step, TRANSFORM.init(PARAMS), None, length=3)
    all_close(state, plain[-1][1])
    all_close(jax.tree.map(lambda x: x[-1], updates), plain[-1][0])


def test_vmap_equals_one_after_the_other(plain):
    """An ensemble: each member is normalised by its own tensors."""
    scales = jnp.asarray([1.0, 3.0, 0.1])
    grads = jax.tree.map(lambda g: g[None] * scales.reshape(-1, *(1,) * g.ndim), GRADS)
    states = jax.vmap(lambda _: TRANSFORM.init(PARAMS))(scales)
    ensemble = jax.jit(jax.vmap(TRANSFORM.update, in_axes=(0, 0, None)))
    updates, states = ensemble(grads, states, PARAMS)
    assert states.count.shape == (3,)
    all_close(jax.tree.map(lambda x: x[0], (updates, states)), plain[0])
    alone = update(jax.tree.map(lambda g: g[1], grads), TRANSFORM.init(PARAMS), PARAMS)
    all_close(jax.tree.map(lambda x: x[1], (updates, states)), alone)


def test_eval_shape_tells_the_state_without_arrays(plain):
    """For checkpoints and sharding plans of parameters that no memory holds."""
    huge = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)}
    state = jax.eval_shape(TRANSFORM.init, huge)
    assert (
        state.rms["w"].shape == (10**6, 10**6) and state.rms["w"].dtype == jnp.float32
    )
    assert state.row["w"].shape == state.col["w"].shape == (3, 10**6)
    updates, _ = jax.eval_shape(TRANSFORM.update, huge, state, huge)
    assert (updates["w"].shape, updates["w"].dtype) == ((10**6, 10**6), jnp.bfloat16)
    like = jax.eval_shape(TRANSFORM.update, GRADS, TRANSFORM.init(PARAMS), PARAMS)
    for x, y in zip(*map(jax.tree.leaves, (like, plain[0])), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_donated_state_is_updated_in_place(plain):
    """Every buffer of the state has one of the same shape to go to."""
    step = jax.jit(TRANSFORM.update, donate_argnums=1)
    state = first = TRANSFORM.init(PARAMS)
    for _ in range(3):
        updates, state = step(GRADS, state, PARAMS)
    all_close((updates, state), plain[-1])
    assert all(x.is_deleted() for x in jax.tree.leaves(first))


def test_sharded_parameters_keep_their_sharding(plain):
    """On a mesh of all devices (here often one): the same numbers, updates and momentum as
    the parameters are."""
    devices = jax.devices()[: 4 if len(jax.devices()) >= 4 else 1]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    specs = {"w": P("data", None), "scale": P()}
    put = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    params, grads = jax.device_put(PARAMS, put), jax.device_put(GRADS, put)
    state = jax.jit(TRANSFORM.init)(params)
    state = optax.tree.map_params(
        TRANSFORM, lambda x, s: jax.device_put(x, s) if x.ndim == len(s.spec) else x,
        state, put,
    )  # fmt: skip
    updates, state = jax.jit(TRANSFORM.update)(grads, state, params)
    all_close((updates, state), plain[0])
    for tree in (updates, state.rms, *state.momentum):
        for name, sharding in put.items():
            assert tree[name].sharding.is_equivalent_to(sharding, tree[name].ndim)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.bool_])
def test_the_adapter_refuses_what_is_not_real(dtype):
    """At init, one leaf is enough; also under eval_shape."""
    params = PARAMS | {"z": jnp.ones(2, dtype)}
    for init in (TRANSFORM.init, lambda p: jax.eval_shape(TRANSFORM.init, p)):
        with pytest.raises(TypeError, match="real floating-point"):
            init(params)


def test_trees_of_any_kind():
    """A bare scalar, None for what is not trained, tuples, an empty tensor."""
    for params in (
        jnp.float32(1.0),
        {"a": jnp.ones(3), "frozen": None},
        (jnp.ones(3), [jnp.ones(()), {}]),
        {"none of it": jnp.ones((0, 3)), "some": jnp.ones(2)},
    ):
        state = jax.eval_shape(TRANSFORM.init, params)
        updates, _ = jax.eval_shape(TRANSFORM.update, params, state, params)
        for tree in (updates, state.rms, *state.momentum):
            assert jax.tree.structure(tree) == jax.tree.structure(params)
            shapes = [jax.tree.map(jnp.shape, x) for x in (tree, params)]
            assert shapes[0] == shapes[1]
    updates, _ = jax.jit(TRANSFORM.update)(params, TRANSFORM.init(params), params)
    assert np.isfinite(updates["some"]).all() and updates["some"].all()


TARGETS = jnp.sin(jnp.linspace(-3, 3, 64))[:, None]
INPUTS = jnp.linspace(-1, 1, 64)[:, None]


def shipped():
    """A theta that comes with the repository, as an optimizer that moves fast enough."""
    theta, constants = star.load_theta(HERE / "weights" / "star_fmnist.npz")
    return star.star(theta, constants)


def test_a_training_loop_of_flax():
    """flax.linen's TrainState with STAR for its optimizer learns a sine."""
    linen = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    model = linen.Sequential([linen.Dense(16), linen.tanh, linen.Dense(1)])
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(KEY, INPUTS), tx=shipped()
    )

    @jax.jit
    def step(state):
        def loss(params):
            return ((state.apply_fn(params, INPUTS) - TARGETS) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(200):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_a_training_loop_of_equinox():
    """An equinox module, whose filtered trees have None for all that is not an array."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(1, 1, 16, 1, activation=jnp.tanh, key=KEY)
    transform = shipped()
    state = transform.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        @eqx.filter_value_and_grad
        def loss(model):
            return ((jax.vmap(model)(INPUTS) - TARGETS) ** 2).mean()

        value, grads = loss(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = transform.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(200):
        model, state, value = step(model, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
