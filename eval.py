"""Apply a trained theta and compare: python eval.py --task fmnist

Trains the task's network from scratch with each theta and with hand-designed baselines
(learning rate searched at half orders of magnitude, on a seed of its own), on the same
fresh seeds. Writes results.json, table.csv, curves.csv and curves.png, prints the table.
`--figure NAME` draws one of the figures in figures.py instead.
"""

import argparse
import csv
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import matplotlib
import numpy as np

import figures
from baselines import BASELINES, LEARNING_RATES, best_rate, rates
from inner import Curves, curves, ema
from store import UserError, load_theta, read_card, run_command, write_atomically
from tasks import TASKS

WEIGHTS = pathlib.Path(__file__).resolve().parent / "weights"
EVALUATION_SEED, SEARCH_SEED = 20_000, 30_000  # apart from the usual --seed


class Entry(NamedTuple):
    """One line of the comparison."""

    name: str
    curves: Curves  # losses (seeds, steps)
    learning_rate: float | None
    horizon: int | None  # inner steps of its meta-training


def best_theta(task: str, folder=WEIGHTS) -> pathlib.Path:
    """The shipped theta for the task with the lowest loss on its card, else for fmnist."""
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


def evaluate_theta(path, build, data, keys, steps: int) -> Entry:
    """Runs with the theta in the file, named by its preset, folder and file."""
    theta, optimizer, _ = load_theta(path)
    result = curves(build, data, optimizer, [theta], keys, steps)
    card, path = read_card(path), pathlib.Path(path)
    stem = path.resolve().parent.name if path.stem == "theta" else path.stem
    horizon = card.get("recipe", {}).get("horizon")
    return Entry(
        f"{card.get('optimizer', 'STAR')} ({stem})", _first(result), None, horizon
    )


def evaluate_baseline(name, build, data, keys, steps: int, search_steps: int) -> Entry:
    """The baseline at the learning rate with the lowest mean loss over the search."""
    search_key = jax.random.split(jax.random.key(SEARCH_SEED), 1)
    optimizer = BASELINES[name]
    search = curves(build, data, optimizer, rates(), search_key, search_steps)
    rate = LEARNING_RATES[best_rate(search.losses)]
    result = curves(build, data, optimizer, rates([rate]), keys, steps)
    return Entry(f"{name} {rate:g}", _first(result), rate, None)


def _first(result: Curves) -> Curves:
    test = {k: v[0] for k, v in result.test.items()}
    return Curves(result.losses[0], test, result.seconds)


def diverged(losses: np.ndarray) -> np.ndarray:
    """(seeds, steps) -> (seeds,): nan or inf anywhere, or at the end above the start."""
    start, end = losses[:, :10].mean(1), losses[:, -200:].mean(1)
    return ~np.isfinite(losses).all(1) | ~(end <= start)


def row(entry: Entry, dataset: str = "") -> dict:
    """One line of the table; means over the seeds that did not diverge, said beside."""
    losses = entry.curves.losses
    lost = diverged(losses)
    kept = losses[~lost]

    def mean_and_spread(values):
        if not len(values):
            return None, None
        return float(values.mean()), float(values.std(ddof=1)) if len(
            values
        ) > 1 else None

    mean, spread = mean_and_spread(kept.mean(1) if len(kept) else kept)
    last, last_spread = mean_and_spread(kept[:, -200:].mean(1) if len(kept) else kept)
    test = {
        key: mean_and_spread(value[~lost])[0]
        for key, value in entry.curves.test.items()
    }
    return {
        "name": entry.name,
        "dataset": dataset,
        "mean_loss": mean,
        "mean_loss_std": spread,
        "last_200": last,
        "last_200_std": last_spread,
        **test,
        "diverged": f"{int(lost.sum())}/{len(lost)}",
        "seconds_per_1000_steps": entry.curves.seconds / losses.size * 1000,
    }


def print_table(rows: list[dict]) -> None:
    names = [k for k in rows[0] if not k.endswith("_std") and k != "dataset"]
    width = max(len(r["name"]) for r in rows)
    heads = {"seconds_per_1000_steps": "s/1000 steps"}
    print(
        "  ".join(f"{heads.get(k, k):>{width if k == 'name' else 15}}" for k in names)
    )
    for r in rows:
        cells = [f"{r['name']:>{width}}"]
        for k in names[1:]:
            text = (
                r[k]
                if isinstance(r[k], str)
                else "-"
                if r[k] is None
                else f"{r[k]:.4f}"
            )
            if r.get(f"{k}_std") is not None:
                text += f" +-{r[f'{k}_std']:.4f}"
            cells.append(f"{text:>15}")
        print("  ".join(cells))


def plot(path, entries: list[Entry], task: str, about: dict) -> None:
    """Inner training curves: EMA 0.98, mean over seeds, band from lowest to highest."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    steps = entries[0].curves.losses.shape[1]
    shown = []
    for i, entry in enumerate(entries):
        smooth = ema(entry.curves.losses, 0.98)
        thin = np.unique(np.linspace(0, steps - 1, 2000).astype(int))
        mean = smooth.mean(0)[thin]
        axes.plot(thin + 1, mean, color=f"C{i}", label=entry.name, lw=1.3)
        low, high = smooth.min(0)[thin], smooth.max(0)[thin]
        axes.fill_between(thin + 1, low, high, color=f"C{i}", alpha=0.2, lw=0)
        shown += [mean[np.isfinite(mean)][len(thin) // 50 :]]
    for horizon in {e.horizon for e in entries if e.horizon}:
        axes.axvline(
            horizon, color="k", ls="--", lw=1, label=f"meta-training horizon {horizon}"
        )
    values = np.concatenate(shown)
    if len(values):
        axes.set_ylim(max(values.min() * 0.9, 1e-4), np.percentile(values, 99.5) * 1.1)
    axes.set(
        xlabel="inner steps",
        ylabel="training loss (nats, EMA 0.98)",
        title=f"{task}, {len(entries[0].curves.losses)} seeds\n{about['dataset']}",
        xscale="log" if steps > 5000 else "linear",
        yscale="log",
    )
    if steps > 5000:
        axes.set_xlim(100, steps * 1.05)
    plain = ticker.StrMethodFormatter("{x:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_results(folder, args, about, entries, rows) -> None:
    """results.json, table.csv and curves.csv, each naming the data."""
    steps = entries[0].curves.losses.shape[1]
    results = {"arguments": args, **about, "rows": rows}
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(folder / "results.json", lambda f: f.write(text.encode()))
    with open(folder / "table.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    names = [(e.name, s) for e in entries for s in range(len(e.curves.losses))]
    columns = np.concatenate([e.curves.losses for e in entries])
    with open(folder / "curves.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step"] + [f"{name} seed {s}" for name, s in names])
        for t in range(steps):
            table.writerow([t] + [f"{x:.5g}" for x in columns[:, t]])


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--theta",
        action="append",
        help="theta.npz, may be given several times; default: the best one in weights/",
    )
    add("--task", default="fmnist", choices=tuple(TASKS))
    add("--steps", type=int, default=2000, help="inner steps (default 2000)")
    add("--seeds", type=int, default=3, help="fresh seeds (default 3)")
    add(
        "--baselines",
        default="adam,nadamw,sgdm",
        help=f"comma-separated, of {', '.join(BASELINES)}; '' for none",
    )
    add(
        "--search-steps",
        type=int,
        default=2000,
        help="at most so many steps per learning rate in the search (default 2000)",
    )
    add("--data", default="auto", choices=("real", "stand-in", "auto"))
    add("--data-dir", help="folder that holds the data set")
    add("--out", help="folder for the results; default runs/eval-TASK")
    add("--figure", choices=tuple(figures.FIGURES), help="draw this figure instead")
    add(
        "--literal-alpha",
        action="store_true",
        help="figures 2b, 2c: alpha = c lambda_max(H) / 2, as the paper prints it, "
        "not c times the stable limit 2 / lambda_max(H)",
    )
    add("--quick", action="store_true", help="a small form of the figure, in seconds")
    args = parser.parse_args(argv)
    args.baselines = [name for name in args.baselines.split(",") if name]
    unknown = [name for name in args.baselines if name not in BASELINES]
    if unknown:
        raise UserError(
            f"unknown baseline {unknown[0]!r}: one of {', '.join(BASELINES)}"
        )
    for name in ("steps", "seeds", "search_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv=None) -> int:
    args = parse(argv)
    folder = pathlib.Path(args.out or f"runs/eval-{args.figure or args.task}")
    paths = args.theta or ([] if args.figure else [best_theta(args.task)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if args.figure:
        return figures.draw(args, folder)
    data, about = TASKS[args.task].load(args.data, args.data_dir)
    build = TASKS[args.task].build
    keys = jax.random.split(jax.random.key(EVALUATION_SEED), args.seeds)
    entries = []
    for path in paths:
        entries.append(evaluate_theta(path, build, data, keys, args.steps))
        print(f"{entries[-1].name}: done", flush=True)
    for name in args.baselines:
        search = min(args.steps, args.search_steps)
        entries.append(evaluate_baseline(name, build, data, keys, args.steps, search))
        print(f"{entries[-1].name}: done", flush=True)
    if not entries:
        raise UserError("nothing to evaluate")
    rows = [row(entry, about["dataset"]) for entry in entries]
    write_results(folder, vars(args), about, entries, rows)
    plot(folder / "curves.png", entries, args.task, about)
    print(
        f"\n{args.task}, {args.steps} inner steps, {args.seeds} seeds, {about['dataset']}"
    )
    print_table(rows)
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("eval.py", main))
