"""``python -m benchmarks mixture``: time one thing, print a table, write a CSV."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.harness import Settings, machine, table, write_csv

# Modules of this package, imported when asked for: each needs what it measures.
COMMANDS = {
    "mixture": "exact mixtures on the CPU, against NumPy, SciPy, scikit-learn, torch and JAX",
}


def first_line(function: object) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--out", type=Path, default=Path("benchmarks/results"))
        command.add_argument("--repeats", type=int, default=Settings.repeats)
        command.add_argument(
            "--quick", action="store_true", help="small sizes, to see that everything runs"
        )
    options = parser.parse_args(arguments)
    if options.list:
        for name, summary in COMMANDS.items():
            print(f"{name}: {summary}")
            for part, function in import_module(f"benchmarks.{name}").PARTS.items():
                print(f"    {part}: {first_line(function)}")
        return
    if options.command is None:
        parser.error(f"a command is needed, one of: {', '.join(COMMANDS)}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")

    where = machine()
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    rows = []
    for part, function in import_module(f"benchmarks.{options.command}").PARTS.items():
        print(f"\n{part}: {first_line(function)}", flush=True)
        found = function(Settings(options.repeats, options.quick))
        print(table(found), flush=True)
        rows += found
    # A trial must not overwrite the results that documents refer to.
    path = options.out / f"{options.command}{'_quick' if options.quick else ''}.csv"
    write_csv(path, rows, where)
    print("\ngoals")
    for row in rows:
        if row.goal:
            print(f"  {row.met}: {row.benchmark}, {row.contender}: {row.goal}; {row.measured}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
