"""The same meta-training by google/learned_optimization, for `bench.py --against FOLDER`.

    git clone https://github.com/google/learned_optimization FOLDER
    pip install flax dm-haiku chex gin-config absl-py

The repository has the authors' STAR. The release on PyPI is older and does not. The package
imports tensorflow and others to read data and to write summaries. They never run here. An
empty stand-in takes the place of one that is absent.
"""

import importlib
import importlib.machinery
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from store import UserError

BATCHES = 64  # drawn beforehand and used in turn, so that its input costs nothing
# Imported where present, else stood in for. flax, which looks for tensorflow, comes first.
OPTIONAL = (
    "flax.training.checkpoints flax.metrics.tensorboard flax.training.prefetch_iterator "
    "tensorflow tensorflow.compat tensorflow.compat.v2 tensorflow_datasets seqio"
).split()
# The network as products of stacked features, which is the library's default, or number by
# number, which its comments call faster.
VARIANTS = {
    "default": dict(concat_weights=True, split_weights=False),
    "number by number": dict(concat_weights=False, split_weights=True),
}


def check(folder: str | pathlib.Path) -> None:
    """UserError, in a line, unless the package lies in the folder."""
    if not (pathlib.Path(folder) / "learned_optimization" / "outer_trainers").is_dir():
        raise UserError(f"{folder} does not hold the package learned_optimization")


def import_library(folder: str | pathlib.Path, *names: str) -> list[Any]:
    """Modules of the package in `folder`. UserError, in a line, if one won't import."""
    check(folder)
    sys.path.insert(0, str(folder))
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            spec = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = mock.MagicMock(__spec__=spec)
    try:
        return [importlib.import_module(f"learned_optimization.{n}") for n in names]
    except (ImportError, AttributeError) as error:  # for another Python or JAX
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"learned_optimization does not import: {reason}") from error


def as_its_task(base: Any, task: Any, key: jax.Array) -> Any:
    """Our Task as a family of the library's, with the same network, loss and batches.
    base: its module tasks.base."""
    keys = jax.random.split(key, BATCHES)
    batches = [jax.device_get(task.batch(k, "train")) for k in keys]
    structure = jax.tree.structure(jax.eval_shape(task.init, key))
    train = itertools.cycle(batches)

    class Task(base.Task):
        datasets = mock.Mock(split=lambda name: train)

        def init(self, key):  # a dict of arrays, as its summaries ask for
            return {str(i): x for i, x in enumerate(jax.tree.leaves(task.init(key)))}

        def loss(self, params, key, data):
            leaves = [params[str(i)] for i in range(len(params))]
            return task.loss(structure.unflatten(leaves), key, data)

    return base.single_task_to_family(Task())


def estimates(
    folder: str | pathlib.Path, task: Any, pairs: int, length: int, horizon: int
) -> dict[str, Callable]:
    """{variant: () -> mean loss of the library's next PES estimate}. An estimate has
    `pairs` windows of `length` steps with its STAR."""
    base, star, steps, pes, learner, schedule = import_library(
        folder,
        "tasks.base",
        "learned_optimizers.adafac_nominal",
        "outer_trainers.lopt_truncated_step",
        "outer_trainers.truncated_pes",
        "outer_trainers.gradient_learner",
        "outer_trainers.truncation_schedule",
    )
    family = as_its_task(base, task, jax.random.key(0))
    made = {}
    for name, variant in VARIANTS.items():
        optimizer = star.MLPNomLOpt(
            step_mult=1e-6,  # beta3, with which an untrained network does not diverge
            nominal_stepsize=1e-3,
            nominal_controller=True,
            normalize_blackbox=True,
            **variant,
        )
        step = steps.VectorizedLOptTruncatedStep(
            family, optimizer, schedule.ConstantTruncationSchedule(horizon), pairs
        )
        estimator = pes.TruncatedPES(step, length, std=1e-4, steps_per_jit=length)
        weights = learner.WorkerWeights(
            theta=optimizer.init(jax.random.PRNGKey(0)),
            theta_model_state=None,
            outer_state=learner.OuterState(outer_iteration=np.int32(0)),
        )
        made[name] = one_after_the_other(estimator, weights)
    return made


def one_after_the_other(estimator: Any, weights: Any) -> Callable:
    """() -> mean loss of the estimator's next estimate."""
    keys = (jax.random.PRNGKey(i) for i in itertools.count())
    state = estimator.init_worker_state(weights, next(keys))

    def estimate():
        nonlocal state
        out, _ = estimator.compute_gradient_estimate(weights, next(keys), state)
        state = out.unroll_state
        return float(jax.block_until_ready((out.mean_loss, out.grad))[0])

    return estimate
