"""One inner training run: a task times an optimizer, with nothing of meta-training in it.

`star.LearnedOptimizer` is the common interface; hand-designed optimizers are wrapped into
it by `baselines.py`, with their learning rate as theta.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import estimators
from estimators import sequential
from store import UserError

OBJECTIVES = {"train": None, "fresh": "train", "valid": "valid"}  # name -> split drawn


class Carry(NamedTuple):
    params: Any
    optimizer: Any  # the optimizer's state
    member: jax.Array  # (2,) uint32, data of the key that drew the task from its family


class Curves(NamedTuple):
    # (..., steps / every) training loss of each batch before its update, nats; the means
    # of `every` steps
    losses: np.ndarray
    test: dict[str, np.ndarray]  # name -> (...,), after the last step
    seconds: float  # wall time of all runs together, without compilation


def inner_training(
    build: Callable, optimizer: Any, objective: str = "train"
) -> tuple[Callable, Callable]:
    """(fresh, step): fresh: key -> Carry; step: (theta, carry, key) -> (carry, loss ()).

    build: key -> Task; a family of tasks draws its member by the key, others ignore it.
    objective: which loss the step reports. "train": of the training batch at the parameters
    before their update, which costs nothing, as the authors' code has it; "fresh": of a
    second training batch after the update, equation 3 of the paper; "valid": the same on a
    batch of the validation split (Metz et al. 2019, L_valid).
    """
    split = OBJECTIVES[objective]

    def fresh(key):
        params = build(key).init(key)
        return Carry(params, optimizer.init(params), jax.random.key_data(key))

    def step(theta, carry, key):
        task = build(jax.random.wrap_key_data(carry.member))
        batch_key, loss_key, outer_batch_key, outer_loss_key = jax.random.split(key, 4)
        batch = task.batch(batch_key, "train")
        loss, grads = jax.value_and_grad(task.loss)(carry.params, loss_key, batch)
        updates, state = optimizer.update(theta, grads, carry.optimizer, carry.params)
        params = jax.tree.map(lambda p, u: p + u, carry.params, updates)
        if split is not None:
            batch = task.batch(outer_batch_key, split)
            loss = task.loss(params, outer_loss_key, batch)
        return carry._replace(params=params, optimizer=state), loss

    return fresh, step


def inner_unroll(
    build: Callable, optimizer: Any, length: int, objective: str = "train"
) -> estimators.Unroll:
    """Windows of `length` inner steps of the training, their losses clipped at the task's
    limit."""
    fresh, step = inner_training(build, optimizer, objective)
    limit = build(jax.random.key(0)).loss_limit
    return estimators.unroll(fresh, step, length, limit)


def ema(values: Any, decay: float) -> np.ndarray:
    """Running mean of a curve along its last axis, bias-corrected, as in the figures."""
    values = np.asarray(values, np.float64)
    out, mean = np.empty_like(values), 0.0
    for t in range(values.shape[-1]):
        mean = decay * mean + (1 - decay) * values[..., t]
        out[..., t] = mean / (1 - decay ** (t + 1))
    return out


def compiler_options() -> dict:
    """For `jax.jit`: on a CPU, vectors as wide as AVX-512 has them (ignored elsewhere).

    XLA's default of 256 bits costs a fifth of the inner steps per second where 512 exist.
    """
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_cpu_prefer_vector_width": "512"} if on_cpu else {}


def batching() -> Callable:
    """vmap for an accelerator; one run after the other on a CPU, which keeps its caches."""
    return sequential if jax.default_backend() == "cpu" else jax.vmap


def thinning(steps: int, points: int = 4000) -> int:
    """How many steps to average so that at most `points` means cover them: a divisor.

    Raises UserError where no divisor leaves about half as many.
    """
    least = -(-steps // points)
    for every in range(least, 2 * least):
        if steps % every == 0:
            return every
    raise UserError(
        f"{steps} steps do not part into equal blocks: take a rounder number"
    )


def curves(
    build: Callable,
    data: Any,
    optimizer: Any,
    thetas: list,
    keys: jax.Array,
    steps: int,
    chunk: int = 500,
    every: int = 1,
    report: Callable | None = None,
) -> Curves:
    """Train `thetas` x `keys` from scratch: losses (thetas, seeds, steps / every).

    build: (data, key) -> Task. thetas: a list. keys: (seeds,), the same for every theta,
    so that all see the same batches. The losses leave the device after about `chunk` steps,
    as means of `every` (a divisor of steps); then report(steps done), if given, is called.
    """
    chunk = every * max(1, chunk // every)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *thetas)
    batch = batching()

    def start(data, keys):
        fresh, _ = inner_training(partial(build, data), optimizer)
        return jax.vmap(fresh)(keys)

    def advance(data, theta, carry, keys, first, length):
        _, step = inner_training(partial(build, data), optimizer)

        def run(theta, carry, key):
            def one(carry, t):
                return step(theta, carry, jax.random.fold_in(key, t))

            carry, losses = jax.lax.scan(one, carry, first + jnp.arange(length))
            return carry, losses.reshape(-1, every).mean(1)

        return batch(run)(theta, carry, keys)

    def finish(data, carry):
        def test(carry):
            member = jax.random.wrap_key_data(carry.member)
            return build(data, member).evaluate(carry.params)

        return batch(test)(carry)

    n_thetas, n_seeds = len(thetas), len(keys)
    theta_of_run = jax.tree.map(lambda x: jnp.repeat(x, n_seeds, 0), stacked)
    init_keys, run_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    init_keys, run_keys = (jnp.tile(k, n_thetas) for k in (init_keys, run_keys))
    options = compiler_options()
    carry = jax.jit(start, compiler_options=options)(data, init_keys)
    step_chunk = jax.jit(
        advance, static_argnums=5, donate_argnums=2, compiler_options=options
    )
    losses, seconds, compiled = [], 0.0, {}
    for first in range(0, steps, chunk):
        length = min(chunk, steps - first)
        args = (data, theta_of_run, carry, run_keys, jnp.int32(first))
        if length not in compiled:  # at most twice, and outside of the clock
            compiled[length] = step_chunk.lower(*args, length).compile()
        begin = time.perf_counter()
        carry, loss = compiled[length](*args)
        losses.append(np.asarray(loss))
        seconds += time.perf_counter() - begin
        if report is not None:
            report(first + length)
    test = jax.jit(finish, compiler_options=options)(data, carry)
    return Curves(
        losses=np.concatenate(losses, 1).reshape(n_thetas, n_seeds, steps // every),
        test={k: np.asarray(v).reshape(n_thetas, n_seeds) for k, v in test.items()},
        seconds=seconds,
    )
