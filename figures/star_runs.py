"""Figures 3, 4 and App. 1-6 of the STAR paper.

Figures 3 and App. 1-4 draw the meta-training runs in `--runs`, as experiments/sweep.py
makes them: their meta-loss from log.csv, and inner training with their thetas. Figures 4,
App. 5 and App. 6 train the suite's tasks with thetas that have not seen them.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

import eval as evaluation
import store
from baselines import curves, ema
from eval import limit_y
from experiments import suite
from experiments.catalogue import SUITES, TASKS

LABELS = {
    "star_wd0": "STAR, decay 0",
    "star_wd0.1": "STAR, decay 0.1",
    "star_wd0.5": "STAR, decay 0.5",
    "star_wd1": "STAR, decay 1",
    "blackbox": "blackbox",
    "hyperparam": "hyperparam",
    "no_preconditioner": "no preconditioner",
    "no_nominal": "no nominal term",
}
COLORS = {name: f"C{i}" for i, name in enumerate(LABELS)}
DECAYS = ("star_wd0", "star_wd0.1", "star_wd0.5", "star_wd1")
MAIN = ("star_wd0.1", "star_wd0.5", "blackbox", "hyperparam")


def draw_band(axes: Any, x: np.ndarray, lines: np.ndarray, label: str, color: str):
    """The mean of lines (n, points) and the band from the lowest to the highest."""
    axes.plot(x, lines.mean(0), color=color, label=label, lw=1.3)
    axes.fill_between(x, lines.min(0), lines.max(0), color=color, alpha=0.2, lw=0)


# Figures 3 and App. 1-4: meta-training runs and where their thetas lead


def read_log(path: pathlib.Path) -> np.ndarray:
    """(2, rows): meta-steps and meta-losses of a log.csv."""
    rows = store.read_csv(path, np.inf)
    if not rows:
        raise store.UserError(f"{path} has no meta-steps yet")
    return np.array(rows).T[:2]


def find_runs(root: pathlib.Path, variants: Sequence[str]) -> dict:
    """Variant -> theta.npz of its seeds; those without are named and left out.

    Raises UserError where not even two variants are there to compare.
    """
    runs = {name: sorted(root.glob(f"{name}-seed*/theta.npz")) for name in variants}
    missing = ", ".join(f"{name}-seed0" for name, found in runs.items() if not found)
    runs = {name: found for name, found in runs.items() if found}
    if len(runs) < min(2, len(variants)):
        command = f"python -m experiments.sweep --out {root}"
        raise store.UserError(f"{root} has no {missing}: {command}")
    if missing:
        print(f"{root} has no {missing}: left out")
    return runs


def check_same(where: str, found: list[dict], *names: str) -> None:
    """UserError where the cards or recipes differ in one of these."""
    for name in names:
        values = {json.dumps(one.get(name)) for one in found}
        if len(values) > 1:
            raise store.UserError(f"{where}: runs differ in {name}: {sorted(values)}")


def compute_runs(args: Any, variants: Sequence[str], steps: int) -> tuple[dict, dict]:
    """(result, about): for each variant the meta-losses, and the inner training losses
    (meta-seeds, steps) with its thetas, one fresh seed each, far beyond the horizon."""
    runs = find_runs(pathlib.Path(args.runs), variants)
    cards = {name: [store.read_card(path) for path in runs[name]] for name in runs}
    all_cards = [card for found in cards.values() for card in found]
    recipes = [card["recipe"] for card in all_cards]
    check_same(args.runs, all_cards, "task", "inner_steps")
    check_same(args.runs, recipes, "estimator", "horizons", "clip_by", "horizon")
    for name, found in cards.items():
        check_same(f"{args.runs}, {name}", found, "optimizer", "constants")
    spec = TASKS[all_cards[0]["task"]]
    data, about = spec.load(args.data, args.data_dir)
    steps = args.steps or steps
    keys = jax.random.split(jax.random.key(evaluation.EVALUATION_SEED), 1)
    meta, inner = {}, {}
    for name, paths in runs.items():
        _, (optimizer, *_), thetas = zip(*map(evaluation.trained, paths), strict=True)
        report = evaluation.counter(name, steps, len(thetas))
        run = curves(spec.build, data, optimizer, thetas, keys, steps, report=report)
        print(f"in {run.seconds:.1f} s")
        inner[name] = run.losses[:, 0]
        meta[name] = [read_log(path.with_name("log.csv")) for path in paths]
    begun = {name for name in runs if any(c["recipe"]["init"] for c in cards[name])}
    horizon = recipes[0]["horizon"]
    drawn = {"meta": meta, "inner": inner, "recipe": recipes[0]}
    result = {
        "task": all_cards[0]["task"],
        "steps": steps,
        "labels": {k: LABELS[k] + ", begun trained" * (k in begun) for k in runs},
        "variants": {k: summarize(meta[k], inner[k], horizon) for k in runs},
        "curves": drawn,
    }
    return result, about


def summarize(meta: list, losses: np.ndarray, horizon: int) -> dict:
    """Numbers of one variant, a list over its meta-training seeds each."""
    at = [n for n in (horizon, 10_000, 100_000) if n <= losses.shape[1]]
    return {
        "meta_loss": [log[1, -max(1, log.shape[1] // 10) :].mean() for log in meta],
        "mean_loss_over_horizon": losses[:, :horizon].mean(1),
        **{f"loss_at_{n}": evaluation.final(losses[:, :n]) for n in at},
        "diverged": evaluation.diverged(losses).tolist(),
    }


def plot_runs(result: dict, plt: Any, individual: bool = False) -> Any:
    """Above, meta-training; below, inner training with the thetas, horizon dashed."""
    drawn, recipe = result["curves"], result["curves"]["recipe"]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(6.5, 7.5), layout="constrained"
    )
    shown = {above: [], below: []}
    for name in result["variants"]:
        logs = drawn["meta"][name]
        length = min(log.shape[1] for log in logs)
        at, meta = logs[0][0, :length], np.stack([log[1, :length] for log in logs])
        # log.csv may be thinned: smooth over meta-steps, not over rows
        spacing = (at[-1] - at[0]) / max(1, length - 1)
        inner = ema(drawn["inner"][name], evaluation.SMOOTHING)
        panels = (
            (above, at, ema(meta, 0.95**spacing)),
            (below, np.arange(1, result["steps"] + 1), inner),
        )
        for axes, x, lines in panels:
            shown[axes].append(lines)
            label, color = result["labels"][name], COLORS[name]
            if individual:
                axes.plot(
                    x,
                    lines.T,
                    color=color,
                    lw=0.9,
                    label=[label] + [None] * (len(lines) - 1),
                )
            else:
                draw_band(axes, x, lines, label, color)
    counts = [len(lines) for lines in drawn["inner"].values()]
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    drawn_lengths = ", T log-uniform" * (recipe.get("horizons") == "log-uniform")
    above.set_title(
        f"meta-training on {result['task']}, {seeds} seed(s){drawn_lengths}"
    )
    above.set(xlabel="meta-steps", ylabel="meta-loss (nats, EMA 0.95)")
    below.set_title("inner training with the thetas")
    below.set(xlabel="inner steps", ylabel="training loss (nats, EMA 0.98)")
    if result["steps"] > 5000:
        below.set(xscale="log", xlim=(100, result["steps"]))
    if recipe["horizon"] < result["steps"]:
        below.axvline(recipe["horizon"], color="k", ls="--", lw=1)
    for axes, lines in shown.items():
        limit_y(axes, lines, top=98)
    above.legend(fontsize=8)
    return figure


def _runs(name: str, variants: Sequence[str], steps: int = 20_000) -> Callable:
    def compute(args):
        result, about = compute_runs(args, variants, 200 if args.quick else steps)
        return result, f"STAR, figure {name}: {about['dataset']}", about

    return compute


# Figures 4 and App. 5-6: tasks that no theta was meta-trained on


def _tasks(name: str, choose: Callable) -> Callable:
    """compute: the thetas of the command line and the baselines on these tasks of a suite,
    which have folders of their own in the figure's, resumed task by task."""

    def compute(args):
        args.steps = 20 if args.quick else args.steps or 2000
        folder = pathlib.Path(args.out or f"runs/figure-{args.figure}")
        paths = args.theta or [evaluation.best_theta("fmnist")]
        names = choose(SUITES["full" if args.full else "small"])
        results = suite.on_tasks(names, args, paths, folder)
        rows = [entry.row for entries, _ in results.values() for entry in entries]
        sets = {about["dataset"]: about for _, about in results.values()}
        about = {
            "dataset": ", ".join(sets),
            "dataset_checksum": ", ".join(a["dataset_checksum"] for a in sets.values()),
            "stand_in": any(a["stand_in"] for a in sets.values()),
        }
        return {"rows": rows, "curves": results}, f"STAR, figure {name}", about

    return compute


def _plot_tasks(result: dict, plt: Any) -> Any:
    size = suite.panels_size(len(result["curves"]))
    figure = plt.figure(figsize=size, layout="constrained")
    suite.draw_tasks(figure, result["curves"])
    return figure


def figure_4(names: Sequence[str]) -> list[str]:
    """(a) MLP with layer norm (b) ResNet (c) LSTM (d) transformer."""
    four = ("mlp_c10_layernorm", "resnet", "lstm", "transformer")
    return [name for name in names if name.startswith(four)]


FIGURES = {
    "3": (_runs("3", MAIN), plot_runs),
    "4": (_tasks("4", figure_4), _plot_tasks),
    "app1": (_runs("App. 1", MAIN), partial(plot_runs, individual=True)),
    "app2": (_runs("App. 2", DECAYS), plot_runs),
    "app3": (_runs("App. 3", ("star_wd0.5", "no_preconditioner")), plot_runs),
    "app4": (_runs("App. 4", ("star_wd0.5", "no_nominal")), plot_runs),
    "app5": (_tasks("App. 5", lambda names: names[:8]), _plot_tasks),
    "app6": (_tasks("App. 6", lambda names: names[8:]), _plot_tasks),
}
