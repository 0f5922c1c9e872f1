"""Figures 4 and 8 of Metz et al. 2019: the two gradients, their merge, and what it buys.

`python -m figures metz4`, `metz8` (figures.py keeps the list).
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import estimators
import settings
import train
from companions import lopts
from inner import batching, compiler_options, ema, inner_unroll
from tasks import TASKS

RATES = (0.03, 1.0)  # of momentum 0.9 on fmnist_small: smooth, and past the stable edge
# Inner steps, from 3: momentum first shows in the third loss, the rate in the second.
LENGTHS = (3, 5, 10, 20, 50, 100, 200)
SIZES = (8, 32, 128)  # pairs in a merge


def compute_variances(
    build: Callable,
    data: Any,
    lengths: tuple[int, ...],
    pairs: int,
    sizes: tuple[int, ...],
    sigma: float = 0.01,
) -> dict:
    """Variance of the gradient of one pair by unroll length: BPTT, ES and their merge.

    theta: log learning rate and logit of momentum of SGD, held at RATES and 0.9; each of
    the `pairs` unrolls starts from a fresh network. Returns learning_rates (R,), lengths
    (L,), pairs_merged (S,) = sizes; variance_bptt, variance_es (R, L): over the pairs,
    summed over theta, inf where a gradient is; variance_merged (S, R, L): N times that of
    the merged gradient of N pairs, to stand beside them; and their ratios.
    """
    optimizer = lopts.LEARNED["momentum"]

    def gradients(data, theta, key, length):  # {name: (pairs, size of theta)}
        step = inner_unroll(partial(build, data), optimizer, 1)
        problem = estimators.several(step, length, max(lengths))
        pair = estimators.merged(problem, length, sigma, batching())

        def one(key):
            init_key, key = jax.random.split(key)
            grad, _, _ = pair.estimate(key, theta, pair.init(init_key, theta))
            return {k: jnp.stack(jax.tree.leaves(v)) for k, v in grad.items()}

        return batching()(one)(jax.random.split(key, pairs))

    run = jax.jit(gradients, compiler_options=compiler_options())
    shape = len(RATES), len(lengths)
    single = {name: np.empty(shape) for name in ("bptt", "es")}
    merged = np.empty((len(sizes), *shape))
    for i, rate in enumerate(RATES):
        theta = lopts.encode({"learning_rate": rate, "momentum": 0.9})
        for j, length in enumerate(lengths):
            grads = run(data, theta, jax.random.key(j), jnp.int32(length))
            for name, of_name in single.items():
                of_name[i, j] = total_variance(grads[name])
            for k, size in enumerate(sizes):
                merged[k, i, j] = size * merged_variance(grads, size)
    return {
        "learning_rates": RATES,
        "lengths": lengths,
        "pairs": pairs,
        "pairs_merged": sizes,
        **{f"variance_{name}": v for name, v in single.items()},
        "variance_merged": merged,
        "merged_over_better": merged / np.minimum(*single.values()),
        "bptt_over_es": single["bptt"] / single["es"],
    }


def total_variance(grads: jax.Array) -> float:
    """(n, size of theta) -> the variance over n, summed over theta; inf for no number."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.asarray(grads, np.float64).var(0, ddof=1).sum()
    return float(total) if np.isfinite(total) else np.inf


def merged_variance(grads: dict, size: int, resamples: int = 4000) -> float:
    """Variance of the merge of `size` pairs, drawn `resamples` times, with replacement,
    from the pairs at hand: {name: (pairs, size of theta)}."""
    pairs = len(grads["bptt"])

    def merge(key):
        drawn = jax.random.randint(key, (size,), 0, pairs)
        chosen = jax.tree.map(lambda g: g[drawn], grads)
        return estimators.inverse_variance_mean(chosen)[0]

    return total_variance(
        jax.jit(jax.vmap(merge))(jax.random.split(jax.random.key(0), resamples))
    )


def meta_train(
    config: settings.Config, data: Any
) -> tuple[train.TrainState, dict, float]:
    """(state, metrics: dict of (meta-steps,), seconds): a run of train.py's meta-step."""
    state = train.init_state(config, data)
    step_fn = train.compile_meta_step(config, data, state)
    key, rows = train.run_keys(config)[2], []
    begin = time.perf_counter()
    for _ in range(config.steps):
        state, metrics = step_fn(data, key, state)
        rows.append(metrics)
    rows = [{k: float(v) for k, v in row.items()} for row in rows]
    metrics = {k: np.array([row[k] for row in rows]) for k in rows[0]}
    return state, metrics, time.perf_counter() - begin


def base_config(quick: bool, **changes: Any) -> settings.Config:
    """Metz's recipe (D.3) at a scale of minutes: fmnist_small, the unroll from 10 to 200
    inner steps of T = 500, jitter 20 %, 4 pairs. quick: a twin that takes seconds, with
    two meta-parameters, which shows that it runs and nothing else."""
    small = (
        dict(optimizer="momentum", steps=20, horizon=100, unroll=40) if quick else {}
    )
    scale = dict(
        task="fmnist_small",
        truncation=10,
        horizon=500,
        unroll=200,
        steps=200,
        particles=4,
    )
    recipe = settings.PRESETS["metz"] | scale | changes | small
    return dataclasses.replace(settings.Config(), **recipe)


def compute_4(data: Any, quick: bool) -> dict:
    """Figure 4: variances by unroll length, and while the MLP optimizer is trained."""
    build = TASKS["fmnist_small"].build
    if quick:
        result = compute_variances(build, data, (3, 5, 20), pairs=24, sizes=(4,))
    else:
        result = compute_variances(build, data, LENGTHS, pairs=1600, sizes=SIZES)
    _, metrics, _ = meta_train(base_config(quick), data)
    names = {"bptt": "bptt_noise", "es": "es_noise"}  # the merge's own would be biased
    training = {name: metrics[key] ** 2 for name, key in names.items()}
    return result | {
        "training_variance_first_and_last_tenth": {
            name: [
                float(np.median(part))
                for part in (v[: len(v) // 10], v[-len(v) // 10 :])
            ]
            for name, v in training.items()
        },
        "curves": training,
    }


def plot_4(result: dict, plt: Any) -> Any:
    """Left and middle: by unroll length, at two rates. Right: over meta-training."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    names = {"bptt": "backpropagation", "es": "evolution strategies"}
    styles = {
        "bptt": dict(color="C3", marker="o"),
        "es": dict(color="C0", marker="s"),
    }
    sizes, merged = result["pairs_merged"], result["variance_merged"]
    for i, rate in enumerate(result["learning_rates"]):
        for name, label in names.items():
            variance = result[f"variance_{name}"][i]
            axes[i].plot(result["lengths"], variance, **styles[name], label=label)
        lines = zip(sizes, merged, (":", "-.", "--"), strict=False)
        for size, variance, style in lines:
            label = f"merge of {size} pairs"
            axes[i].plot(result["lengths"], variance[i], "k", ls=style, label=label)
        axes[i].set(
            title=f"SGD with momentum 0.9, rate {rate:g}",
            xlabel="unroll (inner steps)",
            xscale="log",
            yscale="log",
        )
    axes[0].set_ylabel("variance of a pair's meta-gradient")
    for name in ("bptt", "es"):
        label, values = names[name], result["curves"][name]
        axes[2].plot(values, color=styles[name]["color"], lw=0.8, label=label)
    axes[2].set(
        title="while the MLP optimizer is trained\n(the unroll grows)",
        xlabel="meta-steps",
        yscale="log",
    )
    axes[0].legend(fontsize=8)
    return figure


ABLATIONS = {
    "merged": {},
    "gradients only": dict(estimator="truncated_bptt"),
    "ES only": dict(estimator="truncated_es"),
    "unroll 10": dict(unroll=10, jitter=0.0),
    "unroll 50": dict(unroll=50, unroll_growth="constant"),
    "unroll 200": dict(unroll_growth="constant"),
    "no momentum": dict(optimizer="mlp_no_momentum"),
    "no time": dict(optimizer="mlp_no_time"),
}


def compute_8(data: Any, quick: bool, seeds: int = 1) -> dict:
    """Figure 8, small: Metz's recipe with one thing changed, at equal meta-steps.

    Returns ablation names (A,), fresh_loss (A, seeds): mean training loss over T of the
    trained theta on three fresh seeds, nats; untrained and Adam's for scale; inner_steps
    and minutes (A,); curves: the meta-losses (A, seeds, meta-steps).
    """
    fresh, curves, minutes, inner, scale = [], [], [], [], {}
    names = list(ABLATIONS)[:3] if quick else list(ABLATIONS)
    for changes in (ABLATIONS[name] for name in names):
        for seed in range(seeds):
            config = base_config(quick, seed=seed, **changes)
            state, metrics, seconds = meta_train(config, data)
            found = train.fresh_runs(config, data, state)
            fresh.append(found["fresh_loss"])
            curves.append(metrics["loss"])
            scale = scale or {k: found[k] for k in ("untrained_loss", "adam_loss")}
        minutes.append(seconds / 60)
        inner.append(train.inner_steps(config, config.steps))
    shape = len(names), seeds
    return {
        "ablations": names,
        "fresh_loss": np.reshape(fresh, shape),
        **scale,
        "inner_steps": inner,
        "minutes": minutes,
        "curves": np.reshape(curves, (*shape, -1)),
    }


def plot_8(result: dict, plt: Any) -> Any:
    """Left: meta-losses (EMA 0.95) over meta-steps. Right: the trained thetas."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for i, (name, curves) in enumerate(
        zip(result["ablations"], result["curves"], strict=True)
    ):
        left.plot(ema(curves, 0.95).mean(0), f"C{i}", lw=1, label=name)
        right.plot(
            result["fresh_loss"][i], [i] * len(result["fresh_loss"][i]), f"C{i}o"
        )
    left.set(xlabel="meta-steps", ylabel="meta-loss of the unroll (nats, EMA 0.95)")
    left.legend(fontsize=8)
    right.axvline(
        result["adam_loss"], color="k", ls="--", lw=1, label="Adam, best of 3"
    )
    right.set_yticks(range(len(result["ablations"])), result["ablations"])
    right.invert_yaxis()
    right.set_xlabel("mean training loss over T on fresh seeds (nats)")
    right.legend(fontsize=8)
    return figure


def _on_fmnist_small(compute: Callable, name: str) -> Callable:
    def run(args):
        data, about = TASKS["fmnist_small"].load(args.data, args.data_dir)
        title = f"Metz et al. 2019, {name}: {about['dataset']}"
        return compute(data, args.quick), title, about

    return run


FIGURES = {
    "metz4": (_on_fmnist_small(compute_4, "figure 4"), plot_4),
    "metz8": (_on_fmnist_small(compute_8, "figure 8, small"), plot_8),
}
