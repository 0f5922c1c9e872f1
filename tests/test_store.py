"""What every command line does: flags, signals, backends, pipes, figures, files."""

import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from test_train import TINY, assert_same_run, command, finished

import baselines
import eval as evaluation
import store
import train
from experiments import sweep
from tasks import TASKS

HERE = pathlib.Path(__file__).resolve().parent.parent
FIXTURES = (finished,)


def run_in_shell(line, **env):
    """(exit code, stdout, stderr) of a command line in the project's folder."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path} | env
    pipes = dict(capture_output=True, text=True, timeout=200)
    done = subprocess.run(["bash", "-c", line], cwd=HERE, env=env, **pipes)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flag, program", [("--step", train), ("--seed", evaluation)])
def test_abbreviated_flags_are_refused(flag, program, capsys):
    """--seed for --seeds would run another experiment than the one that was asked for."""
    assert command(flag, "3", program=program) == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_values_may_be_negative_powers_and_home_folders(monkeypatch):
    """--beta3 -1e-6 is a value, and ~ is the home folder."""
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = train.parse(["--beta3", "-1e-6", "--out=~/run", "--init=~/theta.npz"])
    assert recipe.beta3 == -1e-6
    assert (recipe.out, recipe.init) == ("/home/ada/run", "/home/ada/theta.npz")
    assert evaluation.parse(["--theta=~/x.npz"]).theta == ["/home/ada/x.npz"]
    assert sweep.parse(["--out=~/runs"])[0].out == "/home/ada/runs"


def test_resume_needs_no_other_flag(finished, capsys):
    """The folder knows the recipe of its run, and a flag that differs is refused."""
    before = {path: path.read_bytes() for path in finished.iterdir()}
    assert command("--resume", "--out", finished, "--steps", "4") == 2
    assert "was made with --steps 12, not 4" in capsys.readouterr().err
    assert command("--resume", "--out", finished) == 0
    assert before[finished / "log.csv"] == (finished / "log.csv").read_bytes()


def raises(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, says",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "output: No space left on device"),
        (MemoryError(), 2, "out of memory"),
        (BrokenPipeError(), 141, None),
    ],
)
def test_every_end_is_one_line(error, code, says, capsys, monkeypatch):
    """Ctrl-C, a full output, no memory. A reader that went gets no word."""
    monkeypatch.setattr(store, "forget_output", lambda: None)
    assert store.run_command("x.py", raises(error)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (says is not None) and all(says in line for line in lines)


@pytest.mark.heavy
def test_a_backend_that_is_not_there_is_named():
    """And the theta file is not blamed."""
    for line in ("eval.py", "train.py --task quadratic", "-m experiments.catalogue"):
        code, _, err = run_in_shell(f"python {line}", JAX_PLATFORMS="cuda")
        assert code == 2 and "backend 'cuda'" in err and err.count("\n") == 1


@pytest.mark.heavy
def test_a_reader_may_go_and_a_disk_may_be_full():
    """`| true` ends every program without a word, a full output with one line."""
    for program in ("-m experiments.catalogue", "nqm.py"):
        _, _, err = run_in_shell(f"python {program} | true")
        assert err == ""
    full = "python -m experiments.catalogue > /dev/full"
    code, _, err = run_in_shell(full)
    assert (code, err) == (
        2,
        "experiments.catalogue: output: No space left on device\n",
    )
    assert run_in_shell("python -m experiments.catalogue >&-") == (0, "", "")


@pytest.mark.heavy
def test_float64_in_the_environment_changes_no_bit(finished, tmp_path):
    """JAX_ENABLE_X64=1 python train.py gives the float32 theta, and figures need no
    backend of matplotlib's."""
    env = {"JAX_ENABLE_X64": "1", "MPLBACKEND": "module://not_there.backend_inline"}
    line = f"python train.py {' '.join(TINY)} --devices 1 --out {tmp_path}"
    code, out, err = run_in_shell(line, **env)
    assert (code, err) == (0, "") and "theta in" in out
    assert_same_run(tmp_path, finished)
    assert (tmp_path / "curve.png").exists()


def test_a_figure_that_fails_costs_one_line(tmp_path, capsys):
    """Whatever matplotlib raises, the results stand."""
    store.draw_figure(tmp_path / "x.png", raises(KeyError("font")), None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.png is not drawn: 'font'" in line and not any(tmp_path.iterdir())


def test_a_run_in_a_thread(finished, tmp_path):
    """As notebooks start it: signals reach the main thread alone."""
    codes = []
    argv = [*TINY, "--out", str(tmp_path)]
    thread = threading.Thread(target=lambda: codes.append(train.main(argv)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_all_thetas_see_the_same_batches(impl, monkeypatch):
    """Batched over thetas, for every kind of key: equal thetas give equal curves."""
    monkeypatch.setattr(baselines, "each", lambda: jax.vmap)
    keys = jax.random.split(jax.random.key(0, impl=impl), 2)
    thetas = [baselines.as_theta({"learning_rate": 0.01})] * 2
    build, sgd = TASKS["quadratic"].build, baselines.BASELINES["sgdm"]
    with jax.default_prng_impl(impl):
        losses = baselines.curves(build, {}, sgd, thetas, keys, 5).losses
    np.testing.assert_array_equal(losses[0], losses[1])
    assert (losses[:, 0] != losses[:, 1]).all()


def test_temporary_files_have_names_of_their_own(tmp_path):
    """Two processes that write one file at once do not share what they rename."""
    seen = []
    store.write_atomically(tmp_path / "x", lambda file: seen.append(file.name))
    assert str(os.getpid()) in seen[0] and [p.name for p in tmp_path.iterdir()] == ["x"]
