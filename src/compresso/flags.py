"""Settings as command-line flags: each docstring one paragraph, lists written as users type them."""

import ast
import inspect
import itertools
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro


def flags_of(settings: type) -> type:
    """A dataclass with the fields of `settings` for the parser.

    It checks nothing, so that the parser does not print our messages in its own way.
    """
    said = _docstrings(settings)
    hints = {
        name: Annotated[hint, tyro.conf.arg(help=said.get(name), metavar=_metavar(hint))]
        for name, hint in get_type_hints(settings).items()
    }
    members = {"__annotations__": hints, "__module__": settings.__module__, "__post_init__": lambda self: None}
    return dataclass(frozen=True)(type(settings.__name__, (settings,), members))


def _docstrings(settings: type) -> dict[str, str]:
    """What stands after each field, its lines joined."""
    (definition,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def _metavar(hint: Any) -> str | None:
    """What a value is shown as; None leaves it to the parser."""
    if get_origin(hint) is tuple:
        return "A,B,..."
    of = get_args(hint)
    return of[0].__name__.upper() if of[1:] == (NoneType,) else None
