"""Draw the figures: ``python -m figures [NAME ...]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from dng_models.support import command_line, extras
from dng_models.support.interrupt import end_at_interrupt
from dng_models.support.printable import print_anything
from dng_models.support.progress import Progress, is_shown, say, saying_what_compiles, showing

if __name__ == "__main__":
    end_at_interrupt()  # before the imports that take seconds

try:
    from figures import (
        class_removal,
        class_removal_networks,
        class_removal_tuned,
        guidance_1d,
        league,
        league_hard,
        path_tracker,
        pipeline_digits,
        posterior_tracking,
        schedulers,
        score_fields,
        style,
        text_to_image,
        tracker_steps,
        update_geometry,
    )
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"python -m figures: error: {extras.told('figures', error)}", file=sys.stderr)
    sys.exit(2)

FIGURES: dict[str, ModuleType] = {
    "guidance_1d": guidance_1d,
    "update_geometry": update_geometry,
    "posterior_tracking": posterior_tracking,
    "score_fields": score_fields,
    "tracker_steps": tracker_steps,
    "path_tracker": path_tracker,
    "league": league,
    "league_hard": league_hard,
    "class_removal": class_removal,
    "class_removal_tuned": class_removal_tuned,
    "class_removal_networks": class_removal_networks,
    "pipeline_digits": pipeline_digits,
    "schedulers": schedulers,
    "text_to_image": text_to_image,
}
FORMATS = ("png", "svg")
OUT = Path("figures", "out")


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError if a name is not that of a figure."""
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(
            f"figure must be one of {', '.join(FIGURES)}; got {', '.join(map(repr, unknown))}"
        )


def missing(name: str) -> list[str]:
    """Packages that a figure needs but that are not installed."""
    needs: Sequence[str] = getattr(FIGURES[name], "NEEDS", ())
    return [package for package in needs if find_spec(package) is None]


def check_folder(out: Path) -> None:
    """Make the folder, and raise OSError if nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"1")
    except OSError as error:
        raise type(error)(
            error.errno, f"--out {out} cannot be written to: {error.strerror}"
        ) from error


def draw_figures(
    names: Sequence[str] = (),
    *,
    out: Path = OUT,
    formats: Collection[str] = ("png",),
    quick: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Draw the named figures, or all that the installed packages allow.

    Parameters
    ----------
    names : sequence of str
        Names in :data:`FIGURES`; empty for all.
    out : Path
        Folder to write to.
    formats : collection of str
        Some of "png" and "svg".
    quick : bool
        Whether to use smaller samples.
    seed : int

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    ValueError
        If a name is not in :data:`FIGURES`, or needs a package that is not installed.
    OSError
        If nothing can be written to ``out``; where possible, before anything is drawn.
    """
    check_names(names)
    for name in names or FIGURES:
        if missing(name):
            packages = missing(name)
            needed = f"{name} needs {', '.join(packages)}: {extras.cure(packages[0], 'models')}"
            if names:
                raise ValueError(needed)
            say(f"left out: {needed}")
    check_folder(out)
    written = []
    drawn = names or [name for name in FIGURES if not missing(name)]
    with Progress(len(drawn), unit="figure", leave=False) as progress:
        for number, name in enumerate(drawn, 1):
            progress.set_description(name)
            module = FIGURES[name]
            minutes = 0 if quick else getattr(module, "MINUTES", 0)
            if is_shown() and (minutes or not sys.stderr.isatty()):
                takes = f": about {minutes} minutes on two idle cores" if minutes else ""
                say(f"drawing {name}, {number} of {len(drawn)}{takes}", sys.stderr)
            started = time.perf_counter()
            data = module.compute(quick=quick, seed=seed)
            paths = []
            for stem, figure in module.draw(data).items():
                for suffix in formats:
                    paths.append(out / f"{stem}.{suffix}")
                    style.save(figure, paths[-1])
            seconds = time.perf_counter() - started
            say(f"{name} [{seconds:.1f} s]: {module.summary(data)}")
            say(f"written to {', '.join(map(str, paths))}")
            written += paths
            progress.update()
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m figures", description="Draw the figures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw; default all")
    parser.add_argument("--list", action="store_true", help="name the figures and stop")
    parser.add_argument("--quick", action="store_true", help="smaller samples")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    if given.list:
        for name, module in FIGURES.items():
            minutes = getattr(module, "MINUTES", 0)
            takes = f" [{minutes} minutes]" if minutes else ""
            print(f"{name:24}{module.PAPER:20}{module.TITLE}{takes}")
        return 0
    extras.hush_torchvision()
    try:
        with showing(not given.quiet), saying_what_compiles(not given.quiet):
            draw_figures(
                given.names, out=given.out, formats=given.format, quick=given.quick, seed=given.seed
            )
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return command_line.status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
