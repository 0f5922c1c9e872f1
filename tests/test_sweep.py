"""Sweeps: what is run, resumed, skipped, refused and shipped."""

import jax
import numpy as np
import pytest

import star
import store
import train
from experiments import sweep
from experiments.catalogue import TASKS

QUICK = (
    "--task quadratic --steps 12 --horizon 20 --truncation 5 --particles 2 "
    "--seeds 2 --only hyperparam"
).split()


def sweep_into(folder, line=""):
    argv = [*QUICK, "--out", str(folder), *line.split()]
    return store.run_command("sweep.py", sweep.main, argv)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One variant, two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    assert sweep_into(folder) == 0
    return folder


def theta_and_card(folder):
    path = folder / "theta.npz"
    return star.load_theta(path)[0], store.read_card(path)


def assert_same(theta, other):
    for x, y in zip(jax.tree.leaves(theta), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_sweep_takes_a_preset():
    """And other flags, which reach every variant."""
    for line, *changed in (
        ("", "doubling", "value", 4),
        ("--preset small --particles 2", "log-uniform", "norm", 2),
    ):
        _, rest = sweep.parse(line.split())
        recipe = train.parse([*rest, *sweep.VARIANTS["star_wd0.5"]])
        assert recipe.estimator == "noise_reuse" and recipe.weight_decay == 0.5
        assert [recipe.horizons, recipe.clip_by, recipe.particles] == changed


def test_every_variant_is_a_recipe():
    """Eight, and the ablation without a nominal term keeps STAR's beta3."""
    _, rest = sweep.parse([])
    recipes = {k: train.parse([*rest, *v]) for k, v in sweep.VARIANTS.items()}
    assert len({(r.optimizer, r.weight_decay) for r in recipes.values()}) == 8
    assert recipes["no_nominal"].beta3 == star.CONSTANTS["star_small_beta3"].beta3


def test_a_sweep_skips_what_is_finished_and_resumes(swept, capsys):
    """The same command again runs nothing but what a run without its end still lacks."""
    folder = swept / "hyperparam-seed1"
    theta, card = theta_and_card(folder)
    fresh = card.pop("fresh_loss")
    star.save_theta(folder / "theta.npz", theta, card)
    assert sweep_into(swept) == 0
    assert capsys.readouterr().out.count("finished before") == 1
    after, card = theta_and_card(folder)
    assert card["fresh_loss"] == fresh
    assert_same(after, theta)


def test_a_sweep_of_another_recipe_is_refused(swept, capsys):
    """Finished runs are not taken for those of other flags."""
    for line, said in (
        ("--sigma 0.5", "--sigma 0.02, not 0.5"),
        ("--init x", "--init"),
    ):
        assert sweep_into(swept, line) == 2
        assert f"made with {said}" in capsys.readouterr().err
    assert sweep_into(swept, "--only no_such") == 2


def test_an_interrupted_sweep_with_init_goes_on(swept, tmp_path, monkeypatch):
    """The same command resumes a run that began from a trained theta."""
    theta = swept / "hyperparam-seed0" / "theta.npz"
    line = f"--seeds 1 --checkpoint-every 5 --init {theta} --fresh-meta"
    saved, save = [], store.save_run

    def stop(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:  # meta-step 5
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "save_run", stop)
    assert sweep_into(tmp_path, line) == 130
    assert sweep_into(tmp_path, line) == 0
    _, card = theta_and_card(tmp_path / "hyperparam-seed0")
    assert card["recipe"]["init"] == str(theta) and card["meta_steps"] == 12
    assert sweep_into(tmp_path, line) == 0  # finished: the same recipe


def test_shipped_runs_are_as_they_were(swept, tmp_path):
    """Theta and card without the machine's paths. Rows of the log are means of ten."""
    assert sweep_into(swept, f"--ship {tmp_path}") == 0
    for name in ("hyperparam-seed0", "hyperparam-seed1"):
        theta, card = theta_and_card(swept / name)
        shipped, its_card = theta_and_card(tmp_path / name)
        assert_same(shipped, theta)
        card["recipe"] |= {"out": None, "data_dir": None}
        assert its_card == card
        losses = np.array(store.read_csv(swept / name / "log.csv", 12))[:, 1]
        ((step, mean),) = store.read_csv(tmp_path / name / "log.csv", 12)
        assert step == 10 and mean == pytest.approx(losses[:10].mean(), rel=1e-4)


def test_nominal_terms_are_run_by_name_alone():
    """Each with a beta1 of its own, in what is trained and on the card."""
    assert not {*sweep.parse([])[0].only} & sweep.TERMS.keys()
    for name, flags in sweep.TERMS.items():
        recipe = train.parse(["--task", "quadratic", *flags], sweep.Recipe, TASKS)
        constants = train.parts(recipe, TASKS["quadratic"].build).constants
        assert f"nominal_{constants['nominal']}" == name
        assert constants["beta1"] == sweep.BETA1[constants["nominal"]]
        assert f"--nominal={constants['nominal']}" in store.command_line(recipe)


def test_the_two_floors_are_flags():
    argv = "--task quadratic --nominal-eps 1e-8 --rms-eps 1e-10".split()
    recipe = train.parse(argv, sweep.Recipe, TASKS)
    found = train.parts(recipe, TASKS["quadratic"].build).constants
    assert (found["nominal_eps"], found["rms_eps"]) == (1e-8, 1e-10)
