"""Figures 7, 9 to 12 of Maheswaranathan et al. 2020, and STAR's modes under the same lens.

`python -m figures gru7a` to `gru7c`, `gru9` to `gru12`, `modes_star`. companions/gru.py
trained the GRU optimizers in weights/.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

import devices
import star
import star_fast
import tasks
from baselines import color_of, from_optax
from companions import dynamics, problems
from companions.lopts import load_theta
from eval import WEIGHTS
from figures.stability import UNIT_CIRCLE
from figures.star_learned import snapshots
from store import read_card

ABOUT = {"dataset": "drawn from its formula", "stand_in": False}
TASKS = ("linear_regression", "rosenbrock", "two_moons")
STAGES = {"early": "linear_regression_early", "trained": "linear_regression"}
STEPS = 200  # of every inner run, as in meta-training
SEARCH_SEED, TEST_SEED = 50_000, 60_000  # apart from the usual --seed
# name -> optax optimizer, and its decays, which are searched with its learning rate
BASELINES = {
    "momentum": (optax.sgd, "momentum"),
    "RMSProp": (optax.rmsprop, "decay"),
    "Adam": (optax.adam, "b1", "b2"),
}
RATES, MEMORY = (1e-5, 1e2), (1e-4, 1.0)  # log-uniform ranges of rates and of 1 - decay
EDGE = 0.02  # of a range in log: a best value as near to an end is "on the edge"


def size_of(task: str, quick: bool) -> tuple[int, int, int]:
    """Configurations (the paper: 2500), problems for each, fresh problems for the best."""
    if task == "two_moons":  # costs hundreds of times the others
        return (24, 2, 8) if quick else (300, 4, 64)
    return (300, 32, 64) if quick else (2500, 32, 64)


def losses_of(task: str, optimizer: Any, thetas: Any, keys: jax.Array) -> np.ndarray:
    """(N, STEPS): one run for each of the thetas, leaves (N, ...), and keys (N,).

    A key draws problem and start. The losses are clipped as in meta-training.
    """
    build = partial(problems.TASKS[task].build, {})
    problem = tasks.inner_problem(build, optimizer, lambda theta: theta, STEPS)

    def run(theta_and_key):
        theta, key = theta_and_key
        return problem.run(theta, problem.fresh(key), key)[1]

    # of two moons few side by side, which fit a CPU's caches better
    side_by_side = min(len(keys), 8 if task == "two_moons" else 3200)
    runs = partial(jax.lax.map, run, batch_size=side_by_side)
    options = devices.compiler_options()
    return np.asarray(jax.jit(runs, compiler_options=options)((thetas, keys)))


def test_losses(task: str, optimizer: Any, theta: Any, tests: int) -> np.ndarray:
    """(tests, STEPS): one theta on the test problems."""
    thetas = jax.tree.map(lambda x: np.repeat(np.float32(x)[None], tests, 0), theta)
    keys = jax.random.split(jax.random.key(TEST_SEED), tests)
    return losses_of(task, optimizer, thetas, keys)


def mean_and_error(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean loss of each run, over runs: losses (..., runs, steps) -> (...) each."""
    x = np.float64(losses.mean(-1))
    return x.mean(-1), x.std(-1, ddof=1) / np.sqrt(x.shape[-1])


def tune(task: str, name: str, size: tuple) -> dict:
    """Random search on the meta-objective, appendix C.3; the best one on fresh problems.

    Returns tried {hyperparameter: (N,)}, objective (N,) the mean loss over steps
    and problems, best {hyperparameter: value}, found (the same in words, with a warning if
    it lies on the edge of its range), losses (tests, STEPS) of it on the test problems.
    """
    (make, *decays), (count, each, tests) = BASELINES[name], size
    rng = np.random.default_rng([SEARCH_SEED, *name.encode()])
    share, tried = {}, {}
    for key in ("learning_rate", *decays):
        low, high = np.log(MEMORY if key in decays else RATES)
        share[key] = rng.uniform(size=count)
        x = np.exp(low + (high - low) * share[key])
        tried[key] = np.float32(1 - x if key in decays else x)
    optimizer = from_optax(make, {k: float(x[0]) for k, x in tried.items()})
    keys = jax.random.split(jax.random.key(SEARCH_SEED), each)
    pairs = {k: np.repeat(x, each) for k, x in tried.items()}
    losses = losses_of(task, optimizer, pairs, jnp.tile(keys, count))
    objective = losses.mean(1).reshape(count, each).mean(1)
    at = objective.argmin()
    best = {k: float(x[at]) for k, x in tried.items()}
    edge = [k for k, x in share.items() if not EDGE < x[at] < 1 - EDGE]
    found = ", ".join(f"{k} {x:.4g}" for k, x in best.items())
    found += f" (on the edge of its range: {', '.join(edge)})" if edge else ""
    print(f"{task}, {name}: {found}: {objective[at]:.4g}", flush=True)
    losses = test_losses(task, optimizer, best, tests)
    return dict(tried=tried, objective=objective, best=best, found=found, losses=losses)


# --- figures 10 to 12: the maps of hyperparameters
def compute_maps(task: str, args: Any) -> tuple[dict, str, dict]:
    """Random search of every baseline on a task, and its best on fresh problems."""
    size = size_of(task, args.quick)
    tuned = {name: tune(task, name, size) for name in BASELINES}
    result = {
        "task": task,
        **dict(zip(("configurations", "problems", "tests"), size, strict=True)),
        "optimizer": list(BASELINES),
        "best": [x["found"] for x in tuned.values()],
        "meta_objective": [x["objective"].min() for x in tuned.values()],
        "test_loss_and_error": [mean_and_error(x["losses"]) for x in tuned.values()],
        "curves": tuned,
    }
    return result, f"{task.replace('_', ' ')}: {size[0]} configurations each", ABOUT


def plot_maps(figure: Figure, result: dict) -> None:
    """A dot for each configuration, dark for good, one colour scale; a star: the best."""
    axes = figure.subplots(2, 2).ravel()
    shown = [(name, k) for name, (_, *decays) in BASELINES.items() for k in decays]
    objectives = [x["objective"] for x in result["curves"].values()]
    norm = LogNorm(*np.percentile(objectives, [0, 80]))
    for axis, (name, decay) in zip(axes, shown, strict=True):
        tuned = result["curves"][name]
        objective, found = tuned["objective"], tuned["tried"]
        order = np.argsort(-objective)  # so that the best lie on top
        x, y = found["learning_rate"][order], 1 - found[decay][order]
        dots = axis.scatter(x, y, c=objective[order], s=6, norm=norm)
        rate, memory = tuned["best"]["learning_rate"], tuned["best"][decay]
        label = f"best: {rate:.2g}, {memory:.3g}"
        axis.plot(rate, 1 - memory, "*", ms=15, mfc="gold", mec="k", label=label)
        axis.set(xscale="log", xlabel="learning rate", yscale="log")
        axis.set(ylabel=f"1 - {decay}", title=f"{name}: {objective.min():.4g}")
        axis.invert_yaxis()
        axis.legend(loc="lower left")
    figure.colorbar(dots, ax=axes, extend="max", label="meta-objective (mean loss)")


# --- figure 9: performance
def shipped(name: str) -> tuple[dict, Any, dict]:
    """(theta, optimizer, card) of a GRU in weights/."""
    path = WEIGHTS / f"gru_{name}.npz"
    return *load_theta(path), read_card(path)


def compute_9(args: Any) -> tuple[dict, str, dict]:
    """Mean loss over 200 steps on fresh problems: mean and standard error over problems.

    Also the paired difference GRU - momentum on the same problems, with its error.
    """
    stats, pairs, best = [], [], []
    for task in TASKS:
        size = size_of(task, args.quick)
        tuned = {name: tune(task, name, size) for name in BASELINES}
        best += [f"{task}, {name}: {x['found']}" for name, x in tuned.items()]
        theta, optimizer, _ = shipped(task)
        gru = test_losses(task, optimizer, theta, size[-1])
        losses = np.stack([*(x["losses"] for x in tuned.values()), gru])
        stats.append(mean_and_error(losses))
        pairs.append(mean_and_error(gru - losses[0]))
    result = {
        "task": TASKS,
        "optimizer": [*BASELINES, "GRU"],
        "tests": [size_of(task, args.quick)[-1] for task in TASKS],
        "mean_loss": [mean for mean, _ in stats],
        "standard_error": [error for _, error in stats],
        "gru_minus_momentum": [mean for mean, _ in pairs],
        "gru_minus_momentum_error": [error for _, error in pairs],
        "best": best,
    }
    return result, f"mean loss over {STEPS} steps, fresh problems", ABOUT


def plot_9(figure: Figure, result: dict) -> None:
    """A panel for each task; error bars are standard errors over problems."""
    axes, names = figure.subplots(1, 3), result["optimizer"]
    for i, axis in enumerate(axes):
        mean, error = result["mean_loss"][i], result["standard_error"][i]
        low = np.minimum(error, 0.9 * mean)  # a log axis has no 0
        axis.errorbar(names, mean, [low, error], fmt="none", ecolor="k", capsize=4)
        axis.scatter(names, mean, c=[*map(color_of, names)], s=50, zorder=3)
        for x, y in enumerate(mean):
            axis.text(x, y + error[x], f"{y:.3g}", ha="center", va="bottom", fontsize=8)
        axis.set_title(f"{TASKS[i].replace('_', ' ')},\n{result['tests'][i]} problems")
        axis.set(yscale="log", xlim=(-0.5, len(names) - 0.5))
        axis.set_ylim((mean - low).min() / 1.5, (mean + error).max() * 1.8)
        axis.tick_params(axis="x", rotation=30)
    axes[0].set_ylabel(f"mean loss over {STEPS} steps")


# --- figure 7: the linear regression optimizer, taken apart
def compute_7(title: str, args: Any, keep: int = 0) -> tuple[dict, str, dict]:
    """The modes of both stages, beside momentum tuned on the task and by theory.

    keep: a number of modes. Given, also losses on the test problems: of each stage of the
    optimizer itself, its linearisation, its first mode, and its first `keep` modes.
    """
    task = "linear_regression"
    size = size_of(task, args.quick)
    tuned = tune(task, "momentum", size)
    losses = {"tuned momentum": tuned["losses"]}
    gru = [shipped(name) for name in STAGES.values()]
    systems = [dynamics.linearise(optimizer, theta) for theta, optimizer, _ in gru]
    modes = [dynamics.modes_of(system) for system in systems]
    stages = zip(STAGES, gru, modes, strict=True)
    for stage, (theta, optimizer, _), found in stages if keep else ():
        versions = {"itself": optimizer, "linearised": dynamics.reduced(found)}
        for k in (1, keep):
            count = len(dynamics.keep_modes(found, k))
            label = "first mode alone" if count == 1 else f"first {count} modes"
            versions[label] = dynamics.reduced(found, k, rest=False)
        for version, made in versions.items():
            losses[f"{stage}: {version}"] = test_losses(task, made, theta, size[-1])
    first = [np.stack([x.momentum, x.learning_rate], 1)[:4] for x in modes]
    result = {
        "tuned_momentum": list(tuned["best"].values()),  # alpha, beta
        "heavy_ball": dynamics.heavy_ball(*problems.CURVATURES),
        "stage": list(STAGES),
        "meta_steps": [card["meta_steps"] for *_, card in gru],
        "residual": [x.residual for x in systems],
        "drift": [x.drift for x in systems],
        "condition": [x.condition for x in modes],
        "first_modes": [x.view(float) for x in first],  # real, imaginary: beta, alpha
        "optimizers": list(losses),
        "mean_loss_and_error": [mean_and_error(x) for x in losses.values()],
        "curves": {"modes": modes, "losses": losses},
    }
    return result, f"GRU on linear regression: {title}", ABOUT


def panels(figure: Figure, result: dict, **options: Any) -> Any:
    """Axes: a panel with a title for each stage."""
    axes = figure.subplots(1, 2, **options)
    for axis, *words in zip(axes, result["stage"], result["meta_steps"], strict=True):
        axis.set_title("{}: {} meta-steps".format(*words))
    return axes


def plot_7a(figure: Figure, result: dict) -> None:
    """Eigenvalues of the Jacobian at the fixed point; colour: the long-run step."""
    axes, (_, tuned) = panels(figure, result), result["tuned_momentum"]
    for axis, modes in zip(axes, result["curves"]["modes"], strict=True):
        axis.plot(*UNIT_CIRCLE, "0.7", lw=1)
        weight = np.abs(modes.learning_rate / (1 - modes.momentum))
        norm = LogNorm(weight.max() / 1e3, weight.max())
        order = np.argsort(weight)  # the strongest on top
        beta, style = modes.momentum[order], dict(cmap="viridis_r", ec="k", lw=0.5)
        dots = axis.scatter(beta.real, beta.imag, 45, weight[order], norm=norm, **style)
        line = dict(color=color_of("momentum"), label=f"momentum, tuned: {tuned:.3f}")
        axis.axvline(tuned, lw=1, **line)
        axis.set(xlabel="real part", aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        axis.legend(loc="lower left")
        text = "long-run step, |alpha / (1 - beta)|"
        figure.colorbar(dots, ax=axis, label=text, location="bottom")
    axes[0].set_ylabel("imaginary part")


def plot_7b(figure: Figure, result: dict) -> None:
    """Momentum and learning rate of each mode; the stars: tuned momentum and theory."""
    axes = panels(figure, result, sharey=True)
    for axis, modes in zip(axes, result["curves"]["modes"], strict=True):
        beta, alpha = modes.momentum, modes.learning_rate
        single = np.abs(beta.imag) < 1e-9
        for chosen, marker, label in (
            (single & (alpha.real > 0), "o", "real, downhill"),
            (single & (alpha.real <= 0), "v", "real, uphill"),
            (~single, "s", "complex pair"),
        ):
            x, y = 1 - np.abs(beta[chosen]), np.abs(alpha[chosen])
            axis.plot(x, y, marker, mfc="none", ms=7, label=label)
        for name, color, words in (
            ("heavy_ball", "w", "momentum, by theory"),
            ("tuned_momentum", color_of("momentum"), "momentum, tuned"),
        ):
            rate, decay = result[name]
            label = f"{words}: {rate:.2f}, {decay:.3f}"
            axis.plot(1 - decay, rate, "*", ms=13, mfc=color, mec="k", label=label)
        rate, decay = alpha[0].real, beta[0].real
        text = f"{rate:.2f}, {decay:.3f}"  # of the first mode
        axis.text(1 - decay, rate / 3, text, fontsize=8, ha="center")
        axis.set(xscale="log", xlabel="1 - |beta|  (longer memory to the right)")
        axis.set(yscale="log", xlim=(1.2, 0.03), ylim=(1e-4, 20))
        axis.set_xticks([1, 0.5, 0.2, 0.1, 0.05], ["1", "0.5", "0.2", "0.1", "0.05"])
        axis.minorticks_off()
        axis.legend(loc="lower left")
    axes[0].set_ylabel("|alpha|, learning rate of the mode")


def plot_7c(figure: Figure, result: dict) -> None:
    """Mean losses over the test problems: the optimizer and what is left of it."""
    axes, losses = panels(figure, result, sharey=True), result["curves"]["losses"]
    tuned = losses["tuned momentum"]
    for axis, stage in zip(axes, result["stage"], strict=True):
        label, color = f"momentum, tuned: {tuned.mean():.3g}", color_of("momentum")
        axis.plot(tuned.mean(0), color=color, lw=3, alpha=0.6, label=label)
        own = [key for key in losses if key.startswith(f"{stage}:")]
        for key, ls in zip(own, ("-", "--", "-.", ":"), strict=True):
            color = color_of("GRU") if ls == "-" else "k"
            label = f"GRU, {key.split(': ')[1]}: {losses[key].mean():.3g}"
            axis.plot(losses[key].mean(0), color=color, ls=ls, label=label)
        axis.set(yscale="log", xlabel="inner steps", ylim=(1e-5, 30))
        axis.legend()
    axes[0].set_ylabel(f"mean loss over {len(tuned)} problems")


# --- STAR under the same lens
def compute_modes_star(args: Any) -> tuple[dict, str, dict]:
    """Learning rates of STAR's three running means of the gradient, along one run.

    The shipped STAR trains the network of its own task. Of some parameters of every tensor:
    alpha_k of `dynamics.accumulator_rates`, divided by the 1/v that STAR multiplies it by,
    so that Adam with a rate of beta1 reads beta1. nominal (M,) is the part of the nominal
    term, beta1 (1 - beta_k) / M. quantiles (snapshots, M, 3) are at 10, 50 and 90 %.
    """
    spec = tasks.TASKS["fmnist"]
    data, about = spec.load(args.data, args.data_dir)
    at, entries = ((10, 50), 8) if args.quick else ((10, 100, 1000, 3000), 64)
    theta, constants = star.load_theta(WEIGHTS / "star_fmnist.npz")
    optimizer = star_fast.learned_optimizer(constants)
    decays = star.learned_decay(star.DECAYS, theta["momentum_decays"])
    build, run_key = partial(spec.build, data), jax.random.key(TEST_SEED)

    def entries_of(i, p):
        return jax.random.randint(jax.random.fold_in(run_key, i), (entries,), 0, p.size)

    def rates(task, carry, key):
        params, state, _ = carry
        grads = jax.grad(task.loss)(params, key, task.batch(key, "train"))
        leaves, tree = jax.tree.flatten(params)
        index = tree.unflatten([entries_of(i, p) for i, p in enumerate(leaves)])
        now = grads, state, params
        alpha = dynamics.accumulator_rates(optimizer, theta, decays, *now, index)
        _, new = optimizer.update(theta, *now)

        def times_v(alpha, j, tensor):
            return alpha * jnp.sqrt(tensor.v2.reshape(-1)[j] + constants.rms_eps)[None]

        scaled = jax.tree.map(times_v, alpha, index, new.tensors)
        return jnp.concatenate(jax.tree.leaves(scaled), 1)  # (M, all entries)

    run = partial(snapshots, build, optimizer, theta, run_key, run_key, at, rates)
    found, decays = np.asarray(jax.jit(run)()), np.asarray(decays)  # (S, M, n), (M,)
    result = {
        "inner_step": at,
        "decay": decays,
        "timescale": 1 / (1 - decays),
        "nominal": constants.beta1 * (1 - decays) / len(decays),
        "quantiles": np.quantile(found, (0.1, 0.5, 0.9), axis=-1).transpose(1, 2, 0),
        "share_uphill": (found < 0).mean(-1),
        "curves": {"alpha": found},
    }
    return result, f"STAR's running means as modes: {about['dataset']}", about


def plot_modes_star(figure: Figure, result: dict) -> None:
    """Learning rate by timescale, a dot for each parameter, a colour for each snapshot."""
    axis, rng = figure.subplots(), np.random.default_rng(0)
    alpha, times = result["curves"]["alpha"], result["timescale"]
    for s, color in enumerate(colormaps["viridis"](np.linspace(0, 0.9, len(alpha)))):
        x = times[:, None] * 1.12 ** (s - (len(alpha) - 1) / 2)  # (M, 1)
        around = x * np.exp(0.02 * rng.normal(size=alpha[s].shape))
        axis.plot(around.T, alpha[s].T, ".", ms=2.5, color=color, alpha=0.5)
        middle, label = np.median(alpha[s], 1), f"inner step {result['inner_step'][s]}"
        axis.plot(x, middle, "D", ms=7, color=color, mec="k", label=label)
    nominal, ends = result["nominal"], (0.75 * times, 1.33 * times)
    axis.hlines(nominal, *ends, "C3", label="nominal term alone")
    axis.set_yscale("symlog", linthresh=np.abs(nominal).min() / 3)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(xscale="log", xlabel="timescale 1 / (1 - beta_k), inner steps")
    axis.set(ylabel="learning rate alpha_k, times v")
    axis.legend()


FIGURES = {
    "gru7a": (partial(compute_7, "eigenvalues at the fixed point"), plot_7a, 4.8),
    "gru7b": (partial(compute_7, "modes as hyperparameters"), plot_7b, 4.2),
    "gru7c": (
        partial(compute_7, "what its modes do alone", keep=3),
        plot_7c,
        4.2,
    ),
    "gru9": (compute_9, plot_9, 3.4),
    "gru10": (partial(compute_maps, "linear_regression"), plot_maps, 6),
    "gru11": (partial(compute_maps, "rosenbrock"), plot_maps, 6),
    "gru12": (partial(compute_maps, "two_moons"), plot_maps, 6),
    "modes_star": (compute_modes_star, plot_modes_star, 4.6),
}
