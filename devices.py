"""Many devices: the particles of a run split over them, theta on each of them.

Devices, of one process or of several, stand in one row, a mesh with a single axis. Each
runs its share of the particles on its own; then one collective makes the meta-gradient,
and all take the same step of the meta-optimizer. What a particle does depends on its key,
never on its device: the same run on more devices differs by rounding alone.
"""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import estimators
from store import UserError

AXIS = "particles"
SPLIT, WHOLE = P(AXIS), P()


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int,
) -> None:
    """Meet the other processes (None: as SLURM, Kubernetes or the environment say).

    Call before anything else of JAX. Only process 0 prints. A process without a sign of
    life for `timeout` seconds is lost, and the runtime ends all others.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--distributed finds no other processes: {reason}") from None
    if jax.process_index() != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def one_line_if_lost(line: str) -> Iterator[None]:
    """Where the run ends because another process is lost: the line on stderr, not a trace.

    Either a collective fails, here: exit code 1. Or the runtime aborts this process from a
    thread of its own, where nothing can be caught: a shell that waits for its end tells.
    """
    if jax.process_count() == 1:
        yield
        return
    wait = ["sh", "-c", 'read line || echo "$0" >&2', line]
    teller = subprocess.Popen(wait, stdin=subprocess.PIPE, start_new_session=True)
    with teller:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if re.match("[A-Z_]+: ", str(error)):  # a status of the runtime's
                teller.stdin.close()
                teller.wait()
                os._exit(1)  # an orderly end would wait for those that are gone
            raise
        finally:
            with contextlib.suppress(OSError):
                teller.stdin.write(b"\n")


def stop_after(step: int, interrupted: bool) -> bool:
    """Whether all processes stop after this step, the same for all of them.

    A process that is interrupted tells the runtime by the signal with which a cluster ends
    its jobs, and the runtime settles on a step that none has passed.
    """
    if jax.process_count() == 1:
        return interrupted
    if interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(step)


def leave() -> None:
    """Part from the other processes; what follows is of this one alone."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL
        )  # no longer for the runtime to tell


def mesh_of(per_process: int) -> Mesh | None:
    """The first devices of every process in a row; None where that is a single one."""
    if per_process * jax.process_count() == 1:
        return None
    row = []
    for process in range(jax.process_count()):
        devices = [d for d in jax.devices() if d.process_index == process]
        if len(devices) < per_process:
            raise UserError(
                f"--devices {per_process}: process {process} has {len(devices)} of "
                f"kind {devices[0].platform}"
            )
        row += devices[:per_process]
    return Mesh(np.array(row), (AXIS,))


def place(tree: Any, mesh: Mesh | None, spec: P = WHOLE) -> Any:
    """The tree on the mesh: SPLIT along the first axis of its leaves, or WHOLE on each.

    Every process must hold the same tree; unchanged where the mesh is None.
    """
    if mesh is None:
        return tree

    def one(x):
        x, sharding = np.asarray(x), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(one, tree)


def fetch(tree: Any) -> Any:
    """The whole tree in the memory of every host; all processes must call this."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def mean_by_sum(grads: Any, metrics: dict) -> tuple[Any, dict]:
    """`estimators.mean_of_particles` of all devices by one sum, for `shard_map`.

    The squared deviations of N = n D particles are those within the n of each of D
    devices and n times those of the device means m_d: sum m_d^2 - D m^2.
    """
    n = len(jax.tree.leaves(grads)[0])
    mean, unravel = ravel_pytree(jax.tree.map(lambda g: g.mean(0), grads))
    within = sum(((g - g.mean(0)[None]) ** 2).sum() for g in jax.tree.leaves(grads))
    metrics = jax.tree.map(jnp.mean, metrics)
    sums, split = ravel_pytree((mean, within / n, (mean**2).sum(), metrics))
    mean, within, square, metrics = split(jax.lax.pmean(sums, AXIS))
    particles = n * jax.lax.axis_size(AXIS)
    variance = within + jnp.maximum(square - (mean**2).sum(), 0)  # over N, not N - 1
    noise = jnp.sqrt(variance / (particles - 1))
    return unravel(mean), metrics | {"grad_noise": noise}


def gathered(combine: Callable) -> Callable:
    """A combine that must see all particles at once, for `shard_map`: one gathering."""

    def run(grads, metrics):
        row, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], (grads, metrics)))
        rows = jax.vmap(lambda tree: ravel_pytree(tree)[0])((grads, metrics))
        rows = jax.lax.all_gather(
            rows, AXIS, tiled=True
        )  # (N, size of theta + metrics)
        grads, metrics = jax.vmap(unravel)(rows)
        grad, more = combine(grads)
        return grad, jax.tree.map(jnp.mean, metrics) | more

    return run


def population(
    build: Callable,
    inputs: tuple,
    particles: int,
    batch: Callable,
    combine: Callable,
    mesh: Mesh | None,
) -> estimators.Estimator:
    """`estimators.population` of build(*inputs), split over the mesh, if there is one.

    inputs: what may be traced (the data), for `shard_map` to hand in: an estimator with
    such values inside would not work on a device's side. Its state is SPLIT; theta, the
    gradient and the metrics are WHOLE.
    """
    whole = estimators.population(build(*inputs), particles, batch, combine)
    if mesh is None:
        return whole
    is_mean = combine is estimators.mean_of_particles
    reduce = mean_by_sum if is_mean else gathered(combine)

    def estimate(key, theta, state) -> tuple[Any, Any, dict]:
        def share(inputs, keys, theta, state):
            estimator = build(*inputs)

            def one(key, state):
                return estimator.estimate(key, theta, state)

            grads, state, metrics = batch(one)(keys, state)
            grad, metrics = reduce(grads, metrics)
            return grad, state, metrics

        over_mesh = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(WHOLE, SPLIT, WHOLE, SPLIT),
            out_specs=(WHOLE, SPLIT, WHOLE),
            check_vma=False,  # a scan may start from zeros, which are the same everywhere
        )
        return over_mesh(inputs, jax.random.split(key, particles), theta, state)

    return estimators.Estimator(whole.init, estimate)
