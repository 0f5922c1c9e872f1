"""Meta-train on any task of the catalogue: python -m experiments.train --task lstm_small

All flags are those of train.py.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import ClassVar

import train
from experiments.catalogue import TASKS
from store import run_command


@dataclasses.dataclass(frozen=True)
class Recipe(train.Recipe):
    program: ClassVar[str] = "-m experiments.train"


def main(argv: Sequence[str] | None = None) -> int:
    return train.main(argv, Recipe, TASKS)


if __name__ == "__main__":
    sys.exit(run_command("train", main))
