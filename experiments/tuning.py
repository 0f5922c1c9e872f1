"""Tune the baselines: python -m experiments.tuning --task fmnist --optimizers adam,nadamw

Trains each task with every candidate (appendix B.3 of the STAR paper: Adam at half orders
of magnitude, NAdamW with configurations of a list of 1000) and keeps the one that ends
with the lowest training loss. Writes a file of results, one a line; what is there already
with the same settings is not run again. `tuned.json` beside this module is the file that
comes with the repository, and what eval.py reads.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tasks
from baselines import (
    BASELINES,
    GRIDS,
    LEARNING_RATES,
    NADAMW_CONFIGURATIONS,
    SEARCHED,
    as_theta,
    candidates,
    lowest,
)
from inner import batching, compiler_options, inner_training
from store import Arguments, UserError, clock, run_command, write_atomically

TUNED = pathlib.Path(__file__).resolve().parent / "tuned.json"
SEARCH_SEED = 30_000  # apart from the seeds of training and of evaluation
TAIL = 10  # the criterion looks at the last steps / TAIL losses
CRITERION = "mean of the last tenth of the training losses"
AT_ONCE = 16  # candidates that train side by side on an accelerator
SECONDS_BETWEEN_LINES = 10.0


class Settings(NamedTuple):
    """What names a search, with the data: the same settings give the same result."""

    task: str
    optimizer: str
    budget: int  # candidates
    steps: int  # inner steps, T of the schedules
    seed: int


def train_candidates(
    build: Callable,
    data: Any,
    optimizer: Any,
    thetas: list[dict[str, float]],
    settings: Settings,
    report: Callable,
) -> np.ndarray:
    """Training losses (candidates, steps), nan after a run's first loss that is not finite.

    There the run stops: it could not win any more, and need not cost more. build:
    (data, key) -> Task. All see the same initial parameters and the same batches, those
    of `inner.curves` with the same key. report: called with the number of runs done.
    """
    key = jax.random.key(SEARCH_SEED + settings.seed)
    init_key, run_key = jax.random.split(key)
    steps = settings.steps

    def run(data, theta):
        fresh, step = inner_training(partial(build, data), optimizer)

        def alive(state):
            t, _, losses = state
            return (t < steps) & ((t == 0) | jnp.isfinite(losses[t - 1]))

        def one(state):
            t, carry, losses = state
            carry, loss = step(theta, carry, jax.random.fold_in(run_key, t))
            return t + 1, carry, losses.at[t].set(loss)

        start = jnp.int32(0), fresh(init_key), jnp.full(steps, jnp.nan)
        return jax.lax.while_loop(alive, one, start)[2]

    @partial(jax.jit, compiler_options=compiler_options())
    def train(data, thetas):
        return batching()(partial(run, data))(thetas)

    # One by one on a CPU, where `batching` would do so, too, but without a report.
    size = 1 if jax.default_backend() == "cpu" else min(AT_ONCE, len(thetas))
    losses = []
    for first in range(0, len(thetas), size):
        group = thetas[first : first + size]
        padded = group + group[:1] * (size - len(group))  # one shape, compiled once
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(as_theta, padded))
        losses += list(np.asarray(train(data, stacked))[: len(group)])
        report(len(losses))
    return np.stack(losses)


def final_losses(losses: np.ndarray) -> np.ndarray:
    """(candidates, steps) -> (candidates,): mean over the last tenth of the steps.

    The paper takes the last training loss, of ten batches and five seeds; here the last
    steps' own batches stand for them. nan for a run that had a loss not finite anywhere.
    """
    tail = losses[:, -max(1, losses.shape[1] // TAIL) :].astype(np.float64)
    return np.where(np.isfinite(losses).all(1), tail.mean(1), np.nan)


def edge_warning(optimizer: str, best: int) -> str | None:
    """Said where the best learning rate is the first or the last of the grid."""
    if optimizer not in GRIDS or 0 < best < len(LEARNING_RATES) - 1:
        return None
    edge = "highest" if best else "lowest"
    return f"the best learning rate, {LEARNING_RATES[best]:g}, is the {edge} tried"


def same_search(settings: Settings, about: dict) -> dict:
    """The part of a result that says whether it is the one asked for."""
    names = ("dataset", "dataset_checksum", "stand_in")
    data = {name: about[name] for name in names}
    return settings._asdict() | data | {"criterion": CRITERION}


def tune(
    settings: Settings, data: Any, about: dict, report: Callable = lambda done: None
) -> dict:
    """Train with all candidates: what was found, and all it takes to repeat it.

    data, about: as the task's `load` returns them. In the result "theta" is the best
    candidate and "loss" its criterion, both None where every run ended in nan; "losses"
    are those of all candidates in their order, None for nan; "seconds" with compilation.
    """
    thetas = candidates(settings.optimizer, settings.budget, settings.steps)
    build, optimizer = tasks.TASKS[settings.task].build, BASELINES[settings.optimizer]
    begin = time.perf_counter()
    final = final_losses(
        train_candidates(build, data, optimizer, thetas, settings, report)
    )
    seconds = time.perf_counter() - begin
    rounded = [float(f"{x:.6g}") if np.isfinite(x) else None for x in final]
    best = lowest(final)
    found = rounded[best] is not None
    warning = edge_warning(settings.optimizer, best) if found else "every run diverged"
    return same_search(settings, about) | {
        "theta": thetas[best] if found else None,
        "loss": rounded[best],
        "losses": rounded,
        "warning": warning,
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "numpy", "optax")
        },
    }


# Files of results.


def load_tuned(path: str | pathlib.Path = TUNED) -> dict[tuple[str, str, int], dict]:
    """{(task, optimizer, steps): result of `tune`}; {} without a file.

    Raises UserError for a file that is not one of these.
    """
    try:
        results = json.loads(pathlib.Path(path).read_text())
        return {(r["task"], r["optimizer"], r["steps"]): r for r in results}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is not a file of tuned baselines") from None


def tuned_theta(
    task: str, optimizer: str, steps: int, path: str | pathlib.Path = TUNED
) -> dict | None:
    """The best theta {name: float} of a search over runs of just `steps`, or None."""
    return load_tuned(path).get((task, optimizer, steps), {}).get("theta")


def save_tuned(path: str | pathlib.Path, results: dict) -> None:
    """One result a line, by task, optimizer and steps."""
    lines = [json.dumps(results[key], allow_nan=False) for key in sorted(results)]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    write_atomically(pathlib.Path(path), lambda file: file.write(text.encode()))


# The command line.


def time_left(todo: dict[str, int], pace: dict[str, float]) -> float:
    """Seconds for the runs to do, {task: number}, at the pace {task: seconds a run}.

    A task that has not begun is taken to need what the others need on average.
    """
    usual = sum(pace.values()) / len(pace)
    return sum(n * pace.get(task, usual) for task, n in todo.items())


def reporter(label: str, task: str, total: int, todo: dict, pace: dict) -> Callable:
    """report(runs done) for `tune`: keeps the pace, and prints a line now and then."""
    begin = printed = time.perf_counter()

    def report(done: int) -> None:
        nonlocal printed
        now = time.perf_counter()
        pace[task] = (now - begin) / done
        if now - printed > SECONDS_BETWEEN_LINES and done < total:
            left = clock(time_left(todo | {task: todo[task] - done}, pace))
            print(
                f"{label}  {done}/{total}  {pace[task]:.2f} s a run  {left} left",
                flush=True,
            )
            printed = now

    return report


def line(result: dict) -> str:
    """A result for the user."""
    lost = result["losses"].count(None)
    loss = "-" if result["loss"] is None else f"{result['loss']:.4f}"
    theta = [f"{key} {value:.5g}" for key, value in (result["theta"] or {}).items()]
    warning = f"  WARNING: {result['warning']}" if result["warning"] else ""
    return (
        f"{result['task']} {result['optimizer']}: {loss}, best of "
        f"{len(result['losses'])} ({lost} diverged) in {result['seconds']} s: "
        f"{', '.join(theta)}{warning}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Arguments(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", default="small", help=f"of tasks: {', '.join(tasks.SUITES)}")
    add(
        "--task", action="append", help="these tasks instead; several times, if need be"
    )
    add("--steps", type=int, default=2000, help="inner steps (default 2000)")
    add(
        "--optimizers",
        default="adam,nadamw",
        help=f"comma-separated, of {', '.join(SEARCHED)}",
    )
    add("--nadamw", type=int, default=10, help="configurations of nadamw (default 10)")
    add("--adam8", type=int, default=10, help="random draws of adam8 (default 10)")
    add("--seed", type=int, default=0, help="of the parameters and batches (default 0)")
    add("--data", default="auto", choices=("real", "stand-in", "auto"))
    add("--data-dir", help="folder that holds the data sets")
    add("--out", default="runs/tuned.json", help="default runs/tuned.json")
    args = parser.parse_args(argv)
    if args.suite not in tasks.SUITES:
        raise UserError(f"unknown suite {args.suite!r}: {', '.join(tasks.SUITES)}")
    args.task = list(dict.fromkeys(args.task or tasks.SUITES[args.suite]))
    args.optimizers = [name for name in args.optimizers.split(",") if name]
    for kind, names, known in (
        ("task", args.task, tasks.TASKS),
        ("optimizer", args.optimizers, SEARCHED),
    ):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            which = repr(unknown[0]) if unknown else "''"
            raise UserError(f"unknown {kind} {which}: one of {', '.join(known)}")
    for name in ("steps", "nadamw", "adam8"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.nadamw > NADAMW_CONFIGURATIONS:
        raise UserError(f"--nadamw: there are {NADAMW_CONFIGURATIONS} configurations")
    if args.seed < 0:
        raise UserError("--seed must be at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    path = pathlib.Path(args.out)
    results = load_tuned(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    budgets = dict.fromkeys(GRIDS, len(LEARNING_RATES)) | {
        "nadamw": args.nadamw,
        "nadamw_quirks": args.nadamw,
        "adam8": args.adam8,
    }
    todo = dict.fromkeys(args.task, sum(budgets[name] for name in args.optimizers))
    pace = {}
    for task in args.task:
        data, about = tasks.TASKS[task].load(args.data, args.data_dir)
        for optimizer in args.optimizers:
            budget, label = budgets[optimizer], f"{task} {optimizer}"
            settings = Settings(task, optimizer, budget, args.steps, args.seed)
            before = results.get((task, optimizer, args.steps), {})
            wanted = same_search(settings, about)
            if all(before.get(name) == value for name, value in wanted.items()):
                print(f"{label}: in {path} already", flush=True)
            else:
                report = reporter(label, task, budget, todo, pace)
                result = tune(settings, data, about, report)
                results[task, optimizer, args.steps] = result
                save_tuned(path, results)
                print(line(result), flush=True)
            todo[task] -= budget
    print(f"results in {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run_command("tuning.py", main))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last result")
        sys.exit(130)
