"""What the pages (README.md and those beside it) name is there; type hints everywhere."""

import ast
import importlib
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import pytest

import eval as evaluation
import nqm
import settings
import tasks
from experiments import bench, sweep, tuning
from figures import __main__ as figures

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md", "docs/engineering.md", "docs/recipes.md")
README = "\n".join((ROOT / name).read_text() for name in PAGES)
MODULES = {path.stem for path in ROOT.glob("*.py")}


def parse_sweep(argv):
    args, rest = sweep.parse(argv)
    for name in args.only:
        settings.parse(["--task", args.task, *rest, *sweep.VARIANTS[name]])


# What each program makes of its arguments, without the work; nqm and tasks have none.
PARSERS = {
    "train": settings.parse,
    "eval": evaluation.parse,
    "figures": figures.parse,
    "sweep": parse_sweep,
    "tuning": tuning.parse,
    "bench": bench.parse,
    "nqm": nqm.main,
    "tasks": tasks.main,
}


def commands() -> list[str]:
    """Every `python ...` of all pages, once, inline or in a block, newlines undone."""
    inline = re.findall(r"`(python [^`]+)`", README)
    block = re.findall(r"^(python [^\n|]+)$", README, re.MULTILINE)
    found = [" ".join(command.split()) for command in inline + block]
    return [command for command in dict.fromkeys(found) if "..." not in command]


def test_the_two_commands_of_the_start_are_found():
    assert "python train.py --task fmnist" in commands()
    assert len(commands()) > 25
    assert "pip install -r requirements.txt" in README


@pytest.mark.parametrize("command", commands())
def test_command_is_one_the_program_takes(command):
    _, program, *argv = shlex.split(command)
    if program == "-m":
        program, *argv = argv
    assert PARSERS[program.removesuffix(".py").removeprefix("experiments.")](argv) != 2


def test_every_module_is_in_the_table_and_every_name_in_it_is_a_module():
    table = README[README.index("| file | one purpose |") :]
    cells = [row.split("|")[1] for row in table[: table.index("\n\n")].splitlines()[2:]]
    named = re.findall(r"`([\w*]+)\.py`", " ".join(cells))
    listed = {
        module
        for name in named
        for module in MODULES
        if re.fullmatch(name.replace("*", r"\w+"), module)
    }
    assert all(name.endswith("*") or name in MODULES for name in named)
    absent = {m for m in MODULES - listed if not m.startswith("test_")} - {"conftest"}
    assert not absent


@pytest.mark.parametrize(
    "name", sorted(m for m in MODULES if not m.startswith(("test_", "conftest")))
)
def test_every_function_has_type_hints(name):
    """Of every argument and the result, but for functions within functions."""
    body = ast.parse((ROOT / f"{name}.py").read_text()).body
    bodies = [body, *(c.body for c in body if isinstance(c, ast.ClassDef))]
    for function in (f for b in bodies for f in b if isinstance(f, ast.FunctionDef)):
        given = [*function.args.args, *function.args.kwonlyargs]
        given = [a for a in given if a.arg != "self"]
        assert function.returns, function.name
        assert all(a.annotation for a in given), function.name


def rows_of_the_map():
    table = README[README.index("| paper | function | test |") :]
    return [
        row.split("|")[1:4] for row in table[: table.index("\n\n")].splitlines()[2:]
    ]


def test_every_function_of_the_map_exists():
    """`module.name`; what is named alone belongs to a module named before it in the row,
    or to star.py, whose rows name its functions alone."""
    checked = 0
    for _, functions, _ in rows_of_the_map():
        modules = []
        for name in re.findall(r"`([a-zA-Z_][\w.]*)", functions):
            module, _, attribute = name.partition(".")
            if attribute and module in MODULES:
                modules.append(importlib.import_module(module))
            else:
                attribute = name
            owners = [*modules, importlib.import_module("star")]
            assert any(hasattr(owner, attribute) for owner in owners), name
            checked += 1
    assert checked > 50


def test_every_test_the_readme_names_exists():
    source = "\n".join(path.read_text() for path in ROOT.glob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)(?:\.py|\[\w+\])?`", README))
    assert len(names) > 50
    missing = {
        name for name in names if f"def {name}(" not in source and name not in MODULES
    }
    assert not missing


def test_every_link_and_path_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
    for path in re.findall(r"`((?:weights|images)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_optax_example_runs_as_it_stands(monkeypatch):
    """The block is executed with a small network of the reader's."""
    start = README.index("import jax, optax, star")
    example = README[start : README.index("```", start)]
    monkeypatch.chdir(ROOT)
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    names = {"params": params, "loss": lambda p: sum((x**2).sum() for x in p.values())}
    exec(example, names)
    assert names["loss"](names["params"]) < names["loss"](params)
    assert jax.tree.structure(names["params"]) == jax.tree.structure(params)
