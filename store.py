"""Files of a run: trees as `.npz` arrays by path, written whole or not at all."""

import argparse
import contextlib
import json
import math
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

import star
from companions import lopts
from data import DataError

try:
    import fcntl
except ImportError:  # not a Unix: two runs in one folder are then not noticed
    fcntl = None

PLAUSIBLE = 2**24  # bytes that a small `.npz` may unpack to


class UserError(Exception):
    """One line for the user on stderr, exit code 2."""


class Arguments(argparse.ArgumentParser):
    """argparse whose errors are a UserError: their one line, without the usage above."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run_command(program: str, main: Callable, argv: Sequence[str] | None = None) -> int:
    """main(argv)'s exit code; what the user got wrong as one line and exit code 2."""
    try:
        return main(argv)
    except (UserError, DataError) as error:
        reason = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        reason = f"{error.filename or 'file'}: {error.strerror or error}"
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and type(error) is not MemoryError:
            raise
        reason = "out of memory"
    print(f"{program}: {' '.join(reason.splitlines())}", file=sys.stderr)
    return 2


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Tree -> {path: array}, for `.npz`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def unflatten(template: Any, arrays: dict[str, np.ndarray], where: str) -> Any:
    """{path: array} -> tree of the template's shapes; UserError where they differ."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    out = []
    for path, like in leaves:
        name = jax.tree_util.keystr(path)
        x = arrays.get(name)
        if x is None or x.shape != like.shape or x.dtype != like.dtype:
            found = "missing" if x is None else f"{x.dtype}{list(x.shape)}"
            raise UserError(
                f"{where} does not fit this run: {name} is {found}, "
                f"not {like.dtype}{list(like.shape)}"
            )
        out.append(jnp.asarray(x))
    return treedef.unflatten(out)


def read_npz(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a `.npz`, never unpickled; UserError where it cannot be read."""
    try:
        with open(path, "rb") as raw:
            if not zipfile.is_zipfile(raw):
                raise ValueError("it is not one, or was cut off")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                size = sum(member.file_size for member in file.zip.infolist())
                if size > max(PLAUSIBLE, 2 * os.path.getsize(path)):
                    raise ValueError(f"it would unpack to {size} bytes")
                return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} cannot be read as a .npz file: {reason}") from None


def write_atomically(path: pathlib.Path, write: Callable) -> None:
    """write(file) to a temporary file beside path, flushed to the disk, then renamed.

    Raises OSError, which names the file, and then leaves what was there before.
    """
    temporary = path.with_name(path.name + ".tmp")
    with errors_name(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def errors_name(path: str | pathlib.Path) -> Iterator[None]:
    """An OSError within names the path: one of a full disk has no file's name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def only_run_in(folder: str | pathlib.Path) -> Iterator[None]:
    """The folder is this run's while it lasts; UserError where another run has it.

    The kernel's lock on the folder itself: it ends with the process, even by kill -9, and
    leaves no file behind. It binds the runs of one machine.
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
    try:
        yield
    finally:
        os.close(handle)


def save_json(path: pathlib.Path, value: Any) -> None:
    """Written as `write_atomically` does."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


def save_figure(path: pathlib.Path, figure: Any, dpi: int) -> None:
    """A matplotlib figure as PNG, written as `write_atomically` does."""
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=dpi))


class Trained(NamedTuple):
    """What a theta's file holds."""

    theta: dict[str, jax.Array]
    optimizer: star.LearnedOptimizer | lopts.LearnedOptimizer
    constants: star.Constants | None  # None if it is not a STAR


def load_theta(path: str | pathlib.Path) -> Trained:
    """A theta of STAR or of `lopts.LEARNED`; UserError for whatever is wrong with it."""
    name = read_card(path).get("optimizer")
    if not isinstance(name, str) or name not in lopts.LEARNED:
        try:
            theta, constants = star.load_theta(path)
        except (OSError, ValueError) as error:
            raise UserError(" ".join(str(error).split())) from None
        return Trained(theta, star.learned_optimizer(constants), constants)
    optimizer = lopts.LEARNED[name]
    arrays = read_npz(path)
    template = jax.eval_shape(optimizer.init_theta, jax.random.key(0))
    for key, like in template.items():
        x = arrays.get(key)
        if x is None or x.shape != like.shape or x.dtype != like.dtype:
            raise UserError(
                f"{path} holds no theta of {name}: {key} is not "
                f"{like.dtype}{list(like.shape)}"
            )
        if not np.isfinite(x).all():
            raise UserError(f"{path} holds a theta that is not finite")
    theta = {key: jnp.asarray(arrays[key]) for key in template}
    return Trained(theta, optimizer, None)


def read_card(path: str | pathlib.Path) -> dict:
    """The card inside a theta's `.npz`; {} where it has none."""
    try:
        card = json.loads(str(read_npz(path).get("card", "{}")))
    except (ValueError, RecursionError):  # the latter of a card nested too deeply
        raise UserError(f"{path} has a card that is not JSON") from None
    return card if isinstance(card, dict) else {}


def minutes_spent(path: str | pathlib.Path) -> float:
    """On the theta of this file, by its card; UserError where that is no number."""
    minutes = read_card(path).get("minutes", 0)
    if not isinstance(minutes, int | float) or not 0 <= minutes < math.inf:
        raise UserError(f"{path} has a card whose minutes are {str(minutes)[:20]!r}")
    return float(minutes)
