"""Print docs/dependencies.md: what we depend on directly, from pyproject.toml and the metadata of what is installed.

python tools/dependencies.py > docs/dependencies.md
"""

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
HEAD = """\
# Dependencies

What Compresso depends on directly, with the licence that each package states of itself in the release that is named.
Written by `make dependencies` from the metadata of the installed packages; what these depend on in turn is not listed.
`make test-oldest` runs a part of the tests with the oldest release of each but torch and those for development.

| package | for | needed | looked at | licence |
|---|---|---|---|---|"""


def licence(name: str) -> tuple[str, str]:
    """The release that is installed, and its licence: the expression, else classifiers, else a text's first line.

    Raises PackageNotFoundError if the package is not installed.
    """
    about = metadata(name)
    classified = [one.split(" :: ") for one in about.get_all("Classifier") or []]
    classifiers = [parts[-1] for parts in classified if parts[0] == "License"]
    stated = about.get("License-Expression") or ", ".join(c for c in classifiers if c != "OSI Approved")
    return about["Version"], stated or (about.get("License") or "not stated").strip().splitlines()[0]


def rows() -> list[str]:
    project = tomllib.loads(PROJECT.read_text())["project"]
    parts = {"running": project["dependencies"], **project["optional-dependencies"]}
    found = []
    for part, listed in parts.items():
        for requirement in map(Requirement, listed):
            if requirement.name != project["name"]:
                version, terms = licence(requirement.name)
                use = part if part == "running" else f"`[{part}]`"
                found.append(f"| {requirement.name} | {use} | {requirement.specifier or 'any'} | {version} | {terms} |")
    return found


if __name__ == "__main__":
    try:
        print(HEAD, *rows(), sep="\n")
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; `make setup` installs all of them") from None
