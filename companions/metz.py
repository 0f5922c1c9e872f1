"""Metz et al. 2019, Algorithm 1: python -m companions.metz --task fmnist_small

"Understanding and correcting pathologies in the training of learned optimizers". The
meta-step and the files of a run are those of train.py. `parts` holds what differs. The
unroll grows over meta-training and varies by a jitter. Equation 1 merges two estimates of
the meta-gradient, and Adam follows it. TASKS are the families of tasks of D.2.
"""

import dataclasses
import math
import sys
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import data as datasets
import devices
import estimators
import store
import tasks
import train
from companions import lopts


def several(problem: estimators.Problem, windows: Any, most: int) -> estimators.Problem:
    """The problem with `windows` of its windows as its one window, at most `most`.

    `windows` may be traced, so one program serves every length. Losses are (most * K,).
    Those beyond the length are 0, and the others are scaled, so that the mean is theirs.
    The way back computes each window again: the tape holds one and `most` carries.
    """

    def run(theta, carry, key):
        # In a scan nothing can be merged with the first pass, so prevent_cse only costs.
        @partial(jax.checkpoint, prevent_cse=False)
        def one(carry, i):
            def go():
                return problem.run(theta, carry, jax.random.fold_in(key, i))

            nothing = jnp.zeros_like(jax.eval_shape(go)[1])
            return jax.lax.cond(i < windows, go, lambda: (carry, nothing))

        carry, losses = jax.lax.scan(one, carry, jnp.arange(most))
        return carry, losses.reshape(-1) * (most / windows)

    return estimators.Problem(problem.fresh, run)


def loss_after_update(split: str, build, optimizer, theta, carry, key) -> tuple:
    """`tasks.inner_step` with the loss after the update, on a batch of its own.

    split: "train" is STAR's equation 3 to the letter, "valid" the L_valid of Metz et al.
    """
    key, batch_key, loss_key = jax.random.split(key, 3)
    carry, _ = tasks.inner_step(build, optimizer, theta, carry, key)
    task = build(jax.random.wrap_key_data(carry.member))
    return carry, task.loss(carry.params, loss_key, task.batch(batch_key, split))


# --- a family of tasks
def convnet(shape: tuple, outputs: int) -> tasks.Network:
    """D.2: 3x3 convolutions to 32 channels, strides 2, 2, 1 -> mean -> dense.

    19,722 parameters on CIFAR-100. Weights start as Glorot and Bengio 2010, uniform.
    """
    glorot = jax.nn.initializers.glorot_uniform()
    shapes = [(3, 3, n, 32) for n in (shape[-1], 32, 32)] + [(32, outputs)]

    def init(key):
        keys = zip(jax.random.split(key, 4), shapes, strict=True)
        return [{"w": glorot(k, s), "b": jnp.zeros(s[-1])} for k, s in keys]

    def apply(params, key, x):
        for layer, stride in zip(params, (2, 2, 1), strict=False):
            x = jax.nn.relu(tasks.conv(layer, x, stride))
        return tasks.dense(params[-1], x.mean((1, 2)))  # (B, h, w, C) -> (B, C)

    return tasks.Network(init, apply)


def ten_classes(batch_size: int, images: dict, key: jax.Array) -> tasks.Task:
    """A member of the family, drawn by the key: ten classes of a hundred, in any order.

    D.2 draws them from ImageNet at 32x32, and keeps 300 of 1,000 classes for tests.
    images: (100, n, h, w, C) a split.
    """
    # 1000: apart from the keys that init splits off.
    chosen = jax.random.permutation(jax.random.fold_in(key, 1000), 100)[:10]

    def draw(key, split):
        bits = jax.random.bits(key, (2, batch_size))
        labels = (bits[0] % 10).astype(jnp.int32)
        rows = (bits[1] % images[split].shape[1]).astype(jnp.int32)
        return tasks.to_batch(tasks.Split(images[split][chosen[labels], rows], labels))

    pictures = images["test"][chosen]  # (10, n, h, w, C)
    labels = jnp.repeat(jnp.arange(10), pictures.shape[1])
    test = tasks.Split(pictures.reshape(-1, *pictures.shape[2:]), labels)
    return tasks.classifier(draw, test, convnet(pictures.shape[2:], 10))


def family(size: int, most: int, batch_size: int) -> tasks.TaskSpec:
    """size: pixels of a side that become one. most: examples of a class in a split."""

    def load(source="auto", data_dir=None):
        images, data = datasets.cifar100(source, data_dir), {}
        pooled = partial(tasks.pool, size=size)
        for name, split in tasks.split_images(images, pooled).items():
            rows = [np.flatnonzero(np.asarray(split.labels) == c) for c in range(100)]
            least = min(most, *map(len, rows))
            data[name] = split.images[np.stack([row[:least] for row in rows])]
        return data, datasets.about(images)

    return tasks.TaskSpec(load, partial(ten_classes, batch_size))


TASKS = {
    "conv_classes": family(1, 500, 128),
    "conv_classes_small": family(4, 100, 32),
}
OBJECTIVES = {
    "train": tasks.inner_step,
    "fresh": partial(loss_after_update, "train"),
    "valid": partial(loss_after_update, "valid"),
}
MERGES = {  # what becomes of {"bptt": (N, size), "es": (N, size)}
    "merged": estimators.inverse_variance_mean,
    "gradients": lambda grads: estimators.mean_of_particles(grads["bptt"]),
    "es": lambda grads: estimators.mean_of_particles(grads["es"]),
}
GROWTHS = {  # (windows at the end, share of the meta-steps done) -> windows, from 1
    "linear": lambda most, share: 1 + (most - 1) * share,
    "log": lambda most, share: most**share,
    "constant": lambda most, share: most + 0 * share,
}
PRESETS = {
    "default": {},
    # Unrolls in which backpropagation explodes.
    "long": dict(task="conv_classes_small", horizon=1000, unroll=500, growth="constant")
    | dict(particles=4, truncation=20, steps=40),
}


@dataclasses.dataclass(frozen=True)
class Recipe(train.Recipe):
    """D.3. Deviations: unrolls up to 1,000 of T = 2,000 inner steps, not of 10,000. 2,000
    meta-steps, not 5,000, with 8 pairs, not 128. Clipping. For --objective valid the paper
    has --meta-lr 0.0003."""

    program: ClassVar[str] = "-m companions.metz"
    presets: ClassVar[dict] = PRESETS
    task: str = train.flag("fmnist_small", "inner problem")
    optimizer: str = train.flag("mlp", "to meta-train", choices=tuple(lopts.LEARNED))
    estimator: str = train.flag("merged", "gradients in use", choices=tuple(MERGES))
    objective: str = train.flag(
        "train",
        "loss of a training batch before its update, or of another batch after it",
        choices=tuple(OBJECTIVES),
    )
    steps: int = train.flag(2000, "meta-steps")
    sigma: float = train.flag(0.01, "standard deviation of the perturbations of theta")
    particles: int = train.flag(8, "N, antithetic pairs")
    truncation: int = train.flag(50, "K, inner steps of a window; divides T")
    meta_lr: float = train.flag(3e-3, "Adam's learning rate")
    unroll: int = train.flag(1000, "inner steps of the last meta-gradients")
    growth: str = train.flag("linear", "how the unroll grows", choices=tuple(GROWTHS))
    jitter: float = train.flag(0.2, "share by which the unroll varies")
    weight_decay: float = 0.0  # the rest is no flag here
    clip_by: str = "value"
    horizons: str = "doubling"
    start_horizon: float = 1.0
    schedule: str = "constant"
    beta3: None = None


def windows_drawn(windows: Any, jitter: float, key: jax.Array) -> jax.Array:
    """windows times 1 +- jitter, drawn evenly and rounded, at least 1: () int32."""
    drawn = windows * (1 + jitter * jax.random.uniform(key, (), minval=-1.0))
    return jnp.maximum(jnp.round(drawn), 1).astype(jnp.int32)


def parts(recipe: Recipe, build) -> train.Parts:
    """What the recipe is made into. build: (data, key) -> Task."""
    longest, length, horizon = recipe.unroll, recipe.truncation, recipe.horizon
    if longest % length or not length <= longest <= horizon:
        raise store.UserError("--unroll must be whole windows, up to --horizon")
    if not 0 <= recipe.jitter < 1:
        raise store.UserError("--jitter must be in 0 .. 1")
    optimizer, mesh = lopts.LEARNED[recipe.optimizer], devices.mesh_of(recipe.devices)
    unravel = store.unravel_of(optimizer)

    def windows_at(step):
        return GROWTHS[recipe.growth](longest / length, step / recipe.steps)

    def estimator(data, step, key):
        member, one = partial(build, data), OBJECTIVES[recipe.objective]
        start, limit = partial(tasks.fresh, member, optimizer), member(key).loss_limit

        def inner_step(theta, carry, key):
            return one(member, optimizer, unravel(theta), carry, key)

        windows = windows_drawn(windows_at(step), recipe.jitter, key)
        most = math.ceil(longest / length * (1 + recipe.jitter))
        problem = estimators.unroll(start, inner_step, length, limit)
        problem = several(problem, windows, most)
        pair = estimators.merged(
            problem, horizon // length, recipe.sigma, devices.each()
        )

        def estimate(key, theta, state):  # counts `windows` windows, not one
            grads, state, metrics = pair.estimate(key, theta, state)
            return grads, state._replace(window=state.window + windows - 1), metrics

        counting = estimators.Estimator(pair.init, estimate)
        each, merge = devices.split(devices.each(), mesh), MERGES[recipe.estimator]
        return estimators.population(counting, recipe.particles, each, merge)

    def inner_steps(meta_steps):
        runs = 2 * recipe.particles
        return runs * length * windows_at(np.arange(meta_steps)).sum()

    adam = optax.chain(optax.clip(recipe.clip), optax.adam(recipe.meta_lr, b1=0.5))
    load = partial(store.theta_for, optimizer, recipe.optimizer, lopts.load_theta)
    return train.Parts(optimizer, {}, load, estimator, adam, inner_steps)


def main(argv=None) -> int:
    return train.main(argv, Recipe, tasks.TASKS | TASKS, parts)


if __name__ == "__main__":
    sys.exit(store.run_command("companions.metz", main))
