"""Draw the figures: ``python -m figures [NAME ...]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from figures import (
    class_removal,
    class_removal_networks,
    guidance_1d,
    pipeline_digits,
    posterior_tracking,
    schedulers,
    score_fields,
    style,
    tracker_steps,
    update_geometry,
)

FIGURES: dict[str, ModuleType] = {
    "guidance_1d": guidance_1d,
    "update_geometry": update_geometry,
    "posterior_tracking": posterior_tracking,
    "score_fields": score_fields,
    "tracker_steps": tracker_steps,
    "class_removal": class_removal,
    "class_removal_networks": class_removal_networks,
    "pipeline_digits": pipeline_digits,
    "schedulers": schedulers,
}
FORMATS = ("png", "svg")
OUT = Path("figures", "out")


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError where a name is not that of a figure."""
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(
            f"figure must be one of {', '.join(FIGURES)}; got {', '.join(map(repr, unknown))}"
        )


def missing(name: str) -> list[str]:
    """Packages that a figure needs and that are not installed."""
    needs: Sequence[str] = getattr(FIGURES[name], "NEEDS", ())
    return [package for package in needs if find_spec(package) is None]


def draw_figures(
    names: Sequence[str] = (),
    *,
    out: Path = OUT,
    formats: Collection[str] = ("png",),
    quick: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Draw some figures, or all that what is installed can draw; the files written.

    Raises
    ------
    ValueError
        If a name is not in :data:`FIGURES`, or needs a package that is not installed.
    """
    check_names(names)
    for name in names or FIGURES:
        if missing(name):
            needed = f"{name} needs {', '.join(missing(name))}: pip install 'dng-toolkit[models]'"
            if names:
                raise ValueError(needed)
            tqdm.write(f"left out: {needed}")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    drawn = names or [name for name in FIGURES if not missing(name)]
    with tqdm(drawn, unit="figure") as progress:
        for name in progress:
            progress.set_description(name)
            started = time.perf_counter()
            module = FIGURES[name]
            data = module.compute(quick=quick, seed=seed)
            for stem, figure in module.draw(data).items():
                for suffix in formats:
                    path = out / f"{stem}.{suffix}"
                    style.save(figure, path)
                    written.append(path)
            seconds = time.perf_counter() - started
            tqdm.write(f"{name} [{seconds:.1f} s]: {module.summary(data)}")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m figures", description="Draw the figures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw; default all")
    parser.add_argument("--list", action="store_true", help="name the figures and stop")
    parser.add_argument("--quick", action="store_true", help="smaller samples")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.list:
        for name, module in FIGURES.items():
            print(f"{name:24}{module.PAPER:20}{module.TITLE}")
        return 0
    try:
        draw_figures(
            given.names, out=given.out, formats=given.format, quick=given.quick, seed=given.seed
        )
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
