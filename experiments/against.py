"""The same meta-training by google/learned_optimization, for `bench.py --against FOLDER`.

FOLDER holds its package, release 0.0.1 of PyPI, the only one:

    pip download --no-deps learned_optimization && tar xf learned_optimization-*.tar.gz
    pip install dm-haiku flax gin-config absl-py

That release was written for the JAX of 2021. The names that JAX has dropped since are put
back before its import, and what it imports to read data and to write summaries
(tensorflow and others), none of which runs here, is stood in for where it is absent.
It has the blackbox optimizer of the STAR paper, with 197 meta-parameters, but not STAR.
"""

import functools
import importlib
import importlib.machinery
import itertools
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from store import UserError

BATCHES = 64  # drawn beforehand and gone round: its input costs nothing
# Imported where they are there, else stood in for; flax, which looks for tensorflow, first.
OPTIONAL = (
    "flax.training.checkpoints",
    "tensorflow",
    "tensorflow.compat",
    "tensorflow.compat.v2",
    "tensorflow_datasets",
    "flax.metrics.tensorboard",
    "flax.training.prefetch_iterator",
    "seqio",
)
# How its network is written: as products of stacked features, its default, or number by
# number, which its comments call faster. How many steps it puts into one program.
VARIANTS = {
    "default": dict(optimizer={}, program=10),
    "one program": dict(optimizer={}, program=None),
    "one program, number by number": dict(
        optimizer=dict(concat_weights=False, split_weights=True), program=None
    ),
}


def restore_names(module: Any = jax) -> None:
    """The names in `jax` that the release uses and that are gone, put back."""
    for path, value in {
        "tree_map": jax.tree.map,
        "tree_multimap": jax.tree.map,
        "tree_leaves": jax.tree.leaves,
        "tree_flatten": jax.tree.flatten,
        "tree_unflatten": jax.tree.unflatten,
        "tree_structure": jax.tree.structure,
        "ShapedArray": jax.core.ShapedArray,
        "lib.xla_client": types.SimpleNamespace(Device=object),  # in an annotation
    }.items():
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, module)
        if not hasattr(owner, name):
            setattr(owner, name, value)


def check(folder: str | pathlib.Path) -> None:
    """UserError, in a line, unless the package lies in the folder."""
    if not (pathlib.Path(folder) / "learned_optimization" / "outer_trainers").is_dir():
        raise UserError(f"{folder} does not hold the package learned_optimization")


def import_release(folder: str | pathlib.Path) -> dict:
    """{short name: module} of the release in `folder`; UserError where it won't import."""
    sys.path.insert(0, str(folder))
    restore_names()
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            spec = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = mock.MagicMock(__spec__=spec)
    names = {
        "tasks": "tasks.base",
        "lopt": "learned_optimizers.adafac_mlp_lopt",
        "pes": "outer_trainers.truncated_pes",
        "learner": "outer_trainers.gradient_learner",
        "schedule": "outer_trainers.truncation_schedule",
    }
    try:
        return {
            short: importlib.import_module(f"learned_optimization.{name}")
            for short, name in names.items()
        }
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"learned_optimization does not import: {reason}") from error


def as_its_task(modules: dict, task: Any, key: jax.Array) -> Any:
    """Our Task as one of its own, on the same network, loss and batches."""
    keys = jax.random.split(key, BATCHES)
    batches = [jax.device_get(task.batch(k, "train")) for k in keys]

    class Datasets:
        def __init__(self):
            self.train = itertools.cycle(batches)

        def split(self, name):
            return self.train

    structure = jax.tree.structure(jax.eval_shape(task.init, key))

    class Task(modules["tasks"].Task):
        datasets = Datasets()

        def init(self, key):  # a dict of arrays, as its summaries ask for
            return {str(i): x for i, x in enumerate(jax.tree.leaves(task.init(key)))}

        def loss(self, params, key, data):
            leaves = [params[str(i)] for i in range(len(params))]
            return task.loss(structure.unflatten(leaves), key, data)

    return modules["tasks"].single_task_to_family(Task())


def estimates(
    folder: str | pathlib.Path, task: Any, pairs: int, length: int, horizon: int
) -> dict:
    """{variant: () -> mean loss, one PES estimate of `pairs` by its TruncatedPES}.

    Raises UserError where `folder` does not hold the release.
    """
    modules = import_release(folder)
    family = as_its_task(modules, task, jax.random.key(0))
    made = {}
    for name, variant in VARIANTS.items():
        optimizer = modules["lopt"].AdafacMLPLOpt(**variant["optimizer"])
        estimator = modules["pes"].TruncatedPES(
            family,
            optimizer,
            modules["schedule"].ConstantTruncationSchedule(horizon),
            num_tasks=pairs,
            trunc_length=length,
            std=1e-4,
            steps_per_jit=variant["program"] or length,
        )
        weights = modules["learner"].WorkerWeights(
            theta=optimizer.init(jax.random.PRNGKey(0)),
            theta_model_state=None,
            outer_state=modules["learner"].OuterState(outer_iteration=np.int32(0)),
        )
        made[name] = _one_after_the_other(estimator, weights)
    return made


def _one_after_the_other(estimator: Any, weights: Any) -> Callable:
    keys = (jax.random.PRNGKey(i) for i in itertools.count())
    state = estimator.init_worker_state(weights, next(keys))

    def estimate():
        nonlocal state
        out, _ = estimator.compute_gradient_estimate(weights, next(keys), state)
        state = out.unroll_state
        return float(jax.block_until_ready((out.mean_loss, out.grad))[0])

    return estimate
