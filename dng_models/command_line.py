"""What the command lines of the experiments share: their look, their errors and their status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from dng_models import extras, foreign
from dng_models.printable import print_anything
from dng_models.progress import saying_what_compiles, showing

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
LONGEST = 4000  # characters of an error


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, a hundred columns wide."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def commands_of(
    program: str, description: str, epilog: str
) -> tuple[argparse.ArgumentParser, Callable[..., argparse.ArgumentParser]]:
    """A parser of commands, and what adds one: ``command(name, text, examples, needs="")``.

    Parameters
    ----------
    program : str
        As the user starts it.
    description, epilog : str
        Of its help.  The examples of a command are the options of one call a line; ``needs`` is
        what its usage shows before the options.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} COMMAND [option ...]",
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )

    def command(name: str, text: str, examples: str, needs: str = "") -> argparse.ArgumentParser:
        shown = "\n".join(f"  {program} {name} {line}".rstrip() for line in examples.splitlines())
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            prog=f"{program} {name}",
            usage=f"{program} {name} {needs}[option ...]",
            description=text,
            epilog=f"examples:\n{shown}",
            formatter_class=Formatter,
        )
        return added

    return parser, command


@contextmanager
def what_is_said(quiet: bool) -> Iterator[None]:
    """Progress and compilation of one process of several, and nothing about torchvision."""
    shown = not quiet and os.environ.get("RANK", "0") == "0"
    extras.hush_torchvision()
    with showing(shown), saying_what_compiles(shown):
        yield


def run(
    program: str,
    parser: argparse.ArgumentParser,
    commands: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run ``NAME_command(arguments)`` of a module, imported only now; returns the exit status.

    Parameters
    ----------
    program : str
        As the user started it.
    parser : ArgumentParser
        Of :func:`commands_of`, with an option ``--debug`` in every command.
    commands : str
        The module.
    arguments : sequence of str, optional
        Default: those of this process.
    """
    print_anything()
    given = parser.parse_args(arguments)
    try:
        with what_is_said(getattr(given, "quiet", False)):
            getattr(import_module(commands), f"{given.command}_command")(given)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; nothing is lost, and the same command goes on from here",
            file=sys.stderr,
        )
        return INTERRUPTED
    except Exception as error:
        if given.debug or not foreign.is_expected(error):
            raise
        if isinstance(error, ImportError):
            error = ImportError(extras.told("it", error, "models"))
        print(f"{program}: error: {foreign.reason(error, LONGEST)}", file=sys.stderr)
        return status(error)
    return 0


def status(error: BaseException) -> int:
    """The exit status of an error, the same for all command lines.

    1 is of the machine (a disk that is full, a folder that may not be written to, no memory), where
    the same command may do on another day; 2 is of what was given.
    """
    return FAILED if foreign.is_failure(error) else USER_ERROR
