"""Figures by name: `python -m figures NAME` writes NAME.png and NAME.json.

FIGURES maps NAME to compute, plot and inches of height. compute: args of the command line
-> (result, title, about the data). plot(figure, result) draws on an empty figure. What a
result holds under "curves" is drawn, not written.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

import eval as evaluation
import star
import store
from baselines import LEGEND, WIDTH, curves
from experiments.search import varied
from figures import (
    maheswaranathan,
    metz_chaos,
    metz_conv,
    metz_estimators,
    metz_truncation,
    stability,
    star_learned,
    star_runs,
)
from tasks import TASKS

BETA3 = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 0.0)


def compute_betas(args: argparse.Namespace) -> tuple[dict, str, dict]:
    """What beta3 does before any meta-training: losses of three untrained networks.

    Returns mean_loss (beta3, 3) over the inner steps, in nats and unclipped, and curves
    (beta3, 3, steps).
    """
    name, steps = ("fmnist_small", 100) if args.quick else ("fmnist", 500)
    data, about = TASKS[name].load(args.data, args.data_dir)

    keys = jax.random.split(jax.random.key(0), 3)
    thetas = [star.init_theta(key, star.PAPER) for key in keys]
    both = [x | {"beta3": np.float32(beta3)} for beta3 in BETA3 for x in thetas]
    run_key = jax.random.split(jax.random.key(1), 1)
    losses = curves(
        TASKS[name].build, data, varied("star"), both, run_key, steps
    ).losses
    losses = losses.reshape(len(BETA3), len(thetas), steps)
    result = {"beta3": BETA3, "curves": losses, "mean_loss": losses.mean(-1)}
    return result, f"STAR with an untrained network, {name}: {about['dataset']}", about


def plot_betas(figure: Figure, result: dict) -> None:
    """Left: the loss over inner time. Right: its mean against beta3, a dot per theta."""
    left, right = figure.subplots(1, 2)
    ticks, labels = [max(b, 1e-8) for b in BETA3], [f"{b:g}" for b in BETA3]
    for i, losses in enumerate(result["curves"]):
        x = np.arange(1, losses.shape[1] + 1)
        color = colormaps["viridis"](i / len(labels))
        left.plot(x, losses.T, color=color, lw=0.8)
        left.lines[-1].set_label(f"beta3 = {labels[i]}")
        right.plot([ticks[i]] * len(losses), result["mean_loss"][i], "o", color=color)
    left.set(ylabel="training loss (nats)", xlabel="inner steps")
    right.set(ylabel="mean training loss (nats)", xlabel="beta3")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.axhline(np.log(10), color="k", ls="--", lw=1, label="chance, ln 10")
    figure.legend(*left.get_legend_handles_labels(), **LEGEND | {"ncols": 4})
    right.set_xticks(ticks, labels)


FIGURES = {"betas": (compute_betas, plot_betas, 3.6), **star_runs.FIGURES}
FIGURES |= star_learned.FIGURES | stability.FIGURES | metz_chaos.FIGURES
FIGURES |= metz_truncation.FIGURES | metz_estimators.FIGURES | metz_conv.FIGURES
FIGURES |= maheswaranathan.FIGURES


def finite(values: Any) -> Any:
    """Nested lists and dicts, with None for nan and inf, which JSON does not have."""
    if isinstance(values, dict):
        return {name: finite(v) for name, v in values.items()}
    if np.ndim(values):
        return [finite(v) for v in values]
    known = isinstance(values, str) or values is None
    return values if known else float(values) if np.isfinite(values) else None


def parse(argv: Any = None) -> argparse.Namespace:
    parser = store.Arguments("python -m figures", description=__doc__)
    add, names = parser.add_argument, ", ".join(FIGURES)
    add("figure", choices=tuple(FIGURES), metavar="NAME", help=f"one of {names}")
    add("--quick", action="store_true", help="a small form of the figure, in seconds")
    add("--full", action="store_true", help="figures 4, app5, app6: at full size")
    text = "figures 2b, 2c: alpha = c lambda_max(H) / 2, as the paper prints it"
    add("--literal-alpha", action="store_true", help=text)
    text = (
        "folder of runs: for figures 3, app1-4 of sweep's (default weights/fig3_small)"
    )
    add("--runs", help=f"{text}, for metz6 of metz's (default weights/metz_conv)")
    return evaluation.parse_comparison(parser, argv, steps=None)


def figure_of(plot: Callable, height: float, result: dict, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, height))
    plot(figure, result)
    figure.suptitle(title)
    return figure


def main(argv: Any = None) -> int:
    args = parse(argv)
    name, (compute, plot, height) = args.figure, FIGURES[args.figure]
    folder = pathlib.Path(args.out or f"runs/figure-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    with store.only_run_in(folder):
        result, title, about = compute(args)
        summary = finite({k: v for k, v in result.items() if k != "curves"})
        report = {"title": title, "quick": args.quick, **about, **summary}
        store.save_json(folder / f"{name}.json", report)
        drawing = plot, height, result, title
        store.save_figure(folder / f"{name}.png", figure_of, *drawing)
    print((folder / f"{name}.json").read_text(), end="")
    print(f"figure in {folder / f'{name}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("figures", main))
