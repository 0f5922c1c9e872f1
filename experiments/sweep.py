"""Meta-train all that figure 3 and its ablations compare: python -m experiments.sweep

STAR at four weight decays, blackbox, hyperparam, no preconditioner, no nominal term, all
with the same recipe and budget, seed after seed. Each run is a folder of train.py's,
OUT/VARIANT-seedN; finished ones are skipped and others resumed. Flags that are not listed
here go to train.py, the same for every run: --steps 1000 --preset best (the preset is
noise_reuse unless given).

`--ship FOLDER` leaves there what eval.py's figures need of finished runs, a few KB each.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from functools import partial

import settings
import star
import train
from figures import star_runs as figures_star
from store import (
    Arguments,
    UserError,
    load_theta,
    read_card,
    run_command,
    save_json,
    write_atomically,
)

STAR = ("--optimizer", "star_small_beta3", "--weight-decay")
# Section 5.3, appendices B.2 and C.2. Without the nominal term beta3 stays STAR's.
VARIANTS = {
    "star_wd0.5": (*STAR, "0.5"),
    "blackbox": ("--optimizer", "blackbox"),
    "hyperparam": ("--optimizer", "hyperparam"),
    "star_wd0.1": (*STAR, "0.1"),
    "no_nominal": "--optimizer no_nominal --beta3 1e-6 --weight-decay 0.5".split(),
    "no_preconditioner": "--optimizer no_preconditioner --weight-decay 0.5".split(),
    "star_wd0": (*STAR, "0"),
    "star_wd1": (*STAR, "1"),
}


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = Arguments(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="fmnist", help="inner problem (default fmnist)")
    add("--seeds", type=int, default=1, help="meta-training seeds (default 1)")
    add("--only", help=f"comma-separated, of {', '.join(VARIANTS)}")
    add("--out", help="folder of the runs; default runs/sweep-TASK")
    add("--ship", help="copy thetas, cards and thinned logs of finished runs there")
    args, rest = parser.parse_known_args(argv)
    args.only = args.only.split(",") if args.only else list(VARIANTS)
    for name in args.only:
        if name not in VARIANTS:
            raise UserError(f"unknown variant {name!r}: one of {', '.join(VARIANTS)}")
    if args.seeds < 1:
        raise UserError("--seeds must be at least 1")
    return args, ["--preset", "noise_reuse", *rest]


def finished(folder: pathlib.Path) -> bool:
    """Whether train.py went to the end there: its last card has fresh runs."""
    theta = folder / "theta.npz"
    return theta.exists() and "fresh_loss" in read_card(theta)


def refuse_other_recipe(folder: pathlib.Path, config: settings.Config) -> None:
    """UserError where the finished run in the folder is of other flags."""
    made = read_card(folder / "theta.npz")["recipe"]
    for name, value in dataclasses.asdict(config).items():
        if name not in settings.NOT_RECIPE and made.get(name, value) != value:
            raise UserError(
                f"{folder} was made with --{name.replace('_', '-')} {made[name]}, "
                f"not {value}: give another --out"
            )


def ship(root: pathlib.Path, target: pathlib.Path, every: int = 10) -> None:
    """Of each finished run in `root`: theta and card, and every tenth row of its log, the
    mean over the ten meta-steps that end there."""
    for folder in sorted(path.parent for path in root.glob("*-seed*/theta.npz")):
        if not finished(folder):
            continue
        to = target / folder.name
        to.mkdir(parents=True, exist_ok=True)
        theta, _, _ = load_theta(folder / "theta.npz")
        card = read_card(folder / "theta.npz")
        card["recipe"] |= {"out": None, "data_dir": None}  # of the machine, not the run
        write_atomically(
            to / "theta.npz", partial(star.save_theta, theta=theta, card=card)
        )
        save_json(to / "theta.json", card)
        steps, losses = figures_star.read_log(folder / "log.csv")
        whole = len(losses) // every * every
        means = losses[:whole].reshape(-1, every).mean(1)
        rows = zip(steps[every - 1 : whole : every], means, strict=True)
        lines = ["step,meta_loss\n"] + [
            f"{step:.0f},{loss:.6g}\n" for step, loss in rows
        ]
        text = "".join(lines)
        write_atomically(to / "log.csv", lambda f, text=text: f.write(text.encode()))


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parse(argv)
    root = pathlib.Path(args.out or f"runs/sweep-{args.task}")
    runs = [(name, seed) for seed in range(args.seeds) for name in args.only]
    for i, (name, seed) in enumerate(runs):
        folder = root / f"{name}-seed{seed}"
        print(f"run {i + 1} of {len(runs)}: {folder}", flush=True)
        command = ["--task", args.task, *rest, *VARIANTS[name], "--seed", str(seed)]
        config = settings.parse([*command, "--out", str(folder)])  # refused before work
        if finished(folder):
            refuse_other_recipe(folder, config)
            print("finished before", flush=True)
            continue
        if (folder / "checkpoint.npz").exists():  # which knows where the run began
            command += ["--resume", "--init=", "--no-fresh-meta"]
        if code := train.main([*command, "--out", config.out]):
            return code
    if args.ship:
        ship(root, pathlib.Path(args.ship))
    print(f"{len(runs)} runs in {root}; python -m figures 3 --runs {root} draws them")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("sweep.py", main))
