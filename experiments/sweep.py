"""Meta-train all that figure 3 and its ablations compare: python -m experiments.sweep

These are STAR at four weight decays, blackbox, hyperparam, no preconditioner and no nominal
term. All have the same recipe and budget, seed after seed. Blackbox and hyperparam have no
weight decay, as in the paper. Each run is a folder of train.py's, OUT/VARIANT-seedN.
Finished runs are skipped and others resumed. Flags that are not listed here, such as
--steps 1000 --preset small, go to train.py for every run.

`--ship FOLDER` leaves there what the figures need of finished runs, a few KB each.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from functools import partial

import numpy as np

import star
import store
import train
from experiments.catalogue import TASKS
from experiments.train import Recipe

STAR = ("--optimizer", "star_small_beta3", "--weight-decay")
# Section 5.3, appendices B.2 and C.2. An ablation keeps STAR's beta3 and decay. Without the
# division by v this beta3 makes steps a thousandth as large, so 1e-3 stands beside it.
ABLATION = ("--weight-decay", "0.5", "--beta3", "3e-6", "--optimizer")
VARIANTS = {
    "star_wd0.5": (*STAR, "0.5"),
    "blackbox": "--optimizer blackbox --weight-decay 0".split(),
    "hyperparam": "--optimizer hyperparam --weight-decay 0".split(),
    "star_wd0.1": (*STAR, "0.1"),
    "no_nominal": (*ABLATION, "no_nominal"),
    "no_preconditioner": (*ABLATION, "no_preconditioner"),
    "no_preconditioner_1e-3": (*ABLATION, "no_preconditioner", "--beta3", "1e-3"),
    "star_wd0": (*STAR, "0"),
    "star_wd1": (*STAR, "1"),
}
# Section 5.1 announces a comparison of nominal terms. Each has the beta1, of half orders of
# magnitude, with which it trains `fmnist_small` best alone. Only `--only` runs these.
BETA1 = {"sgd": 1, "sgdm": 3, "aggmo": 3, "adam": 3e-2, "adam_aggmo": 3e-2}
TERMS = {
    f"nominal_{name}": (*STAR, "0.5", "--nominal", name, "--beta1", str(beta1))
    for name, beta1 in BETA1.items()
}
KNOWN = VARIANTS | TERMS


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(arguments, the flags for train.py)."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = store.Arguments(description=__doc__, formatter_class=raw)
    add, known = parser.add_argument, ", ".join(KNOWN)
    add("--task", default="fmnist", help="inner problem (default fmnist)")
    add("--seeds", type=int, default=1, help="meta-training seeds (default 1)")
    add("--only", help=f"variants, comma-separated, of {known}")
    add("--out", help="folder of the runs (default runs/sweep-TASK)")
    add("--ship", help="copy thetas, cards and thinned logs of finished runs there")
    args, rest = parser.parse_known_args(argv)
    args.only = args.only.split(",") if args.only else list(VARIANTS)
    for name in args.only:
        if name not in KNOWN:
            raise store.UserError(f"unknown variant {name!r}: one of {known}")
    return args, ["--task", args.task, *rest]


def finished(folder: pathlib.Path) -> bool:
    """Whether train.py went to the end there: its last card has fresh runs."""
    theta = folder / "theta.npz"
    return theta.exists() and "fresh_loss" in store.read_card(theta)


def refuse_other_recipe(folder: pathlib.Path, recipe: train.Recipe) -> None:
    """UserError where the finished run in the folder is of other flags."""
    made = store.read_card(folder / "theta.npz")["recipe"]
    for name, value in dataclasses.asdict(recipe).items():
        compared = name == "init" or name not in store.NOT_RECIPE
        if compared and made.get(name, value) != value:
            other = f"made with --{name.replace('_', '-')} {made[name]}, not {value}"
            raise store.UserError(f"{folder} was {other}: give another --out")


def ship(root: pathlib.Path, target: pathlib.Path) -> None:
    """Copies theta, card and log of each finished run in `root`. The log has every tenth
    row, the mean over the ten meta-steps that end there."""
    for folder in filter(finished, sorted(root.glob("*-seed*"))):
        to, path = target / folder.name, folder / "theta.npz"
        to.mkdir(parents=True, exist_ok=True)
        card, theta = store.read_card(path), star.load_theta(path)[0]
        card["recipe"] |= {"out": None, "data_dir": None}  # of the machine, not the run
        save = partial(star.save_theta, theta=theta, card=card)
        store.write_atomically(to / "theta.npz", save)
        store.save_json(to / "theta.json", card)
        rows = np.array(store.read_csv(folder / "log.csv", card["meta_steps"]))[:, :2]
        blocks = rows[: len(rows) // 10 * 10].reshape(-1, 10, 2)
        means = [(block[-1, 0], block[:, 1].mean()) for block in blocks]
        store.write_csv(to / "log.csv", ("step", "meta_loss"), means)


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parse(argv)
    root = pathlib.Path(args.out or f"runs/sweep-{args.task}")
    runs = [(name, seed) for seed in range(args.seeds) for name in args.only]
    for i, (name, seed) in enumerate(runs):
        folder = root / f"{name}-seed{seed}"
        print(f"run {i + 1} of {len(runs)}: {folder}", flush=True)
        command = [*rest, *KNOWN[name], "--seed", str(seed), "--out", str(folder)]
        recipe = train.parse(command, Recipe, TASKS)
        if finished(folder):
            refuse_other_recipe(folder, recipe)
            print("finished before", flush=True)
            continue
        if (folder / "checkpoint.npz").exists():  # which knows where the run began
            command += ["--resume", "--init="]
        if code := train.main(command, Recipe, TASKS):
            return code
    if args.ship:
        ship(root, pathlib.Path(args.ship))
    print(f"{len(runs)} runs in {root}; python -m figures 3 --runs {root} draws them")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("sweep.py", main))
