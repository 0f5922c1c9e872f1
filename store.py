"""Files of a run, written whole or not at all, and what a user is told."""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from data import DataError

try:
    import fcntl
except ImportError:  # not a Unix: two runs in one folder are then not noticed
    fcntl = None


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


def unflatten(template: Any, arrays: dict[str, np.ndarray], where: Any) -> Any:
    """{path: array} -> tree of the template's shapes; UserError where they differ."""

    def one(path, like):
        name = jax.tree_util.keystr(path)
        x = arrays.get(name)
        if x is None or (x.shape, x.dtype) != (like.shape, like.dtype):
            found = "missing" if x is None else f"{x.dtype}{list(x.shape)}"
            expected = f"{like.dtype}{list(like.shape)}"
            raise UserError(
                f"{where} does not fit this run: {name} is {found}, not {expected}"
            )
        return jax.numpy.asarray(x)

    return jax.tree_util.tree_map_with_path(one, template)


def read_npz(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a `.npz`, never unpickled; UserError where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError):
        raise UserError(f"{path} cannot be read as a .npz file") from None


def read_card(path: str | pathlib.Path) -> dict:
    """The card inside a theta's `.npz`; {} where it has none."""
    try:
        card = json.loads(str(read_npz(path).get("card", "{}")))
    except ValueError:
        raise UserError(f"{path} has a card that is not JSON") from None
    return card if isinstance(card, dict) else {}


def read_theta(path: str | pathlib.Path, load: Callable) -> Any:
    """load(path), such as `star.load_theta`; UserError where there is no such theta."""
    try:
        return load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from None


def write_atomically(path: pathlib.Path, write: Callable) -> None:
    """write(file) to a temporary file beside path, flushed to the disk, then renamed.

    Raises OSError, which names the file, and then leaves what was there before.
    """
    temporary = path.with_name(path.name + ".tmp")
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


def save_figure(path: pathlib.Path, figure: Any, dpi: int = 150) -> None:
    """A matplotlib figure as PNG, written as `write_atomically` does."""
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=dpi))


@contextlib.contextmanager
def only_run_in(folder: str | pathlib.Path) -> Iterator[None]:
    """The folder is this run's while it lasts; UserError where another run has it.

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
    try:
        yield
    finally:
        os.close(handle)
