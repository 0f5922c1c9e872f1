"""Hand-designed optimizers from optax, as learned optimizers whose theta is their rate.

So the same code trains with them, and a search over learning rates is a batch of thetas.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax

import star
from lopts import LearnedOptimizer, from_optax

# Half orders of magnitude, the paper's grid (appendix B.3), where it can matter here.
LEARNING_RATES = tuple(m * 10.0**e for e in range(-5, 1) for m in (1, 3))[:11]

# adam: the paper's baseline has eps also inside the root (the task suite's convention).
OPTAX: dict[str, Callable] = {
    "adam": partial(optax.adam, eps_root=1e-8),
    "nadamw": optax.nadamw,
    "sgdm": partial(optax.sgd, momentum=0.9),
    "sgd": optax.sgd,
    "rmsprop": optax.rmsprop,
}


def with_beta3(constants: star.Constants) -> LearnedOptimizer:
    """STAR with theta {"theta": its own, "beta3": ()}: betas compared in one program."""

    def update(theta, grads, state, params):
        optimizer = star.learned_optimizer(constants._replace(beta3=theta["beta3"]))
        return optimizer.update(theta["theta"], grads, state, params)

    own = star.learned_optimizer(constants)
    return LearnedOptimizer(
        init_theta=lambda key: {
            "theta": own.init_theta(key),
            "beta3": jnp.float32(constants.beta3),
        },
        init=own.init,
        update=update,
    )


BASELINES = {
    name: from_optax(make, {"learning_rate": 1e-3}) for name, make in OPTAX.items()
}


def rates(learning_rates=LEARNING_RATES) -> list[dict]:
    """One theta for each learning rate."""
    return [{"learning_rate": jnp.float32(rate)} for rate in learning_rates]


def best_rate(losses: np.ndarray) -> int:
    """Index of the lowest mean loss of losses (rates, seeds, steps); nan is the worst."""
    mean = losses.mean((1, 2))
    return int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))
