"""Files of a run: trees as `.npz` arrays by path, written whole or not at all."""

import argparse
import json
import os
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lopts
import star
from data import DataError


class UserError(Exception):
    """One line for the user on stderr, exit code 2."""


class Arguments(argparse.ArgumentParser):
    """argparse whose errors are a UserError: their one line, without the usage above."""

    def error(self, message):
        raise UserError(message)


def run_command(program: str, main, argv=None) -> int:
    """main(argv)'s exit code; what the user got wrong as one line and exit code 2."""
    try:
        return main(argv)
    except (UserError, DataError) as error:
        print(f"{program}: {error}", file=sys.stderr)
    except OSError as error:  # a full disk, a folder that may not be written
        print(
            f"{program}: {error.filename or 'file'}: {error.strerror}", file=sys.stderr
        )
    return 2


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def flatten(tree) -> dict[str, np.ndarray]:
    """Tree -> {path: array}, for `.npz`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def unflatten(template, arrays, where: str):
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


def read_npz(path) -> dict[str, np.ndarray]:
    """All arrays of a `.npz`, never unpickled; UserError where it cannot be read."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} cannot be read as a .npz file: {reason}") from None


def write_atomically(path: pathlib.Path, write) -> None:
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
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def save_json(path: pathlib.Path, value) -> None:
    """Written as `write_atomically` does."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


class Trained(NamedTuple):
    """What a theta's file holds."""

    theta: dict[str, jax.Array]
    optimizer: star.LearnedOptimizer | lopts.LearnedOptimizer
    constants: star.Constants | None  # None if it is not a STAR


def load_theta(path) -> Trained:
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
                f"{path} holds no theta of {name}: {key} is not {like.shape}"
            )
        if not np.isfinite(x).all():
            raise UserError(f"{path} holds a theta that is not finite")
    theta = {key: jnp.asarray(arrays[key]) for key in template}
    return Trained(theta, optimizer, None)


def read_card(path) -> dict:
    """The card inside a theta's `.npz`; {} where it has none."""
    try:
        card = json.loads(str(read_npz(path).get("card", "{}")))
    except ValueError:
        raise UserError(f"{path} has a card that is not JSON") from None
    return card if isinstance(card, dict) else {}
