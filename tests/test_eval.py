"""Comparisons: curves, files, suites, and the figures made of meta-training runs."""

import argparse
import csv
import json

import jax
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
import tasks
import train
from baselines import BASELINES, best_rate, rates
from companions import lopts
from experiments import comparison, sweep, tuning
from figures import __main__ as figures
from figures import star_runs as figures_star

KEY = jax.random.key(0)
LOG = [].append  # a log that says nothing


def evaluate(line: str, folder, *more) -> int:
    """Exit code of eval.py."""
    argv = [*line.split(), *map(str, more), "--out", str(folder)]
    return store.run_command("eval.py", evaluation.main, argv)


def write_theta(path, optimizer: str, task: str, seed=0):
    """An untrained theta as train.py would leave it."""
    theta = lopts.LEARNED[optimizer].init_theta(jax.random.key(seed))
    card = {"optimizer": optimizer, "task": task, "fresh_loss": 1.0}
    star.save_theta(path, theta, card)
    return path


@pytest.fixture
def theta(tmp_path):
    return write_theta(tmp_path / "sgd_rate.npz", "sgd", "fmnist_small")


@pytest.fixture
def ours(monkeypatch, tmp_path):
    """tuned.json holds one setting each of Adam and NAdamW for `quadratic`."""
    found = {"dataset_checksum": "", "budget": 2, "seed": 0, "loss": 1.0}
    found |= {"losses": [1.0, 2.0], "seconds": 0.1}
    settings = {
        "adam": {"learning_rate": 0.03},
        "nadamw": {"learning_rate": 0.1, "constant": 0.5, "steps": 200.0},
    }
    tuned = {
        ("quadratic", name, 200): found | {"theta": setting, "steps": 200}
        for name, setting in settings.items()
    }
    monkeypatch.setattr(tuning, "load_tuned", lambda: tuned)


# Curves.


@given(steps=st.integers(1, 2000).map(lambda n: 50 * n))
def test_thinning_is_a_divisor_that_keeps_enough_points(steps):
    """At most 4,000 points, and more than 1,300 where there are as many steps."""
    every = inner.thinning(steps)
    assert steps % every == 0 and steps // every <= 4000
    assert steps // every > min(1300, steps - 1)


def test_steps_that_do_not_part_are_refused(tmp_path, theta, capsys):
    """A prime number of steps, too long to keep each, is one line and exit code 2."""
    line = "--task quadratic --steps 10007 --theta"
    assert evaluate(line, tmp_path / "out", theta) == 2
    assert "rounder" in capsys.readouterr().err


def test_curves_equal_a_plain_loop(small_task):
    """curves() is optax's own loop, for each learning rate and seed, in any chunks."""
    build, data = small_task
    task = build(data, KEY)
    keys = jax.random.split(jax.random.key(5), 2)
    result = inner.curves(
        build, data, BASELINES["adam"], rates([1e-3, 1e-2]), keys, 5, chunk=3
    )
    assert result.losses.shape == (2, 2, 5)
    init_key, run_key = jax.random.split(keys[1])
    params = task.init(init_key)
    adam = optax.adam(1e-2, eps_root=1e-8)
    state = adam.init(params)
    for t in range(5):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(run_key, t))
        batch = task.batch(batch_key, "train")
        loss, grads = jax.value_and_grad(task.loss)(params, loss_key, batch)
        np.testing.assert_allclose(result.losses[1, 1, t], loss, rtol=1e-4)
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)


def test_thinned_curves_are_means_and_report(small_task):
    """every = 4 gives the means of 4 steps of the same run; report sees every chunk."""
    build, data = small_task
    keys, seen = jax.random.split(jax.random.key(5), 1), []
    args = build, data, BASELINES["sgdm"], rates([1e-2]), keys, 24
    whole = inner.curves(*args).losses
    thin = inner.curves(*args, chunk=9, every=4, report=seen.append).losses
    np.testing.assert_allclose(thin, whole.reshape(1, 1, 6, 4).mean(-1), rtol=1e-5)
    assert seen == [8, 16, 24]


# Comparisons.


@pytest.mark.heavy
def test_eval_writes_its_comparison(use_stand_in, theta, tmp_path, capsys):
    """Curves, table, JSON and picture; log, table and JSON name the stand-in."""
    out = tmp_path / "out"
    line = "--task fmnist_small --steps 40 --seeds 2 --baselines adam --theta"
    assert evaluate(line, out, theta) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"results.json", "table.csv", "curves.csv", "curves.png"}
    results = json.loads((out / "results.json").read_text())
    assert results["stand_in"] and "stand-in" in results["dataset"]
    assert "stand-in" in (out / "table.csv").read_text()
    assert "stand-in" in capsys.readouterr().out
    with open(out / "curves.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 41 and len(rows[0]) == 1 + 2 * 2
    losses = np.array(rows[1:], float)[:, 1:3]
    first, adam = results["rows"]
    assert first["mean_loss"] == pytest.approx(losses.mean(), rel=1e-3)
    assert adam["final_over_adam"] == 1
    ratio = first["final_loss"] / adam["final_loss"]
    assert first["final_over_adam"] == pytest.approx(ratio)
    # tuned here, since nothing is shipped for a stand-in: the best of the eleven
    tuned = results["entries"][1]["settings"]
    assert tuned["tuned"]["budget"] == 11 and tuned["tuned"]["steps"] == 40


def test_shipped_settings_are_used_and_stretched(ours):
    """Those of the task, for runs of any length; the schedule ends with the run."""
    _, about = tasks.TASKS["quadratic"].load()
    adam = comparison.baseline("quadratic", "adam", 50, {}, about)
    assert adam.name == "adam 0.03" and adam.settings["tuned"]["steps"] == 200
    nadamw = comparison.baseline("quadratic", "nadamw", 50, {}, about)
    assert nadamw.theta["steps"] == 50 and nadamw.theta["constant"] == 0.5


def test_results_are_read_back(ours, theta, tmp_path):
    """`saved` gives what `save` wrote, for the same request alone."""
    request = comparison.Request((theta,), ("adam",), seeds=2, steps=30)
    entries, about = comparison.on_task("quadratic", request, tmp_path, LOG)
    asked = comparison.identity("quadratic", request)
    found, described = comparison.saved(tmp_path, asked)
    assert described == about
    for one, other in zip(entries, found, strict=True):
        np.testing.assert_allclose(one.curves.losses, other.curves.losses, rtol=1e-4)
        assert one._replace(curves=None) == other._replace(curves=None)
    more = request._replace(steps=31)
    assert comparison.saved(tmp_path, comparison.identity("quadratic", more)) is None
    (tmp_path / "results.json").write_text("{")
    assert comparison.saved(tmp_path, asked) is None


@pytest.mark.heavy
def test_a_suite_is_drawn_and_resumes(ours, theta, tmp_path, monkeypatch):
    """A folder a task, one table, an overview; a task that is there is not run again."""
    names = ("quadratic", "rosenbrock")
    monkeypatch.setitem(tasks.SUITES, "small", names)
    line = "--task small --steps 20 --seeds 1 --baselines adam --theta"
    assert evaluate(line, tmp_path / "out", theta) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {*names, "results.json", "table.csv", "overview.png"}
    (tmp_path / "out" / "rosenbrock" / "results.json").unlink()
    ran, run = [], comparison.run

    def watch(contestant, *args):
        ran.append(contestant.name)
        return run(contestant, *args)

    monkeypatch.setattr(comparison, "run", watch)
    assert evaluate(line, tmp_path / "out", theta) == 0
    assert len(ran) == 2 and ran[0] == "sgd (sgd_rate)"  # those of rosenbrock


@pytest.mark.heavy
def test_what_an_interrupted_task_had_done_is_kept(ours, theta, tmp_path, monkeypatch):
    """Stopped in the second of three optimizers, it goes on there; done, it starts anew."""
    line = "--task quadratic --steps 30 --seeds 2 --baselines adam,nadamw --theta"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert evaluate(line, whole, theta) == 0
    ran, run = [], comparison.run

    def stop(contestant, *args):
        ran.append(contestant.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run(contestant, *args)

    monkeypatch.setattr(comparison, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main([*line.split(), str(theta), "--out", str(stopped)])
    kept = json.loads((stopped / comparison.UNFINISHED).read_text())
    assert [entry["name"] for entry in kept["entries"]] == ran[:1] == ["sgd (sgd_rate)"]
    assert not (stopped / "results.json").exists()
    assert evaluate(line, stopped, theta) == 0
    assert ran[2:] == ["adam 0.03", "nadamw"]
    assert not (stopped / comparison.UNFINISHED).exists()
    assert (stopped / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()
    assert evaluate(line, stopped, theta) == 0
    assert len(ran) == 4 + 3


@pytest.mark.heavy
def test_an_unfinished_task_of_another_order_starts_anew(
    ours, theta, tmp_path, monkeypatch
):
    """The order of the baselines is part of the request; what is cut off is not read; a
    stop in a second run leaves the first one's results whole."""
    request = comparison.Request((theta,), ("adam", "nadamw"), seeds=1, steps=30)
    turned = request._replace(baselines=("nadamw", "adam"))
    run, until = comparison.run, [2]

    def stop(*args):
        until[0] -= 1
        if until[0] < 0:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(comparison, "run", stop)
    for _ in range(2):  # nothing there yet; then the results of `turned`
        until[0] = 2
        with pytest.raises(KeyboardInterrupt):
            comparison.on_task("quadratic", request, tmp_path, LOG)
        asked = comparison.identity("quadratic", request)
        assert len(comparison.kept(tmp_path, asked)[0]) == 2
        until[0] = 3
        entries, _ = comparison.on_task("quadratic", turned, tmp_path, LOG)
        names = ["sgd (sgd_rate)", "nadamw", "adam 0.03"]
        assert [entry.name for entry in entries] == names
    entry = '{"losses": [[1]], "seeds": 1, "test": 0}'  # a number for a dictionary
    foreign = f'{{"arguments": {json.dumps(asked)}, "entries": [{entry}]}}'
    for text in ("{", "[]", '{"arguments": 1}', "null", foreign):
        (tmp_path / comparison.UNFINISHED).write_text(text)
        assert comparison.kept(tmp_path, asked) is None
    results = (tmp_path / "results.json").read_bytes()
    until[0] = 1
    with pytest.raises(KeyboardInterrupt):
        comparison.on_task("quadratic", turned, tmp_path, LOG, resume=False)
    assert (tmp_path / "results.json").read_bytes() == results
    (tmp_path / "curves.csv").write_text("step,a\n1\n2,3\n")
    turned_asked = comparison.identity("quadratic", turned)
    assert comparison.saved(tmp_path, turned_asked) is None


def test_summary_leaves_out_what_diverged():
    """Geometric means over the tasks where a ratio is known; diverged tasks counted."""

    def line(task, optimizer, final, diverged="0/1"):
        row = {"task": task, "optimizer": optimizer, "diverged": diverged}
        return row | {"final_loss": final, "final_over_adam": final}

    table = [line("a", "x", 0.5), line("b", "x", 2.0), line("c", "x", None, "1/1")]
    (found,) = comparison.summary(table)
    assert found["tasks"] == "3" and found["diverged on"] == "1"
    assert found["final over adam"] == pytest.approx(1) and found["below adam"] == "1/2"


def test_divergence_is_counted_not_averaged():
    """nan, inf, or an end above the start count as diverged; the mean is of the rest."""
    losses = np.ones((4, 400)) * np.linspace(2, 1, 400)
    losses[1, 200] = np.nan
    losses[2] = losses[2, ::-1]
    losses[3, 399] = np.inf
    found = inner.Curves(losses, {"acc": np.arange(4.0)}, 1.0)
    row = comparison.row(comparison.Entry("x", found, 1, {}))
    assert row["diverged"] == "3/4" and row["acc"] == 0.0
    assert row["mean_loss"] == pytest.approx(1.5)


def test_best_rate_takes_nan_as_the_worst():
    """The search prefers any finite loss to nan."""
    losses = np.ones((3, 1, 5))
    losses[0], losses[1, 0, 2] = 2.0, np.nan
    assert best_rate(losses) == 2


def test_ema_is_the_bias_corrected_running_mean():
    """ema of a constant is the constant; of a step it forgets at the stated rate."""
    np.testing.assert_allclose(inner.ema(np.ones(50), 0.98), 1)
    late = inner.ema([0.0] * 200 + [1.0] * 35, 0.98)[-1]
    assert late == pytest.approx(1 - 0.98**35, abs=0.02)


# Meta-training runs and figures 3 and App. 1-4.

QUICK = (
    "--task quadratic --steps 12 --horizon 20 --truncation 5 --particles 2 "
    "--seeds 2 --only hyperparam"
).split()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One variant, two seeds; of an optimizer that compiles quickly."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep.VARIANTS, "hyperparam", ("--optimizer", "adam"))
        assert sweep.main([*QUICK, "--out", str(folder)]) == 0
        yield folder


@pytest.mark.heavy
def test_a_sweep_skips_what_is_finished_and_resumes(swept, capsys):
    """The same command again runs nothing but what a run without its end still lacks."""
    path = swept / "hyperparam-seed1" / "theta.npz"
    theta, _, _ = store.load_theta(path)
    card = store.read_card(path)
    fresh = card.pop("fresh_loss")
    star.save_theta(path, theta, card)
    assert sweep.main([*QUICK, "--out", str(swept)]) == 0
    assert capsys.readouterr().out.count("finished before") == 1
    after, _, _ = store.load_theta(path)
    assert store.read_card(path)["fresh_loss"] == fresh
    assert after == theta


def test_a_sweep_of_another_recipe_is_refused(swept, capsys):
    """Finished runs are not taken for those of other flags; figures do not mix them."""
    argv = [*QUICK, "--sigma", "0.5", "--out", str(swept)]
    assert store.run_command("sweep.py", sweep.main, argv) == 2
    assert "made with --sigma 0.01, not 0.5" in capsys.readouterr().err
    with pytest.raises(store.UserError, match="runs differ in constants"):
        cards = [{"constants": {"beta2": beta}} for beta in (1e-3, 1.0)]
        figures_star.check_same("runs", cards, "constants")


def test_an_interrupted_sweep_with_init_goes_on(swept, tmp_path, monkeypatch):
    """The same command resumes a run that began from a trained theta."""
    monkeypatch.setitem(sweep.VARIANTS, "hyperparam", ("--optimizer", "adam"))
    theta = swept / "hyperparam-seed0" / "theta.npz"
    init = ["--init", str(theta), "--fresh-meta", "--out", str(tmp_path)]
    line = [*QUICK, "--seeds", "1", "--checkpoint-every", "5", *init]
    saved, save = [], train.save_checkpoint

    def stop(*args):
        save(*args)
        saved.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(line)
    monkeypatch.setattr(train, "save_checkpoint", save)
    assert saved and sweep.main(line) == 0
    card = store.read_card(tmp_path / "hyperparam-seed0" / "theta.npz")
    assert card["recipe"]["init"] == str(theta) and card["meta_steps"] == 12
    assert sweep.main(line) == 0  # finished: the same recipe


def test_a_sweep_takes_a_preset():
    """Noise reuse unless --preset says otherwise; flags reach every variant."""
    for flags, *changed in (
        ([], "doubling", "value", 1e-3),
        (["--preset", "best", "--beta2", "1"], "log-uniform", "norm", 1.0),
    ):
        _, rest = sweep.parse(flags)
        config = settings.parse([*rest, *sweep.VARIANTS["star_wd0.5"]])
        assert config.estimator == "noise_reuse" and config.weight_decay == 0.5
        _, constants = train.optimizer_of(config)
        assert [config.horizons, config.clip_by, constants.beta2] == changed


def test_runs_of_a_sweep_are_summed_up(swept):
    """Meta-losses are those of the logs, and inner losses those of the thetas."""
    args = argparse.Namespace(
        runs=str(swept), steps=60, data="auto", data_dir=None, quick=False
    )
    result, _ = figures_star.compute_runs(args, ("hyperparam",), 100)
    found = result["variants"]["hyperparam"]
    for seed in range(2):
        _, log = figures_star.read_log(swept / f"hyperparam-seed{seed}" / "log.csv")
        assert found["meta_loss"][seed] == pytest.approx(log[-1])
    losses = result["curves"]["inner"]["hyperparam"]
    assert losses.shape == (2, 60)
    mean = losses[1, :20].mean()
    assert found["mean_loss_over_horizon"][1] == pytest.approx(mean)
    build, data = tasks.TASKS["quadratic"].build, {}
    theta, optimizer, _ = store.load_theta(swept / "hyperparam-seed1" / "theta.npz")
    keys = jax.random.split(jax.random.key(comparison.EVALUATION_SEED), 1)
    plain = inner.curves(build, data, optimizer, [theta], keys, 60).losses[0, 0]
    np.testing.assert_allclose(losses[1], plain, rtol=1e-4)


def test_missing_variants_are_named_and_left_out(tmp_path, capsys):
    """A figure is drawn of two variants or more; of fewer there is nothing to compare."""
    for name in ("blackbox-seed0", "star_wd0.5-seed0", "star_wd0.5-seed1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theta.npz").touch()
    found = figures_star.find_runs(tmp_path, figures_star.MAIN)
    assert {name: len(paths) for name, paths in found.items()} == {
        "star_wd0.5": 2,
        "blackbox": 1,
    }
    missing = "has no star_wd0.1-seed0, hyperparam-seed0: left out"
    assert missing in capsys.readouterr().out
    with pytest.raises(store.UserError, match="has no no_nominal-seed0: python sweep"):
        figures_star.find_runs(tmp_path, ("star_wd0.5", "no_nominal"))


def test_runs_that_began_trained_are_labelled(swept, tmp_path):
    """A budget on top of another one is no equal comparison: the figure says so."""
    theta, _, _ = store.load_theta(swept / "hyperparam-seed0" / "theta.npz")
    card = store.read_card(swept / "hyperparam-seed0" / "theta.npz")
    args = argparse.Namespace(
        runs=str(tmp_path), steps=20, data="auto", data_dir=None, quick=False
    )
    labels = []
    for init in (None, "theta.npz"):
        folder = tmp_path / "hyperparam-seed0"
        folder.mkdir(exist_ok=True)
        card["recipe"] |= {"init": init}
        star.save_theta(folder / "theta.npz", theta, card)
        (folder / "log.csv").write_text("step,meta_loss\n1,1\n2,1\n")
        result, _ = figures_star.compute_runs(args, ("hyperparam",), 100)
        labels.append(result["labels"]["hyperparam"])
    assert labels == ["hyperparam", "hyperparam, begun trained"]


def test_shipped_runs_draw_the_same_figure(swept, tmp_path):
    """Thetas and cards as they were; the log's rows are means of ten meta-steps."""
    assert sweep.main([*QUICK, "--out", str(swept), "--ship", str(tmp_path)]) == 0
    for seed in range(2):
        name = f"hyperparam-seed{seed}"
        theta, _, _ = store.load_theta(swept / name / "theta.npz")
        shipped, _, _ = store.load_theta(tmp_path / name / "theta.npz")
        assert shipped == theta
        _, losses = figures_star.read_log(swept / name / "log.csv")
        steps, means = figures_star.read_log(tmp_path / name / "log.csv")
        mean = pytest.approx(losses[:10].mean(), rel=1e-4)
        assert steps.tolist() == [10] and means[0] == mean


def test_missing_runs_are_named(swept, tmp_path, capsys):
    """Figure 3 needs four variants; a folder without one says how to make it."""
    argv = ["3", "--quick", "--out", str(tmp_path), "--runs", str(swept)]
    assert store.run_command("figures", figures.main, argv) == 2
    assert "star_wd0.1" in capsys.readouterr().err
    assert store.run_command("sweep.py", sweep.main, ["--only", "no_such"]) == 2
