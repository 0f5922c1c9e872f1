"""What a trained STAR does, step by step: `python -m figures learned [--theta FILE]`.

No figure of the paper, which judges its optimizers by their losses alone. While a theta
trains the task it was meta-trained on, each update is taken apart as in section 5.2:

    update = -(f_b + f_g),  f_b blackbox (equation 22), f_g nominal (equation 21)

Nothing of star.py is written again. A head of zeros answers 0, so the update of a theta
whose direction head is zero is -f_g, and the rest of the update is -f_b; with the nominal
head zero too it is the plain nominal step, and exp(beta2 m_g) is the ratio of the two.
Which of the 202 numbers matter is asked likewise: zero them and train again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import star
from companions.lopts import LearnedOptimizer
from experiments import comparison
from inner import batching, compiler_options, curves, inner_training, thinning
from store import UserError, load_theta, read_card
from tasks import TASKS

# Rows of w0. An element's "row" and "column" are adafactor's two means of squares.
FEATURES = {
    "gradient": star.GRAD,
    "parameter value": star.PARAM,
    "momenta": star.MOMENTUM,
    "mean square": star.RMS,
    "momenta / v": star.MOMENTUM_OVER_V,
    "1 / v": star.INVERSE_V,
    "gradient, adafactor": star.FACTORED_GRAD,
    "rows": star.ROW,
    "columns": star.COL,
    "1 / root of rows": star.INVERSE_ROW,
    "1 / root of columns": star.INVERSE_COL,
    "momenta, adafactor": star.FACTORED_MOMENTUM,
    "time": star.TIME,
}
DIRECTION, MAGNITUDE, NOMINAL_MAGNITUDE = range(3)  # heads, columns of w2
DECAYS = ("momentum_decays", "rms_decays", "adafactor_decays")
PERCENTILES = (10, 50, 90)


# Thetas with something taken out


def without_features(theta: dict, *rows: slice) -> dict:
    """theta with these rows of w0 zero: the network no longer sees those features."""
    w0 = theta["w0"]
    for these in rows:
        w0 = w0.at[these].set(0)
    return theta | {"w0": w0}


def without_heads(theta: dict, *heads: int) -> dict:
    """theta whose network answers 0 there, whatever it sees."""
    columns = np.array(heads, int)
    silent = {name: theta[name].at[..., columns].set(0) for name in ("w2", "b2")}
    return theta | silent


def without_decays(theta: dict) -> dict:
    """theta with the hand-chosen decays of the constants: all offsets zero."""
    return theta | {name: jnp.zeros_like(theta[name]) for name in DECAYS}


def parts_of_theta(theta: dict) -> dict[str, dict]:
    """Name of what is taken out -> theta without it; coarser than FEATURES.

    Without heads and decay offsets nothing learned is left: the plain nominal step.
    """
    features = [rows for name, rows in FEATURES.items() if name != "time"]
    heads = (DIRECTION, MAGNITUDE, NOMINAL_MAGNITUDE)
    return {
        "all but time": without_features(theta, *features),
        "all 39 features": without_features(theta, *FEATURES.values()),
        "nominal head: multiplier 1": without_heads(theta, NOMINAL_MAGNITUDE),
        "direction head: no blackbox": without_heads(theta, DIRECTION),
        "decay offsets": without_decays(theta),
        "everything learned": without_decays(without_heads(theta, *heads)),
    }


# One update taken apart


class Asked(NamedTuple):
    """What an update was asked: the arguments of `LearnedOptimizer.update` but theta."""

    grads: Any
    state: Any  # before the update
    params: Any  # likewise


class Parts(NamedTuple):
    """Trees like the parameters, all as they are added to them (that is, -f)."""

    update: Any
    nominal: Any
    blackbox: Any
    plain: Any  # the nominal step at multiplier 1


def recording(optimizer: Any) -> LearnedOptimizer:
    """The same optimizer, whose state is (its own state, Asked of the last update)."""

    def init(params):
        state = optimizer.init(params)
        return state, Asked(jax.tree.map(jnp.zeros_like, params), state, params)

    def update(theta, grads, state, params):
        asked = Asked(grads, state[0], params)
        updates, new = optimizer.update(theta, *asked)
        return updates, (new, asked)

    return LearnedOptimizer(optimizer.init_theta, init, update)


def take_apart(optimizer: Any, theta: dict, asked: Asked) -> Parts:
    """The parts of the update that the optimizer makes when it is asked this."""
    silent = ((), (DIRECTION,), (DIRECTION, NOMINAL_MAGNITUDE))
    thetas = [without_heads(theta, *heads) for heads in silent]
    thetas = jax.tree.map(lambda *x: jnp.stack(x), *thetas)
    updates = jax.lax.map(lambda theta: optimizer.update(theta, *asked)[0], thetas)
    whole, nominal, plain = (jax.tree.map(itemgetter(i), updates) for i in range(3))
    return Parts(whole, nominal, jax.tree.map(jnp.subtract, whole, nominal), plain)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """() of the angle between two arrays; nan where one is zero."""
    return jnp.vdot(x, y) / (jnp.linalg.norm(x.ravel()) * jnp.linalg.norm(y.ravel()))


def measure(optimizer: Any, theta: dict, asked: Asked) -> dict:
    """Numbers of one update, each with an entry per tensor, in the order of the leaves.

    multiplier (tensors, 3): 10 %, 50 % and 90 % of exp(beta2 m_g) over the elements whose
    nominal step is not zero (at pixels that are always black it is); blackbox_over_nominal
    |f_b| / |f_g|; cosine_gradient with minus the batch's gradient and cosine_nominal with
    the nominal step, both of the update; rms of the update, per element.
    """
    parts = take_apart(optimizer, theta, asked)
    tensors = [jax.tree.leaves(tree) for tree in (asked.grads, *parts)]
    numbers = []
    for grad, update, nominal, blackbox, plain in zip(*tensors, strict=True):
        multiplier = jnp.where(plain == 0, jnp.nan, nominal / plain)
        size = jnp.linalg.norm(nominal.ravel())
        numbers.append(
            {
                "multiplier": jnp.nanpercentile(multiplier, jnp.array(PERCENTILES)),
                "blackbox_over_nominal": jnp.linalg.norm(blackbox.ravel()) / size,
                "cosine_gradient": cosine(update, -grad),
                "cosine_nominal": cosine(update, nominal),
                "rms": jnp.sqrt(jnp.mean(update**2)),
            }
        )
    return jax.tree.map(lambda *x: jnp.stack(x), *numbers)


def follow(
    build: Callable,
    data: Any,
    optimizer: Any,
    theta: dict,
    keys: jax.Array,
    at: list[int],
    report: Callable | None = None,
) -> dict:
    """`measure` of updates number `at` (ascending, from 1): (points, seeds, tensors, ...).

    build: (data, key) -> Task. keys: (seeds,), runs as `inner.curves` makes them of these.
    report(steps done), if given, is called at each of `at` but the first.
    """
    batch, recorded = batching(), recording(optimizer)

    def start(data, keys):
        fresh, _ = inner_training(partial(build, data), recorded)
        return jax.vmap(fresh)(keys)

    def advance(data, theta, carry, keys, first, last):
        _, step = inner_training(partial(build, data), recorded)

        def run(carry, key):
            def one(t, carry):
                return step(theta, carry, jax.random.fold_in(key, t))[0]

            carry = jax.lax.fori_loop(first, last, one, carry)
            return carry, measure(optimizer, theta, carry.optimizer[1])

        return batch(run)(carry, keys)

    init_keys, run_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    options = compiler_options()
    carry = jax.jit(start, compiler_options=options)(data, init_keys)
    advance = jax.jit(advance, donate_argnums=2, compiler_options=options)
    points = []
    for first, last in zip((0, *at), at, strict=False):
        both = np.int32(first), np.int32(last)
        carry, numbers = advance(data, theta, carry, run_keys, *both)
        points.append(jax.tree.map(np.asarray, numbers))
        if report is not None and first:  # the first waits for the compiler
            report(last)
    return jax.tree.map(lambda *x: np.stack(x), *points)


# The figure


def log_spaced(steps: int) -> list[int]:
    """1, 2, 3, 5, 7, 10, 15, 20, ... up to `steps`."""
    series = [m * 10**e // 10 for e in range(9) for m in (10, 15, 20, 30, 50, 70)]
    return [n for n in dict.fromkeys(series) if n <= steps]


def tensor_names(params: Any) -> list[str]:
    """Such as "w1 784x128": layers from 1; paths of deeper trees as they are."""
    names = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        layer, *rest = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        flat = layer.isdigit() and len(rest) == 1
        name = f"{rest[0]}{int(layer) + 1}" if flat else ".".join((layer, *rest))
        names.append(f"{name} {'x'.join(map(str, x.shape))}")
    return names


def compute_learned(
    build: Callable,
    data: Any,
    optimizer: Any,
    theta: dict,
    seeds: int,
    steps: int,
    far: int,
) -> dict:
    """Updates taken apart up to step `far`, and what `steps` steps lose without a part.

    Returns tensors, their names; numbers of `measure` at powers of ten (at, tensors, ...),
    means over the seeds; loss, the mean over the steps and seeds with the whole theta; and
    by what is taken out, loss_difference to it on the same seeds (seeds,), for each group
    of FEATURES and each part of `parts_of_theta`.
    """
    keys = jax.random.split(jax.random.key(comparison.EVALUATION_SEED), seeds)
    at = log_spaced(far)
    report = comparison.progress("updates taken apart", far, seeds, print)
    numbers = follow(build, data, optimizer, theta, keys, at, report)
    numbers = {name: x.mean(1) for name, x in numbers.items()}

    groups = {name: without_features(theta, rows) for name, rows in FEATURES.items()}
    parts = parts_of_theta(theta)
    thetas = [theta, *groups.values(), *parts.values()]
    report = comparison.progress("ablations", steps, seeds * len(thetas), print)
    every = thinning(steps)
    run = partial(curves, build, data, optimizer, thetas, keys, steps)
    losses = run(every=every, report=report).losses.mean(-1)  # (thetas, seeds)
    differences = dict(zip((*groups, *parts), losses[1:] - losses[0], strict=True))

    shown = [i for i, n in enumerate(at) if set(str(n)) <= {"1", "0"}]
    params = jax.eval_shape(build(data, keys[0]).init, keys[0])
    return {
        "tensors": tensor_names(params),
        "seeds": seeds,
        "steps": steps,
        "at": [at[i] for i in shown],
        "numbers": {name: x[shown] for name, x in numbers.items()},
        "loss": losses[0].mean(),
        "loss_difference": {
            "features": {name: differences[name] for name in groups},
            "parts": {name: differences[name] for name in parts},
        },
        "curves": {"at": at, **numbers},
    }


def _learned(args: argparse.Namespace) -> tuple[dict, str, dict]:
    if args.theta and len(args.theta) > 1:
        raise UserError("figure learned takes one --theta")
    path = args.theta[0] if args.theta else comparison.best_theta("fmnist")
    trained, card = load_theta(path), read_card(path)
    if trained.constants is None or trained.constants.nominal == "none":
        raise UserError(f"{path} is no STAR with a nominal term")
    name, small = card.get("task"), f"{card.get('task')}_small"
    if name not in TASKS:
        raise UserError(f"the card of {path} names no known task")
    name = small if args.quick and small in TASKS else name
    data, about = TASKS[name].load(args.data, args.data_dir)
    horizon = card.get("recipe", {}).get("horizon", 2000)
    steps, far = (20, 50) if args.quick else (args.steps or horizon, 5 * horizon)
    seeds = 1 if args.quick else args.seeds
    setting = trained.optimizer, trained.theta, seeds, steps, far
    result = compute_learned(TASKS[name].build, data, *setting)
    decays = star.effective_decays(trained.theta, trained.constants)
    result = {"decays": decays._asdict(), "horizon": horizon, **result}
    title = f"What {comparison.trained(path).name} does on {name}"
    return result, f"{title}: {about['dataset']}", about


def _draw_tensors(
    axes: Any, at: list[int], names: list[str], values: np.ndarray
) -> None:
    """A line per tensor: matrices solid, vectors dashed; values (points, tensors)."""
    count = {True: 0, False: 0}
    for name, line in zip(names, values.T, strict=True):
        matrix = "x" in name.partition(" ")[2]
        style = dict(ls="-", lw=1.8) if matrix else dict(ls="--", lw=1)
        axes.plot(at, line, color=f"C{count[matrix]}", label=name, **style)
        count[matrix] += 1
    axes.set(xscale="log", xlabel="inner steps")


def _draw_differences(axes: Any, result: dict) -> None:
    """What is taken out, from top to bottom, and what the loss is then more or less."""
    features, parts = (result["loss_difference"][k] for k in ("features", "parts"))
    for i, (name, values) in enumerate({**features, **parts}.items()):
        color = "C0" if name in features else "C3"
        axes.barh(i, np.mean(values), color=color, alpha=0.35)
        axes.plot(values, [i] * len(values), "o", color=color, ms=4)
    axes.axvline(0, color="k", lw=0.8)
    axes.axhline(len(features) - 0.5, color="k", lw=0.8, ls=":")
    axes.set_yticks(range(len(features) + len(parts)), [*features, *parts], fontsize=7)
    axes.set_ylim(len(features) + len(parts) - 0.4, -0.6)


def plot_learned(result: dict, plt: Any) -> Any:
    """Over inner time: multiplier, share of the blackbox step, two cosines. Then losses."""
    figure = plt.figure(figsize=(9, 7.1), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    multiplier, share = above.subplots(1, 2)
    others = below.subplot_mosaic("GL;NL")
    gradient, nominal, losses = (others[name] for name in "GNL")
    drawn = result["curves"]
    draw = partial(_draw_tensors, at=drawn["at"], names=result["tensors"])

    low, median, high = np.moveaxis(drawn["multiplier"], -1, 0)  # (points, tensors)
    draw(multiplier, values=median)
    for line, bottom, top in zip(multiplier.lines, low.T, high.T, strict=True):
        if line.get_linestyle() == "-":
            fill = dict(color=line.get_color(), alpha=0.15, lw=0)
            multiplier.fill_between(drawn["at"], bottom, top, **fill)
    multiplier.ticklabel_format(axis="y", useOffset=False)
    multiplier.set_title(
        "multiplier of the nominal step, exp(beta2 m_g):\n"
        "medians, bands: 10-90 % of each matrix",
        fontsize=9,
    )
    draw(share, values=drawn["blackbox_over_nominal"])
    share.axhline(1, color="k", lw=0.8)
    share.set(yscale="log")
    share.set_title("blackbox over nominal step, |f_b| / |f_g|", fontsize=9)
    draw(gradient, values=drawn["cosine_gradient"])
    gradient.set_title("cosine: update, minus the batch's gradient", fontsize=9)
    draw(nominal, values=drawn["cosine_nominal"])
    nominal.set_title("cosine: update, nominal step", fontsize=9)
    for axes in (multiplier, share, gradient, nominal):
        axes.tick_params(labelsize=8)
        label = f"horizon of the meta-training, {result['horizon']}"
        axes.axvline(result["horizon"], color="k", ls=":", lw=1, label=label)
    named = share.get_legend_handles_labels()
    above.legend(*named, loc="outside lower center", ncols=7, fontsize=7)
    _draw_differences(losses, result)
    losses.set_title(
        f"loss without ..., minus the whole theta's {result['loss']:.4f}\n"
        f"(means of {result['steps']} steps; {result['seeds']} seeds, a dot each)",
        fontsize=9,
    )
    losses.set_xlabel("difference (nats)")
    return figure


FIGURES = {"learned": (_learned, plot_learned)}
