"""Figures 4 and 8 of Metz et al. 2019: metz4, the two gradients and their merge; metz8,
what it buys."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import estimators
import train
from baselines import LEGEND, color_of, ema, on_fresh_seeds
from companions import lopts, metz
from devices import compiler_options, each
from tasks import TASKS, inner_problem

RATES = (0.03, 1.0)  # of momentum 0.9 on fmnist_small: smooth, and past the stable edge
# Inner steps, from 3: momentum first shows in the third loss, the rate in the second.
LENGTHS = (3, 5, 10, 20, 50, 100, 200)
SIGMA = 0.01  # of theta


def compute_variances(
    build: Callable, data: Any, lengths: tuple, pairs: int, sizes: tuple
) -> dict:
    """Variance of the gradient of one pair by unroll length: BPTT, ES and their merge.

    theta: log learning rate and logit of momentum of SGD, held at RATES and 0.9. Each of
    the `pairs` unrolls starts from a fresh network. Returns, at rates R, lengths L and for
    merges of S pairs (`sizes`): variance_bptt, variance_es (R, L), summed over theta, inf
    where a gradient is; variance_merged (S, R, L), times the pairs in a merge, to stand
    beside them; and their ratios.
    """
    optimizer = lopts.LEARNED["momentum"]
    _, unravel = ravel_pytree(optimizer.init_theta(jax.random.key(0)))

    def gradients(data, theta, key, length):  # {name: (pairs, size of theta)}
        step = inner_problem(partial(build, data), optimizer, unravel, 1)
        problem = metz.several(step, length, max(lengths))
        pair = estimators.merged(problem, 1, SIGMA, each())

        def one(key):
            init_key, key = jax.random.split(key)
            return pair.estimate(key, theta, pair.init(init_key, theta))[0]

        return each()(one)(jax.random.split(key, pairs))

    run = jax.jit(gradients, compiler_options=compiler_options())
    bptt, es = np.empty((2, len(RATES), len(lengths)))
    merged = np.empty((len(sizes), *bptt.shape))
    for at in np.ndindex(bptt.shape):
        theta = lopts.encode({"learning_rate": RATES[at[0]], "momentum": 0.9})
        theta, length = jnp.array(jax.tree.leaves(theta)), jnp.int32(lengths[at[1]])
        grads = run(data, theta, jax.random.key(at[1]), length)
        bptt[at], es[at] = total_variance(grads["bptt"]), total_variance(grads["es"])
        merged[:, *at] = [size * merged_variance(grads, size) for size in sizes]
    return {
        "learning_rates": RATES,
        "lengths": lengths,
        "pairs": pairs,
        "pairs_merged": sizes,
        "variance_bptt": bptt,
        "variance_es": es,
        "variance_merged": merged,
        "merged_over_better": merged / np.minimum(bptt, es),
        "bptt_over_es": bptt / es,
    }


def total_variance(grads: jax.Array) -> float:
    """(n, size of theta) -> the variance over n, summed over theta; inf for no number."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.asarray(grads, np.float64).var(0, ddof=1).sum()
    return float(total) if np.isfinite(total) else np.inf


def merged_variance(grads: dict, size: int, resamples: int = 4000) -> float:
    """Variance of the merge of `size` pairs, drawn `resamples` times, with replacement,
    from the pairs at hand: {name: (pairs, size of theta)}."""

    def merge(key):
        drawn = jax.random.randint(key, (size,), 0, len(grads["bptt"]))
        chosen = jax.tree.map(lambda g: g[drawn], grads)
        return estimators.inverse_variance_mean(chosen)[0]

    keys = jax.random.split(jax.random.key(0), resamples)
    return total_variance(jax.jit(jax.vmap(merge))(keys))


def meta_train(data: Any, quick: bool, **changes: Any) -> tuple[dict, dict]:
    """({"fresh_loss", "adam_loss", ...} of `on_fresh_seeds`, metrics (meta-steps,)).

    Metz's recipe (D.3) at a scale of minutes: fmnist_small, the unroll from 10 to 200 inner
    steps of T = 500, jitter 20 %, 4 pairs. quick: a twin that takes seconds, with two
    meta-parameters, which shows that it runs and nothing else.
    """
    scale = dict(truncation=10, horizon=500, unroll=200, steps=200, particles=4)
    small = dict(optimizer="momentum", steps=20, horizon=100, unroll=40)
    settings = scale | changes | (small if quick else {})
    recipe = metz.Recipe(task="fmnist_small", **settings)
    build = TASKS["fmnist_small"].build
    made = metz.parts(recipe, build)
    state = train.init_state(recipe, made, data)
    first, unravel = ravel_pytree(made.optimizer.init_theta(train.run_keys(recipe)[0]))
    step_fn = train.compile_meta_step(recipe, made, data, state)
    key, rows, begin = train.run_keys(recipe)[2], [], time.perf_counter()
    for _ in range(recipe.steps):
        state, metrics = step_fn(data, key, state)
        rows.append({name: float(x) for name, x in metrics.items()})
    minutes = (time.perf_counter() - begin) / 60
    thetas = {"fresh": unravel(state.theta), "untrained": unravel(first)}
    found = on_fresh_seeds(build, data, made.optimizer, thetas, recipe.horizon)
    found |= {"minutes": minutes, "inner_steps": made.inner_steps(recipe.steps)}
    return found, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def compute_4(data: Any, quick: bool) -> dict:
    """Figure 4: variances by unroll length, and while the MLP optimizer is trained."""
    sizes = ((3, 5, 20), 24, (4,)) if quick else (LENGTHS, 1600, (8, 32, 128))
    result = compute_variances(TASKS["fmnist_small"].build, data, *sizes)
    _, metrics = meta_train(data, quick)
    # the merge's own would be biased
    training = {name: metrics[f"{name}_noise"] ** 2 for name in ("bptt", "es")}
    return result | {"curves": training}


def plot_4(figure: Figure, result: dict) -> None:
    """Left and middle: by unroll length, at two rates. Right: over meta-training."""
    (*axes, training), lengths = figure.subplots(1, 3), result["lengths"]
    for i, axis in enumerate(axes):
        bptt, es = result["variance_bptt"][i], result["variance_es"][i]
        axis.plot(lengths, bptt, "C0o-", label="backpropagation")
        axis.plot(lengths, es, "C1s-", label="evolution strategies")
        merges = zip(result["pairs_merged"], result["variance_merged"], strict=True)
        for (size, variance), style in zip(merges, (":", "-.", "--"), strict=False):
            label = f"merge of {size} pairs"
            axis.plot(lengths, variance[i], f"k{style}", label=label)
        axis.set(xlabel="unroll (inner steps)", xscale="log", yscale="log")
        axis.set_title(f"momentum 0.9,\nlearning rate {RATES[i]:g}")
    axes[0].set_ylabel("variance of a pair's meta-gradient")
    figure.legend(*axis.get_legend_handles_labels(), **LEGEND)
    training.plot(result["curves"]["bptt"], "C0", lw=0.8)
    training.plot(result["curves"]["es"], "C1", lw=0.8)
    training.set_title("while the MLP optimizer\nis trained (the unroll grows)")
    training.set(xlabel="meta-steps", yscale="log", ylabel="variance")


ABLATIONS = {
    "merged": {},
    "gradients only": dict(estimator="gradients"),
    "ES only": dict(estimator="es"),
    "unroll 10": dict(unroll=10, jitter=0.0),
    "unroll 50": dict(unroll=50, growth="constant"),
    "unroll 200": dict(growth="constant"),
    "no momentum": dict(optimizer="mlp_no_momentum"),
    "no time": dict(optimizer="mlp_no_time"),
}


def compute_8(data: Any, quick: bool) -> dict:
    """Figure 8, small: Metz's recipe with one thing changed, at equal meta-steps.

    Returns, by ablation, of the trained theta on three fresh seeds: fresh_loss, the mean
    training loss over T in nats; for scale that of an untrained one and of Adam; minutes
    and inner steps of meta-training. curves: the meta-losses (ablations, meta-steps).
    """
    names = list(ABLATIONS)[:3] if quick else list(ABLATIONS)
    runs = [meta_train(data, quick, **ABLATIONS[name]) for name in names]
    found = {key: [run[key] for run, _ in runs] for key in runs[0][0]}
    curves = [metrics["loss"] for _, metrics in runs]
    return {"ablations": names, **found, "curves": curves}


def plot_8(figure: Figure, result: dict) -> None:
    """Left: meta-losses (EMA 0.95) over meta-steps. Right: the trained thetas."""
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(result["ablations"]):
        left.plot(ema(result["curves"][i], 0.95), f"C{i}", label=name)
        right.plot(result["fresh_loss"][i], i, f"C{i}o")
    left.set(xlabel="meta-steps", ylabel="meta-loss (nats, EMA 0.95)")
    left.legend()
    adam = dict(color=color_of("Adam"), ls="--", label="Adam, best rate")
    right.axvline(result["adam_loss"][0], **adam)
    right.set_yticks(range(len(result["ablations"])), result["ablations"])
    right.invert_yaxis()
    right.set_xlabel("mean training loss over T\non fresh seeds (nats)")
    right.legend()


def _on_fmnist_small(compute: Callable, name: str, args: Any) -> tuple[dict, str, dict]:
    data, about = TASKS["fmnist_small"].load(args.data, args.data_dir)
    title = f"Metz et al. 2019, {name}: {about['dataset']}"
    return compute(data, args.quick), title, about


FIGURES = {
    "metz4": (partial(_on_fmnist_small, compute_4, "figure 4"), plot_4, 3.6),
    "metz8": (
        partial(_on_fmnist_small, compute_8, "figure 8, small"),
        plot_8,
        3.6,
    ),
}
