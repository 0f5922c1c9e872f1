"""What depends on devices: how runs are batched, and particles split over many.

The devices of all processes stand in one row, a mesh with a single axis. Each runs its
share of the particles. XLA adds the collectives that the mean over particles needs. What a
particle does depends on its key, never on its device. So the same run on more devices
differs by rounding alone.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import estimators
from store import UserError, forget_output

SPLIT, WHOLE = P("particles"), P()
PEER_TIMEOUT = 60  # seconds that a process waits for the others to appear, or to answer


def join(coordinator: str | None, num_processes: int | None, process_id: int | None):
    """Meet the other processes (None: as SLURM, Kubernetes or the environment say).

    Call it before anything else of JAX. Only process 0 prints. If a process is lost, the
    runtime ends all others. --resume then goes on from the checkpoint.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    whom = f"all {num_processes or ''} processes at {coordinator or 'their cluster'}"
    print(f"waiting up to {PEER_TIMEOUT} s for {whom}", flush=True)

    def give_up():  # before the runtime does, which aborts with a trace
        print(f"train.py: --distributed waited in vain for {whom}", file=sys.stderr)
        os._exit(2)

    timer = threading.Timer(PEER_TIMEOUT, give_up)
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=2 * PEER_TIMEOUT,
            heartbeat_timeout_seconds=PEER_TIMEOUT,
            shutdown_timeout_seconds=PEER_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--distributed finds no other processes: {reason}") from None
    finally:
        timer.cancel()
    if jax.process_index() != 0:
        forget_output()


@contextlib.contextmanager
def interrupts() -> Iterator[Callable]:
    """stop(step): whether all processes stop after this step, since one was interrupted.

    The state of a step under way is donated and cannot be saved. So Ctrl-C and SIGTERM are
    noted, and looked at between steps. A second one stops at once. Several processes tell
    the runtime by SIGTERM. The runtime settles on a step that no process has passed.
    """
    asked, several = [], jax.process_count() > 1

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def stop(step):
        if not several:
            return bool(asked)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    signals = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        signals = []  # they reach the main thread alone
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave() -> None:
    """Part from the other processes. What follows runs in this one alone."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the runtime had it


def each() -> Callable:
    """vmap on an accelerator. On a CPU one run after the other, which keeps caches warm."""
    return estimators.sequential if jax.default_backend() == "cpu" else jax.vmap


def compiler_options() -> dict:
    """For `jax.jit` on a CPU: vectors as wide as AVX-512 has them, LLVM's first level.

    XLA's default of 256 bits costs a fifth of the inner steps per second where 512 exist.
    Its default level, 3, compiles 1.3 times as long, and its programs are no faster.
    A level in XLA_FLAGS stays.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_prefer_vector_width": 512}
    if "optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        options["xla_backend_optimization_level"] = 1
    return options


def use_every_core() -> None:
    """One CPU device a core, if JAX has not begun. `free_devices` shares particles out.

    XLA can split each small product over all cores. Cores with particles of their own make
    more inner steps a second, 1.3 times as many where there are two.
    """
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cores)


def free_devices(particles: int) -> int:
    """How many devices a process takes if not told. It takes as many CPU devices as can
    share the particles evenly, and one device of another kind."""
    if jax.default_backend() != "cpu":
        return 1
    numbers = range(len(jax.local_devices()), 1, -1)
    fit = (n for n in numbers if particles % (n * jax.process_count()) == 0)
    return next(fit, 1)


def mesh_of(per_process: int | None) -> Mesh | None:
    """The first devices of every process in a row, or None where there is a single one.

    per_process: devices of a process, None for one.
    """
    per_process = per_process or 1
    if per_process * jax.process_count() == 1:
        return None
    row = []
    for process in range(jax.process_count()):
        devices = [d for d in jax.devices() if d.process_index == process]
        if len(devices) < per_process:
            found = f"process {process} has {len(devices)} of {devices[0].platform}"
            raise UserError(f"--devices {per_process}: {found}")
        row += devices[:per_process]
    return Mesh(np.array(row), ("particles",))


def split(each: Callable, mesh: Mesh | None) -> Callable:
    """`each` with the batch split over the mesh. `each` itself where the mesh is None."""
    if mesh is None:
        return each

    def batched(f):
        # check_vma: a scan may start from zeros, which are the same on every device
        specs = dict(in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
        return jax.shard_map(each(f), mesh=mesh, **specs)

    return batched


def place(tree: Any, mesh: Mesh | None, spec: P = WHOLE) -> Any:
    """The tree on the mesh: SPLIT along the first axis of its leaves, or WHOLE on each.

    Every process must hold the same tree. It stays as it is where the mesh is None.
    """
    if mesh is None:
        return tree

    def one(x):
        x, sharding = np.asarray(x), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(one, tree)


def fetch(tree: Any) -> Any:
    """The whole tree in the memory of every host. All processes must call this."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)
