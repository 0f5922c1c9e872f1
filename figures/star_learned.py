"""What a trained STAR does, step by step: `python -m figures learned [--theta FILE]`.

No figure of the paper, which judges its optimizers by their losses alone. While a theta
trains the task it was meta-trained on, each update is taken apart as in section 5.2:

    update = -(f_b + f_g),  f_b blackbox (equation 22), f_g nominal (equation 21)

A head of zeros answers 0. So the update of a theta whose direction head is zero is -f_g,
and the rest of the update is -f_b. With the nominal head zero too it is the plain nominal
step, and exp(beta2 m_g) is the ratio of the two. Which of the 202 numbers matter is asked
likewise: zero them and train again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from matplotlib.figure import Figure

import eval as evaluation
import star
import store
from baselines import LEGEND, counted_seeds, curves
from devices import compiler_options, each
from experiments.catalogue import TASKS
from tasks import fresh, inner_step

# Rows of w0, in the order of star.tensor_features, then time_features: name, how many. An
# element's "row" and "column" are adafactor's two means of squares.
GROUPS = {"gradient": 1, "parameter value": 1, "momenta": 3, "mean square": 1}
GROUPS |= {"momenta / v": 3, "1 / v": 1, "gradient, adafactor": 3, "rows": 3}
GROUPS |= {"columns": 3, "1 / root of rows": 3, "1 / root of columns": 3}
GROUPS |= {"momenta, adafactor": 3, "time": 11}
ROWS = np.split(np.arange(39), np.cumsum([*GROUPS.values()])[:-1])
FEATURES = dict(zip(GROUPS, ROWS, strict=True))
DIRECTION, NOMINAL_MAGNITUDE = 0, 2  # heads, columns of w2
DECAYS = {"rms_decays": star.RMS_DECAY}  # name in theta: values chosen by hand
DECAYS |= dict.fromkeys(("momentum_decays", "adafactor_decays"), star.DECAYS)


def without_features(theta: dict, *rows: np.ndarray) -> dict:
    """theta with these rows of w0 zero: the network no longer sees those features."""
    return theta | {"w0": theta["w0"].at[np.concatenate(rows)].set(0)}


def without_heads(theta: dict, *heads: int) -> dict:
    """theta whose network answers 0 there, whatever it sees."""
    heads = np.array(heads, int)
    return theta | {name: theta[name].at[..., heads].set(0) for name in ("w2", "b2")}


def parts_of_theta(theta: dict) -> dict[str, dict]:
    """Name of what is taken out -> theta without it; coarser than FEATURES.

    Without heads and decay offsets nothing learned is left: the plain nominal step.
    """
    features = [rows for name, rows in FEATURES.items() if name != "time"]
    hand_chosen = {name: jnp.zeros_like(theta[name]) for name in DECAYS}
    return {
        "all but time": without_features(theta, *features),
        "all 39 features": without_features(theta, *FEATURES.values()),
        "nominal head: multiplier 1": without_heads(theta, NOMINAL_MAGNITUDE),
        "direction head: no blackbox": without_heads(theta, DIRECTION),
        "decay offsets": theta | hand_chosen,
        "everything learned": without_heads(theta, *range(3)) | hand_chosen,
    }


def take_apart(optimizer, theta, *asked) -> tuple:
    """(update, nominal, blackbox, plain), trees that are added to the parameters (so -f).

    asked: gradients, state, parameters. plain: the nominal step at multiplier 1.
    """
    silent = (), (DIRECTION,), (DIRECTION, NOMINAL_MAGNITUDE)
    thetas = (without_heads(theta, *heads) for heads in silent)
    whole, nominal, plain = (optimizer.update(x, *asked)[0] for x in thetas)
    return whole, nominal, jax.tree.map(jnp.subtract, whole, nominal), plain


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """() of the angle between two arrays; nan where one is zero."""
    return jnp.vdot(x, y) / (jnp.linalg.norm(x.ravel()) * jnp.linalg.norm(y.ravel()))


def measure(optimizer, theta, *asked) -> dict:
    """Numbers of one update, each with an entry per tensor, in the order of the leaves.

    multiplier (tensors, 3): 10 %, 50 % and 90 % of exp(beta2 m_g) over the elements whose
    nominal step is not zero, as it is at pixels that are always black; |f_b| / |f_g|;
    cosines of the update with minus the gradient and with the nominal step; its rms.
    """

    def one(grad, update, nominal, blackbox, plain):
        multiplier = jnp.where(plain == 0, jnp.nan, nominal / plain)
        size = jnp.linalg.norm(nominal.ravel())
        return {
            "multiplier": jnp.nanpercentile(multiplier, jnp.array([10, 50, 90])),
            "blackbox_over_nominal": jnp.linalg.norm(blackbox.ravel()) / size,
            "cosine_gradient": cosine(update, -grad),
            "cosine_nominal": cosine(update, nominal),
            "rms": jnp.sqrt(jnp.mean(update**2)),
        }

    trees = asked[0], *take_apart(optimizer, theta, *asked)
    numbers = map(one, *map(jax.tree.leaves, trees))
    return jax.tree.map(lambda *x: jnp.stack(x), *numbers)


def snapshots(build, optimizer, theta, init_key, run_key, at: Any, look: Callable):
    """look(task, carry, key) of one run, before each of the inner steps `at`, stacked.

    build: key -> Task. at: ascending, from 0. key: that of the step.
    """

    def advance(t, carry):
        key = jax.random.fold_in(run_key, t)
        return inner_step(build, optimizer, theta, carry, key)[0]

    def until(carry, span):
        carry = jax.lax.fori_loop(*span, advance, carry)
        return carry, look(build(init_key), carry, jax.random.fold_in(run_key, span[1]))

    spans = np.int32([0, *at[:-1]]), np.int32(at)
    return jax.lax.scan(until, fresh(build, optimizer, init_key), spans)[1]


def follow(build, data, optimizer, theta, keys, at: list[int]) -> dict:
    """`measure` of updates number `at` (ascending, from 1): (seeds, points, tensors, ...).

    build: (data, key) -> Task. keys: (seeds,), runs as `curves` makes them of these.
    """

    def look(task, carry, key):
        batch_key, loss_key = jax.random.split(key)
        batch = task.batch(batch_key, "train")
        grads = jax.grad(task.loss)(carry.params, loss_key, batch)
        return measure(optimizer, theta, grads, carry.optimizer, carry.params)

    def run(data, key):
        pair, member = jax.random.split(key), partial(build, data)
        return snapshots(member, optimizer, theta, *pair, np.array(at) - 1, look)

    print(f"  {at[-1]} updates, taken apart at {len(at)}", flush=True)
    jit = partial(jax.jit, compiler_options=compiler_options())
    numbers = jit(lambda data, keys: each()(partial(run, data))(keys))(data, keys)
    return jax.tree.map(np.asarray, numbers)


def tensor_names(params: Any) -> list[str]:
    """Such as "0.w 784x128": where it is in the tree, and its shape."""
    return [
        f"{keystr(path, simple=True, separator='.')} {'x'.join(map(str, x.shape))}"
        for path, x in tree_leaves_with_path(params)
    ]


def compute_learned(build, data, optimizer, theta, seeds, steps, far) -> dict:
    """Updates taken apart up to step `far`, and what `steps` steps lose without a part.

    Returns numbers of `measure` at powers of ten (at, tensors, ...), means over the seeds;
    loss, the mean over steps and seeds with the whole theta; loss_difference to it on the
    same seeds (seeds,), without each group of FEATURES and part of `parts_of_theta`.
    """
    keys = jax.random.split(jax.random.key(evaluation.EVALUATION_SEED), seeds)
    # 1, 2, 3, 5, 7, 10, 15, 20, ...
    series = [m * 10**e // 10 for e in range(9) for m in (10, 15, 20, 30, 50, 70)]
    at = [n for n in dict.fromkeys(series) if n <= far]
    numbers = follow(build, data, optimizer, theta, keys, at)
    numbers = {name: x.mean(0) for name, x in numbers.items()}
    features = {name: without_features(theta, rows) for name, rows in FEATURES.items()}
    parts = parts_of_theta(theta)
    thetas = [theta, *features.values(), *parts.values()]
    report = evaluation.counter("ablations", steps, seeds * len(thetas))
    run = curves(build, data, optimizer, thetas, keys, steps, report=report)
    whole, *others = run.losses.mean(-1)  # (seeds,) each
    differences = iter(others - whole)
    shown = [i for i, n in enumerate(at) if set(str(n)) <= {"1", "0"}]
    params = jax.eval_shape(build(data, keys[0]).init, keys[0])
    return {
        "tensors": tensor_names(params),
        "seeds": seeds,
        "steps": steps,
        "at": [at[i] for i in shown],
        "numbers": {name: x[shown] for name, x in numbers.items()},
        "loss": whole.mean(),
        "loss_difference": {
            "features": {name: next(differences) for name in features},
            "parts": {name: next(differences) for name in parts},
        },
        "curves": {"at": at, **numbers},
    }


def figure_learned(args: Any) -> tuple[dict, str, dict]:
    path = args.theta[-1] if args.theta else evaluation.best_theta("fmnist")
    settings, optimizer, theta = evaluation.trained(path)
    name = store.read_card(path).get("task")
    if name not in TASKS or theta["w2"].shape[1] < 3:
        raise store.UserError(f"{path} is no STAR with a nominal term and a known task")
    name += "_small" * (args.quick and f"{name}_small" in TASKS)
    data, about = TASKS[name].load(args.data, args.data_dir)
    horizon = settings["horizon"] or 2000
    steps, far = (20, 50) if args.quick else (args.steps or horizon, 5 * horizon)
    setting = theta, 1 if args.quick else args.seeds, steps, far
    result = compute_learned(TASKS[name].build, data, optimizer, *setting)
    decays = {k: star.learned_decay(d, theta[k]) for k, d in DECAYS.items()}
    title = f"{settings['label']}, at work on {name}: {about['dataset']}"
    return {"decays": decays, "horizon": horizon, **result}, title, about


def draw_tensors(axes: Any, values: np.ndarray, name: str, result: dict) -> None:
    """A line per tensor: matrices solid, vectors dashed; values (points, tensors), or
    (points, tensors, 3), whose first and last are the borders of a band for matrices."""
    at, count = result["curves"]["at"], {True: 0, False: 0}
    for tensor, line in zip(result["tensors"], np.moveaxis(values, 1, 0), strict=True):
        matrix = "x" in tensor.partition(" ")[2]
        style = dict(ls="-", lw=1.8) if matrix else dict(ls="--", lw=1)
        color = f"C{count[matrix]}"
        count[matrix] += 1
        low, median, high = line.T if line.ndim == 2 else (line, line, line)
        axes.plot(at, median, label=tensor, color=color, **style)
        if matrix:
            axes.fill_between(at, low, high, color=color, alpha=0.15, lw=0)
    axes.set(xscale="log", xlabel="inner steps", ylabel=name)
    evaluation.draw_horizons(axes, {result["horizon"]}, at[-1])


def draw_differences(axes: Any, result: dict) -> None:
    """What is taken out, from top to bottom, and what the loss is then more or less."""
    features, parts = (result["loss_difference"][k] for k in ("features", "parts"))
    for i, (name, values) in enumerate({**features, **parts}.items()):
        color = "C0" if name in features else "C3"
        axes.barh(i, np.mean(values), color=color, alpha=0.35)
        axes.plot(values, [i] * len(values), "o", color=color, ms=4)
    axes.axvline(0, color="k", lw=0.8)
    axes.axhline(len(features) - 0.5, color="k", lw=0.8, ls=":")
    axes.set_yticks(range(len(features) + len(parts)), [*features, *parts])
    axes.set(ylabel="what is taken out", ylim=(len(features) + len(parts) - 0.4, -0.6))
    axes.set_title(f"loss without it, minus the whole theta's {result['loss']:.4f}")
    seeds = f"{counted_seeds(result['seeds'])}, a dot each"
    steps = f"mean of {result['steps']} steps"
    axes.set_xlabel(f"difference of training losses, {steps} (nats; {seeds})")


def plot_learned(figure: Figure, result: dict) -> None:
    """Over inner time: multiplier, share of the blackbox step, two cosines. Then losses."""
    above, below = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    multiplier, share, gradient, nominal = above.subplots(2, 2).ravel()
    for axes, name, words in (
        (multiplier, "multiplier", "multiplier of the nominal\nstep, exp(beta2 m_g)"),
        (share, "blackbox_over_nominal", "blackbox over nominal\nstep, |f_b| / |f_g|"),
        (gradient, "cosine_gradient", "cosine of the update\nand minus the gradient"),
        (nominal, "cosine_nominal", "cosine of the update\nand the nominal step"),
    ):
        draw_tensors(axes, result["curves"][name], words, result)
    multiplier.ticklabel_format(axis="y", useOffset=False)
    multiplier.set_title("medians, bands: 10-90 % of each matrix")
    share.set(yscale="log")
    above.legend(*share.get_legend_handles_labels(), **LEGEND)
    share.axhline(1, color="k", lw=0.8)
    draw_differences(below.subplots(), result)


FIGURES = {"learned": (figure_learned, plot_learned, 8.6)}
