"""STAR as an optax transformation under JAX's own transformations, on any tree."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def test_zero_gradients_move_parameters_unless_they_are_frozen():
    """As the README says: the parameter itself is a feature."""
    zeros, parts = jax.tree.map(jnp.zeros_like, PARAMS), {"train": TRANSFORM}
    parts |= {"freeze": optax.set_to_zero()}
    optimizer = optax.partition(parts, {"w": "freeze", "scale": "train"})
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    assert not updates["w"].any() and updates["scale"] != 0


SHARDED = """
import jax, star
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

theta = star.PRESETS["star"].init_theta(jax.random.key(0))
optimizer = star.star(theta)
specs = {(8, 16): P("x"), (16, 8): P("y", "x"), (8, 8): P(("x", "y")), (8,): P("x")}
specs |= {(4, 8, 16): P(None, "x", "y"), (8, 4, 6): P("x", None, "y"), (): P()}
whole = {shape: jax.random.normal(jax.random.key(1), shape) for shape in specs}
expected, plain = jax.jit(optimizer.update)(whole, optimizer.init(whole), whole)
for axis_type in (AxisType.Explicit, AxisType.Auto):
    mesh, traces = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2), []
    put = {shape: NamedSharding(mesh, spec) for shape, spec in specs.items()}
    params = {shape: jax.device_put(x, put[shape]) for shape, x in whole.items()}

    @jax.jit
    def update(grads, state, params):
        traces.append(1)
        return optimizer.update(grads, state, params)

    with jax.set_mesh(mesh):
        state = optimizer.init(params)
        updates, state = update(params, state, params)
        for shape, sharding in put.items():
            tensor = state.tensors[shape]
            for x in (updates[shape], tensor.v2, *tensor.m):
                assert x.sharding.is_equivalent_to(sharding, x.ndim), (axis_type, shape)
            off = abs(jax.device_get(updates[shape]) - expected[shape]).max()
            assert off < 1e-5 * abs(expected[shape]).max()
        update(params, state, params)
        assert len(traces) == 1
    w = params[8, 16]
    optimizer.update(w, optimizer.init(w), w)  # without jit, without a mesh around it
"""


@pytest.mark.heavy
def test_sharded_parameters_keep_their_sharding():
    """On Explicit and Auto axes, of any rank, along an axis or two: the same numbers in one
    compilation. Updates, momenta and mean squares lie where the parameters do."""
    four = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    flags = {"XLA_FLAGS": four}
    root = pathlib.Path(star.__file__).parent
    command, env = [sys.executable, "-c", SHARDED], os.environ | flags
    subprocess.run(command, cwd=root, env=env, check=True)


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
