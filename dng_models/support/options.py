"""Options of an experiment, each declared once, as a field of a frozen dataclass.

::

    @settings
    class Config:
        '''What decides a run.'''

        steps: int = option(50, "steps of the sampler", check=integer(1, 1000))

        def __post_init__(self) -> None:
            check(self)

The field's annotation and the arguments of :func:`option` give the description in the docstring of
the class (:func:`settings`), the check of a value (:func:`check`) and the argument of a command
line (:func:`add`).  An annotation is ``str``, ``int``, ``float``, ``bool``, a ``Literal`` of
strings, or a tuple of any length of one of these; with ``| None`` it is optional.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from dng_math import checks

T = TypeVar("T")
Check = Callable[[str, Any], Any]
METAVARS = {int: "N", float: "X", str: "NAME"}

# ---------------------------------------------------------------------- checks


def integer(low: int, high: int | None = None) -> Check:
    """Check of an integer from low to high, both included."""
    return lambda name, value: checks.integer(name, value, low, high)


def between(low: float, high: float, closed: str) -> Check:
    """Check of a real number between two; ``closed`` tells which ends belong: "[]", "[)", ..."""
    allowed = f"in {closed[0]}{low:g}, {high:g}{closed[1]}"
    return lambda name, value: checks.real(name, value, allowed, low, high, closed=closed)


def text(name: str, value: object) -> str:
    """Check of a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {checks.shown(value)}")
    return value


CHECKS: dict[type, Check] = {str: text, float: checks.finite, bool: checks.boolean}

# ---------------------------------------------------------------------- declarations


def option(
    default: T,
    help: str,
    *,
    check: Check | None = None,
    metavar: str | None = None,
    shown: str | None = None,
) -> T:
    """Declare a field of a class that is decorated with :func:`settings`.

    Parameters
    ----------
    default : object
        Value of the field where none is given.
    help : str
        Meaning of the field, without its default.
    check : callable, optional
        ``check(name, value)`` returns the value in the field's type or raises an error that names
        the field.  None is not passed to the check of an optional field.  Default: by type, one of
        the choices of a ``Literal``, a string, a finite number, or True or False.  Integers and
        tuples need a check.
    metavar : str, optional
        Placeholder of the value in the help.  Default: NAME, N (int) or X (float).
    shown : str, optional
        Words for the default.  Default: the value, but nothing for None, False and ().
    """
    metadata = {"help": help, "check": check, "metavar": metavar, "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass, and append its options to its docstring.

    Parameters
    ----------
    cls : type
        Class whose fields are all declared by :func:`option`.  Its ``__post_init__`` calls
        :func:`check`.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    made._options = _read(made)
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Parameters", "----------"]
    for each in made._options.values():
        meaning = each.text()
        wrapped = textwrap.wrap(f"{meaning[0].upper()}{meaning[1:]}.", 88, break_on_hyphens=False)
        lines += [f"{each.name} : {each.type_text}", *(f"    {line}" for line in wrapped)]
    lines += ["", "Raises", "------", "ValueError, TypeError"]
    lines += ["    Naming the field, its value and what is allowed."]
    made.__doc__ = "\n".join(lines)
    return made


def check(values: Any) -> None:
    """Check every option of a new object, and convert its values to the types of the fields.

    1 and 1.0 become the same float, so that equal settings have equal JSON.

    Raises
    ------
    ValueError, TypeError
        Naming the first field that is wrong, its value and what is allowed.
    """
    for name, each in values._options.items():
        object.__setattr__(values, name, each.checked(getattr(values, name)))


@dataclasses.dataclass(frozen=True)
class _Option:
    """What is declared of a field; ``kind`` is the type of its value or of a tuple's elements."""

    name: str
    default: Any
    kind: type
    choices: tuple[str, ...]
    several: bool
    optional: bool
    help: str
    check: Check | None
    metavar: str | None
    shown: str | None

    @property
    def type_text(self) -> str:
        """The type as NumPy's docstrings have it."""
        listed = ", ".join(f'"{each}"' for each in self.choices)
        one = f"{{{listed}}}" if self.choices else self.kind.__name__
        return "tuple of " * self.several + one + ", optional" * self.optional

    def text(self, help: str | None = None, shown: str | None = None) -> str:
        """The meaning of the option and its default, or others instead."""
        shown = self.shown if shown is None else shown
        if shown is None and not (self.default is None or self.default is False):
            values = self.default if self.several else (self.default,)
            shown = " ".join(map(str, values))
        return (self.help if help is None else help) + (f" (default: {shown})" if shown else "")

    def checked(self, value: Any) -> Any:
        """The value in the type of the field."""
        if value is None and self.optional:
            return None
        if self.check is not None:
            return self.check(self.name, value)
        if self.choices:
            return checks.choice(self.name, value, self.choices)
        return CHECKS[self.kind](self.name, value)


def _read(cls: Any) -> dict[str, _Option]:
    """The options of a class by their names."""
    hints = get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        optional = NoneType in get_args(hint)
        if optional:
            (hint,) = (each for each in get_args(hint) if each is not NoneType)
        several = get_origin(hint) is tuple
        if several:
            hint = get_args(hint)[0]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        kind = str if choices else hint
        found[field.name] = _Option(
            field.name, field.default, kind, choices, several, optional, **field.metadata
        )
    return found


# ---------------------------------------------------------------------- command lines


def add(
    group: Any,
    cls: Any,
    *names: str,
    flag: str | None = None,
    help: str | None = None,
    shown: str | None = None,
    **arguments: Any,
) -> None:
    """Add options of a class to a command line; the namespace has those that are given.

    Parameters
    ----------
    group : argparse.ArgumentParser or group of one
        To which the arguments are added.
    cls : type
        Class that was decorated with :func:`settings`.
    *names : str
        Fields, in the order of the help.
    flag : str, optional
        Name on the command line.  Default: two hyphens and the name of the destination.
    help, shown : str, optional
        What this command says instead of the option's own meaning and default; ``shown=""`` shows
        no default.
    **arguments
        Arguments of ``add_argument`` that differ from the derived ones.
    """
    for name in names:
        each = cls._options[name]
        given: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if each.kind is bool:
            given["action"] = "store_true"
        elif each.choices:
            given["choices"] = each.choices
        else:
            given |= {"type": each.kind, "metavar": each.metavar or METAVARS[each.kind]}
        if each.several:
            given["nargs"] = "+"
        given |= {"help": each.text(help, shown), **arguments}
        group.add_argument(flag or "--" + given["dest"].replace("_", "-"), **given)


def add_interval(group: Any, flag: str) -> None:
    """Add the pair of options ``t_lo`` and ``t_hi`` of an experiment, as ``interval``."""
    group.add_argument(
        flag,
        dest="interval",
        nargs=2,
        type=float,
        metavar=("LO", "HI"),
        help="guide only at these diffusion times; 1 is the noisy end (default: 0 1)",
    )


def run_group(parser: argparse.ArgumentParser, folder: str, *, device: bool = True) -> Any:
    """Add a group of options that no result depends on: ``--out`` and, if asked for, ``--device``.

    Parameters
    ----------
    parser : ArgumentParser
        Parser of a command.
    folder : str
        Words for the default of ``--out``.
    device : bool
        Whether the command computes on a device.

    Returns
    -------
    group of the parser
        For further options.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the run (default: {folder})"
    )
    if device:
        group.add_argument(
            "--device",
            metavar="NAME",
            help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)",
        )
    return group
