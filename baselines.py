"""Hand-designed optimizers as learned optimizers whose theta is their hyperparameters.

So the same code trains with them, and a search is a batch of thetas in one program: over
learning rates (`rates`), or over whole configurations (`candidates`, run by tuning.py).
A hyperparameter that theta leaves out has its usual value.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import star
from companions.lopts import LearnedOptimizer, from_optax

# Half orders of magnitude, the paper's grid (appendix B.3), where it can matter here.
LEARNING_RATES = tuple(float(f"{m}e{e}") for e in range(-5, 1) for m in (1, 3))[:11]


# --- NAdamW with a schedule


class NAdamWState(NamedTuple):
    step: jax.Array  # () int32, updates done
    m: Any  # like params, running mean of gradients
    v: Any  # like params, running mean of squared gradients


# Values of what theta leaves out; steps: T, the length of the whole run.
NADAMW = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "nesterov": 1.0,
    "weight_decay": 1e-4,
    "l2": 0.0,
    "warmup": 0.0,
    "constant": 1.0,
    "min_multiplier": 1.0,
    "steps": 1.0,
}


def scheduled_rate(theta: dict[str, Any], step: jax.Array) -> jax.Array:
    """Learning rate () of step s = 0, 1, ... of T = theta["steps"].

    s < warmup T:    lr s / (warmup T)
    s < constant T:  lr
    then:            half a cosine from lr to min_multiplier lr, there at s = T
    """
    rate, total = theta["learning_rate"], theta["steps"]
    begin = theta["constant"] * total
    past = jnp.clip((step - begin) / jnp.maximum(total - begin, 1e-6), 0.0, 1.0)
    lowest = theta["min_multiplier"] * rate
    after = lowest + (rate - lowest) * 0.5 * (1 + jnp.cos(math.pi * past))
    warm = theta["warmup"] * total
    return jnp.where(step < warm, rate * step / jnp.maximum(warm, 1e-6), after)


def nadamw() -> LearnedOptimizer:
    """NAdamW as the list of 1000 configurations means it (Metz et al. 2020, TaskSet).

        g = grad + l2 p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        u = b1 m + (1 - b1) g with nesterov (1.0), m without (0.0)
        a = lr_t sqrt(1 - b2^t) / (1 - b1^t),  t = 1, 2, ...
        update = -a (u / (sqrt(v) + eps) + weight_decay p)
    Not `optax.nadamw`: there eps is added after the bias correction of v, the two terms of
    u are corrected each by its own, and the weight decay is not corrected.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return NAdamWState(step=jnp.zeros((), jnp.int32), m=zeros, v=zeros)

    def update(theta, grads, state, params):
        h = {name: theta.get(name, value) for name, value in NADAMW.items()}
        b1, b2, t = h["b1"], h["b2"], state.step + 1
        rate = scheduled_rate(h, state.step) * jnp.sqrt(1 - b2**t) / (1 - b1**t)
        grads = jax.tree.map(lambda g, p: g + h["l2"] * p, grads, params)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.v, grads)

        def one(g, m, v, p):
            u = jnp.where(h["nesterov"] > 0.5, b1 * m + (1 - b1) * g, m)
            return -rate * (u / (jnp.sqrt(v) + h["eps"]) + h["weight_decay"] * p)

        updates = jax.tree.map(one, grads, m, v, params)
        return updates, NAdamWState(step=t, m=m, v=v)

    return LearnedOptimizer(lambda key: as_theta(NADAMW), init, update)


# --- Adam with eight hyperparameters


def adam8(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    exponential_decay: Any = 0.0,
    linear_decay: Any = 0.0,
    l1: Any = 0.0,
    l2: Any = 0.0,
) -> optax.GradientTransformation:
    """Adam with the eight hyperparameters of Metz et al. 2019, section 4.4.

        lr_s = lr exp(-exponential_decay s) max(1 - linear_decay s, 0),  s = 0, 1, ...
        of the loss + l1 |p|_1 + l2 |p|_2^2 / 2
    The paper names the eight, not their formulas: these are ours.
    """

    def regularize(grads, params):
        return jax.tree.map(lambda g, p: g + l1 * jnp.sign(p) + l2 * p, grads, params)

    def rate(step):
        linear = jnp.maximum(1 - linear_decay * step, 0.0)
        return learning_rate * jnp.exp(-exponential_decay * step) * linear

    return optax.chain(
        optax.stateless(regularize),
        optax.scale_by_adam(b1, b2, eps),
        optax.scale_by_learning_rate(rate),
    )


# adam: the paper's baseline has eps also inside the root (the task suite's convention).
OPTAX: dict[str, Callable] = {
    "adam": partial(optax.adam, eps_root=1e-8),
    "sgdm": partial(optax.sgd, momentum=0.9),
    "sgd": optax.sgd,
    "rmsprop": optax.rmsprop,
    "adam8": adam8,
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
} | {"nadamw": nadamw(), "nadamw_quirks": nadamw()}  # these two differ in their thetas


def as_theta(hyperparameters: dict[str, float]) -> dict[str, jax.Array]:
    """Plain numbers, as files and `candidates` have them, as the optimizers take them."""
    return {name: jnp.float32(value) for name, value in hyperparameters.items()}


def rates(learning_rates: Sequence[float] = LEARNING_RATES) -> list[dict]:
    """One theta for each learning rate."""
    return [as_theta({"learning_rate": rate}) for rate in learning_rates]


def lowest(values: np.ndarray) -> int:
    """Index of the lowest of values (n,); what is not finite is the worst."""
    return int(np.argmin(np.where(np.isfinite(values), values, np.inf)))


def best_rate(losses: np.ndarray) -> int:
    """Index of the lowest mean loss of losses (rates, seeds, steps); nan is the worst."""
    return lowest(losses.mean((1, 2)))


# --- configurations to search

# Seeds of the list's first hundred entries: what a budget should try first.
NADAMW_ORDER = tuple(
    int(seed)
    for seed in """
251 611 799 209 739 713 437 25 342 743 515 324 135 705 934 741 119 770 794 189 829 607
68 958 700 527 865 807 364 374 639 579 494 409 153 697 797 986 111 410 274 941 150 853
90 422 795 937 148 787 116 336 198 327 693 390 999 801 118 385 296 597 726 900 338 985
249 672 760 160 507 666 944 8 604 12 344 989 261 966 343 247 493 175 350 17 476 509 161
813 407 18 191 58 996 230 203 621 737 165
""".split()
)
NADAMW_CONFIGURATIONS = 1000


def log_uniform(rng: np.random.RandomState, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def nadamw_config(seed: int) -> dict[str, float]:
    """Configuration `seed`, 0 to 999, of the 1000 random ones (appendix B.3), as drawn.

    The list that the paper searches is these, in another order. warmup, constant: as
    fractions of the run.
    """
    rng = np.random.RandomState(seed + 14358)
    draw = partial(log_uniform, rng)
    config = {
        "learning_rate": draw(1e-5, 1),
        "b1": 1 - draw(1e-3, 1),
        "b2": 1 - draw(1e-5, 1),
        "eps": draw(1e-8, 1e4),
        "nesterov": float(rng.uniform() > 0.5),
    }
    kind = rng.uniform()  # of decay: the decoupled one, l2, or both
    config["weight_decay"] = 0.0 if 0.3333 <= kind < 0.6666 else draw(1e-5, 0.1)
    config["l2"] = 0.0 if kind < 0.3333 else draw(1e-5, 0.1)
    config["warmup"] = draw(1e-5, 0.1) if rng.uniform() > 0.5 else 0.0
    config["min_multiplier"] = 0.0 if rng.uniform() > 0.5 else draw(1e-5, 1)
    config["constant"] = float(rng.uniform())
    return config


def nadamw_theta(config: dict, steps: int, quirks: bool = False) -> dict[str, float]:
    """`nadamw`'s theta of a configuration, for a run of `steps`.

    The warm-up ends where the constant part does, if not before: min(warmup, constant).
    quirks: as the published code has it, and so the paper's baseline: max(warmup,
    constant), one ramp up to where the decay begins, and the l2 term with its sign
    turned, which drives the weights outwards.
    """
    warmup, l2 = config["warmup"], config["l2"]
    if warmup > 0:
        warmup = (max if quirks else min)(warmup, config["constant"])
    theta = {"warmup": warmup, "l2": 0.0 - l2 if quirks else l2, "steps": float(steps)}
    return config | theta


def adam8_config(seed: int, steps: int) -> dict[str, float]:
    """Random hyperparameters of `adam8`, for a run of `steps`.

    Metz et al. 2019 do not print their ranges; these are ours, uniform in the logarithm:
    learning rate 1e-4 to 1e-1, 1 - b1 1e-2 to 1, 1 - b2 1e-4 to 1e-1, eps 1e-8 to 1e-2,
    l1 and l2 1e-8 to 1e-3; over the whole run the exponential decay takes a factor of
    e^0.1 to e^10, the linear one 0.1 to 1 of the rate.
    """
    draw = partial(log_uniform, np.random.RandomState(seed))
    return {
        "learning_rate": draw(1e-4, 1e-1),
        "b1": 1 - draw(1e-2, 1),
        "b2": 1 - draw(1e-4, 1e-1),
        "eps": draw(1e-8, 1e-2),
        "exponential_decay": draw(0.1, 10) / steps,
        "linear_decay": draw(0.1, 1) / steps,
        "l1": draw(1e-8, 1e-3),
        "l2": draw(1e-8, 1e-3),
    }


GRIDS = ("adam", "sgdm", "rmsprop", "sgd")  # searched over learning rates alone
SEARCHED = (*GRIDS, "nadamw", "nadamw_quirks", "adam8")


def candidates(optimizer: str, budget: int, steps: int) -> list[dict[str, float]]:
    """The thetas to try, as plain numbers, for runs of `steps`.

    adam, sgdm, rmsprop, sgd: `LEARNING_RATES`, whatever the budget. nadamw: the first
    `budget` of the 1000 configurations, the learned order's hundred in front, then by
    seed. nadamw_quirks: the same with `quirks`. adam8: `budget` random draws.
    Raises ValueError for another name or a budget that cannot be had.
    """
    most = NADAMW_CONFIGURATIONS if optimizer.startswith("nadamw") else math.inf
    if optimizer not in SEARCHED or not 1 <= budget <= most:
        raise ValueError(f"no {budget} candidates of {optimizer!r}")
    if optimizer in GRIDS:
        return [{"learning_rate": rate} for rate in LEARNING_RATES]
    if optimizer == "adam8":
        return [adam8_config(seed, steps) for seed in range(budget)]
    rest = sorted(set(range(NADAMW_CONFIGURATIONS)) - set(NADAMW_ORDER))
    quirks = optimizer == "nadamw_quirks"
    return [
        nadamw_theta(nadamw_config(seed), steps, quirks)
        for seed in (*NADAMW_ORDER, *rest)[:budget]
    ]
