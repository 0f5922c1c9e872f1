"""What bounds beta3, and that trained thetas keep to the bound."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import star
from experiments import beta3, search
from tasks import TASKS


def test_a_blackbox_step_moves_the_logits_as_measured(stand_ins, monkeypatch):
    """The measured slope is the change of the logits under a small step."""
    for name, images in stand_ins.items():
        monkeypatch.setattr(f"data.{name}", lambda *args, images=images: images)
    data, _ = TASKS["fmnist_small"].load()
    task, key = TASKS["fmnist_small"].build(data, jax.random.key(0)), jax.random.key(1)
    theta = star.init_theta(key, star.PAPER)
    params, state, grads = beta3.after_nominal_steps(task, theta, key)
    _, f_b = beta3.blackbox_step(theta, params, state, grads)
    images, _ = task.batch(key, "train")
    moved = beta3.logits_moved("fmnist_small", params, f_b, images)
    leaves, tree = jax.tree.flatten(params)
    after = tree.unflatten([p - 1e-7 * f for p, f in zip(leaves, f_b, strict=True)])
    apply = beta3.NETWORKS["fmnist_small"].apply
    change = apply(after, key, images) - apply(params, key, images)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(change**2)) / 1e-7, moved, rtol=0.05)


@pytest.mark.parametrize("name", beta3.TRAINED)
def test_thetas_train_where_a_step_hardly_moves_the_logits(name):
    """All of them up to 0.2 logits, none of them from 10 on."""
    measured = json.loads((beta3.RESULTS / "beta3.json").read_text())[name]
    values, losses = beta3.trained(name)
    logits = values * measured["logits"][1]
    low, high = beta3.BAND
    assert (losses[logits <= low] < 1).all() and (losses[logits >= high] > 2).all()
    assert (logits <= low).sum() >= 2 and (logits >= high).any()


def test_the_floor_is_that_of_the_nominal_step_alone():
    """Its own eps moves f_g; the features and the blackbox step do not see it."""
    theta = star.init_theta(jax.random.key(0), star.PAPER)
    params, grads = jnp.ones(3), jnp.array([1e-6, 1e-3, 1.0])
    found = {}
    for eps in (1e-6, 1e-12):
        both = star.learned_optimizer(star.PAPER._replace(nominal_eps=eps))
        without = star.learned_optimizer(
            star.PAPER._replace(beta1=0.0, nominal_eps=eps)
        )
        for name, optimizer in ("both", both), ("blackbox", without):
            state = optimizer.init(params)
            found[name, eps], _ = optimizer.update(theta, grads, state, params)
    np.testing.assert_array_equal(found["blackbox", 1e-6], found["blackbox", 1e-12])
    nominal = [found["both", eps] - found["blackbox", eps] for eps in (1e-6, 1e-12)]
    assert abs(nominal[1][0]) > 10 * abs(nominal[0][0])
    np.testing.assert_allclose(nominal[0][2], nominal[1][2], rtol=1e-3)
    theta |= {"beta3": jnp.float32(0), "nominal_eps": jnp.float32(1e-12)}
    alone, _ = search.varied("star").update(theta, grads, both.init(params), params)
    np.testing.assert_allclose(alone, nominal[1], rtol=1e-3)
