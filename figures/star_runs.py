"""Figures 3, 4 and App. 1-6 of the STAR paper, and the curves of any comparison.

`python -m figures 3`, `4`, `app1` ... `app6` (figures.py keeps the list). Figures 3
and App. 1-4 draw the meta-training runs in `--runs` (sweep.py makes them): their meta-loss
from log.csv, and inner training with their thetas. The others train on other tasks.
"""

import contextlib
import csv
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import matplotlib
import matplotlib.ticker
import numpy as np

from experiments import comparison
from inner import curves, ema, thinning
from store import UserError, load_theta, read_card, save_figure
from tasks import SUITES, TASKS

SMOOTHING = 0.98  # per step, of all curves (appendix B.2)
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


def smooth_steps(losses: np.ndarray, every: int) -> np.ndarray:
    """EMA 0.98 per step of (..., points), each the mean of `every` steps."""
    return ema(losses, SMOOTHING**every)


def draw_band(
    axes: Any, x: np.ndarray, lines: np.ndarray, label: str, color: str
) -> None:
    """Mean of lines (n, points) and the band from the lowest to the highest."""
    axes.plot(x, lines.mean(0), color=color, label=label, lw=1.3)
    axes.fill_between(x, lines.min(0), lines.max(0), color=color, alpha=0.2, lw=0)


def limit_y(axes: Any, lines: list[np.ndarray], top: float = 99.5) -> None:
    """A range that shows what the curves do after their first 2 %, on a log axis."""
    values = np.concatenate([v[..., v.shape[-1] // 50 :].ravel() for v in lines])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values):
        axes.set_ylim(
            max(values.min() * 0.9, 1e-4), 1.1 * max(np.percentile(values, top), 1e-4)
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high > 6 * low:  # a label at each of 2, 3, 4, ... would overlap
        axes.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
    plain = "{x:g}"
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    axes.tick_params(axis="y", which="both", labelsize=7)


def draw_entries(axes: Any, entries: list[comparison.Entry], title: str) -> None:
    """Inner training curves of one task: EMA 0.98, mean and band over seeds."""
    shown, steps = [], 0
    for i, entry in enumerate(entries):
        lines = smooth_steps(entry.curves.losses, entry.every)
        x = entry.every * np.arange(1, lines.shape[1] + 1)
        draw_band(axes, x, lines, entry.name, f"C{i}")
        shown, steps = [*shown, lines], x[-1]
    for horizon in {e.horizon for e in entries if e.horizon and e.horizon <= steps}:
        axes.axvline(horizon, color="k", ls="--", lw=1)
    limit_y(axes, shown)
    axes.set_title(title, fontsize=9)
    if steps > 5000:
        axes.set(xscale="log", xlim=(100, steps * 1.05))


def save_task(
    folder: pathlib.Path, task: str, entries: list[comparison.Entry], about: dict
) -> None:
    """curves.png of one task."""
    with picture(folder / "curves.png", figsize=(7.5, 4.6)) as figure:
        axes = figure.subplots()
        seeds = len(entries[0].curves.losses)
        draw_entries(axes, entries, f"{task}, {seeds} seed(s)\n{about['dataset']}")
        axes.set(xlabel="inner steps", ylabel="training loss (EMA 0.98)")
        axes.legend(fontsize=8)


def save_tasks(folder: pathlib.Path, results: dict, title: str) -> None:
    """overview.png: {task: (entries, about)}, a panel each."""
    with picture(folder / "overview.png", figsize=panels_size(len(results))) as figure:
        draw_tasks(figure, results)
        figure.suptitle(title)


@contextlib.contextmanager
def picture(path: pathlib.Path, **options: Any) -> Iterator[Any]:
    """A figure to draw on, which is saved as a PNG at the end."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(layout="constrained", **options)
    yield figure
    save_figure(path, figure, dpi=130)
    plt.close(figure)


COLUMNS = 4


def panels_size(number: int) -> tuple[float, float]:
    return 3.2 * min(COLUMNS, number), 2.6 * -(-number // COLUMNS) + 0.6


def draw_tasks(figure: Any, results: dict) -> None:
    """{task: (entries, about)}: a panel a task, one legend for all."""
    columns = min(COLUMNS, len(results))
    grid = figure.subplots(-(-len(results) // columns), columns, squeeze=False)
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for axes, (task, (entries, about)) in zip(grid.flat, results.items(), strict=False):
        named = [e._replace(name=comparison.general_name(e)) for e in entries]
        draw_entries(axes, named, f"{task}\n{about['dataset']}")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    columns = min(3, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.supylabel("training loss (EMA 0.98)", fontsize=9)


# Figures 3 and App. 1-4: meta-training runs and where their thetas lead


def read_log(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(meta-steps, meta-losses) of a log.csv. Raises UserError."""
    try:
        with open(path, newline="") as file:
            rows = [
                (float(r["step"]), float(r["meta_loss"])) for r in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no log of train.py") from None
    if not rows:
        raise UserError(f"{path} has no meta-steps yet")
    return tuple(np.array(rows).T)


def find_runs(
    root: pathlib.Path, variants: Sequence[str]
) -> dict[str, list[pathlib.Path]]:
    """Variant -> folders of its seeds; those without are named and left out.

    Raises UserError where not even two are there to compare.
    """
    runs = {
        name: sorted(path.parent for path in root.glob(f"{name}-seed*/theta.npz"))
        for name in variants
    }
    missing = ", ".join(f"{name}-seed0" for name, found in runs.items() if not found)
    runs = {name: found for name, found in runs.items() if found}
    if len(runs) < min(2, len(variants)):
        raise UserError(
            f"{root} has no {missing}: python -m experiments.sweep --out {root}"
        )
    if missing:
        comparison.say(f"{root} has no {missing}: left out")
    return runs


def check_same(where: str, found: list[dict], *names: str) -> None:
    """UserError where the cards or recipes differ in one of these."""
    for name in names:
        values = {json.dumps(one.get(name)) for one in found}
        if len(values) > 1:
            raise UserError(f"{where}: runs differ in {name}: {sorted(values)}")


def compute_runs(args: Any, variants: Sequence[str], steps: int) -> tuple[dict, dict]:
    """(result, about): for each variant the meta-losses, and the inner training losses
    (meta-seeds, points) with its thetas, one fresh seed each, far beyond the horizon."""
    runs = find_runs(pathlib.Path(args.runs), variants)
    cards = {
        name: [read_card(path / "theta.npz") for path in paths]
        for name, paths in runs.items()
    }
    all_cards = [card for found in cards.values() for card in found]
    task, recipes = all_cards[0].get("task"), [card.get("recipe") for card in all_cards]
    ours = all(isinstance(recipe, dict) and "init" in recipe for recipe in recipes)
    if task not in TASKS or not ours:
        raise UserError(f"{args.runs} has thetas that train.py did not write")
    check_same(args.runs, all_cards, "task", "inner_steps")
    check_same(args.runs, recipes, "estimator", "horizons", "clip_by", "horizon")
    for name, found in cards.items():
        check_same(f"{args.runs}, {name}", found, "optimizer", "constants")
    data, about = TASKS[task].load(args.data, args.data_dir)
    steps = args.steps or steps
    every = thinning(steps)
    keys = jax.random.split(jax.random.key(comparison.EVALUATION_SEED), 1)
    meta, inner, summary = {}, {}, {}
    for name, paths in runs.items():
        found = [load_theta(path / "theta.npz") for path in paths]
        report = comparison.progress(name, steps, len(paths), comparison.say)
        run = partial(curves, TASKS[task].build, data, found[0].optimizer)
        thetas = [trained.theta for trained in found]
        inner[name] = run(thetas, keys, steps, every=every, report=report).losses[:, 0]
        meta[name] = [read_log(path / "log.csv") for path in paths]
        summary[name] = summarize(meta[name], inner[name], every, all_cards[0])
    begun = {
        name
        for name, found in cards.items()
        if any(card["recipe"]["init"] for card in found)
    }
    result = {
        "task": task,
        "steps": steps,
        "labels": {k: LABELS[k] + ", begun trained" * (k in begun) for k in runs},
        "variants": summary,
        "curves": {"meta": meta, "inner": inner, "every": every, "card": all_cards[0]},
    }
    return result, about


def summarize(meta: list[tuple], losses: np.ndarray, every: int, card: dict) -> dict:
    """Numbers of one variant, a list over its meta-training seeds each."""
    horizon = card["recipe"]["horizon"]
    at = [n for n in (horizon, 10_000, 100_000) if n <= losses.shape[1] * every]
    return {
        "meta_loss": [
            values[-max(1, len(values) // 10) :].mean() for _, values in meta
        ],
        "mean_loss_over_horizon": losses[:, : max(1, horizon // every)].mean(1),
        **{
            f"loss_at_{n}": comparison.final(losses[:, : n // every], every) for n in at
        },
        "diverged": comparison.diverged(losses, every).tolist(),
    }


def plot_runs(result: dict, plt: Any, individual: bool = False) -> Any:
    """Above, meta-training; below, inner training with the thetas, horizon dashed."""
    drawn = result["curves"]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(6.5, 7.5), layout="constrained"
    )
    shown, card = {above: [], below: []}, drawn["card"]
    horizon = card["recipe"]["horizon"]
    for name in result["variants"]:
        steps = drawn["meta"][name][0][0]
        length = min(len(values) for _, values in drawn["meta"][name])
        # log.csv may be thinned: smooth over meta-steps, not over rows
        spacing = (steps[-1] - steps[0]) / max(1, len(steps) - 1)
        meta = np.stack([values[:length] for _, values in drawn["meta"][name]])
        inner = drawn["inner"][name]
        panels = (
            (above, steps[:length], ema(meta, 0.95**spacing)),
            (below, drawn["every"] * np.arange(1, inner.shape[1] + 1),
             smooth_steps(inner, drawn["every"])),
        )  # fmt: skip
        for axes, x, lines in panels:
            shown[axes].append(lines)
            if not individual:
                draw_band(axes, x, lines, result["labels"][name], COLORS[name])
                continue
            for i, line in enumerate(lines):
                label = result["labels"][name] if i == 0 else None
                axes.plot(x, line, color=COLORS[name], lw=0.9, label=label)
    counts = sorted({len(lines) for lines in drawn["inner"].values()})
    seeds = " to ".join(map(str, counts[:: max(1, len(counts) - 1)]))
    above.set(
        xlabel="meta-steps", ylabel="meta-loss (nats, EMA 0.95)",
        title=f"meta-training on {result['task']}, {seeds} seed(s)"
        + ", T log-uniform" * (card["recipe"].get("horizons") == "log-uniform"),
    )  # fmt: skip
    below.set(
        xlabel="inner steps", ylabel="training loss (nats, EMA 0.98)",
        title="inner training with the thetas",
    )  # fmt: skip
    if result["steps"] > 5000:
        below.set(xscale="log", xlim=(100, result["steps"]))
    if horizon < result["steps"]:
        below.axvline(horizon, color="k", ls="--", lw=1)
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


def _tasks(name: str, names: dict[bool, Sequence[str]], steps: int = 2000) -> Callable:
    """compute: the thetas of the command line, Adam and NAdamW on these tasks, which are
    files of their own in the figure's folder, resumed task by task."""

    def compute(args):
        request = comparison.Request(
            thetas=tuple(args.theta or (comparison.best_theta("fmnist"),)),
            baselines=tuple(args.baselines),
            seeds=args.seeds,
            steps=20 if args.quick else args.steps or steps,
            source=args.data,
            data_dir=args.data_dir,
        )
        folder = pathlib.Path(args.out or f"runs/eval-{args.figure}")
        results = comparison.on_tasks(names[args.full], request, folder)
        table = [
            line
            for task, (entries, about) in results.items()
            for line in comparison.rows(entries, task, about["dataset"])
        ]
        sets = {about["dataset"]: about for _, about in results.values()}
        about = {
            "dataset": ", ".join(sets),
            "dataset_checksum": ", ".join(a["dataset_checksum"] for a in sets.values()),
            "stand_in": any(a["stand_in"] for a in sets.values()),
        }
        return {"rows": table, "curves": results}, f"STAR, figure {name}", about

    return compute


def _plot_tasks(result: dict, plt: Any) -> Any:
    size = panels_size(len(result["curves"]))
    figure = plt.figure(figsize=size, layout="constrained")
    draw_tasks(figure, result["curves"])
    return figure


BY_SIZE = {full: SUITES["full" if full else "small"] for full in (False, True)}
# (a) MLP with layer norm (b) ResNet (c) LSTM (d) transformer
FIGURE_4 = {
    full: [
        name
        for name in names
        if name.startswith(("mlp_c10_layernorm", "resnet", "lstm", "transformer"))
    ]
    for full, names in BY_SIZE.items()
}
FIGURES = {
    "3": (_runs("3", MAIN), plot_runs),
    "4": (_tasks("4", FIGURE_4), _plot_tasks),
    "app1": (_runs("App. 1", MAIN), partial(plot_runs, individual=True)),
    "app2": (_runs("App. 2", DECAYS), plot_runs),
    "app3": (_runs("App. 3", ("star_wd0.5", "no_preconditioner")), plot_runs),
    "app4": (_runs("App. 4", ("star_wd0.5", "no_nominal")), plot_runs),
    "app5": (_tasks("App. 5", {k: v[:8] for k, v in BY_SIZE.items()}), _plot_tasks),
    "app6": (_tasks("App. 6", {k: v[8:] for k, v in BY_SIZE.items()}), _plot_tasks),
}
