"""Files of a run, written whole or not at all, and what a user is told."""

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import platform
import re
import shlex
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_args

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.flatten_util import ravel_pytree

import star
from data import DataError

try:
    import fcntl
except ImportError:  # not a Unix: two runs in one folder are then not noticed
    fcntl = None


DATA_SOURCES = ("real", "stand-in", "auto")


class UserError(Exception):
    """One line for the user on stderr, exit code 2."""


class Arguments(argparse.ArgumentParser):
    """argparse for whole flags, values such as -1e-6 and ~/x, and errors of one line."""

    def __init__(self, *args, **more):
        super().__init__(*args, allow_abbrev=False, **more)
        self._negative_number_matcher = re.compile(r"-[\d.]")
        for kind in (None, str):  # every text, in lists, too
            self.register("type", kind, os.path.expanduser)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def add_data(self) -> None:
        """The two flags that say where data sets come from."""
        self.add_argument("--data", default="auto", choices=DATA_SOURCES)
        self.add_argument("--data-dir", help="folder that holds the data set")


def given_flags(argv: Sequence[str] | None, kind: Any, description: str) -> dict:
    """What a command line gives of the dataclass `kind`: {field: value}.

    Fields with metadata "help" are flags. Metadata "choices" are their allowed values.
    """
    parser = Arguments(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(kind):
        if not field.metadata:
            continue
        name = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (default {field.default})"
        if field.type is bool:
            parser.add_argument(name, action="store_true", default=None, help=text)
        else:
            of, *_ = get_args(field.type) or (field.type,)
            choices = field.metadata.get("choices")
            parser.add_argument(name, type=of, choices=choices, help=text)
    given = vars(parser.parse_args(argv)).items()
    return {name: value for name, value in given if value is not None}


def run_command(program: str, main: Callable, argv: Sequence[str] | None = None) -> int:
    """main(argv)'s exit code. What the user got wrong is one line and exit code 2.

    It runs in float32, also where the environment enables float64.
    """
    try:
        with jax.enable_x64(False):
            code = main(argv)
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, such as `head`
        forget_output()
        return 141
    except (UserError, DataError) as error:
        reason = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        if error.filename is None:  # only the output has no name
            forget_output()
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError, AssertionError) as error:
        if type(error) is MemoryError or "RESOURCE_EXHAUSTED" in str(error):
            reason = "out of memory"
        elif has_backend():
            raise
        else:
            reason = f"no backend {os.environ.get('JAX_PLATFORMS', '')!r} here. {error}"
    print(f"{program}: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def forget_output() -> None:
    """Discards what is printed from now on, and what waits to be printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def has_backend() -> bool:
    """Whether JAX finds the backend that JAX_PLATFORMS names, or any."""
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Tree -> {path: array}, for `.npz`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def unflatten(template: Any, arrays: dict[str, np.ndarray], where: Any) -> Any:
    """{path: array} -> tree of the template's shapes. UserError where they differ."""

    def one(path, like):
        name = jax.tree_util.keystr(path)
        x = arrays.get(name)
        if x is None or (x.shape, x.dtype) != (like.shape, like.dtype):
            found = "missing" if x is None else f"{x.dtype}{list(x.shape)}"
            expected = f"{like.dtype}{list(like.shape)}"
            raise UserError(
                f"{where} does not fit this run: {name} is {found}, not {expected}"
            )
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(one, template)


# What numpy raises for a file that is damaged, cut off or of another kind.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, EOFError, zlib.error)
DAMAGED += (zipfile.BadZipFile, NotImplementedError, tokenize.TokenError)


def read_npz(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a `.npz`, never unpickled. UserError where it cannot be read."""

    def load(path):
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return dict(file)

    return read_theta(path, load)


def read_card(path: str | pathlib.Path) -> dict:
    """The card inside a theta's `.npz`, else {}."""

    def load(path):
        return json.loads(str(read_npz(path).get("card", "{}")))

    return read_theta(path, load)


def read_theta(path: str | pathlib.Path, load: Callable) -> Any:
    """load(path), such as `star.load_theta`. UserError where there is no such theta."""
    try:
        return load(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be used: {reason}") from None


def theta_for(asked: Any, name: str, load: Callable, path: Any) -> dict:
    """The theta of load(path). UserError where what comes with it is not what is asked."""
    theta, theirs = read_theta(path, load)
    if theirs != asked:
        raise UserError(f"{path} is not for {name}")
    return theta


def write_atomically(path: pathlib.Path, write: Callable) -> None:
    """write(file) to a temporary file beside path, flushed to the disk, then renamed.

    Where it raises OSError, which names the file, it leaves what was there before.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def save_json(path: pathlib.Path, value: Any) -> None:
    """Written as `write_atomically` does."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


# How `save_figure` has figures made.
STYLE = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8)
STYLE |= dict.fromkeys(("font.size", "axes.titlesize", "figure.labelsize"), 9)
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
STYLE |= {"figure.titlesize": 10, "lines.linewidth": 1.3, "lines.markersize": 5}
STYLE |= {"axes.formatter.min_exponent": 3}  # 0.3, not 3 x 10^-1
STYLE |= {"figure.constrained_layout.use": True}


def save_figure(path: pathlib.Path, draw: Callable, *args: Any) -> None:
    """The figure that draw(*args) returns in STYLE, as PNG, by `write_atomically`."""
    with matplotlib.rc_context(STYLE):
        figure = draw(*args)
        write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=150))


def draw_figure(path: pathlib.Path, draw: Callable, *args: Any) -> None:
    """As `save_figure`, but a failure costs the figure and a line."""
    try:
        save_figure(path, draw, *args)
    except Exception as error:  # whatever it is, the results matter more
        print(f"{path} is not drawn: {error}", file=sys.stderr)


# --- the files of a run of train.py, made from its Recipe, Parts and TrainState
# A resumed run may change these. All else is its recipe.
NOT_RECIPE = ("data_dir", "out", "init", "fresh_meta", "resume", "checkpoint_every")
NOT_RECIPE += ("devices", "distributed", "coordinator", "num_processes", "process_id")


def unravel_of(optimizer: star.LearnedOptimizer) -> Callable:
    """flat theta -> theta."""
    return ravel_pytree(optimizer.init_theta(jax.random.key(0)))[1]


def save_run(folder, recipe, made, about, state, card) -> None:
    """checkpoint.npz, then theta.npz with its card and what `--init` needs elsewhere.

    UserError where theta or AdamW's means have overflowed, so that no file holds them.
    """
    saved = jax.tree.leaves((state.theta, state.meta))
    if not all(np.isfinite(x).all() for x in saved):
        raise UserError(
            f"theta or its AdamW overflowed before meta-step {int(state.step)}. The "
            "checkpoint is older. Begin anew with a lower --meta-lr or --clip"
        )
    made_with = np.array(json.dumps(dataclasses.asdict(recipe) | about))
    whole = flatten(state) | {"made_with": made_with}
    write_atomically(folder / "checkpoint.npz", lambda f: np.savez(f, **whole))
    theta = unravel_of(made.optimizer)(jnp.asarray(state.theta))
    go_on = flatten({"step": state.step, "meta": state.meta})
    go_on = {f"train/{name}": x for name, x in go_on.items()}
    write_atomically(
        folder / "theta.npz", lambda f: star.save_theta(f, theta, card, **go_on)
    )
    save_json(folder / "theta.json", card)


def read_checkpoint(folder: pathlib.Path) -> tuple[dict, dict]:
    """(recipe and data set of the run that the folder holds, arrays of its state)."""
    path = folder / "checkpoint.npz"
    arrays = read_npz(path)
    if "made_with" not in arrays:
        raise UserError(f"{path} is not a checkpoint of train.py")
    return json.loads(str(arrays.pop("made_with"))), arrays


def load_checkpoint(folder, recipe, about, template):
    """(recipe, state) of a run to go on with. UserError where recipe or data differ."""
    path, (saved, arrays) = folder / "checkpoint.npz", read_checkpoint(folder)
    if saved["dataset_checksum"] != about["dataset_checksum"]:
        raise UserError(f"{path} was made on other data than {about['dataset']}")
    for name, value in dataclasses.asdict(recipe).items():
        if name not in NOT_RECIPE and saved.get(name) != value:
            was = f"--{name.replace('_', '-')} {saved.get(name)}"
            raise UserError(f"{path} was made with {was}, not {value}")
    origin = {name: saved[name] for name in ("init", "fresh_meta")}
    return dataclasses.replace(recipe, **origin), unflatten(template, arrays, path)


def make_card(recipe: Any, made: Any, about: dict, rows: list) -> dict:
    """What theta is and how it was made, as JSON has it."""
    device, step = jax.devices()[0], int(rows[-1][0]) if rows else 0
    recent = float(np.mean([row[1] for row in rows[-100:]])) if rows else 0.0
    return {
        "optimizer": recipe.optimizer,
        "constants": made.constants,
        "task": recipe.task,
        **about,
        "meta_steps": step,
        "inner_steps": round(float(made.inner_steps(step))),
        "minutes": round(rows[-1][-1] / 60, 1) if rows else 0.0,
        "meta_loss": round(recent, 4),
        "meta_loss_is": "mean over the last 100 meta-steps, at the perturbed thetas, nats",
        "seed": recipe.seed,
        "command": command_line(recipe),
        "machine": f"{device.platform} ({device.device_kind}, {os.cpu_count()} cores)",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "recipe": dataclasses.asdict(recipe),
    }


def command_line(recipe: Any) -> str:
    """The command that repeats this recipe, with the flags that its preset lacks."""
    usual = type(recipe)(**recipe.presets[recipe.preset], preset=recipe.preset)
    words = [f"python {recipe.program}"]
    words += [f"--preset={recipe.preset}"] * (recipe.preset != "default")
    for field in dataclasses.fields(recipe):
        name, value = field.name, getattr(recipe, field.name)
        recorded = name not in NOT_RECIPE or name in ("init", "fresh_meta")
        if field.metadata and recorded and value != getattr(usual, name):
            word = "" if value is True else f"={shlex.quote(str(value))}"
            words.append(f"--{name.replace('_', '-')}{word}")
    return " ".join(words)


def write_csv(path: pathlib.Path, columns: Sequence[str], rows: list) -> None:
    """A header, then the rows of numbers. The first number of a row is whole."""
    lines = [f"{int(r[0])}," + ",".join(f"{x:.6g}" for x in r[1:]) for r in rows]
    text = "".join(line + "\n" for line in [",".join(columns), *lines])
    write_atomically(path, lambda f: f.write(text.encode()))


def read_csv(path: pathlib.Path, last: int) -> list:
    """The rows of such a file up to number `last`. kill -9 may have left more."""
    with open(path, newline="") as file:
        rows = [[float(x) for x in row] for row in list(csv.reader(file))[1:]]
    return [row for row in rows if row[0] <= last]


@contextlib.contextmanager
def only_run_in(folder: str | pathlib.Path) -> Iterator[None]:
    """The folder is this run's while it lasts. UserError where another run has it.

    The kernel's lock on the folder ends with the process, even by kill -9, and leaves no
    file behind. It binds the runs of one machine.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another run is writing in {folder}") from None
    except OSError:  # a file system without locks
        pass
    for left in pathlib.Path(folder).glob("*.tmp"):  # by a run that was killed
        left.unlink()
    try:
        yield
    finally:
        os.close(handle)
