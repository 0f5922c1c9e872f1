"""Apply trained thetas and compare: python eval.py --task fmnist

Trains the task's network from scratch with each theta and with hand-designed baselines at
their tuned settings (tuned.json; searched here where there are none), on the same fresh
seeds. Writes results.json, table.csv, curves.csv and curves.png, prints the table.
`--task small` or `full` goes through the sixteen tasks of that suite, resumes where it was
interrupted, and draws an overview.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from baselines import BASELINES
from experiments import comparison
from figures import star_runs as figures_star
from inner import thinning
from store import Arguments, UserError, only_run_in, run_command, save_json
from tasks import SUITES, TASKS


def evaluate(
    args: argparse.Namespace, request: comparison.Request, folder: pathlib.Path
) -> int:
    if args.task in SUITES:
        names, drawn = SUITES[args.task], figures_star.save_task
        results = comparison.on_tasks(names, request, folder, drawn=drawn)
        figures_star.save_tasks(folder, results, f"suite {args.task}")
    else:
        found = comparison.on_task(args.task, request, folder, resume=False)
        figures_star.save_task(folder, args.task, *found)
        results = {args.task: found}
    table = []
    for task, (entries, about) in results.items():
        lines = comparison.rows(entries, task, about["dataset"])
        print(
            f"\n{task}, {args.steps} inner steps, {args.seeds} seeds, {about['dataset']}"
        )
        comparison.print_table(lines)
        table += lines
    if args.task in SUITES:
        comparison.save_table(folder / "table.csv", table)
        save_json(folder / "results.json", {"arguments": vars(args), "rows": table})
        print()
        comparison.print_table(comparison.summary(table))
    print(f"results in {folder}")
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Arguments(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--theta",
        action="append",
        help="theta.npz, may be given several times; default: the best one in weights/",
    )
    add("--task", default="fmnist", help=f"one of {', '.join((*SUITES, *TASKS))}")
    add("--steps", type=int, default=2000, help="inner steps (default 2000)")
    add("--seeds", type=int, default=3, help="fresh seeds (default 3)")
    add(
        "--baselines",
        default="adam,nadamw,sgdm",
        help=f"comma-separated, of {', '.join(BASELINES)}; '' for none",
    )
    add("--data", default="auto", choices=("real", "stand-in", "auto"))
    add("--data-dir", help="folder that holds the data set")
    add("--out", help="folder for the results; default runs/eval-TASK")
    args = parser.parse_args(argv)
    args.baselines = [name for name in args.baselines.split(",") if name]
    unknown = [name for name in args.baselines if name not in BASELINES]
    if unknown:
        raise UserError(
            f"unknown baseline {unknown[0]!r}: one of {', '.join(BASELINES)}"
        )
    if args.task not in (*SUITES, *TASKS):
        known = ", ".join((*SUITES, *TASKS))
        raise UserError(f"unknown task {args.task!r}: one of {known}")
    for name in ("steps", "seeds"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < 2**31:
            raise UserError(f"--{name} must be in 1 .. 2^31 - 1")
    thinning(args.steps)  # refused before anything is written
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    folder = pathlib.Path(args.out or f"runs/eval-{args.task}")
    if args.theta is None:
        args.theta = [str(comparison.best_theta(args.task))]
    for path in args.theta or ():
        comparison.trained(path)  # a bad file is refused before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    with only_run_in(folder):
        request = comparison.Request(
            thetas=tuple(args.theta),
            baselines=tuple(args.baselines),
            seeds=args.seeds,
            steps=args.steps,
            source=args.data,
            data_dir=args.data_dir,
        )
        return evaluate(args, request, folder)


if __name__ == "__main__":
    sys.exit(run_command("eval.py", main))
