"""Print constraints that ask for the oldest release of every dependency in pyproject.toml, for `make test-oldest`.

python tools/oldest.py [EXTRA ...] > constraints.txt
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def oldest(extras: list[str]) -> list[str]:
    """`name==bound`, torch aside: its old releases without a GPU's libraries are in no package index but its own.

    Raises ValueError for a dependency without a lower bound, KeyError for an unknown extra.
    """
    project = tomllib.loads(PROJECT.read_text())["project"]
    needed = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    found = []
    for one in needed:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)(,.*)?", one)
        if not match:
            raise ValueError(f"{one} in pyproject.toml has no lower bound")
        if match[1] != "torch":
            found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    print("\n".join(oldest(sys.argv[1:])))
