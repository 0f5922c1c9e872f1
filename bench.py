"""Speed, in ratios measured in one run: python bench.py

Meta-training throughput against the floor (the task's gradient and SGD, no optimizer to
speak of) and Adam; one update against Adam's, by tensor size; compile time; memory.
Prints tables and writes bench.json. All timings are the best of interleaved rounds.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time
from functools import partial

import jax

import estimators
import star
from baselines import BASELINES
from inner import batching, compiler_options, inner_unroll
from store import Arguments, UserError, run_command, write_atomically
from tasks import TASKS

OPTIMIZERS = {
    "gradient only": BASELINES["sgd"],
    "adam": BASELINES["adam"],
    "blackbox": star.PRESETS["blackbox"],
    "star": star.PRESETS["star_small_beta3"],
}
SHAPES = ((128,), (128, 10), (128, 128), (784, 128), (1024, 1024), (3, 3, 64, 64))


def window(optimizer, build, data, pairs: int, length: int):
    """(compiled PES estimate, its arguments, seconds to compile): what a meta-step runs."""
    theta = optimizer.init_theta(jax.random.key(0))

    def make(data):
        problem = inner_unroll(partial(build, data), optimizer, length)
        pair = estimators.pes(problem, windows=40, sigma=1e-4, batch=batching())
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


def throughput(build, data, pairs, length, rounds) -> dict[str, dict]:
    """Inner steps per second of one window of all particles, for each optimizer."""
    runs = {
        name: window(o, build, data, pairs, length) for name, o in OPTIMIZERS.items()
    }
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
    args = parser.parse_args(argv)
    if args.particles < 1 or args.truncation < 1:
        raise UserError("--particles and --truncation must be at least 1")
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    data, about = TASKS[args.task].load(args.data, args.data_dir)
    rounds = 2 if args.quick else 8
    shapes = SHAPES[:3] if args.quick else SHAPES

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
        row = update_times(shape, rounds)
        updates["x".join(map(str, shape))] = row
        cells = " ".join(f"{row[name]:9.1f}" for name in ("adam", "blackbox", "star"))
        print(f"{str(shape):>18} {cells} {row['star'] / row['adam']:7.1f}")
    results = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "arguments": vars(args),
        **about,
        "meta_training": speed,
        "memory": memory,
        "update_microseconds": updates,
    }
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(folder / "bench.json", lambda f: f.write(text.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.py", main))
