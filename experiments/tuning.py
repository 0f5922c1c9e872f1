"""Tune the baselines: python -m experiments.tuning --task fmnist --optimizers adam,nadamw

Every candidate trains each task. The one that ends with the lowest training loss is kept
(appendix B.3 of the STAR paper). Adam is tried at half orders of magnitude, NAdamW with
configurations of a list of 1000. The file gets one search a line. A search that it has is
skipped. `tuned.json` beside this module is the file that eval.py reads.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import eval as evaluation
from baselines import BASELINES, LEARNING_RATES, as_theta, curves, from_optax
from companions.lopts import adam8
from experiments.catalogue import SUITES, TASKS
from store import Arguments, UserError, fcntl, run_command, write_atomically

SEARCH_SEED = 30_000  # apart from the seeds of training and of evaluation
CRITERION = "mean of the last tenth of the training losses"


MORE = {"sgd": optax.sgd, "rmsprop": optax.rmsprop, "adam8": adam8}
OPTIMIZERS = BASELINES | {"nadamw_quirks": BASELINES["nadamw"]}  # with other thetas
OPTIMIZERS |= {name: from_optax(f, {"learning_rate": 1e-3}) for name, f in MORE.items()}
GRIDS = ("adam", "sgdm", "rmsprop", "sgd")  # searched over learning rates alone

# Seeds of the list's first hundred entries: what a budget should try first.
NADAMW_ORDER = """
251 611 799 209 739 713 437 25 342 743 515 324 135 705 934 741 119 770 794 189 829 607
68 958 700 527 865 807 364 374 639 579 494 409 153 697 797 986 111 410 274 941 150 853
90 422 795 937 148 787 116 336 198 327 693 390 999 801 118 385 296 597 726 900 338 985
249 672 760 160 507 666 944 8 604 12 344 989 261 966 343 247 493 175 350 17 476 509 161
813 407 18 191 58 996 230 203 621 737 165
"""
NADAMW_CONFIGURATIONS = 1000


def log_uniform(rng: np.random.RandomState, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def nadamw_config(seed: int) -> dict[str, float]:
    """Configuration `seed`, 0 to 999, of the 1000 random ones (appendix B.3), as drawn.

    The list that the paper searches has them in another order. warmup and constant are
    fractions of the run.
    """
    rng = np.random.RandomState(seed + 14358)
    draw = partial(log_uniform, rng)
    config = {
        "learning_rate": draw(1e-5, 1),
        "b1": 1 - draw(1e-3, 1),
        "b2": 1 - draw(1e-5, 1),
        "eps": draw(1e-8, 1e4),
        "nesterov": float(rng.uniform() > 0.5),
    }
    kind = rng.uniform()  # of decay: the decoupled one, l2, or both
    config["weight_decay"] = 0.0 if 0.3333 <= kind < 0.6666 else draw(1e-5, 0.1)
    config["l2"] = 0.0 if kind < 0.3333 else draw(1e-5, 0.1)
    config["warmup"] = draw(1e-5, 0.1) if rng.uniform() > 0.5 else 0.0
    config["min_multiplier"] = 0.0 if rng.uniform() > 0.5 else draw(1e-5, 1)
    config["constant"] = float(rng.uniform())
    return config


def nadamw_theta(config: dict, steps: int, quirks: bool = False) -> dict[str, float]:
    """`nadamw`'s theta of a configuration, for a run of `steps`.

    The warm-up ends where the constant part does, if not before: min(warmup, constant).
    quirks: as the published code, the paper's baseline, has it. There the warm-up is
    max(warmup, constant), one ramp up to where the decay begins. Its l2 term has the other
    sign and drives the weights outwards.
    """
    warmup, l2 = config["warmup"], config["l2"]
    if warmup > 0:
        warmup = (max if quirks else min)(warmup, config["constant"])
    theta = {"warmup": warmup, "l2": 0.0 - l2 if quirks else l2, "steps": float(steps)}
    return config | theta


def adam8_config(seed: int, steps: int) -> dict[str, float]:
    """Random hyperparameters of `adam8`, for a run of `steps`.

    Metz et al. 2019 do not print their ranges. Ours are uniform in the logarithm. Over the
    whole run, the exponential decay divides the rate by e^0.1 to e^10. The linear decay
    takes 0.1 to 1 of it.
    """
    draw = partial(log_uniform, np.random.RandomState(seed))
    return {
        "learning_rate": draw(1e-4, 1e-1),
        "b1": 1 - draw(1e-2, 1),
        "b2": 1 - draw(1e-4, 1e-1),
        "eps": draw(1e-8, 1e-2),
        "exponential_decay": draw(0.1, 10) / steps,
        "linear_decay": draw(0.1, 1) / steps,
        "l1": draw(1e-8, 1e-3),
        "l2": draw(1e-8, 1e-3),
    }


def candidates(optimizer: str, budget: int, steps: int) -> list[dict[str, float]]:
    """The thetas to try, as plain numbers, for runs of `steps`.

    adam, sgdm, rmsprop, sgd: `LEARNING_RATES`, whatever the budget. nadamw: `budget` of the
    1000 configurations, first the hundred of NADAMW_ORDER, then by seed. nadamw_quirks: the
    same with `quirks`. adam8: `budget` random draws.
    """
    if optimizer in GRIDS:
        return [{"learning_rate": rate} for rate in LEARNING_RATES]
    if optimizer == "adam8":
        return [adam8_config(seed, steps) for seed in range(budget)]
    order = [int(seed) for seed in NADAMW_ORDER.split()]
    order += [seed for seed in range(NADAMW_CONFIGURATIONS) if seed not in order]
    quirks = optimizer == "nadamw_quirks"
    configs = map(nadamw_config, order[:budget])
    return [nadamw_theta(config, steps, quirks) for config in configs]


def final_losses(losses: np.ndarray) -> np.ndarray:
    """(candidates, steps) -> (candidates,): mean over the last tenth of the steps.

    The paper takes the last training loss, of ten batches and five seeds. Here the batches
    of the last steps stand for them. A run with any loss that is not finite gets inf.
    """
    tail = losses[:, -max(1, losses.shape[1] // 10) :].astype(np.float64)
    return np.where(np.isfinite(losses).all(1), tail.mean(1), np.inf)


def warning_of(optimizer: str, final: np.ndarray) -> str | None:
    """A warning where every run diverged, or the best rate is at an edge of the grid."""
    best = int(final.argmin())
    if not np.isfinite(final[best]):
        return "every run diverged"
    if optimizer not in GRIDS or 0 < best < len(LEARNING_RATES) - 1:
        return None
    edge = "highest" if best else "lowest"
    return f"the best learning rate, {LEARNING_RATES[best]:g}, is the {edge} tried"


def tune(asked: dict, data: Any, report: Callable = lambda done: None) -> dict:
    """`asked` and what was found: all candidates on the same parameters and batches.

    asked: as `main` makes it. It determines the result. Its "theta" is the best candidate
    and "loss" the criterion, both None where every run diverged. "losses" are those of all
    candidates, None for a diverged one. "seconds" include compilation.
    """
    optimizer, steps = asked["optimizer"], asked["steps"]
    thetas, begin = candidates(optimizer, asked["budget"], steps), time.perf_counter()
    keys = jax.random.key(SEARCH_SEED + asked["seed"])[None]
    setting = TASKS[asked["task"]].build, data, OPTIMIZERS[optimizer]
    tried = list(map(as_theta, thetas))
    losses = curves(*setting, tried, keys, steps, report=report).losses[:, 0]
    final = final_losses(losses)
    rounded = [float(f"{x:.6g}") if np.isfinite(x) else None for x in final]
    best, packages = int(final.argmin()), ("jax", "numpy", "optax")
    return asked | {
        "theta": None if rounded[best] is None else thetas[best],
        "loss": rounded[best],
        "losses": rounded,
        "warning": warning_of(optimizer, final),
        "seconds": round(time.perf_counter() - begin, 1),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def load_tuned(path: pathlib.Path) -> dict[tuple[str, str, int], dict]:
    """{(task, optimizer, steps): result of `tune`}, {} without a file."""
    try:
        results = json.loads(path.read_text())
        return {(r["task"], r["optimizer"], r["steps"]): r for r in results}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is not a file of tuned baselines") from None


def save_tuned(path: pathlib.Path, result: dict) -> None:
    """Adds a result to the file: one a line, by task, optimizer and steps.

    The file is read again under a lock, so that two searches at once lose nothing.
    """
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        results = load_tuned(path)
        results[result["task"], result["optimizer"], result["steps"]] = result
        lines = [json.dumps(results[key], allow_nan=False) for key in sorted(results)]
        text = "[\n" + ",\n".join(lines) + "\n]\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def line(result: dict) -> str:
    """A result for the user."""
    lost, number = result["losses"].count(None), len(result["losses"])
    text = f"{result['task']} {result['optimizer']}: {result['loss']}, best of {number}"
    text += f" ({lost} diverged) in {result['seconds']} s"
    theta = [f"{key} {value:.5g}" for key, value in (result["theta"] or {}).items()]
    warning = [f"WARNING: {result['warning']}"] if result["warning"] else []
    return ", ".join([text, *theta, *warning])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--suite", default="small", choices=tuple(SUITES), help="suite of tasks")
    add("--task", action="append", choices=tuple(TASKS), metavar="NAME", help="instead")
    add("--steps", type=int, default=2000, help="inner steps (default 2000)")
    text = f"comma-separated, of {', '.join(OPTIMIZERS)}"
    add("--optimizers", default="adam,nadamw", help=text)
    add("--nadamw", type=int, default=10, help="candidates where no grid is searched")
    add("--seed", type=int, default=0, help="of parameters and batches (default 0)")
    parser.add_data()
    add("--out", default="runs/tuned.json", help="file (default runs/tuned.json)")
    args = parser.parse_args(argv)
    args.task = args.task or SUITES[args.suite]
    args.optimizers = args.optimizers.split(",")
    for name in args.optimizers:
        if name not in OPTIMIZERS:
            raise UserError(f"unknown optimizer {name!r}: {text}")
    if args.steps < 1 or args.seed < 0 or not 1 <= args.nadamw <= NADAMW_CONFIGURATIONS:
        raise UserError("--steps must be over 0, --seed 0 or more, --nadamw 1 to 1000")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    for task, optimizer in itertools.product(args.task, args.optimizers):
        data, about = TASKS[task].load(args.data, args.data_dir)
        budget = len(LEARNING_RATES) if optimizer in GRIDS else args.nadamw
        asked = dict(task=task, optimizer=optimizer, budget=budget, steps=args.steps)
        asked |= {k: about[k] for k in ("dataset", "dataset_checksum", "stand_in")}
        asked |= {"seed": args.seed, "criterion": CRITERION}
        label, there = f"{task} {optimizer}", load_tuned(path)
        if asked.items() <= there.get((task, optimizer, args.steps), {}).items():
            print(f"{label}: in {path} already", flush=True)
            continue
        result = tune(asked, data, evaluation.counter(label, args.steps, budget))
        save_tuned(path, result)
        print(f"\n{line(result)}", flush=True)
    print(f"results in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("tuning.py", main))
