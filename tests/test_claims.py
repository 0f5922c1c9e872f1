"""docs/claims.md says what the result files say, and so do the tables of README.md."""

import json
import pathlib
import re

import numpy as np
import pytest

from experiments import claims
from store import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = [*claims.claims()]
FILES = [*ROOT.glob("weights/**/*.json"), *ROOT.glob("experiments/results/*.json")]
VERDICT = r"holds|holds here but .+|does not hold here.*|not tried"


class Watched(dict):
    """It writes down the keys that are asked for."""

    asked: set = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)


def without(key, x):
    """x, nested lists and dicts as read from a file, without a key."""
    if isinstance(x, dict):
        return Watched({k: without(key, v) for k, v in x.items() if k != key})
    return [without(key, v) for v in x] if isinstance(x, list) else x


def reader(key):
    return lambda name: without(key, claims.read(name))


def test_the_page_is_what_the_files_say():
    """Else `python -m experiments.claims` has to be run."""
    assert claims.PAGE.read_text() == claims.page()


def test_every_row_has_a_verdict_and_a_source():
    """A verdict is one of four. A source gives numbers, or is a command for tests."""
    used = {source for *_, sources in ROWS for source in sources}
    assert {*claims.NUMBERS} <= used and len(ROWS) > 35
    assert all(x.startswith("pytest ") for x in used - {*claims.NUMBERS})
    for *_, claim, verdict, sources in ROWS:
        assert re.fullmatch(VERDICT, verdict), claim
        assert bool(sources) == (verdict != "not tried"), claim


def test_every_file_is_there_and_small():
    """Every linked file exists, and every result file has its command."""
    links = re.findall(r"\]\(([^)#]+)", claims.PAGE.read_text())
    assert len(links) > 100 and all((ROOT / "docs" / x).exists() for x in links)
    for path in ROOT.glob("experiments/results/*.json"):
        name = path.relative_to(ROOT).as_posix()
        assert path.stat().st_size < 16 * 1024
        assert claims.COMMANDS.get(name) or json.loads(path.read_text())["command"]


@pytest.mark.parametrize("name", claims.NUMBERS)
def test_a_number_whose_key_is_missing_is_an_error(name, monkeypatch):
    """Each key that a function asks for is taken away in turn."""
    monkeypatch.setattr(Watched, "asked", set())
    lines = [*claims.NUMBERS[name](reader(None))]
    asked = sorted(Watched.asked)
    assert lines and asked
    for key in asked:
        with pytest.raises((LookupError, ValueError)):
            [*claims.NUMBERS[name](reader(key))]


def test_a_run_that_is_missing_is_an_error():
    with pytest.raises(FileNotFoundError):
        [*claims.losses("star_wd9")(claims.read)]


def test_what_is_kept_of_a_figure(tmp_path, monkeypatch):
    """Six digits, the ends of long lists, the command and the machine; not of --quick."""
    (tmp_path / claims.RESULTS).mkdir(parents=True)
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    path, real = tmp_path / "3.json", {"quick": False, "stand_in": False}
    for flag in real:
        path.write_text(json.dumps(real | {flag: True}))
        with pytest.raises(UserError, match="stand-in"):
            claims.keep(str(path), "python -m figures 3")
    x = {"task": "fmnist", "short": [1 / 3, None], "long": [*np.linspace(2, 1, 21)]}
    path.write_text(json.dumps(real | x))
    claims.keep(str(path), "python -m figures 3")
    found = claims.read(f"{claims.RESULTS}/figure_3_fmnist.json")
    assert found.pop("machine") and found.pop("command") == "python -m figures 3"
    ends = {"first": 2.0, "last": 1.0, "least": 1.0, "greatest": 2.0}
    assert found == real | x | {"short": [0.333333, None], "long": ends}


def numbers_of(x) -> list[float]:
    """All numbers of nested lists and dicts."""
    if isinstance(x, (dict, list)):
        values = x.values() if isinstance(x, dict) else x
        return [number for value in values for number in numbers_of(value)]
    return [float(x)] if isinstance(x, (int, float)) else []


def decimals_of(page: str) -> list[str]:
    """Of the rows of tables: what has three decimals or more, such as .320 or 0.3204.

    Fewer decimals would agree with some file by chance.
    """
    rows = "\n".join(re.findall(r"^\|.*", page, re.MULTILINE))
    return re.findall(r"(?<![\w.])\d*\.\d{3,}(?![\w.]|\.\d)", rows)


def not_in_a_file(page: str) -> list[str]:
    """Decimals that neither a result file nor the table of claims rounds to."""
    known = [numbers_of(json.loads(path.read_text())) for path in FILES]
    known += [numbers_of(json.loads((ROOT / "experiments/tuned.json").read_text()))]
    known += [[*map(float, decimals_of(claims.PAGE.read_text()))]]
    known = np.array(sum(known, []))

    def near(text):
        half = 0.5 * 10.0 ** -len(text.partition(".")[2])
        return np.abs(known - float(text)).min() <= half * (1 + 1e-6)

    return [text for text in decimals_of(page) if not near(text)]


def test_a_number_that_no_file_holds_is_found():
    table = "| .3204 | 0.123456 | 12 % |\n| .32 +- .97654321 | 0.10.2 |\nnot .7654321"
    assert decimals_of(table) == [".3204", "0.123456", ".97654321"]
    assert not_in_a_file(table)[-1] == ".97654321"


def test_numbers_of_the_readme_are_in_a_file():
    """Those in its tables that have three decimals or more."""
    assert not not_in_a_file((ROOT / "README.md").read_text())
