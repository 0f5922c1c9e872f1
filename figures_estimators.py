"""Figures 4 and 8 of Metz et al. 2019: the two gradients, their merge, and what it buys.

`python eval.py --figure metz4`, `metz8` (figures.py keeps the list).
"""

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import estimators
import lopts
import train
from inner import batching, compiler_options, ema, inner_unroll
from tasks import TASKS

RATES = (0.03, 1.0)  # of momentum 0.9 on fmnist_small: smooth, and past the stable edge
# Inner steps, from 2: the loss of the first step is free of theta.
LENGTHS = (2, 5, 10, 20, 50, 100, 200)


def compute_variances(build, data, lengths, repeats: int, particles: int, sigma=0.01):
    """Variance of the mean gradient of N pairs by unroll length: BPTT, ES and their merge.

    theta: log learning rate and logit of momentum of SGD, held at RATES and 0.9; each
    unroll starts from a fresh network. Returns lengths (L,), learning_rates (R,) and, for
    each of "bptt", "es", "merged", variance (R, L): the sum over theta of the variance over
    `repeats` independent estimates, each of `particles` pairs; inf where a gradient is.
    """
    optimizer = lopts.LEARNED["momentum"]

    def gradients(theta, key, length):  # {name: (repeats, particles, size of theta)}
        step = inner_unroll(partial(build, data), optimizer, 1)
        problem = estimators.several(step, length, max(lengths))
        pair = estimators.merged(problem, length, sigma, batching())

        def one(key):
            init_key, key = jax.random.split(key)
            grad, _, _ = pair.estimate(key, theta, pair.init(init_key, theta))
            return {k: jnp.stack(jax.tree.leaves(v)) for k, v in grad.items()}

        grads = batching()(one)(jax.random.split(key, repeats * particles))
        return jax.tree.map(lambda g: g.reshape(repeats, particles, -1), grads)

    def variances(theta, key, length):
        grads = gradients(theta, key, length)
        means = {k: v.mean(1) for k, v in grads.items()}
        means["merged"] = jax.vmap(lambda g: estimators.inverse_variance_mean(g)[0])(
            grads
        )
        return {k: v.var(0, ddof=1).sum() for k, v in means.items()}

    run = jax.jit(variances, compiler_options=compiler_options())
    out = []
    for rate in RATES:
        theta = lopts.encode({"learning_rate": rate, "momentum": 0.9})
        for i, length in enumerate(lengths):
            out.append(run(theta, jax.random.key(i), jnp.int32(length)))
    shape = len(RATES), len(lengths)
    stacked = {k: np.reshape([float(x[k]) for x in out], shape) for k in out[0]}
    stacked = {k: np.where(np.isnan(v), np.inf, v) for k, v in stacked.items()}
    better = np.minimum(stacked["bptt"], stacked["es"])
    return {
        "learning_rates": RATES,
        "lengths": lengths,
        **{f"variance_{k}": v for k, v in stacked.items()},
        "merged_over_better": stacked["merged"] / better,
        "bptt_over_es": stacked["bptt"] / stacked["es"],
    }


def meta_train(config: train.Config, data):
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


def base_config(quick: bool, **changes) -> train.Config:
    """Metz's recipe (D.3) at a scale of minutes: fmnist_small, the unroll from 10 to 200
    inner steps of T = 500, jitter 20 %, 4 pairs. quick: a twin that takes seconds, with
    two meta-parameters, which shows that it runs and nothing else."""
    small = (
        dict(optimizer="momentum", steps=20, horizon=100, unroll=40) if quick else {}
    )
    settings = dict(
        task="fmnist_small",
        truncation=10,
        horizon=500,
        unroll=200,
        steps=200,
        particles=4,
    )
    recipe = train.PRESETS["metz"] | settings | changes | small
    return dataclasses.replace(train.Config(), **recipe)


def compute_4(data, quick: bool) -> dict:
    """Figure 4: variances by unroll length, and while the MLP optimizer is trained."""
    build = TASKS["fmnist_small"].build
    if quick:
        result = compute_variances(build, data, (2, 5, 20), repeats=6, particles=4)
    else:
        result = compute_variances(build, data, LENGTHS, repeats=25, particles=8)
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


def plot_4(result: dict, plt):
    """Left and middle: by unroll length, at two rates. Right: over meta-training."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    names = {
        "bptt": "backpropagation",
        "es": "evolution strategies",
        "merged": "merged",
    }
    styles = {
        "bptt": dict(color="C3", marker="o"),
        "es": dict(color="C0", marker="s"),
        "merged": dict(color="k", marker=".", ls="--"),
    }
    for i, rate in enumerate(result["learning_rates"]):
        for name, label in names.items():
            variance = result[f"variance_{name}"][i]
            axes[i].plot(result["lengths"], variance, **styles[name], label=label)
        axes[i].set(
            title=f"SGD with momentum 0.9, rate {rate:g}",
            xlabel="unroll (inner steps)",
            xscale="log",
            yscale="log",
        )
    axes[0].set_ylabel("variance of the meta-gradient")
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


def compute_8(data, quick: bool, seeds: int = 1) -> dict:
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


def plot_8(result: dict, plt):
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


def _on_fmnist_small(compute, name: str):
    def run(args):
        data, about = TASKS["fmnist_small"].load(args.data, args.data_dir)
        title = f"Metz et al. 2019, {name}: {about['dataset']}"
        return compute(data, args.quick), title, about

    return run


FIGURES = {
    "metz4": (_on_fmnist_small(compute_4, "figure 4"), plot_4),
    "metz8": (_on_fmnist_small(compute_8, "figure 8, small"), plot_8),
}
