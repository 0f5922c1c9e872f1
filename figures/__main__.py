"""Figures by name: a `compute_*` that returns arrays and a `plot_*` that draws them.

`python -m figures NAME` writes NAME.png and NAME.json. FIGURES maps NAME to (compute: args
of the command line -> result, title, about; plot: result, pyplot -> figure). What a result
holds under "curves" is drawn, not written.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import numpy as np

import star
from baselines import BASELINES, with_beta3
from experiments import comparison
from figures import maheswaranathan as figures_dynamics
from figures import metz_chaos as figures_metz
from figures import metz_estimators as figures_estimators
from figures import metz_truncation as figures_truncation
from figures import stability as figures_nqm
from figures import star_learned as figures_learned
from figures import star_runs as figures_star
from inner import curves
from store import Arguments, UserError, only_run_in, run_command, save_figure, save_json
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
    """Compute, print, save and plot args.figure; args as `parse` gives them."""
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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Arguments(
        prog="python -m figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = ", ".join(FIGURES)
    add("figure", choices=tuple(FIGURES), metavar="NAME", help=f"one of {names}")
    add("--quick", action="store_true", help="a small form of the figure, in seconds")
    add("--full", action="store_true", help="figures 4, app5, app6: at full size")
    add(
        "--literal-alpha",
        action="store_true",
        help="figures 2b, 2c: alpha = c lambda_max(H) / 2, as the paper prints it, "
        "not c times the stable limit 2 / lambda_max(H)",
    )
    add(
        "--runs",
        default=str(comparison.WEIGHTS / "fig3"),
        help="figures 3, app1-4: folder of sweep's runs (default weights/fig3)",
    )
    add("--theta", action="append", help="figures learned, 4, app5, app6: a theta.npz")
    add("--steps", type=int, help="inner steps, where the figure has a choice")
    add("--seeds", type=int, default=3, help="fresh seeds (default 3)")
    add("--baselines", default="adam,nadamw,sgdm", help="comma-separated")
    add("--data", default="auto", choices=("real", "stand-in", "auto"))
    add("--data-dir", help="folder that holds the data set")
    add("--out", help="folder for the figure; default runs/figure-NAME")
    args = parser.parse_args(argv)
    args.baselines = [name for name in args.baselines.split(",") if name]
    if unknown := [name for name in args.baselines if name not in BASELINES]:
        raise UserError(f"unknown baseline {unknown[0]!r}")
    for name in ("steps", "seeds"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < 2**31:
            raise UserError(f"--{name} must be in 1 .. 2^31 - 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for path in args.theta or ():
        comparison.trained(path)  # a bad file is refused before anything is written
    folder = pathlib.Path(args.out or f"runs/figure-{args.figure}")
    folder.mkdir(parents=True, exist_ok=True)
    with only_run_in(folder):
        return draw(args, folder)


if __name__ == "__main__":
    sys.exit(run_command("figures", main))
