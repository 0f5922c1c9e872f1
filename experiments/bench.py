"""Speed, in ratios measured in one run: python -m experiments.bench

Meta-training throughput against the floor (the task's gradient and SGD, no optimizer to
speak of) and Adam; one update against Adam's, by tensor size; each estimator against PES;
how the time of a meta-step grows with what it is made of; compile time; memory; and, with
--against, the authors' library. Prints tables and writes bench.json and bench.png. All
timings are the best of interleaved rounds.
"""

import argparse
import itertools
import math
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import matplotlib
import numpy as np

import estimators
import star
from baselines import BASELINES
from experiments import against
from inner import batching, compiler_options, inner_unroll
from settings import Config
from store import Arguments, UserError, run_command, save_figure, save_json
from tasks import TASKS
from train import build_estimator, optimizer_of

OPTIMIZERS = {
    "gradient only": BASELINES["sgd"],
    "adam": BASELINES["adam"],
    "blackbox": star.PRESETS["blackbox"],
    "star": star.PRESETS["star_small_beta3"],
}
SHAPES = ((128,), (128, 10), (128, 128), (784, 128), (3, 3, 64, 64), (1024, 1024))
LARGE = ((3162, 3162), (10_000, 10_000))  # --large: 10 GB of memory
TIMED = ("pes", "truncated_bptt", "merged")  # estimators
# What a meta-step of PES is made of, and the exponent its time should grow with.
GROWTH = {
    "particles": ((1, 2, 4, 8, 16), 1),
    "truncation": ((10, 20, 50, 100, 200), 1),
    "horizon": ((200, 600, 2000, 6000, 20_000), 0),
}
QUICK = {"particles": ((1, 4), 1)}


def window(
    optimizer: Any,
    build: Callable,
    data: Any,
    pairs: int,
    length: int,
    horizon: int = 2000,
) -> tuple[Callable, float]:
    """`compiled` PES, `pairs` windows of `length` inner steps: what a meta-step runs."""

    def make(data):
        problem = inner_unroll(partial(build, data), optimizer, length)
        pair = estimators.pes(problem, max(1, horizon // length), 1e-4, batching())
        return estimators.population(pair, pairs, batching())

    return compiled(make, optimizer.init_theta(jax.random.key(0)), data)


def compiled(make: Callable, theta: Any, data: Any) -> tuple[Callable, float]:
    """(() -> the next estimate of make(data), an Estimator; seconds to compile it)."""
    options, keys = compiler_options(), map(jax.random.key, itertools.count(2))

    def estimate(data, key, theta, state):
        return make(data).estimate(key, theta, state)

    def start(data, key):
        return make(data).init(key, theta)

    state = jax.jit(start)(data, jax.random.key(1))
    begin = time.perf_counter()
    run = (
        jax.jit(estimate, donate_argnums=3, compiler_options=options)
        .lower(data, jax.random.key(2), theta, state)
        .compile()
    )
    seconds = time.perf_counter() - begin

    def following():
        nonlocal state
        grad, state, metrics = run(data, next(keys), theta, state)
        return grad, state, metrics

    return following, seconds


def best_times(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of each call (), the best of interleaved rounds after one that warms up."""
    best = dict.fromkeys(calls, float("inf"))
    for t in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if t:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def throughput(
    build: Callable, data: Any, pairs: int, length: int, rounds: int
) -> dict[str, dict]:
    """Inner steps per second of one window of all particles, for each optimizer."""
    runs = {
        name: window(o, build, data, pairs, length) for name, o in OPTIMIZERS.items()
    }
    best = best_times({name: call for name, (call, _) in runs.items()}, rounds)
    steps = 2 * pairs * length
    return {
        name: {
            "inner_steps_per_second": steps / best[name],
            "of_gradient_only": best["gradient only"] / best[name],
            "of_adam": best["adam"] / best[name],
            "compile_seconds": compile_seconds,
        }
        for name, (_, compile_seconds) in runs.items()
    }


def estimator_costs(
    task: str, data: Any, pairs: int, length: int, rounds: int
) -> dict[str, dict]:
    """Seconds of an estimate by each of TIMED, as train.py makes it for Metz's optimizer
    with the same pairs and windows, and the multiple of the first, PES."""
    horizon = max(Config.horizon, length)
    shape = dict(particles=pairs, truncation=length, horizon=horizon)
    calls = {}
    for name in TIMED:
        config = Config(task=task, optimizer="mlp", estimator=name, **shape)
        theta = optimizer_of(config)[0].init_theta(jax.random.key(0))
        calls[name], _ = compiled(partial(build_estimator, config), theta, data)
    best = best_times(calls, rounds)
    return {
        name: {"seconds": seconds, "of_pes": seconds / best["pes"]}
        for name, seconds in best.items()
    }


def compare(
    folder: str | pathlib.Path,
    build: Callable,
    data: Any,
    pairs: int,
    length: int,
    rounds: int,
    horizon: int = 2000,
) -> dict[str, dict]:
    """PES with the blackbox optimizer, here and by the library in `folder`, in one run:
    inner steps per second, and how many times as many are done here."""
    ours, _ = window(OPTIMIZERS["blackbox"], build, data, pairs, length, horizon)
    task = build(data, jax.random.key(0))
    theirs = against.estimates(folder, task, pairs, length, horizon)
    best = best_times({"here": ours} | theirs, rounds)
    return {
        name: {
            "inner_steps_per_second": 2 * pairs * length / seconds,
            "times_here": seconds / best["here"],
        }
        for name, seconds in best.items()
    }


def growth(
    build: Callable, data: Any, rounds: int, grid: dict[str, tuple]
) -> dict[str, dict]:
    """Seconds of a STAR meta-step against particles, truncation K and horizon T, each from
    4 pairs, K = 50, T = 2,000, with the slope of the log-log line through them; particles
    and K are to cost in proportion, T nothing."""
    usual, table = dict(particles=4, truncation=50, horizon=2000), {}
    for name, (values, expected) in grid.items():
        calls = {}
        for value in values:
            at = usual | {name: value}
            args = at["particles"], at["truncation"], at["horizon"]
            calls[value], _ = window(OPTIMIZERS["star"], build, data, *args)
        seconds = list(best_times(calls, rounds).values())
        slope = log_slope(values, seconds)
        table[name] = dict(
            values=values, seconds=seconds, slope=slope, slope_expected=expected
        )
    return table


def log_slope(x: Any, y: Any) -> float:
    """b of y = a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def update_times(
    shape: tuple[int, ...], rounds: int, repeats: int = 20
) -> dict[str, float]:
    """Microseconds of one update of one tensor, inside a jitted loop of `repeats`."""
    calls = {}
    for name in ("adam", "blackbox", "star"):
        optimizer = OPTIMIZERS[name]
        theta = optimizer.init_theta(jax.random.key(0))
        p = jax.random.normal(jax.random.key(1), shape)

        def loop(theta, p, state, optimizer=optimizer):
            def one(_, carry):
                p, state = carry
                # a gradient that changes with p, so that nothing moves out of the loop
                update, state = optimizer.update(theta, 1e-3 * p + 1e-4, state, p)
                return p + update, state

            return jax.lax.fori_loop(0, repeats, one, (p, state))

        args = (theta, p, optimizer.init(p))
        run = jax.jit(loop, compiler_options=compiler_options()).lower(*args).compile()
        calls[name] = partial(run, *args)
    return {
        name: seconds / repeats * 1e6
        for name, seconds in best_times(calls, rounds).items()
    }


def update_growth(updates: dict) -> dict[str, dict]:
    """The entry of `growth` for parameters; below 10,000 elements what an update costs is
    its number of operations, not their size. Empty for fewer than two larger sizes."""
    times = {elements(shape): row["star"] for shape, row in updates.items()}
    times = {size: us for size, us in sorted(times.items()) if size >= 10_000}
    if len(times) < 2:
        return {}
    seconds = [1e-6 * us for us in times.values()]
    slope = log_slope(list(times), seconds)
    row = dict(values=list(times), seconds=seconds, slope=slope, slope_expected=1)
    return {"parameters": row}


def elements(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def peak_memory() -> dict[str, float]:
    """MB: of the process, and of the accelerator where it tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    stats = jax.devices()[0].memory_stats() or {}
    device = stats.get("peak_bytes_in_use")
    return {"process_mb": process} | ({"device_mb": device / 1e6} if device else {})


def table(heading: str, rows: dict[str, dict], **columns: str) -> None:
    """Prints the rows under a heading; columns: key of a row -> its format."""
    wide = max(len(heading), *map(len, rows))
    print(
        f"\n{heading:>{wide}} "
        + " ".join(f"{c.replace('_', ' '):>16}" for c in columns)
    )
    for name, row in rows.items():
        cells = " ".join(f"{row[c]:16{form}}" for c, form in columns.items())
        print(f"{name:>{wide}} {cells}")


def plot(path: pathlib.Path, results: dict) -> None:
    """Left, inner steps per second; middle, one update by size; right, growth."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    speed = results["meta_training"]
    rates = [row["inner_steps_per_second"] for row in speed.values()]
    axes[0].barh(list(speed), rates)
    axes[0].set(xlabel="inner steps per second", title="meta-training")
    updates = results["update_microseconds"]
    sizes = [elements(shape) for shape in updates]
    order = np.argsort(sizes)
    for name in ("adam", "blackbox", "star"):
        times = np.array([row[name] for row in updates.values()])
        axes[1].loglog(np.array(sizes)[order], times[order], "o-", label=name)
    axes[1].set(xlabel="elements", title="one update, microseconds")
    axes[1].legend(fontsize=8)
    for name, row in results["growth"].items():
        x, y = (np.array(row[k], float) for k in ("values", "seconds"))
        label = f"{name}: slope {row['slope']:.2f}"
        axes[2].loglog(x / x[0], y / y[0], "o-", label=label)
    axes[2].set(xlabel="times as many", title="times as long")
    axes[2].legend(fontsize=8)
    figure.suptitle(f"{results['arguments']['task']} on {results['device']}")
    save_figure(path, figure, dpi=130)
    plt.close(figure)


def measure(args: argparse.Namespace, data: Any) -> dict[str, dict]:
    """All that main prints and writes; prints each table when it is there."""
    rounds = 2 if args.quick else 8
    pairs, length = args.particles, args.truncation
    build = TASKS[args.task].build
    results = {"meta_training": throughput(build, data, pairs, length, rounds)}
    rates = dict(of_gradient_only=".2f", of_adam=".2f", compile_seconds=".1f")
    speed = dict(inner_steps_per_second=".0f")
    table("meta-training", results["meta_training"], **speed, **rates)
    results["memory"] = peak_memory()
    print(
        "peak memory: "
        + ", ".join(f"{k} {v:.0f}" for k, v in results["memory"].items())
    )

    costs = estimator_costs(args.task, data, pairs, length, rounds)
    results["estimators"] = costs
    table("estimate, of mlp", costs, seconds=".3f", of_pes=".2f")

    updates = results["update_microseconds"] = {}
    for shape in SHAPES[:3] if args.quick else SHAPES + LARGE * args.large:
        few = shape in LARGE
        row = update_times(shape, 2 if few else rounds, 2 if few else 20)
        updates["x".join(map(str, shape))] = row | {
            "star_of_adam": row["star"] / row["adam"]
        }
    times = dict.fromkeys(("adam", "blackbox", "star", "star_of_adam"), ".1f")
    table("one update, us", updates, **times)

    grid = QUICK if args.quick else GROWTH
    results["growth"] = growth(build, data, rounds // 2, grid) | update_growth(updates)
    table("time grows with", results["growth"], slope=".2f", slope_expected="d")
    if args.against:
        rows = compare(args.against, build, data, pairs, length, rounds)
        results["against"] = rows
        table("blackbox, PES", rows, **speed, times_here=".1f")
    return results


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Arguments(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task", default="fmnist", choices=tuple(TASKS), metavar="NAME"
    )
    parser.add_argument("--particles", type=int, default=4, help="antithetic pairs")
    parser.add_argument("--truncation", type=int, default=50, help="K, inner steps")
    parser.add_argument("--data", default="auto", choices=("real", "stand-in", "auto"))
    parser.add_argument("--data-dir", help="folder that holds the data set")
    parser.add_argument("--out", default="runs/bench", help="folder for bench.json")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument(
        "--large", action="store_true", help="updates of 1e7 and 1e8 elements, too"
    )
    parser.add_argument(
        "--against",
        metavar="FOLDER",
        help="of google/learned_optimization: see against.py",
    )
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
    device = jax.devices()[0]
    print(f"{device.device_kind}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"{args.task}, {args.particles} pairs, K = {args.truncation}")
    machine = {"device": device.device_kind, "jax": jax.__version__}
    results = machine | {"arguments": vars(args)} | about | measure(args, data)
    save_json(folder / "bench.json", results)
    plot(folder / "bench.png", results)
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.py", main))
