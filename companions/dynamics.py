"""What a trained optimizer does: fixed points, modes, momenta and learning rates.

Maheswaranathan et al. 2020, "Reverse engineering learned optimizers reveals known and
novel mechanisms", appendices A and B. An optimizer that treats every parameter alike is a
dynamical system. The gradient g drives its state h in R^k, and u moves the parameter. Near
a fixed point it is linear, and a linear one is momentum on several timescales:

    h' = h* + A (h - h*) + B g          equation 3
    u  = u* + C (h - h*) + D g

Let A = R diag(beta) L with L = R^-1. The response to a gradient is, t steps later,

    -sum_j alpha_j beta_j^t,    alpha_j = -(C R_j)(L_j B) / beta_j

This is the response of aggregated momentum (Lucas et al. 2018):

    v_j' = beta_j v_j + g,  u = -sum alpha_j v_j'

Deviations from the paper: equation 4 has beta (v + v*) where beta (v - v*) is meant. The
paper's learning rate of mode j, a_j = L_j B, leaves the readout out and depends on the
length of the eigenvector. Ours counts both.

    optimizer = LearnedOptimizer(init_theta, init, update)    # lopts.gru(), for one
    modes = modes_of(linearise(optimizer, theta))
    small = reduced(modes, keep=1)                            # a learned optimizer again

The file stands alone: copy it. It needs jax and numpy. k is the length of the state of one
parameter, S the shape of a parameter tensor, M accumulators.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class LearnedOptimizer(NamedTuple):
    init_theta: Callable  # key -> theta
    init: Callable  # params -> state
    update: Callable  # (theta, grads, state, params) -> (updates to add, state)


class Linear(NamedTuple):
    """An optimizer around a fixed point, for one parameter, in float64."""

    a: np.ndarray  # (k, k) d state' / d state
    b: np.ndarray  # (k,) d state' / d gradient
    c: np.ndarray  # (k,) d update / d state
    d: float  # d update / d gradient
    point: np.ndarray  # (k,) h*, the fixed point
    start: np.ndarray  # (k,) the state before the first step
    drift: float  # u*, the update at the fixed point for a gradient of 0
    residual: float  # |F(h*, 0) - h*|, 0 at a fixed point


class Modes(NamedTuple):
    """The eigenmodes, those with the largest long-run step |alpha / (1 - beta)| first.

    Complex numbers come in conjugate pairs, whose sum is real.
    """

    momentum: np.ndarray  # (k,) beta_j, eigenvalues of the Jacobian
    learning_rate: np.ndarray  # (k,) alpha_j
    start: np.ndarray  # (k,) what is left of the first state in each mode's step
    direct: float  # learning rate of a mode without memory (beta = 0)
    drift: float  # of each step
    condition: float  # of the eigenvectors. Above 1e6 they are hardly independent


# --- linearisation


def fixed_point(f: Callable, h: Any, iterations: int = 20) -> tuple[np.ndarray, float]:
    """(h*, |f(h*) - h*|): Newton's method on the residual r = f(h) - h, from h.

    f may have a line of fixed points. So each step is the shortest s with J s = -r.
    """
    residual = jax.jit(lambda h: f(h) - h)
    jacobian = jax.jit(jax.jacfwd(residual))
    h = np.asarray(h)
    for _ in range(iterations):
        if np.linalg.norm(residual(h)) < 1e-12:
            break
        h = h - np.linalg.lstsq(jacobian(h), residual(h))[0]
    return h, float(np.linalg.norm(residual(h)))


def linearise(optimizer: LearnedOptimizer, theta: Any, settle: int = 1000) -> Linear:
    """The optimizer around the fixed point it comes to rest at when gradients are 0.

    For one scalar parameter, held at 0, in float64 whatever theta is. settle: steps
    without a gradient, from the first state, before `fixed_point`. Warns where none is
    found (residual above 1e-6). Raises ValueError for a state with integers in it, such as
    STAR's count of steps: such an optimizer has no fixed point.
    """
    with jax.enable_x64(True):
        theta = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), theta)
        zero = jnp.zeros(())
        state = optimizer.init(zero)
        for leaf in jax.tree.leaves(state):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(f"the state holds {leaf.dtype}: it has no fixed point")
        start, unravel = ravel_pytree(state)

        def step(h, g):  # (k,), () -> (k,), ()
            update, state = optimizer.update(theta, g, unravel(h), zero)
            return ravel_pytree(state)[0], update

        def rest(h):
            return step(h, zero)[0]

        settled = jax.lax.fori_loop(0, settle, lambda _, h: rest(h), start)
        point, residual = fixed_point(rest, settled)
        derivatives = jax.jit(jax.jacfwd(step, argnums=(0, 1)))(point, zero)
        (a, b), (c, d) = jax.tree.map(np.asarray, derivatives)
        drift = float(jax.jit(step)(point, zero)[1])
    if not residual < 1e-6:
        warnings.warn(f"no fixed point: residual {residual:.1e}", stacklevel=2)
    return Linear(a, b, c, float(d), point, np.asarray(start), drift, residual)


def modes_of(system: Linear) -> Modes:
    """Momentum and learning rate of every eigenmode (the equations on top).

    Raises ValueError where a mode with eigenvalue 0 answers one step late: a delay, which
    is no momentum.
    """
    beta, right = np.linalg.eig(system.a)
    left = np.linalg.inv(right)
    readout, drive = system.c @ right, left @ system.b
    first = left @ (system.start - system.point)
    memory = np.abs(beta) > 1e-8
    gain = np.abs(readout * drive)
    if (gain[~memory] > 1e-6 * (gain.sum() + abs(system.d))).any():
        raise ValueError("a mode with eigenvalue 0 acts one step late: not a momentum")
    over = np.where(memory, 1 / np.where(memory, beta, 1), 0)
    alpha, start = -readout * drive * over, readout * first * over
    weight = np.abs(alpha) / np.maximum(np.abs(1 - beta), 1e-12)
    order = np.lexsort([beta.imag, -np.round(np.log(weight + 1e-300), 6)])
    return Modes(
        momentum=beta[order],
        learning_rate=alpha[order],
        start=start[order],
        direct=-system.d - float(alpha.sum().real),
        drift=system.drift,
        condition=float(np.linalg.cond(right)),
    )


def keep_modes(modes: Modes, keep: int | None) -> np.ndarray:
    """Indices of the first `keep` modes, and one more where that would split a pair."""
    kept = modes.momentum[:keep]
    split = len(kept) > 0 and kept[-1].imag < 0  # the second of a pair has imag > 0
    return np.arange(len(kept) + split)


def reduced(modes: Modes, keep: int | None = None, rest: bool = True):
    """The `LearnedOptimizer` of the first `keep` modes. All of them are the linearisation.

        y_j' = beta_j y_j - alpha_j g,   u = sum_j y_j' - direct g + u*
    It has no theta. Its state is a tree like the parameters, leaves (keep, *S) complex64.
    rest: False leaves out what the gradients did not cause. That is the way from the first
    state to the fixed point, and the drift u* there.
    """
    if not rest:
        modes = modes._replace(start=0 * modes.start, drift=0.0)
    index = keep_modes(modes, keep)
    chosen = modes.momentum, modes.learning_rate, modes.start
    beta, alpha, start = (np.complex64(x[index]) for x in chosen)
    direct, drift = np.float32([modes.direct, modes.drift])

    def init(params):
        def one(p):
            return jnp.multiply.outer(start, jnp.ones_like(p))

        return jax.tree.map(one, params)

    def update(theta, grads, state, params):
        def one(g, y):
            y = jax.vmap(lambda beta, alpha, y: beta * y - alpha * g)(beta, alpha, y)
            return y.real.sum(0) - direct * g + drift, y

        both = jax.tree.map(one, grads, state)
        return jax.tree.transpose(jax.tree.structure(grads), None, both)

    return LearnedOptimizer(lambda key: {}, init, update)


# --- momentum, for comparison


def heavy_ball(smallest: float, largest: float) -> tuple[float, float]:
    """(alpha, beta), the best momentum for curvatures in [smallest, largest] (Polyak 1964).

        alpha = 4 / (low + high)^2,  beta = ((high - low) / (high + low))^2
    low and high are the roots of the two curvatures. This gives the best rate of
    convergence as t goes to infinity, not the best mean loss over T steps.
    """
    low, high = np.sqrt(smallest), np.sqrt(largest)
    return 4 / (low + high) ** 2, ((high - low) / (high + low)) ** 2


# --- optimizers whose state holds running means of the gradient: STAR


def accumulator_rates(optimizer, theta, decays, grads, state, params, entries):
    """Learning rates of running means of the gradient, for some parameters.

        m_j' = beta_j m_j + (1 - beta_j) g,  alpha_j = -(1 - beta_j) d u / d m_j'
    A running mean is a mode by design, and its eigenvalue is its decay. Its learning rate
    is what the network makes of it here and now, with all other features held. It is exact:
    the slope of one parameter's update by its own mean, for one parameter of every tensor
    at a time. The optimizer must treat tensors separately, as STAR does.
    state.tensors: a tree like params of tuples with a field m, the M means, as star.State.
    decays: (M,). entries: a tree like params of (n,) flat indices. -> likewise of (M, n).
    """

    def slope(j, n):
        def update_at(x):  # x is added to mean j of the chosen parameters
            def move(p, entry, tensor):
                one = jnp.zeros(p.size).at[entry[n]].set(x).reshape(p.shape)
                means = tuple(m + (i == j) * one for i, m in enumerate(tensor.m))
                return tensor._replace(m=means)

            tensors = jax.tree.map(move, params, entries, state.tensors)
            moved = state._replace(tensors=tensors)
            updates, _ = optimizer.update(theta, grads, moved, params)
            return jax.tree.map(lambda u, at: u.reshape(-1)[at[n]], updates, entries)

        return jax.jvp(update_at, (0.0,), (1.0,))[1]

    count, each = len(decays), len(jax.tree.leaves(entries)[0])
    j, n = jnp.divmod(jnp.arange(count * each), each)
    slopes = jax.lax.map(lambda pair: slope(*pair), (j, n))
    # the slope by m_j' is that by m_j over beta_j
    scale = ((1 - decays) / decays)[:, None]
    return jax.tree.map(lambda s: -scale * s.reshape(count, each), slopes)
