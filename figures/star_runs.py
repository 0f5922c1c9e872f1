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
from matplotlib.figure import Figure

import eval as evaluation
import store
from baselines import LEGEND, color_of, counted_seeds, curves, draw_band, ema
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
    "no_preconditioner_1e-3": "no preconditioner, beta3 1e-3",
    "no_nominal": "no nominal term",
}
DECAYS = ("star_wd0", "star_wd0.1", "star_wd0.5", "star_wd1")
ABLATED = ("star_wd0.5", "no_preconditioner", "no_preconditioner_1e-3")
MAIN = ("star_wd0.1", "star_wd0.5", "blackbox", "hyperparam")


def draw_lines(axes: Any, x: np.ndarray, lines: np.ndarray, label: str) -> None:
    """Each of lines (n, points)."""
    axes.plot(x, lines.T, color=color_of(label), lw=0.9)
    axes.lines[-1].set_label(label)


# Figures 3 and App. 1-4: meta-training runs and where their thetas lead


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


def check_same(where: str, cards: list[dict], *names: str) -> None:
    """UserError where the cards differ in one of these."""
    for name in names:
        values = {json.dumps(card.get(name)) for card in cards}
        if len(values) > 1:
            raise store.UserError(f"{where}: runs differ in {name}: {sorted(values)}")


def compute_runs(args: Any, variants: Sequence[str], steps: int) -> tuple[dict, dict]:
    """(result, about): for each variant the meta-losses, and the inner training losses
    (meta-seeds, steps) with its thetas, one fresh seed each, far beyond the horizon."""
    root = pathlib.Path(args.runs or evaluation.WEIGHTS / "fig3_small")
    runs, steps = find_runs(root, variants), args.steps or steps
    cards = {k: [read_card_and_recipe(path) for path in runs[k]] for k in runs}
    all_cards = sum(cards.values(), [])
    same = ("task", "inner_steps", "estimator", "horizons", "clip_by", "horizon")
    check_same(str(root), all_cards, *same)
    for name, found in cards.items():
        check_same(f"{root}, {name}", found, "optimizer", "constants")
    shared = all_cards[0]
    data, about = TASKS[shared["task"]].load(args.data, args.data_dir)
    setting = TASKS[shared["task"]].build, data
    keys = jax.random.split(jax.random.key(evaluation.EVALUATION_SEED), 1)
    meta, inner = {}, {}
    for name, paths in runs.items():
        _, (optimizer, *_), thetas = zip(*map(evaluation.trained, paths), strict=True)
        report = evaluation.counter(name, steps, len(thetas))
        run = curves(*setting, optimizer, thetas, keys, steps, report=report)
        print(f"in {run.seconds:.1f} s")
        inner[name] = run.losses[:, 0]
        logs = [store.read_csv(path.with_name("log.csv"), np.inf) for path in paths]
        meta[name] = [np.array(rows).T[:2] for rows in logs]  # meta-steps, meta-losses
    begun = {name for name in runs if any(card["init"] for card in cards[name])}
    result = {
        "task": shared["task"],
        "steps": steps,
        "labels": {k: LABELS[k] + ", begun trained" * (k in begun) for k in runs},
        "variants": {k: summarize(meta[k], inner[k], shared["horizon"]) for k in runs},
        "curves": {"meta": meta, "inner": inner, "recipe": shared},
    }
    return result, about


def read_card_and_recipe(path: pathlib.Path) -> dict:
    card = store.read_card(path)
    return card | card["recipe"]


def summarize(meta: list, losses: np.ndarray, horizon: int) -> dict:
    """Numbers of one variant, a list over its meta-training seeds each."""
    at = [n for n in (horizon, 10_000, 100_000) if n <= losses.shape[1]]
    return {
        "meta_loss": [log[1, -max(1, log.shape[1] // 10) :].mean() for log in meta],
        "mean_loss_over_horizon": losses[:, :horizon].mean(1),
        **{f"loss_at_{n}": evaluation.final(losses[:, :n]) for n in at},
        "diverged": evaluation.diverged(losses).tolist(),
    }


def plot_runs(figure: Figure, result: dict, draw: Callable = draw_band) -> None:
    """Above, meta-training; below, inner training with the thetas, horizon dotted."""
    meta, inner, recipe = result["curves"].values()
    above, below = figure.subplots(2, 1)
    shown = {above: [], below: []}
    for name, label in result["labels"].items():
        length = min(log.shape[1] for log in meta[name])
        at, losses = meta[name][0][0, :length], [log[1, :length] for log in meta[name]]
        # log.csv may be thinned: smooth over meta-steps, not over rows
        spacing = (at[-1] - at[0]) / max(1, length - 1)
        shown[above].append(ema(losses, 0.95**spacing))
        shown[below].append(ema(inner[name], evaluation.SMOOTHING))
        draw(above, at, shown[above][-1], label)
        x = np.arange(1, result["steps"] + 1)
        draw(below, x, shown[below][-1], label)
    counts = [len(lines) for lines in inner.values()]
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    title = f"meta-training on {result['task']}, {counted_seeds(seeds)}"
    title += ", T log-uniform" * (recipe.get("horizons") == "log-uniform")
    above.set(title=title, xlabel="meta-steps", ylabel="meta-loss (nats, EMA 0.95)")
    below.set_title("inner training with the thetas")
    below.set(xlabel="inner steps", ylabel="training loss (nats, EMA 0.98)")
    if result["steps"] > 5000:
        below.set(xscale="log", xlim=(100, result["steps"]))
    evaluation.draw_horizons(below, {recipe["horizon"]}, result["steps"])
    for axes, lines in shown.items():
        evaluation.limit_y(axes, lines, top=98)
    figure.legend(*below.get_legend_handles_labels(), **LEGEND)


def _runs(name: str, variants: Sequence[str], draw: Callable = draw_band) -> tuple:
    def compute(args):
        result, about = compute_runs(args, variants, 200 if args.quick else 20_000)
        return result, f"STAR, figure {name}: {about['dataset']}", about

    return compute, partial(plot_runs, draw=draw), 7


# Figures 4 and App. 5-6: tasks that no theta was meta-trained on


def _tasks(name: str, small: Sequence[str], full: Sequence[str]) -> tuple:
    """The thetas of the command line and the baselines on these tasks of the two suites,
    which have folders of their own in the figure's, resumed task by task."""

    def compute(args):
        args.steps = 20 if args.quick else args.steps or 2000
        folder = pathlib.Path(args.out or f"runs/figure-{args.figure}")
        paths = args.theta or [evaluation.best_theta("fmnist")]
        results = suite.on_tasks(full if args.full else small, args, paths, folder)
        rows = [entry.row for entries, _ in results.values() for entry in entries]
        sets = {about["dataset"]: about for _, about in results.values()}.values()
        about = {
            name: ", ".join(one[name] for one in sets)
            for name in ("dataset", "dataset_checksum")
        }
        about["stand_in"] = any(one["stand_in"] for one in sets)
        return {"rows": rows, "curves": results}, f"STAR, figure {name}", about

    def plot(figure, result):
        suite.draw_tasks(figure, result["curves"])

    return compute, plot, suite.height_of(len(small))


def figure_4(names: Sequence[str]) -> list[str]:
    """(a) MLP with layer norm (b) ResNet (c) LSTM (d) transformer."""
    four = ("mlp_c10_layernorm", "resnet", "lstm", "transformer")
    return [name for name in names if name.startswith(four)]


SMALL, FULL = SUITES["small"], SUITES["full"]
FIGURES = {
    "3": _runs("3", MAIN),
    "4": _tasks("4", figure_4(SMALL), figure_4(FULL)),
    "app1": _runs("App. 1", MAIN, draw_lines),
    "app2": _runs("App. 2", DECAYS),
    "app3": _runs("App. 3", ABLATED),
    "app4": _runs("App. 4", ("star_wd0.5", "no_nominal")),
    "app5": _tasks("App. 5", SMALL[:8], FULL[:8]),
    "app6": _tasks("App. 6", SMALL[8:], FULL[8:]),
}
