"""Speed, in ratios measured in one run: python -m experiments.bench

Meta-training is compared with Adam and with the floor, the task's gradient and SGD. Updates
are compared with Adam's by tensor size, and estimators with PES. Compile time and memory
follow, and --against adds the authors' library. It prints tables and writes bench.json. All
timings are the best of interleaved rounds, so that a busy machine slows all alike.
"""

import argparse
import itertools
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.flatten_util import ravel_pytree

import star
import star_fast
from companions.lopts import LEARNED
from devices import compiler_options, each
from estimators import inverse_variance_mean, mean_of_particles, population
from experiments import against
from experiments.catalogue import TASKS
from experiments.tuning import OPTIMIZERS as HAND_DESIGNED
from store import Arguments, UserError, run_command, save_json
from tasks import inner_problem
from train import ESTIMATORS

# star.py is the plain form, star_fast.py what train.py and eval.py run.
OPTIMIZERS = {
    "gradient only": HAND_DESIGNED["sgd"],
    "adam": HAND_DESIGNED["adam"],
    "blackbox": star_fast.PRESETS["blackbox"],
    "star": star_fast.PRESETS["star_small_beta3"],
    "star, plain": star.PRESETS["star_small_beta3"],
}
UPDATES = ("adam", "star", "star, plain")
SHAPES = ((128, 10), (784, 128), (128,), (128, 128), (3, 3, 64, 64), (1024, 1024))
# Estimators that are timed, and how they join their particles.
COMBINE = dict.fromkeys(("pes", "truncated_bptt"), mean_of_particles)
COMBINE["merged"] = inverse_variance_mean
HORIZON = 2000  # T, inner steps


def window(
    optimizer: star.LearnedOptimizer,
    build: Callable,
    data: Any,
    pairs: int,
    length: int,
    estimator: str = "pes",
) -> tuple[Callable, float]:
    """(() -> the next estimate, seconds to compile it). A meta-step runs such an estimate:
    `pairs` windows of `length` inner steps."""
    flat, unravel = ravel_pytree(optimizer.init_theta(jax.random.key(0)))

    def make(data):
        problem = inner_problem(partial(build, data), optimizer, unravel, length)
        windows = max(1, HORIZON // length)
        one = ESTIMATORS[estimator](problem, windows, 1e-4, each())
        return population(one, pairs, each(), COMBINE[estimator])

    def start(data, key):
        return make(data).init(key, flat)

    def estimate(data, key, theta, state):
        return make(data).estimate(key, theta, state)

    state = jax.jit(start)(data, jax.random.key(1))
    begin, options = time.perf_counter(), compiler_options()
    jitted = jax.jit(estimate, donate_argnums=3, compiler_options=options)
    run = jitted.lower(data, jax.random.key(2), flat, state).compile()
    seconds = time.perf_counter() - begin
    keys = map(jax.random.key, itertools.count(2))

    def following():
        nonlocal state
        gradient, state, metrics = run(data, next(keys), flat, state)
        return gradient, state, metrics

    return following, seconds


def best_times(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of each call (), the best of interleaved rounds. One more warms up."""
    best = dict.fromkeys(calls, float("inf"))
    for t in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if t:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def throughput(build, data, pairs: int, length: int, rounds: int) -> dict[str, dict]:
    """Inner steps per second of one window of all particles, for each optimizer."""
    runs = {k: window(o, build, data, pairs, length) for k, o in OPTIMIZERS.items()}
    best = best_times({name: call for name, (call, _) in runs.items()}, rounds)
    return {
        name: {
            "inner_steps_per_second": 2 * pairs * length / best[name],
            "of_gradient_only": best["gradient only"] / best[name],
            "of_adam": best["adam"] / best[name],
            "compile_seconds": seconds,
        }
        for name, (_, seconds) in runs.items()
    }


def estimator_costs(build, data, pairs, length: int, rounds: int) -> dict[str, dict]:
    """Seconds of each estimate of Metz's optimizer, with the same pairs and windows, and
    these as a multiple of PES."""
    window_of = partial(window, LEARNED["mlp"], build, data, pairs, length)
    best = best_times({name: window_of(name)[0] for name in COMBINE}, rounds)
    return {k: {"seconds": x, "of_pes": x / best["pes"]} for k, x in best.items()}


def compare(folder, build, data, pairs, length: int, rounds: int) -> dict[str, dict]:
    """PES with STAR, here and by the library in `folder`: inner steps per second of each,
    and how many times as many are done here."""
    ours, _ = window(OPTIMIZERS["star"], build, data, pairs, length)
    task = build(data, jax.random.key(0))
    theirs = against.estimates(folder, task, pairs, length, HORIZON)
    best = best_times({"here": ours} | theirs, rounds)
    return {
        name: {
            "inner_steps_per_second": 2 * pairs * length / seconds,
            "times_here": seconds / best["here"],
        }
        for name, seconds in best.items()
    }


def update_times(shape: tuple[int, ...], rounds: int, repeats=20) -> dict[str, float]:
    """Microseconds of one update of one tensor, inside a jitted loop of `repeats`."""
    calls = {}
    for name in UPDATES:
        optimizer = OPTIMIZERS[name]
        theta = optimizer.init_theta(jax.random.key(0))
        p = jax.random.normal(jax.random.key(1), shape)

        def loop(theta, p, state, optimizer=optimizer):
            def one(_, carry):
                p, state = carry
                # The gradient changes with p, so that nothing moves out of the loop.
                update, state = optimizer.update(theta, 1e-3 * p + 1e-4, state, p)
                return p + update, state

            return jax.lax.fori_loop(0, repeats, one, (p, state))

        args = (theta, p, optimizer.init(p))
        run = jax.jit(loop, compiler_options=compiler_options()).lower(*args).compile()
        calls[name] = partial(run, *args)
    best = best_times(calls, rounds)
    row = {name: seconds / repeats * 1e6 for name, seconds in best.items()}
    return row | {"star_of_adam": row["star"] / row["adam"]}


def peak_memory() -> dict[str, float]:
    """MB: of the process, and of the accelerator where it tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    stats = jax.devices()[0].memory_stats() or {}
    device = stats.get("peak_bytes_in_use")
    return {"process_mb": process} | ({"device_mb": device / 1e6} if device else {})


def table(heading: str, rows: dict[str, dict], **forms: str) -> None:
    """Prints the rows under a heading. forms: of columns whose numbers are not .1f."""
    wide, columns = max(len(heading), *map(len, rows)), list(next(iter(rows.values())))
    names = " ".join(f"{column.replace('_', ' '):>22}" for column in columns)
    print(f"\n{heading:>{wide}} {names}")
    for name, row in rows.items():
        cells = " ".join(f"{row[k]:22{forms.get(k, '.1f')}}" for k in columns)
        print(f"{name:>{wide}} {cells}", flush=True)


def measure(args: argparse.Namespace, data: Any) -> dict[str, dict]:
    """All that main writes. Prints each table when it is there."""
    rounds = 2 if args.quick else 8
    setting = TASKS[args.task].build, data, args.particles, args.truncation, rounds
    results = {"meta_training": throughput(*setting)}
    ratios = {"of_gradient_only": ".2f", "of_adam": ".2f", "of_pes": ".2f"}
    table("meta-training", results["meta_training"], **ratios)
    results["memory"] = peak_memory()
    table("peak memory", {"": results["memory"]})
    results["estimators"] = estimator_costs(*setting)
    table("estimate, of mlp", results["estimators"], seconds=".3f", **ratios)
    updates = results["update_microseconds"] = {}
    for shape in SHAPES[:2] if args.quick else SHAPES:
        updates["x".join(map(str, shape))] = update_times(shape, rounds)
    table("one update, us", updates)
    if args.against:
        results["against"] = compare(args.against, *setting)
        table("star, PES", results["against"])
    return results


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", default="fmnist", choices=tuple(TASKS), metavar="NAME")
    add("--particles", type=int, default=4, help="antithetic pairs, at least 2")
    add("--truncation", type=int, default=50, help="K, inner steps")
    parser.add_data()
    add("--out", default="runs/bench", help="folder for bench.json")
    add("--quick", action="store_true", help="fewer rounds and sizes")
    add("--against", metavar="FOLDER", help="with the authors' code (against.py)")
    args = parser.parse_args(argv)
    if args.particles < 2 or args.truncation < 1:
        raise UserError("--particles must be at least 2 and --truncation at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.against:
        against.check(args.against)
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    data, about = TASKS[args.task].load(args.data, args.data_dir)
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(f"{args.task}, {args.particles} pairs, K = {args.truncation}")
    print(f"{machine['device']}, {os.cpu_count()} cores, jax {machine['jax']}")
    results = machine | {"arguments": vars(args)} | about | measure(args, data)
    save_json(folder / "bench.json", results)
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.py", main))
