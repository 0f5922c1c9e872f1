"""docs/walkthrough.md: its blocks run in order and print what the page shows."""

import contextlib
import io
import pathlib
import re
from decimal import Decimal

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/walkthrough.md").read_text()
# A block of code, and the block right after it, which holds what the code prints.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n^```\n(.*?)^```\n)?", re.M | re.S)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def agree(shown: str, printed: str) -> bool:
    """The same words, and the same numbers to 1.5 units of the last digit shown.

    Whole numbers must be equal. Spaces do not count.
    """
    words = [NUMBER.sub("#", text).split() for text in (shown, printed)]
    if words[0] != words[1]:
        return False
    numbers = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(abs(Decimal(a) - Decimal(b)) <= slack(a) for a, b in numbers)


def slack(number: str) -> Decimal:
    whole = number.lstrip("-").isdigit()
    unit = Decimal(1).scaleb(Decimal(number).as_tuple().exponent)
    return Decimal(0) if whole else Decimal("1.5") * unit


@pytest.mark.heavy
def test_every_block_prints_what_the_page_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    space, wrong = {"__name__": "walkthrough"}, []
    for block in BLOCK.finditer(TEXT):
        code, shown = block.groups(default="")
        line, out = TEXT[: block.start()].count("\n") + 1, io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, "docs/walkthrough.md", "exec"), space)
        if not agree(shown, out.getvalue()):
            wrong.append(f"line {line} shows\n{shown}and prints\n{out.getvalue()}")
    assert not wrong, "\n".join(wrong)


def test_every_stop_is_short_and_has_something_to_try():
    """Ten stops, each with a "Try this" and its answer; no block above 15 lines."""
    stops = re.split(r"^## \d+\. ", TEXT, flags=re.M)[1:]
    assert len(stops) == 10
    for stop in stops:
        found = BLOCK.findall(stop)
        assert stop.count("**Try this.**") == stop.count("<details>") == 1
        assert len(found) >= 2 and all(shown for _, shown in found[-1:])
        assert all(len(re.findall(r"^.*\S", code, re.M)) <= 15 for code, _ in found)


@pytest.mark.parametrize(
    "shown, printed, same",
    [
        ("mean 3.5", "mean  3.6", True),
        ("mean 3.5", "mean 7.0", False),
        ("mean 3.5", "median 3.5", False),
        ("39 features", "38 features", False),
        ("2.4e+08", "2.5e+08", True),
        ("2.4e+08", "2.4e+09", False),
        ("1.6 2.3", "2.3 1.6", False),
    ],
)
def test_numbers_agree_to_the_digits_shown(shown, printed, same):
    assert agree(shown, printed) == same
