"""Meta-train on any task of the catalogue: python -m experiments.train --task lstm_small

The flags are those of train.py, and more of STAR's constants.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import ClassVar

import star
import train
from experiments.catalogue import TASKS
from store import run_command


@dataclasses.dataclass(frozen=True)
class Recipe(train.Recipe):
    program: ClassVar[str] = "-m experiments.train"
    nominal: str | None = train.flag(None, "nominal term", choices=[*star.NOMINAL])
    beta1: float | None = train.flag(None, "size of its step; None: the optimizer's")
    nominal_eps: float | None = train.flag(None, "floor of its v^2")
    rms_eps: float | None = train.flag(None, "floor of v^2 in the rest of the update")


def main(argv: Sequence[str] | None = None) -> int:
    return train.main(argv, Recipe, TASKS)


if __name__ == "__main__":
    sys.exit(run_command("train", main))
