"""What a learned optimizer is compared with, training curves, and how they are drawn.

A hand-designed optimizer has the three functions of a learned one, with its
hyperparameters as theta. So the same code trains with both, and a search over learning
rates is a batch of thetas in one program.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from devices import compiler_options, each
from estimators import clip_loss
from star import LearnedOptimizer
from tasks import fresh, inner_step

# Half orders of magnitude from 1e-5 to 1, the paper's grid (appendix B.3).
LEARNING_RATES = tuple(float(f"{m}e{e}") for e in range(-5, 1) for m in (1, 3))[:11]


def from_optax(make: Callable, start: dict) -> LearnedOptimizer:
    """make(**theta) -> optax.GradientTransformation, theta from `start`: {name: float}."""

    def update(theta, grads, state, params):
        return make(**theta).update(grads, state, params)

    return LearnedOptimizer(
        init_theta=lambda key: as_theta(start),
        init=lambda params: make(**start).init(params),
        update=update,
    )


def as_theta(hyperparameters: dict[str, float]) -> dict[str, jax.Array]:
    """Plain numbers, as files have them, as the optimizers take them."""
    return {name: jnp.float32(value) for name, value in hyperparameters.items()}


class NAdamWState(NamedTuple):
    step: jax.Array  # () int32, updates done
    m: Any  # like params, running mean of gradients
    v: Any  # like params, running mean of squared gradients


# What theta leaves out has these values. steps: T, the length of the whole run.
NADAMW = dict(learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, nesterov=1.0)
NADAMW |= dict(weight_decay=1e-4, l2=0.0, warmup=0.0, constant=1.0)
NADAMW |= dict(min_multiplier=1.0, steps=1.0)


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
    `optax.nadamw` adds eps after the bias correction of v, corrects the two terms of u each
    by its own, and does not correct the weight decay.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return NAdamWState(step=jnp.zeros((), jnp.int32), m=zeros, v=zeros)

    def update(theta, grads, state, params):
        h = NADAMW | theta
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


# The task suite's Adam has 1e-8 inside its root, too.
BASELINES: dict[str, LearnedOptimizer] = {
    "adam": from_optax(partial(optax.adam, eps_root=1e-8), {"learning_rate": 1e-3}),
    "nadamw": nadamw(),
    "sgdm": from_optax(partial(optax.sgd, momentum=0.9), {"learning_rate": 1e-3}),
}


class Curves(NamedTuple):
    losses: np.ndarray  # (thetas, seeds, steps) nats, of each batch before its update
    test: dict[str, np.ndarray]  # name -> (thetas, seeds), after the last step
    seconds: float  # wall time of all runs together, without compilation


def curves(
    build: Callable,
    data: Any,
    optimizer: LearnedOptimizer,
    thetas: list,
    keys: jax.Array,
    steps: int,
    report: Callable = lambda done: None,
) -> Curves:
    """Train every theta from scratch on every key: the same batches for every theta.

    build: (data, key) -> Task. keys: (seeds,). Every 500 steps the losses leave the device
    and report(steps done) is called.
    """
    chunk = min(steps, 500)
    jit = partial(jax.jit, compiler_options=compiler_options())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *thetas)
    init_keys, run_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

    def start(data, keys):
        carry = jax.vmap(partial(fresh, partial(build, data), optimizer))(keys)
        return jax.tree.map(lambda x: jnp.stack([x] * len(thetas)), carry)

    def advance(data, thetas, carry, keys, first, length):
        def run(theta, carry, key):
            def one(carry, t):
                key_t = jax.random.fold_in(key, t)
                return inner_step(partial(build, data), optimizer, theta, carry, key_t)

            return jax.lax.scan(one, carry, first + jnp.arange(length))

        def seeds(theta, carry):  # keys are no axis of the thetas: all see one batch
            return each()(partial(run, theta))(carry, keys)

        return each()(seeds)(thetas, carry)

    def finish(data, carry):
        def test(carry):
            member = jax.random.wrap_key_data(carry.member)
            return build(data, member).evaluate(carry.params)

        return each()(each()(test))(carry)

    carry = jit(start)(data, init_keys)
    jitted = jit(advance, static_argnums=5, donate_argnums=2)
    losses, seconds, compiled = [], 0.0, {}
    for first in range(0, steps, chunk):
        length = min(chunk, steps - first)
        args = (data, stacked, carry, run_keys, jnp.int32(first))
        if length not in compiled:  # at most twice, and outside of the clock
            compiled[length] = jitted.lower(*args, length).compile()
        begin = time.perf_counter()
        carry, loss = compiled[length](*args)
        losses.append(np.asarray(loss))
        seconds += time.perf_counter() - begin
        report(first + length)
    test = {k: np.asarray(x) for k, x in jit(finish)(data, carry).items()}
    return Curves(np.concatenate(losses, 2), test, seconds)


def ema(values: Any, decay: float) -> np.ndarray:
    """Running mean of a curve along its last axis, bias-corrected, as in the figures."""
    values = np.asarray(values, np.float64)
    out, mean = np.empty_like(values), 0.0
    for t in range(values.shape[-1]):
        mean = decay * mean + (1 - decay) * values[..., t]
        out[..., t] = mean / (1 - decay ** (t + 1))
    return out


# --- what train.py says at its end
def on_fresh_seeds(build, data, optimizer, thetas: dict, steps: int) -> dict:
    """Mean training loss of each theta and of Adam, on three fresh seeds, for a card.

    Losses are clipped as the meta-loss is. Adam has the best learning rate for them.
    """
    keys = jax.random.split(jax.random.key(10_000), 3)
    limit = build(data, keys[0]).loss_limit

    def losses(optimizer, thetas):  # (thetas, seeds)
        found = curves(build, data, optimizer, thetas, keys, steps).losses
        return np.asarray(clip_loss(found, limit)).mean(2)

    def of_adam(rates):
        thetas = [as_theta({"learning_rate": rate}) for rate in rates]
        with jax.default_device(jax.local_devices()[-1]):  # beside the thetas' runs
            return losses(BASELINES["adam"], thetas).mean(1)

    with ThreadPoolExecutor() as pool:
        rival = pool.submit(best_rate, of_adam)
        ours = losses(optimizer, list(thetas.values()))
        rate, adam = rival.result()
    card = {f"{name}_loss": x for name, x in zip(thetas, ours.mean(1), strict=True)}
    card |= {"fresh_loss_std": ours[0].std(ddof=1), "adam_loss": adam}
    card = {name: round(float(x), 4) for name, x in card.items()}
    return card | {"adam_learning_rate": rate}


def best_rate(losses_of: Callable) -> tuple[float, float]:
    """(learning rate, loss): the search goes on until both neighbours are worse.

    losses_of: a list of `LEARNING_RATES` -> their losses. The first are 1e-3 to 1e-2.
    """
    tried, new = {}, [4, 5, 6]
    while new:
        tried |= zip(new, losses_of([LEARNING_RATES[i] for i in new]), strict=True)
        best = min(tried, key=tried.get)
        beside = {best - 1, best + 1} & set(range(len(LEARNING_RATES)))
        new = sorted(beside - tried.keys())
    return LEARNING_RATES[best], float(tried[best])


# --- how figures look
WIDTH = 7.2  # inches, of every figure
LEGEND = {"loc": "outside lower center", "ncols": 3}  # one for all panels
COLORS = {  # of an optimizer, which is named as legends name it, in every figure
    "": "k",  # of all others
    "STAR": "#2171b5",
    "STAR, decay 0": "#a5cdea",
    "STAR, decay 0.1": "#4fa3e0",
    "STAR, decay 0.5": "#0b559f",
    "STAR, decay 1": "#041c3d",
    "blackbox": "#d62728",
    "hyperparam": "#2ca02c",
    "no nominal term": "#9467bd",
    "no preconditioner": "#c2549d",
    "no preconditioner, beta3 1e-3": "#f2a9cf",
    "Adam": "#ff7f0e",
    "NAdamW": "#8c564b",
    "momentum": "#7f7f7f",
    "RMSProp": "#bcbd22",
    "GRU": "#17a2b8",
}
WORDS = {"adam": "Adam", "nadamw": "NAdamW", "sgdm": "momentum", "star": "STAR"}
WORDS |= {"no_nominal": "no nominal term", "no_preconditioner": "no preconditioner"}


def color_of(label: str) -> str:
    """The colour of the optimizer that a legend's label begins with."""
    return COLORS[max(filter(label.startswith, COLORS), key=len)]


def counted_seeds(number: Any) -> str:
    """1 seed, 3 seeds, 1 to 3 seeds."""
    return f"{number} seed{'s' * (str(number) != '1')}"


def words_of(card: dict) -> str:
    """The optimizer of a card as legends have it, such as STAR, decay 0.5."""
    name = card.get("optimizer", "star").removesuffix("_small_beta3")
    decay = card.get("recipe", {}).get("weight_decay")
    shown = name == "star" and decay is not None
    return WORDS.get(name, name) + (f", decay {decay:g}" if shown else "")


def draw_band(axes: Any, x: np.ndarray, lines: np.ndarray, label: str, **style) -> None:
    """The mean of lines (n, points) and the band from the lowest to the highest."""
    color = color_of(label)
    axes.plot(x, lines.mean(0), color=color, label=label, **style)
    axes.fill_between(x, lines.min(0), lines.max(0), color=color, alpha=0.2, lw=0)


def draw_meta_training(rows: np.ndarray, card: dict) -> Figure:
    """The meta-loss, (meta-steps, 2), with the losses on the card for scale."""
    (steps, losses), name = rows.T, words_of(card)
    figure = Figure(figsize=(WIDTH, 3.8))
    axes, color = figure.subplots(), color_of(name)
    axes.plot(steps, losses, color=color, alpha=0.25, lw=0.7)
    axes.plot(steps, ema(losses, 0.95), color=color, label="meta-loss (EMA 0.95)")
    names = {"fresh": f"{name}, on fresh seeds", "untrained": "untrained"}
    names |= {"nominal": "nominal term alone", "adam": "Adam, best rate"}
    lines = {v: card[f"{k}_loss"] for k, v in names.items() if f"{k}_loss" in card}
    for (name, value), ls in zip(lines.items(), ("--", ":", "-.", "--"), strict=False):
        style = dict(color=color_of(name), ls=ls, lw=1)
        axes.axhline(value, **style, label=f"{name}: {value:.3f}")
    low, high = np.percentile([*losses, *lines.values()], [0, 97])
    axes.set(
        xlabel="meta-steps",
        ylabel="mean training loss of the unrolls (nats)",
        title=f"{words_of(card)}: meta-training on {card['task']}\n{card['dataset']}",
        ylim=(0.97 * low, 1.05 * high),
    )
    axes.legend()
    return figure
