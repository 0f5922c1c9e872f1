"""What README.md, docs/ and .ci/run name is there, and the house is as small as it says."""

import dataclasses
import importlib
import pathlib
import re
import shlex
import subprocess
import sys
from functools import partial

import pytest

import eval as evaluation
import nqm
import train
from companions import gru, metz
from experiments import bench, catalogue, search, suite, sweep, tuning
from figures import __main__ as figures

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
TEXT = "\n".join(page.read_text() for page in PAGES)
FILES = [*ROOT.glob("*.py"), *ROOT.glob("[cefst]*/*.py")]
MODULES = {path.stem: path.relative_to(ROOT) for path in reversed(FILES)}
any_task = partial(train.parse, known=catalogue.TASKS)
# What each program makes of its arguments, without the work; nqm.py has little.
PARSERS = {
    "train.py": train.parse,
    "eval.py": evaluation.parse,
    "nqm.py": nqm.main,
    "figures": figures.parse,
    "experiments.train": any_task,
    "experiments.suite": suite.parse,
    "experiments.search": search.parse,
    "experiments.sweep": lambda argv: any_task(sweep.parse(argv)[1]),
    "experiments.tuning": tuning.parse,
    "experiments.bench": bench.parse,
    "experiments.catalogue": lambda argv: argv and pytest.fail("it has no flags"),
    "companions.gru": partial(any_task, kind=gru.Recipe),
    "companions.metz": partial(any_task, kind=metz.Recipe),
}


def commands() -> list[str]:
    """Every `python ...` once, inline or in a block, newlines undone."""
    found, ci = re.findall(r"`(python [^`]+)`", TEXT), (ROOT / ".ci/run").read_text()
    found += re.findall(r"^ *(python [^\n|>]+)", f"{TEXT}\n{ci}", re.MULTILINE)
    found = dict.fromkeys(" ".join(command.split()) for command in found)
    return [c for c in found if not re.search(r"\.\.\.|NAME|\$figure|shared", c)]


def test_the_commands_of_the_start_are_found():
    assert "python train.py --task fmnist" in commands() and len(commands()) > 25
    assert "pip install -r requirements.txt" in TEXT


@pytest.mark.parametrize("command", commands())
def test_command_is_one_the_program_takes(command):
    """Parsed, not run."""
    _, program, *argv = shlex.split(command)
    if program == "-m":
        program, *argv = argv
    PARSERS[program](argv)


def rows(header: str) -> list[list[str]]:
    """The cells of the table that begins so."""
    table = TEXT[TEXT.index(header) :].split("\n\n")[0]
    return [row.split("|")[1:-1] for row in table.splitlines()[2:]]


def test_every_module_is_in_the_table():
    """Those at the top by name, the others by their folder."""
    named = set(re.findall(r"`([\w/.]+)`", str(rows("| file | one purpose |"))))
    there = {path.name for path in ROOT.glob("[!tc]*.py")} | {"tasks.py", "train.py"}
    there |= {f"{path.parent.name}/" for path in FILES} - {f"{ROOT.name}/", "tests/"}
    assert not there - named and {x[:-3] for x in named if x.endswith(".py")} <= set(
        MODULES
    )


def test_every_function_of_the_map_exists():
    """`module.name`; what is named alone belongs to a module named before it in the row."""
    missing = []
    for _, functions, _ in rows("| paper | function | test |"):
        owners = []
        for name in re.findall(r"`([a-zA-Z_][\w.]*)", functions):
            module, _, attribute = name.rpartition(".")
            if module:
                dotted = ".".join(MODULES[module].with_suffix("").parts)
                owners.append(importlib.import_module(dotted))
            if not any(hasattr(owner, attribute) for owner in owners):
                missing.append(name)
    assert not missing


def test_every_test_that_is_named_exists():
    names = set(re.findall(r"`(test_\w+)(?:\.py|\[\w+\])?`", TEXT))
    tests = "".join(path.read_text() for path in FILES if "test_" in path.name)
    missing = names - {*re.findall(r"\bdef (test_\w+)", tests), *MODULES}
    assert len(names) > 50 and not missing


def test_every_link_and_path_exists():
    named = r"`((?:weights|docs|tests|experiments|companions|figures)/[\w./-]*)`"
    found = [ROOT / path for path in re.findall(named, TEXT)]
    for page in PAGES:
        links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
        found += [page.parent / link for link in links]
    missing = [path for path in found if not path.exists()]
    assert len(found) > 10 and not missing


def test_the_house_is_small():
    """Files at the top, flags beside the four of --distributed, modules of train.py."""
    assert len(list(ROOT.glob("*.py"))) <= 16
    assert sum(bool(field.metadata) for field in dataclasses.fields(train.Recipe)) <= 29
    code = "import sys, train; print(*(str(m) for m in [*sys.modules.values()]))"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert 3 < sum(f"'{path}'" in loaded for path in FILES) <= 9
