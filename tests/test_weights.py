"""Every theta that comes with the repository: whole, with a card, better than none."""

import json
import pathlib
from functools import partial

import jax
import numpy as np
import pytest

import inner
from store import load_theta, read_card
from tasks import TASKS

WEIGHTS = pathlib.Path(__file__).resolve().parent.parent / "weights"
SHIPPED = sorted(WEIGHTS.rglob("*.npz"))
SAYS = ("task", "dataset", "dataset_checksum", "seed", "meta_steps", "inner_steps")
SAYS += ("minutes", "machine", "command", "recipe", "fresh_loss", "untrained_loss")
# Meta-training found a rule that stands still, at ln 10, a guess's loss (results.md).
STUCK = {
    "fig3/blackbox-seed0/theta.npz": np.log(10),
    "fig3_log_uniform/blackbox-seed0/theta.npz": np.log(10),
    "fig3_fmnist/no_nominal-seed0/theta.npz": np.log(10),
    "fig3_cifar10_conv_small/blackbox-seed0/theta.npz": np.log(10),
}

BATCH_SIZE = {"cifar10_conv_16x16": 16}  # of 64: a network that takes its time


def name_of(path) -> str:
    return str(path.relative_to(WEIGHTS))


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_shipped_theta_is_whole(path):
    """Shapes of the optimizer it names, finite numbers, a few KB, a card that tells how it
    was made; the card beside it is the one within."""
    theta, optimizer, _ = load_theta(path)
    expected = jax.eval_shape(optimizer.init_theta, jax.random.key(0))
    assert jax.tree.structure(theta) == jax.tree.structure(expected)
    for found, wanted in zip(*map(jax.tree.leaves, (theta, expected)), strict=True):
        assert found.shape == wanted.shape and np.isfinite(found).all()
    assert path.stat().st_size < 64 * 1024
    card = read_card(path)
    assert not [key for key in SAYS if key not in card]
    assert card["command"].startswith("python train.py ") and not card["stand_in"]
    assert card["fresh_loss"] < card["untrained_loss"]
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside == json.loads(json.dumps(card))


def groups() -> dict[tuple[str, str], list]:
    """{(task, optimizer): paths}: what trains in one program."""
    found = {}
    for path in SHIPPED:
        card = read_card(path)
        found.setdefault((card["task"], card["optimizer"]), []).append(path)
    return found


@pytest.mark.heavy
@pytest.mark.parametrize(("task", "name"), groups())
def test_shipped_theta_beats_the_untrained_one(task, name):
    """Mean loss of 200 steps on the stand-in data, one fresh seed."""
    spec, paths = TASKS[task], groups()[task, name]
    data, _ = spec.load("stand-in", None)
    trained = [load_theta(path) for path in paths]
    optimizer = trained[0].optimizer
    thetas = [optimizer.init_theta(jax.random.key(1)), *(x.theta for x in trained)]
    keys = jax.random.split(jax.random.key(7), 1)
    smaller = {"batch_size": BATCH_SIZE[task]} if task in BATCH_SIZE else {}
    build = partial(spec.build, **smaller)
    found = inner.curves(build, data, optimizer, thetas, keys, 200)
    losses = np.minimum(np.nan_to_num(found.losses, nan=np.inf), 1e6).mean((1, 2))
    assert np.isfinite(found.losses[1:]).all()
    for path, loss in zip(paths, losses[1:], strict=True):
        if name_of(path) in STUCK:
            assert loss == pytest.approx(STUCK[name_of(path)], rel=0.01)
        else:
            assert loss < losses[0], path
