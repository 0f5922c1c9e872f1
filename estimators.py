"""Meta-gradients of unrolled computations by evolution strategies: ES, PES, noise reuse.

An estimator sees an unroll and nothing else: a carry goes in, a carry and the losses of a
window of K steps come out. It estimates the gradient of the mean loss over a trajectory
of T steps, smoothed over theta by a Gaussian of standard deviation sigma, from one window
at a time. What fills the carry (a network and its optimizer, a scalar) it never asks.

    problem = unroll(fresh, step, length=50, loss_limit=3.45)
    estimator = population(pes(problem, windows=40, sigma=0.01), particles=4)
    state = estimator.init(key, theta)
    grad, state, metrics = estimator.estimate(key, theta, state)

The file stands alone: copy it. It needs only jax. Letters: N particles, K steps in a
window, T = K * windows steps in a trajectory, xi perturbation of theta.
Left out here: gradients by backpropagation and their merge with these (Metz et al. 2019).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Unroll(NamedTuple):
    fresh: Callable  # key -> carry, the start of a trajectory
    run: Callable  # (theta, carry, key) -> (carry, losses (K,)), one window


class Estimator(NamedTuple):
    init: Callable  # (key, theta, phase=0) -> state; phase in [0, 1) staggers particles
    estimate: Callable  # (key, theta, state) -> (grad, state, metrics of scalars)


class ParticleState(NamedTuple):
    """One antithetic pair in the middle of its trajectory."""

    carry: Any  # the two carries, stacked: (2, ...) = (at theta + xi, at theta - xi)
    xi: Any  # like theta: the perturbation, for as long as it is reused
    xi_sum: Any  # like theta: earlier perturbations that the next losses answer to
    window: jax.Array  # () int32, windows done in this trajectory


def unroll(fresh: Callable, step: Callable, length: int, loss_limit=None) -> Unroll:
    """The unroll of `length` = K steps of step: (theta, carry, key) -> (carry, loss ()).

    loss_limit: passed to `clip_loss`, so that no loss is above it or nan.
    """

    def run(theta, carry, key):
        def one(carry, t):
            return step(theta, carry, jax.random.fold_in(key, t))

        carry, losses = jax.lax.scan(one, carry, jnp.arange(length))
        return carry, losses if loss_limit is None else clip_loss(losses, loss_limit)

    return Unroll(fresh, run)


def clip_loss(loss, limit):
    """min(loss, limit), and limit for nan: a diverged run costs the limit, no more.

    Both runs of a pair that has diverged cost the same, so it adds nothing to the
    gradient until its trajectory ends; one that alone diverges is simply very bad.
    """
    return jnp.where(jnp.isnan(loss), limit, jnp.minimum(loss, limit))


def pes(problem: Unroll, windows: int, sigma: float, batch=jax.vmap) -> Estimator:
    """Persistent evolution strategies (Vicol, Metz & Sohl-Dickstein 2021).

    Every window draws a new xi; its losses are credited to the sum of all perturbations
    of the trajectory so far. Unbiased for the smoothed loss of the whole trajectory:
        E over windows of  sum(xi) (L(theta+xi) - L(theta-xi)) / (2 sigma^2)
    with L the mean loss of the window. Variance grows with the number of windows.
    """
    return _antithetic(problem, windows, sigma, batch, "sum")


def noise_reuse_es(problem: Unroll, windows, sigma, batch=jax.vmap) -> Estimator:
    """One xi for a whole trajectory (Li, Harrison et al. 2023; Vicol 2023, ES-Single).

    Unbiased like PES; its variance does not grow with the windows where the windows'
    gradients agree, and is larger than that of PES where they do not.
    """
    return _antithetic(problem, windows, sigma, batch, "one")


def truncated_es(problem: Unroll, windows, sigma, batch=jax.vmap) -> Estimator:
    """ES within each window: both runs of a pair start it from the same carry.

    Biased for windows > 1: the losses of a window are not credited to what theta did to
    the carry before. With windows = 1 it is ES over the whole trajectory, unbiased, and
    then equal to PES.
    """
    return _antithetic(problem, windows, sigma, batch, "none")


def population(estimator: Estimator, particles: int, batch=jax.vmap) -> Estimator:
    """The mean of N independent particles, staggered evenly over the trajectory.

    Particle i starts its first trajectory as if i/N of it were over, with a fresh carry:
    it ends early once, and from then on the N windows of a meta-step lie evenly spread
    over the trajectory. batch: `jax.vmap`, or `sequential`, which is faster on a CPU.
    Metrics gain `grad_noise`, the standard error of the mean gradient (root of the summed
    variances; nan for one particle).
    """

    def init(key, theta):
        phases = jnp.arange(particles) / particles
        keys = jax.random.split(key, particles)
        return jax.vmap(estimator.init, in_axes=(0, None, 0))(keys, theta, phases)

    def estimate(key, theta, state):
        def one(key, state):
            return estimator.estimate(key, theta, state)

        grads, state, metrics = batch(one)(jax.random.split(key, particles), state)
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        variance = sum(g.var(0, ddof=1).sum() for g in jax.tree.leaves(grads))
        metrics = jax.tree.map(jnp.mean, metrics)
        return mean, state, metrics | {"grad_noise": jnp.sqrt(variance / particles)}

    return Estimator(init, estimate)


def sequential(f: Callable) -> Callable:
    """Like `jax.vmap(f)`, one after the other: keeps a CPU's caches warm, and a `cond`
    inside stays a branch instead of computing both sides."""
    return lambda *args: jax.lax.map(lambda xs: f(*xs), args)


def _antithetic(problem, windows, sigma, batch, memory: str) -> Estimator:
    """memory of earlier perturbations: their "sum", the "one" there is, or "none"."""

    def start(key, theta):
        carry_key, xi_key = jax.random.split(key)
        carry = jax.tree.map(lambda x: jnp.stack([x, x]), problem.fresh(carry_key))
        return ParticleState(
            carry=carry,
            xi=_normal_like(xi_key, theta, sigma),
            xi_sum=jax.tree.map(jnp.zeros_like, theta),
            window=jnp.zeros((), jnp.int32),
        )

    def init(key, theta, phase=0.0):
        # i/N * windows may round to just below a whole number in float32.
        window = jnp.floor(phase * windows + 1e-3).astype(jnp.int32)
        return start(key, theta)._replace(window=window)

    def estimate(key, theta, state):
        fresh_key, xi_key, run_key = jax.random.split(key, 3)
        # Every trajectory's sum starts at zero, exactly, with its first window.
        state = jax.lax.cond(
            state.window >= windows, lambda: start(fresh_key, theta), lambda: state
        )
        xi = _normal_like(xi_key, theta, sigma) if memory != "one" else state.xi
        credit = jax.tree.map(jnp.add, state.xi_sum, xi)
        pair = jax.tree.map(lambda th, x: jnp.stack([th + x, th - x]), theta, xi)
        run_keys = jnp.stack([run_key, run_key])  # common random numbers, on purpose
        carry, losses = batch(problem.run)(pair, state.carry, run_keys)  # losses (2, K)
        loss_pos, loss_neg = losses.mean(1)
        grad = perturbed_difference(loss_pos, loss_neg, credit, sigma)
        if memory == "none":
            carry = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), carry)
        state = ParticleState(
            carry=carry,
            xi=xi,
            xi_sum=credit if memory == "sum" else state.xi_sum,
            window=state.window + 1,
        )
        return grad, state, {"loss": losses.mean()}

    return Estimator(init, estimate)


def perturbed_difference(loss_pos, loss_neg, xi, sigma):
    """xi (L(theta+xi) - L(theta-xi)) / (2 sigma^2), the antithetic estimate of one pair."""
    scale = (loss_pos - loss_neg) / (2 * sigma**2)
    return jax.tree.map(lambda x: x * scale, xi)


def _normal_like(key, tree, sigma):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draw = [
        sigma * jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(draw)
