"""What was looked at, how it is, and what to do about it; and how that is shown."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

State = Literal["good", "note", "wrong"]
MARKS: dict[State, tuple[str, str, str]] = {
    "good": ("✓", "green", "ok"),
    "note": ("!", "yellow", "note"),
    "wrong": ("✗", "red", "WRONG"),
}
"""On a terminal: sign and colour; elsewhere a word."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `do` is a command to run, or what else helps."""

    name: str
    state: State
    told: str
    do: str = ""


def command(*words: str | Path) -> str:
    """A command of ours as it can be pasted into a shell."""
    return shlex.join(["compresso", *map(str, words)])


def show(title: str, findings: Sequence[Finding], console: Console) -> None:
    """Print a list of findings: a table with coloured marks on a terminal, else a line each."""
    if not console.is_terminal:
        width = max((len(finding.name) for finding in findings), default=0)
        print_plainly(console, title)
        for finding in findings:
            print_plainly(console, f"  {MARKS[finding.state][2]:<5}  {finding.name:<{width}}  {finding.told}".rstrip())
        print_plainly(console, "")
        return
    table = Table(title=Text(title, "bold"), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(width=1)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    plain = not console.encoding.startswith("utf")
    for finding in findings:
        sign, colour, word = MARKS[finding.state]
        told = Text(finding.told, "" if finding.state == "good" else colour)
        table.add_row(Text(word[0] if plain else sign, colour), Text(finding.name), told)
    console.print(table, "", sep="\n")


def show_what_to_do(findings: Sequence[Finding], console: Console) -> None:
    """Print the advice of all that is not good, each once."""
    advice = dict.fromkeys(f"{finding.name}: {finding.do}" for finding in findings if finding.do)
    if advice:
        print_plainly(console, "What to do")
        for line in advice:
            print_plainly(console, f"  {line}")


def print_plainly(console: Console, line: str) -> None:
    """As it is, so that a command can be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
