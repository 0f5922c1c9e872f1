"""Many recipes of meta-training at once: python -m experiments.search CANDIDATES.jsonl

train.py trains one theta. Here one program meta-trains every candidate on several seeds.
Then all thetas train fresh networks. On a GPU a hundred runs take a few times as long as
one. A candidate is a line of JSON with settings of train.Recipe:

    {"estimator": "noise_reuse", "sigma": 0.02, "beta3": 3e-06}

Candidates that differ in TRACED numbers alone share a program. `last_layer` multiplies the
last layer of the first theta. Results go to a folder: results.json, and a file of thetas
for each program. CANDIDATES may be such a results.json, whose candidates then run again.
"""

import dataclasses
import json
import pathlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import star
import star_fast
import store
import train
from baselines import curves
from estimators import clip_loss
from experiments.catalogue import TASKS

CONSTANTS = ("beta1", "beta2", "beta3", "nominal_eps", "rms_eps")
TRACED = (*CONSTANTS, "sigma", "meta_lr", "weight_decay", "clip", "last_layer")
CHUNK = 10  # meta-steps of one call


def groups_of(candidates: list[dict]) -> dict:
    """{what a program fixes, as JSON: candidates that it can train at once}."""
    groups = {}
    for candidate in candidates:
        if "nominal" in candidate:  # fresh networks would be trained with another
            raise store.UserError("a candidate has its optimizer's nominal term")
        fixed = {k: v for k, v in candidate.items() if k not in TRACED}
        groups.setdefault(json.dumps(fixed, sort_keys=True), []).append(candidate)
    return groups


def numbers_of(group: list[dict], seeds: int) -> dict:
    """{name: (runs,)} of seeds and TRACED numbers, for every candidate on every seed."""
    recipe = train.Recipe(**{k: v for k, v in group[0].items() if k not in TRACED})
    usual = dataclasses.asdict(recipe) | {"last_layer": 1.0}
    usual |= star.CONSTANTS[recipe.optimizer]._asdict()
    rows = [usual | c | {"seed": seed} for c in group for seed in range(seeds)]
    return {k: jnp.array([row[k] for row in rows]) for k in (*TRACED, "seed")}


def recipe_of(fixed: dict, numbers: dict) -> train.Recipe:
    rest = {k: x for k, x in numbers.items() if k != "last_layer"}
    return train.Recipe(**fixed | rest)


def start(fixed, build, data, numbers):
    """The state before the first meta-step of one run."""
    recipe = recipe_of(fixed, numbers)
    made = train.parts(recipe, build)
    theta = made.optimizer.init_theta(train.run_keys(recipe)[0])
    last = {k: theta[k] * numbers["last_layer"] for k in ("w2", "b2")}
    state = train.init_state(recipe, made, data)
    return state._replace(theta=ravel_pytree(theta | last)[0])


def advance(fixed, build, data, numbers, state):
    """(state, meta-losses) after CHUNK meta-steps of one run."""
    recipe = recipe_of(fixed, numbers)
    made, key = train.parts(recipe, build), train.run_keys(recipe)[2]

    def one(state, _):
        state, metrics = train.meta_step(recipe, made, data, key, state)
        return state, metrics["loss"]

    return jax.lax.scan(one, state, length=CHUNK)


def lower(fixed: dict, build, data, numbers):
    """(states of all runs, their one lowered `advance`)."""
    states = jax.jit(jax.vmap(partial(start, fixed, build), (None, 0)))(data, numbers)
    every = jax.vmap(partial(advance, fixed, build), (None, 0, 0))
    return states, jax.jit(every, donate_argnums=2).lower(data, numbers, states)


def meta_train(steps: int, compiled, data, numbers, state) -> jax.Array:
    """The thetas, (runs, size), flat."""
    begin = time.perf_counter()
    for done in range(CHUNK, steps + 1, CHUNK):
        state, losses = compiled(data, numbers, state)
        if done % 100 == 0:
            median = np.median(losses)  # waits for the device
            rate = done / (time.perf_counter() - begin)
            line = f"{done}/{steps}  {len(losses)} runs, {rate:.2f} meta-steps/s of "
            print(f"{line}each, median meta-loss {median:.3f}", flush=True)
    return state.theta


def varied(name: str) -> star.LearnedOptimizer:
    """That preset, with constants in theta where they differ. They may be traced, so one
    program trains with thetas whose constants differ."""
    preset, constants = star.PRESETS[name], star.CONSTANTS[name]

    def update(theta, *args):
        own = {k: theta[k] for k in theta.keys() & {*star.Constants._fields}}
        optimizer = star_fast.learned_optimizer(constants._replace(**own))
        return optimizer.update({k: theta[k] for k in theta.keys() - own}, *args)

    return preset._replace(update=update)


def evaluate(optimizer, thetas: list, data, build, steps: int, seeds: int):
    """Losses on fresh networks, clipped as the meta-loss is: (thetas, seeds, steps)."""
    keys = jax.random.split(jax.random.key(10_000), seeds)
    found = curves(build, data, varied(optimizer), thetas, keys, steps).losses
    return np.asarray(clip_loss(found, build(data, keys[0]).loss_limit))


def parse(argv=None):
    parser = store.Arguments("experiments.search", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("candidates", help="file with one JSON object a line, or a results.json")
    add("--task", default="fmnist_small", choices=tuple(TASKS), metavar="NAME")
    add("--seeds", type=int, default=3, help="meta-seeds of each candidate")
    add("--fresh", type=int, default=3, help="fresh networks that each theta trains")
    add("--seconds", type=float, default=np.inf, help="begin no program after these")
    parser.add_data()
    add("--out", default="runs/search", help="folder of the results")
    return parser.parse_args(argv)


def read_candidates(text: str) -> list[dict]:
    """Of a file with one a line, or of a results.json, whose "base" all of them share."""
    if '"rows"' in text:
        found = json.loads(text)
        return [found.get("base", {}) | row["candidate"] for row in found["rows"]]
    return [*map(json.loads, text.splitlines())]


def main(argv=None) -> int:
    args, begun = parse(argv), time.perf_counter()
    candidates = read_candidates(pathlib.Path(args.candidates).read_text())
    groups = groups_of([candidate | {"task": args.task} for candidate in candidates])
    spec, folder = TASKS[args.task], pathlib.Path(args.out)
    data, about = spec.load(args.data, args.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {key: numbers_of(group, args.seeds) for key, group in groups.items()}
    lowered = {k: lower(json.loads(k), spec.build, data, numbers[k]) for k in groups}
    with ThreadPoolExecutor() as pool:  # XLA compiles several programs at once
        compiled = pool.map(lambda made: made[1].compile(), lowered.values())
        compiled = dict(zip(lowered, compiled, strict=True))
    print(f"{len(groups)} programs in {time.perf_counter() - begun:.0f} s", flush=True)
    rows = []
    for i, (key, group) in enumerate(groups.items()):
        if time.perf_counter() - begun > args.seconds:
            print(f"no time left for {key}")
            continue
        recipe, n = train.Recipe(**json.loads(key)), numbers[key]
        state = lowered.pop(key)[0]
        flat = meta_train(recipe.steps, compiled[key], data, n, state)
        unravel = store.unravel_of(star.PRESETS[recipe.optimizer])
        own = [{k: n[k][i] for k in CONSTANTS} for i in range(len(flat))]
        thetas = [unravel(x) | c for x, c in zip(flat, own, strict=True)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *thetas)
        np.savez(folder / f"thetas-{i}.npz", **stacked)
        setting = thetas, data, spec.build, recipe.horizon, args.fresh
        losses = evaluate(recipe.optimizer, *setting)
        losses = losses.reshape(len(group), args.seeds, args.fresh, -1)
        rows += [
            {"candidate": c, "loss": [round(float(y.mean()), 4) for y in x]}
            | {"last_200": [round(float(y[:, -200:].mean()), 4) for y in x]}
            for c, x in zip(group, losses, strict=True)
        ]
    if not rows:
        raise store.UserError("--seconds left no time for any program")
    rows.sort(key=lambda row: np.mean(row["loss"]))
    device = jax.devices()[0].device_kind
    store.save_json(folder / "results.json", about | {"device": device, "rows": rows})
    for row in rows:
        mean, text = np.mean(row["loss"]), json.dumps(row["candidate"])
        print(f"{mean:.4f}  {row['loss']}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("experiments.search", main))
