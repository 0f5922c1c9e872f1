"""Figures of Metz et al. 2019: why meta-gradients through long unrolls explode.

"Understanding and correcting pathologies in the training of learned optimizers", figures
2 and 9: metz2abc, metz9 (one weight on a polynomial), metz2d, metz2ef (a network). The
paper gives no settings but those quoted here; each docstring says what is left open.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib import colormaps
from matplotlib.figure import Figure

from baselines import LEGEND
from data import about_formula
from estimators import clip_loss
from tasks import TASKS

START = -1.2  # w_0 of the toy
ROOT = 57**0.5
BARRIER, GLOBAL_MINIMUM = (21 - ROOT) / 8, (21 + ROOT) / 8  # 1.681, 3.569; the other: 0
TOY_LIMIT = 40.0  # what a diverged run of the toy counts as; l(w_0) is 31.4
SIGMA = 0.01  # of the variational loss: the paper's, but see each figure for its unit
CENTER = np.log([1.2, 1 - 0.9])  # ln(rate), ln(1 - momentum) of 2f; the latter of 2e


def grid_for(low: float, high: float, spacing: float) -> tuple[np.ndarray, slice]:
    """low ... high with 4 sigma more at both ends, and the slice that leaves these out."""
    reach, points = round(4 * SIGMA / spacing), round((high - low) / spacing)
    return low + spacing * np.arange(-reach, points + 1 + reach), slice(reach, -reach)


def smoothed(values: np.ndarray, spacing: float, axis: int = -1) -> tuple:
    """The variational loss and its slope from values (..., G) on a grid of theta.

        L_s(theta) = E L(theta + s xi),  dL_s/dtheta = E xi L(theta + s xi) / s,
    with xi ~ N(0, 1), cut off at 4, and s = SIGMA. Evolution strategies sample the second.
    It stays below `slope_bound` however steep L is. Both lack the ends of the grid.
    """
    reach = round(4 * SIGMA / spacing)
    offset = spacing * np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (offset / SIGMA) ** 2)
    weight /= weight.sum()
    tilted = weight * offset / (weight * offset**2).sum()  # exact where L is linear
    along = partial(np.apply_along_axis, np.correlate, axis, values)
    return along(weight, "valid"), along(tilted, "valid")


def slope_bound(values: np.ndarray) -> np.ndarray:
    """(max L - min L) / (s sqrt(2 pi)) over the last axis; a step function attains it."""
    return np.ptp(values, axis=-1) / (SIGMA * (2 * np.pi) ** 0.5)


def draw(axis: Any, x: Any, lines: np.ndarray, style: str = "-", **options) -> None:
    """lines (n, ...) against x, from low yellow to high purple, as the paper has it."""
    axis.set_prop_cycle(color=colormaps["viridis_r"](np.linspace(0, 1, len(lines))))
    axis.plot(x, lines.T, style, **({"lw": 0.7} | options))


# --- figures 2a-c and 9: one weight
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
    """theta () -> d l(w_t) / d theta (T,), and (w_t (T,), l(w_t) (T,)), t from 1.

    setting: theta -> (learning rate, momentum). Forward mode: one pass has every T.
    """

    def losses(theta):
        w = toy_run(*setting(theta), steps)
        loss = toy_loss(w)
        loss = jnp.where(loss < TOY_LIMIT, loss, TOY_LIMIT)  # nan as well
        return loss, (w, loss)

    return jax.jacfwd(losses, has_aux=True)


def first_threshold(setting: Callable, grid: np.ndarray) -> float:
    """The first theta of a run past the barrier: a grid within the grid, to a rounding."""
    past = jax.jit(jax.vmap(lambda theta: toy_run(*setting(theta), 400)[-1] > BARRIER))
    while np.nextafter(grid[0], grid[-1]) < grid[-1]:
        at = int(np.argmax(past(grid)))
        grid = np.linspace(grid[at - 1], grid[at], len(grid))
    return float(grid[-1])


def growth_at_barrier(learning_rate: float, momentum: float) -> float:
    """Factor per step by which distances grow on the barrier, where l'' < 0.

    The larger root of x^2 - (1 + mu - alpha l'') x + mu = 0. Meta-gradients grow by it
    while the iterate lingers there. Without momentum it is the paper's I - theta H.
    """
    curvature = 12 * BARRIER**2 - 42 * BARRIER + 24
    middle = 1 + momentum - learning_rate * curvature
    return float(max(np.roots([1, -middle, momentum])))


def compute_toy(setting: Callable, ends: Any, spacing: float, horizons: list) -> dict:
    """The final loss of the toy against theta at each horizon T, raw and smoothed.

    setting: theta -> (learning rate, momentum). ends: the least and the largest theta.
    The first threshold lies between runs that end in different minima. No grid resolves
    the largest |d l(w_T) / d theta| near it. So it stands beside that on the grid, by
    autodiff both. curves: theta (G,), w (G, T), the losses (T, G), the slopes (T,).
    """
    grid, inner = grid_for(*ends, spacing)
    with jax.enable_x64(True):
        run = jax.jit(jax.vmap(loss_and_slope(setting, max(horizons))))
        threshold = first_threshold(setting, grid[inner])
        closer = 10.0 ** np.arange(-15, -2, 0.25)
        near, _ = run(threshold + np.concatenate([-closer, closer]))
        slope, (w, loss) = jax.tree.map(np.asarray, run(grid))
    smooth, smooth_slope = smoothed(loss.T, spacing)
    largest = {
        "max_slope_on_grid": np.abs(slope[inner]).max(0),
        "max_slope_at_threshold": np.abs(near).max(0),
        "max_slope_smoothed": np.abs(smooth_slope).max(-1),
        "bound_of_smoothed_slope": slope_bound(loss.T),
    }
    there = [float(x) for x in setting(threshold)]
    curves = {"theta": grid[inner], "w": w[inner], "loss": loss[inner].T}
    return {
        "horizon": np.array(horizons),
        "sigma": SIGMA,
        **{name: slopes[np.array(horizons) - 1] for name, slopes in largest.items()},
        "threshold": threshold,
        "learning_rate_and_momentum_there": there,
        "growth_per_step_there": growth_at_barrier(*there),
        "curves": curves | {"smoothed": smooth} | largest,
    }


def compute_2abc(spacing: float) -> list[dict]:
    """Figure 2a-c: theta is the momentum, from .4 to .96; sigma in units of momentum.

    The paper does not give the learning rate. Any from .001 to .015 shows what it tells;
    .01 has the first threshold at a momentum of .804 and room beyond it for another.
    """
    horizons = (5, 10, 20, 40, 100)
    return [compute_toy(lambda mu: (0.01, mu), (0.4, 0.96), spacing, horizons)]


def compute_9(spacing: float) -> list[dict]:
    """Figure 9: theta is ln(learning rate); with momentum (top) and without (bottom).

    The paper gives neither the momentum nor the learning rates. With .8 and rates up to
    .056, and with 0 and up to .095, low rates end in the first minimum, higher ones in the
    second, and the highest diverge. sigma is one of ln(rate): a rate cannot go below 0.
    """

    def row(momentum, rates):
        setting, ends = lambda x: (jnp.exp(x), momentum), np.log(rates)
        return compute_toy(setting, ends, spacing, (5, 10, 20, 40, 60))

    return [row(0.8, (0.002, 0.056)), row(0.0, (0.01, 0.095))]


def plot_toy(figure, result, theta="momentum", name="momentum", decode=np.asarray):
    """Two rows each: the loss, w over time, the final loss, the largest slopes against T.

    theta: what the slopes are by. name, decode: what to show in its place.
    """
    rows = result["curves"]
    axes = figure.subplots(2 * len(rows), 2)
    for row, panels in zip(rows, axes.reshape(-1, 4), strict=True):
        _draw_toy(panels, row, theta, name, decode(row["curves"]["theta"]))


def _draw_toy(panels: Any, row: dict, theta: str, name: str, x: np.ndarray) -> None:
    surface, time, final, slopes = panels
    curves, horizons, last = row["curves"], row["horizon"], row["horizon"][-1]
    w = np.insert(curves["w"], 0, START, axis=1)
    w[np.maximum.accumulate(np.abs(w), 1) > 10] = np.nan  # it diverges
    few, many = (np.linspace(0, len(x) - 1, n).astype(int) for n in (5, 30))

    line, lift = np.linspace(-1.3, 4.7, 300), 12 * np.arange(5)[:, None]
    surface.plot(line, (toy_loss(line) + lift).T, color="0.8", lw=1)
    labels = [f"{name} {x[i]:.2g}" for i in few]
    draw(surface, w[few].T, toy_loss(w[few]) + lift, "o-", label=labels, ms=3)
    surface.plot(0 * lift + START, toy_loss(START) + lift, "k*", ms=8)
    surface.set(xlabel="weight w", ylabel="loss l(w), lifted by 12 a run")
    surface.set(xlim=(-1.6, 5.2), ylim=(-6, 150))

    draw(time, np.arange(last + 1), w[many])
    time.hlines([0, GLOBAL_MINIMUM, BARRIER], 0, last, "k", ["-", "-", ":"], lw=0.5)
    time.set(xlabel="inner steps t", ylabel="weight w_t", ylim=(-1.5, 5.5))

    labels = [f"T = {horizon}" for horizon in horizons]
    draw(final, x, curves["loss"][horizons - 1], label=labels)
    final.plot(x, curves["smoothed"][-1], "C3--", lw=1, label=f"{labels[-1]}, smoothed")
    final.set(xlabel=name, ylabel="final loss l(w_T)", ylim=(-4.5, 20))
    rate, momentum = row["learning_rate_and_momentum_there"]
    final.set_title(f"first threshold: rate {rate:.3g}, momentum {momentum:.3g}")

    near, growth = curves["max_slope_at_threshold"], row["growth_per_step_there"]
    t, half = np.arange(1, last + 1), last // 2
    predicted = growth ** (t - half) * near[half - 1]
    slopes.plot(t, curves["max_slope_on_grid"], "C7", label="on the grid")
    slopes.plot(t, near, "C0", label="at the first threshold")
    slopes.plot(t, curves["max_slope_smoothed"], "C3--", label="smoothed")
    slopes.plot(t, predicted, "k:", label=f"growth by {growth:.3f} per step")
    slopes.set(xlabel="horizon T (inner steps)", yscale="log")
    slopes.set(ylabel=f"largest |d l(w_T) / d {theta}|", ylim=(0.1, None))
    final.legend(loc="upper left")
    for axis in (surface, slopes):
        axis.legend()


# --- figures 2d-f: a network
def trainer(task: Any, key: jax.Array, steps: int) -> tuple[jax.Array, Callable]:
    """A network with all that is random drawn once: only the optimizer varies.

    Returns its first parameters (P,), and train: optimizer -> losses (T,), each batch's
    before its update, the parameters (T, P) after it, and at the end the loss of a batch of
    held-out examples. Losses in nats.
    """
    init_key, batch_key, valid_key, loss_key = jax.random.split(key, 4)
    start, unravel = ravel_pytree(task.init(init_key))
    batch_keys = jax.random.split(batch_key, steps)
    batches = jax.vmap(lambda key: task.batch(key, "train"))(batch_keys)
    valid = task.batch(valid_key, "valid")

    def loss(params, batch):
        return task.loss(unravel(params), loss_key, batch)

    def train(optimizer):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            params = params + updates
            return (params, state), (value, params)

        carry = start, optimizer.init(start)
        (last, _), (losses, path) = jax.lax.scan(step, carry, batches)
        return losses, path, loss(last, valid)

    return start, train


def side_by_side(run: Callable, *settings: np.ndarray) -> Any:
    """run, a function of scalars, over arrays of settings (n,), in float64.

    50 at a time: the first layer is one large product for them, and they fit in the cache.
    """
    over = jax.jit(partial(jax.lax.map, lambda x: run(*x), batch_size=50))
    out = over([jnp.asarray(x) for x in settings])
    return jax.tree.map(lambda x: np.asarray(x, float), out)


def compute_2d(task: Any, key: jax.Array, rates: int, iterations: list) -> dict:
    """Figure 2d: Adam at learning rates log-spaced from .1469 to .1484, all else fixed.

    The paper: a 2-layer ReLU MLP, 40 iterations, 100 rates. It leaves open the data, the
    width, the batches, Adam's other settings (here 0.9, 0.999, 1e-8) and the directions
    (here two random orthonormal ones).

    Returns, by iteration, distances of parameters by differences of ln(rate): from their
    mean over the rates (root mean square), and between neighboring rates (median). The
    first would equal the distance travelled if that were proportional to the rate. Losses
    are in nats. curves: projected paths (rates, T + 1, 2), losses (rates, T), and the
    three distances (T + 1,).
    """
    start, train = trainer(task, key, max(iterations))
    log_rates = np.linspace(np.log(0.1469), np.log(0.1484), rates)
    runs = side_by_side(lambda x: train(optax.adam(jnp.exp(x))), log_rates)
    losses, path, final = runs
    path = np.insert(path, 0, start, axis=1) - np.asarray(start, float)
    apart = np.linalg.norm(np.diff(path, axis=0), axis=-1) / np.diff(log_rates)[0]
    spread = ((path - path.mean(0)) ** 2).sum(-1).mean(0) ** 0.5
    sensitivity = {
        "spread_over_log_rate": spread / log_rates.std(),
        "neighbors_over_log_rate_median": np.median(apart, 0),
        "travelled": np.linalg.norm(path, axis=-1).mean(0),
    }
    directions = np.random.default_rng(0).normal(size=(path.shape[-1], 2))
    path = path @ np.linalg.qr(directions)[0]
    return {
        "iteration": iterations,
        **{name: values[iterations] for name, values in sensitivity.items()},
        "final_valid_loss": final,
        "curves": {"log_rate": log_rates, "path": path, "loss": losses} | sensitivity,
    }


def plot_2d(figure: Figure, result: dict) -> None:
    """Figure 2d: paths, their ends, losses, and how the sensitivity grows with the step."""
    paths, ends, losses, sensitivity = figure.subplots(2, 2).ravel()
    curves, rates = result["curves"], np.exp(result["curves"]["log_rate"])
    t = np.arange(1, curves["loss"].shape[1] + 1)
    draw(paths, curves["path"][..., 0].T, curves["path"][..., 1])
    paths.plot(0, 0, "k*", ms=11)
    paths.set(xlabel="parameters, random direction 1", ylabel="random direction 2")
    ends.scatter(rates, result["final_valid_loss"], c=rates, s=10, cmap="viridis_r")
    ends.set(xlabel="learning rate", ylabel="held-out loss at the end (nats)")
    ends.set_xticks([0.147, 0.1475, 0.148, 0.1485])
    draw(losses, t, curves["loss"])
    losses.set(xlabel="inner steps", ylabel="training loss (nats)")
    for name, style, label in (
        ("neighbors_over_log_rate_median", "C3", "neighboring rates, median"),
        ("spread_over_log_rate", "C0", "all rates, root mean square"),
        ("travelled", "k:", "distance travelled"),
    ):
        sensitivity.plot(t, curves[name][1:], style, label=label)
    sensitivity.set(xlabel="inner steps", yscale="log")
    sensitivity.set_ylabel("|change of parameters|\n/ |change of ln(rate)|")
    sensitivity.legend()


def outer_loss(task: Any, key: jax.Array, steps: int) -> Callable:
    """(ln rate, ln(1 - momentum)) -> mean loss over the first T steps, for every T (T,).

    Each step's loss counts at most the task's limit, and so does nan, as in meta-training.
    """
    _, train = trainer(task, key, steps)

    def losses(log_rate, log_rest=CENTER[1]):
        loss, *_ = train(optax.sgd(jnp.exp(log_rate), 1 - jnp.exp(log_rest)))
        return clip_loss(loss, task.loss_limit).cumsum() / jnp.arange(1, steps + 1)

    return losses


def compute_2ef(task: Any, key: jax.Array, horizons: list, line: tuple, side: tuple):
    """Figures 2e, 2f: slices of the outer loss of SGD with momentum, in theta.

    theta = (ln rate, ln(1 - momentum)), sigma in its units. line: the lowest and the
    highest rate of 2e, and the spacing. side: half of one of 2f, and the spacing.

    Deviation: the paper slices its learned optimizer, along its gradient, and shows the
    average validation loss at 5, 10 and 20 unrolls (2e). Here theta is two numbers of a
    hand-designed one, and the loss is that of training. The jitter is not rounding: float64
    moves the values at T = 40 by 1e-7 in the median, neighbors differ by .2. From the third
    step on, the loss of a ReLU network has true steps, which autodiff cannot see: the
    smoothed slope can exceed the largest one by autodiff.

    Returns, by horizon, the largest |d loss / d ln rate| of 2e by autodiff, and that of the
    smoothed loss with its bound. curves: 2e (horizons, G) and 2f (horizons, rests, rates).
    """
    loss, at = outer_loss(task, key, max(horizons)), np.array(horizons) - 1
    low, high, spacing = line
    log_rates, inner = grid_for(np.log(low), np.log(high), spacing)
    both = side_by_side(lambda x: jax.jvp(loss, (x,), (jnp.ones_like(x),)), log_rates)
    losses, slopes = (x[:, at].T for x in both)
    smooth, smooth_slopes = smoothed(losses, spacing)
    slopes = np.abs(slopes[:, inner])
    half, spacing = side
    offset, middle = grid_for(-half, half, spacing)
    x, y = np.meshgrid(*(CENTER[:, None] + offset))
    square = side_by_side(loss, x.ravel(), y.ravel())[:, at].T.reshape(-1, *x.shape)
    return {
        "horizon": horizons,
        "sigma": SIGMA,
        "max_slope": slopes.max(1),
        "max_slope_smoothed": np.abs(smooth_slopes).max(1),
        "bound_of_smoothed_slope": slope_bound(losses),
        "curves": {
            "rate": np.exp(log_rates[inner]),
            "loss": losses[:, inner],
            "smoothed": smooth,
            "slope": slopes,
            "square": square[:, middle, middle],
            "smoothed_square": smoothed(smoothed(square, spacing)[0], spacing, 1)[0],
            "square_axes": np.exp(CENTER[:, None] + offset[middle]),
        },
    }


def plot_2ef(figure: Figure, result: dict) -> None:
    """Top: figure 2e, its smoothed form, and its slopes. Below: 2f, raw and smoothed."""
    curves, labels = result["curves"], [f"T = {x}" for x in result["horizon"]]
    top, below = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    loss, smooth, slopes = top.subplots(1, 3)
    draw(loss, curves["rate"], curves["loss"], label=labels)
    top.legend(*loss.get_legend_handles_labels(), **LEGEND | {"ncols": len(labels)})
    loss.sharey(smooth)
    draw(smooth, curves["rate"], curves["smoothed"], lw=1)
    draw(slopes, curves["rate"], curves["slope"], ".", ms=2)
    loss.set(title="2e", xlabel="learning rate", ylabel="outer loss (nats)")
    title = f"2e, smoothed with sigma {result['sigma']:g}"
    smooth.set(title=title, xlabel="learning rate")
    slopes.set(title="2e, slope by autodiff", xlabel="learning rate", yscale="log")
    slopes.set_ylabel("|d loss / d ln rate| (nats)")
    axes = below.subplots(2, len(labels), sharex=True, sharey=True)
    for i, column in enumerate(axes.T):
        raw, smooth = curves["square"][i], curves["smoothed_square"][i]
        limits = {"vmin": raw.min(), "vmax": np.quantile(raw, 0.999)}
        column[0].pcolormesh(*curves["square_axes"], raw, **limits)
        column[0].set_title(f"2f: {labels[i]}")
        drawn = column[1].pcolormesh(*curves["square_axes"], smooth, **limits)
        column[1].set(title="smoothed", xlabel="learning rate")
        below.colorbar(drawn, ax=column, location="bottom", label="outer loss (nats)")
    for axis in axes[:, 0]:
        axis.set_ylabel("1 - momentum")


# --- for the command: args -> (result, title, what the data are)
def _toy(compute: Callable, spacing: float, name: str, args: Any) -> tuple:
    rows = compute(1e-3 if args.quick else spacing)
    result = {key: [row[key] for row in rows] for key in rows[0]} | {"curves": rows}
    about = about_formula("(w - 4)(w - 3) w^2, drawn from its formula")
    return result, f"Metz et al. 2019, figure {name}", about


def _mlp(compute: Callable, name: str, sizes: dict, args: Any) -> tuple:
    data, about = TASKS["fmnist_small"].load(args.data, args.data_dir)
    task = TASKS["fmnist_small"].build(data, jax.random.key(0))
    result = compute(task, jax.random.key(1), *sizes[args.quick])
    return result, f"Metz et al. 2019, figure {name}, {about['dataset']}", about


STEPS = [5, 10, 20, 40]
SIZES_2D = {False: (100, STEPS), True: (25, STEPS)}  # by --quick
SIZES_2EF = {
    False: (STEPS, (0.3, 2.0, 0.0015), (0.1575, 0.005)),
    True: (STEPS[:3], (0.9, 1.3, 0.003), (0.075, 0.01)),
}
plot_rates = partial(plot_toy, theta="ln(rate)", name="learning rate", decode=np.exp)
ONE_WEIGHT = "2a-c: one weight, learning rate 0.01", "9: one weight, learning rates"
FIGURES = {
    "metz2abc": (partial(_toy, compute_2abc, 1e-4, ONE_WEIGHT[0]), plot_toy, 6),
    "metz9": (partial(_toy, compute_9, 2e-4, ONE_WEIGHT[1]), plot_rates, 11),
    "metz2d": (partial(_mlp, compute_2d, "2d", SIZES_2D), plot_2d, 5.6),
    "metz2ef": (partial(_mlp, compute_2ef, "2e, f", SIZES_2EF), plot_2ef, 7),
}
