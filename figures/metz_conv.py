"""Figures 5 and 6 of Metz et al. 2019, small: metz6, on his convolutional problem.

`--runs` holds runs of companions/metz.py (docs/results.md has the commands). The unrolls
are so long that backpropagation explodes. Three runs differ in the gradient, one is for the
validation loss, and two learn the eight hyperparameters of Adam.
"""

import pathlib
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import eval as evaluation
import store
from baselines import (
    BASELINES,
    LEGEND,
    Curves,
    as_theta,
    best_rate,
    color_of,
    curves,
    ema,
)
from companions import lopts
from companions.metz import TASKS

RUNS = {  # folder -> what the legend says, and its colour
    "merged": ("merged", "C0"),
    "gradients": ("gradients only", "C3"),
    "es": ("ES only", "C2"),
    "valid": ("merged, validation loss", "C9"),
    "adam8": ("Adam's eight", "C4"),
    "adam8_valid": ("Adam's eight, validation loss", "C6"),
    "begun": ("where the first four began", "C7"),
}
GRADIENTS = "merged", "gradients", "es"


def compute(args: Any) -> tuple[dict, str, dict]:
    """On fresh members of the family, after as many steps as in meta-training.

    By optimizer: mean_loss over all steps and last_loss of the last 100, of training
    batches, test_loss and test_accuracy at the end: (optimizers, seeds). Adam stands there
    twice, at the best rate for the mean training loss and for the test loss. The members'
    classes are drawn from the same hundred as in meta-training, unlike the paper's.
    """
    root = pathlib.Path(args.runs or evaluation.WEIGHTS / "metz_conv")
    missing = [name for name in RUNS if not (root / name / "theta.npz").exists()]
    if missing:
        raise store.UserError(
            f"{root} has no {', '.join(missing)}: see docs/results.md"
        )
    card = store.read_card(root / "merged/theta.npz")
    task, horizon = card["task"], card["recipe"]["horizon"]
    data, about = TASKS[task].load(args.data, args.data_dir)
    steps, seeds = (20, 2) if args.quick else (args.steps or horizon, 8)
    keys = jax.random.split(jax.random.key(evaluation.EVALUATION_SEED), seeds)
    run = partial(curves, TASKS[task].build, data, keys=keys, steps=steps)

    @cache  # both searches try the same rates
    def adam(rate):
        return run(BASELINES["adam"], [as_theta({"learning_rate": rate})])

    def best(measure):
        return best_rate(lambda rates: [measure(adam(rate)) for rate in rates])[0]

    runs = {}
    for name, (label, _) in RUNS.items():
        theta, optimizer = lopts.load_theta(root / name / "theta.npz")
        runs[label] = run(optimizer, [theta])
        print(f"{label}: mean loss {mean_loss(runs[label]):.4f}", flush=True)
    for name, measure in (("training", mean_loss), ("test", test_loss)):
        rate = best(measure)
        label = f"Adam {rate:g}, best {name} loss"
        runs[label] = adam(rate)
        print(f"{label}: mean loss {mean_loss(runs[label]):.4f}", flush=True)

    found = [numbers(x) for x in runs.values()]
    result = {"task": task, "steps": steps, "seeds": seeds, "optimizers": [*runs]}
    result |= {name: [x[name] for x in found] for name in found[0]}
    logs = {
        x: np.array(store.read_csv(root / x / "log.csv", np.inf)) for x in GRADIENTS
    }
    meta, noise = ({x: log[:, i] for x, log in logs.items()} for i in (1, 3))
    result["median_gradient_noise"] = {x: np.median(noise[x]) for x in GRADIENTS}
    result["largest_gradient_noise"] = {x: max(noise[x]) for x in GRADIENTS}
    result["curves"] = {"meta": meta, "noise": noise}
    title = f"Metz et al. 2019, figures 5 and 6, small: {about['dataset']}"
    return result, title, about


def mean_loss(run: Curves) -> float:
    return float(np.nan_to_num(run.losses, nan=np.inf).mean())


def test_loss(run: Curves) -> float:
    return float(np.nan_to_num(run.test["test_loss"], nan=np.inf).mean())


def numbers(run: Curves) -> dict:
    """(seeds,) each, of the one theta of the run."""
    last = run.losses[0, :, -100:].mean(-1)
    found = {"mean_loss": run.losses[0].mean(-1), "last_loss": last}
    found |= {name: x[0] for name, x in run.test.items()}
    return {name: x.astype(float).round(4).tolist() for name, x in found.items()}


def plot(figure: Figure, result: dict) -> None:
    """Left: meta-loss. Middle: noise of the meta-gradient. Right: test loss."""
    loss, noise, ends = figure.subplots(1, 3)
    for name in GRADIENTS:
        label, color = RUNS[name]
        values = result["curves"]["meta"][name]
        loss.plot(np.arange(1, len(values) + 1), ema(values, 0.8), color, label=label)
        noise.plot(result["curves"]["noise"][name], color)
    loss.set(xlabel="meta-steps", ylabel="meta-loss (nats, EMA 0.8)")
    noise.set(xlabel="meta-steps", yscale="log", ylabel="noise of the meta-gradient")
    colors = *(color for _, color in RUNS.values()), color_of("Adam"), "#b35806"
    ends_of = result["last_loss"], result["test_loss"]
    for label, color, *at in zip(result["optimizers"], colors, *ends_of, strict=True):
        ends.plot(*np.mean(at, -1), "o", color=color, label=label)
    ends.set(xlabel="training loss, last 100 (nats)", ylabel="test loss (nats)")
    figure.legend(*ends.get_legend_handles_labels(), **LEGEND)


FIGURES = {"metz6": (compute, plot, 3.8)}
