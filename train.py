"""Meta-train STAR: python train.py --task fmnist

One meta-step is one jitted function. Read it from the top:

    meta_step            theta -> theta', once for every window of K inner steps
      noise_reuse_es       of N pairs, each one window at theta + xi, one at theta - xi
        tasks.inner_step     K times: loss and gradient of a batch, then
          star.update          for every tensor (star_fast.py, the same numbers sooner):
            accumulate           running means of the gradient
            tensor_features      39 features of each parameter
            network              direction d, log magnitudes m_b and m_g
            step                 phi' = phi - (f_b + f_g), equations 2, 20 to 22
      xi (L+ - L-) / (2 sigma^2), the mean over pairs -> clip -> AdamW -> theta'

A run is a folder: config.json, log.csv, checkpoint.npz, theta.npz with its card
theta.json, curve.png. N pairs (particles), K truncation, T horizon, in inner steps.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import baselines
import devices
import estimators
import star
import star_fast
import store
from devices import compiler_options, each
from store import DATA_SOURCES, UserError, unravel_of
from tasks import TASKS, inner_problem

ESTIMATORS = {
    "pes": estimators.pes,
    "noise_reuse": estimators.noise_reuse_es,
    "truncated_es": estimators.truncated_es,
    "truncated_bptt": lambda *a: estimators.truncated_bptt(*a[:2]),  # no sigma, no pair
    "merged": estimators.merged,
}
COMBINE = {"merged": estimators.inverse_variance_mean}  # the others: the mean


def flag(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


K50 = dict(truncation=50, meta_lr=3e-3, meta_b2=0.999)
PRESETS = {
    "default": {},
    "k50": K50,  # of the thetas in weights/fig3_fmnist
    # Appendix B of the paper; it does not start here (docs/recipes.md).
    "paper": dict(optimizer="star", estimator="pes", sigma=0.01, meta_lr=1e-4)
    | dict(weight_decay=0.5, start_horizon=1.0, schedule="constant", steps=2000)
    | dict(truncation=50, meta_b2=0.999),
    # Better than the default on `fmnist_small`, and no better on `fmnist`.
    "small": dict(horizons="log-uniform", clip_by="norm", sigma=0.01) | K50,
}
HORIZONS = ["doubling", "log-uniform"]  # in the first half, or for each trajectory


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is made of. Fields with a help text are flags of the command line."""

    program: ClassVar[str] = "train.py"
    presets: ClassVar[dict] = PRESETS
    preset: str = flag("default", "recipe that the other flags change")
    task: str = flag("fmnist", "inner problem")
    optimizer: str = flag("star_small_beta3", "meta-trained", choices=[*star.CONSTANTS])
    beta3: float | None = flag(None, "size of the blackbox step; None: the optimizer's")
    estimator: str = flag("noise_reuse", "of the meta-gradient", choices=[*ESTIMATORS])
    steps: int = flag(1200, "meta-steps")
    particles: int = flag(4, "N, antithetic pairs")
    horizon: int = flag(2000, "T, inner steps of a trajectory")
    truncation: int = flag(25, "K, inner steps of a window; divides T")
    sigma: float = flag(0.02, "standard deviation of the perturbations of theta")
    meta_lr: float = flag(2e-3, "peak learning rate of AdamW")
    weight_decay: float = flag(0.1, "AdamW's, a multiplier of its rate (B.2)")
    clip: float = flag(1.0, "limit of the meta-gradient")
    clip_by: str = flag("value", "what the limit is for", choices=["value", "norm"])
    horizons: str = flag("doubling", "T doubles, or is drawn anew", choices=HORIZONS)
    start_horizon: float = flag(0.1, "T at the start, or the shortest, as a share of T")
    seed: int = flag(0, "of everything random")
    data: str = flag("auto", "auto: real, or a stand-in, loudly", choices=DATA_SOURCES)
    data_dir: str | None = flag(None, "folder that holds the data set")
    out: str | None = flag(None, "folder of the run; default runs/TASK-OPTIMIZER-seedN")
    init: str | None = flag(None, "start from this theta.npz and its AdamW")
    fresh_meta: bool = flag(False, "take only theta from --init; count from step 0")
    resume: bool = flag(False, "continue the run in the folder, bit for bit")
    checkpoint_every: int = flag(100, "meta-steps between checkpoints")
    devices: int | None = flag(None, "that share the particles; None: a CPU's cores")
    distributed: bool = flag(False, "one of several processes that share the particles")
    coordinator: str | None = flag(None, "HOST:PORT of process 0, if no cluster tells")
    num_processes: int | None = flag(None, "of the run, if no cluster tells")
    process_id: int | None = flag(None, "of this process; only 0 prints and writes")
    nominal: str | None = None  # term, None: the optimizer's, likewise
    beta1: float | None = None  # size of its step
    beta2: float | None = None  # how strongly m_g scales it
    nominal_eps: float | None = None  # the floor under its v^2
    rms_eps: float | None = None  # and under v^2 in the rest of the update
    schedule: str = "cosine"  # of the meta-learning rate, or "constant"
    meta_b2: float = 0.99  # AdamW's. 0.999 remembers the loud first gradients for long


class Parts(NamedTuple):
    """What a recipe is made into."""

    optimizer: star.LearnedOptimizer
    constants: dict  # of the optimizer, for the card
    load: Callable  # path of a theta.npz -> theta; UserError for another optimizer's
    estimator: Callable  # (data, step, key) -> Estimator of all particles, theta flat
    meta_optimizer: optax.GradientTransformation
    inner_steps: Callable  # meta-steps done -> inner steps of all runs


def parts(recipe: Recipe, build: Callable) -> Parts:
    """build: (data, key) -> Task."""
    own = {name: getattr(recipe, name, None) for name in star.Constants._fields}
    own = {name: value for name, value in own.items() if value is not None}
    constants = star.CONSTANTS[recipe.optimizer]._replace(**own)
    optimizer = star_fast.learned_optimizer(constants)
    mesh = devices.mesh_of(recipe.devices)

    def estimator(data, step, key):
        one, unravel = partial(build, data), unravel_of(optimizer)
        problem = inner_problem(one, optimizer, unravel, recipe.truncation)
        windows = windows_at(recipe, step)
        make = ESTIMATORS[recipe.estimator]
        pair = make(problem, windows, recipe.sigma, each())
        if recipe.horizons == "log-uniform":
            pair = drawn_lengths(pair, windows, shortest_windows(recipe))
        combine = COMBINE.get(recipe.estimator, estimators.mean_of_particles)
        over_devices = devices.split(each(), mesh)
        return estimators.population(pair, recipe.particles, over_devices, combine)

    def inner_steps(step):
        runs = 1 if recipe.estimator == "truncated_bptt" else 2
        return step * runs * recipe.particles * recipe.truncation

    adamw, load = meta_optimizer(recipe), partial(store.theta_for, constants)
    load = partial(load, f"{recipe.optimizer} with {constants}", star.load_theta)
    return Parts(optimizer, constants._asdict(), load, estimator, adamw, inner_steps)


def meta_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clipping, then AdamW: its decay of theta is a multiplier of its rate (B.2)."""
    clip = {"value": optax.clip, "norm": optax.clip_by_global_norm}[recipe.clip_by]
    rate = recipe.meta_lr
    if recipe.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, recipe.steps)
    adamw = optax.adamw(rate, b2=recipe.meta_b2, weight_decay=recipe.weight_decay)
    return optax.chain(clip(recipe.clip), adamw)


def shortest_windows(recipe: Recipe) -> int:
    """Windows in the first trajectories, or in the shortest."""
    most = recipe.horizon // recipe.truncation
    return max(1, round(recipe.start_horizon * most))


def windows_at(recipe: Recipe, step: Any) -> jax.Array:
    """Windows in a trajectory at this meta-step: doubles in equal stages up to T / K."""
    most, start = recipe.horizon // recipe.truncation, shortest_windows(recipe)
    if recipe.horizons == "log-uniform":
        start = most
    stages = int(np.ceil(np.log2(most / start)))
    stage = 2 * stages * jnp.asarray(step) // recipe.steps
    doubled = start * 2.0 ** jnp.minimum(stage, stages)
    return jnp.minimum(doubled, most).astype(jnp.int32)


def drawn_lengths(pair: estimators.Estimator, windows: Any, shortest: int):
    """Trajectories of lengths of their own: n windows with P(n) ~ log((n + 1) / n).

    A trajectory that has just begun leaves out its last windows. The gradient is that of
    the mean loss over the steps of them all, in which early steps weigh more.
    """

    def estimate(key, theta, state):
        g, state, metrics = pair.estimate(key, theta, state)
        u = jax.random.uniform(jax.random.fold_in(key, 3))
        length = (shortest * ((windows + 1) / shortest) ** u).astype(jnp.int32)
        left_out = windows - jnp.clip(length, shortest, windows)
        window = state.window + jnp.where(state.window == 1, left_out, 0)
        return g, state._replace(window=window), metrics

    return estimators.Estimator(pair.init, estimate)


# --- the meta-step
class TrainState(NamedTuple):
    step: jax.Array  # () int32, meta-steps done
    theta: jax.Array  # (size,) flat
    meta: Any  # state of the meta-optimizer
    particles: Any  # state of the estimator


def run_keys(recipe: Recipe) -> jax.Array:
    """(3,) keys: for the first theta, the first particles, and the meta-steps."""
    return jax.random.split(jax.random.key(recipe.seed), 3)


def init_state(recipe: Recipe, made: Parts, data: Any) -> TrainState:
    """The state before the first meta-step, with a theta drawn from the seed."""
    theta_key, particle_key, _ = run_keys(recipe)
    theta, _ = ravel_pytree(made.optimizer.init_theta(theta_key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        theta=theta,
        meta=made.meta_optimizer.init(theta),
        particles=made.estimator(data, 0, particle_key).init(particle_key, theta),
    )


def meta_step(recipe: Recipe, made: Parts, data, key, state: TrainState):
    """(next state, dict of scalar metrics). key: the run's, the same for every step."""
    key, stagger_key, draw_key = jax.random.split(
        jax.random.fold_in(key, state.step), 3
    )
    estimator = made.estimator(data, state.step, draw_key)
    # A longer horizon: stagger the particles anew, or they would stay close together.
    before, now = (windows_at(recipe, state.step + i) for i in (-1, 0))
    particles = jax.lax.cond(
        (now != before) & (state.step > 0),
        lambda: estimator.init(stagger_key, state.theta),
        lambda: state.particles,
    )
    g, particles, metrics = estimator.estimate(key, state.theta, particles)
    updates, meta = made.meta_optimizer.update(g, state.meta, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    metrics |= {"grad_norm": jnp.linalg.norm(g)}
    return TrainState(state.step + 1, theta, meta, particles), metrics


def compile_meta_step(recipe: Recipe, made: Parts, data: Any, state: TrainState):
    """The jitted meta-step (data, key, state) -> (state, metrics), state donated."""
    of_data, of_state = jax.tree.map(lambda x: x.sharding, (data, state))
    jitted = jax.jit(
        lambda *args: meta_step(recipe, made, *args),
        donate_argnums=2,
        in_shardings=(of_data, None, of_state),
        out_shardings=(of_state, None),
        compiler_options=compiler_options(),
    )
    # Traced by shapes alone: arrays bring their mesh along, which `devices.split` refuses.
    args = data, run_keys(recipe)[2], state
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return jitted.lower(*shapes).compile()


# --- the loop
COLUMNS = ("step", "meta_loss", "grad_norm", "grad_noise", "seconds")  # of log.csv


def loop(recipe, made, folder, about, data, state, rows, step_fn) -> TrainState:
    """Meta-steps up to --steps, or to Ctrl-C. rows: of the log; it gains one a step."""
    key, pending = run_keys(recipe)[2], []
    begun = time.perf_counter() - (rows[-1][-1] if rows else 0.0)

    def flush():  # waits for the device
        new = [[float(x) for x in row] for row in pending]
        pending.clear()
        last, now = rows[-1][-1] if rows else 0.0, time.perf_counter() - begun
        rows.extend([*row, now] for row in new)
        if not new:
            return
        step, _, grad_norm, *_ = rows[-1]
        recent = baselines.ema([row[1] for row in rows[-200:]], 0.95)[-1]
        seconds = (now - last) / len(new)
        rate = float(made.inner_steps(step) - made.inner_steps(step - 1)) / seconds
        print(
            f"meta-step {int(step)}/{recipe.steps}  meta-loss {recent:.4f}  "
            f"|g| {grad_norm:.3f}  {rate:.0f} inner steps/s  "
            f"{store.clock((recipe.steps - step) * seconds)} left",
            flush=True,
        )

    def save_all():
        flush()
        whole = devices.fetch(state)
        if jax.process_index() == 0:
            store.write_csv(folder / "log.csv", COLUMNS, rows)
            card = store.make_card(recipe, made, about, rows)
            store.save_run(folder, recipe, made, about, whole, card)

    first = int(state.step)
    if not recipe.resume:
        save_all()  # so that a run killed before its first checkpoint resumes, too
    with devices.interrupts() as interrupted:
        for step in range(first + 1, recipe.steps + 1):
            state, metrics = step_fn(data, key, state)
            names = ("loss", "grad_norm", "grad_noise")
            pending.append([step, *(metrics[name] for name in names)])
            if step % 10 == 0:
                flush()
            stop = interrupted(step)
            if stop or step % recipe.checkpoint_every == 0 or step == recipe.steps:
                save_all()
            if stop:
                break
    return devices.fetch(state)


def start_from(recipe: Recipe, made: Parts, data: Any, state: TrainState) -> TrainState:
    """The state with theta and, unless --fresh-meta, the meta-optimizer of --init."""
    path = recipe.init
    state = state._replace(theta=ravel_pytree(made.load(path))[0])
    arrays = {k.removeprefix("train/"): x for k, x in store.read_npz(path).items()}
    if recipe.fresh_meta or "['step']" not in arrays:
        return state
    go_on = {"step": state.step, "meta": state.meta}
    go_on = store.unflatten(go_on, arrays, path)
    if int(go_on["step"]) >= recipe.steps:
        raise UserError(
            f"{path} has {int(go_on['step'])} meta-steps behind it and --steps is "
            f"{recipe.steps}: give more, or --fresh-meta to start counting anew"
        )
    key = jax.random.fold_in(run_keys(recipe)[1], go_on["step"])
    estimator = made.estimator(data, go_on["step"], key)
    return state._replace(**go_on, particles=estimator.init(key, state.theta))


def finish(recipe, made, build, folder, about, data, state, rows) -> None:
    """Compare on fresh seeds; the last card, the last lines and the figure."""
    first = made.optimizer.init_theta(run_keys(recipe)[0])
    theta = unravel_of(made.optimizer)(jnp.asarray(state.theta))
    thetas = {"fresh": theta, "untrained": first}
    if made.constants.get("nominal", "none") != "none":  # a direction of 0 makes f_b 0
        silent = {name: first[name].at[..., 0].set(0) for name in ("w2", "b2")}
        thetas["nominal"] = first | silent
    fresh = baselines.on_fresh_seeds
    card = store.make_card(recipe, made, about, rows)
    card |= fresh(build, data, made.optimizer, thetas, recipe.horizon)
    store.save_run(folder, recipe, made, about, state, card)
    others = {f"Adam {card['adam_learning_rate']:g}": "adam_loss"}
    others |= {"untrained": "untrained_loss", "nominal term alone": "nominal_loss"}
    found = [f"{name} {card[key]:.4f}" for name, key in others.items() if key in card]
    print(
        f"mean training loss over {recipe.horizon} inner steps, 3 fresh seeds: "
        f"theta {card['fresh_loss']:.4f} +- {card['fresh_loss_std']:.4f}, "
        f"{', '.join(found)}"
    )
    print(f"theta in {folder / 'theta.npz'}, curve in {folder / 'curve.png'}")
    rows = np.array(rows)[:, :2]
    store.draw_figure(folder / "curve.png", baselines.draw_meta_training, rows, card)


# --- the command line
def parse(argv=None, kind=Recipe, known=TASKS) -> Recipe:
    """The recipe of a command line, checked; UserError for one that cannot work.

    With --resume, what the command line leaves out is that of the run in the folder.
    """
    given = store.given_flags(argv, kind, __doc__)
    for name, names in ("preset", kind.presets), ("task", known):
        if given.get(name, getattr(kind, name)) not in names:
            value = given.get(name, getattr(kind, name))
            raise UserError(f"--{name} {value!r} is none of {', '.join(names)}")
    recipe = kind(**kind.presets[given.get("preset", "default")] | given)
    if recipe.resume and recipe.init:
        raise UserError("--init begins anew, --resume goes on from its checkpoint")
    if recipe.resume:
        saved, _ = store.read_checkpoint(folder_of(recipe))
        fields = {field.name for field in dataclasses.fields(kind)} - {
            *store.NOT_RECIPE
        }
        recipe = kind(**{k: saved[k] for k in fields & saved.keys()} | given)
    check(recipe)
    return recipe


def folder_of(recipe: Recipe) -> pathlib.Path:
    name = f"{recipe.task}-{recipe.optimizer}-seed{recipe.seed}"
    return pathlib.Path(recipe.out or f"runs/{name}")


def check(recipe: Recipe) -> None:
    """UserError for a setting that cannot work."""
    counts = "steps particles horizon truncation checkpoint_every devices".split()
    ranges = dict.fromkeys(counts, (1, 2**31 - 1))
    above_0 = "meta_lr clip sigma nominal_eps rms_eps".split()
    ranges |= dict.fromkeys(above_0, (1e-38, 1e38))
    ranges |= dict.fromkeys(("beta1", "beta3"), (-1e38, 1e38))
    ranges |= dict(weight_decay=(0, 1e38), start_horizon=(1e-6, 1), seed=(0, 2**32 - 1))
    for name, (low, high) in ranges.items():
        value = getattr(recipe, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be in {low} .. {high}")
    if recipe.horizon % recipe.truncation:
        long = f"--horizon {recipe.horizon}"
        raise UserError(f"--truncation {recipe.truncation} does not divide {long}")
    if recipe.estimator == "merged" and recipe.particles < 4:
        raise UserError("--estimator merged needs 4 --particles or more for variances")
    peers = (recipe.coordinator, recipe.num_processes, recipe.process_id)
    if peers != (None,) * 3 and (None in peers or not recipe.distributed):
        names = "--coordinator, --num-processes and --process-id"
        raise UserError(f"{names} go together, and with --distributed")


def main(argv=None, recipe=Recipe, tasks=TASKS, parts=parts) -> int:
    """Exit code. recipe: its class. Scripts that train otherwise hand in their own."""
    recipe = parse(argv, recipe, tasks)
    devices.use_every_core()
    if recipe.distributed:
        devices.join(recipe.coordinator, recipe.num_processes, recipe.process_id)
    if recipe.devices is None:
        free = devices.free_devices(recipe.particles)
        recipe = dataclasses.replace(recipe, devices=free)
    mesh, writes = devices.mesh_of(recipe.devices), jax.process_index() == 0
    if mesh and recipe.particles % mesh.size:
        several = f"--particles {recipe.particles}"
        raise UserError(f"{several} cannot be shared by {mesh.size} devices")
    folder, spec = folder_of(recipe), tasks[recipe.task]
    if not recipe.resume and (folder / "checkpoint.npz").exists():
        raise UserError(f"{folder} holds a run: --resume it, or choose another --out")
    made = parts(recipe, spec.build)
    if recipe.init:
        made.load(recipe.init)  # a bad file is refused before data is looked for
    data, about = spec.load(recipe.data, recipe.data_dir)
    if about["stand_in"]:
        print("STAND-IN DATA: results say nothing about the real task", flush=True)
    state, rows = init_state(recipe, made, data), []
    if recipe.init:
        state = start_from(recipe, made, data, state)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    with store.only_run_in(folder) if writes else contextlib.nullcontext():
        if recipe.resume:
            recipe, state = store.load_checkpoint(folder, recipe, about, state)
            rows = store.read_csv(folder / "log.csv", int(state.step))
        settings = dataclasses.asdict(recipe) | about
        print(json.dumps(settings, indent=1))
        if writes:
            store.save_json(folder / "config.json", settings)
        begin = time.perf_counter()
        split = devices.place(state.particles, mesh, devices.SPLIT)
        state = devices.place(state._replace(particles=()), mesh)
        state, placed = state._replace(particles=split), devices.place(data, mesh)
        step_fn = compile_meta_step(recipe, made, placed, state)
        seconds = time.perf_counter() - begin
        print(f"compiled in {seconds:.1f} s; writing {folder}", flush=True)
        state = loop(recipe, made, folder, about, placed, state, rows, step_fn)
        devices.leave()
        if int(state.step) < recipe.steps:
            print(f"interrupted; go on with --resume (saved at {int(state.step)})")
            return 130
        if writes:
            finish(recipe, made, spec.build, folder, about, data, state, rows)
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("train.py", main))
