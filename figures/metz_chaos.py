"""Figures of Metz et al. 2019: why meta-gradients through long unrolls explode.

"Understanding and correcting pathologies in the training of learned optimizers", section
2.3, figure 2 and appendix B. `python -m figures metz2abc`, `metz9`, `metz2d`,
`metz2ef` (figures.py keeps the list). The first two need no data: one weight on a
polynomial. The paper gives no numbers and no settings but those quoted here; every
docstring says what it leaves open.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from data import about_formula
from tasks import TASKS

START = -1.2  # w_0 of the toy
ROOT = 57**0.5
BARRIER, GLOBAL_MINIMUM = (21 - ROOT) / 8, (21 + ROOT) / 8  # 1.681, 3.569; the other: 0
TOY_LIMIT = 40.0  # what a diverged run of the toy counts as; l(w_0) is 31.4
SIGMA = 0.01  # of the variational loss: the paper's, but see each figure for its unit
REACH = 4  # standard deviations after which the Gaussian is cut off
SIZE = 64  # runs side by side in one call of the network


def toy_loss(w: Any) -> Any:
    """Section 2.3: l(w) = (w - 4)(w - 3) w^2, with minima 0 at 0 and -3.12 at 3.569."""
    return (w - 4) * (w - 3) * w**2


def toy_run(learning_rate: Any, momentum: Any, steps: int) -> jax.Array:
    """SGD with heavy-ball momentum from w_0: w_1 ... w_T (T,).

    m_{t+1} = mu m_t + l'(w_t),  w_{t+1} = w_t - alpha m_{t+1},  m_0 = 0.
    """

    def step(carry, _):
        w, m = carry
        m = momentum * m + jax.grad(toy_loss)(w)
        w = w - learning_rate * m
        return (w, m), w

    start = jnp.asarray(START, float), jnp.zeros(())
    return jax.lax.scan(step, start, length=steps)[1]


def loss_and_slope(setting: Callable, steps: int) -> Callable:
    """theta () -> w_1 ... w_T, l(w_1) ... l(w_T) and d l(w_t) / d theta, each (T,).

    setting: theta -> (learning rate, momentum). Forward mode: one pass has every T.
    """

    def losses(theta):
        w = toy_run(*setting(theta), steps)
        loss = toy_loss(w)
        return jnp.where(loss < TOY_LIMIT, loss, TOY_LIMIT), w  # nan as well

    def both(theta):
        one = jnp.ones_like(theta)
        loss, slope, w = jax.jvp(losses, (theta,), (one,), has_aux=True)
        return w, loss, slope

    return both


def smoothed(
    values: np.ndarray, spacing: float, sigma: float = SIGMA
) -> tuple[np.ndarray, np.ndarray]:
    """The variational loss and its slope from values (..., G) on a grid of theta.

    L_s(theta) = E L(theta + s xi),  dL_s/dtheta = E xi L(theta + s xi) / s,  xi ~ N(0, 1),
    the second being what evolution strategies sample. It stays below `slope_bound` however
    steep L is. Returns (..., G - 2 `margin`): the ends of the grid are used up.
    """
    reach = margin(spacing, sigma)
    offset = spacing * np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (offset / sigma) ** 2)
    weight /= weight.sum()
    tilted = weight * offset / (weight * offset**2).sum()  # exact where L is linear

    def along(kernel):
        return np.apply_along_axis(np.correlate, -1, values, kernel, "valid")

    return along(weight), along(tilted)


def margin(spacing: float, sigma: float = SIGMA) -> int:
    """Points of the grid that the Gaussian needs on either side."""
    return round(REACH * sigma / spacing)


def slope_bound(values: np.ndarray, sigma: float = SIGMA) -> np.ndarray:
    """(max L - min L) / (s sqrt(2 pi)) over the last axis; a step function attains it."""
    return np.ptp(values, axis=-1) / (sigma * (2 * np.pi) ** 0.5)


def first_threshold(side: Callable, grid: np.ndarray) -> float:
    """Where side(theta), a bool, first changes: a grid within the grid, to a rounding."""
    sides, low, high = jax.jit(jax.vmap(side)), grid[0], grid[-1]
    while np.nextafter(low, high) < high:
        grid = np.linspace(low, high, len(grid))
        found = np.asarray(sides(grid))
        at = int(np.argmax(found != found[0]))
        if at == 0:
            raise ValueError("every theta of this grid ends in the same minimum")
        low, high = grid[at - 1], grid[at]
    return float(high)


def growth_at_barrier(learning_rate: float, momentum: float) -> float:
    """Factor per step by which distances grow on the barrier, where l'' < 0.

    The larger root of x^2 - (1 + mu - alpha l'') x + mu = 0: what meta-gradients grow by
    while the iterate lingers there. Without momentum that is 1 - alpha l'', the I - theta H
    of the paper's formula.
    """
    curvature = 12 * BARRIER**2 - 42 * BARRIER + 24
    return float(
        max(np.roots([1, -(1 + momentum - learning_rate * curvature), momentum]))
    )


def compute_toy(setting: Callable, grid: np.ndarray, horizons: tuple[int, ...]) -> dict:
    """The final loss of the toy against theta at each horizon T, raw and smoothed.

    setting: theta -> (learning rate, momentum). grid (G,): theta, evenly spaced, the
    Gaussian's `margin` at its ends included. All of it in float64.

    Returns, by horizon, the largest |d l(w_T) / d theta| by autodiff over the grid and over
    points that close in on the first threshold between the minima, which no grid resolves
    (both are lower bounds of the maximum), the largest slope of the smoothed loss and its
    bound; the threshold, and the growth per step that `growth_at_barrier` predicts there.
    curves: theta (G',), w (G', T), loss and its smoothed form (T, G'), and the three
    largest slopes at every T (T,).
    """
    horizons, steps = np.array(horizons), max(horizons)
    spacing = float(grid[1] - grid[0])
    cut = slice(margin(spacing), len(grid) - margin(spacing))
    with jax.enable_x64(True):
        run = jax.jit(jax.vmap(loss_and_slope(setting, steps)))
        threshold = first_threshold(
            lambda theta: toy_run(*setting(theta), 400)[-1] > BARRIER, grid[cut]
        )
        closer = 10.0 ** np.arange(-15, -2, 0.25)
        near = threshold + np.concatenate([-closer, closer])
        w, loss, slope = (np.asarray(x) for x in run(grid))
        near_slope = np.abs(np.asarray(run(near)[2]))
    smooth, smooth_slope = smoothed(loss.T, spacing)
    bound = slope_bound(loss.T)
    learning_rate, momentum = (float(x) for x in setting(threshold))
    largest = {
        "on_grid": np.abs(slope[cut]).max(0),
        "at_threshold": near_slope.max(0),
        "smoothed": np.abs(smooth_slope).max(-1),
    }
    at = horizons - 1
    return {
        "horizon": horizons,
        "sigma": SIGMA,
        **{f"max_slope_{name}": slopes[at] for name, slopes in largest.items()},
        "bound_of_smoothed_slope": bound[at],
        "threshold": threshold,
        "learning_rate_and_momentum_there": np.array([learning_rate, momentum]),
        "growth_per_step_there": growth_at_barrier(learning_rate, momentum),
        "curves": {
            "theta": grid[cut],
            "w": w[cut],
            "loss": loss[cut].T,
            "smoothed_loss": smooth,
            "largest": largest,
        },
    }


def grid_for(low: float, high: float, spacing: float) -> np.ndarray:
    """low ... high and, beyond both, the Gaussian's margin."""
    reach, points = margin(spacing), round((high - low) / spacing)
    return low + spacing * np.arange(-reach, points + 1 + reach)


def compute_2abc(spacing: float, learning_rate: float = 0.01) -> dict:
    """Figure 2a-c: theta is the momentum, from .4 to .96; sigma in units of momentum.

    The paper does not give the learning rate. Any from .001 to .015 shows what it tells;
    .01 has the first threshold at a momentum of .804 and room beyond it for another.
    """
    grid = grid_for(0.4, 0.96, spacing)
    return compute_toy(lambda mu: (learning_rate, mu), grid, (5, 10, 20, 40, 100))


def compute_9(spacing: float, momentum: float = 0.8) -> dict:
    """Figure 9: theta is ln(learning rate); with momentum (top) and without (bottom).

    The paper gives neither the momentum nor the learning rates. With .8 and rates up to
    .056, and with 0 and up to .095, low rates end in the first minimum, higher ones in the
    second, the highest diverge, as it says. sigma is one of ln(learning rate), for a rate
    cannot go below 0. Each array is (2, ...).
    """
    rows = [
        compute_toy(
            lambda log_rate, mu=mu: (jnp.exp(log_rate), mu),
            grid_for(np.log(low), np.log(high), spacing),
            (5, 10, 20, 40, 60),
        )
        for mu, low, high in ((momentum, 0.002, 0.056), (0.0, 0.01, 0.095))
    ]
    numbers = {k: np.stack([row[k] for row in rows]) for k in rows[0] if k != "curves"}
    return numbers | {"curves": [row["curves"] for row in rows]}


def _colors(plt: Any, count: int) -> np.ndarray:
    """Low yellow to high purple, as the paper has it."""
    return plt.get_cmap("viridis_r")(np.linspace(0, 1, count))


def _draw_toy(
    axes: Any, plt: Any, row: dict, name: str, transform: Callable = lambda x: x
) -> None:
    """Four panels: the loss, w over time, the final loss, the largest slopes against T."""
    curves, horizons = row["curves"], row["horizon"]
    theta, steps = curves["theta"], curves["w"].shape[1]
    surface, time, final, slopes = axes
    w = np.insert(curves["w"], 0, START, axis=1)
    inside = np.maximum.accumulate(np.abs(w), 1) < 10
    w = np.where(inside, w, np.nan)  # squares of a diverged w overflow
    x = np.linspace(-1.3, 4.7, 300)
    picks = np.linspace(0, len(theta) - 1, 5).astype(int)
    for i, (pick, color) in enumerate(zip(picks, _colors(plt, 5), strict=True)):
        lift, label = 12 * i, f"{name} {transform(theta[pick]):.2g}"
        surface.plot(x, toy_loss(x) + lift, "0.8", lw=1)
        surface.plot(
            w[pick],
            toy_loss(w[pick]) + lift,
            "o-",
            color=color,
            ms=3,
            lw=0.6,
            label=label,
        )
        surface.plot(START, toy_loss(START) + lift, "k*", ms=8)
    surface.set(xlabel="w", ylabel="l(w), each run's lifted by 12 more")
    surface.set(xlim=(-1.6, 5.2), ylim=(-6, 150))
    many = np.linspace(0, len(theta) - 1, 30).astype(int)
    for path, color in zip(w[many], _colors(plt, 30), strict=True):
        time.plot(path, color=color, lw=0.6)
    for level in (0, BARRIER, GLOBAL_MINIMUM):
        time.axhline(level, color="k", ls=":" if level == BARRIER else "-", lw=0.5)
    time.set(xlabel="step t", ylabel="w_t", ylim=(-1.5, 5.5))
    for horizon, color in zip(horizons, _colors(plt, len(horizons)), strict=True):
        loss = curves["loss"][horizon - 1]
        final.plot(transform(theta), loss, color=color, lw=0.8, label=f"T = {horizon}")
    label = f"T = {steps}, smoothed"
    final.plot(transform(theta), curves["smoothed_loss"][-1], "C3--", lw=1, label=label)
    final.set(xlabel=name, ylabel="l(w_T)", ylim=(-4.5, 20))
    t, largest = np.arange(1, steps + 1), curves["largest"]
    slopes.plot(t, largest["on_grid"], "C7", lw=1.2, label="on the grid")
    slopes.plot(
        t, largest["at_threshold"], "C0", lw=1.2, label="at the first threshold"
    )
    slopes.plot(t, largest["smoothed"], "C3--", lw=1.2, label="smoothed")
    growth, half = row["growth_per_step_there"], steps // 2
    predicted = growth ** (t - half) * largest["at_threshold"][half - 1]
    slopes.plot(t, predicted, "k:", lw=1, label=f"growth by {growth:.3f} per step")
    slopes.set(xlabel="T", ylabel="largest slope of l(w_T)", yscale="log")
    slopes.set_ylim(bottom=0.1)
    for axis in (surface, final, slopes):
        axis.legend(fontsize=7)


def plot_2abc(result: dict, plt: Any) -> Any:
    """Figure 2a-c, and beside it how the largest slopes grow."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.3), layout="constrained")
    _draw_toy(axes, plt, result, "momentum")
    axes[3].set_ylabel("largest |d l(w_T) / d momentum|")
    return figure


def plot_9(result: dict, plt: Any) -> Any:
    """Figure 9: a row with momentum and one without; theta = ln(learning rate)."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 8.4), layout="constrained")
    for i, row in enumerate(axes):
        one = {key: values[i] for key, values in result.items()}
        _draw_toy(row, plt, one, "learning rate", np.exp)
        momentum = one["learning_rate_and_momentum_there"][1]
        row[0].set_title(f"momentum {momentum:g}")
        row[3].set_ylabel("largest |d l(w_T) / d ln(learning rate)|")
    return figure


class Fixed(NamedTuple):
    """All that is random in a run, drawn once: only the optimizer's settings vary."""

    params: Any  # where the network starts
    batches: Any  # leaves (T, ...)
    valid: Any  # one batch of held-out examples
    key: Any  # for the loss; dropout, unused by most


def fix(task: Any, key: jax.Array, steps: int) -> Fixed:
    init_key, batch_key, valid_key, loss_key = jax.random.split(key, 4)
    batches = jax.vmap(lambda k: task.batch(k, "train"))(
        jax.random.split(batch_key, steps)
    )
    valid = task.batch(valid_key, "valid")
    return Fixed(task.init(init_key), batches, valid, loss_key)


def train(
    loss: Callable, optimizer: optax.GradientTransformation, fixed: Fixed
) -> tuple[jax.Array, jax.Array]:
    """Losses (T,), each batch's before its update, and flat parameters (T, P) after it."""

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, fixed.key, batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, ravel_pytree(params)[0])

    start = fixed.params, optimizer.init(fixed.params)
    return jax.lax.scan(step, start, fixed.batches)[1]


def side_by_side(run: Callable) -> Callable:
    """Jitted: run, a function of scalars, over arrays of settings (n,), SIZE at a time.

    Side by side, the first layer is one large product for all runs; all at once, the
    parameters of every run would leave the cache. Filled up with repeats, so that there
    is no smaller remainder to compile once more.
    """

    @jax.jit
    def over(*settings):
        n = len(settings[0])
        groups = -(-n // SIZE)
        index = np.arange(groups * -(-n // groups)).reshape(groups, -1) % n
        out = jax.lax.map(lambda i: jax.vmap(run)(*(x[i] for x in settings)), index)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], out)

    return over


def compute_2d(
    task: Any, key: jax.Array, rates: int, steps: int, iterations: tuple[int, ...]
) -> dict:
    """Figure 2d: Adam at learning rates log-spaced from .1469 to .1484, all else fixed.

    The paper: a 2-layer ReLU MLP, 40 iterations, 100 rates. It leaves open the data, the
    width, the batches, Adam's other settings (here 0.9, 0.999, 1e-8) and the directions
    (here two random orthonormal ones).

    Returns, by iteration: the root mean square distance of the parameters from their mean
    over the rates, by the standard deviation of ln(rate); the distance between neighboring
    rates by their difference in ln(rate), median and largest; the distance travelled from
    the start, which is what the first would be if parameters were just proportional to the
    rate. Also the loss (nats) of one held-out batch at the end, for each rate. curves:
    projected paths (rates, T + 1, 2), losses (rates, T).
    """
    fixed = fix(task, key, steps)
    log_rates = np.linspace(np.log(0.1469), np.log(0.1484), rates)
    flat, unravel = ravel_pytree(fixed.params)
    start = np.asarray(flat, np.float64)

    def run(log_rate):
        losses, path = train(task.loss, optax.adam(jnp.exp(log_rate)), fixed)
        return losses, path, task.loss(unravel(path[-1]), fixed.key, fixed.valid)

    losses, path, final = (
        np.asarray(x, np.float64) for x in side_by_side(run)(jnp.asarray(log_rates))
    )
    path = np.insert(path, 0, start, axis=1)  # (rates, T + 1, P)
    directions = np.random.default_rng(0).normal(size=(len(start), 2))
    spread = ((path - path.mean(0)) ** 2).sum(-1).mean(0) ** 0.5 / log_rates.std()
    apart = np.linalg.norm(np.diff(path, axis=0), axis=-1) / np.diff(log_rates)[0]
    travelled = np.linalg.norm(path - path[:, :1], axis=-1).mean(0)
    at = np.array(iterations)
    return {
        "iteration": at,
        "spread_over_log_rate": spread[at],
        "neighbors_over_log_rate_median": np.median(apart, 0)[at],
        "neighbors_over_log_rate_max": apart.max(0)[at],
        "travelled": travelled[at],
        "final_valid_loss": final,
        "curves": {
            "log_rate": log_rates,
            "path": (path - start) @ np.linalg.qr(directions)[0],
            "loss": losses,
            "spread": spread,
            "median": np.median(apart, 0),
            "travelled": travelled,
        },
    }


def plot_2d(result: dict, plt: Any) -> Any:
    """Figure 2d: paths, their ends, losses, and how the sensitivity grows with the step."""
    curves = result["curves"]
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.3), layout="constrained")
    paths, ends, losses, sensitivity = axes
    colors = _colors(plt, len(curves["path"]))
    for path, loss, color in zip(curves["path"], curves["loss"], colors, strict=True):
        paths.plot(*path.T, color=color, lw=0.5)
        losses.plot(np.arange(1, len(loss) + 1), loss, color=color, lw=0.5)
    paths.plot(0, 0, "k*", ms=11)
    paths.set(
        xlabel="random direction 1", ylabel="random direction 2", title="parameters"
    )
    rates = np.exp(curves["log_rate"])
    ends.scatter(rates, result["final_valid_loss"], c=colors, s=10)
    ends.set(xlabel="learning rate", ylabel="held-out loss at the end (nats)")
    ends.set_xticks([0.147, 0.1475, 0.148, 0.1485])
    losses.set(xlabel="iteration", ylabel="training loss (nats)")
    t = np.arange(1, len(curves["spread"]))
    sensitivity.plot(t, curves["median"][1:], "C3", label="neighboring rates, median")
    sensitivity.plot(t, curves["spread"][1:], "C0", label="all rates, root mean square")
    sensitivity.plot(t, curves["travelled"][1:], "k:", label="distance travelled")
    sensitivity.set(
        xlabel="iteration",
        ylabel="|change of parameters| / |change of ln(rate)|",
        yscale="log",
    )
    sensitivity.legend(fontsize=7)
    return figure


class Slice(NamedTuple):
    """Where figures 2e and 2f cut the outer loss; theta = (ln rate, ln(1 - momentum))."""

    line: tuple  # lowest and highest learning rate of 2e
    line_spacing: float
    square_spacing: float
    side: int  # points along a side of 2f, margins left out
    center: tuple = (1.2, 0.9)  # learning rate and momentum; 2e keeps this momentum


def outer_loss(task: Any, fixed: Fixed) -> Callable:
    """(ln rate, ln(1 - momentum)) -> mean loss over the first T steps, for every T (T,).

    Each step's loss counts at most the task's limit, and so does nan, as in meta-training.
    """

    def losses(log_rate, log_rest):
        optimizer = optax.sgd(jnp.exp(log_rate), 1 - jnp.exp(log_rest))
        loss, _ = train(task.loss, optimizer, fixed)
        loss = jnp.where(loss < task.loss_limit, loss, task.loss_limit)
        return loss.cumsum() / jnp.arange(1, len(loss) + 1)

    return losses


def compute_2ef(
    task: Any, key: jax.Array, horizons: tuple[int, ...], cut: Slice
) -> dict:
    """Figures 2e, 2f: slices of the outer loss of SGD with momentum, in theta.

    Deviation: the paper slices its learned optimizer, along its gradient, and shows the
    average validation loss at 5, 10 and 20 unrolls (2e); here theta is two numbers of a
    hand-designed one, and the loss that of training. The jitter is not rounding: float64
    moves the values at T = 40 by 1e-7 in the median (.01 at most), neighbors differ by .2.

    The gradient of a ReLU network jumps, so from the third step's loss on the outer loss
    has true steps, which autodiff cannot see (and its meta-gradient leaves out): that is
    why the smoothed slope can exceed the largest one by autodiff at small T.

    Returns, by horizon, for 2e: |d loss / d ln rate| by autodiff, largest and median over
    the line; the largest slope of the smoothed loss with its bound; the total variation of
    both (on this grid: a finer one finds more). For 2f the norm of the gradient by
    differences over the grid, largest and mean, raw and smoothed. sigma in units of theta.
    """
    horizons, at = np.array(horizons), np.array(horizons) - 1
    loss = outer_loss(task, fix(task, key, max(horizons)))
    rate, momentum = cut.center
    rest = np.log(1 - momentum)
    log_rates = grid_for(*np.log(cut.line), cut.line_spacing)
    reach = margin(cut.line_spacing)
    inner = slice(reach, len(log_rates) - reach)

    def with_slope(log_rate):
        fixed_rest = partial(loss, log_rest=jnp.asarray(rest, log_rate.dtype))
        return jax.jvp(fixed_rest, (log_rate,), (jnp.ones_like(log_rate),))

    line, slope = (
        np.asarray(x, np.float64)[:, at].T
        for x in side_by_side(with_slope)(jnp.asarray(log_rates))
    )  # (horizons, G)
    smooth, smooth_slope = smoothed(line, cut.line_spacing)
    half = cut.square_spacing * (cut.side - 1) / 2
    offset = grid_for(-half, half, cut.square_spacing)
    x, y = (c.ravel() for c in np.meshgrid(np.log(rate) + offset, rest + offset))
    square = side_by_side(loss)(jnp.asarray(x), jnp.asarray(y))
    square = np.asarray(square, np.float64)[:, at].T
    square = square.reshape(len(at), len(offset), len(offset))  # (horizons, rest, rate)
    smooth_square, norm, smooth_norm = gradient_norms(square, cut.square_spacing)
    reach = margin(cut.square_spacing)
    slope = np.abs(slope[:, inner])
    return {
        "horizon": horizons,
        "sigma": SIGMA,
        "max_slope": slope.max(1),
        "median_slope": np.median(slope, 1),
        "max_slope_smoothed": np.abs(smooth_slope).max(1),
        "bound_of_smoothed_slope": slope_bound(line),
        "total_variation": np.abs(np.diff(line[:, inner])).sum(1),
        "total_variation_smoothed": np.abs(np.diff(smooth)).sum(1),
        "square_max_gradient": norm.max((1, 2)),
        "square_max_gradient_smoothed": smooth_norm.max((1, 2)),
        "square_mean_gradient": norm.mean((1, 2)),
        "square_mean_gradient_smoothed": smooth_norm.mean((1, 2)),
        "curves": {
            "rate": np.exp(log_rates[inner]),
            "loss": line[:, inner],
            "smoothed": smooth,
            "slope": slope,
            "square": square[:, reach:-reach, reach:-reach],
            "smoothed_square": smooth_square,
            "square_rate": rate * np.exp(offset[[reach, -reach - 1]]),
            "square_rest": np.exp(rest + offset[[reach, -reach - 1]]),
        },
    }


def gradient_norms(
    square: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(smoothed values, |gradient|, |gradient of the smoothed|) of values (..., G, G).

    The second by differences, the third by the Gaussian; all without the margins.
    """
    reach = margin(spacing)
    inner = slice(reach, square.shape[-1] - reach)
    raw = np.gradient(square, spacing, axis=(-2, -1))

    def turned(values):
        return np.swapaxes(values, -1, -2)

    mean, slope = smoothed(square, spacing)
    across = [
        turned(smoothed(turned(values), spacing)[i])
        for values, i in ((mean, 0), (mean, 1), (slope, 0))
    ]
    norm = np.hypot(*raw)[..., inner, inner]
    return across[0], norm, np.hypot(across[1], across[2])


def plot_2ef(result: dict, plt: Any) -> Any:
    """Top: figure 2e, its slopes, and its smoothed form. Below: 2f, raw and smoothed."""
    curves, horizons = result["curves"], result["horizon"]
    count, rates = len(horizons), curves["rate"]
    figure = plt.figure(figsize=(4.2 * count, 12), layout="constrained")
    top, below = figure.subfigures(2, 1, height_ratios=(1, 1.9))
    loss, smooth, slopes = top.subplots(1, 3)
    loss.sharey(smooth)
    for i, color in enumerate(_colors(plt, count)):
        label = f"T = {horizons[i]}"
        loss.plot(rates, curves["loss"][i], color=color, lw=0.7, label=label)
        smooth.plot(rates, curves["smoothed"][i], color=color, lw=1)
        slopes.plot(rates, curves["slope"][i], ".", color=color, ms=2)
    loss.set(title="2e: outer loss (nats)")
    smooth.set(title=f"2e, smoothed with sigma {result['sigma']:g}")
    slopes.set(title="2e: |d loss / d ln rate| by autodiff", yscale="log")
    for axis in (loss, smooth, slopes):
        axis.set(xlabel="learning rate")
    loss.legend(fontsize=8)
    axes = below.subplots(2, count, sharex=True, sharey=True)
    for i, column in enumerate(axes.T):
        pair = curves["square"][i], curves["smoothed_square"][i]
        low, high = pair[0].min(), np.quantile(pair[0], 0.999)
        for axis, values in zip(column, pair, strict=True):
            extent = (*curves["square_rate"], *curves["square_rest"])
            drawn = axis.pcolormesh(
                np.geomspace(*extent[:2], values.shape[1]),
                np.geomspace(*extent[2:], values.shape[0]),
                values,
                vmin=low,
                vmax=high,
            )
        column[0].set_title(f"2f: T = {horizons[i]}")
        column[1].set_title("smoothed")
        column[1].set_xlabel("learning rate")
        below.colorbar(drawn, ax=column, location="bottom", label="outer loss (nats)")
    for axis in axes[:, 0]:
        axis.set_ylabel("1 - momentum")
    return figure


TOY = about_formula("(w - 4)(w - 3) w^2, drawn from its formula")


def _figure_2abc(args: argparse.Namespace) -> tuple[dict, str, dict]:
    result = compute_2abc(1e-3 if args.quick else 1e-4)
    return result, "Metz et al. 2019, figure 2a-c: one weight, learning rate 0.01", TOY


def _figure_9(args: argparse.Namespace) -> tuple[dict, str, dict]:
    result = compute_9(1e-3 if args.quick else 2e-4)
    return result, "Metz et al. 2019, figure 9: one weight, learning rates", TOY


def _network(args: argparse.Namespace) -> tuple[Any, dict]:
    spec = TASKS["fmnist_small"]
    data, about = spec.load(args.data, args.data_dir)
    return spec.build(data, jax.random.key(0)), about


def _figure_2d(args: argparse.Namespace) -> tuple[dict, str, dict]:
    task, about = _network(args)
    rates = 25 if args.quick else 100
    result = compute_2d(task, jax.random.key(1), rates, 40, (5, 10, 20, 40))
    title = f"Metz et al. 2019, figure 2d: {rates} learning rates, {about['dataset']}"
    return result, title, about


def _figure_2ef(args: argparse.Namespace) -> tuple[dict, str, dict]:
    task, about = _network(args)
    wide = Slice((0.3, 2.0), 0.0015, 0.005, 64)
    small = Slice((0.9, 1.3), 0.003, 0.01, 16)
    horizons, cut = ((5, 10, 20), small) if args.quick else ((5, 10, 20, 40), wide)
    result = compute_2ef(task, jax.random.key(1), horizons, cut)
    title = f"Metz et al. 2019, figure 2e, f: momentum SGD, {about['dataset']}"
    return result, title, about


FIGURES = {
    "metz2abc": (_figure_2abc, plot_2abc),
    "metz9": (_figure_9, plot_9),
    "metz2d": (_figure_2d, plot_2d),
    "metz2ef": (_figure_2ef, plot_2ef),
}
