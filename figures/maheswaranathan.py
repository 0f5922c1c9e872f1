"""Figures 7, 9 to 12 of Maheswaranathan et al. 2020, and STAR's modes under the same lens.

`python -m figures gru7a`, `gru7b`, `gru7c`, `gru9`, `gru10`, `gru11`, `gru12`,
`modes_star` (figures.py keeps the list). The trained GRU optimizers are in weights/.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import star
from companions import dynamics, problems
from companions.lopts import LearnedOptimizer, from_optax
from estimators import clip_loss
from inner import compiler_options, inner_training
from store import load_theta, read_card
from tasks import TASKS

WEIGHTS = pathlib.Path(__file__).resolve().parent.parent / "weights"
STEPS = 200  # of every inner run, as in meta-training
SEARCH_SEED, TEST_SEED = 50_000, 60_000  # apart from the usual --seed
EDGE = (
    0.02  # of a range in log: a best value nearer to its end than this is "on the edge"
)


class Tuned(NamedTuple):
    """A hand-designed optimizer and where its hyperparameters are searched."""

    make: object  # (**hyperparameters) -> optax optimizer
    ranges: dict  # name -> (low, high), log-uniform; of a decay: of 1 - decay


RATES = (1e-5, 1e2)
MEMORY = (1e-4, 1.0)
BASELINES = {
    "momentum": Tuned(optax.sgd, {"learning_rate": RATES, "momentum": MEMORY}),
    "RMSProp": Tuned(optax.rmsprop, {"learning_rate": RATES, "decay": MEMORY}),
    "Adam": Tuned(optax.adam, {"learning_rate": RATES, "b1": MEMORY, "b2": MEMORY}),
}
TITLES = {
    "linear_regression": "linear regression",
    "rosenbrock": "Rosenbrock",
    "two_moons": "two moons",
}


class Size(NamedTuple):
    """How much a search takes. Two moons costs hundreds of times the others and gets fewer
    configurations than the paper's 2500; on one start alone the best is one by luck."""

    configurations: int
    problems: int  # that each configuration is tried on
    tests: int  # fresh problems


def size_of(task: str, quick: bool) -> Size:
    if task == "two_moons":
        return Size(24, 2, 8) if quick else Size(300, 4, 64)
    return Size(300, 32, 64) if quick else Size(2500, 32, 64)


def is_rate(name: str) -> bool:
    return name == "learning_rate"


def draw_configurations(
    tuned: Tuned, count: int, seed: int | list[int]
) -> dict[str, np.ndarray]:
    """{name: (count,)}: rates and 1 - decay log-uniform in their ranges."""
    rng, out = np.random.default_rng(seed), {}
    for name, (low, high) in tuned.ranges.items():
        x = np.exp(rng.uniform(np.log(low), np.log(high), count))
        out[name] = (x if is_rate(name) else 1 - x).astype(np.float32)
    return out


def on_edge(tuned: Tuned, best: dict) -> list[str]:
    """Names of the hyperparameters whose best value lies on the edge of its range."""
    out = []
    for name, (low, high) in tuned.ranges.items():
        x = best[name] if is_rate(name) else 1 - best[name]
        share = np.log(x / low) / np.log(high / low)
        if not EDGE < share < 1 - EDGE:
            out.append(name)
    return out


def runner(task: str, optimizer: LearnedOptimizer, chunk: int) -> Callable:
    """(thetas: leaves (N, ...), keys (N,)) -> losses (N, STEPS): one run for each pair.

    One compiled program takes `chunk` runs side by side. Losses are those before each
    update, clipped as in meta-training. A key draws the problem and its start.
    """
    build = partial(TASKS[task].build, None)
    fresh, step = inner_training(build, optimizer)
    limit = build(jax.random.key(0)).loss_limit

    def run(theta, key):
        def one(carry, t):
            return step(theta, carry, key)  # no batches: the key is not used

        return clip_loss(jax.lax.scan(one, fresh(key), length=STEPS)[1], limit)

    together = jax.jit(jax.vmap(run), compiler_options=compiler_options())

    def losses(thetas, keys):
        out, count = [], len(keys)
        for first in range(0, count, chunk):
            index = np.minimum(first + np.arange(chunk), count - 1)
            part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], thetas)
            out.append(np.asarray(together(part, keys[index])))
        return np.concatenate(out)[:count]

    return losses


def repeat(theta: Any, count: int) -> Any:
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], count, 0), theta)


def test_keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(TEST_SEED), count)


def chunk_of(task: str, size: Size) -> int:
    """Runs side by side: of two moons few, which fit a CPU's caches better."""
    return 8 if task == "two_moons" else min(4000, size.configurations * size.problems)


def tune(task: str, name: str, size: Size) -> dict:
    """Random search on the meta-objective, appendix C.3; the best one on fresh problems.

    Prints what it found. Returns configurations {hyperparameter: (N,)}, objective (N,)
    the mean loss over steps and problems, best {hyperparameter: value}, edge (names of
    those on the edge of their range: a warning on stderr), losses (tests, STEPS) of the
    best on the test problems.
    """
    tuned = BASELINES[name]
    count, each, tests = size
    seed = [SEARCH_SEED, *name.encode()]
    configurations = draw_configurations(tuned, count, seed)
    start = {key: float(x[0]) for key, x in configurations.items()}
    losses = runner(task, from_optax(tuned.make, start), chunk_of(task, size))
    keys = jax.random.split(jax.random.key(SEARCH_SEED), each)
    pairs = {key: np.repeat(x, each) for key, x in configurations.items()}
    found = losses(pairs, keys[np.tile(np.arange(each), count)])
    objective = found.mean(1).reshape(count, each).mean(1)
    best = {key: x[objective.argmin()] for key, x in configurations.items()}
    edge = on_edge(tuned, best)
    if edge:
        print(
            f"warning: {task}, {name}: the best {', '.join(edge)} of {count} lies on the "
            "edge of the range searched",
            file=sys.stderr,
        )
    best = {key: float(x) for key, x in best.items()}
    print(f"{task}, {name}: {describe(best)}: {objective.min():.4g}", flush=True)
    return {
        "configurations": configurations,
        "objective": objective,
        "best": best,
        "edge": edge,
        "losses": losses(repeat(best, tests), test_keys(tests)),
    }


def describe(best: dict) -> str:
    return ", ".join(f"{key} {x:.4g}" for key, x in best.items())


def theta_losses(task: str, optimizer: Any, theta: Any, tests: int) -> np.ndarray:
    """(tests, STEPS): losses of one theta on the test problems."""
    losses = runner(task, optimizer, 8 if task == "two_moons" else tests)
    return losses(repeat(theta, tests), test_keys(tests))


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    x = np.asarray(x, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))


# --- figures 10 to 12: the maps of hyperparameters


def compute_maps(task: str, size: Size) -> dict:
    """Random search of every baseline on a task, and its best on fresh problems."""
    found = {name: tune(task, name, size) for name in BASELINES}
    tests = [mean_and_error(x["losses"].mean(1)) for x in found.values()]
    return {
        "task": task,
        **size._asdict(),
        "optimizer": list(BASELINES),
        "best": [describe(x["best"]) for x in found.values()],
        "on_edge": [", ".join(x["edge"]) for x in found.values()],
        "meta_objective": [float(x["objective"].min()) for x in found.values()],
        "test_loss_and_error": tests,
        "curves": found,
    }


def plot_maps(result: dict, plt: Any) -> Any:
    """A dot for each configuration, dark for good, one colour scale; a star: the best."""
    pairs = [
        ("momentum", "learning_rate", "momentum"),
        ("RMSProp", "learning_rate", "decay"),
        ("Adam", "learning_rate", "b1"),
        ("Adam", "learning_rate", "b2"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    objectives = {k: v["objective"] for k, v in result["curves"].items()}
    low = min(x.min() for x in objectives.values())
    high = np.percentile(np.concatenate(list(objectives.values())), 80)
    norm = plt.matplotlib.colors.LogNorm(low, high)
    for axis, (name, *names) in zip(axes, pairs, strict=True):
        found = result["curves"][name]
        worst_first = np.argsort(-found["objective"])  # so that the best lie on top
        x, y = (found["configurations"][n][worst_first] for n in names)
        dots = axis.scatter(
            x, 1 - y, c=found["objective"][worst_first], s=6, norm=norm, cmap="viridis"
        )
        best = found["best"]
        label = f"best: {best[names[0]]:.2g}, {best[names[1]]:.3g}"
        axis.plot(
            best[names[0]],
            1 - best[names[1]],
            "*",
            ms=15,
            mfc="gold",
            mec="k",
            label=label,
        )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="learning rate",
            ylabel=f"1 - {names[1]}",
            title=f"{name}: {found['objective'].min():.4g}",
        )
        axis.invert_yaxis()
        axis.legend(fontsize=8, loc="lower left")
    bar = figure.colorbar(dots, ax=axes, extend="max")
    bar.set_label("meta-objective (mean loss)")
    return figure


# --- figure 9: performance


def shipped(task: str) -> tuple[dict, Any, dict]:
    """(theta, optimizer, card) of the trained GRU for a task."""
    path = WEIGHTS / f"gru_{task}.npz"
    trained = load_theta(path)
    return trained.theta, trained.optimizer, read_card(path)


def compute_9(quick: bool) -> dict:
    """Mean loss over 200 steps on fresh problems: mean and standard error over problems.

    Also the paired difference GRU - momentum on the same problems, with its error.
    """
    result = {"task": list(TITLES), "optimizer": [*BASELINES, "GRU"]}
    means, pairs, tests, best = [], [], [], []
    for task in TITLES:
        size = size_of(task, quick)
        rows = []
        for name in BASELINES:
            found = tune(task, name, size)
            rows.append(found["losses"].mean(1))
            best.append(f"{task}, {name}: {describe(found['best'])}")
        theta, optimizer, _ = shipped(task)
        rows.append(theta_losses(task, optimizer, theta, size.tests).mean(1))
        means.append([mean_and_error(x) for x in rows])
        pairs.append(mean_and_error(rows[-1] - rows[0]))
        tests.append(size.tests)
    means, pairs = np.array(means), np.array(pairs)
    return result | {
        "tests": tests,
        "mean_loss": means[..., 0],
        "standard_error": means[..., 1],
        "gru_minus_momentum": pairs[:, 0],
        "gru_minus_momentum_error": pairs[:, 1],
        "best": best,
    }


def plot_9(result: dict, plt: Any) -> Any:
    """A panel for each task; error bars are standard errors over problems."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    names = result["optimizer"]
    for i, axis in enumerate(axes):
        mean, error = result["mean_loss"][i], result["standard_error"][i]
        colors = ["0.6"] * (len(names) - 1) + ["C3"]
        low = np.minimum(error, 0.9 * mean)  # a log axis has no 0
        axis.errorbar(names, mean, [low, error], fmt="none", ecolor="k", capsize=4)
        axis.scatter(names, mean, c=colors, s=50, zorder=3)
        for x, y, e in zip(range(len(names)), mean, error, strict=True):
            axis.annotate(
                f"{y:.3g}", (x, y + e), ha="center", va="bottom", fontsize=8,
                xytext=(0, 2), textcoords="offset points",
            )  # fmt: skip
        axis.set_title(f"{TITLES[result['task'][i]]}, {result['tests'][i]} problems")
        axis.set(yscale="log", xlim=(-0.5, len(names) - 0.5))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim((mean - low).min() / 1.5, (mean + error).max() * 1.8)
    axes[0].set_ylabel("mean loss over 200 steps")
    return figure


# --- figure 7: the linear regression optimizer, taken apart

KEPT = 1, 3  # modes of the reduced optimizers in figure 7c
STAGES = {"early": "gru_linear_regression_early", "trained": "gru_linear_regression"}


def stage(name: str) -> tuple[dict, Any, int]:
    """(theta, optimizer, meta-steps) of a stage of meta-training."""
    path = WEIGHTS / f"{STAGES[name]}.npz"
    trained = load_theta(path)
    return trained.theta, trained.optimizer, read_card(path)["meta_steps"]


def compute_7(quick: bool, curves: bool) -> dict:
    """The modes of both stages, beside momentum tuned on the task and by theory.

    curves: also the losses on the test problems, of the tuned momentum, and for each stage
    of the optimizer itself, of its linearisation and of its first modes alone.
    """
    task = "linear_regression"
    size = size_of(task, quick)
    tuned = tune(task, "momentum", size)
    theory = dynamics.heavy_ball(*problems.CURVATURES)
    result = {
        "tuned_momentum": list(tuned["best"].values()),  # alpha, beta
        "heavy_ball": theory,
        "stage": list(STAGES),
        "curves": {"modes": [], "losses": {"tuned momentum": tuned["losses"]}},
    }
    rows = {
        k: [] for k in ("meta_steps", "residual", "drift", "condition", "first_modes")
    }
    for name in STAGES:
        theta, optimizer, meta_steps = stage(name)
        system = dynamics.linearise(optimizer, theta)
        modes = dynamics.modes_of(system)
        rows["meta_steps"].append(meta_steps)
        rows["residual"].append(system.residual)
        rows["drift"].append(system.drift)
        rows["condition"].append(modes.condition)
        first = zip(modes.momentum[:4], modes.learning_rate[:4], strict=True)
        rows["first_modes"].append(
            [[b.real, b.imag, a.real, a.imag] for b, a in first]
        )  # beta, then alpha
        result["curves"]["modes"].append(modes)
        if not curves:
            continue
        versions = {
            "itself": (optimizer, theta),
            "linearised": (dynamics.reduced(modes), {}),
        }
        for keep in KEPT:
            small = dynamics.reduced(modes, keep, rest=False)
            count = len(dynamics.keep_modes(modes, keep))
            label = "first mode alone" if count == 1 else f"first {count} modes"
            versions[label] = (small, {})
        for version, (made, theta_of) in versions.items():
            losses = theta_losses(task, made, theta_of, size.tests)
            result["curves"]["losses"][f"{name}: {version}"] = losses
    if curves:
        summary = {
            k: mean_and_error(v.mean(1)) for k, v in result["curves"]["losses"].items()
        }
        result["optimizers"] = list(summary)
        result["mean_loss_and_error"] = list(summary.values())
    return result | rows


def plot_7a(result: dict, plt: Any) -> Any:
    """Eigenvalues of the Jacobian at the fixed point; colour: the long-run step."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 400))
    for i, axis in enumerate(axes):
        modes = result["curves"]["modes"][i]
        beta, weight = modes.momentum, long_run(modes)
        axis.plot(circle.real, circle.imag, "0.7", lw=1)
        order = np.argsort(weight)  # the strongest on top
        low, high = weight.max() / 1e3, weight.max()
        norm = plt.matplotlib.colors.LogNorm(low, high)
        shown = np.clip(weight[order], low, high)
        dots = axis.scatter(
            beta.real[order], beta.imag[order], c=shown, norm=norm, s=45, cmap="viridis_r",
            edgecolors="k", linewidths=0.5,
        )  # fmt: skip
        tuned = result["tuned_momentum"][1]
        axis.axvline(
            tuned, color="goldenrod", lw=1, label=f"tuned momentum, {tuned:.3f}"
        )
        axis.set(
            title=_stage_title(result, i),
            xlabel="real part",
            aspect="equal",
            xlim=(-1.1, 1.1),
            ylim=(-1.1, 1.1),
        )
        axis.legend(fontsize=8, loc="lower left")
        figure.colorbar(dots, ax=axis, label="|alpha / (1 - beta)|, long-run step")
    axes[0].set_ylabel("imaginary part")
    return figure


def long_run(modes: dynamics.Modes) -> np.ndarray:
    """|alpha / (1 - beta)|: how far a mode moves in the end for one gradient."""
    return np.abs(modes.learning_rate / (1 - modes.momentum))


def _stage_title(result: dict, i: int) -> str:
    return f"{result['stage'][i]}: {result['meta_steps'][i]} meta-steps"


def plot_7b(result: dict, plt: Any) -> Any:
    """Momentum and learning rate of each mode; the stars: tuned momentum and theory."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", sharey=True
    )
    for i, axis in enumerate(axes):
        modes = result["curves"]["modes"][i]
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="1 - |beta|  (longer memory to the right)",
            title=_stage_title(result, i),
        )
        beta, alpha = modes.momentum, modes.learning_rate
        single = np.abs(beta.imag) < 1e-9
        for chosen, marker, label in (
            (single & (alpha.real > 0), "o", "real, downhill"),
            (single & (alpha.real <= 0), "v", "real, uphill"),
            (~single, "s", "complex pair"),
        ):
            x, y = 1 - np.abs(beta[chosen]), np.abs(alpha[chosen])
            axis.plot(x, y, marker, mfc="none", ms=7, label=label)
        for name, marker in (("heavy_ball", "w"), ("tuned_momentum", "gold")):
            rate, momentum = result[name]
            label = f"{name.replace('_', ' ')}: {rate:.2f}, {momentum:.3f}"
            axis.plot(1 - momentum, rate, "*", ms=16, mfc=marker, mec="k", label=label)
        first = modes.learning_rate[0].real, modes.momentum[0].real
        text = f"  {first[0]:.2f}, {first[1]:.3f}"
        axis.annotate(text, (1 - first[1], first[0]), xytext=(0, -14), fontsize=8,
                      textcoords="offset points", ha="center")  # fmt: skip
        axis.legend(fontsize=8, loc="lower left")
        axis.set(xlim=(1.2, 0.03), ylim=(1e-4, 20))
        axis.set_xticks([1, 0.5, 0.2, 0.1, 0.05], ["1", "0.5", "0.2", "0.1", "0.05"])
        axis.minorticks_off()
    axes[0].set_ylabel("|alpha|, learning rate of the mode")
    return figure


def plot_7c(result: dict, plt: Any) -> Any:
    """Mean losses over the test problems: the optimizer and what is left of it."""
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 4.4), layout="constrained", sharey=True
    )
    losses = result["curves"]["losses"]
    momentum = losses["tuned momentum"].mean(0)
    styles = ("k-", "C0-", "C1--", "C2:")
    for i, axis in enumerate(axes):
        label = f"tuned momentum: {losses['tuned momentum'].mean():.3g}"
        axis.plot(momentum, color="goldenrod", lw=3, alpha=0.6, label=label)
        name = result["stage"][i]
        own = [k for k in losses if k.startswith(f"{name}:")]
        for key, style in zip(own, styles, strict=True):
            label = f"{key.split(': ')[1]}: {losses[key].mean():.3g}"
            axis.plot(losses[key].mean(0), style, lw=1.5, label=label)
        axis.set(yscale="log", xlabel="inner steps", title=_stage_title(result, i))
        axis.legend(fontsize=8)
        axis.set_ylim(1e-5, 30)
    axes[0].set_ylabel(f"mean loss over {len(losses['tuned momentum'])} problems")
    return figure


# --- STAR under the same lens


def compute_modes_star(data: Any, snapshots: tuple[int, ...], entries: int) -> dict:
    """Learning rates of STAR's three running means of the gradient, along one run.

    The shipped STAR trains the network of its own task, seed 0. At each snapshot, `entries`
    parameters of every tensor: alpha_k of `dynamics.accumulator_rates`, divided by
    the 1/v that STAR multiplies it by, so that Adam with a rate of beta1 reads beta1.
    Returns quantiles (snapshots, M, 3), at 10, 50 and 90 %; nominal (M,) the part of the
    nominal term alone, beta1 (1 - beta_k) / M; and the decays (M,).
    """
    trained = load_theta(WEIGHTS / "star_fmnist.npz")
    theta, optimizer, constants = trained
    decays = star.effective_decays(theta, constants).momentum
    build = partial(TASKS["fmnist"].build, data)
    fresh, step = inner_training(build, optimizer)
    key = jax.random.key(TEST_SEED)

    @jax.jit
    def advance(carry, first, count):
        def one(t, carry):
            return step(theta, carry, jax.random.fold_in(key, t))[0]

        return jax.lax.fori_loop(first, first + count, one, carry)

    def pick(p, i):
        return jax.random.randint(jax.random.fold_in(key, i), (entries,), 0, p.size)

    @jax.jit
    def rates(carry, t):
        task = build(key)
        batch = task.batch(jax.random.fold_in(key, t), "train")
        params, state = carry.params, carry.optimizer
        grads = jax.grad(task.loss)(params, key, batch)
        leaves, treedef = jax.tree.flatten(params)
        index = treedef.unflatten([pick(p, i) for i, p in enumerate(leaves)])
        alpha = dynamics.accumulator_rates(
            optimizer, theta, decays, grads, state, params, index
        )
        _, new = optimizer.update(theta, grads, state, params)
        v = jax.tree.map(
            lambda r, j: jnp.sqrt(r.reshape(-1)[j] + constants.rms_eps), new.rms, index
        )
        both = jax.tree.map(lambda a, v: a * v[None], alpha, v)
        return jnp.concatenate(jax.tree.leaves(both), 1)  # (M, entries of all tensors)

    carry, done, found = fresh(key), 0, []
    for t in snapshots:
        carry, done = advance(carry, done, t - done), t
        found.append(np.asarray(rates(carry, jnp.int32(t))))
        print(f"inner step {t}", flush=True)
    found = np.array(found)  # (snapshots, M, n)
    decays = np.asarray(decays)
    return {
        "inner_step": snapshots,
        "decay": decays,
        "timescale": 1 / (1 - decays),
        "nominal": constants.beta1 * (1 - decays) / len(decays),
        "quantiles": np.quantile(found, (0.1, 0.5, 0.9), axis=-1).transpose(1, 2, 0),
        "share_uphill": (found < 0).mean(-1),
        "curves": {"alpha": found},
    }


def plot_modes_star(result: dict, plt: Any) -> Any:
    """Learning rate by timescale, a dot for each parameter, a colour for each snapshot."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    alpha, times = result["curves"]["alpha"], result["timescale"]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(alpha)))
    rng = np.random.default_rng(0)
    for s, color in enumerate(colors):
        shift = 1.12 ** (s - (len(alpha) - 1) / 2)
        for k, time in enumerate(times):
            x = time * shift * np.exp(0.02 * rng.normal(size=alpha.shape[-1]))
            label = f"inner step {result['inner_step'][s]}" if k == 0 else None
            axis.plot(x, alpha[s, k], ".", ms=2.5, color=color, alpha=0.5)
            middle = result["quantiles"][s, k, 1]
            axis.plot(
                time * shift, middle, "D", ms=7, color=color, mec="k", label=label
            )
    for k, time in enumerate(times):
        label = "nominal term alone" if k == 0 else None
        width = np.array([0.75, 1.33]) * time
        axis.plot(width, [result["nominal"][k]] * 2, "C3", lw=1.5, label=label)
    scale = np.abs(result["nominal"]).min()
    axis.set_yscale("symlog", linthresh=scale / 3)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(
        xscale="log",
        xlabel="timescale 1 / (1 - beta_k), inner steps",
        ylabel="learning rate alpha_k, times v",
    )
    axis.legend(fontsize=8)
    return figure


def _gru_7(
    args: argparse.Namespace, curves: bool, title: str
) -> tuple[dict, str, dict]:
    result = compute_7(args.quick, curves)
    return result, f"GRU on linear regression: {title}", ABOUT


def _gru_9(args: argparse.Namespace) -> tuple[dict, str, dict]:
    return compute_9(args.quick), "mean loss over 200 steps, fresh problems", ABOUT


def _maps(task: str, args: argparse.Namespace) -> tuple[dict, str, dict]:
    result = compute_maps(task, size_of(task, args.quick))
    count = result["configurations"]
    return result, f"{TITLES[task]}: {count} configurations each", ABOUT


def _modes_star(args: argparse.Namespace) -> tuple[dict, str, dict]:
    spec = TASKS["fmnist"]
    data, about = spec.load(args.data, args.data_dir)
    snapshots, entries = ((10, 50), 8) if args.quick else ((10, 100, 1000, 3000), 64)
    result = compute_modes_star(data, snapshots, entries)
    return result, f"STAR's running means as modes: {about['dataset']}", about


ABOUT = {"dataset": "drawn from its formula", "stand_in": False}
FIGURES = {
    "gru7a": (
        partial(_gru_7, curves=False, title="eigenvalues at the fixed point"),
        plot_7a,
    ),
    "gru7b": (
        partial(_gru_7, curves=False, title="modes as hyperparameters"),
        plot_7b,
    ),
    "gru7c": (partial(_gru_7, curves=True, title="what its modes do alone"), plot_7c),
    "gru9": (_gru_9, plot_9),
    "gru10": (partial(_maps, "linear_regression"), plot_maps),
    "gru11": (partial(_maps, "rosenbrock"), plot_maps),
    "gru12": (partial(_maps, "two_moons"), plot_maps),
    "modes_star": (_modes_star, plot_modes_star),
}
