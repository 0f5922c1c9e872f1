"""Speed, in ratios measured in one run: python bench.py

Meta-training throughput against the floor (the task's gradient and SGD, no optimizer to
speak of) and Adam; one update against Adam's, by tensor size; how the time of a meta-step
grows with what it is made of; compile time; memory. Prints tables and writes bench.json and
bench.png. All timings are the best of interleaved rounds.
"""

import argparse
import math
import os
import pathlib
import resource
import sys
import time
from functools import partial

import jax
import matplotlib
import numpy as np

import estimators
import star
from baselines import BASELINES
from inner import batching, compiler_options, inner_unroll
from store import Arguments, UserError, run_command, save_figure, save_json
from tasks import TASKS

OPTIMIZERS = {
    "gradient only": BASELINES["sgd"],
    "adam": BASELINES["adam"],
    "blackbox": star.PRESETS["blackbox"],
    "star": star.PRESETS["star_small_beta3"],
}
SHAPES = ((128,), (128, 10), (128, 128), (784, 128), (3, 3, 64, 64), (1024, 1024))
LARGE = ((3162, 3162), (10_000, 10_000))  # --large: 10 GB of memory
# What a meta-step of PES is made of, and the exponent its time should grow with.
GROWTH = {
    "particles": ((1, 2, 4, 8, 16), 1),
    "truncation": ((10, 20, 50, 100, 200), 1),
    "horizon": ((200, 600, 2000, 6000, 20_000), 0),
}
QUICK = {"particles": ((1, 4), 1)}


def window(optimizer, build, data, pairs: int, length: int, horizon=2000):
    """(compiled PES estimate, its arguments, seconds to compile): what a meta-step runs."""
    theta = optimizer.init_theta(jax.random.key(0))

    def make(data):
        problem = inner_unroll(partial(build, data), optimizer, length)
        pair = estimators.pes(problem, max(1, horizon // length), 1e-4, batching())
        return estimators.population(pair, pairs, batching())

    def estimate(data, key, theta, state):
        return make(data).estimate(key, theta, state)

    options = compiler_options()
    state = jax.jit(lambda data, key: make(data).init(key, theta))(
        data, jax.random.key(1)
    )
    begin = time.perf_counter()
    compiled = (
        jax.jit(estimate, donate_argnums=3, compiler_options=options)
        .lower(data, jax.random.key(2), theta, state)
        .compile()
    )
    return compiled, theta, state, time.perf_counter() - begin


def best_times(runs: dict, data, rounds: int) -> dict:
    """Seconds of one call of each of {name: `window`}, the best of interleaved rounds."""
    states = {name: state for name, (_, _, state, _) in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for t in range(rounds + 1):  # the first round warms up
        for name, (compiled, theta, _, _) in runs.items():
            begin = time.perf_counter()
            result = compiled(data, jax.random.key(t), theta, states[name])
            jax.block_until_ready(result)
            states[name] = result[1]
            if t:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def throughput(build, data, pairs, length, rounds) -> dict[str, dict]:
    """Inner steps per second of one window of all particles, for each optimizer."""
    runs = {
        name: window(o, build, data, pairs, length) for name, o in OPTIMIZERS.items()
    }
    best = best_times(runs, data, rounds)
    steps = 2 * pairs * length
    return {
        name: {
            "inner_steps_per_second": steps / best[name],
            "of_gradient_only": best["gradient only"] / best[name],
            "of_adam": best["adam"] / best[name],
            "compile_seconds": runs[name][3],
        }
        for name in runs
    }


def growth(build, data, rounds, grid=GROWTH) -> dict[str, dict]:
    """Seconds of a STAR meta-step against particles, truncation K and horizon T, each from
    4 pairs, K = 50, T = 2,000, with the slope of the log-log line through them; particles
    and K are to cost in proportion, T nothing."""
    usual, table = dict(particles=4, truncation=50, horizon=2000), {}
    for name, (values, expected) in grid.items():
        runs = {}
        for value in values:
            at = usual | {name: value}
            args = at["particles"], at["truncation"], at["horizon"]
            runs[value] = window(OPTIMIZERS["star"], build, data, *args)
        seconds = list(best_times(runs, data, rounds).values())
        slope = log_slope(values, seconds)
        table[name] = dict(
            values=values, seconds=seconds, slope=slope, slope_expected=expected
        )
    return table


def log_slope(x, y) -> float:
    """b of y = a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def update_times(shape, rounds, repeats=20) -> dict[str, float]:
    """Microseconds of one update of one tensor, inside a jitted loop of `repeats`."""
    compiled = {}
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
        fn = jax.jit(loop, compiler_options=compiler_options()).lower(*args).compile()
        jax.block_until_ready(fn(*args))
        compiled[name] = fn, args
    best = dict.fromkeys(compiled, float("inf"))
    for _ in range(rounds):
        for name, (fn, args) in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(fn(*args))
            best[name] = min(best[name], (time.perf_counter() - begin) / repeats)
    return {name: seconds * 1e6 for name, seconds in best.items()}


def peak_memory() -> dict[str, float]:
    """MB: of the process, and of the accelerator where it tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    stats = jax.devices()[0].memory_stats() or {}
    device = stats.get("peak_bytes_in_use")
    return {"process_mb": process} | ({"device_mb": device / 1e6} if device else {})


def plot(path, results: dict) -> None:
    """Left, inner steps per second; middle, one update by size; right, growth."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    speed = results["meta_training"]
    rates = [row["inner_steps_per_second"] for row in speed.values()]
    axes[0].barh(list(speed), rates)
    axes[0].set(xlabel="inner steps per second", title="meta-training")
    updates = results["update_microseconds"]
    sizes = [math.prod(map(int, shape.split("x"))) for shape in updates]
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


def main(argv=None) -> int:
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
    args = parser.parse_args(argv)
    if args.particles < 1 or args.truncation < 1:
        raise UserError("--particles and --truncation must be at least 1")
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    data, about = TASKS[args.task].load(args.data, args.data_dir)
    rounds = 2 if args.quick else 8
    shapes = SHAPES[:3] if args.quick else SHAPES + LARGE * args.large

    device = jax.devices()[0]
    print(f"{device.device_kind}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"{args.task}, {args.particles} pairs, K = {args.truncation}")
    build = TASKS[args.task].build
    speed = throughput(build, data, args.particles, args.truncation, rounds)
    memory = peak_memory()
    print(
        f"{'':>14} {'inner steps/s':>14} {'of floor':>9} {'of Adam':>8} {'compile s':>10}"
    )
    for name, row in speed.items():
        print(
            f"{name:>14} {row['inner_steps_per_second']:14.0f} "
            f"{row['of_gradient_only']:9.2f} {row['of_adam']:8.2f} "
            f"{row['compile_seconds']:10.1f}"
        )
    print("peak memory: " + ", ".join(f"{k} {v:.0f}" for k, v in memory.items()))
    print(
        f"\n{'one update, us':>18} {'adam':>9} {'blackbox':>9} {'star':>9} {'ratio':>7}"
    )
    updates = {}
    for shape in shapes:
        few = shape in LARGE
        row = update_times(shape, 2 if few else rounds, 2 if few else 20)
        updates["x".join(map(str, shape))] = row
        cells = " ".join(f"{row[name]:9.1f}" for name in ("adam", "blackbox", "star"))
        print(f"{str(shape):>18} {cells} {row['star'] / row['adam']:7.1f}")
    sizes = [math.prod(shape) for shape in shapes]
    # below 10,000 elements what an update costs is its number of operations, not their size
    big = [i for i, size in enumerate(sizes) if size >= 10_000]
    grown = growth(build, data, rounds // 2, QUICK if args.quick else GROWTH)
    if len(big) > 1:
        star_us = [row["star"] for row in updates.values()]
        slope = log_slope([sizes[i] for i in big], [star_us[i] for i in big])
        grown["parameters"] = dict(
            values=[sizes[i] for i in big],
            seconds=[1e-6 * star_us[i] for i in big],
            slope=slope,
            slope_expected=1,
        )
    print(f"\n{'time grows with':>16} {'to the power':>12} {'expected':>9}")
    for name, row in grown.items():
        print(f"{name:>16} {row['slope']:12.2f} {row['slope_expected']:9d}")
    results = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "arguments": vars(args),
        **about,
        "meta_training": speed,
        "memory": memory,
        "update_microseconds": updates,
        "growth": grown,
    }
    save_json(folder / "bench.json", results)
    plot(folder / "bench.png", results)
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.py", main))
