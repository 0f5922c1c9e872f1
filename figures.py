"""Figures by name: a `compute_*` that returns arrays and a `plot_*` that draws them.

`python eval.py --figure NAME` calls them; each writes NAME.png and NAME.json. FIGURES maps
NAME to (compute: args of the command line -> result, title, about; plot: result, pyplot
-> figure). What a result holds under "curves" is drawn, not written.
"""

import argparse
import json
from typing import Any

import jax
import matplotlib
import numpy as np

import figures_dynamics
import figures_estimators
import figures_learned
import figures_metz
import figures_nqm
import figures_star
import figures_truncation
import star
from baselines import with_beta3
from inner import curves
from store import save_figure, save_json
from tasks import TASKS

BETA3 = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 0.0)


def compute_betas(build: Any, data: Any, steps: int, theta_seeds: int) -> dict:
    """What beta3 does before any meta-training: losses of untrained networks.

    Returns mean_loss (beta3, theta seeds) over the first `steps` inner steps, in nats and
    unclipped, and curves (beta3, theta seeds, steps).
    """
    keys = jax.random.split(jax.random.key(0), theta_seeds)
    thetas = [star.PRESETS["star"].init_theta(key) for key in keys]
    run_key = jax.random.split(jax.random.key(1), 1)
    both = [
        {"theta": theta, "beta3": np.float32(beta3)}
        for beta3 in BETA3
        for theta in thetas
    ]
    optimizer = with_beta3(star.Constants())
    losses = curves(build, data, optimizer, both, run_key, steps).losses[:, 0]
    losses = losses.reshape(len(BETA3), theta_seeds, steps)
    return {"beta3": BETA3, "curves": losses, "mean_loss": losses.mean(-1)}


def plot_betas(result: dict, plt: Any) -> Any:
    """Left: the loss over inner time. Right: its mean against beta3, a dot per theta."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, (beta3, losses) in enumerate(zip(BETA3, result["curves"], strict=True)):
        for s, loss in enumerate(losses):
            label = f"beta3 = {beta3:g}" if s == 0 else None
            left.plot(np.arange(1, len(loss) + 1), loss, f"C{i}", lw=0.8, label=label)
        right.plot([max(beta3, 1e-8)] * len(losses), result["mean_loss"][i], f"C{i}o")
    left.set(
        xlabel="inner steps", ylabel="training loss (nats)", yscale="log", xscale="log"
    )
    left.legend(fontsize=8)
    ticks = [max(beta3, 1e-8) for beta3 in BETA3]
    right.set(
        xlabel="beta3", ylabel="mean training loss (nats)", xscale="log", yscale="log"
    )
    right.set_xticks(ticks, [f"{beta3:g}" for beta3 in BETA3])
    right.axhline(np.log(10), color="k", ls="--", lw=1, label="chance, ln 10")
    right.legend(fontsize=8)
    return figure


def _betas(args: argparse.Namespace) -> tuple[dict, str, dict]:
    name = "fmnist_small" if args.quick else "fmnist"
    data, about = TASKS[name].load(args.data, args.data_dir)
    steps = 100 if args.quick else 500
    result = compute_betas(TASKS[name].build, data, steps, theta_seeds=3)
    title = f"STAR with an untrained network, {name}"
    return result, f"{title}: {about['dataset']}", about


FIGURES = {
    "betas": (_betas, plot_betas),
    **figures_star.FIGURES,
    **figures_nqm.FIGURES,
    **figures_metz.FIGURES,
    **figures_truncation.FIGURES,
    **figures_estimators.FIGURES,
    **figures_dynamics.FIGURES,
    **figures_learned.FIGURES,
}


def _finite(values: Any) -> Any:
    """Nested lists and dicts, with None for nan and inf, which JSON does not have."""
    if values is None or isinstance(values, str):
        return values
    if isinstance(values, dict):
        return {name: _finite(v) for name, v in values.items()}
    if np.ndim(values):
        return [_finite(v) for v in values]
    return float(values) if np.isfinite(values) else None


def draw(args: argparse.Namespace, folder: Any) -> int:
    """Compute, print, save and plot args.figure; args as `eval.parse` gives them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    name, quick = args.figure, args.quick
    compute, plot = FIGURES[name]
    result, title, about = compute(args)
    summary = _finite({k: v for k, v in result.items() if k != "curves"})
    report = {"title": title, "quick": quick, **about, **summary}
    save_json(folder / f"{name}.json", report)
    figure = plot(result, plt)
    figure.suptitle(title)
    save_figure(folder / f"{name}.png", figure, dpi=150)
    plt.close(figure)
    print(json.dumps(report, indent=1))
    print(f"figure in {folder / f'{name}.png'}")
    return 0
