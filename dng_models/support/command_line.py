"""Shared by the experiments' command lines: help layout, error messages and exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from dng_models.support import extras, foreign
from dng_models.support.interrupt import INTERRUPTED
from dng_models.support.printable import print_anything
from dng_models.support.progress import saying_what_compiles, showing

FAILED, USER_ERROR = 1, 2
LONGEST = 4000  # characters of an error message that are printed


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter that keeps the line breaks of descriptions and is 100 columns wide."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def commands_of(
    program: str, description: str, epilog: str
) -> tuple[argparse.ArgumentParser, Callable[..., argparse.ArgumentParser]]:
    """Make a parser with subcommands, and the function that adds a subcommand to it.

    Parameters
    ----------
    program : str
        The program's name as the user types it.
    description, epilog : str
        Text before and after the list of commands in the program's help.

    Returns
    -------
    parser : ArgumentParser
    command : callable
        ``command(name, text, examples, needs="")`` adds a command and returns its parser.
        ``examples`` has one line of options for each example call; ``needs`` is shown in the usage
        before the options.
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
    """Show progress and compilation in the main process only; hide the torchvision message."""
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
    """Parse the arguments, run ``NAME_command`` of a module, and return the exit status.

    Parameters
    ----------
    program : str
        The program's name as the user types it.
    parser : ArgumentParser
        From :func:`commands_of`; every command must have an option ``--debug``.
    commands : str
        Name of the module with the functions, where hyphens of NAME are underscores; it is
        imported after the arguments are parsed.
    arguments : sequence of str, optional
        Default: the arguments of this process.

    Returns
    -------
    int
        0 for success, 130 after Ctrl-C, else as :func:`status`.

    Raises
    ------
    Exception
        Every error with ``--debug``; without it, only those that point to a fault in the program.
    """
    print_anything()
    given = parser.parse_args(arguments)
    try:
        with what_is_said(getattr(given, "quiet", False)):
            name = given.command.replace("-", "_")
            getattr(import_module(commands), f"{name}_command")(given)
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

    1 means that the machine failed (disk full, folder not writable, out of memory): the same
    command may succeed later.  2 means that the input is wrong.
    """
    return FAILED if foreign.is_failure(error) else USER_ERROR
