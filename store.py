"""Files of a run: trees as `.npz` arrays by path, written whole or not at all."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np


class UserError(Exception):
    """One line for the user on stderr, exit code 2."""


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
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} cannot be read as a .npz file: {reason}") from None


def write_atomically(path: pathlib.Path, write) -> None:
    """write(file) to a temporary file beside path, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
