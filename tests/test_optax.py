"""STAR as an optax transformation under JAX's own transformations, on any tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import star

PARAMS = {"w": jnp.ones((8, 4)), "scale": jnp.float32(2.0)}
GRADS = {"w": 0.1 * jnp.cos(jnp.arange(32.0)).reshape(8, 4), "scale": jnp.float32(0.3)}
TRANSFORM = star.star(star.PRESETS["star"].init_theta(jax.random.key(0)))
update = jax.jit(TRANSFORM.update)


@pytest.fixture(scope="module")
def loop():
    """[(updates, state)] of three updates in a Python loop."""
    state, out = TRANSFORM.init(PARAMS), []
    for _ in range(3):
        updates, state = update(GRADS, state, PARAMS)
        out.append((updates, state))
    return out


def assert_close(found, expected):
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)


def test_scan_equals_the_loop(loop):
    """The state is a carry of scan: same structure, shapes and dtypes."""

    def step(state, _):
        return TRANSFORM.update(GRADS, state, PARAMS)[::-1]

    state, updates = jax.lax.scan(step, TRANSFORM.init(PARAMS), None, length=3)
    assert_close((jax.tree.map(lambda x: x[-1], updates), state), loop[-1])


def test_vmap_equals_one_after_the_other(loop):
    """An ensemble: each member is normalized by its own tensors."""
    grads = jax.tree.map(lambda g: jnp.stack([g, 3 * g]), GRADS)
    states = jax.vmap(lambda _: TRANSFORM.init(PARAMS))(jnp.arange(2))
    ensemble = jax.vmap(TRANSFORM.update, in_axes=(0, 0, None))
    found = jax.jit(ensemble)(grads, states, PARAMS)
    assert_close(jax.tree.map(lambda x: x[0], found), loop[0])
    tripled = jax.tree.map(lambda g: g[1], grads)
    alone = update(tripled, TRANSFORM.init(PARAMS), PARAMS)
    assert_close(jax.tree.map(lambda x: x[1], found), alone)


def test_donated_state_is_updated_in_place(loop):
    """Every buffer of the state has one of the same shape to go to."""
    step = jax.jit(TRANSFORM.update, donate_argnums=1)
    state = first = TRANSFORM.init(PARAMS)
    for _ in range(3):
        updates, state = step(GRADS, state, PARAMS)
    assert_close((updates, state), loop[-1])
    assert all(x.is_deleted() for x in jax.tree.leaves(first))


def test_eval_shape_tells_the_state_without_arrays():
    """For checkpoints and sharding plans of parameters that no memory holds."""
    huge = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)}
    state = jax.eval_shape(TRANSFORM.init, huge)
    assert state.tensors["w"].v2.shape == (10**6, 10**6)
    assert state.tensors["w"].row.shape == (3, 10**6, 1)
    updates, _ = jax.eval_shape(TRANSFORM.update, huge, state, huge)
    assert (updates["w"].shape, updates["w"].dtype) == ((10**6, 10**6), jnp.bfloat16)


def test_sharded_parameters_keep_their_sharding(loop):
    """The same numbers; updates, momenta and mean squares lie where the parameters do."""
    mesh = jax.make_mesh((1,), ("data",))
    put = {"w": NamedSharding(mesh, P("data")), "scale": NamedSharding(mesh, P())}
    params, grads = jax.device_put(PARAMS, put), jax.device_put(GRADS, put)
    updates, state = update(grads, TRANSFORM.init(params), params)
    assert_close((updates, state), loop[0])
    for name, sharding in put.items():
        tensors = state.tensors[name]
        for x in (updates[name], tensors.v2, *tensors.m):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize(
    "params",
    [
        jnp.ones(()),
        {"a": jnp.ones(3), "frozen": None},
        (jnp.ones(3), [jnp.ones(()), {}]),
        {"nothing in it": jnp.ones((0, 3)), "some": jnp.ones(2)},
    ],
)
def test_trees_of_any_kind(params):
    """A bare scalar, None for what is not trained, tuples, an empty tensor."""
    updates, _ = TRANSFORM.update(params, TRANSFORM.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    changed = optax.apply_updates(params, updates)
    for x, y in zip(*map(jax.tree.leaves, (changed, params)), strict=True):
        assert x.shape == y.shape and np.isfinite(x).all() and (x != y).all()
