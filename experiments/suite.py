"""The comparison of eval.py on sixteen tasks: python -m experiments.suite --task small

Or on `full`, or on any one task of the catalogue. Each task's files are in a folder of
their own. A task that was finished with the same arguments is read, not run again. So the
same command goes on where a suite was interrupted. Then follow a table of all tasks, its
summary, and overview.png.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import eval as evaluation
import store
from baselines import LEGEND, WIDTH, WORDS, counted_seeds
from experiments.catalogue import SUITES, TASKS

COLUMNS = 4  # of the overview, at most


def on_tasks(
    names: Sequence[str],
    args: argparse.Namespace,
    paths: Sequence[Any],
    folder: pathlib.Path,
) -> dict:
    """{task: (entries, about the data)} of the thetas in these files and of baselines, as
    `args` has them. Each task's files are in folder / task."""
    thetas = [evaluation.trained(path) for path in paths]
    digests = [hashlib.sha256(pathlib.Path(p).read_bytes()).hexdigest() for p in paths]
    same = ("steps", "seeds", "baselines", "data", "data_dir")
    asked = {name: getattr(args, name) for name in same} | {"thetas": digests}
    results, begin, ran = {}, time.perf_counter(), 0
    for i, task in enumerate(names):
        results[task] = saved(folder / task, asked | {"task": task})
        if results[task] is not None:
            print(f"{task}: done before, in {folder / task}")
            continue
        print(f"{task}, {i + 1} of {len(names)}", flush=True)
        results[task] = evaluation.compare(task, args, thetas, TASKS)
        (folder / task).mkdir(parents=True, exist_ok=True)
        evaluation.save(folder / task, asked | {"task": task}, *results[task])
        ran += 1
        left = (time.perf_counter() - begin) / ran * (len(names) - i - 1)
        print(f"  {store.clock(left)} left if the others are like these", flush=True)
    return results


def saved(folder: pathlib.Path, asked: dict) -> tuple | None:
    """What `evaluation.save` wrote, where it was for these arguments."""
    if not (folder / "results.json").exists():
        return None
    results = json.loads((folder / "results.json").read_text())
    if results["arguments"] != asked:
        return None
    table = np.array(store.read_csv(folder / "curves.csv", asked["steps"]))
    runs = np.split(table.T[1:], len(results["entries"]))  # (seeds, steps) each
    entries = [
        evaluation.Entry(**entry, losses=losses)
        for entry, losses in zip(results["entries"], runs, strict=True)
    ]
    about = {k: results[k] for k in ("dataset", "dataset_checksum", "stand_in")}
    return entries, about


def summary(table: list[dict]) -> list[dict]:
    """A line for each optimizer. It says on how many tasks a run diverged. Final losses
    over Adam's and NAdamW's are geometric means over the tasks where neither diverged."""
    lines = []
    for name in dict.fromkeys(line["optimizer"] for line in table):
        own = [line for line in table if line["optimizer"] == name]
        lost = sum(not line["diverged"].startswith("0/") for line in own)
        out = {"name": name, "tasks": str(len(own)), "diverged on": str(lost)}
        for other in ("adam", "nadamw"):
            ratios = np.array([line.get(f"final_over_{other}") for line in own], float)
            ratios = ratios[ratios > 0]  # without nan, where a ratio is not known
            if len(ratios):
                out[f"final over {other}"] = float(np.exp(np.log(ratios).mean()))
                out[f"below {other}"] = f"{(ratios < 1).sum()}/{len(ratios)}"
        lines.append(out)
    return lines


def grid_of(number: int) -> tuple[int, int]:
    """Rows and columns of as many panels."""
    columns = min(COLUMNS, -(-number // 2))
    return -(-number // columns), columns


def height_of(number: int) -> float:
    """Inches of a figure of as many panels."""
    rows, columns = grid_of(number)
    return rows * (0.7 + 4 / columns) + 0.9


def draw_tasks(figure: Any, results: dict) -> None:
    """A panel a task, one legend for all."""
    grid = figure.subplots(*grid_of(len(results)), squeeze=False)
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for axes, (task, (entries, about)) in zip(grid.flat, results.items(), strict=False):
        evaluation.draw(axes, by_label(entries), f"{task}\n{about['dataset']}")
        axes.set_xlabel("inner steps")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), **LEGEND)
    figure.supylabel("training loss (nats or mean squared error, EMA 0.98)")


def by_label(entries: Sequence[evaluation.Entry]) -> list[evaluation.Entry]:
    """One entry for each label, with the runs of all: thetas of several meta-seeds."""
    found = {}
    for entry in map(without_rate, entries):
        found.setdefault(entry.settings["label"], []).append(entry)
    return [
        same[0]._replace(losses=np.concatenate([entry.losses for entry in same]))
        for same in found.values()
    ]


def without_rate(entry: evaluation.Entry) -> evaluation.Entry:
    """An entry for a legend: a baseline's learning rate differs from task to task."""
    optimizer = entry.row["optimizer"]
    label = WORDS.get(optimizer) or entry.settings.get("label", optimizer)
    return entry._replace(settings=entry.settings | {"label": label})


def overview(results: dict, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, height_of(len(results))))
    draw_tasks(figure, results)
    figure.suptitle(title)
    return figure


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return evaluation.parse(argv, (*SUITES, *TASKS), __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.task in TASKS:
        return evaluation.main(argv, TASKS)
    folder = pathlib.Path(args.out or f"runs/eval-{args.task}")
    folder.mkdir(parents=True, exist_ok=True)
    with store.only_run_in(folder):
        paths = args.theta or [str(evaluation.best_theta("fmnist"))]
        results = on_tasks(SUITES[args.task], args, paths, folder)
        table = [entry.row for entries, _ in results.values() for entry in entries]
        evaluation.save_table(folder / "table.csv", table)
        found = {"arguments": vars(args) | {"theta": paths}, "rows": table}
        store.save_json(folder / "results.json", found)
        title = f"suite {args.task}, {counted_seeds(args.seeds)}"
        store.draw_figure(folder / "overview.png", overview, results, title)
    for task, (entries, about) in results.items():
        print(f"\n{task}, {about['dataset']}")
        evaluation.print_table([entry.row for entry in entries])
    print()
    evaluation.print_table(summary(table))
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("suite", main))
