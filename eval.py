"""A trained theta against tuned baselines on one task: python eval.py --task fmnist

Trains the task's network from scratch with each theta, and with Adam, NAdamW and momentum
at their tuned settings. All of them get the same fresh seeds. Prints a table, and writes
results.json, table.csv, curves.csv and curves.png.
"""

import argparse
import csv
import io
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import star
import star_fast
import store
from baselines import (
    BASELINES,
    LEARNING_RATES,
    WIDTH,
    WORDS,
    Curves,
    as_theta,
    counted_seeds,
    curves,
    draw_band,
    ema,
    words_of,
)
from tasks import TASKS

WEIGHTS = pathlib.Path(__file__).resolve().with_name("weights")
TUNED = WEIGHTS.with_name("experiments") / "tuned.json"
EVALUATION_SEED = 20_000  # apart from the usual --seed of a meta-training
FINAL = 200  # inner steps at the end whose mean is the final loss
SMOOTHING = 0.98  # per inner step, of the curves as drawn (appendix B.2)


class Entry(NamedTuple):
    """What an optimizer did on a task."""

    settings: dict  # "name", "optimizer", and which theta or hyperparameters it had
    row: dict  # its line of the table
    losses: np.ndarray  # (seeds, steps), of the training batches, in nats


def trained(path: str | pathlib.Path) -> tuple[dict, star.LearnedOptimizer, dict]:
    """(settings, optimizer, theta) of the STAR in the file; UserError where none is."""
    theta, constants = store.read_theta(path, star.load_theta)
    path, card = pathlib.Path(path), store.read_card(path)
    stem = path.resolve().parent.name if path.stem == "theta" else path.stem
    name = f"{card.get('optimizer', 'star')} ({stem})"
    horizon = card.get("recipe", {}).get("horizon")  # inner steps of its meta-training
    settings = {"name": name, "optimizer": name, "horizon": horizon}
    settings["label"] = words_of(card)  # in legends
    return settings, star_fast.learned_optimizer(constants), theta


def best_theta(task: str) -> pathlib.Path:
    """The STAR in weights/ with the lowest loss on its card for the task, or for fmnist."""
    order, ranks = {"fmnist": 1, task: 0}, {}
    for path in WEIGHTS.glob("star*.npz"):
        card = store.read_card(path)
        ranks[path] = order.get(card["task"], 2), card["fresh_loss"]
    return min(ranks, key=ranks.get)


def baseline(name: str, task: str, steps: int, build: Callable, data: Any, about: dict):
    """Like `trained`: as experiments/tuned.json has it for the task and these very data.

    The setting comes from runs of `steps` if there are any; its schedule is stretched to
    `steps`. Where the file has none, each learning rate runs once, on a seed of its own.
    """
    asked = {"task": task, "optimizer": name}
    asked |= {"dataset_checksum": about["dataset_checksum"]}
    found = [r for r in json.loads(TUNED.read_text()) if asked.items() <= r.items()]
    if found := [r for r in found if r["theta"] is not None]:
        best = max(found, key=lambda r: (r["steps"] == steps, r["steps"]))
    else:
        n = min(steps, 2000)
        print(f"  {name} is not tuned for these data: {n} steps at each learning rate")
        rates = [{"learning_rate": rate} for rate in LEARNING_RATES]
        keys, thetas = jax.random.key(30_000)[None], [as_theta(x) for x in rates]
        losses = curves(build, data, BASELINES[name], thetas, keys, n).losses[:, 0]
        last = losses[:, -max(1, n // 10) :].mean(1)  # (rates, steps) -> (rates,)
        last = np.where(np.isfinite(losses).all(1), last, np.inf)
        best = {"theta": rates[last.argmin()], "loss": float(last.min()), "steps": n}
    theta = best["theta"]
    label = f"{name} {theta['learning_rate']:g}" if len(theta) == 1 else name
    settings = {"name": label, "optimizer": name, "tuned": best}
    rate = np.format_float_scientific(theta["learning_rate"], trim="-", exp_digits=1)
    settings["label"] = WORDS[name] + (f" {rate}" if len(theta) == 1 else ", tuned")
    theta = as_theta(theta | {"steps": steps} if "steps" in theta else theta)
    return settings, BASELINES[name], theta


def counter(name: str, steps: int, seeds: int) -> Callable:
    """For `curves(report=)`: inner steps done, rate and time left, on one line."""
    begun = time.perf_counter()

    def report(done):
        rate = done / (time.perf_counter() - begun)
        left = f"{rate * seeds:.0f} steps/s, {store.clock((steps - done) / rate)} left"
        print(f"\r  {name}: {done}/{steps}, {left} ", end="", flush=True)

    return report


def compare(task: str, args: argparse.Namespace, thetas: Iterable[tuple], tasks: dict):
    """(entries, about the data): thetas and baselines on the task, on the same seeds."""
    build, (data, about) = tasks[task].build, tasks[task].load(args.data, args.data_dir)
    keys = jax.random.split(jax.random.key(EVALUATION_SEED), args.seeds)
    setting = task, args.steps, build, data, about
    rivals = (baseline(name, *setting) for name in args.baselines)
    entries, final_of = [], {}
    for settings, optimizer, theta in (*thetas, *rivals):
        report = counter(settings["name"], args.steps, args.seeds)
        found = curves(build, data, optimizer, [theta], keys, args.steps, report=report)
        print(f"in {found.seconds:.1f} s", flush=True)
        line = {"task": task, "dataset": about["dataset"], "name": settings["name"]}
        line |= {"optimizer": settings["optimizer"], **row(found)}
        final_of[line["optimizer"]] = line["final_loss"]
        entries.append(Entry(settings, line, found.losses[0]))
    for entry in entries:
        for name in args.baselines:
            ours, theirs = entry.row["final_loss"], final_of[name]
            entry.row[f"final_over_{name}"] = ours / theirs if ours and theirs else None
    return entries, about


def final(losses: np.ndarray) -> np.ndarray:
    """(seeds, steps) -> (seeds,): mean over the last `FINAL` inner steps."""
    return losses[:, -FINAL:].mean(1)


def diverged(losses: np.ndarray) -> np.ndarray:
    """(seeds, steps) -> (seeds,): nan or inf anywhere, or at the end above the start."""
    return ~np.isfinite(losses).all(1) | ~(final(losses) <= losses[:, :10].mean(1))


def row(run: Curves) -> dict:
    """Means and standard deviations over the seeds that did not diverge, of one theta."""
    losses = run.losses[0]
    values = {"mean_loss": losses.mean(1), "final_loss": final(losses)}
    values |= {name: test[0] for name, test in run.test.items()}
    lost, line = diverged(losses), {}
    for name, x in values.items():
        kept = x[~lost]
        line[name] = float(kept.mean()) if len(kept) else None
        line[f"{name}_std"] = float(kept.std(ddof=1)) if len(kept) > 1 else None
    seconds = 1000 * run.seconds / losses.size
    return line | {"diverged": f"{lost.sum()}/{len(lost)}", "s_per_1000_steps": seconds}


def print_table(lines: list[dict], hidden: tuple = ("task", "dataset", "optimizer")):
    """Columns as wide as they need; mean +- standard deviation over the seeds."""
    names = [name for line in lines for name in line if not name.endswith("_std")]
    names = [name for name in dict.fromkeys(names) if name not in hidden]

    def cell(line, name):
        value, spread = line.get(name), line.get(f"{name}_std")
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        return f"{value:.4f}" + ("" if spread is None else f" +-{spread:.4f}")

    cells = [names, *([cell(line, name) for name in names] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for texts in cells:
        print("  ".join(text.rjust(n) for text, n in zip(texts, widths, strict=True)))


def save_table(path: pathlib.Path, lines: list[dict]) -> None:
    """A .csv whose columns are all names that occur."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    text, rows = io.StringIO(), [[line.get(name) for name in names] for line in lines]
    csv.writer(text).writerows([names, *rows])
    store.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def save(folder: pathlib.Path, asked: dict, entries: list[Entry], about: dict) -> None:
    """All files of a task. results.json comes last: it says that the others are there."""
    seeds = range(len(entries[0].losses))
    names = [f"{e.settings['name']} seed {seed}" for e in entries for seed in seeds]
    losses = np.concatenate([entry.losses for entry in entries])  # (runs, steps)
    table = np.column_stack([np.arange(1, losses.shape[1] + 1), losses.T])
    store.write_csv(folder / "curves.csv", ["step", *names], table)
    save_table(folder / "table.csv", [entry.row for entry in entries])
    title = f"{asked['task']}, {counted_seeds(len(seeds))}\n{about['dataset']}"
    store.draw_figure(folder / "curves.png", figure_of, entries, title)
    described = [{"row": entry.row, "settings": entry.settings} for entry in entries]
    results = {"arguments": asked, **about, "entries": described}
    store.save_json(folder / "results.json", results)


def figure_of(entries: list[Entry], title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    draw(axes, entries, title)
    axes.set(xlabel="inner steps", ylabel="training loss (nats, EMA 0.98)")
    axes.legend()
    return figure


def limit_y(axes: Any, lines: list[np.ndarray], top: float = 99.5) -> None:
    """A log axis for what the curves (..., points) do after their first 2 %."""
    late = np.concatenate([v[..., v.shape[-1] // 50 :].ravel() for v in lines])
    late = late[np.isfinite(late) & (late > 1e-4)]
    axes.set(yscale="log")
    if late.size:
        axes.set_ylim(0.9 * late.min(), 1.1 * np.percentile(late, top))


def draw(axes: Any, entries: list[Entry], title: str) -> None:
    """Training curves on one task: EMA 0.98, a band over the seeds; horizons dotted."""
    smooth = [ema(entry.losses, SMOOTHING) for entry in entries]
    x = np.arange(1, smooth[0].shape[1] + 1)
    labels = [entry.settings["label"] for entry in entries]
    for i, (entry, lines) in enumerate(zip(entries, smooth, strict=True)):
        label, alike = labels[i], labels[:i].count(labels[i])  # alike: of one color
        if labels.count(label) > 1:
            label += f" {entry.settings['name'].partition(' ')[2]}"
        draw_band(axes, x, lines, label, ls=("-", "--", "-.", ":")[alike % 4])
    draw_horizons(axes, {entry.settings.get("horizon") for entry in entries}, len(x))
    limit_y(axes, smooth)
    axes.set_title(title)
    if len(x) > 5000:
        axes.set(xscale="log", xlim=(100, 1.05 * len(x)))


def draw_horizons(axes: Any, horizons: set, steps: int) -> None:
    """A dotted line at the length of each meta-training that is below `steps`."""
    for horizon in sorted(n for n in horizons if n and n < steps):
        label = f"horizon of meta-training, {horizon}"
        axes.axvline(horizon, color="k", ls=":", lw=1, label=label)


def parse(argv: Any = None, names: Iterable[str] = TASKS, doc: str = __doc__):
    shape = argparse.RawDescriptionHelpFormatter
    parser = store.Arguments(description=doc, formatter_class=shape)
    task = {"default": "fmnist", "choices": tuple(names), "metavar": "NAME"}
    parser.add_argument("--task", help=f"default fmnist; of {', '.join(names)}", **task)
    return parse_comparison(parser, argv)


def parse_comparison(parser: argparse.ArgumentParser, argv: Any, steps: Any = 2000):
    """The flags that every comparison has, beside those that the parser has already."""
    add = parser.add_argument
    add("--theta", action="append", help="theta.npz of a STAR; may be given again")
    add("--steps", type=int, default=steps, help="inner steps; default %(default)s")
    add("--seeds", type=int, default=3, help="fresh seeds; default 3")
    text = ",".join(BASELINES)
    add("--baselines", default=text, help="default %(default)s; '' for none")
    parser.add_data()
    add("--out", help="folder for the results; default in runs/")
    args = parser.parse_args(argv)
    args.baselines = [name for name in args.baselines.split(",") if name]
    if unknown := set(args.baselines) - set(BASELINES):
        raise store.UserError(f"no baseline {', '.join(unknown)}, only {text}")
    if args.seeds < 1 or (args.steps is not None and args.steps < 1):
        raise store.UserError("--steps and --seeds must be at least 1")
    return args


def main(argv: Any = None, tasks: dict = TASKS) -> int:
    args = parse(argv, tasks)
    args.theta = args.theta or [str(best_theta(args.task))]
    thetas = [trained(path) for path in args.theta]
    folder = pathlib.Path(args.out or f"runs/eval-{args.task}")
    folder.mkdir(parents=True, exist_ok=True)
    with store.only_run_in(folder):
        entries, about = compare(args.task, args, thetas, tasks)
        save(folder, vars(args), entries, about)
    print(f"\n{args.steps} inner steps, {args.seeds} seeds, {about['dataset']}")
    print_table([entry.row for entry in entries])
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("eval.py", main))
