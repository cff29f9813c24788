"""``python -m benchmarks COMMAND``: time one thing, print a table, write a CSV."""

from __future__ import annotations

import argparse
import errno
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dng_models.support import command_line, extras
from dng_models.support.interrupt import end_at_interrupt
from dng_models.support.printable import print_anything
from dng_models.support.progress import say, saying_what_compiles, showing

if __name__ == "__main__":
    end_at_interrupt()  # before the imports that take seconds

from benchmarks.harness import AnyRow, Settings, machine, read_csv, table, write_csv

# Modules of this package, imported on demand, because each needs the packages that it measures.
# Each has PARTS and the type of their rows, ROW; it may have named_devices(), further columns about
# the machine, report() and draw() for all its rows, shown(), what is printed of a part's, and UNIT,
# the columns of what is measured, and resumed, as one.
COMMANDS = {
    "start": "imports of each package, and first uses in new processes",
    "host": "what the host does to start a step on a GPU, without one",
    "mixture": "exact mixtures on the CPU, against NumPy, SciPy, scikit-learn, torch and JAX",
    "step": "one step, against the published sequence and plain torch, eager and compiled",
    "overhead": "the share of the guidance step in a whole sampling step with a UNet",
    "loop": "a whole run of many steps, as one CUDA graph too, against the published one",
    "league": "no times: every rule at every strength, against the exact truth (docs/league.md)",
}

# Not benchmarks/results: the committed results there, which documents quote, are of one machine.
OUT = Path("benchmarks/out")


def first_line(function: object) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def subject(row: AnyRow) -> str:
    """What a row is about, from those of these columns that its table has."""
    names = ("benchmark", "network", "batch", "case", "dtype", "contender", "mode")
    return ", ".join(str(getattr(row, name)) for name in names if hasattr(row, name))


def say_what_there_is() -> None:
    """Print every command and its parts."""
    for name, summary in COMMANDS.items():
        print(f"{name}: {summary}")
        try:
            parts = import_module(f"benchmarks.{name}").PARTS
        except ImportError as error:
            print(f"    not here: {extras.told(name, error, 'models')}")
            continue
        for part, function in parts.items():
            print(f"    {part}: {first_line(function)}")


def check_writable(*paths: Path) -> None:
    """Make the folder of the files, and raise OSError if they cannot be written."""
    for path in paths:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, and must be a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{path.name} in it is a folder")
    with tempfile.TemporaryFile(dir=paths[0].parent) as file:
        file.write(b"1")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument(
            "--out",
            type=Path,
            default=OUT,
            help=f"folder to write to, default {OUT}; benchmarks/results has what is committed",
        )
        command.add_argument("--repeats", type=int, default=Settings.repeats)
        command.add_argument(
            "--quick", action="store_true", help="small sizes, to see that everything runs"
        )
        command.add_argument("--part", help="one part only, with results under its own name")
        command.add_argument("--quiet", action="store_true", help="no progress")
        command.add_argument(
            "--seconds",
            type=float,
            default=math.inf,
            metavar="S",
            help="begin no more rounds after about this time; three of each are made anyway",
        )
        command.add_argument(
            "--resume",
            action="store_true",
            help="keep what an earlier run on this machine has written, and measure the rest",
        )
        command.add_argument(
            "--read",
            type=Path,
            metavar="CSV",
            help="measure nothing: print, and draw into --out, what an earlier run wrote",
        )
    everything = commands.add_parser(
        GPU, help="all that is timed on a GPU, in minutes", description=gpu.__doc__
    )
    everything.add_argument("--out", type=Path, default=OUT)
    everything.add_argument("--seconds", type=float, default=540.0, metavar="S")
    everything.add_argument("--quick", action="store_true")
    return parser


# Parts that need a GPU, and their shares of the time.
GPU = "gpu"
ON_GPU = {
    ("host", "calls"): 0.04,
    ("step", "gpu"): 0.52,
    ("overhead", "sd15"): 0.12,
    ("overhead", "sdxl"): 0.14,
    ("loop", "gpu"): 0.18,
}


def gpu(options: argparse.Namespace) -> None:
    """Measure all that needs a GPU, each part for its share of the time, and go on where it was.

    Every part writes a table of its own; the steps' is written after every size.  Called again,
    this measures what is missing.
    """
    for (command, part), share in ON_GPU.items():
        given = [command, "--part", part, "--resume", "--out", str(options.out)]
        given += ["--seconds", str(share * options.seconds), *["--quick"] * options.quick]
        print(f"\n== {' '.join(given)}", flush=True)
        main(given)


def main(arguments: Sequence[str] | None = None) -> None:
    print_anything()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.list:
        say_what_there_is()
        return
    if options.command is None:
        parser.error(f"a command is needed, one of: {', '.join(COMMANDS)}")
    if not options.command == GPU and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds:g}")
    if options.command == GPU:
        gpu(options)
        return
    # A quick run, or a part, must not overwrite the results that documents refer to.
    name = "_".join(
        [options.command, *([options.part] if options.part else []), *["quick"] * options.quick]
    )
    path = options.out / f"{name}.csv"
    try:
        check_writable(path, path.with_suffix(".png"))
    except OSError as error:
        told = f"{parser.prog}: error: --out {options.out} cannot be written to: {error.strerror}"
        print(told, file=sys.stderr)
        sys.exit(command_line.status(error))
    try:
        module = import_module(f"benchmarks.{options.command}")
    except ImportError as error:
        parser.error(f"{options.command} cannot run here: {extras.told('it', error, 'models')}")
    parts = module.PARTS
    if options.part is not None:
        if options.part not in parts:
            parser.error(f"--part must be one of {', '.join(parts)}, got {options.part}")
        parts = {options.part: parts[options.part]}
    try:
        if options.read is None:
            rows, where = measured(module, parts, options, path)
            write_csv(path, rows, where)
        else:
            rows, where = read_table(options.read, module)
        tell(module, rows)
        if options.read is None:
            print(f"written to {path}")
        if hasattr(module, "draw"):
            print(module.draw(rows, path.with_suffix(".png"), where))
    except OSError as error:  # the results have been printed above
        sys.exit(f"{parser.prog}: error: {error}")


def read_table(path: Path, module: Any) -> tuple[list[AnyRow], dict[str, str]]:
    """Read and print an earlier run; ends the program if the file is not such a table."""
    try:
        rows, where = read_csv(path, module.ROW)
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks: error: --read: {error}", file=sys.stderr)
        sys.exit(command_line.status(error))
    say_where(where)
    print(f"\n{getattr(module, 'shown', table)(rows)}")
    return rows, where


def measured(
    module: Any, parts: Mapping[str, Any], options: argparse.Namespace, path: Path
) -> tuple[list[AnyRow], dict[str, str]]:
    """Run all parts, print their rows and write them to ``path`` as they come.

    Returns the rows, with those of an earlier run that is gone on with, and the machine.
    """
    extras.hush_torchvision()
    where = machine(**getattr(module, "named_devices", dict)())
    say_where(where)
    rows: list[Any] = earlier(path, module, where) if options.resume else []
    unit = getattr(module, "UNIT", ("benchmark", "case", "dtype"))
    known = {
        tuple(str(getattr(row, name)) for name in unit)
        for row in rows
        if all(hasattr(row, name) for name in unit)
    }
    if rows and not known:
        print(f"{path} is there, and is kept")
        return rows, where

    def keep(found: Sequence[AnyRow]) -> None:
        kept.extend(found)
        write_csv(path, kept, where)

    kept = list(rows)
    settings = Settings(
        options.repeats,
        options.quick,
        time.monotonic() + options.seconds,
        keep,
        frozenset(known),
    )
    with showing(not options.quiet), saying_what_compiles(not options.quiet):
        for i, (part, function) in enumerate(parts.items()):
            say(f"\n{part}: {first_line(function)}")
            found = function(settings.share(len(parts) - i))
            if found:
                say(getattr(module, "shown", table)(found))
            rows += found
    return rows, where


# What must be the same of two runs whose rows stand in one table.
SAME = ("cpu", "gpu", "python", "dng_math", "torch", "triton")


def earlier(path: Path, module: Any, where: Mapping[str, str]) -> list[AnyRow]:
    """Rows that an earlier run on this machine left; ends the program if it was another."""
    if not path.exists():
        return []
    rows, was = read_csv(path, module.ROW)
    other = [name for name in SAME if was.get(name) != where.get(name)]
    if other:
        told = ", ".join(f"{name} {was.get(name)} before, {where.get(name)} now" for name in other)
        print(f"python -m benchmarks: error: --resume: {path} is of {told}", file=sys.stderr)
        sys.exit(2)
    return rows


def say_where(where: Mapping[str, str]) -> None:
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)


def tell(module: Any, rows: Sequence[AnyRow]) -> None:
    """Print the report, and which goals were reached."""
    if hasattr(module, "report"):
        print("\nreport")
        print("\n".join(f"  {line}".rstrip() for line in module.report(rows)))
    print("\ngoals")
    for row in rows:
        if row.goal:
            print(f"  {row.met}: {subject(row)}: {row.goal}; {row.measured}")


if __name__ == "__main__":
    main()
