"""The floor under v of the nominal step: python -m experiments.floor

v = sqrt(mean squared gradient + eps), and the nominal step is Adam's only where gradients
are above the floor. Below, it is momentum of rate beta1 / sqrt(eps), the paper's rate 1.
This trains fresh networks with the nominal term alone, nothing learned, for several eps,
beside tuned Adam.
`--beta1` is the size of the nominal step, the paper's by default.
"""

import json
import pathlib
import sys

import jax
import numpy as np

import eval as evaluation
import star
import store
from baselines import curves
from experiments.catalogue import TASKS
from experiments.search import varied

EPS = (1e-6, 1e-8, 1e-10, 1e-12)
DEFAULT = "fmnist,fmnist_small,ae_fmnist,ae_c10_small,mlp_mnist,mlp_c10_mse"


def of_task(name: str, args) -> dict:
    """Mean over the seeds of the last losses: {eps or "adam": loss, with its std}."""
    data, about = TASKS[name].load(args.data, args.data_dir)
    key, build = jax.random.key(evaluation.EVALUATION_SEED), TASKS[name].build
    keys = jax.random.split(key, args.seeds)
    fixed = {"beta1": np.float32(args.beta1), "beta3": np.float32(0)}
    theta = star.init_theta(jax.random.key(0), star.PAPER) | fixed
    thetas = [theta | {"nominal_eps": np.float32(eps)} for eps in EPS]
    losses = curves(build, data, varied("star"), thetas, keys, args.steps).losses
    _, adam, rate = evaluation.baseline("adam", name, args.steps, build, data, about)
    found = curves(build, data, adam, [rate], keys, args.steps).losses
    names, rows = [*(f"{eps:g}" for eps in EPS), "adam"], [*losses, *found]
    last = {k: evaluation.final(x) for k, x in zip(names, rows, strict=True)}
    spread = {k: round(float(x.std(ddof=1)), 5) for k, x in last.items() if len(x) > 1}
    means = {k: round(float(x.mean()), 5) for k, x in last.items()}
    found = {"last_200": means, "std": spread, "steps": args.steps}
    return about | {"beta1": args.beta1} | found


def parse(argv=None):
    parser = store.Arguments("experiments.floor", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=DEFAULT, help="default %(default)s")
    parser.add_argument("--beta1", type=float, default=1e-3, help="default 1e-3")
    parser.add_argument("--steps", type=int, default=2000, help="default 2000")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_data()
    parser.add_argument("--out", default="runs/floor.json", help="default %(default)s")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args, result = parse(argv), {}
    for name in args.tasks.split(","):
        result[name] = of_task(name, args)
        print(name, json.dumps(result[name]["last_200"]), flush=True)
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.save_json(path, result)
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("experiments.floor", main))
