"""The settings of a meta-training run: the flags of train.py, presets, what is refused.

`Config` is what a run's config.json and a theta's card hold; `parse` makes one from a
command line, `command_line` the command line from one.
"""

import argparse
import dataclasses
import re
import shlex
import typing
from collections.abc import Sequence

import estimators
import star
from companions import lopts
from inner import OBJECTIVES
from store import Arguments, UserError
from tasks import TASKS

ESTIMATORS = {
    "pes": estimators.pes,
    "truncated_es": estimators.truncated_es,
    "noise_reuse": estimators.noise_reuse_es,
    "truncated_bptt": estimators.truncated_bptt,
    "merged": estimators.merged,
}
LARGEST = 2.0**127  # half of what float32 has


def arg(default: typing.Any, text: str, **metadata: typing.Any) -> typing.Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclasses.dataclass(frozen=True)
class Config:
    """The default recipe; `--preset paper` has the settings of the paper's appendix B."""

    task: str = arg(
        "fmnist", "inner problem; python tasks.py lists them", choices=tuple(TASKS)
    )
    optimizer: str = arg(
        "star_small_beta3",
        "what is meta-trained",
        choices=(*star.CONSTANTS, *lopts.LEARNED),
    )
    beta1: float | None = arg(
        None, "scale of the nominal term, if not the optimizer's own; so the others"
    )
    beta2: float | None = arg(None, "scale of its magnitude, inside the exponential")
    beta3: float | None = arg(None, "scale of the blackbox term")
    beta4: float | None = arg(None, "scale of its magnitude, inside the exponential")
    estimator: str = arg("pes", "of the meta-gradient", choices=tuple(ESTIMATORS))
    objective: str = arg(
        "train",
        "which inner loss: of the training batch before its update, of a fresh one "
        "after it, or of a validation batch after it",
        choices=tuple(OBJECTIVES),
    )
    steps: int = arg(2000, "meta-steps")
    particles: int = arg(4, "antithetic pairs")
    side_by_side: bool = arg(
        False, "all particles at once on a CPU, too: faster for tiny problems"
    )
    horizon: int = arg(2000, "T, inner steps of a trajectory")
    truncation: int = arg(50, "K, inner steps of a window; divides T")
    unroll: int | None = arg(
        None, "inner steps of a meta-gradient, in windows; default one window"
    )
    start_unroll: int | None = arg(None, "--unroll at the start; default one window")
    unroll_growth: str = arg(
        "linear",
        "how the unroll grows over --curriculum",
        choices=("linear", "log", "constant"),
    )
    jitter: float = arg(
        0.0, "the unroll of each meta-step varies by so much, relatively"
    )
    sigma: float = arg(
        0.01, "standard deviation of the perturbations of theta; 0 for plain BPTT"
    )
    meta_lr: float = arg(3e-3, "peak learning rate of AdamW")
    meta_beta1: float = arg(0.9, "momentum of AdamW")
    schedule: str = arg(
        "cosine",
        "of the meta-learning rate; staircase: times 0.8 every 500 meta-steps",
        choices=("cosine", "constant", "staircase"),
    )
    warmup: int = arg(0, "meta-steps of linear warm-up")
    weight_decay: float = arg(0.1, "AdamW's, a multiplier of the meta-learning rate")
    l2: float = arg(0.0, "adds this times |theta|^2 to the meta-loss")
    clip: float = arg(1.0, "limit of the meta-gradient")
    clip_by: str = arg("value", "what the limit applies to", choices=("value", "norm"))
    horizons: str = arg(
        "doubling",
        "T doubles up to --horizon over --curriculum, or is drawn for each trajectory",
        choices=("doubling", "log-uniform"),
    )
    start_horizon: float = arg(
        0.1, "T at the start, or of the shortest trajectory, as a share of --horizon"
    )
    curriculum: float = arg(0.5, "share of the meta-steps over which T grows")
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
    devices: int = arg(1, "of each process, which share the particles")
    distributed: bool = arg(
        False, "one of several processes that share the particles, and the folder --out"
    )
    coordinator: str | None = arg(
        None, "HOST:PORT of process 0, if the cluster does not tell; so the next two"
    )
    num_processes: int | None = arg(None, "of the run")
    process_id: int | None = arg(None, "of this process; only 0 prints and writes")
    peer_timeout: int = arg(
        60,
        "seconds. Where a process dies, the others end at once, or after so long if its "
        "host is gone or an accelerator waits for it; go on with --resume",
    )


PRESETS = {
    "default": {},
    "paper": dict(
        optimizer="star",
        meta_lr=1e-4,
        schedule="constant",
        weight_decay=0.5,
        start_horizon=1.0,
    ),
    # Lower variance than PES here, so further at equal inner steps; see recipes.md.
    "noise_reuse": dict(estimator="noise_reuse"),
    # What got furthest at equal inner steps and the paper's betas; see recipes.md.
    "best": dict(estimator="noise_reuse", horizons="log-uniform", clip_by="norm"),
    # Metz et al. 2019, D.3. Deviations: unrolls up to 1,000 of T = 2,000, not of 10,000, in
    # 2,000 meta-steps, not 5,000; 8 pairs, not 128; clipping. The paper's --meta-lr for
    # --objective valid is 0.0003.
    "metz": dict(
        optimizer="mlp",
        estimator="merged",
        particles=8,
        unroll=1000,
        jitter=0.2,
        meta_beta1=0.5,
        schedule="constant",
        weight_decay=0.0,
        start_horizon=1.0,
        curriculum=1.0,
    ),
    # Maheswaranathan et al. 2020, C.2: backpropagation through all 200 steps of 32
    # problems. The rate is ours; theirs came from a random search. (At 1e-2 linear
    # regression is lost after 1,100 meta-steps; the other tasks have exploding gradients.)
    "gru": dict(
        task="linear_regression",
        optimizer="gru",
        estimator="truncated_bptt",
        sigma=0.0,
        steps=5000,
        particles=32,
        side_by_side=True,
        horizon=200,
        truncation=200,
        start_horizon=1.0,
        meta_lr=3e-3,
        schedule="staircase",
        weight_decay=0.0,
        l2=1e-5,
        clip=5.0,
    ),
}
# What a resumed run may change; all else is its recipe.
NOT_RECIPE = ("data_dir", "out", "resume", "checkpoint_every", "log_every")
NOT_RECIPE += ("devices", "distributed", "coordinator", "num_processes", "process_id")
NOT_RECIPE += ("peer_timeout",)


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> Config:
    """The settings of a command line, checked; UserError for those that cannot work."""
    parser = Arguments(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
            kind, *_ = typing.get_args(field.type) or (field.type,)
            choices = field.metadata.get("choices")
            if field.name == "task":
                options["metavar"] = "NAME"
            parser.add_argument(name, type=kind, choices=choices, **options)
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
        if not 1 <= getattr(config, name) < 2**31:
            raise UserError(f"--{name.replace('_', '-')} must be in 1 .. 2^31 - 1")
    positive = ("meta_lr", "clip", "curriculum")
    if config.estimator != "truncated_bptt":
        positive += ("sigma",)
    for name in positive:
        if not 0 < getattr(config, name) < LARGEST:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, in float32")
    if not 0 <= config.seed < 2**32:
        raise UserError("--seed must be in 0 .. 2^32 - 1")
    for name in ("sigma", "weight_decay", "l2", "warmup"):
        if not 0 <= getattr(config, name) < LARGEST:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, in float32")
    if not 0 < config.start_horizon <= 1:
        raise UserError("--start-horizon is a share of --horizon, above 0 and up to 1")
    if config.horizons == "log-uniform":
        if config.unroll is not None:
            raise UserError(
                "--horizons log-uniform is about single windows, not --unroll"
            )
        if config.start_horizon == 1:
            raise UserError("--horizons log-uniform needs a --start-horizon below 1")
        if config.curriculum != Config().curriculum:
            raise UserError("--curriculum is about T that doubles, not log-uniform")
    if config.horizon % config.truncation:
        raise UserError(
            f"--truncation {config.truncation} does not divide --horizon {config.horizon}"
        )
    check_unroll(config)
    check_devices(config)
    if not 0 <= config.meta_beta1 < 1:
        raise UserError("--meta-beta1 must be in 0 .. 1")
    if config.estimator == "merged" and config.particles < 4:
        raise UserError(
            "--estimator merged needs 4 --particles or more for its variances"
        )
    for name, beta in betas(config).items():
        if config.optimizer in lopts.LEARNED:
            raise UserError(f"--{name} is STAR's; {config.optimizer} has none")
        if not abs(beta) < LARGEST:
            raise UserError(f"--{name} must be finite in float32")
    if config.warmup >= config.steps:
        raise UserError("--warmup must be below --steps")
    if config.resume and config.init:
        raise UserError(
            "--resume goes on from the folder's checkpoint; --init does not apply"
        )


def betas(config: Config) -> dict[str, float]:
    """Those of beta1 .. beta4 that are given, by name."""
    found = {f"beta{i}": getattr(config, f"beta{i}") for i in range(1, 5)}
    return {name: beta for name, beta in found.items() if beta is not None}


def check_unroll(config: Config) -> None:
    """UserError where --unroll and what goes with it cannot work."""
    if config.unroll is None:
        for name in ("start_unroll", "unroll_growth", "jitter"):
            if getattr(config, name) != getattr(Config(), name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is about --unroll, which is not given")
        return
    if config.estimator in ("pes", "noise_reuse"):
        raise UserError(
            f"--unroll does not go with {config.estimator}, which joins windows itself: "
            "give --truncation"
        )
    for name in ("unroll", "start_unroll"):
        steps, flag = getattr(config, name), "--" + name.replace("_", "-")
        if steps is None:
            continue
        if steps < 1 or steps % config.truncation:
            raise UserError(
                f"{flag} {steps} is not whole windows of {config.truncation}"
            )
        if steps > config.horizon or steps > config.unroll:
            raise UserError(f"{flag} {steps} is longer than --horizon or --unroll")
    if not 0 <= config.jitter < 1:
        raise UserError("--jitter must be in 0 .. 1")


def check_devices(config: Config) -> None:
    """UserError where --devices, --distributed and what goes with them cannot work."""
    if config.devices < 1 or config.peer_timeout < 1:
        raise UserError("--devices and --peer-timeout must be at least 1")
    given = (config.coordinator, config.num_processes, config.process_id)
    if given == (None,) * 3:
        return
    if not config.distributed or None in given:
        raise UserError(
            "--coordinator, --num-processes and --process-id go together, and with "
            "--distributed"
        )
    host, _, port = config.coordinator.rpartition(":")
    if not (host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {config.coordinator} is not HOST:PORT")
    if not 0 <= config.process_id < config.num_processes:
        raise UserError(
            f"--process-id {config.process_id} is not in 0 .. --num-processes - 1"
        )


def command_line(config: Config) -> str:
    """The command that repeats this recipe: every flag that is not at its default."""
    words = ["python train.py"]
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name in NOT_RECIPE or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        word = shlex.quote(str(value))
        between = "=" if word.startswith("-") else " "  # a lone -1e-6 looks like a flag
        words.append(flag if value is True else f"{flag}{between}{word}")
    return " ".join(words)
