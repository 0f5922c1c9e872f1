"""Comparisons: a task, a suite, and the figures made of meta-training runs."""

import argparse
import json

import jax
import numpy as np
import pytest

import baselines
import eval as evaluation
import star
import store
from baselines import Curves, curves
from experiments import suite
from figures import __main__ as figures
from figures import star_runs
from tasks import TASKS

STAR = star.PRESETS["star_small_beta3"]


def evaluate(line: str, folder, program=evaluation) -> int:
    """Exit code of the command, whose results are in the folder."""
    argv = [*line.split(), "--out", str(folder)]
    return store.run_command("eval.py", program.main, argv)


def write_theta(path, seed=0, optimizer="star_small_beta3", **card):
    """An untrained theta with a card as train.py would leave it."""
    constants = star.CONSTANTS[optimizer]
    card = {"optimizer": optimizer, "constants": constants._asdict(), **card}
    star.save_theta(path, star.init_theta(jax.random.key(seed), constants), card)
    return path


@pytest.fixture
def theta(tmp_path):
    return write_theta(tmp_path / "small.npz", task="quadratic")


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """tuned.json holds settings of Adam and NAdamW for `quadratic`."""
    schedule = {"learning_rate": 0.1, "constant": 0.5, "steps": 200.0}
    found = [
        {"optimizer": "adam", "steps": 200, "theta": {"learning_rate": 0.03}},
        {"optimizer": "adam", "steps": 50, "theta": {"learning_rate": 0.3}},
        {"optimizer": "nadamw", "steps": 200, "theta": schedule},
    ]
    same = {"task": "quadratic", "dataset_checksum": "", "loss": 1.0}
    (tmp_path / "tuned.json").write_text(json.dumps([same | one for one in found]))
    monkeypatch.setattr(evaluation, "TUNED", tmp_path / "tuned.json")


# --- one task
@pytest.mark.heavy
def test_eval_writes_its_comparison(use_stand_in, theta, tmp_path, capsys):
    """Curves, table, JSON and picture. Log, table and JSON name the stand-in. Momentum, not
    tuned for it, has the best of eleven learning rates."""
    out, line = tmp_path / "out", "--task fmnist_small --steps 40 --seeds 2"
    assert evaluate(f"{line} --baselines sgdm --theta {theta}", out) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"results.json", "table.csv", "curves.csv", "curves.png"}
    results = json.loads((out / "results.json").read_text())
    log = capsys.readouterr().out
    assert results["stand_in"] and "stand-in" in results["dataset"]
    assert "stand-in" in (out / "table.csv").read_text() and "stand-in" in log
    assert "sgdm is not tuned for these data" in log
    drawn = np.loadtxt(out / "curves.csv", delimiter=",", skiprows=1)
    assert drawn.shape == (40, 1 + 2 * 2)
    ours, sgdm = (entry["row"] for entry in results["entries"])
    assert ours["mean_loss"] == pytest.approx(drawn[:, 1:3].mean(), rel=1e-3)
    ratio = ours["final_loss"] / sgdm["final_loss"]
    assert ours["final_over_sgdm"] == pytest.approx(ratio)


def setting(name, steps, checksum=""):
    """What `quadratic` has of data of this checksum: (settings, optimizer, theta)."""
    about, build = {"dataset_checksum": checksum}, TASKS["quadratic"].build
    return evaluation.baseline(name, "quadratic", steps, build, {}, about)


def test_shipped_settings_are_used_and_stretched(tuned):
    """Those of runs as long, else of the longest. A schedule ends with the run."""
    assert setting("adam", 50)[0]["name"] == "adam 0.3"
    assert setting("adam", 70)[0]["name"] == "adam 0.03"
    settings, _, theta = setting("nadamw", 50)
    assert theta["steps"] == 50 and theta["constant"] == 0.5
    assert settings["name"] == "nadamw" and settings["tuned"]["steps"] == 200


def test_search_for_a_rate_takes_nan_as_the_worst(tuned, monkeypatch):
    """It prefers any finite loss to one that is nan in the end or on the way."""
    losses = np.full((11, 1, 20), 3.0)
    losses[[4, 5], 0, [3, 19]], losses[4:6, 0, 5:19], losses[7] = np.nan, 1, 2
    monkeypatch.setattr(evaluation, "curves", lambda *args: Curves(losses, {}, 1.0))
    settings, _, theta = setting("adam", 20, "another")
    assert theta["learning_rate"] == np.float32(evaluation.LEARNING_RATES[7])
    assert settings["tuned"]["loss"] == 2


@pytest.mark.parametrize("best", [3e-5, 3e-3, 3e-2])
def test_a_rate_is_best_only_between_worse_ones(best):
    """The search of a card's Adam goes on where its best rate is at an edge."""
    tried = []

    def losses_of(rates):
        tried.extend(rates)
        return [abs(np.log(rate / best)) for rate in rates]

    assert baselines.best_rate(losses_of) == (best, 0)
    assert min(tried) < best < max(tried) and len(tried) == len(set(tried)) <= 7


def test_divergence_is_counted_not_averaged():
    """nan, inf, or an end above the start count as diverged. The mean is of the rest."""
    losses = np.ones((4, 400)) * np.linspace(2, 1, 400)
    losses[1, 200] = np.nan
    losses[2] = losses[2, ::-1]
    losses[3, 399] = np.inf
    row = evaluation.row(Curves(losses[None], {"acc": np.arange(4.0)[None]}, 1.0))
    assert row["diverged"] == "3/4" and row["acc"] == 0.0
    assert row["mean_loss"] == pytest.approx(1.5)


def test_the_best_theta_is_the_tasks_own(monkeypatch, tmp_path):
    """The lowest loss on the cards for the task, else the lowest for fmnist."""
    cards = {"a": ("fmnist", 0.3), "b": ("fmnist", 0.2), "c": ("quadratic", 0.9)}
    for name, (task, loss) in cards.items():
        write_theta(tmp_path / f"star_{name}.npz", task=task, fresh_loss=loss)
    monkeypatch.setattr(evaluation, "WEIGHTS", tmp_path)
    for task, best in (("fmnist", "b"), ("quadratic", "c"), ("cifar10_conv", "b")):
        assert evaluation.best_theta(task).stem == f"star_{best}"


BAD = """\
--task no_such
--baselines adam,no_such
--steps 0
--seeds x
--theta no_such.npz
--theta README.md
--data-dir /no_such --data real"""


@pytest.mark.parametrize("line", BAD.splitlines())
def test_bad_arguments_are_one_line_and_exit_code_2(line, tmp_path, capsys):
    """And leave no results."""
    assert evaluate(f"--seeds 1 --steps 2 {line}", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


# --- suites
def test_results_are_read_back(tuned, theta, tmp_path, capsys):
    """A finished task is read for the same arguments, to the digits of its file."""
    args = argparse.Namespace(steps=30, seeds=2, baselines=["adam"])
    args.data = args.data_dir = None  # the task draws its own
    asked = ["quadratic"], args, [theta], tmp_path
    (found,) = suite.on_tasks(*asked).values()
    (again,) = suite.on_tasks(*asked).values()
    assert "quadratic: done before" in capsys.readouterr().out
    assert found[1] == again[1]
    for one, other in zip(found[0], again[0], strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)
        assert (one.row, one.settings) == (other.row, other.settings)
    write_theta(theta, seed=1)  # another theta in the same file
    (other,) = suite.on_tasks(*asked).values()
    assert (other[0][0].losses != found[0][0].losses).any()


@pytest.mark.heavy
def test_a_suite_is_drawn_and_resumes(tuned, theta, tmp_path, monkeypatch, capsys):
    """A folder a task, one table, an overview. The same command goes on with the task in
    which it was interrupted, and leaves the finished one as it is."""
    names, out = ("quadratic", "rosenbrock"), tmp_path / "out"
    monkeypatch.setitem(suite.SUITES, "small", names)
    line = f"--task small --steps 20 --seeds 1 --baselines adam --theta {theta}"
    ran, compare = [], evaluation.compare

    def stop(task, *args):
        ran.append(task)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return compare(task, *args)

    monkeypatch.setattr(evaluation, "compare", stop)
    assert evaluate(line, out, suite) == 130
    assert evaluate(line, out, suite) == 0
    assert ran == ["quadratic", "rosenbrock", "rosenbrock"]
    files = {path.name for path in out.iterdir()}
    assert files == {*names, "results.json", "table.csv", "overview.png"}
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 4
    assert "below adam" in capsys.readouterr().out


def test_suite_takes_any_task_of_the_catalogue(tuned, tmp_path):
    """Whatever its name, with a theta of weights/."""
    line = "--task rosenbrock --steps 5 --seeds 1 --baselines"
    assert evaluate(f"{line} adam", tmp_path, suite) == 0
    assert (tmp_path / "curves.png").exists()
    assert evaluate(f"{line} adam", tmp_path, evaluation) == 2


def test_summary_leaves_out_what_diverged():
    """Geometric means over the tasks where a ratio is known. Diverged tasks count."""

    def row(task, final, diverged="0/1"):
        row = {"task": task, "optimizer": "x", "diverged": diverged}
        return row | {"final_loss": final, "final_over_adam": final}

    table = [row("a", 0.5), row("b", 2.0), row("c", None, "1/1")]
    (found,) = suite.summary(table)
    assert found["tasks"] == "3" and found["diverged on"] == "1"
    assert found["final over adam"] == pytest.approx(1) and found["below adam"] == "1/2"


# --- figures
def test_a_legend_has_words_and_every_optimizer_its_color(tuned, theta):
    """STAR with its decay, Adam with its rate, NAdamW tuned. Whatever else a label says,
    the color is the optimizer's, and no two variants of figure 3 share one."""
    card = {"optimizer": "star_small_beta3", "recipe": {"weight_decay": 0.5}}
    assert baselines.words_of(card) == "STAR, decay 0.5"
    assert evaluation.trained(theta)[0]["label"] == "STAR"
    labels = [setting(name, 200)[0]["label"] for name in ("adam", "nadamw")]
    assert labels == ["Adam 3e-2", "NAdamW, tuned"]
    colors = [baselines.color_of(f"{x}, begun trained") for x in baselines.COLORS if x]
    assert colors == [c for x, c in baselines.COLORS.items() if x]
    assert len({baselines.COLORS[x] for x in star_runs.LABELS.values()}) == 9


# --- figures 3 and App. 1-4
def write_run(root, variant, seed=0, **changes):
    """A finished run of train.py: theta, card and log."""
    folder = root / f"{variant}-seed{seed}"
    folder.mkdir(parents=True)
    recipe = {"horizon": 20, "init": None, "estimator": "pes"} | changes
    write_theta(folder / "theta.npz", seed, task="quadratic", recipe=recipe)
    rows = [(step, 10.0 + seed - step / 20) for step in range(1, 21)]
    store.write_csv(folder / "log.csv", ["step", "meta_loss"], rows)


def runs_of(root, variants, steps=60):
    args = argparse.Namespace(runs=str(root), steps=steps, data="auto", data_dir=None)
    return star_runs.compute_runs(args, variants, 100)


def test_runs_of_a_sweep_are_summed_up(tmp_path):
    """Meta-losses are those of the logs, and inner losses those of the thetas."""
    for seed in range(2):
        write_run(tmp_path, "star_wd0.5", seed)
    result, _ = runs_of(tmp_path, ("star_wd0.5",))
    found = result["variants"]["star_wd0.5"]
    np.testing.assert_allclose(found["meta_loss"], [9.025, 10.025])
    losses = result["curves"]["inner"]["star_wd0.5"]
    keys = jax.random.split(jax.random.key(evaluation.EVALUATION_SEED), 1)
    thetas = [star.init_theta(jax.random.key(seed), star.PAPER) for seed in range(2)]
    plain = curves(TASKS["quadratic"].build, {}, STAR, thetas, keys, 60).losses[:, 0]
    np.testing.assert_allclose(losses, plain, rtol=1e-4)
    np.testing.assert_allclose(found["mean_loss_over_horizon"], losses[:, :20].mean(1))


def test_missing_variants_are_named_and_left_out(tmp_path, capsys):
    """A figure is drawn of two variants or more. Fewer leave nothing to compare."""
    for variant, seed in (("blackbox", 0), ("star_wd0.5", 0), ("star_wd0.5", 1)):
        write_run(tmp_path, variant, seed)
    found = star_runs.find_runs(tmp_path, star_runs.MAIN)
    assert {k: len(v) for k, v in found.items()} == {"star_wd0.5": 2, "blackbox": 1}
    missing = "has no star_wd0.1-seed0, hyperparam-seed0: left out"
    assert missing in capsys.readouterr().out
    line = f"app4 --quick --out {tmp_path / 'out'} --runs {tmp_path}"
    assert store.run_command("figures", figures.main, line.split()) == 2
    said = capsys.readouterr().err
    assert "has no no_nominal-seed0: python -m experiments.sweep" in said


@pytest.mark.parametrize("changes", [{"estimator": "es"}, {"horizon": 40}])
def test_runs_of_different_recipes_are_not_mixed(changes, tmp_path):
    """One figure compares what had the same budget and estimator."""
    write_run(tmp_path, "star_wd0.5")
    write_run(tmp_path, "star_wd0.1", **changes)
    with pytest.raises(store.UserError, match=f"runs differ in {list(changes)[0]}"):
        runs_of(tmp_path, ("star_wd0.1", "star_wd0.5"))


def test_runs_that_began_trained_are_labelled(tmp_path):
    """A budget on top of another one is no equal comparison: the figure says so."""
    write_run(tmp_path, "star_wd0.5")
    write_run(tmp_path, "star_wd0.1", init="theta.npz")
    result, _ = runs_of(tmp_path, ("star_wd0.5", "star_wd0.1"), steps=20)
    labels = ["STAR, decay 0.5", "STAR, decay 0.1, begun trained"]
    assert list(result["labels"].values()) == labels


def test_thetas_of_one_label_are_one_band():
    """Three runs of STAR, of two thetas, and one of Adam at whatever rate."""

    def entry(optimizer, label, *losses):
        settings = {"optimizer": optimizer, "label": label}
        row = {"optimizer": optimizer}
        return evaluation.Entry(settings, row, np.array(losses)[:, None])

    entries = [
        entry("star (a)", "STAR", 1.0, 2.0),
        entry("adam", "Adam 3e-3", 4.0),
        entry("star (b)", "STAR", 3.0),
    ]
    star, adam = suite.by_label(entries)
    assert star.losses.tolist() == [[1.0], [2.0], [3.0]]
    assert adam.settings["label"] == "Adam" and adam.losses.tolist() == [[4.0]]
