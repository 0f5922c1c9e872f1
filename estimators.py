"""Meta-gradients of unrolled computations: ES, PES, noise reuse, BPTT, and their merge.

An estimator sees how a trajectory starts and how its next window of K steps runs under
theta. It estimates the gradient of the mean loss over a trajectory of T steps, smoothed
over theta by a Gaussian of standard deviation sigma. theta is one array, such as
`jax.flatten_util.ravel_pytree` makes of a tree.

    problem = unroll(fresh, step, length=50, loss_limit=3.45)
    estimator = population(pes(problem, windows=40, sigma=0.01), particles=4)
    state = estimator.init(key, theta)
    gradient, state, metrics = estimator.estimate(key, theta, state)

                 bias               variance                      steps of an estimate
  es             none               that of a whole trajectory    2 T
  truncated_es   sees one window    least of the ES kind          2 K
  pes            none               grows with T / K              2 K
  noise_reuse_es none               as es, spread over windows    2 K
  bptt           none               explodes if the unroll does   T, there and back
  truncated_bptt sees one window    explodes with K               K, there and back
  merged         that of a window   near the smaller of the two   2 K, there and back

The variance of an ES kind is about size(theta) |gradient|^2 where the loss is smooth, and
never above (range of the loss / sigma)^2. N is the number of particles, xi a perturbation
of theta. The file stands alone: copy it. It needs only jax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Problem(NamedTuple):
    fresh: Callable  # key -> carry, the start of a trajectory
    run: Callable  # (theta, carry, key) -> (carry, losses (K,)), one window


class Estimator(NamedTuple):
    init: Callable  # (key, theta, phase=0) -> state. phase in [0, 1) staggers particles
    estimate: Callable  # (key, theta, state) -> (gradient, state, metrics of scalars)


class Pair(NamedTuple):
    """Two runs, at theta + xi and theta - xi, in the middle of their trajectory."""

    carry: Any  # of both runs, stacked: leaves (2, ...)
    xi: jax.Array  # the perturbation in use, like theta
    xi_sum: jax.Array  # the sum of all perturbations of this trajectory so far
    window: jax.Array  # () int32, windows done


def unroll(fresh, step, length: int, loss_limit: float | None = None) -> Problem:
    """Windows of `length` = K steps of step: (theta, carry, key) -> (carry, loss ())."""

    def run(theta, carry, key):
        def one(carry, t):
            return step(theta, carry, jax.random.fold_in(key, t))

        carry, losses = jax.lax.scan(one, carry, jnp.arange(length))
        return carry, losses if loss_limit is None else clip_loss(losses, loss_limit)

    return Problem(fresh, run)


def clip_loss(loss: jax.Array, limit: jax.Array | float) -> jax.Array:
    """min(loss, limit), and limit for nan and -inf: a diverged run costs the limit."""
    return jnp.where(loss > -jnp.inf, jnp.minimum(loss, limit), limit)


def whole(problem: Problem, windows: int) -> Problem:
    """The problem with a trajectory as its one window. The tape holds one of its own."""

    def run(theta, carry, key):
        @jax.checkpoint
        def one(carry, i):
            return problem.run(theta, carry, jax.random.fold_in(key, i))

        carry, losses = jax.lax.scan(one, carry, jnp.arange(windows))
        return carry, losses.reshape(-1)  # (windows, K) -> (T,)

    return Problem(problem.fresh, run)


# --- evolution strategies: antithetic pairs
def antithetic_difference(losses: jax.Array, credit: jax.Array, sigma: float):
    """credit (L(theta + xi) - L(theta - xi)) / (2 sigma^2), L the means of losses (2, K).

    The mean is that of the differences, so that equal losses give 0 exactly.
    """
    return credit * (losses[0] - losses[1]).mean() / (2 * sigma**2)


def pes(problem: Problem, windows: Any, sigma: float, each=jax.vmap) -> Estimator:
    """Persistent evolution strategies (Vicol, Metz & Sohl-Dickstein 2021).

    Every window draws a new xi. Its losses are credited to the sum of all perturbations of
    the trajectory so far. So PES is unbiased for the loss of the whole trajectory.

    windows, here and below: of a trajectory. The number may be traced. each: `jax.vmap` or
    `sequential`, for the two runs of a pair. Raises ValueError unless sigma is positive.
    """

    def rule(pair, xi):
        return pair.carry, xi, pair.xi_sum + xi

    return antithetic_pairs(problem, windows, sigma, each, rule)


def noise_reuse_es(problem, windows: Any, sigma: float, each=jax.vmap) -> Estimator:
    """One xi for a whole trajectory (Li, Harrison et al. 2023; Vicol 2023, ES-Single).

    Unbiased like PES. Its variance does not grow with the windows where the windows'
    gradients agree. Where they do not, it is larger than that of PES.
    """

    def rule(pair, xi):
        return pair.carry, pair.xi, pair.xi

    return antithetic_pairs(problem, windows, sigma, each, rule)


def truncated_es(problem, windows: Any, sigma: float, each=jax.vmap) -> Estimator:
    """ES within each window, with a new xi and both runs from the carry of the first.

    Biased for more than one window: theta gets no credit for what it did to the carry in
    the windows before.
    """

    def rule(pair, xi):
        return both_from_first(pair.carry), xi, xi

    return antithetic_pairs(problem, windows, sigma, each, rule)


def es(problem: Problem, windows: int, sigma: float, each=jax.vmap) -> Estimator:
    """Antithetic ES over whole trajectories (Metz et al. 2019, section 3)."""
    return truncated_es(whole(problem, windows), 1, sigma, each)


def antithetic_pairs(problem, windows, sigma, each, rule: Callable) -> Estimator:
    """rule: (pair, new xi) -> (carry to go on from, xi to use, what the losses credit)."""
    if isinstance(sigma, float | int) and sigma <= 0:
        raise ValueError(f"sigma must be positive, not {sigma}")

    def estimate(key, theta, pair):
        pair, xi, key = next_window(problem, windows, sigma, key, theta, pair)
        carry, xi, credit = rule(pair, xi)
        carry, losses = run_pair(problem, each, theta, xi, carry, key)
        g = antithetic_difference(losses, credit, sigma)
        pair = Pair(carry, xi, pair.xi_sum + xi, pair.window + 1)
        return g, pair, {"loss": losses.mean()}

    return Estimator(partial(start, problem, windows, sigma), estimate)


def start(problem, windows, sigma, key, theta, phase=0.0) -> Pair:
    """A pair at the start of its trajectory, of which the share `phase` is left out."""
    carry_key, xi_key = jax.random.split(key)
    return Pair(
        carry=jax.tree.map(lambda x: jnp.stack([x, x]), problem.fresh(carry_key)),
        xi=sigma * jax.random.normal(xi_key, theta.shape, theta.dtype),
        xi_sum=jnp.zeros_like(theta),
        window=jnp.floor(phase * windows + 1e-3).astype(jnp.int32),  # 1e-3: rounding
    )


def next_window(problem, windows, sigma, key, theta, pair):
    """(pair, new xi, key for the runs). A pair whose trajectory is over starts anew."""
    fresh_key, xi_key, run_key = jax.random.split(key, 3)
    pair = jax.lax.cond(
        pair.window >= windows,
        lambda: start(problem, windows, sigma, fresh_key, theta),
        lambda: pair,
    )
    return pair, sigma * jax.random.normal(xi_key, theta.shape, theta.dtype), run_key


def both_from_first(carry: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), carry)


def run_pair(problem, each, theta, xi, carry, key):
    """One window at theta + xi and at theta - xi: (carry, losses (2, K)).

    Both runs replay the same key, so that their common noise cancels. The key is no axis
    of the batch: `jax.vmap` draws once for both, whatever kind of key it is.
    """
    both = jnp.stack([theta + xi, theta - xi])
    return each(lambda theta, carry: problem.run(theta, carry, key))(both, carry)


# --- backpropagation
def truncated_bptt(problem: Problem, windows: Any) -> Estimator:
    """Backpropagation through each window of one run, from a carry taken as given.

    It is blind to the windows before, like `truncated_es`. Its variance grows like the
    product of the unroll's Jacobians, without bound where they expand (Metz 2019, 2.3).
    """

    def estimate(key, theta, pair):
        pair, _, key = next_window(problem, windows, 0.0, key, theta, pair)
        first = jax.tree.map(lambda x: x[0], pair.carry)
        g, (carry, losses) = gradient_of(problem, theta, first, key)
        carry = jax.tree.map(lambda x: jnp.stack([x, x]), carry)
        pair = pair._replace(carry=carry, window=pair.window + 1)
        return g, pair, {"loss": losses.mean()}

    return Estimator(partial(start, problem, windows, 0.0), estimate)


def gradient_of(problem, theta, carry, key):
    """(d mean loss of a window / d theta, (carry, losses))."""

    def mean_loss(theta):
        carry_and_losses = problem.run(theta, carry, key)
        return carry_and_losses[1].mean(), carry_and_losses

    return jax.grad(mean_loss, has_aux=True)(theta)


def bptt(problem: Problem, windows: int) -> Estimator:
    """Backpropagation through whole trajectories, with the memory of one window."""
    return truncated_bptt(whole(problem, windows), 1)


def merged(problem: Problem, windows: Any, sigma: float, each=jax.vmap) -> Estimator:
    """Metz et al. 2019, Algorithm 1: two gradients of the same pairs, for a merge.

        "bptt": grad (L(theta + xi) + L(theta - xi)) / 2, by reparameterisation (section 3)
        "es":   that of `truncated_es`
    Give `population` the `inverse_variance_mean` to combine them. Both are unbiased for
    the smoothed loss of the window, "bptt" where that loss is differentiable.
    """

    def run(theta, carry, key):  # each run has its own tape, one at a time
        g, (carry, losses) = gradient_of(problem, theta, carry, key)
        return (carry, g), losses

    def estimate(key, theta, pair):
        pair, xi, key = next_window(problem, windows, sigma, key, theta, pair)
        both, carry = Problem(problem.fresh, run), both_from_first(pair.carry)
        (carry, g), losses = run_pair(both, each, theta, xi, carry, key)
        g = {"bptt": g.mean(0), "es": antithetic_difference(losses, xi, sigma)}
        pair = Pair(carry, xi, pair.xi_sum + xi, pair.window + 1)
        return g, pair, {"loss": losses.mean()}

    return Estimator(partial(start, problem, windows, sigma), estimate)


# --- many particles
def mean_of_particles(grads: jax.Array) -> tuple[jax.Array, dict]:
    """(N, ...) -> (mean, {"grad_noise": its standard error, all entries together}).

    The mean of an entry is over its finite values: exploded runs are left out.
    """
    finite = jnp.isfinite(grads)
    n = finite.sum(0)
    mean = grads.mean(0, where=finite)
    variance = grads.var(0, where=finite, ddof=1) / n
    noise = jnp.sqrt(jnp.where(n > 1, variance, 0).sum())
    return jnp.where(n > 0, mean, 0), {"grad_noise": noise}


def population(
    estimator: Estimator, particles: int, each=jax.vmap, combine=mean_of_particles
) -> Estimator:
    """N independent particles. Particle i starts as if i/N of its trajectory were over.

    each: `jax.vmap`, or `sequential`, which is faster on a CPU. combine: gradients
    (N, ...) -> (gradient, metrics), `inverse_variance_mean` for `merged`.
    """

    def init(key, theta):
        keys = jax.random.split(key, particles)
        phases = jnp.arange(particles) / particles
        return jax.vmap(estimator.init, in_axes=(0, None, 0))(keys, theta, phases)

    def estimate(key, theta, state):
        one = each(lambda key, state: estimator.estimate(key, theta, state))
        grads, state, metrics = one(jax.random.split(key, particles), state)
        g, more = combine(grads)
        return g, state, jax.tree.map(jnp.mean, metrics) | more

    return Estimator(init, estimate)


def sequential(f: Callable) -> Callable:
    """Like `jax.vmap(f)`, one call after the other. A CPU's caches stay warm, and a `cond`
    inside of f computes one branch instead of both."""
    return lambda *args: jax.lax.map(lambda xs: f(*xs), args)


def inverse_variance_mean(grads: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
    """Metz et al. 2019, equation 1, entry by entry of theta:

        g = (g_rp / s_rp^2 + g_es / s_es^2) / (1 / s_rp^2 + 1 / s_es^2)
    grads: {"bptt": (N, ...), "es": (N, ...)}, N >= 2. Metrics: `grad_noise`, the standard
    error of g, and for each of the two its `noise` and its mean `weight`.

    As in the paper, mean and variance come from the same few samples. ES gradients have
    heavy tails: 1.1 times the better variance takes N = 32 to 128 (figure metz4).
    """
    n = len(grads["es"])
    g_rp, s2_rp = usable_mean_and_variance(grads["bptt"])
    g_es, s2_es = usable_mean_and_variance(grads["es"])
    precision = 1 / s2_rp + 1 / s2_es
    some = precision > 0  # where neither is usable, g is 0
    g = jnp.where(some, (g_rp / s2_rp + g_es / s2_es) / precision, 0)
    share = jnp.where(some, 1 / s2_rp / precision, 0).mean()
    metrics = {"bptt_weight": share, "es_weight": some.mean() - share}
    variances = {"grad": jnp.where(some, 1 / precision, 0), "bptt": s2_rp, "es": s2_es}
    metrics |= {f"{k}_noise": jnp.sqrt(x.sum() / n) for k, x in variances.items()}
    return g, metrics


def usable_mean_and_variance(grads: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance (over N - 1) of the N particles, entry by entry, for equation 1.

    Entries with nan or inf, or with zeros only (behind a dead unit), leave the decision to
    the other estimator: mean 0, variance inf. s gains 1e-6 of the largest value.
    """
    largest = jnp.abs(grads).max(0)
    s2 = grads.var(0, ddof=1) + (1e-6 * largest) ** 2
    usable = jnp.isfinite(s2) & (largest > 0)
    s2 = jnp.maximum(s2, jnp.finfo(s2.dtype).tiny)
    return jnp.where(usable, grads.mean(0), 0), jnp.where(usable, s2, jnp.inf)
