"""Meta-gradients of unrolled computations: ES, PES, noise reuse, BPTT, and their merge.

An estimator sees an unroll and nothing else: a carry goes in, a carry and the losses of a
window of K steps come out. It estimates the gradient of the mean loss over a trajectory
of T steps, smoothed over theta by a Gaussian of standard deviation sigma. What fills the
carry (a network and its optimizer, a scalar) it never asks.

    problem = unroll(fresh, step, length=50, loss_limit=3.45)
    estimator = population(pes(problem, windows=40, sigma=0.01), particles=4)
    state = estimator.init(key, theta)
    grad, state, metrics = estimator.estimate(key, theta, state)

                 bias               variance                      steps of an estimate
  es             none               that of a whole trajectory    2 T
  truncated_es   sees one window    least of the ES kind          2 K
  pes            none               grows with T / K              2 K
  noise_reuse_es none               as es, spread over windows    2 K
  bptt           none               explodes if the unroll does   2 T, there and back
  truncated_bptt sees one window    explodes with K               2 K, there and back
  merged         that of its window near the smaller of the two's 2 K, there and back

Of an ES kind the variance is about size(theta) |gradient|^2 where the loss is smooth, and
never above (range of the loss / sigma)^2, however rough it is. A way back costs about
twice the way there and holds the states of K steps in memory; ES holds one state a run.
Use pes or noise_reuse_es for long unrolls, merged where the windows are short or the
unroll is smooth, bptt alone to look at the pathology.

Longer windows (Metz et al. 2019) are unrolls of `several` windows. The file stands alone:
copy it. It needs only jax. Letters: N particles, K steps in a window, T = K * windows
steps in a trajectory, xi perturbation of theta.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Unroll(NamedTuple):
    fresh: Callable  # key -> carry, the start of a trajectory
    run: Callable  # (theta, carry, key) -> (carry, losses (K,)), one window
    windows: Any = 1  # windows that one call of run does; may be traced


class Estimator(NamedTuple):
    init: Callable  # (key, theta, phase=0) -> state; phase in [0, 1) staggers particles
    estimate: Callable  # (key, theta, state) -> (grad, state, metrics of scalars)


class ParticleState(NamedTuple):
    """One antithetic pair in the middle of its trajectory."""

    carry: Any  # stacked: (2, ...) = (at theta + xi, at theta - xi), or (1, ...)
    xi: Any  # like theta: the perturbation, for as long as it is reused
    xi_sum: Any  # like theta: earlier perturbations that the next losses answer to
    window: jax.Array  # () int32, windows done in this trajectory, or left out of it


def unroll(
    fresh: Callable, step: Callable, length: int, loss_limit: float | None = None
) -> Unroll:
    """The unroll of `length` = K steps of step: (theta, carry, key) -> (carry, loss ()).

    loss_limit: passed to `clip_loss`, so that no loss is above it or nan. Backpropagation
    keeps what each step computed; a `jax.checkpoint(step)` keeps the carries alone.
    """

    def run(theta, carry, key):
        def one(carry, t):
            return step(theta, carry, jax.random.fold_in(key, t))

        carry, losses = jax.lax.scan(one, carry, jnp.arange(length))
        return carry, losses if loss_limit is None else clip_loss(losses, loss_limit)

    return Unroll(fresh, run)


def several(problem: Unroll, windows: Any, most: int) -> Unroll:
    """The unroll whose run does `windows` windows of the problem in a row.

    windows: at most `most`; may be traced, so that one program serves every length. Losses
    are (most * K,), those beyond the length 0 and the others scaled so that the mean is
    theirs. Differentiated, each window is computed again on the way back, by
    `jax.checkpoint`: the tape holds one window and `most` carries, not all T steps.
    With `pes` or `noise_reuse_es` the length must be fixed and divide the trajectory: a run
    does not stop in the middle, and every estimate counts as one.
    """

    def run(theta, carry, key):
        def one(carry, i):
            def go():
                return problem.run(theta, carry, jax.random.fold_in(key, i))

            losses = jax.eval_shape(go)[1]
            return jax.lax.cond(
                i < windows, go, lambda: (carry, jnp.zeros(losses.shape, losses.dtype))
            )

        # in a scan nothing can be merged with the first pass: prevent_cse only costs
        one = jax.checkpoint(one, prevent_cse=False)
        carry, losses = jax.lax.scan(one, carry, jnp.arange(most))
        return carry, losses.reshape(-1) * (most / windows)

    return Unroll(problem.fresh, run, windows * problem.windows)


def clip_loss(loss: jax.Array, limit: jax.Array | float) -> jax.Array:
    """min(loss, limit), and limit for nan and -inf: a diverged run costs the limit.

    Both runs of a pair that has diverged cost the same, so it adds nothing to the
    gradient until its trajectory ends; one that alone diverges is simply very bad.
    """
    return jnp.where(loss > -jnp.inf, jnp.minimum(loss, limit), limit)


def pes(
    problem: Unroll,
    windows: Any,
    sigma: float,
    batch: Callable = jax.vmap,
    shortest: Any = None,
) -> Estimator:
    """Persistent evolution strategies (Vicol, Metz & Sohl-Dickstein 2021).

    Every window draws a new xi; its losses are credited to the sum of all perturbations
    of the trajectory so far. Unbiased for the smoothed loss of the whole trajectory:
        E over windows of  sum(xi) (L(theta+xi) - L(theta-xi)) / (2 sigma^2)
    with L the mean loss of the window. Variance grows with the number of windows.

    shortest, here and below: windows of the shortest trajectory; may be traced. Each then
    has a length of its own, log-uniform up to `windows`: n with P(n) ~ log((n + 1) / n),
    but for the first, which `population` staggers.
    The gradient is that of the mean loss over the steps of them all, in which the early
    ones, which every trajectory has, weigh more. None: all are of `windows`.
    """
    return _antithetic(problem, windows, sigma, batch, shortest, memory="sum")


def noise_reuse_es(
    problem: Unroll,
    windows: Any,
    sigma: float,
    batch: Callable = jax.vmap,
    shortest: Any = None,
) -> Estimator:
    """One xi for a whole trajectory (Li, Harrison et al. 2023; Vicol 2023, ES-Single).

    Unbiased like PES; its variance does not grow with the windows where the windows'
    gradients agree, and is larger than that of PES where they do not.
    """
    return _antithetic(problem, windows, sigma, batch, shortest, memory="one")


def truncated_es(
    problem: Unroll,
    windows: Any,
    sigma: float,
    batch: Callable = jax.vmap,
    shortest: Any = None,
) -> Estimator:
    """ES within each window: both runs of a pair start it from the same carry.

    Biased for windows > 1: the losses of a window are not credited to what theta did to
    the carry before. With windows = 1 it is ES over the whole trajectory, unbiased, and
    then equal to PES.
    """
    return _antithetic(problem, windows, sigma, batch, shortest)


def es(
    problem: Unroll, windows: int, sigma: float, batch: Callable = jax.vmap
) -> Estimator:
    """Antithetic ES over whole trajectories (Salimans et al. 2017): T steps an estimate.

    The score-function gradient of Metz et al. 2019, section 3: unbiased for the loss
    smoothed by one perturbation a trajectory, at any length and any roughness.
    """
    return truncated_es(several(problem, windows, windows), windows, sigma, batch)


def truncated_bptt(
    problem: Unroll,
    windows: Any,
    sigma: float = 0.0,
    batch: Callable = jax.vmap,
    shortest: Any = None,
) -> Estimator:
    """Backpropagation through each window, from a carry taken as given.

    With sigma > 0 the reparameterisation gradient of Metz et al. 2019, section 3:
        grad (L(theta + xi) + L(theta - xi)) / 2,
    unbiased for the smoothed loss of the window where that is differentiable; blind, like
    `truncated_es`, to the windows before. With sigma = 0 (a number, not traced) one plain
    run. Its variance is the gradient's own, over data and xi: it grows like the product
    of the unroll's Jacobians, with no bound where they expand (section 2.3).
    """
    return _antithetic(problem, windows, sigma, batch, shortest, gradient="bptt")


def bptt(
    problem: Unroll, windows: int, sigma: float = 0.0, batch: Callable = jax.vmap
) -> Estimator:
    """Backpropagation through whole trajectories, with the memory of one window."""
    return truncated_bptt(several(problem, windows, windows), windows, sigma, batch)


def merged(
    problem: Unroll,
    windows: Any,
    sigma: float,
    batch: Callable = jax.vmap,
    shortest: Any = None,
) -> Estimator:
    """Metz et al. 2019, Algorithm 1: both gradients of the same pairs.

    Estimates {"bptt": ..., "es": ...}: give `population` the `inverse_variance_mean` for
    its combine. The runs of a pair start from one carry, and the positive one's goes on.
    Use `several` for its growing unrolls.
    """
    return _antithetic(problem, windows, sigma, batch, shortest, gradient="both")


def mean_of_particles(grads: Any) -> tuple[Any, dict]:
    """Leaves (N, ...) -> (their mean, {"grad_noise": its standard error, all together})."""
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    leaves = jax.tree.leaves(grads)
    variance = sum(g.var(0, ddof=1).sum() / len(g) for g in leaves)
    return mean, {"grad_noise": jnp.sqrt(variance)}


def mean_of_finite_particles(grads: Any) -> tuple[Any, dict]:
    """As `mean_of_particles`, entry by entry over those that are neither nan nor inf.

    For `truncated_bptt`: a run that has exploded has such a gradient, though its loss be
    clipped. Leaving it out is a bias (none of what explodes is seen); 0 if none is left.
    """

    def one(g):
        finite = jnp.isfinite(g)
        g, count = jnp.where(finite, g, 0), jnp.maximum(finite.sum(0), 1)
        mean = g.sum(0) / count
        off = jnp.where(finite, g - mean[None], 0)
        return mean, (off**2).sum(0) / jnp.maximum(count - 1, 1) / count

    leaves, treedef = jax.tree.flatten(grads)
    means, variances = zip(*map(one, leaves), strict=True)
    noise = jnp.sqrt(sum(v.sum() for v in variances))
    return treedef.unflatten(means), {"grad_noise": noise}


def inverse_variance_mean(
    grads: dict[str, Any], floor: float = 1e-6
) -> tuple[Any, dict]:
    """Each weight's mean over estimators, weighted by 1 / variance (Metz eq. 1).

        g = (g_rp / s_rp^2 + g_es / s_es^2) / (1 / s_rp^2 + 1 / s_es^2)
    for each entry of theta by itself, s^2 the variance (n - 1) over the N particles of
    that entry. grads: {name of estimator: tree of (N, ...)}, N >= 2, of any scale.
    Returns (merged tree, metrics): `grad_noise` of the merged gradient, `<name>_noise` of
    each, and `<name>_weight`, averaged over theta.

    An estimator with a nan or inf among its N values of an entry, or with nothing but exact
    zeros, has weight 0 there; if none is left the entry is 0. floor: this share of an
    estimator's largest value is added to its s, so that nothing is divided by 0.
    Mean and variance come from the same few samples (as in the paper), so by chance the
    worse estimator may show the smaller spread. Of Gaussian samples the variance is that of
    the better one times up to 1.3 at N = 4 and 1.05 from N = 8, without bound at N = 2; the
    ES gradients of single pairs have heavy tails, and need N = 32 to 128 for 1.1 (figure
    metz4). For the same reason `grad_noise` is biased low and, of skewed samples, the
    merged mean toward zero (by 11 to 18 % at N = 8 there).
    """
    names = tuple(grads)

    def merge(*estimators):
        x = jnp.stack(estimators)  # (E, N, *P)
        scale = jnp.abs(x).max(1)  # (E, *P)
        usable = jnp.isfinite(scale) & (scale > 0)
        unit = jnp.where(usable, scale, 1)
        x = jnp.where(usable[:, None], x, 0) / unit[:, None]  # squares cannot overflow
        mean, std = x.mean(1) * unit, x.std(1, ddof=1) * unit
        spread = jnp.maximum(std + floor * unit, jnp.finfo(x.dtype).tiny)
        closeness = jnp.where(usable, 1 / spread, 0)
        best = closeness.max(0, keepdims=True)
        relative = (closeness / jnp.where(best > 0, best, 1)) ** 2
        weight = relative / jnp.maximum(relative.sum(0, keepdims=True), 1)
        error = jnp.where(usable, std, jnp.inf) / x.shape[1] ** 0.5
        noise = jnp.where(usable, weight * std, 0) / x.shape[1] ** 0.5
        return (weight * mean).sum(0), weight, error, noise

    leaves = [jax.tree.leaves(grads[name]) for name in names]
    out = [merge(*entry) for entry in zip(*leaves, strict=True)]
    gradient, weights, errors, noises = zip(*out, strict=True)
    flat = [
        jnp.concatenate([x.reshape(len(names), -1) for x in xs], 1)
        for xs in (weights, errors, noises)
    ]  # (E, size of theta)
    weight, error, noise = flat
    metrics = {"grad_noise": jnp.sqrt((noise**2).sum())}
    for i, name in enumerate(names):
        metrics[f"{name}_weight"] = weight[i].mean()
        metrics[f"{name}_noise"] = _norm(error[i])
    return jax.tree.structure(grads[names[0]]).unflatten(gradient), metrics


def population(
    estimator: Estimator,
    particles: int,
    batch: Callable = jax.vmap,
    combine: Callable = mean_of_particles,
) -> Estimator:
    """N independent particles, staggered evenly over the trajectory, and their mean.

    Particle i starts its first trajectory as if i/N of it were over, with a fresh carry:
    it ends early once, and from then on the N windows of a meta-step lie evenly spread
    over the trajectory (by chance, where lengths are drawn). batch: `jax.vmap`, or
    `sequential`, which is faster on a CPU.
    combine: stacked gradients (N, ...) -> (gradient, metrics), `inverse_variance_mean` for
    `merged`. Metrics gain `grad_noise`, the standard error of the gradient (root of the
    summed variances; nan for one particle).
    """

    def init(key, theta):
        phases = jnp.arange(particles) / particles
        keys = jax.random.split(key, particles)
        return jax.vmap(estimator.init, in_axes=(0, None, 0))(keys, theta, phases)

    def estimate(key, theta, state):
        def one(key, state):
            return estimator.estimate(key, theta, state)

        grads, state, metrics = batch(one)(jax.random.split(key, particles), state)
        grad, more = combine(grads)
        return grad, state, jax.tree.map(jnp.mean, metrics) | more

    return Estimator(init, estimate)


def sequential(f: Callable) -> Callable:
    """Like `jax.vmap(f)`, one after the other: keeps a CPU's caches warm, and a `cond`
    inside stays a branch instead of computing both sides."""
    return lambda *args: jax.lax.map(lambda xs: f(*xs), args)


def only_one(f: Callable) -> Callable:
    """Like `jax.vmap(f)` for a batch of one, without the axis that slows products down."""

    def run(*args):
        out = f(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], out)

    return run


def _antithetic(
    problem: Unroll,
    windows: Any,
    sigma: float,
    batch: Callable,
    shortest: Any = None,
    memory: str = "none",
    gradient: str = "es",
) -> Estimator:
    """What all estimators are: a pair of runs at theta +- xi, window after window.

    memory of earlier perturbations: their "sum", the "one" there is, or "none" (then the
    runs of a pair also start each window from one carry). gradient: "es", "bptt", "both".
    """
    signs = (1,) if gradient == "bptt" and sigma == 0 else (1, -1)
    if len(signs) == 1:
        batch = only_one

    def start(key, theta):
        carry_key, xi_key = jax.random.split(key)
        fresh = problem.fresh(carry_key)
        return ParticleState(
            carry=jax.tree.map(lambda x: jnp.stack([x] * len(signs)), fresh),
            xi=_normal_like(xi_key, theta, sigma),
            xi_sum=jax.tree.map(jnp.zeros_like, theta),
            window=left_out(key),
        )

    def left_out(key):  # a shorter trajectory begins as if its first windows were over
        if shortest is None:
            return jnp.zeros((), jnp.int32)
        uniform = jax.random.uniform(jax.random.fold_in(key, 2))
        length = shortest * ((windows + 1) / shortest) ** uniform
        drawn = jnp.clip(length.astype(jnp.int32), shortest, windows)
        return (windows - drawn).astype(jnp.int32)

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
        pair = jax.tree.map(
            lambda th, x: jnp.stack([th + s * x for s in signs]), theta, xi
        )
        run_keys = jnp.stack(
            [run_key] * len(signs)
        )  # common random numbers, on purpose

        def mean_loss(theta, carry, key):
            carry, losses = problem.run(theta, carry, key)
            return losses.mean(), (carry, losses)

        # The gradient of each run inside of the batch: one tape at a time, and what does
        # not change in an unroll, such as a data set, is not kept once a window.
        if gradient == "es":
            _, (carry, losses) = batch(mean_loss)(pair, state.carry, run_keys)
        else:
            gradient_of = batch(jax.grad(mean_loss, has_aux=True))
            by_run, (carry, losses) = gradient_of(pair, state.carry, run_keys)
        estimates = {}
        if gradient != "es":
            estimates["bptt"] = jax.tree.map(lambda g: g.mean(0), by_run)
        if gradient != "bptt":
            estimates["es"] = perturbed_difference(*losses, credit, sigma)
        if memory == "none":
            carry = jax.tree.map(lambda x: jnp.stack([x[0]] * len(signs)), carry)
        state = ParticleState(
            carry=carry,
            xi=xi,
            xi_sum=credit if memory == "sum" else state.xi_sum,
            window=state.window + problem.windows,
        )
        grad = estimates if gradient == "both" else estimates[gradient]
        return grad, state, {"loss": losses.mean()}

    return Estimator(init, estimate)


def perturbed_difference(
    loss_pos: jax.Array, loss_neg: jax.Array, xi: Any, sigma: float
) -> Any:
    """xi (L(theta+xi) - L(theta-xi)) / (2 sigma^2), the antithetic estimate of one pair.

    The losses are () or (K,), L their mean. Their differences are averaged, since a fused
    multiplication makes the difference of two equal means a rounding error, not 0.
    """
    scale = (loss_pos - loss_neg).mean() / (2 * sigma**2)
    return jax.tree.map(lambda x: x * scale, xi)


def _normal_like(key: jax.Array, tree: Any, sigma: float) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draw = [
        sigma * jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(draw)


def _norm(x: jax.Array) -> jax.Array:
    """Root of the sum of squares, without overflow on the way."""
    largest = jnp.abs(x).max()
    unit = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    return unit * jnp.sqrt(((x / unit) ** 2).sum())
