"""What the command lines of the experiments share: their look, their errors and their status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

USER_ERROR, INTERRUPTED = 2, 130


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
    given = parser.parse_args(arguments)
    try:
        getattr(import_module(commands), f"{given.command}_command")(given)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; nothing is lost, and the same command goes on from here",
            file=sys.stderr,
        )
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError) as error:
        if given.debug:
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0
