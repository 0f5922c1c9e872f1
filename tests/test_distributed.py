"""Processes that are killed, and several devices or processes that share one run."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_train import TINY, assert_same_run, command, finished, run, steps_saved, tiny

import devices
import store

FIXTURES = finished, run, tiny
HERE = pathlib.Path(__file__).resolve().parent.parent
TRAIN = "import sys, train; sys.exit(train.main(sys.argv[1:]))"
SLOWLY = f"""import os, time
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.05), fsync(file))
{TRAIN}"""
# Dies in its sixth meta-step, as if its machine had lost power.
DYING = """import os, devices
point = devices.multihost_utils.reached_preemption_sync_point
dies = lambda step: point(step) if step < 6 else os.kill(os.getpid(), 9)
devices.multihost_utils.reached_preemption_sync_point = dies
"""
NOTICED_SOON = f"import devices; devices.PEER_TIMEOUT = 10\n{TRAIN}"
SOME, MANY = (pytest.mark.heavy, 2), (pytest.mark.slow, 20)


@pytest.mark.parametrize("kills", [pytest.param(n, marks=m) for m, n in (SOME, MANY)])
def test_kill_9_and_resume_give_the_same_bytes(kills, tmp_path):
    """Killed at random moments, most of them in a write: the theta of a whole run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # lives of at most 1.4 s, with four writes a step, cannot reach the end
    recipe = [*TINY, "--steps", str(8 * kills), "--checkpoint-every", "1"]
    recipe += ["--devices", "1"]  # here and in new processes
    assert command(*recipe, "--out", whole) == 0
    argv = [sys.executable, "-c", SLOWLY, *recipe, "--out", str(killed)]
    for life in np.random.default_rng(0).uniform(0, 1.4, kills):
        argv += ["--resume"] * (killed / "checkpoint.npz").exists()
        with subprocess.Popen(argv, cwd=HERE, stdout=subprocess.PIPE) as process:
            next(line for line in process.stdout if line.startswith(b"compiled"))
            time.sleep(life)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert steps_saved(killed) < 8 * kills
    assert command(*recipe, "--out", killed, "--resume") == 0
    assert_same_run(killed, whole)


def test_a_second_run_in_the_folder_is_refused(finished, run, tmp_path, capsys):
    """Begun anew or resumed while the first one runs. The first goes on undisturbed."""
    codes = []

    def start_another(step):
        if step in (0, 6):
            resume = ["--resume"] if step else []
            codes.append(command(*TINY, "--out", tmp_path, *resume))

    assert run("--out", tmp_path, hook=start_another) == 0 and codes == [2, 2]
    first, second = capsys.readouterr().err.splitlines()
    assert "holds a run" in first and "another run is writing" in second
    assert_same_run(tmp_path, finished)


def run_together(*commands, **env):
    """(exit code, stdout, stderr) of `python -c` commands that run at once."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pipes |= dict(cwd=HERE, env=os.environ | {"JAX_PLATFORMS": "cpu"} | env)
    commands = [[sys.executable, "-c", *map(str, command)] for command in commands]
    running = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        texts = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(running, texts, strict=True)]


def pair(folder, *codes):
    """The commands of two processes of one run, which meet at a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{s.getsockname()[1]}"
    flags = ["--distributed", "--coordinator", meet, "--num-processes", 2]
    flags += ["--out", folder, "--process-id"]
    return [[code, *TINY, *flags, i] for i, code in enumerate(codes)]


def assert_close(folder, other):
    """Theta, AdamW's means and the log agree but for the order of sums."""
    ours, theirs = (store.read_npz(d / "theta.npz") for d in (folder, other))
    for name in ours.keys() - {"card"}:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)
    logs = (np.genfromtxt(d / "log.csv", delimiter=",") for d in (folder, other))
    np.testing.assert_allclose(*(log[1:, :4] for log in logs), rtol=1e-4)


@pytest.mark.heavy
def test_two_processes_give_the_theta_of_one(finished, tmp_path):
    """Two particles each, or four. Once they have met, only process 0 prints and writes."""
    results = run_together(*pair(tmp_path, TRAIN, TRAIN))
    assert [code for code, *_ in results] == [0, 0], results
    (_, printed, _), (_, silence, _) = results
    assert "meta-step 12/12" in printed and "theta in" in printed
    assert silence.startswith("waiting") and silence.count("\n") == 1
    assert_close(tmp_path, finished)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in finished.iterdir()}


@pytest.mark.heavy
def test_a_lost_process_ends_the_other_and_the_run_goes_on(finished, tmp_path):
    """The other ends by itself, and one alone goes on from the checkpoint."""
    results = run_together(*pair(tmp_path, NOTICED_SOON, DYING + NOTICED_SOON))
    (code, *_), (killed, *_) = results
    assert killed == -signal.SIGKILL and code not in (0, -signal.SIGKILL), results
    assert steps_saved(tmp_path) == 4
    assert command(*TINY, "--out", tmp_path, "--resume") == 0
    assert_close(tmp_path, finished)


@pytest.mark.heavy
def test_a_process_that_never_arrives_is_waited_for_in_vain(tmp_path):
    """Each says for whom it waits, and ends after the time asked with one line."""
    impatient = f"import devices; devices.PEER_TIMEOUT = 3\n{TRAIN}"
    for only in pair(tmp_path, impatient, impatient):
        ((code, out, err),) = run_together(only)
        assert code == 2 and "waiting up to 3 s for all 2 processes at 127" in out
        assert "waited in vain for all 2" in err and err.count("\n") == 1


@pytest.mark.heavy
def test_two_devices_give_the_theta_of_one(tmp_path):
    """--devices 2: each has two particles of four, and all the data."""
    argv = [TRAIN, *TINY, "--task", "fmnist_small", "--data", "stand-in", "--out"]
    two = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    both = [[*argv, tmp_path / str(n), "--devices", n] for n in (1, 2)]
    results = run_together(*both, XLA_FLAGS=two)
    assert [code for code, *_ in results] == [0, 0], results
    assert_close(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("particles, taken", [(4, 4), (9, 3), (5, 5), (7, 1)])
def test_a_cpu_shares_particles_evenly_among_its_cores(monkeypatch, particles, taken):
    """A run that names no --devices takes the most of six cores that divide them."""
    monkeypatch.setattr("jax.local_devices", lambda: [None] * 6)
    assert devices.free_devices(particles) == taken


@pytest.mark.parametrize(
    "argv, says",
    [
        ("--devices 0", "--devices must be in 1 .."),
        ("--devices 4000", "--devices 4000: process 0 has"),
        ("--devices 3", "cannot be shared by 3 devices"),
        ("--distributed", "--distributed finds no other processes"),
        ("--process-id 1", "--process-id go together, and with --distributed"),
    ],
)
def test_impossible_numbers_get_one_line(argv, says, tmp_path, monkeypatch, capsys):
    """Exit code 2, and a line that names the flag."""
    if "3" in argv:
        monkeypatch.setattr("devices.mesh_of", lambda n: type("Mesh", (), {"size": 3}))
    assert command(*TINY, "--out", tmp_path, *argv.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert says in error
