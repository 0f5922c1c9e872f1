"""The command lines: learning, resuming, moving, and what bad input gets."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import inner
import settings
import star
import store
import train
from baselines import BASELINES
from companions import lopts
from experiments import kinds

HERE = pathlib.Path(__file__).resolve().parent.parent
KEY = jax.random.key(0)
TINY = (
    "--task quadratic --steps 12 --horizon 20 --truncation 5 --particles 2 "
    "--checkpoint-every 4 --log-every 2"
).split()


def command(*argv, program=train):
    """Exit code of a command line, run in this process."""
    return store.run_command(program.__name__, program.main, [str(a) for a in argv])


def theta_bytes(folder):
    arrays = store.read_npz(folder / "theta.npz")
    return {k: v.tobytes() for k, v in arrays.items() if k != "card"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("finished")
    assert command(*TINY, "--out", folder) == 0
    return folder


def test_a_run_leaves_its_files(finished):
    """config, log with a row per meta-step, theta with its card, checkpoint, curve."""
    names = {path.name for path in finished.iterdir()}
    expected = {"config.json", "log.csv", "theta.npz", "theta.json", "checkpoint.npz"}
    assert names == expected | {"curve.png"}
    with open(finished / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert all(float(row["meta_loss"]) > 0 for row in rows)
    card = json.loads((finished / "theta.json").read_text())
    assert card == store.read_card(finished / "theta.npz")
    assert card["meta_steps"] == 12 and card["inner_steps"] == 12 * 2 * 2 * 5
    assert card["fresh_loss"] > 0 and card["recipe"]["horizon"] == 20
    assert settings.parse(card["command"].split()[2:]) == settings.parse(TINY[:-4])
    theta, constants = star.load_theta(finished / "theta.npz")
    assert constants == star.CONSTANTS[card["optimizer"]]
    assert (finished / "theta.npz").stat().st_size < 32_000


@pytest.mark.heavy
def test_kill_9_and_resume_give_the_same_bytes(finished, tmp_path):
    """A run killed without warning and resumed ends with the theta of the whole run."""
    argv = [sys.executable, "train.py", *TINY, "--out", str(tmp_path)]
    # one step's work at a time, so that the kill lands between checkpoints
    code = (
        "import sys, time, train; compiled = train.compile_meta_step\n"
        "def slow(*a):\n"
        "    step = compiled(*a)\n"
        "    return lambda *b: (time.sleep(0.2), step(*b))[1]\n"
        "train.compile_meta_step = slow; sys.exit(train.main(sys.argv[1:]))"
    )
    argv[1:2] = ["-c", code]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        argv, cwd=HERE, env=env, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("meta-step 6/"):
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert int(store.read_npz(tmp_path / "checkpoint.npz")[".step"]) in (4, 8)
    assert command(*TINY, "--out", tmp_path, "--resume") == 0
    assert theta_bytes(tmp_path) == theta_bytes(finished)
    ours, whole = (
        [line.split(",")[:4] for line in (d / "log.csv").read_text().splitlines()]
        for d in (tmp_path, finished)
    )
    assert ours == whole  # all but the seconds


def test_interrupt_saves_and_resumes(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of a step: that step is finished and saved, exit code 130."""
    compile_meta_step = train.compile_meta_step

    def interrupted(config, data, state):
        step = compile_meta_step(config, data, state)

        def run(data, key, state):
            if int(state.step) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return step(data, key, state)

        return run

    monkeypatch.setattr(train, "compile_meta_step", interrupted)
    assert command(*TINY, "--out", tmp_path) == 130
    assert "saved at 7" in capsys.readouterr().out
    monkeypatch.undo()
    assert command(*TINY, "--out", tmp_path, "--resume") == 0
    assert theta_bytes(tmp_path) == theta_bytes(finished)


@pytest.mark.parametrize("cut", ["1", "10,0.5,", "10,0.5,0.1\n", "\n", "x,1,1,1,1\n"])
def test_a_torn_log_is_mended(cut, finished, tmp_path):
    """A last row that a dying machine cut short is dropped, the whole ones stay."""
    whole = (finished / "log.csv").read_text().splitlines(keepends=True)
    path = tmp_path / "log.csv"
    path.write_text("".join(whole[:10]) + cut)
    assert [row[0] for row in train.Log(path, keep=12).rows] == list(range(1, 10))
    assert path.read_text() == "".join(whole[:10])


@pytest.mark.heavy
def test_init_goes_on_with_the_meta_optimizer(finished, tmp_path, capsys):
    """--init moves theta, Adam's moments and the step count by one small file, and the
    particles are staggered over the horizon of that step."""
    longer = ["--steps", "14", "--start-horizon", "0.25"]
    config = settings.parse([*TINY, *longer, "--init", str(finished / "theta.npz")])
    state = train.start_from(config, {}, train.init_state(config, {}))
    saved = store.read_npz(finished / "checkpoint.npz")
    ours = store.flatten(state)
    for name in ours:
        if name.startswith((".theta", ".meta", ".step")):
            np.testing.assert_array_equal(ours[name], saved[name])
    assert state.particles.window.tolist() == [0, 2]  # of four windows

    init = ["--init", finished / "theta.npz"]
    assert command(*TINY, *longer, "--out", tmp_path / "a", *init) == 0
    with open(tmp_path / "a" / "log.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [13, 14]
    assert "--init" in store.read_card(tmp_path / "a" / "theta.npz")["command"]
    fresh = ["--fresh-meta", "--steps", "2"]
    assert command(*TINY, *fresh, "--out", tmp_path / "b", *init) == 0
    with open(tmp_path / "b" / "log.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2]


def test_killed_before_its_first_checkpoint(finished, tmp_path, monkeypatch):
    """A run that dies in its first step has a checkpoint of step 0 to resume from."""

    def dies(*_):
        raise SystemExit(9)

    compile_meta_step = train.compile_meta_step
    monkeypatch.setattr(train, "compile_meta_step", lambda *a: dies)
    with pytest.raises(SystemExit):
        command(*TINY, "--out", tmp_path)
    monkeypatch.setattr(train, "compile_meta_step", compile_meta_step)
    assert command(*TINY, "--out", tmp_path, "--resume") == 0
    assert theta_bytes(tmp_path) == theta_bytes(finished)


def test_resume_refuses_other_data(finished, tmp_path):
    """The checkpoint knows the checksum of its data."""
    config = settings.parse(TINY)
    about = {"dataset": "other", "dataset_checksum": "f00"}
    with pytest.raises(store.UserError, match="other data"):
        train.load_checkpoint(finished, config, about, None)


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory):
    """Broken and foreign files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.npz").write_text("hello")
    whole = (finished / "theta.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(folder / "foreign.npz", x=np.zeros(3))
    blackbox = star.PRESETS["blackbox"].init_theta(jax.random.key(0))
    card = {"constants": star.CONSTANTS["blackbox"]._asdict()}
    star.save_theta(folder / "blackbox.npz", blackbox, card)
    mlp = lopts.mlp().init_theta(KEY)
    star.save_theta(folder / "mlp.npz", mlp, {"optimizer": "mlp"})
    short = mlp | {"w0": mlp["w0"][:3]}
    star.save_theta(folder / "mlp-short.npz", short, {"optimizer": "mlp"})
    star.save_theta(
        folder / "mlp-nan.npz", mlp | {"b0": mlp["b0"] * jnp.nan}, {"optimizer": "mlp"}
    )
    lion = {"constants": {"nominal": "lion"}}
    star.save_theta(folder / "lion.npz", blackbox, lion)
    (folder / "file").write_text("a file where a folder should be")
    for name in ("checkpoint-text", "checkpoint-foreign", "checkpoint-truncated"):
        (folder / name).mkdir()
    (folder / "checkpoint-text/checkpoint.npz").write_text("hello")
    np.savez(folder / "checkpoint-foreign/checkpoint.npz", x=np.zeros(3))
    whole = (finished / "checkpoint.npz").read_bytes()
    (folder / "checkpoint-truncated/checkpoint.npz").write_bytes(whole[:2000])
    return folder


# Program and what it is given -> what its line says.
BAD_INPUT = """
train.py --task imagenet -> argument --task: invalid choice: 'imagenet'
train.py --optimizer lion -> argument --optimizer: invalid choice: 'lion'
train.py --unknown-flag 1 -> unrecognized arguments: --unknown-flag 1
train.py --steps many -> argument --steps: invalid int value: 'many'
train.py --steps 0 -> --steps must be in 1 .. 2^31 - 1
train.py --particles -1 -> --particles must be in 1 .. 2^31 - 1
train.py --truncation 30 --horizon 2000 -> --truncation 30 does not divide --horizon 2000
train.py --truncation 0 -> --truncation must be in 1 .. 2^31 - 1
train.py --start-horizon 7 -> --start-horizon is a share of --horizon, above 0 and up to 1
train.py --horizons log-uniform --start-horizon 1 -> needs a --start-horizon below 1
train.py --horizons log-uniform --curriculum 0.1 -> --curriculum is about T that doubles
train.py --horizons log-uniform --estimator truncated_es --unroll 10 -> single windows
train.py --start-horizon 0 -> --start-horizon is a share of --horizon, above 0 and up to 1
train.py --sigma 0 -> --sigma must be above 0, in float32
train.py --sigma nan -> --sigma must be above 0, in float32
train.py --meta-lr -1 -> --meta-lr must be above 0, in float32
train.py --average 1 -> unrecognized arguments: --average 1
train.py --estimator truncated_es --unroll 7 -> --unroll 7 is not whole windows of 5
train.py --estimator truncated_es --unroll 2000 -> --unroll 2000 is longer than --horizon
train.py --estimator truncated_es --unroll 10 --start-unroll 20 -> --start-unroll 20 is
train.py --jitter 0.2 -> --jitter is about --unroll, which is not given
train.py --estimator truncated_es --unroll 10 --jitter 1.5 -> --jitter must be in 0 .. 1
train.py --meta-beta1 1 -> --meta-beta1 must be in 0 .. 1
train.py --objective test -> argument --objective: invalid choice: 'test'
train.py --optimizer mlp --beta3 1e-5 -> --beta3 is STAR's; mlp has none
train.py --optimizer gru --beta2 1 -> --beta2 is STAR's; gru has none
train.py --beta4 inf -> --beta4 must be finite in float32
train.py --estimator merged --particles 3 -> --estimator merged needs 4 --particles or more
train.py --estimator pes --unroll 10 -> does not go with pes, which joins windows itself
train.py --start-unroll 5 -> --start-unroll is about --unroll, which is not given
train.py --sigma inf -> --sigma must be above 0, in float32
train.py --estimator truncated_bptt --sigma -1 -> --sigma must be 0 or more, in float32
train.py --l2 -1 -> --l2 must be 0 or more, in float32
train.py --optimizer sgd --init {finished}/theta.npz -> is for STAR, this run for sgd
train.py --init {files}/mlp.npz -> is for mlp, this run for star_small_beta3
train.py --warmup 12 -> --warmup must be below --steps
train.py --seed -1 -> --seed must be in 0 .. 2^32 - 1
train.py --seed 9999999999999999999 -> --seed must be in 0 .. 2^32 - 1
train.py --init {files}/absent.npz -> absent.npz does not exist
train.py --init {files}/text.npz -> text.npz cannot be read as a .npz file: it is not one
train.py --init {files}/truncated.npz -> truncated.npz cannot be read as a .npz file: it is
train.py --init {files}/foreign.npz -> foreign.npz holds no theta of STAR
train.py --init {files}/blackbox.npz -> blackbox.npz is for beta3 = 0.001, this run has
train.py --init {finished}/theta.npz -> has 12 meta-steps behind it and --steps is 12
train.py --init {finished}/theta.npz --resume -> --resume goes on from the folder's
train.py --resume --out {files}/nothing-here -> nothing-here: No such file or directory
train.py --resume --out {files}/checkpoint-text -> checkpoint.npz cannot be read as a .npz
train.py --resume --out {files}/checkpoint-foreign -> checkpoint.npz is not a checkpoint of
train.py --resume --out {files}/checkpoint-truncated -> checkpoint.npz cannot be read as a
train.py --resume --out {finished} --sigma 0.5 -> checkpoint.npz was made with --sigma
train.py --resume --out {finished} --particles 3 -> checkpoint.npz was made with
train.py --out {finished} -> holds a run already: --resume it, or choose another --out
train.py --out {files}/file -> file: File exists
train.py --task fmnist --data real --data-dir {files}/absent -> absent is not a folder
eval.py --task imagenet -> unknown task 'imagenet'
eval.py --baselines adam,lion -> unknown baseline 'lion'
eval.py --theta {files}/absent.npz -> absent.npz does not exist
eval.py --theta {files}/text.npz -> text.npz cannot be read as a .npz file: it is not one
eval.py --theta {files}/foreign.npz -> foreign.npz holds no theta of STAR
eval.py --theta {files}/lion.npz -> lion.npz holds no theta of STAR: nominal 'lion' is none
eval.py --theta {files}/mlp-short.npz -> mlp-short.npz holds no theta of mlp: w0 is not
eval.py --theta {files}/mlp-nan.npz -> mlp-nan.npz holds a theta that is not finite
eval.py --steps 0 -> --steps must be in 1 .. 2^31 - 1
eval.py --seeds 0 -> --seeds must be in 1 .. 2^31 - 1
eval.py --out {files}/file -> cannot write to {files}/file: File exists
"""


@pytest.mark.parametrize(
    ("line", "says"), [line.split(" -> ") for line in BAD_INPUT.strip().splitlines()]
)
def test_bad_input_is_one_line_and_exit_code_2(
    line, says, finished, files, tmp_path, capsys
):
    """It names what is wrong, no traceback, and what was already written stays."""
    before = {path: path.read_bytes() for path in finished.iterdir()}
    says, line = (x.format(files=files, finished=finished) for x in (says, line))
    name, *argv = line.split()
    program, base = {
        "train.py": (train, TINY),
        "eval.py": (evaluation, ["--task", "quadratic"]),
    }[name]
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "run")]
    assert command(*base, *argv, program=program) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.heavy
def test_meta_training_learns():
    """On the noisy quadratic, 150 meta-steps of PES lower the loss of fresh runs well
    below that of the untrained theta."""
    argv = "--task quadratic --steps 150 --horizon 50 --truncation 10 --particles 16"
    config = settings.parse([*argv.split(), "--meta-lr", "0.01", "--optimizer", "star"])
    state = train.init_state(config, {})
    step = train.compile_meta_step(config, {}, state)
    untrained = jax.tree.map(jnp.copy, state.theta)
    for _ in range(config.steps):
        state, _ = step({}, jax.random.key(1), state)
    keys = jax.random.split(jax.random.key(2), 32)
    optimizer, _ = train.optimizer_of(config)
    result = inner.curves(
        lambda *_: kinds.quadratic(), {}, optimizer, [untrained, state.theta], keys, 50
    )
    before, after = np.minimum(np.nan_to_num(result.losses, nan=1e3), 1e3).mean((1, 2))
    assert after < 0.7 * before


@pytest.mark.heavy
def test_a_diverging_optimizer_does_not_stop_the_run(tmp_path):
    """beta3 = 1e3 blows every particle up; losses stay at the limit, theta finite."""
    assert command(*TINY, "--beta3", "1e3", "--out", tmp_path) == 0
    theta, _ = star.load_theta(tmp_path / "theta.npz")
    assert all(np.isfinite(x).all() for x in theta.values())
    with open(tmp_path / "log.csv", newline="") as file:
        losses = [float(row["meta_loss"]) for row in csv.DictReader(file)]
    assert max(losses) <= kinds.quadratic().loss_limit


def test_paper_preset_has_the_papers_settings():
    """Appendix B: K 50, sigma .01, AdamW 1e-4, clip 1.0, T 2000, batch 128, betas 1e-3."""
    config = settings.parse(["--preset", "paper"])
    found = (
        config.truncation,
        config.sigma,
        config.meta_lr,
        config.clip,
        config.horizon,
    )
    assert found == (50, 0.01, 1e-4, 1.0, 2000) and config.estimator == "pes"
    _, constants = train.optimizer_of(config)
    assert constants[:4] == (1e-3,) * 4 and kinds.BATCH_SIZE == 128
    rate = settings.parse(["--preset", "paper", "--weight-decay", "0.1"]).weight_decay
    assert rate == 0.1  # a flag beats the preset


@pytest.mark.parametrize("clip_by", ["value", "norm"])
def test_meta_optimizer_is_clipped_adamw(clip_by):
    """Clip, then optax.adamw at the cosine rate, by value or by global norm."""
    flags = ["--clip-by", clip_by, "--clip", "0.5", "--weight-decay", "0.3"]
    optimizer = train.meta_optimizer(settings.parse([*flags, "--steps", "4"]))
    theta, grad = jnp.asarray([1.0, -2.0]), jnp.asarray([3.0, 0.4])
    state = optimizer.init(theta)
    rate = optax.cosine_decay_schedule(3e-3, 4)
    plain = optax.adamw(rate, weight_decay=0.3)
    plain_state, clipped = plain.init(theta), jnp.asarray([0.5, 0.4])
    if clip_by == "norm":
        clipped = grad * 0.5 / jnp.linalg.norm(grad)
    for scale in (1.0, -0.1, 1.0):
        update, state = optimizer.update(grad * scale, state, theta)
        if scale == 1.0 or clip_by == "value":
            this = jnp.clip(grad * scale, -0.5, 0.5) if clip_by == "value" else clipped
        else:
            this = grad * scale
        expected, plain_state = plain.update(this, plain_state, theta)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


@given(weight_decay=st.floats(0.1, 1), seed=st.integers(0, 1000))
def test_weight_decay_bounds_theta(weight_decay, seed):
    """AdamW cannot carry |theta| far beyond 1/wd, whatever the gradients: section 5.1's
    magnitude control. Adam's step exceeds its rate by at most (1-b1)/sqrt(1-b2) = 3.2."""
    config = settings.parse(["--schedule", "constant", "--meta-lr", "0.1"])
    config = train.dataclasses.replace(config, weight_decay=weight_decay)
    optimizer = train.meta_optimizer(config)

    def step(carry, key):
        theta, state = carry
        scale = 10 ** jax.random.uniform(key, minval=-3, maxval=3)
        updates, state = optimizer.update(-scale * jnp.ones(3), state, theta)
        return (optax.apply_updates(theta, updates), state), theta

    theta = jnp.zeros(3)
    keys = jax.random.split(jax.random.key(seed), 1000)
    _, path = jax.lax.scan(step, (theta, optimizer.init(theta)), keys)
    assert np.abs(path).max() < 3.2 / weight_decay


@pytest.mark.heavy
def test_meta_step_compiles_once_with_a_curriculum():
    """T doubles as a traced number up to --horizon, nothing retraces, and at each
    doubling the particles are spread evenly over the longer trajectory."""
    config = settings.parse([*TINY, "--start-horizon", "0.25", "--curriculum", "0.5"])
    windows = [int(train.windows_at(config, jnp.int32(t))) for t in range(12)]
    assert windows == [1] * 3 + [2] * 3 + [4] * 6
    state = train.init_state(config, {})
    step = jax.jit(lambda s: train.meta_step(config, {}, jax.random.key(0), s)[0])
    done = []
    for _ in range(7):
        state = step(state)
        done.append(state.particles.window.tolist())
    assert step._cache_size() == 1
    assert done[3] == [1, 2] and done[6] == [1, 3]  # from 0, 1 of 2 and from 0, 2 of 4


@pytest.mark.heavy
def test_log_uniform_horizons_are_drawn_by_each_particle():
    """From --start-horizon to --horizon from the first meta-step on: 1 to 4 windows."""
    flags = ["--horizons", "log-uniform", "--start-horizon", "0.25"]
    config = settings.parse([*TINY, *flags])
    state = train.init_state(config, {})
    step = jax.jit(lambda s: train.meta_step(config, {}, jax.random.key(0), s)[0])
    before, lengths = np.asarray(state.particles.window), []
    for _ in range(40):
        state = step(state)
        window = np.asarray(state.particles.window)
        lengths += (5 - window[before == 4]).tolist()
        before = window
    assert set(lengths) == {1, 2, 3, 4} and lengths.count(1) > lengths.count(4)


# Metz et al. 2019: other optimizers, longer unrolls, other objectives.


METZ = (
    "--task quadratic --preset metz --steps 12 --horizon 20 --truncation 5 --particles 4 "
    "--unroll 10 --checkpoint-every 4"
).split()


@pytest.mark.heavy
def test_metz_preset_runs_and_is_evaluated(tmp_path, capsys):
    """Algorithm 1 on the MLP optimizer: its files and card, and eval.py on its theta."""
    whole = tmp_path / "whole"
    assert command(*METZ, "--out", whole) == 0
    card = json.loads((whole / "theta.json").read_text())
    assert card["optimizer"] == "mlp" and card["constants"] == {}
    assert "nominal_loss" not in card and card["fresh_loss"] > 0
    halves = np.linspace(1, 2, 13)[:12].sum()  # windows, growing from 1 to 2
    assert card["inner_steps"] == round(halves * 5 * 4 * 2)
    argv = "--task quadratic --steps 10 --seeds 2 --baselines".split()
    files = ["", "--theta", whole / "theta.npz", "--out", tmp_path / "eval"]
    assert command(*argv, *files, program=evaluation) == 0
    assert "mlp (whole)" in capsys.readouterr().out


@pytest.mark.heavy
def test_learned_momentum_gets_better():
    """`--optimizer momentum --estimator merged` on the quadratic: rate and momentum that
    start too small end with less than half of the loss."""
    argv = (
        "--task quadratic --preset metz --optimizer momentum --steps 120 --horizon 40"
    )
    argv += " --truncation 10 --unroll 40 --particles 8 --meta-lr 0.05"
    config = settings.parse(argv.split())
    state = train.init_state(config, {})
    step = train.compile_meta_step(config, {}, state)
    slow = lopts.encode({"learning_rate": 0.002, "momentum": 0.5})
    state, losses = state._replace(theta=slow), []
    for _ in range(config.steps):
        state, metrics = step({}, jax.random.key(1), state)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:10])


@pytest.mark.parametrize("growth", ["linear", "log", "constant"])
def test_unroll_grows_as_told(growth):
    """From 50 to 1,600 inner steps over half of 100 meta-steps, then no more."""
    argv = f"--unroll 1600 --unroll-growth {growth} --steps 100 --curriculum 0.5 "
    argv += "--estimator truncated_es"
    config = settings.parse(argv.split())
    windows = [float(train.unroll_at(config, s)) for s in (0, 25, 50, 99)]
    middle = {"linear": 16.5, "log": 32**0.5, "constant": 32.0}[growth]
    start = 32.0 if growth == "constant" else 1.0
    assert windows == pytest.approx([start, middle, 32, 32])


def test_jitter_varies_the_unroll_within_its_share():
    """+-20 % of 100 windows: evenly between 80 and 120, each meta-step anew."""
    argv = "--truncation 5 --unroll 500 --jitter 0.2 --unroll-growth constant "
    argv += "--estimator truncated_es"
    config = settings.parse(argv.split())
    keys = jax.random.split(KEY, 500)
    drawn = jax.vmap(lambda key: train.unroll_drawn(config, 0, key, 120))(keys)
    assert drawn.min() in (80, 81) and drawn.max() in (119, 120)
    assert abs(float(drawn.mean()) - 100) < 6 * 40 / 12**0.5 / 500**0.5
    assert int(train.unroll_drawn(config, 0, None, 120)) == 100


@pytest.mark.parametrize("objective", ["fresh", "valid"])
def test_objective_is_the_loss_after_the_update(objective, small_task):
    """Equation 3 on a batch of its own split, at the parameters the update made."""
    build, data = small_task
    fresh, step = inner.inner_training(
        lambda key: build(data, key), BASELINES["sgd"], objective
    )
    carry, theta = fresh(KEY), {"learning_rate": jnp.float32(0.5)}
    after, loss = step(theta, carry, jax.random.key(1))
    _, plain = inner.inner_training(lambda key: build(data, key), BASELINES["sgd"])
    same, before = plain(theta, carry, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, after, same)
    task = build(data, KEY)
    batch_key = jax.random.split(jax.random.key(1), 4)[2]
    split = {"fresh": "train", "valid": "valid"}[objective]
    expected = task.loss(after.params, KEY, task.batch(batch_key, split))
    assert loss == pytest.approx(float(expected), rel=1e-6) and loss != before


# Inner training.


def test_write_is_whole_or_not_at_all(tmp_path):
    """An error while writing leaves the earlier file as it was."""
    path = tmp_path / "x"
    store.write_atomically(path, lambda f: f.write(b"first"))

    def broken(file):
        file.write(b"sec")
        raise OSError("disk full")

    with pytest.raises(OSError):
        store.write_atomically(path, broken)
    assert path.read_bytes() == b"first"
