"""Meta-train on any task of the catalogue: python -m experiments.train --task lstm_small

All flags are those of train.py.
"""

import sys
from collections.abc import Sequence

import train
from experiments.catalogue import TASKS
from store import run_command


def main(argv: Sequence[str] | None = None) -> int:
    return train.main(argv, tasks=TASKS)


if __name__ == "__main__":
    sys.exit(run_command("train", main))
