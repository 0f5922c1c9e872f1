"""Meta-train a learned optimizer: python train.py --task fmnist

The whole meta-step, antithetic unrolls to AdamW, is one jitted function with donated
buffers, compiled once. A run is a folder: config.json, log.csv, checkpoint.npz,
theta.npz with its card theta.json, curve.png.
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import pathlib
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import devices
import estimators
import star
from baselines import BASELINES, rates, with_beta3
from companions import lopts
from estimators import clip_loss
from inner import batching, compiler_options, curves, ema, inner_unroll
from settings import (
    ESTIMATORS,
    NOT_RECIPE,
    Config,
    betas,
    command_line,
    parse,
)
from store import (
    UserError,
    clock,
    errors_name,
    flatten,
    load_theta,
    minutes_spent,
    only_run_in,
    read_card,
    read_npz,
    run_command,
    save_figure,
    save_json,
    unflatten,
    write_atomically,
)
from tasks import TASKS


class TrainState(NamedTuple):
    step: jax.Array  # () int32, meta-steps done
    theta: dict[str, jax.Array]
    meta: Any  # state of the meta-optimizer
    particles: Any  # state of the estimator


def optimizer_of(config: Config) -> tuple[Any, star.Constants | None]:
    """(what is meta-trained, its constants with those of --beta1 .. in them; None if not
    a STAR)."""
    if config.optimizer in lopts.LEARNED:
        return lopts.LEARNED[config.optimizer], None
    constants = star.CONSTANTS[config.optimizer]._replace(**betas(config))
    return star.learned_optimizer(constants), constants


def meta_optimizer(config: Config) -> optax.GradientTransformation:
    """The slope of the l2 penalty, clipping, AdamW: its weight decay is a multiplier of
    its rate (B.2)."""
    clip = {"value": optax.clip, "norm": optax.clip_by_global_norm}[config.clip_by]
    peak, warmup = config.meta_lr, config.warmup
    rate = {
        "cosine": lambda: optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, config.steps
        ),
        "constant": lambda: optax.warmup_constant_schedule(
            0.0 if warmup else peak, peak, warmup
        ),
        "staircase": lambda: optax.exponential_decay(peak, 500, 0.8, staircase=True),
    }[config.schedule]()
    adamw = optax.adamw(rate, b1=config.meta_beta1, weight_decay=config.weight_decay)
    penalty = [optax.add_decayed_weights(2 * config.l2)] if config.l2 else []
    return optax.chain(*penalty, clip(config.clip), adamw)


def shortest_windows(config: Config) -> int:
    """Windows in the first trajectories, or in the shortest."""
    return max(1, round(config.start_horizon * (config.horizon // config.truncation)))


def windows_at(config: Config, step: Any) -> jax.Array:
    """Windows in a trajectory at this meta-step: doubles in equal stages up to T / K."""
    full, start = config.horizon // config.truncation, shortest_windows(config)
    if config.horizons == "log-uniform":
        return jnp.full_like(step, full, jnp.int32)
    stages = math.ceil(math.log2(full / start))
    stage = jnp.floor(step * stages / max(1.0, config.curriculum * config.steps))
    return jnp.minimum(start * 2 ** jnp.minimum(stage, stages), full).astype(jnp.int32)


def unroll_at(config: Config, step: Any) -> jax.Array:
    """Windows of a meta-gradient at this meta-step, before jitter and rounding; float."""
    most = (config.unroll or config.truncation) / config.truncation
    start = (config.start_unroll or config.truncation) / config.truncation
    share = jnp.minimum(1, step / max(1.0, config.curriculum * config.steps))
    return {
        "linear": start + (most - start) * share,
        "log": start * (most / start) ** share,
        "constant": most + 0 * share,
    }[config.unroll_growth]


def unroll_drawn(
    config: Config, step: Any, key: jax.Array | None, most: int
) -> jax.Array:
    """`unroll_at` with the jitter that the key draws (none without one): () int32."""
    jitter = 0.0
    if key is not None:
        jitter = config.jitter * jax.random.uniform(key, (), minval=-1.0)
    windows = jnp.round(unroll_at(config, step) * (1 + jitter))
    return jnp.clip(windows, 1, most).astype(jnp.int32)


def build_pair(
    config: Config, data: Any, step: Any, key: jax.Array | None
) -> estimators.Estimator:
    """Task x optimizer -> unroll -> one pair; the arguments as of `build_estimator`."""
    build = partial(TASKS[config.task].build, data)
    optimizer, _ = optimizer_of(config)
    problem = inner_unroll(build, optimizer, config.truncation, config.objective)
    if config.unroll is not None:
        most = math.ceil(config.unroll / config.truncation * (1 + config.jitter))
        windows = unroll_drawn(config, step, key, most)
        problem = estimators.several(problem, windows, most)
    batch = jax.vmap if config.side_by_side else batching()
    windows, shortest = windows_at(config, step), None
    if config.horizons == "log-uniform":
        shortest = shortest_windows(config)
    estimator = ESTIMATORS[config.estimator]
    return estimator(problem, windows, config.sigma, batch, shortest)


def build_estimator(
    config: Config, data: Any, step: Any = 0, key: jax.Array | None = None
) -> estimators.Estimator:
    """One pair -> N pairs, shared by the devices; data, step, key may be traced.

    key: for the jitter of the unroll's length; only `estimate` needs it.
    """
    build, inputs = partial(build_pair, config), (data, step, key)
    batch = jax.vmap if config.side_by_side else batching()
    combine = {
        "merged": estimators.inverse_variance_mean,
        "truncated_bptt": estimators.mean_of_finite_particles,
    }.get(config.estimator, estimators.mean_of_particles)
    mesh = devices.mesh_of(config.devices)
    return devices.population(build, inputs, config.particles, batch, combine, mesh)


def run_keys(config: Config) -> jax.Array:
    """(3,) keys: for the first theta, the first particles, and the meta-steps."""
    return jax.random.split(jax.random.key(config.seed), 3)


def init_state(config: Config, data: Any) -> TrainState:
    """The state before the first meta-step, with a theta drawn from the seed."""
    theta_key, particle_key, _ = run_keys(config)
    theta = optimizer_of(config)[0].init_theta(theta_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        theta=theta,
        meta=meta_optimizer(config).init(theta),
        particles=build_estimator(config, data).init(particle_key, theta),
    )


def meta_step(
    config: Config, data: Any, key: jax.Array, state: TrainState
) -> tuple[TrainState, dict]:
    """One step of meta-training. key: the run's, for all meta-steps; the step's own is
    folded in from it. Returns the next state and a dict of scalar metrics."""
    step_key = jax.random.fold_in(key, state.step)
    key, stagger_key, unroll_key = jax.random.split(step_key, 3)
    estimator = build_estimator(config, data, state.step, unroll_key)
    # A longer horizon: stagger the particles anew, or they would stay close together.
    longer = windows_at(config, state.step) != windows_at(config, state.step - 1)
    particles = jax.lax.cond(
        longer & (state.step > 0),
        lambda: estimator.init(stagger_key, state.theta),
        lambda: state.particles,
    )
    grad, particles, metrics = estimator.estimate(key, state.theta, particles)
    # A nan (of a sigma whose square underflows, say) would stay in AdamW's means for good:
    # what is not finite counts as 0. The metrics show it as it is.
    finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grad)
    updates, meta = meta_optimizer(config).update(finite, state.meta, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    new = TrainState(step=state.step + 1, theta=theta, meta=meta, particles=particles)
    return new, metrics | {"grad_norm": optax.tree.norm(grad)}


def compile_meta_step(config: Config, data: Any, state: TrainState) -> Callable:
    """The jitted meta-step (data, key, state) -> (state, metrics), state donated."""

    def step(data, key, state):
        return meta_step(config, data, key, state)

    jitted = jax.jit(
        step,
        donate_argnums=2,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
        compiler_options=compiler_options(),
    )
    return jitted.lower(data, jax.random.key(config.seed), state).compile()


# The files of a run.


def save_checkpoint(
    folder: pathlib.Path, config: Config, about: dict, state: TrainState
) -> None:
    """checkpoint.npz: the whole state, the recipe and the checksum of the data."""
    made_with = dataclasses.asdict(config) | {"checksum": about["dataset_checksum"]}
    arrays = flatten(state) | {"made_with": np.array(json.dumps(made_with))}
    write_atomically(folder / "checkpoint.npz", lambda f: np.savez(f, **arrays))


def load_checkpoint(
    folder: pathlib.Path, config: Config, about: dict, template: TrainState
) -> tuple[Config, TrainState]:
    """(config, state): the config gains where the run came from (--init).

    UserError where the file is no checkpoint of this recipe; names what differs.
    """
    path = folder / "checkpoint.npz"
    arrays = read_npz(path)
    try:
        saved = dict(json.loads(str(arrays.pop("made_with"))))
        origin = {name: saved[name] for name in ("init", "fresh_meta")}
        checksum = saved["checksum"]
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is not a checkpoint of train.py") from None
    if checksum != about["dataset_checksum"]:
        raise UserError(f"{path} was made on other data than {about['dataset']}")
    for name, value in dataclasses.asdict(config).items():
        if name in (*NOT_RECIPE, *origin):
            continue
        flag = "--" + name.replace("_", "-")
        if name not in saved:
            raise UserError(f"{path} is of an older version, without {flag}")
        if saved[name] != value:
            raise UserError(
                f"{path} was made with {flag} {saved[name]}, not {value}; "
                "resume with the same recipe"
            )
    config = dataclasses.replace(config, **origin)
    return config, unflatten(template, arrays, str(path))


def save_theta(folder: pathlib.Path, card: dict, state: TrainState) -> None:
    """theta.npz: theta, its card, and what `--init` needs to go on elsewhere (few KB)."""
    go_on = {"step": state.step, "meta": state.meta}
    arrays = {f"train/{name}": x for name, x in flatten(go_on).items()}

    def write(file):
        star.save_theta(file, state.theta, card, **arrays)

    write_atomically(folder / "theta.npz", write)
    save_json(folder / "theta.json", card)


def start_from(config: Config, data: Any, state: TrainState) -> TrainState:
    """The state with theta and, unless --fresh-meta, the meta-optimizer of --init."""
    path = config.init
    theta, _, theirs = load_theta(path)
    ours = optimizer_of(config)[1]
    if theirs is None or ours is None:
        name = read_card(path)["optimizer"] if theirs is None else "STAR"
        if (theirs, name) != (ours, config.optimizer):
            raise UserError(f"{path} is for {name}, this run for {config.optimizer}")
    else:
        for name, value in theirs._asdict().items():
            if value != getattr(ours, name):
                raise UserError(
                    f"{path} is for {name} = {value}, this run has {getattr(ours, name)}"
                )
    state = state._replace(theta=theta)
    arrays = {
        name.removeprefix("train/"): x
        for name, x in read_npz(path).items()
        if name.startswith("train/")
    }
    if config.fresh_meta or not arrays:
        return state
    go_on = {"step": state.step, "meta": state.meta}
    go_on = unflatten(go_on, arrays, str(path))
    step = go_on["step"]
    if int(step) >= config.steps:
        raise UserError(
            f"{path} has {int(step)} meta-steps behind it and --steps is "
            f"{config.steps}: give more, or --fresh-meta to start counting anew"
        )
    key = jax.random.fold_in(run_keys(config)[1], step)
    particles = build_estimator(config, data, step).init(key, theta)
    return state._replace(**go_on, particles=particles)


def check_finite(state: TrainState) -> None:
    """UserError where theta or AdamW's means have overflowed; better not saved."""
    leaves = jax.tree.leaves((state.theta, state.meta))
    if not all(np.isfinite(x).all() for x in leaves):
        raise UserError(
            f"theta or its AdamW overflowed before meta-step {int(state.step)}; the "
            "checkpoint is of earlier: begin anew with a lower --meta-lr or --clip"
        )


class Log:
    """log.csv, a row a meta-step, and what the progress line says of it.

    path: the file, begun anew; None: no file. keep: of the rows in it, those of the first
    `keep` steps stay. seconds: spent before the first row.
    """

    fields = ("step", "meta_loss", "grad_norm", "grad_noise", "seconds")

    def __init__(
        self, path: pathlib.Path | None, keep: int = 0, seconds: float = 0.0
    ) -> None:
        self.path, self.rows = path, []
        if keep and path and path.exists():
            self.rows = list(self.whole_rows(path.read_text(), keep))
        if path:
            write_atomically(path, lambda f: f.write(self.text(self.rows, header=True)))
        self.seconds = self.rows[-1][-1] if self.rows else seconds
        self.last = time.perf_counter()

    def whole_rows(self, text: str, keep: int) -> Iterator[list[float]]:
        """Rows up to `keep`, ending before one that a dying disk or machine cut short."""
        step = None
        for row in csv.reader(text.splitlines(keepends=True)[1:]):
            try:
                row = [float(x) for x in row]
            except ValueError:
                return
            complete = len(row) == len(self.fields) and step in (None, row[0] - 1)
            if not complete or row[0] > keep:
                return
            step = row[0]
            yield row

    def text(self, rows: list[list[float]], header: bool = False) -> bytes:
        lines = [",".join(self.fields)] if header else []
        lines += [
            f"{int(row[0])}," + ",".join(f"{x:.6g}" for x in row[1:]) for row in rows
        ]
        return "".join(line + "\n" for line in lines).encode()

    def add(self, metrics: list) -> float:
        """Append (step, loss, grad_norm, grad_noise) rows; seconds each of them took.

        Waits for the device, so the time since the last call is theirs.
        """
        rows = [[float(x) for x in row] for row in metrics]
        now = time.perf_counter()
        each, self.last = (now - self.last) / len(rows), now
        for row in rows:
            self.seconds += each
            row.append(self.seconds)
        self.rows += rows
        if self.path:
            with errors_name(self.path), open(self.path, "ab") as file:
                file.write(self.text(rows))
        return each

    def smoothed(self) -> float:
        """EMA 0.95 of the meta-loss; what is 200 steps old no longer counts."""
        return ema([row[1] for row in self.rows[-200:]], 0.95)[-1]

    def recent(self) -> float | None:
        """Mean meta-loss of the last 100 meta-steps; None before the first."""
        recent = [row[1] for row in self.rows[-100:]]
        return round(float(np.mean(recent)), 4) if recent else None


def inner_steps_at(config: Config, step: Any) -> np.ndarray:
    """Inner steps of this meta-step, of every run of a pair; no jitter; float."""
    runs = config.particles * (2 if config.sigma else 1)
    return np.asarray(unroll_at(config, step)) * config.truncation * runs


def inner_steps(config: Config, step: int) -> int:
    """Inner steps of the first `step` meta-steps."""
    return int(round(float(inner_steps_at(config, np.arange(step)).sum())))


def make_card(config: Config, about: dict, step: int, log: Log) -> dict:
    """What theta is and how it was made; all of it can be written as JSON."""
    _, constants = optimizer_of(config)
    device = jax.devices()[0]
    return {
        "optimizer": config.optimizer,
        "constants": constants._asdict() if constants else {},
        "task": config.task,
        **about,
        "meta_steps": step,
        "inner_steps": inner_steps(config, step),
        "minutes": round(log.seconds / 60, 1),
        "meta_loss": log.recent(),
        "meta_loss_is": "mean over the last 100 meta-steps, at the perturbed thetas, nats"
        + ", over T of all drawn lengths" * (config.horizons == "log-uniform"),
        "seed": config.seed,
        "command": command_line(config),
        "machine": f"{device.platform} ({device.device_kind}, {os.cpu_count()} cores)",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "recipe": dataclasses.asdict(config),
    }


def plot(
    folder: pathlib.Path, config: Config, log: Log, fresh: dict, about: dict
) -> None:
    """curve.png: the meta-loss over meta-steps, with lines for scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row[0] for row in log.rows]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    losses = [row[1] for row in log.rows]
    axes.plot(steps, losses, color="C0", alpha=0.25, lw=0.7)
    axes.plot(steps, ema(losses, 0.95), color="C0", label="meta-loss (EMA 0.95)")
    horizons = np.asarray(windows_at(config, np.asarray(steps))) * config.truncation
    for before, after, step in zip(horizons, horizons[1:], steps, strict=False):
        if after != before:
            axes.axvline(step, color="k", ls=":", lw=0.7)
            axes.annotate(f" T {after}", (step, 1), xycoords=("data", "axes fraction"),
                          va="top", fontsize=7)  # fmt: skip
    lines = {
        "untrained": fresh["untrained_loss"],
        f"Adam {fresh['adam_learning_rate']:g}": fresh["adam_loss"],
        "theta on fresh seeds": fresh["fresh_loss"],
    }
    if "nominal_loss" in fresh:
        lines["nominal term alone"] = fresh["nominal_loss"]
    for i, (name, value) in enumerate(lines.items()):
        # drawn lengths see early, higher losses more often than these
        name += ", longest T" * (config.horizons == "log-uniform")
        axes.axhline(
            value, color=f"C{i + 1}", ls="--", lw=1, label=f"{name}: {value:.3f}"
        )
    which = {"train": "training", "fresh": "training", "valid": "validation"}
    axes.set(
        xlabel="meta-steps",
        ylabel=f"mean {which[config.objective]} loss of the unrolls (nats)",
        title=f"{config.optimizer}, {config.estimator}, {config.task}\n{about['dataset']}",
    )
    low, high = np.percentile([*losses, *lines.values()], [0, 97])
    axes.set_ylim(0.97 * low, 1.05 * high)
    axes.legend()
    save_figure(folder / "curve.png", figure, dpi=150)
    plt.close(figure)


def fresh_runs(config: Config, data: Any, state: TrainState) -> dict:
    """Mean training loss over the horizon on three fresh seeds, unperturbed: of theta, of
    an untrained one, of its nominal term alone where it has one (beta3 = 0), and of Adam
    at the best of three half orders of magnitude.

    Losses are clipped as the meta-loss is. Returns what the card gains.
    """
    build, keys = TASKS[config.task].build, jax.random.split(jax.random.key(10_000), 3)
    optimizer, constants = optimizer_of(config)
    limit = build(data, keys[0]).loss_limit
    untrained = init_state(config, data).theta
    learning_rates = (1e-3, 3e-3, 1e-2)

    def losses(optimizer, thetas):  # (thetas, seeds)
        result = curves(build, data, optimizer, thetas, keys, config.horizon)
        return np.asarray(clip_loss(result.losses, limit)).mean(2)

    if constants is None or constants.beta3 == 0:
        ours, start = losses(optimizer, [state.theta, untrained])
        nominal = start  # of beta3 = 0, the same run
    else:
        beta3 = np.float32(constants.beta3)
        ours, start, nominal = losses(
            with_beta3(constants),
            [
                {"theta": state.theta, "beta3": beta3},
                {"theta": untrained, "beta3": beta3},
                {"theta": untrained, "beta3": np.float32(0)},
            ],
        )
    adam = losses(BASELINES["adam"], rates(learning_rates)).mean(1)
    fresh = {
        "fresh_loss": round(float(ours.mean()), 4),
        "fresh_loss_std": round(float(ours.std(ddof=1)), 4),
        "untrained_loss": round(float(start.mean()), 4),
        "adam_loss": round(float(adam.min()), 4),
        "adam_learning_rate": learning_rates[int(adam.argmin())],
    }
    if constants is not None and constants.nominal != "none":
        fresh["nominal_loss"] = round(float(nominal.mean()), 4)
    return fresh


# The command line.


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv, __doc__)
    if config.distributed:
        devices.join(
            config.coordinator,
            config.num_processes,
            config.process_id,
            config.peer_timeout,
        )
    mesh, writes = devices.mesh_of(config.devices), jax.process_index() == 0
    if mesh and config.particles % mesh.size:
        raise UserError(
            f"--particles {config.particles} cannot be shared by {mesh.size} devices"
        )
    name = f"{config.task}-{config.optimizer}-seed{config.seed}"
    folder = pathlib.Path(config.out or f"runs/{name}")
    if not config.resume and (folder / "checkpoint.npz").exists():
        raise UserError(
            f"{folder} holds a run already: --resume it, or choose another --out"
        )
    if config.init:
        load_theta(config.init)  # a bad file is refused before data is looked for
    data, about = TASKS[config.task].load(config.data, config.data_dir)
    if about["stand_in"]:
        print("STAND-IN DATA: results say nothing about the real task", flush=True)

    state, seconds = init_state(config, data), 0.0
    if config.init:
        state = start_from(config, data, state)
        if int(state.step):
            seconds = 60 * minutes_spent(config.init)
    if writes and not config.resume:
        folder.mkdir(parents=True, exist_ok=True)
    with only_run_in(folder) if writes else contextlib.nullcontext():
        if config.resume:
            config, state = load_checkpoint(folder, config, about, state)
        return run(config, folder, about, data, state, seconds)


def run(
    config: Config,
    folder: pathlib.Path,
    about: dict,
    data: Any,
    state: TrainState,
    seconds: float,
) -> int:
    """Meta-training from this state on, `seconds` of which are spent: the exit code."""
    mesh, writes = devices.mesh_of(config.devices), jax.process_index() == 0
    text = json.dumps({**dataclasses.asdict(config), **about}, indent=1) + "\n"
    if writes:
        write_atomically(folder / "config.json", lambda f: f.write(text.encode()))
    keep = int(state.step) if config.resume else 0
    log = Log(folder / "log.csv" if writes else None, keep, seconds)
    print(text, end="")
    begin = time.perf_counter()
    split = devices.place(state.particles, mesh, devices.SPLIT)
    state = devices.place(state._replace(particles=()), mesh)._replace(particles=split)
    placed = devices.place(data, mesh)
    step_fn = compile_meta_step(config, placed, state)
    seconds = time.perf_counter() - begin
    print(f"compiled in {seconds:.1f} s; writing {folder}", flush=True)
    lost = "the run has lost a process; go on from its checkpoint with --resume"
    with devices.one_line_if_lost(f"train.py: {folder}: {lost}"):
        state, finished = loop(config, folder, about, placed, state, log, step_fn)
        devices.leave()
    if not writes:
        return 0 if finished else 130
    if not finished:
        print(f"interrupted; go on with --resume (saved at {int(state.step)})")
        return 130
    return finish(config, folder, about, data, state, log)


def loop(
    config: Config,
    folder: pathlib.Path,
    about: dict,
    data: Any,
    state: TrainState,
    log: Log,
    step_fn: Callable,
) -> tuple[TrainState, bool]:
    """Meta-steps up to --steps, or to an interrupt: (state, whether it is finished)."""
    _, _, key = run_keys(config)
    pending, writes = [], jax.process_index() == 0

    def flush():
        if pending:
            seconds = log.add(pending)
            step, _, grad_norm, *_ = log.rows[-1]
            rate = float(inner_steps_at(config, step - 1)) / seconds
            left = clock((config.steps - step) * seconds)
            print(
                f"meta-step {int(step)}/{config.steps}  meta-loss {log.smoothed():.4f}  "
                f"|g| {grad_norm:.3f}  {rate:.0f} inner steps/s  {left} left",
                flush=True,
            )
            pending.clear()

    def save():
        flush()
        whole = devices.fetch(state)
        check_finite(whole)
        if writes:
            save_checkpoint(folder, config, about, whole)
            save_theta(folder, make_card(config, about, int(whole.step), log), whole)

    first = int(state.step)
    if not config.resume:
        save()  # so that a run killed before its first checkpoint resumes, too
    log.last = time.perf_counter()
    with interrupts() as interrupted:
        for step in range(first, config.steps):
            state, metrics = step_fn(data, key, state)
            names = ("loss", "grad_norm", "grad_noise")
            pending.append([step + 1, *(metrics[name] for name in names)])
            done = step + 1
            if done % config.log_every == 0:
                flush()
            stop = devices.stop_after(done, bool(interrupted))
            if stop or done % config.checkpoint_every == 0 or done == config.steps:
                save()
            if stop:
                break
    state = devices.fetch(state)
    return state, int(state.step) == config.steps


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, to look at between steps: the state of a step under way
    is donated, and cannot be saved. A second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def finish(
    config: Config,
    folder: pathlib.Path,
    about: dict,
    data: Any,
    state: TrainState,
    log: Log,
) -> int:
    """Compare on fresh seeds; the last card, the figure and the last lines."""
    fresh = fresh_runs(config, data, state)
    card = make_card(config, about, int(state.step), log)
    save_theta(folder, card | fresh, state)
    plot(folder, config, log, fresh, about)
    nominal = fresh.get("nominal_loss")
    alone = f" (its nominal term alone {nominal:.4f})" if nominal is not None else ""
    print(
        f"mean training loss over {config.horizon} inner steps, 3 fresh seeds: "
        f"theta {fresh['fresh_loss']:.4f} +- {fresh['fresh_loss_std']:.4f}, "
        f"untrained {fresh['untrained_loss']:.4f}{alone}, "
        f"Adam {fresh['adam_learning_rate']:g} {fresh['adam_loss']:.4f}"
    )
    print(f"theta in {folder / 'theta.npz'}, curve in {folder / 'curve.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train.py", main))
