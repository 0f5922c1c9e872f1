"""Meta-train the GRU of Maheswaranathan et al. 2020: python -m companions.gru

The tasks are in `problems.py`. The recipe is that of appendix C.2: backpropagation through
all 200 steps of 32 problems, an l2 penalty, clipping and Adam. Its rate is multiplied by
0.8 every 500 meta-steps. The loop, its files and the other flags are those of train.py.

    python -m companions.gru --task linear_regression
    python -m companions.gru --preset two_moons
    python -m companions.gru --preset rosenbrock --out runs/first
    python -m companions.gru --preset rosenbrock --steps 6000 --meta-lr 0.003
        --init runs/first/theta.npz --fresh-meta

Deviations: 2,000 meta-steps, not 5,000, and rates of our own, not of a random search.
Gradients explode on Rosenbrock and two moons, where ES takes their place.
"""

import dataclasses
import sys
from functools import partial
from typing import ClassVar

import jax
import optax

import devices
import estimators
import store
import train
from companions import lopts, problems
from tasks import inner_problem

ES = dict(optimizer="gru_small", estimator="es", schedule="cosine")
ES |= dict(meta_lr=1e-2, l2=0.0, clip=1.0)
PRESETS = {
    "default": {},
    "rosenbrock": ES | dict(task="rosenbrock", steps=2500, particles=128),
    "two_moons": ES
    | dict(task="two_moons_small", steps=1500, particles=16, sigma=0.02),
}


@dataclasses.dataclass(frozen=True)
class Recipe(train.Recipe):
    """Fields without a help text are no flags here."""

    program: ClassVar[str] = "-m companions.gru"
    presets: ClassVar[dict] = PRESETS
    task: str = train.flag("linear_regression", "inner problem")
    optimizer: str = train.flag("gru", "to meta-train", choices=tuple(lopts.LEARNED))
    estimator: str = train.flag("bptt", "of meta-gradients", choices=("bptt", "es"))
    steps: int = train.flag(2000, "meta-steps")
    sigma: float = train.flag(0.01, "standard deviation of the perturbations of theta")
    particles: int = train.flag(32, "problems. ES has an antithetic pair on each")
    schedule: str = train.flag(
        "staircase", "fall of --meta-lr", choices=("staircase", "cosine")
    )
    meta_lr: float = train.flag(3e-3, "peak learning rate")
    l2: float = train.flag(1e-5, "weight of |theta|^2 in the meta-loss")
    clip: float = train.flag(5.0, "limit of each entry of the meta-gradient")
    clip_by: str = "value"
    weight_decay: float = 0.0
    horizon: int = 200
    truncation: int = 200  # one window is the whole trajectory
    horizons: str = "doubling"
    start_horizon: float = 1.0
    beta3: None = None


def parts(recipe: Recipe, build) -> train.Parts:
    """What the recipe is made into. build: (data, key) -> Task."""
    optimizer = lopts.LEARNED[recipe.optimizer]

    def estimator(data, step, key):
        unravel, build_it = store.unravel_of(optimizer), partial(build, data)
        problem = inner_problem(build_it, optimizer, unravel, recipe.horizon)
        if recipe.estimator == "bptt":
            one = estimators.truncated_bptt(problem, windows=1)
        else:
            one = estimators.truncated_es(problem, 1, recipe.sigma)
        # Side by side on a CPU, too, since the problems are tiny.
        each = devices.split(jax.vmap, devices.mesh_of(recipe.devices))
        return estimators.population(one, recipe.particles, each)

    def inner_steps(step):
        runs = recipe.particles * {"bptt": 1, "es": 2}[recipe.estimator]
        return step * runs * recipe.horizon

    adam = meta_optimizer(recipe)
    load = partial(store.theta_for, optimizer, recipe.optimizer, lopts.load_theta)
    return train.Parts(optimizer, {}, load, estimator, adam, inner_steps)


def meta_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The slope of the l2 penalty, clipping, Adam."""
    rate = optax.cosine_decay_schedule(recipe.meta_lr, recipe.steps)
    if recipe.schedule == "staircase":
        rate = optax.exponential_decay(recipe.meta_lr, 500, 0.8, staircase=True)
    penalty = optax.add_decayed_weights(2 * recipe.l2)
    return optax.chain(penalty, optax.clip(recipe.clip), optax.adam(rate))


def main(argv=None) -> int:
    return train.main(argv, Recipe, problems.TASKS, parts)


if __name__ == "__main__":
    sys.exit(store.run_command("companions.gru", main))
