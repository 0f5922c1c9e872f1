"""What README.md, docs/ and .ci/run name is there, and the house is as small as it says."""

import ast
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
from functools import partial

import pytest

import eval as evaluation
import experiments.train
import nqm
import train
from companions import gru, metz
from experiments import (
    bench,
    beta3,
    catalogue,
    claims,
    floor,
    search,
    suite,
    sweep,
    tuning,
)
from figures import __main__ as figures

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
TEXT = "\n".join(page.read_text() for page in PAGES)
FILES = [*ROOT.glob("*.py"), *ROOT.glob("[cefst]*/*.py")]
MODULES = {path.stem: path.relative_to(ROOT) for path in reversed(FILES)}
any_task = partial(train.parse, known=catalogue.TASKS)
# What each program makes of its arguments, without the work. nqm.py has little.
PARSERS = {
    "train.py": train.parse,
    "eval.py": evaluation.parse,
    "nqm.py": nqm.main,
    "figures": figures.parse,
    "experiments.train": partial(any_task, kind=experiments.train.Recipe),
    "experiments.suite": suite.parse,
    "experiments.search": search.parse,
    "experiments.sweep": lambda argv: any_task(sweep.parse(argv)[1]),
    "experiments.tuning": tuning.parse,
    "experiments.beta3": beta3.parse,
    "experiments.bench": bench.parse,
    "experiments.claims": lambda argv: argv and claims.page(),
    "experiments.floor": floor.parse,
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


def tables(page: pathlib.Path, header: str) -> list[list[str]]:
    """The cells of the rows of all tables of a page whose header begins so."""
    found = page.read_text().split("\n\n")
    rows = [row for x in found if x.startswith(header) for row in x.splitlines()[2:]]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def defined(path: pathlib.Path) -> dict[str, ast.stmt]:
    """What a module defines at its top: functions, classes, constants."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        names = (getattr(x, "id", getattr(x, "name", None)) for x in targets)
        found |= {name: node for name in names if name not in found}
    return found


def is_defined(text: str, path: pathlib.Path) -> bool:
    """text: file.py, module.name, module.name["key"] or test_name, of the file `path`."""
    if not path.is_file() or text.endswith(".py"):
        return path.is_file() and path.as_posix().endswith(f"/{text}")
    module, _, name = text.rpartition(".")
    name, *keys = re.findall(r"\w+", name)
    if name not in defined(path) or module not in ("", path.stem):
        return False
    nodes = ast.walk(defined(path)[name])
    return {*keys} <= {x.value for x in nodes if isinstance(x, ast.Constant)}


def test_every_module_is_named():
    """Those at the top by name, the others by their folder, on some page."""
    named = set(re.findall(r"`(?:\.\./)?([\w/.]+)`", TEXT))
    there = {path.name for path in ROOT.glob("[!tc]*.py")} | {"tasks.py", "train.py"}
    there |= {f"{path.parent.name}/" for path in FILES} - {f"{ROOT.name}/", "tests/"}
    assert not there - named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_link_names_is_defined_in_its_file(page):
    """Links from code, such as [`star.step`](../star.py)."""
    links = re.findall(r"\[`([^`]+)`\]\(([^)]+\.py)\)", page.read_text())
    missing = [x for x in links if not is_defined(x[0], (page.parent / x[1]).resolve())]
    assert not missing


def test_every_row_of_the_map_links_a_function_and_a_test():
    """And no row is there twice."""
    rows = tables(ROOT / "docs/map.md", "| paper | what | code | test |")
    link = r"\[`{}`\]\((\.\./)+[\w/]+\.py\)"
    for row in rows:
        assert re.fullmatch(link.format(r'\w+\.\w+(\["\w+"\])?'), row[2]), row
        assert re.fullmatch(link.format(r"test_\w+"), row[3]), row
    assert len(rows) > 100 and len({*map(tuple, rows)}) == len(rows)


def test_the_map_covers_the_equations_that_its_papers_number():
    """STAR's 1 to 22, and those of its companions that the code computes."""
    pages = (ROOT / "docs/map.md").read_text().split("\n## ")[1:5]
    found = [
        re.findall(r"^\|[^|]*eq\. ([^|]*)\|", page, re.MULTILINE) for page in pages
    ]
    found = [{int(n) for n in expand(" ".join(x))} for x in found]
    assert found[0] | found[1] == {*range(1, 23)}
    assert found[2:] == [{1}, {1, 2, 3, 4, 5}]


def expand(numbers: str) -> list[int]:
    """ "9, 10 15 to 17" -> [9, 10, 15, 16, 17]."""
    ranges = re.findall(r"(\d+)(?: to (\d+))?", numbers)
    return [n for a, b in ranges for n in range(int(a), int(b or a) + 1)]


def test_the_alphabet_has_each_letter_once_and_where_it_is():
    """Every file that a row links has its letter."""
    rows = tables(ROOT / "docs/map.md", "| letter | meaning | files |")
    letters = [row[0].strip("`") for row in rows]
    assert len(letters) > 30 and len({*letters}) == len(letters)
    for letter, *cells in rows:
        word = rf"(?<!\w){letter.strip('`')}(?![a-zA-Z0-9])"
        for path in re.findall(r"\((?:\.\./)+([\w/]+\.py)\)", " ".join(cells)):
            assert re.search(word, (ROOT / path).read_text()), (letter, path)


def test_every_test_that_is_named_exists():
    names = set(re.findall(r"`(test_\w+)(?:\.py|\[\w+\])?`", TEXT))
    tests = "".join(path.read_text() for path in FILES if "test_" in path.name)
    missing = names - {*re.findall(r"\bdef (test_\w+)", tests), *MODULES}
    assert len(names) > 50 and not missing


def test_every_link_and_path_exists():
    named = r"`((?:weights|docs|tests|experiments|companions|figures)/[\w./-]*)`"
    found = [ROOT / path for path in re.findall(named, TEXT)]
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        links = re.findall(r"\]\((?!http)([^)#]+)", text)
        found += [page.parent / link for link in links]
    missing = [path for path in found if not path.exists()]
    assert len(found) > 10 and not missing


def anchors_of(page) -> set[str]:
    """Of the headings of a page, as a code host makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x).lower().replace(" ", "-") for x in headings}


def test_every_anchor_exists():
    found = []
    for page in PAGES:
        for path, anchor in re.findall(
            r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()
        ):
            target = page.parent / path if path else page
            found += [(page.name, path, anchor, anchor in anchors_of(target))]
    assert len(found) > 30 and all(there for *_, there in found), found


def test_the_house_is_small():
    """Files at the top, flags beside the four of --distributed, modules of train.py."""
    assert len(list(ROOT.glob("*.py"))) <= 16
    assert sum(bool(field.metadata) for field in dataclasses.fields(train.Recipe)) <= 29
    code = "import sys, train; print(*(str(m) for m in [*sys.modules.values()]))"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert 3 < sum(f"'{path}'" in loaded for path in FILES) <= 9


def sentences(page: pathlib.Path) -> list[str]:
    """Without code. A cell of a table, a heading and an item of a list end one, too."""
    text = re.sub(r"```.*?```|^    .*$", "", page.read_text(), flags=re.M | re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " x ", text)
    text = re.sub(r"^ *([-*#>]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    parts = re.split(r"\n\n|\||[.!?]\)?\*{0,2}\s", text)
    return [part for part in parts if re.search(r"[a-z]", part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_longer_than_forty_words(page):
    """And half of them have at most eighteen."""
    words = [len(re.findall(r"[\w']*[a-zA-Z]\w*", x)) for x in sentences(page)]
    longest = sentences(page)[max(range(len(words)), key=words.__getitem__)]
    assert max(words) <= 40, longest
    assert sorted(words)[len(words) // 2] <= 18


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150 and len(text.split()) <= 1200
