"""Meta-train a learned optimizer: python train.py --task fmnist

The whole meta-step, antithetic unrolls to AdamW, is one jitted function with donated
buffers, compiled once. A run is a folder: config.json, log.csv, checkpoint.npz,
theta.npz with its card theta.json, curve.png.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import pathlib
import platform
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import estimators
import star
from baselines import BASELINES, rates
from estimators import clip_loss
from inner import batching, compiler_options, curves, inner_training
from store import (
    UserError,
    ema,
    flatten,
    read_npz,
    run_command,
    unflatten,
    write_atomically,
)
from tasks import TASKS

ESTIMATORS = {
    "pes": estimators.pes,
    "es": estimators.truncated_es,
    "noise_reuse": estimators.noise_reuse_es,
}


def arg(default, text, **metadata):
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclasses.dataclass(frozen=True)
class Config:
    """The default recipe; `--preset paper` has the settings of the paper's appendix B."""

    task: str = arg("fmnist", "inner problem", choices=tuple(TASKS))
    optimizer: str = arg(
        "star_small_beta3", "what is meta-trained", choices=tuple(star.CONSTANTS)
    )
    beta3: float | None = arg(
        None, "scale of the blackbox term, if not the optimizer's own"
    )
    estimator: str = arg("pes", "of the meta-gradient", choices=tuple(ESTIMATORS))
    steps: int = arg(2000, "meta-steps")
    particles: int = arg(4, "antithetic pairs")
    horizon: int = arg(2000, "T, inner steps of a trajectory")
    truncation: int = arg(50, "K, inner steps between meta-gradients; divides T")
    sigma: float = arg(0.01, "standard deviation of the perturbations of theta")
    meta_lr: float = arg(3e-3, "peak learning rate of AdamW")
    schedule: str = arg(
        "cosine", "of the meta-learning rate", choices=("cosine", "constant")
    )
    warmup: int = arg(0, "meta-steps of linear warm-up")
    weight_decay: float = arg(0.1, "AdamW's, a multiplier of the meta-learning rate")
    clip: float = arg(1.0, "limit of the meta-gradient")
    clip_by: str = arg("value", "what the limit applies to", choices=("value", "norm"))
    start_horizon: float = arg(0.1, "T at the start, as a share of --horizon")
    curriculum: float = arg(0.5, "share of the meta-steps over which T grows")
    average: float = arg(
        0.0, "decay of the running mean of theta that is saved; 0: none"
    )
    seed: int = arg(0, "of everything random")
    data: str = arg(
        "auto",
        "real: fail without it; auto: stand in for it, loudly",
        choices=("real", "stand-in", "auto"),
    )
    data_dir: str | None = arg(None, "folder that holds the data set")
    out: str | None = arg(None, "folder of the run; default runs/TASK-OPTIMIZER-seedN")
    init: str | None = arg(
        None, "start from this theta.npz and its meta-optimizer state"
    )
    fresh_meta: bool = arg(False, "take only theta from --init; count from meta-step 0")
    resume: bool = arg(False, "continue the run in the folder, bit for bit")
    checkpoint_every: int = arg(100, "meta-steps between checkpoints")
    log_every: int = arg(10, "meta-steps between lines of progress")


PRESETS = {
    "default": {},
    "paper": dict(
        optimizer="star",
        sigma=0.01,
        meta_lr=1e-4,
        schedule="constant",
        weight_decay=0.5,
        average=0.0,
        start_horizon=1.0,
        warmup=0,
    ),
    # Lower variance than PES here, so further at equal inner steps; see the README.
    "noise_reuse": dict(estimator="noise_reuse"),
}
# What a resumed run may change; all else is its recipe.
NOT_RECIPE = (
    "data_dir",
    "out",
    "resume",
    "checkpoint_every",
    "log_every",
    "init",
    "fresh_meta",
)


class TrainState(NamedTuple):
    step: jax.Array  # () int32, meta-steps done
    theta: star.Theta
    average: star.Theta  # running mean of theta; theta itself with average = 0
    meta: Any  # state of the meta-optimizer
    particles: Any  # state of the estimator


def learned_optimizer(config: Config) -> tuple[star.LearnedOptimizer, star.Constants]:
    constants = star.CONSTANTS[config.optimizer]
    if config.beta3 is not None:
        constants = constants._replace(beta3=config.beta3)
    return star.learned_optimizer(constants), constants


def meta_optimizer(config: Config) -> optax.GradientTransformation:
    clip = {"value": optax.clip, "norm": optax.clip_by_global_norm}[config.clip_by]
    peak, warmup = config.meta_lr, config.warmup
    rate = {
        "cosine": lambda: optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, config.steps
        ),
        "constant": lambda: optax.warmup_constant_schedule(
            0.0 if warmup else peak, peak, warmup
        ),
    }[config.schedule]()
    return optax.chain(
        clip(config.clip), optax.adamw(rate, weight_decay=config.weight_decay)
    )


def windows_at(config: Config, step):
    """Windows in a trajectory at this meta-step: doubles in equal stages up to T / K."""
    full = config.horizon // config.truncation
    start = max(1, round(config.start_horizon * full))
    stages = math.ceil(math.log2(full / start))
    stage = jnp.floor(step * stages / max(1.0, config.curriculum * config.steps))
    return jnp.minimum(start * 2 ** jnp.minimum(stage, stages), full).astype(jnp.int32)


def build_estimator(config: Config, data, step=0) -> estimators.Estimator:
    """Task x optimizer -> unroll -> one pair -> N pairs; data and step may be traced."""
    task = TASKS[config.task].build(data)
    optimizer, _ = learned_optimizer(config)
    fresh, inner_step = inner_training(task, optimizer)
    problem = estimators.unroll(fresh, inner_step, config.truncation, task.loss_limit)
    pair = ESTIMATORS[config.estimator](
        problem, windows_at(config, step), config.sigma, batching()
    )
    return estimators.population(pair, config.particles, batching())


def init_state(config: Config, data) -> TrainState:
    theta_key, particle_key = jax.random.split(jax.random.key(config.seed))
    theta = learned_optimizer(config)[0].init_theta(theta_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        theta=theta,
        average=jax.tree.map(jnp.copy, theta),
        meta=meta_optimizer(config).init(theta),
        particles=build_estimator(config, data).init(particle_key, theta),
    )


def meta_step(config: Config, data, key, state: TrainState) -> tuple[TrainState, dict]:
    """One step of meta-training. key: of the run; the step's own is folded in from it."""
    key = jax.random.fold_in(key, state.step)
    estimator = build_estimator(config, data, state.step)
    # A longer horizon: stagger the particles anew, or they would stay close together.
    longer = windows_at(config, state.step) != windows_at(config, state.step - 1)
    particles = jax.lax.cond(
        longer & (state.step > 0),
        lambda: estimator.init(jax.random.fold_in(key, 1), state.theta),
        lambda: state.particles,
    )
    grad, particles, metrics = estimator.estimate(key, state.theta, particles)
    updates, meta = meta_optimizer(config).update(grad, state.meta, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    # A young mean forgets faster, so that it does not remember the start.
    decay = jnp.minimum(config.average, (1 + state.step) / (10 + state.step))
    new = TrainState(
        step=state.step + 1,
        theta=theta,
        average=jax.tree.map(
            lambda a, t: decay * a + (1 - decay) * t, state.average, theta
        ),
        meta=meta,
        particles=particles,
    )
    return new, metrics | {"grad_norm": optax.tree.norm(grad)}


def compile_meta_step(config: Config, data, state: TrainState):
    """The jitted meta-step (data, key, state) -> (state, metrics), state donated."""

    def step(data, key, state):
        return meta_step(config, data, key, state)

    jitted = jax.jit(step, donate_argnums=2, compiler_options=compiler_options())
    return jitted.lower(data, jax.random.key(config.seed), state).compile()


# The files of a run.


def save_checkpoint(folder, config: Config, state: TrainState) -> None:
    arrays = flatten(state) | {
        "config": np.array(json.dumps(dataclasses.asdict(config)))
    }
    write_atomically(folder / "checkpoint.npz", lambda f: np.savez(f, **arrays))


def load_checkpoint(folder, config: Config, template: TrainState) -> TrainState:
    """UserError where the file is no checkpoint of this recipe; names what differs."""
    path = folder / "checkpoint.npz"
    arrays = read_npz(path)
    try:
        saved = dict(json.loads(str(arrays.pop("config"))))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is not a checkpoint of train.py") from None
    for name, value in dataclasses.asdict(config).items():
        if name not in NOT_RECIPE and saved.get(name) != value:
            raise UserError(
                f"{path} was made with --{name.replace('_', '-')} {saved.get(name)}, "
                f"not {value}; resume with the same recipe"
            )
    return unflatten(template, arrays, str(path))


def save_theta(folder, card: dict, state: TrainState) -> None:
    """theta.npz: the theta to use, and what `--init` needs to go on elsewhere (few KB)."""
    go_on = {"step": state.step, "theta": state.theta, "meta": state.meta}
    arrays = {f"train/{name}": x for name, x in flatten(go_on).items()}

    def write(file):
        star.save_theta(file, state.average, card, **arrays)

    write_atomically(folder / "theta.npz", write)
    text = json.dumps(card, indent=1) + "\n"
    write_atomically(folder / "theta.json", lambda f: f.write(text.encode()))


def start_from(path, config: Config, state: TrainState) -> TrainState:
    """The state with theta and, unless --fresh-meta, the meta-optimizer of a theta.npz."""
    try:
        theta, constants = star.load_theta(path)
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from None
    for name, theirs in constants._asdict().items():
        ours = getattr(learned_optimizer(config)[1], name)
        if theirs != ours:
            raise UserError(f"{path} is for {name} = {theirs}, this run has {ours}")
    unflatten(state.theta, flatten(theta), str(path))
    arrays = {
        name.removeprefix("train/"): x
        for name, x in read_npz(path).items()
        if name.startswith("train/")
    }
    if config.fresh_meta or not arrays:
        return state._replace(theta=theta, average=jax.tree.map(jnp.copy, theta))
    go_on = {"step": state.step, "theta": state.theta, "meta": state.meta}
    go_on = unflatten(go_on, arrays, str(path))
    if int(go_on["step"]) >= config.steps:
        raise UserError(
            f"{path} has {int(go_on['step'])} meta-steps behind it and --steps is "
            f"{config.steps}: give more, or --fresh-meta to start counting anew"
        )
    return state._replace(**go_on, average=theta)


class Log:
    """log.csv, one row a meta-step, and the smoothed meta-loss of the progress line."""

    fields = ("step", "meta_loss", "grad_norm", "grad_noise", "seconds")

    def __init__(self, path: pathlib.Path, keep_until: int):
        self.path, self.rows = path, []
        if keep_until and path.exists():
            with open(path, newline="") as file:
                rows = [[float(x) for x in row] for row in list(csv.reader(file))[1:]]
            self.rows = [row for row in rows if row[0] <= keep_until]
        write_atomically(path, lambda f: f.write(self.text(self.rows, header=True)))
        self.seconds = self.rows[-1][-1] if self.rows else 0.0

    def text(self, rows, header=False) -> bytes:
        lines = [",".join(self.fields)] if header else []
        lines += [
            f"{int(row[0])}," + ",".join(f"{x:.6g}" for x in row[1:]) for row in rows
        ]
        return "".join(line + "\n" for line in lines).encode()

    def add(self, rows) -> None:
        self.rows += rows
        with open(self.path, "ab") as file:
            file.write(self.text(rows))

    def smoothed(self, decay=0.95) -> np.ndarray:
        return ema([row[1] for row in self.rows], decay)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def command_line(config: Config) -> str:
    """The command that repeats this recipe: every flag that is not at its default."""
    words = ["python train.py"]
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name not in NOT_RECIPE and value != field.default:
            words.append(f"--{field.name.replace('_', '-')} {value}")
    return " ".join(words)


def make_card(
    config: Config, about: dict, step: int, seconds: float, loss: float
) -> dict:
    _, constants = learned_optimizer(config)
    device = jax.devices()[0]
    return {
        "optimizer": config.optimizer,
        "constants": constants._asdict(),
        "task": config.task,
        **about,
        "meta_steps": step,
        "inner_steps": step * config.particles * 2 * config.truncation,
        "minutes": round(seconds / 60, 1),
        "meta_loss": round(float(loss), 4),
        "meta_loss_is": "mean over the last 100 meta-steps, at the perturbed thetas, nats",
        "seed": config.seed,
        "command": command_line(config),
        "machine": f"{device.platform} ({device.device_kind}, {os.cpu_count()} cores)",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "recipe": dataclasses.asdict(config),
    }


def plot(folder, config: Config, log: Log, fresh: dict, about: dict) -> None:
    """curve.png: the meta-loss over meta-steps, with lines for scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row[0] for row in log.rows]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(steps, [row[1] for row in log.rows], color="C0", alpha=0.25, lw=0.7)
    axes.plot(steps, log.smoothed(), color="C0", label="meta-loss (EMA 0.95)")
    horizons = np.asarray(windows_at(config, np.asarray(steps))) * config.truncation
    for before, after, step in zip(horizons, horizons[1:], steps, strict=False):
        if after != before:
            axes.axvline(step, color="k", ls=":", lw=0.7)
            axes.annotate(f" T {after}", (step, 1), xycoords=("data", "axes fraction"),
                          va="top", fontsize=7)  # fmt: skip
    lines = {
        "untrained": fresh["untrained_loss"],
        "nominal term alone": fresh["nominal_loss"],
        f"Adam {fresh['adam_learning_rate']:g}": fresh["adam_loss"],
        "theta on fresh seeds": fresh["fresh_loss"],
    }
    for i, (name, value) in enumerate(lines.items()):
        axes.axhline(
            value, color=f"C{i + 1}", ls="--", lw=1, label=f"{name}: {value:.3f}"
        )
    axes.set(
        xlabel="meta-steps",
        ylabel="mean training loss over a trajectory (nats)",
        title=f"{config.optimizer}, {config.estimator}, {config.task}\n{about['dataset']}",
    )
    axes.set_ylim(
        *np.nanpercentile([row[1] for row in log.rows], [0, 97]) * [0.97, 1.05]
    )
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=150)
    plt.close(figure)


def fresh_runs(config: Config, data, state: TrainState) -> dict:
    """Mean training loss over the horizon on three fresh seeds, unperturbed: of theta, of
    the untrained one, of the untrained nominal term alone (beta3 = 0), and of Adam at the
    best of three half orders of magnitude.

    Losses are clipped as the meta-loss is. Returns what the card gains.
    """
    build, keys = TASKS[config.task].build, jax.random.split(jax.random.key(10_000), 3)
    optimizer, constants = learned_optimizer(config)
    untrained = init_state(config, data).theta
    learning_rates = (1e-3, 3e-3, 1e-2)

    def losses(optimizer, thetas):  # (thetas, seeds)
        result = curves(build, data, optimizer, thetas, keys, config.horizon)
        return np.asarray(clip_loss(result.losses, build(data).loss_limit)).mean(2)

    theirs = losses(optimizer, [state.average, untrained])
    nominal = losses(star.learned_optimizer(constants._replace(beta3=0.0)), [untrained])
    adam = losses(BASELINES["adam"], rates(learning_rates)).mean(1)
    return {
        "fresh_loss": round(float(theirs[0].mean()), 4),
        "fresh_loss_std": round(float(theirs[0].std(ddof=1)), 4),
        "untrained_loss": round(float(theirs[1].mean()), 4),
        "nominal_loss": round(float(nominal.mean()), 4),
        "adam_loss": round(float(adam.min()), 4),
        "adam_learning_rate": learning_rates[int(adam.argmin())],
    }


# The command line.


def parse(argv=None) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="default", help="recipe"
    )
    for field in dataclasses.fields(Config):
        name = "--" + field.name.replace("_", "-")
        options = dict(
            dest=field.name, help=field.metadata["help"], default=field.default
        )
        if field.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        else:
            kind = {"int": int, "float": float}.get(
                getattr(field.type, "__name__", ""), str
            )
            kind = float if field.name == "beta3" else kind
            parser.add_argument(
                name, type=kind, choices=field.metadata.get("choices"), **options
            )
    preset, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[preset.preset])
    values = vars(parser.parse_args(argv))
    values.pop("preset")
    config = Config(**values)
    check(config)
    return config


def check(config: Config) -> None:
    """UserError for a setting that cannot work."""
    for name in (
        "steps",
        "particles",
        "horizon",
        "truncation",
        "log_every",
        "checkpoint_every",
    ):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("sigma", "meta_lr", "clip", "curriculum"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= config.average < 1:
        raise UserError("--average must be in [0, 1)")
    for name in ("seed", "weight_decay", "warmup"):
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    if not 0 < config.start_horizon <= 1:
        raise UserError("--start-horizon is a share of --horizon, above 0 and up to 1")
    if config.horizon % config.truncation:
        raise UserError(
            f"--truncation {config.truncation} does not divide --horizon {config.horizon}"
        )
    if config.warmup >= config.steps:
        raise UserError("--warmup must be below --steps")
    if config.resume and config.init:
        raise UserError(
            "--resume goes on from the folder's checkpoint; --init does not apply"
        )


def main(argv=None) -> int:
    config = parse(argv)
    name = f"{config.task}-{config.optimizer}-seed{config.seed}"
    folder = pathlib.Path(config.out or f"runs/{name}")
    data, about = TASKS[config.task].load(config.data, config.data_dir)
    if about["stand_in"]:
        print("STAND-IN DATA: results say nothing about the real task", flush=True)

    state = init_state(config, data)
    if config.init:
        state = start_from(config.init, config, state)
    if config.resume:
        state = load_checkpoint(folder, config, state)
    elif (folder / "checkpoint.npz").exists():
        raise UserError(
            f"{folder} holds a run already: --resume it, or choose another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**dataclasses.asdict(config), **about}, indent=1) + "\n"
        write_atomically(folder / "config.json", lambda f: f.write(text.encode()))
        log = Log(folder / "log.csv", keep_until=int(state.step))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    print(text, end="")
    begin = time.perf_counter()
    step_fn = compile_meta_step(config, data, state)
    print(
        f"compiled in {time.perf_counter() - begin:.1f} s; writing {folder}", flush=True
    )
    return loop(config, folder, about, data, state, log, step_fn)


def loop(config, folder, about, data, state, log, step_fn) -> int:
    key = jax.random.key(config.seed)
    inner_steps = 2 * config.particles * config.truncation
    pending, elapsed = [], log.seconds
    last, first = time.perf_counter(), int(state.step)

    def flush():
        nonlocal pending, last, elapsed
        pending_rows = [
            [float(x) for x in row] for row in pending
        ]  # waits for the device
        now = time.perf_counter()
        spent, last = now - last, now
        for i, row in enumerate(pending_rows):
            row.append(elapsed + spent * (i + 1) / len(pending_rows))
        elapsed += spent
        log.add(pending_rows)
        rate = inner_steps * len(pending) / spent
        left = (config.steps - pending_rows[-1][0]) * spent / len(pending)
        print(
            f"meta-step {int(pending_rows[-1][0])}/{config.steps}  "
            f"meta-loss {log.smoothed()[-1]:.4f}  |g| {pending_rows[-1][2]:.3f}  "
            f"{rate:.0f} inner steps/s  {clock(left)} left",
            flush=True,
        )
        pending = []

    def card():
        loss = np.mean([row[1] for row in log.rows[-100:]])
        return make_card(config, about, int(state.step), elapsed, loss)

    def save():
        if pending:
            flush()
        loss = np.mean([row[1] for row in log.rows[-100:]]) if log.rows else np.nan
        save_checkpoint(folder, config, state)
        save_theta(
            folder, make_card(config, about, int(state.step), elapsed, loss), state
        )

    try:
        for step in range(first, config.steps):
            state, metrics = step_fn(data, key, state)
            pending.append(
                [step + 1, *(metrics[k] for k in ("loss", "grad_norm", "grad_noise"))]
            )
            if (step + 1) % config.log_every == 0:
                flush()
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                save()
    except KeyboardInterrupt:
        save()
        print(f"interrupted; go on with --resume (saved at {int(state.step)})")
        return 130
    fresh = fresh_runs(config, data, state)
    save_theta(folder, card() | fresh, state)
    plot(folder, config, log, fresh, about)
    print(
        f"mean training loss over {config.horizon} inner steps, 3 fresh seeds: "
        f"theta {fresh['fresh_loss']:.4f} +- {fresh['fresh_loss_std']:.4f}, "
        f"untrained {fresh['untrained_loss']:.4f} "
        f"(its nominal term alone {fresh['nominal_loss']:.4f}), "
        f"Adam {fresh['adam_learning_rate']:g} {fresh['adam_loss']:.4f}"
    )
    print(f"theta in {folder / 'theta.npz'}, curve in {folder / 'curve.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train.py", main))
