"""Several devices and processes: the same theta, one collective, and lost processes."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import devices
import estimators
import settings
import store
import train
from tasks import TASKS

HERE = pathlib.Path(__file__).resolve().parent.parent
RECIPE = (
    "--task quadratic --optimizer adam --steps 12 --horizon 20 --truncation 5 "
    "--particles 4 --checkpoint-every 4 --log-every 2"
).split()
PROGRAM = ["train.py"]
# Dies as if its machine had lost power, with six meta-steps behind it.
DYING = """
import os, signal, sys, train
compiled = train.compile_meta_step
def dying(*args):
    step = compiled(*args)
    def run(data, key, state):
        if int(state.step) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(data, key, state)
    return run
train.compile_meta_step = dying
train.main(sys.argv[1:])
"""


def run_together(commands: list, seconds=200) -> list:
    """(exit code, stdout, stderr) of Python processes that run at once; all are dead
    when this returns or raises."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}  # whatever the other tests run on
    # many small programs, the same in each process
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    running, end = [], time.monotonic() + seconds
    try:
        for command in commands:
            files = [tempfile.TemporaryFile("w+") for _ in range(2)]
            argv = [sys.executable, *map(str, command)]
            process = subprocess.Popen(
                argv, cwd=HERE, env=env, stdout=files[0], stderr=files[1]
            )
            running.append((process, *files))
        for process, *_ in running:
            process.wait(max(0, end - time.monotonic()))
    finally:
        for process, *_ in running:
            process.kill()
            process.wait()
    results = []
    for process, *files in running:
        for file in files:
            file.seek(0)
        results.append((process.returncode, *(file.read() for file in files)))
        for file in files:
            file.close()
    return results


def pair(folder, *programs, seconds_to_notice=20):
    """The commands of two processes of one run, which meet at a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{s.getsockname()[1]}"
    flags = ["--distributed", "--coordinator", meet, "--num-processes", 2]
    flags += ["--peer-timeout", seconds_to_notice, "--out", folder]
    return [
        [*program, *RECIPE, *flags, "--process-id", i]
        for i, program in enumerate(programs)
    ]


def floats(folder):
    """Theta and the meta-optimizer's moments, in one row."""
    arrays = store.read_npz(folder / "theta.npz")
    return np.concatenate([x.ravel() for k, x in arrays.items() if x.dtype.kind == "f"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    ((code, _, errors),) = run_together([[*PROGRAM, *RECIPE, "--out", folder]])
    assert code == 0, errors
    return folder


@pytest.mark.heavy
def test_two_processes_give_the_theta_of_one(alone, tmp_path):
    """Two particles each, or four: theta and the moments of AdamW after 12 meta-steps
    agree to 1e-6 (sums in another order; measured 2e-8). Only process 0 prints."""
    results = run_together(pair(tmp_path, PROGRAM, PROGRAM))
    assert [code for code, *_ in results] == [0, 0], results
    (_, printed, _), (_, silence, _) = results
    assert "meta-step 12/12" in printed and "theta in" in printed
    assert silence == ""
    np.testing.assert_allclose(floats(tmp_path), floats(alone), rtol=0, atol=1e-6)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in alone.iterdir()}
    ours, whole = (
        np.genfromtxt(folder / "log.csv", delimiter=",", skip_header=1)[:, :4]
        for folder in (tmp_path, alone)
    )
    np.testing.assert_allclose(ours, whole, rtol=1e-5)


@pytest.mark.heavy
def test_a_lost_process_ends_the_other_and_the_run_goes_on(alone, tmp_path):
    """A killed process: the other ends by itself, with a line that says what to do, and
    one process alone goes on from the checkpoint to the same theta."""
    results = run_together(pair(tmp_path, PROGRAM, ["-c", DYING]))
    (code, _, message), (killed, *_) = results
    assert killed == -signal.SIGKILL and code not in (0, None, -signal.SIGKILL), results
    lines = [line for line in message.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and str(tmp_path) in lines[0] and "--resume" in lines[0]
    assert "Traceback" not in message
    assert int(store.read_npz(tmp_path / "checkpoint.npz")[".step"]) == 4
    resume = [*PROGRAM, *RECIPE, "--out", tmp_path, "--resume"]
    ((code, _, errors),) = run_together([resume])
    assert code == 0, errors
    np.testing.assert_allclose(floats(tmp_path), floats(alone), rtol=0, atol=1e-6)


def test_a_process_that_cannot_meet_the_others_says_so(tmp_path, capsys):
    """--distributed where JAX runs already and no cluster is known: one line, code 2."""
    jax.devices()
    argv = [*RECIPE, "--out", str(tmp_path), "--distributed"]
    assert store.run_command("train.py", train.main, argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("train.py: --distributed") and message.count("\n") == 1


MEET = ["--coordinator", "127.0.0.1:1234", "--num-processes", "2", "--process-id", "1"]


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--devices", "0"], "--devices"),
        (["--devices", "4000"], "--devices 4000"),
        (["--peer-timeout", "0"], "--peer-timeout"),
        (MEET, "--distributed"),
        (["--distributed", *MEET[:4]], "go together"),
        (["--distributed", *MEET[:5], "2"], "--process-id 2"),
        (["--distributed", *MEET, "--coordinator", "here"], "HOST:PORT"),
        (["--distributed", *MEET, "--coordinator", "here:99999"], "HOST:PORT"),
    ],
)
def test_impossible_numbers_get_one_line(argv, word, tmp_path, capsys):
    """Exit code 2, and a line that names the flag."""
    argv = [*RECIPE, "--out", str(tmp_path), *argv]
    assert store.run_command("train.py", train.main, argv) == 2
    message = capsys.readouterr().err
    assert word in message and message.count("\n") == 1


def test_particles_that_do_not_divide_are_refused(tmp_path, monkeypatch, capsys):
    """Four particles on three devices."""
    monkeypatch.setattr(devices, "mesh_of", lambda n: types.SimpleNamespace(size=3))
    argv = [*RECIPE, "--out", str(tmp_path), "--devices", "3"]
    assert store.run_command("train.py", train.main, argv) == 2
    assert "cannot be shared by 3 devices" in capsys.readouterr().err


def stacked(seed, offset, size=12):
    """Gradients of `size` particles around an offset, and a metric."""
    rng = np.random.default_rng(seed)
    grads = {
        "a": (offset + rng.normal(size=(size, 2, 3))).astype(np.float32),
        "b": rng.normal(size=(size,)).astype(np.float32),
    }
    return grads, {"loss": rng.normal(size=size).astype(np.float32)}


def over_devices(reduce):
    """What each of three devices has: (3, ...); `vmap` stands in for the mesh."""
    mapped = jax.jit(jax.vmap(reduce, axis_name=devices.AXIS))
    return lambda *args: mapped(
        *jax.tree.map(lambda x: x.reshape(3, -1, *x.shape[1:]), args)
    )


mean_by_sum = over_devices(devices.mean_by_sum)
mean_of_particles = jax.jit(estimators.mean_of_particles)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 30.0]))
def test_the_sum_over_devices_is_the_mean_of_all_particles(seed, offset):
    """Mean, its standard error and the metrics, on every device."""
    grads, metrics = stacked(seed, offset)
    mean, expected = mean_of_particles(grads)
    expected = store.flatten((mean, expected | {"loss": metrics["loss"].mean()}))
    result = mean_by_sum(grads, metrics)
    for name, ours in store.flatten(result).items():
        theirs = expected[name]
        # grad_noise^2 is a difference of squares of the offset
        np.testing.assert_allclose(
            ours, np.stack([theirs] * 3), rtol=1e-4 + 1e-5 * offset, atol=1e-6
        )


@pytest.mark.parametrize(
    "combine", [estimators.mean_of_finite_particles, estimators.inverse_variance_mean]
)
def test_other_means_see_all_particles(combine):
    """The same numbers as on one device, where one particle's gradient is nan."""
    grads, metrics = stacked(1, 0.5)
    grads["a"][7] = np.nan
    if combine is estimators.inverse_variance_mean:
        grads = {"bptt": grads, "es": stacked(2, 0.5)[0]}
    grad, expected = jax.jit(combine)(grads)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
    expected = store.flatten((grad, expected | {"loss": metrics["loss"].mean()}))
    result = over_devices(devices.gathered(combine))(grads, metrics)
    for name, ours in store.flatten(result).items():
        np.testing.assert_allclose(ours, np.stack([expected[name]] * 3), rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer, estimator, expected",
    [
        (
            "star_small_beta3",
            "pes",
            ("205", "psum"),
        ),  # theta's 202, and three for metrics
        ("adam", "merged", ("4,7", "all_gather")),  # (N, both gradients and the loss)
    ],
)
def test_a_meta_step_has_one_collective(
    optimizer, estimator, expected, monkeypatch, use_stand_in
):
    """A sum of theta's 202 floats and three more; for the merge, one gathering. On a task
    with data, which every device must be handed."""
    mesh = jax.sharding.AbstractMesh((2,), (devices.AXIS,))
    monkeypatch.setattr(devices, "mesh_of", lambda n: mesh)
    config = settings.Config("fmnist_small", optimizer, estimator=estimator, horizon=50)
    data, _ = TASKS[config.task].load()
    state = jax.eval_shape(lambda data: train.init_state(config, data), data)

    def step(data, key, state):
        return train.meta_step(config, data, key, state)

    text = str(jax.make_jaxpr(step)(data, jax.random.key(0), state))
    assert re.findall(r"f32\[([\d,]*)\] = (psum|all_gather)\w*\[", text) == [expected]
