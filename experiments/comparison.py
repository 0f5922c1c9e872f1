"""One task, several optimizers, the same fresh seeds: runs, what they amount to, files.

`on_task` trains, `rows` sums up, `save` writes results.json, table.csv and curves.csv;
`saved` reads them back, so that a suite of tasks resumes task by task.
"""

import csv
import hashlib
import io
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from baselines import BASELINES, GRIDS, LEARNING_RATES, as_theta
from companions.lopts import LearnedOptimizer
from experiments import tuning
from inner import Curves, curves, thinning
from store import UserError, clock, load_theta, read_card, save_json, write_atomically
from tasks import TASKS, measure_task

WEIGHTS = pathlib.Path(__file__).resolve().parent.parent / "weights"
UNFINISHED = "unfinished.json"
# What reading results raises that were cut off, or are of other origin.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
EVALUATION_SEED = 20_000  # apart from the usual --seed of a meta-training
FINAL = 200  # inner steps at the end whose mean is the final loss
SEARCH_STEPS = 2000  # at most, where no tuned setting is shipped
SEARCH_BUDGET = 10  # configurations there, where the search is not over rates alone


class Request(NamedTuple):
    """What to run on a task."""

    thetas: tuple  # paths of theta.npz files
    baselines: tuple  # names in baselines.BASELINES
    seeds: int
    steps: int  # inner steps
    source: str = "auto"  # of the data, as in data.py
    data_dir: str | None = None


class Contestant(NamedTuple):
    """An optimizer with its theta, before it has run."""

    name: str
    optimizer: LearnedOptimizer
    theta: dict
    settings: (
        dict  # for the results file: which theta, or which hyperparameters and why
    )
    horizon: int | None = None  # inner steps of its meta-training


class Entry(NamedTuple):
    """One line of the comparison."""

    name: str
    curves: Curves  # losses (seeds, points), each point the mean of `every` steps
    every: int
    settings: dict
    horizon: int | None = None


def say(text: str) -> None:
    """A line of progress, at once: output may go to a file."""
    print(text, flush=True)


def general_name(entry: Entry) -> str:
    """The name without what differs from task to task: a tuned learning rate."""
    return entry.settings.get("optimizer", entry.name)


def trained(path: str | pathlib.Path) -> Contestant:
    """The theta in the file, named by its optimizer and its folder or file.

    Raises UserError for a file that holds none."""
    theta, optimizer, _ = load_theta(path)
    card, path = read_card(path), pathlib.Path(path)
    stem = path.resolve().parent.name if path.stem == "theta" else path.stem
    made_for = json.dumps([card.get("optimizer"), card.get("constants")])
    parts = (np.asarray(theta[name]).tobytes() for name in sorted(theta))
    digest = hashlib.sha256(made_for.encode() + b"".join(parts))
    settings = {"theta": stem, "sha256": digest.hexdigest()[:16]}
    recipe = card.get("recipe")
    horizon = recipe.get("horizon") if isinstance(recipe, dict) else None
    horizon = horizon if isinstance(horizon, int) else None
    name = f"{card.get('optimizer', 'STAR')} ({stem})"
    return Contestant(name, optimizer, theta, settings, horizon)


def shipped(task: str, name: str, steps: int) -> dict | None:
    """The result of tuning.py in tuned.json for the task and the baseline: of runs as long
    as `steps`, else of the longest there are."""
    found = {
        length: result
        for (of, optimizer, length), result in tuning.load_tuned().items()
        if (of, optimizer) == (task, name) and result["theta"] is not None
    }
    return found.get(steps) or (found[max(found)] if found else None)


def baseline(task: str, name: str, steps: int, data: Any, about: dict) -> Contestant:
    """A hand-designed optimizer at its shipped hyperparameters; where there are none for
    the task and these very data, at the best of a search made here, on a seed of its own.

    A schedule is stretched to `steps`, whatever the length of the runs that chose it."""
    result = shipped(task, name, steps)
    if result is None or result["dataset_checksum"] != about["dataset_checksum"]:
        budget = len(LEARNING_RATES) if name in GRIDS else SEARCH_BUDGET
        length = min(steps, SEARCH_STEPS)
        search = tuning.Settings(task, name, budget, length, seed=0)
        result = tuning.tune(search, data, about)
        if result["theta"] is None:
            raise UserError(f"{name} diverges on {task} whatever its hyperparameters")
    theta = result["theta"]
    if "steps" in theta:
        theta = theta | {"steps": steps}
    label = name
    if name in GRIDS:
        label = f"{name} {result['theta']['learning_rate']:g}"
    chosen = {k: result[k] for k in ("budget", "steps", "seed", "loss")}
    settings = {"optimizer": name, "theta": result["theta"], "tuned": chosen}
    return Contestant(label, BASELINES[name], as_theta(theta), settings)


def run(
    contestant: Contestant,
    build: Callable,
    data: Any,
    seeds: int,
    steps: int,
    report: Callable | None = None,
) -> Entry:
    """Its training curves on `seeds` fresh seeds, the same for every contestant."""
    every = thinning(steps)
    keys = jax.random.split(jax.random.key(EVALUATION_SEED), seeds)
    result = curves(
        build,
        data,
        contestant.optimizer,
        [contestant.theta],
        keys,
        steps,
        every=every,
        report=report,
    )
    test = {name: values[0] for name, values in result.test.items()}
    result = Curves(result.losses[0], test, result.seconds)
    return Entry(
        contestant.name, result, every, contestant.settings, contestant.horizon
    )


def progress(name: str, steps: int, seeds: int, log: Callable) -> Callable:
    """For `inner.curves(report=)`: a line at most every ten seconds, with the time left."""
    begin = shown = time.perf_counter()

    def report(done):
        nonlocal shown
        now = time.perf_counter()
        if now - shown < 10 or done == steps:
            return
        shown, rate = now, done / (now - begin)
        left = (steps - done) / rate
        log(f"  {name}: {done}/{steps}  {rate * seeds:.0f} steps/s  {left:.0f} s left")

    return report


def final(losses: np.ndarray, every: int = 1) -> np.ndarray:
    """(seeds, points) -> (seeds,): mean over the last `FINAL` inner steps."""
    return losses[:, -max(1, FINAL // every) :].mean(1)


def diverged(losses: np.ndarray, every: int = 1) -> np.ndarray:
    """(seeds, points) -> (seeds,): nan or inf anywhere, or at the end above the start."""
    start = losses[:, : max(1, 10 // every)].mean(1)
    return ~np.isfinite(losses).all(1) | ~(final(losses, every) <= start)


def row(entry: Entry, task: str = "", dataset: str = "") -> dict:
    """One line of the table; means over the seeds that did not diverge, said beside."""
    losses = entry.curves.losses
    lost = diverged(losses, entry.every)
    kept = losses[~lost]
    mean, spread = mean_and_spread(kept.mean(1))
    end, end_spread = mean_and_spread(final(kept, entry.every))
    steps = losses.size * entry.every
    return {
        "task": task,
        "optimizer": general_name(entry),
        "name": entry.name,
        "dataset": dataset,
        "mean_loss": mean,
        "mean_loss_std": spread,
        "final_loss": end,
        "final_loss_std": end_spread,
        **{k: mean_and_spread(v[~lost])[0] for k, v in entry.curves.test.items()},
        "diverged": f"{int(lost.sum())}/{len(lost)}",
        "seconds_per_1000_steps": 1000 * entry.curves.seconds / steps,
    }


def mean_and_spread(values: np.ndarray) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation), None where there are too few values."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    return (float(values.mean()), spread) if len(values) else (None, None)


def rows(entries: list[Entry], task: str = "", dataset: str = "") -> list[dict]:
    """`row` of each, with the final loss relative to each hand-designed optimizer's."""
    table = [row(entry, task, dataset) for entry in entries]
    for entry, reference in zip(entries, table, strict=True):
        if (name := entry.settings.get("optimizer")) is not None:
            for line in table:
                ours, theirs = line["final_loss"], reference["final_loss"]
                known = ours is not None and theirs
                line[f"final_over_{name}"] = ours / theirs if known else None
    return table


def summary(table: list[dict]) -> list[dict]:
    """Over the tasks in the table, a line for each optimizer: on how many a run diverged,
    and final losses relative to Adam's and NAdamW's, the geometric mean over tasks where
    neither diverged, and on how many of these it is lower."""
    lines = []
    for name in dict.fromkeys(line["optimizer"] for line in table):
        own = [line for line in table if line["optimizer"] == name]
        lost = sum(not line["diverged"].startswith("0/") for line in own)
        out = {"name": name, "tasks": str(len(own)), "diverged on": str(lost)}
        for other in ("adam", "nadamw"):
            ratios = [line.get(f"final_over_{other}") for line in own]
            ratios = np.array([x for x in ratios if x is not None and x > 0])
            if len(ratios):
                out[f"final over {other}"] = float(np.exp(np.log(ratios).mean()))
                out[f"below {other}"] = f"{(ratios < 1).sum()}/{len(ratios)}"
        lines.append(out)
    return lines


def on_task(
    task: str,
    request: Request,
    folder: pathlib.Path,
    log: Callable = say,
    resume: bool = True,
) -> tuple[list[Entry], dict]:
    """(entries, about the data): every optimizer of the request on the task.

    folder: where `save` puts the results. Each optimizer's are kept as it ends, and the
    next call with the same request and data goes on from there. resume: a finished task
    is read, not run again.
    """
    arguments = identity(task, request)
    total = len(request.thetas) + len(request.baselines)
    if resume and (found := saved(folder, arguments)):
        log(f"{task}: done before, in {folder}")
        return found
    spec = TASKS[task]
    data, about = spec.load(request.source, request.data_dir)
    entries, before = kept(folder, arguments) or ([], None)
    if before != about:
        entries = []
    if entries:
        log(f"  {len(entries)} of {total} done before, in {folder}")
    for i in range(len(entries), total):
        if i < len(request.thetas):
            contestant = trained(request.thetas[i])
        else:
            name = request.baselines[i - len(request.thetas)]
            contestant = baseline(task, name, request.steps, data, about)
        report = progress(contestant.name, request.steps, request.seeds, log)
        entry = run(contestant, spec.build, data, request.seeds, request.steps, report)
        entries.append(entry)
        log(f"  {entry.name}: {entry.curves.seconds:.1f} s")
        if len(entries) < total:
            keep(folder, arguments, about, entries)
    save(folder, arguments, about, entries, rows(entries, task, about["dataset"]))
    (folder / UNFINISHED).unlink(missing_ok=True)
    return entries, about


def on_tasks(
    names: Sequence[str],
    request: Request,
    folder: pathlib.Path,
    log: Callable = say,
    drawn: Callable | None = None,
) -> dict:
    """{task: (entries, about)}, each task's files in a folder of its own, with the time
    left, told from the tasks done. drawn: (folder, task, entries, about), after each."""
    costs = {name: cost(name, request) for name in names}
    results, spent, paid = {}, 0.0, 0.0
    for i, name in enumerate(names):
        begin, whole = time.perf_counter(), not (folder / name / UNFINISHED).exists()
        log(f"{name}, {i + 1} of {len(names)}")
        results[name] = on_task(name, request, folder / name, log)
        if drawn is not None:
            drawn(folder / name, name, *results[name])
        seconds = time.perf_counter() - begin
        if whole and seconds > 5:  # not one that was done before
            spent, paid = spent + seconds, paid + costs[name]
        left = sum(costs[other] for other in names[i + 1 :])
        if left and paid:
            log(f"  {seconds:.0f} s; {clock(left * spent / paid)} left")
    return results


def identity(task: str, request: Request) -> dict:
    """What a result was asked for with, in its order, as JSON keeps it."""
    tuned = [
        (name, (shipped(task, name, request.steps) or {}).get("theta"))
        for name in request.baselines
    ]
    thetas = [trained(path).settings for path in request.thetas]
    asked = request._asdict() | {"task": task, "thetas": thetas, "baselines": tuned}
    return json.loads(json.dumps(asked))


def cost(task: str, request: Request) -> float:
    """Relative cost of the task, in seconds on some machine: for the time left.

    An inner step of the task itself takes what it took when Adam was tuned for it, else
    the model's work at 20 GFLOP/s; a learned optimizer's update 8 ns more a parameter;
    and compiling takes its time.
    """
    parameters, gflop = measure_task(TASKS[task])
    step, tuned = gflop / 20, shipped(task, "adam", request.steps)
    if tuned is not None:
        step = tuned["seconds"] / (len(tuned["losses"]) * tuned["steps"])
    learned, other = len(request.thetas), len(request.baselines)
    steps = request.seeds * request.steps * (learned + other)
    updates = request.seeds * request.steps * learned * parameters
    return 10 * learned + 3 * other + steps * step + updates * 8e-9


# Files


def save(
    folder: pathlib.Path,
    arguments: dict,
    about: dict,
    entries: list[Entry],
    table: list[dict],
) -> None:
    """curves.csv, table.csv and, last, results.json, which says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    every = entries[0].every
    names = [f"{e.name} seed {s}" for e in entries for s in range(len(e.curves.losses))]
    columns = np.concatenate([e.curves.losses for e in entries])
    lines = [["step", *names]]
    for i, values in enumerate(columns.T):
        lines.append([(i + 1) * every, *(f"{x:.5g}" for x in values)])
    write_csv(folder / "curves.csv", lines)
    save_table(folder / "table.csv", table)
    described = [describe(entry) for entry in entries]
    save_json(
        folder / "results.json",
        {"arguments": arguments, **about, "rows": table, "entries": described},
    )


def keep(
    folder: pathlib.Path, arguments: dict, about: dict, entries: list[Entry]
) -> None:
    """One file of what is done of a task so far, beside the results of earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    described = [describe(e) | {"losses": e.curves.losses.tolist()} for e in entries]
    save_json(
        folder / UNFINISHED, {"arguments": arguments, **about, "entries": described}
    )


def describe(entry: Entry) -> dict:
    """An entry without its losses, as JSON keeps it."""
    return {
        "name": entry.name,
        "settings": entry.settings,
        "horizon": entry.horizon,
        "every": entry.every,
        "seeds": len(entry.curves.losses),
        "test": {k: np.asarray(v).tolist() for k, v in entry.curves.test.items()},
        "seconds": entry.curves.seconds,
    }


def saved(folder: pathlib.Path, arguments: dict) -> tuple[list[Entry], dict] | None:
    """(entries, about) that `save` wrote for these arguments; None where it did not."""
    try:
        results = json.loads((folder / "results.json").read_text())
        with open(folder / "curves.csv", newline="") as file:
            _, *lines = csv.reader(file)
        if results["arguments"] != arguments:
            return None
        columns = iter(np.array(lines, float).T[1:])
        for e in results["entries"]:
            e["losses"] = list(itertools.islice(columns, e["seeds"]))
        return read_back(results)
    except UNREADABLE:
        return None


def kept(folder: pathlib.Path, arguments: dict) -> tuple[list[Entry], dict] | None:
    """(entries, about) that `keep` wrote for these arguments; None where it did not."""
    try:
        results = json.loads((folder / UNFINISHED).read_text())
        return read_back(results) if results["arguments"] == arguments else None
    except UNREADABLE:
        return None


def read_back(results: dict) -> tuple[list[Entry], dict]:
    """Entries of `describe`, each with its "losses"; one of UNREADABLE for others."""
    entries = []
    for e in results["entries"]:
        losses = np.array(e["losses"], float)
        if losses.ndim != 2 or len(losses) != e["seeds"]:
            raise ValueError("losses of other seeds")
        test = {name: np.array(values) for name, values in e["test"].items()}
        found = Curves(losses, test, e["seconds"])
        entries.append(Entry(e["name"], found, e["every"], e["settings"], e["horizon"]))
    about = {k: results[k] for k in ("dataset", "dataset_checksum", "stand_in")}
    return entries, about


def save_table(path: pathlib.Path, table: list[dict]) -> None:
    names = list(dict.fromkeys(name for line in table for name in line))
    write_csv(path, [names, *([line.get(name) for name in names] for line in table)])


def write_csv(path: pathlib.Path, lines: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    write_atomically(path, lambda f: f.write(text.getvalue().encode()))


def print_table(table: list[dict], log: Callable = print) -> None:
    """Columns as wide as they need; mean +- standard deviation over seeds."""
    names = list(dict.fromkeys(name for line in table for name in line))
    unseen = ("dataset", "task", "optimizer")
    names = [n for n in names if not n.endswith("_std") and n not in unseen]
    heads = {"seconds_per_1000_steps": "s/1000 steps"}

    def cell(line, name):
        value, spread = line.get(name), line.get(f"{name}_std")
        if isinstance(value, str):
            return value
        text = "-" if value is None else f"{value:.4f}"
        return text if spread is None else f"{text} +-{spread:.4f}"

    cells = [[heads.get(n, n) for n in names]]
    cells += [[cell(line, name) for name in names] for line in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        log("  ".join(f"{text:>{w}}" for text, w in zip(line, widths, strict=True)))


def best_theta(task: str, folder: pathlib.Path = WEIGHTS) -> pathlib.Path:
    """The theta in the folder for the task with the lowest loss on its card, else the one
    for fmnist. Raises UserError where there is none."""
    cards = {path: read_card(path) for path in sorted(folder.glob("*.npz"))}
    for wanted in (task, "fmnist"):
        fits = {
            path: card["fresh_loss"]
            for path, card in cards.items()
            if card.get("task") == wanted and "fresh_loss" in card
        }
        if fits:
            return min(fits, key=fits.get)
    raise UserError(f"no theta in {folder}: give one with --theta")
